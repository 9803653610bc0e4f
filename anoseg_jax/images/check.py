"""Opens and decodes every file of a category once: what is wrong with them, and figures."""

import collections
import concurrent.futures
import dataclasses
import os
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
from etils.epath import Path
from scipy import ndimage

from anoseg_jax.images import decode
from anoseg_jax.images.decode import LayoutError, printable
from anoseg_jax.images.examples import Example, ReadOptions, size_mismatch
from anoseg_jax.images.folders import by_folder, names_of

# Below this, a defect at `image_size` is a dot that nothing can outline.
_SMALLEST_DEFECT = 4  # pixels
_SQUEEZED = 1.5  # times wider or higher than the photograph


@dataclasses.dataclass
class Checked:
    """What reading one example showed.

    `wide` is the range of the values of an image of more than 8 bits, `brightest` the largest value
    of any other; `share` is the defective share of the pixels, `smallest` the share of the smallest
    defect and its number of pixels.
    """

    example: Example
    size: tuple[int, int] | None = None
    format: str = ""
    is_float: bool = False
    has_frames: bool = False
    wide: tuple[float, float] | None = None
    brightest: int = 255
    share: float | None = None
    smallest: tuple[float, int] | None = None
    mask_kinds: dict[Path, str] = dataclasses.field(default_factory=dict)
    errors: list[str] = dataclasses.field(default_factory=list)


def check_files(examples: Sequence[Example], options: ReadOptions) -> list[Checked]:
    """Reads image and masks of every example, several at once; errors are collected."""
    # Pillow releases the interpreter lock while it decodes.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda example: _check(example, options.max_megapixels), examples))


def _check(example: Example, max_megapixels: float) -> Checked:
    checked = Checked(example)
    try:
        picture = decode.open_image(example.image, max_megapixels=max_megapixels)
        checked.wide = decode.value_range(picture)
        if checked.wide is None:
            checked.brightest = int(decode.to_rgb(picture).max())
        checked.size, image = picture.size, picture.image
        checked.format = f"{image.format} {image.mode}"
        if checked.wide and image.mode.startswith("RGB"):
            checked.format += " 16-bit"
        checked.is_float, checked.has_frames = image.mode == "F", picture.has_frames
    except LayoutError as error:
        checked.errors.append(str(error))
    masks = []
    for path in (*example.masks, *example.ignore):
        try:
            mask, kind = decode.decode_mask(path, max_megapixels=max_megapixels)
        except LayoutError as error:
            checked.errors.append(str(error))
            continue
        if checked.size and mask.shape != checked.size:
            checked.errors.append(size_mismatch(example, path, mask.shape, checked.size))
        elif path in example.masks:
            checked.mask_kinds[path] = kind
            masks.append(mask)
    if masks and len(masks) == len(example.masks) and len({mask.shape for mask in masks}) == 1:
        mask = np.any(masks, axis=0)
        checked.share = float(mask.mean())
        if mask.any():
            regions, _ = ndimage.label(mask, np.ones((3, 3)))
            area = int(np.bincount(regions.ravel())[1:].min())
            checked.smallest = area / mask.size, area
    return checked


def choose_bit_depth(checked: Iterable[Checked], asked: str | int) -> int:
    """Returns the bit depth that was asked for; "auto" is the smallest that holds all images."""
    if asked != "auto":
        return int(asked)
    ranges = [(one.wide[1], one.is_float) for one in checked if one.wide]
    needed = [decode.bits_that_hold(high, is_float=is_float) for high, is_float in ranges]
    return max(needed, default=8)


def bit_depth_errors(checked: Sequence[Checked], bit_depth: int) -> list[str]:
    """Names the images that the bit depth does not hold, and scales that do not go together."""
    errors = [
        decode.above_bit_depth(one.example.image, one.wide[1], bit_depth)
        for one in checked
        if one.wide and one.wide[1] > 2**bit_depth - 1
    ]
    floats = [one for one in checked if one.is_float]
    if bit_depth > 1 and floats and max(one.wide[1] for one in floats) <= 1:
        errors.append(
            f"{printable(floats[0].example.image)}: has float values from 0 to 1, and other images "
            f"are on the scale of bit_depth={bit_depth}: save all images in one number format"
        )
    return errors


def _lines(paths: Sequence[Path], one: str, several: str) -> list[str]:
    """A line for the only file, else one for each folder; "{}" stands for the number of files."""
    if len(paths) == 1:
        return [f"{printable(paths[0])}: {one}"]
    return [
        f"{printable(folder)}: {several.format(len(files))} ({printable(names_of(files))})"
        for folder, files in by_folder(paths).items()
    ]


