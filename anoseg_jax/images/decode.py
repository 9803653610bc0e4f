"""Reads one image or mask file of any format and bit depth that Pillow reads, and resizes it.

Images are uint8 RGB `[h, w, 3]`, masks bool `[h, w]` with True where the part is defective.
"""

import dataclasses
import io
import sys
import unicodedata
import warnings

import numpy as np
from etils.epath import Path
from PIL import Image, ImageOps
from scipy import ndimage

from anoseg_jax import UsageError

# A header may declare any size: 60000x60000 pixels fit into 74 bytes of PNG and take 10 GB once
# decoded. 150 megapixels holds the largest area-scan sensors.
MAX_MEGAPIXELS = 150
# Cameras write faulty EXIF data; what matters here, the orientation, is read or left alone.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
# `open_image` has that limit itself; Pillow's own would warn at 89 and raise at 179 megapixels.
Image.MAX_IMAGE_PIXELS = None
# A bit depth of b means values from 0 to 2**b - 1. 1 is for float images from 0 to 1.
BIT_DEPTHS = (1, 8, 10, 12, 14, 16)
# Grey masks whose brightest value is below this hold class numbers (0, 1, 2, ...), not brightness.
_CLASS_NUMBERS_BELOW = 32
# How masks are read, see `decode_mask`.
TWO_VALUES = "two values"
SEVERAL_VALUES = "several values (all but 0 is defective)"
GREY_EDGES = "grey edges (cut at half of the brightest value)"
MANY_GREYS = "many greys (all above a tenth of the brightest value is defective)"
LABEL_MAP = "coloured palette (all but the background is defective)"
ALPHA = "alpha channel"


class LayoutError(UsageError):
    """A folder or file that cannot be used; each line of the message names one and says why."""


