"""Reads one image or mask file, of any format and bit depth that Pillow reads.

Images are uint8 RGB `[h, w, 3]`, masks bool `[h, w]` with True where the part is defective.
"""

import io

import numpy as np
from etils.epath import Path
from PIL import Image, ImageOps

from anoseg_jax import UsageError

# A header may declare any size: 60000x60000 pixels fit into 74 bytes of PNG and take 10 GB once
# decoded. 150 megapixels holds the largest area-scan sensors.
MAX_PIXELS = 150_000_000
# Grey masks whose brightest value is below this hold class numbers (0, 1, 2, ...), not brightness.
_CLASS_NUMBERS_BELOW = 32


class LayoutError(UsageError):
    """A folder or file that cannot be used; each line of the message names one and says why."""


def read_image(path: Path) -> np.ndarray:
    """Reads an image as it is meant to be seen.

    EXIF orientation is applied, 16-bit images are scaled so that 65535 becomes 255, float images
    have to be in [0, 1], transparency is dropped as OpenCV and torchvision do.

    Args:
      path: an image file that pillow can read; of several frames the first is taken.

    Returns:
      uint8 `[h, w, 3]`, RGB.

    Raises:
      LayoutError: the file cannot be read; one line that names it.
    """
    return to_rgb(open_image(path), path)


def read_mask(path: Path) -> np.ndarray:
    """Reads a mask, however it was saved.

    - Grey, 1-bit, 16-bit and float: defective above half of the file's brightest value, so that
      anti-aliased edges are cut in the middle and type ids such as 253, 254, 255 are all defective.
      Integer masks whose brightest value is below 32 hold class numbers: all but 0 is defective.
    - Colour: the same rule on the brightest of the three channels.
    - Palette with colours: a label map. Normal is black where black is used, else entry 0.
      (A palette of greys only is read as grey.)
    - Alpha counts only where it varies over the file.

    Args:
      path: an image file that pillow can read.

    Returns:
      bool `[h, w]`, True where defective.

    Raises:
      LayoutError: the file cannot be read; one line that names it.
    """
    return _to_mask(open_image(path), path)


def open_image(path: Path) -> Image.Image:
    """Returns the decoded image, upright."""
    data = None
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except Image.DecompressionBombError as error:
        raise LayoutError(
            f"{path}: declares more than {MAX_PIXELS // 10**6} megapixels: it is damaged, or has "
            "to be cut into smaller images"
        ) from error
    # A damaged file makes a decoder raise nearly anything: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise LayoutError(f"{path}: {_why_unreadable(data, error)}") from error


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


def to_rgb(image: Image.Image, path: Path) -> np.ndarray:
    """Returns a decoded image as uint8 RGB [h, w, 3]; LayoutError names `path`."""
    if image.mode != "F" and not image.mode.startswith("I"):
        try:
            return np.array(image.convert("RGB"))  # [h, w, 3]
        except ValueError as error:
            raise LayoutError(f"{path}: {error}: save it as 8-bit RGB or grey") from error
    # Pillow's own conversion of these modes clips at 255 instead of scaling.
    values = np.asarray(image).astype(np.float64)  # [h, w]
    top = 1.0 if image.mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= top):  # also refuses nan
        raise LayoutError(
            f"{path}: has values from {values.min():g} to {values.max():g} where 0 to {top:g} was "
            "expected: save it as 8-bit or 16-bit grey"
        )
    grey = np.round(values * (255.0 / top)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def _to_mask(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode == "P":
        colours = np.array(image.convert("RGB"))  # [h, w, 3]
        if np.ptp(colours, axis=-1).any():
            black = ~colours.any(axis=-1)
            return ~black if black.any() else np.asarray(image) != 0
        values = colours[..., 0]
    elif image.mode in ("L", "F") or image.mode.startswith("I"):
        values = np.asarray(image)
    else:
        try:
            rgba = np.array(image.convert("RGBA"))  # [h, w, 4]
        except ValueError as error:
            raise LayoutError(f"{path}: {error}: save the mask as 8-bit grey") from error
        values, alpha = rgba[..., :3].max(axis=-1), rgba[..., 3]
        if np.ptp(alpha):
            # Either drawn in the alpha alone, over one colour, or a cut-out of colours.
            values = np.minimum(values, alpha) if np.ptp(values) else alpha
    peak = values.max()
    if not np.isfinite(peak) or values.min() < 0:
        raise LayoutError(f"{path}: has negative or non-finite values: save the mask as 8-bit grey")
    if np.issubdtype(values.dtype, np.integer) and peak < _CLASS_NUMBERS_BELOW:
        return values > 0
    return values > peak / 2