def image_warnings(checked: Sequence[Checked], bit_depth: int) -> list[str]:
    """Warns of images of which little or a part is used, a line for each folder."""
    top = 2**bit_depth - 1
    dark = [
        one.example.image
        for one in checked
        if one.size and (one.wide[1] / top * 255 if one.wide else one.brightest) <= 16
    ]
    frames = [one.example.image for one in checked if one.has_frames]
    use = "use the whole range of the file's number format"
    return [
        *_lines(dark, f"is almost black: {use}", f"{{}} images are almost black: {use}"),
        *_lines(
            frames,
            "has several pages or frames: only the first is read",
            "{} images have several pages or frames: only the first is read",
        ),
    ]


def masks_by_type(checked: Sequence[Checked]) -> dict[str, list[Checked]]:
    """Returns the examples whose masks could be read by their defect type."""
    by_type = collections.defaultdict(list)
    for one in checked:
        if one.share is not None and one.example.label:
            by_type[one.example.defect_type].append(one)
    return by_type


def mask_warnings(checked: Sequence[Checked]) -> list[str]:
    """Warns of masks that are empty, inverted or grey, judged by all masks of a defect type."""
    warnings = []
    for of_type in masks_by_type(checked).values():
        mask_of = {one.example.masks[0]: one for one in of_type}
        empty = [path for path, one in mask_of.items() if not one.share]
        what = "its image is among the defective ones: draw the defect, or move the image"
        warnings += _lines(
            empty,
            f"is empty, but {what} to test/good",
            "{} masks are empty, but their images are among the defective ones: draw the defects, "
            "or move the images to test/good",
        )
        median = statistics.median(one.share for one in of_type)
        large = [path for path, one in mask_of.items() if one.share > 0.9]
        folder = printable(next(iter(mask_of)).parent)
        if median > 0.5:
            warnings.append(
                f"{folder}: its {len(of_type)} masks cover {median:.0%} of the image in the "
                "median: are they inverted? Every pixel but 0 is defective"
            )
        else:
            warnings += _lines(
                large,
                "covers more than 90% of the image: is it inverted?",
                "{} masks cover more than 90% of the image: are they inverted?",
            )
    kinds = collections.defaultdict(list)
    for one in checked:
        for path, kind in one.mask_kinds.items():
            kinds[kind].append(path)
    for kind in (decode.GREY_EDGES, decode.MANY_GREYS):
        what = f"{kind}: save masks of two values without loss"
        warnings += _lines(kinds[kind], f"was read as {what}", f"{{}} masks were read as {what}")
    return warnings


def size_warnings(checked: Sequence[Checked], image_size: tuple[int, int]) -> list[str]:
    """Warns of images that `image_size` squeezes and of defects that it makes too small."""
    warnings = []
    height, width = image_size
    here = f"image_size={width}x{height} (width x height)"
    squeezed = collections.Counter()
    for h, w in (one.size for one in checked if one.size):
        ratio = w * height / (h * width)
        if max(ratio, 1 / ratio) > _SQUEEZED:
            squeezed[h, w] += 1
    if squeezed:
        (h, w), _ = squeezed.most_common(1)[0]
        # As many pixels, in the shape of the image.
        image_size = (height * width * h / w) ** 0.5, (height * width * w / h) ** 0.5
        warnings.append(
            f"{here} squeezes {squeezed.total()} images, such as {w}x{h}: by {w / width:.3g}:1 in "
            f"width and {h / height:.3g}:1 in height; {_set_size(image_size)}, or cut them into "
            "tiles"
        )
    smallest = [one.smallest for one in checked if one.smallest]
    pixels = [share * height * width for share, _ in smallest]
    lost = [i for i, count in enumerate(pixels) if count < _SMALLEST_DEFECT]
    if lost:
        worst = min(lost, key=pixels.__getitem__)
        in_file = smallest[worst][1]
        advice = "its file has no more"
        if in_file >= _SMALLEST_DEFECT:
            scale = (_SMALLEST_DEFECT / pixels[worst]) ** 0.5
            advice = f"{_set_size([scale * side for side in image_size])}, or cut into tiles"
        warnings.append(
            f"{here} leaves the smallest defect of {len(lost)} of {len(pixels)} masks fewer than "
            f"{_SMALLEST_DEFECT} pixels; the smallest has {pixels[worst]:.2g} ({in_file} in its "
            f"file): {advice}"
        )
    return warnings


def _set_size(sides: Sequence[float]) -> str:
    """Returns the option for a size close to `sides`, with their aspect ratio.

    Height and width are multiples of 32: the networks of configs/default.py halve them five times.
    """
    short = 32 * max(1, int(np.ceil(min(sides) / 32 - 0.25)))
    height, width = (32 * round(side * short / min(sides) / 32) for side in sides)
    return f'set --config.image_size="({height}, {width})" (height, width)'