def printable(path: object) -> str:
    """Returns a path or name as text that can be printed and stored.

    Unicode is composed (NFC); bytes that are not UTF-8 become `\\xbb`.
    """
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded file, upright.

    `wide` holds the values of an image of more than 8 bits or of floats, `[h, w]` or `[h, w, 3]`;
    Pillow itself clips these or keeps 8 bits of them. None for all others.
    """

    path: Path
    image: Image.Image
    wide: np.ndarray | None
    has_frames: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.size[::-1]


def read_image(
    path: Path, *, bit_depth: int | None = None, max_megapixels: float = MAX_MEGAPIXELS
) -> np.ndarray:
    """Reads an image as it is meant to be seen.

    EXIF orientation is applied, transparency is dropped as OpenCV and torchvision do.

    Args:
      path: an image file that Pillow can read; of several frames the first is taken.
      bit_depth: of BIT_DEPTHS: the value 2**bit_depth - 1 becomes 255 in images of more than 8 bits
        or of floats. None: the smallest that holds this file. Images of 8 bits are not scaled.
      max_megapixels: of a larger file nothing but the header is read.

    Returns:
      uint8 `[h, w, 3]`, RGB.

    Raises:
      LayoutError: the file cannot be read or has values above the bit depth; names it in one line.
    """
    return to_rgb(open_image(path, max_megapixels=max_megapixels), bit_depth)


def read_mask(path: Path, *, max_megapixels: float = MAX_MEGAPIXELS) -> np.ndarray:
    """Reads a mask, however it was saved: bool `[h, w]`, True where defective.

    See `decode_mask`. Raises LayoutError, one line that names the file.
    """
    return decode_mask(path, max_megapixels=max_megapixels)[0]


def decode_mask(path: Path, *, max_megapixels: float = MAX_MEGAPIXELS) -> tuple[np.ndarray, str]:
    """Reads a mask, however it was saved, and tells how it was read.

    - Grey, 1-bit, 16-bit and float: every pixel but 0 is defective, so that no class of defects is
      lost. The exception is a mask of two values that was smoothed or compressed with loss: it is
      cut at half of its brightest value, in the middle of its edges.
    - Colour: the same rule on the brightest of the three channels.
    - Palette with colours: a label map. Normal is black where black is used, else entry 0.
      (A palette of greys only is read as grey.)
    - Alpha counts only where it varies over the file.

    Returns:
      The mask, bool `[h, w]`, and one of TWO_VALUES, SEVERAL_VALUES, ...

    Raises:
      LayoutError: the file cannot be read; one line that names it.
    """
    picture = open_image(path, max_megapixels=max_megapixels)
    image, alpha = picture.image, None
    if image.mode == "P":
        colours = _convert(picture, "RGB")  # [h, w, 3]
        if np.ptp(colours, axis=-1).any():
            black = ~colours.any(axis=-1)
            return (~black if black.any() else np.asarray(image) != 0), LABEL_MAP
        values = colours[..., 0]
    elif image.mode == "L":
        values = np.asarray(image)
    elif picture.wide is not None and "A" not in image.mode:
        values = picture.wide if picture.wide.ndim == 2 else picture.wide.max(axis=-1)
    else:
        rgba = _convert(picture, "RGBA")  # [h, w, 4]
        values, alpha = rgba[..., :3].max(axis=-1), rgba[..., 3]
        if np.ptp(alpha):
            # Either drawn in the alpha alone, over one colour, or a cut-out of colours.
            values = np.minimum(values, alpha) if np.ptp(values) else alpha
    if not np.isfinite(values).all() or values.min() < 0:
        raise LayoutError(
            f"{printable(path)}: has negative or non-finite values: save the mask as 8-bit grey"
        )
    # Colour is compressed in blocks of 16x16.
    mask, how = _defective(values, block=8 if alpha is None else 16)
    return mask, ALPHA if alpha is not None and np.ptp(alpha) and how == TWO_VALUES else how


def open_image(path: Path, *, max_megapixels: float = MAX_MEGAPIXELS) -> Picture:
    """Returns the decoded image, upright; LayoutError names the file that cannot be read."""
    data = None
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_megapixels * 1e6:
                raise Image.DecompressionBombError
            # The second picture of a phone's .mpo is a preview or a depth map.
            has_frames = getattr(image, "is_animated", False) and image.format != "MPO"
            lower_bytes = _lower_bytes(image, data)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            wide = None
            if lower_bytes is not None:
                upper_bytes = np.asarray(image)[..., :3].astype(np.uint16)
                wide = upper_bytes * 256 + lower_bytes
            elif image.mode == "F" or image.mode.startswith("I"):
                wide = np.asarray(image)
            return Picture(path, image, wide, has_frames)
    except Image.DecompressionBombError as error:
        raise LayoutError(
            f"{printable(path)}: declares more than {max_megapixels:g} megapixels: it is damaged, "
            "or has to be cut into smaller images, or needs a higher --config.max_megapixels"
        ) from error
    # A damaged file makes a decoder raise nearly anything: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise LayoutError(f"{printable(path)}: {_why_unreadable(data, error)}") from error


def _lower_bytes(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Returns the lower bytes of a colour image of 16 bits, [h, w, 3]; None for any other.

    Pillow has no such mode and decodes the upper bytes. Read with the other order of bytes, the
    same decoder gives the lower ones.
    """
    modes = {tile[3] if isinstance(tile[3], str) else tile[3][0] for tile in image.tile if tile[3]}
    raw = modes.pop() if len(modes) == 1 else ""
    if image.mode not in ("RGB", "RGBA", "RGBX") or not isinstance(raw, str) or ";16" not in raw:
        return None
    native, other = ("16L", "16B") if sys.byteorder == "little" else ("16B", "16L")
    raw = raw.replace("16N", native)
    swapped = raw.replace(native, other) if native in raw else raw.replace(other, native)
    if raw.startswith("LA"):
        swapped = "RGBA"  # each byte of grey and alpha as a channel of its own
    with Image.open(io.BytesIO(data)) as lower:
        lower.tile = [
            tile._replace(args=swapped if isinstance(tile[3], str) else (swapped, *tile[3][1:]))
            for tile in lower.tile
        ]
        ImageOps.exif_transpose(lower, in_place=True)
        channels = np.asarray(lower)
    return channels[..., 1:2].repeat(3, -1) if raw.startswith("LA") else channels[..., :3]


def _why_unreadable(data: bytes | None, error: Exception) -> str:
    why = " ".join(str(error).split()) or type(error).__name__
    if data is None:
        why = getattr(error, "strerror", None) or why
        return f"cannot be opened ({why}): restore it or remove it"
    if not data:
        return "is empty (0 bytes): copy it again or remove it"
    if data.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not an image: run `git lfs pull`"
    if isinstance(error, Image.UnidentifiedImageError):
        return "is not an image in a format that pillow reads: convert it or remove it"
    return f"is damaged or cut short ({why}): copy it again or remove it"


def _convert(picture: Picture, mode: str) -> np.ndarray:
    try:
        return np.array(picture.image.convert(mode))
    except ValueError as error:
        raise LayoutError(f"{printable(picture.path)}: {error}: save it as 8-bit RGB") from error


# Bit depth.


def value_range(picture: Picture) -> tuple[float, float] | None:
    """Returns the smallest and largest value of a `wide` picture; None for images of 8 bits.

    Raises LayoutError if they are of no scale known: negative, not finite, above 65535.
    """
    if picture.wide is None:
        return None
    low, high = float(picture.wide.min()), float(picture.wide.max())
    if not (low >= 0 and high <= 65535):  # also refuses nan
        raise LayoutError(
            f"{printable(picture.path)}: has values from {low:g} to {high:g} where 0 to 65535 was "
            "expected: save it as 8-bit or 16-bit grey"
        )
    return low, high


def bits_that_hold(high: float, *, is_float: bool) -> int:
    """Returns the smallest of BIT_DEPTHS that holds the value; 1 is for floats alone."""
    depths = BIT_DEPTHS if is_float else BIT_DEPTHS[1:]
    return next(depth for depth in depths if high <= 2**depth - 1)


def to_rgb(picture: Picture, bit_depth: int | None = None) -> np.ndarray:
    """Returns a decoded image as uint8 RGB `[h, w, 3]`; see `read_image`."""
    limits = value_range(picture)
    if limits is None:
        return _convert(picture, "RGB")  # [h, w, 3]
    needed = bits_that_hold(limits[1], is_float=picture.image.mode == "F")
    if bit_depth is None:
        bit_depth = needed
    top = 2**bit_depth - 1
    if limits[1] > top:
        raise LayoutError(above_bit_depth(picture.path, limits[1], bit_depth))
    # Pillow's own conversion of these images clips at 255 instead of scaling.
    values = np.round(picture.wide.astype(np.float64) * (255.0 / top)).astype(np.uint8)
    return values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=-1)


def above_bit_depth(path: Path, high: float, bit_depth: int) -> str:
    """Says that an image has values that the bit depth does not hold, and what to do."""
    needed = bits_that_hold(high, is_float=False)
    return (
        f"{printable(path)}: has values up to {high:g}, and bit_depth={bit_depth} (that of the "
        f"training images) ends at {2**bit_depth - 1}: train with --config.bit_depth={needed}, or "
        "save it on the scale of the training images"
    )


# Grey masks.


def _defective(values: np.ndarray, block: int = 8) -> tuple[np.ndarray, str]:
    """Returns the defective pixels of a grey mask, and how it was read.

    The mask had two values and was smoothed or compressed if all its greys lie at the edges of its
    bright regions, as no class would: smoothing leaves slopes beside edges, lossy compression
    leaves noise within its blocks, `block` pixels wide and high. Neither leaves areas of one grey,
    except that compression may leave small ones of the faintest greys, up to a tenth of the peak.
    """
    counts = np.bincount(values.ravel()) if values.dtype == np.uint8 else None
    levels = np.unique(values) if counts is None else np.flatnonzero(counts)
    levels = levels[levels > 0]
    if len(levels) < 2:
        return values > 0, TWO_VALUES
    peak = levels[-1]
    is_class = np.issubdtype(values.dtype, np.integer) and peak < _CLASS_NUMBERS_BELOW
    if is_class or levels[0] > peak / 2:
        return values > 0, SEVERAL_VALUES
    bright = values > peak / 2
    faint = (values > 0) & ~bright
    faintest = faint & (values <= peak / 10)
    brightest_neighbour = ndimage.maximum_filter(values, 3)
    centres = faint & (brightest_neighbour == ndimage.minimum_filter(values, 3))
    flat = faint & ndimage.maximum_filter(centres, 3)  # in an area of one grey, 3x3 or larger
    near = ndimage.maximum_filter(bright, 2 * (block if faintest.any() else 2) + 1)
    grey = faint & ~faintest
    # With a handful of greys, each has to be part of a slope; more of them are noise.
    few = np.count_nonzero(levels <= peak / 2) <= 4
    on_slopes = not few or (brightest_neighbour > values)[faint].mean() > 0.9
    if on_slopes and not (grey & (flat | ~near)).any() and not _has_class(values, flat & faintest):
        return bright, GREY_EDGES
    if len(levels) <= _CLASS_NUMBERS_BELOW:
        return values > 0, SEVERAL_VALUES
    return (values > 0) & (~faintest | flat), MANY_GREYS


def _has_class(values: np.ndarray, flat: np.ndarray) -> bool:
    """Whether a value is in areas of one grey alone, as a class is; noise also is elsewhere."""
    levels, areas = np.unique(values[flat], return_counts=True)
    totals = [(values == level).sum() for level in levels]
    return bool((areas > 0.9 * np.array(totals)).any())


# Resizing.


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes an image, uint8 [h, w, 3], or an anomaly map, float32 [h, w], to `size`.

    `size` is (height, width); bilinear and antialiased.
    """
    if image.shape[:2] == tuple(size):
        return image
    resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized)


def resize_region(region: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a region, bool [h, w], to `size` (height, width) and keeps even single pixels."""
    if region.shape == tuple(size):
        return region
    shares = Image.fromarray(region.astype(np.float32)).resize(size[::-1], Image.Resampling.BOX)
    return np.asarray(shares) > 0


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a mask [h, w] (bool or 0/1) to `size` by nearest neighbour, bool.

    A defect never vanishes: if none of its pixels is left, every pixel of the result that covers
    a part of it is set.
    """
    mask = mask.astype(bool)
    if mask.shape == tuple(size):
        return mask
    resized = np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
    if mask.any() and not resized.any():
        resized = np.zeros(size, bool)
        rows, columns = np.nonzero(mask)
        for row, column in zip(rows, columns, strict=True):
            top, bottom = (np.array([row, row + 1]) * size[0]) / mask.shape[0]
            left, right = (np.array([column, column + 1]) * size[1]) / mask.shape[1]
            resized[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = True
    return resized
