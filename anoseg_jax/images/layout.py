"""The one reader of the MVTec AD folder layout: pairs images with masks and checks every file.

    <data_dir>/<category>/train/good/<stem>.png
                          test/good/<stem>.png
                          test/<defect type>/<stem>.png
                          ground_truth/<defect type>/<stem>_mask.png   (or <stem>.png)

Images are uint8 RGB `[h, w, 3]`, masks bool `[h, w]` with True where the part is defective.
"""

import collections
import concurrent.futures
import dataclasses
import os
import statistics
import unicodedata

import numpy as np
from etils.epath import Path

from anoseg_jax.images.decode import LayoutError, open_image, read_image, read_mask, to_rgb

GOOD = "good"
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pbm"}
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One image file and its mask file, if it has one; `defect_type` is "good" for good parts."""

    image: Path
    mask: Path | None
    defect_type: str

    @property
    def label(self) -> int:
        """0 for a good part, 1 for a defective one."""
        return int(self.defect_type != GOOD)

    @property
    def name(self) -> str:
        """The image's path inside its category folder, e.g. "test/scratch/000.png"."""
        return "/".join(self.image.parts[-3:])


@dataclasses.dataclass(frozen=True)
class Category:
    """What `scan` found: the examples, what is wrong with them, and figures for the report.

    `errors` make the category unusable, `warnings` do not; each is one line that names a file or
    folder. `sizes` counts (height, width), `formats` counts e.g. "PNG L", `mask_shares` holds for
    each defect type the defective share of each mask's pixels, in [0, 1], and `ignored` the files
    that are in the folder but play no part.
    """

    name: str
    root: Path
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    sizes: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    formats: dict[str, int] = dataclasses.field(default_factory=dict)
    mask_shares: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    ignored: tuple[Path, ...] = ()


# Reading one file.


def load(example: Example) -> dict:
    """Reads one example.

    Args:
      example: as `scan` lists it.

    Returns:
      `image` uint8 `[h, w, 3]`; `mask` bool `[h, w]`, all False for a good part, None for a
      defective part without ground truth; `label` 0 or 1; `defect_type` and `name`, strings.

    Raises:
      LayoutError: a file cannot be read, or image and mask differ in size.
    """
    image = read_image(example.image)
    mask = None
    if example.mask is not None:
        mask = read_mask(example.mask)
        if mask.shape != image.shape[:2]:
            raise LayoutError(_size_mismatch(example, mask, image))
    elif not example.label:
        mask = np.zeros(image.shape[:2], bool)
    return {
        "image": image,
        "mask": mask,
        "label": example.label,
        "defect_type": example.defect_type,
        "name": example.name,
    }


def list_categories(data_dir: str | os.PathLike) -> tuple[str, ...]:
    """Returns the sorted names of the folders in `data_dir` that have a train or a test folder.

    Raises:
      LayoutError: `data_dir` is not a folder.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise LayoutError(f"{data_dir}: is not a folder: data_dir holds the category folders")
    return tuple(
        folder.name
        for folder in _folders(data_dir)
        if (folder / "train").is_dir() or (folder / "test").is_dir()
    )


def scan_categories(data_dir: str | os.PathLike, names: tuple[str, ...]) -> list[Category]:
    """Scans the named categories.

    Args:
      data_dir: the folder that holds the category folders.
      names: category names, or ("all",) for each that is there.

    Returns:
      One `Category` a name, in the order of `names`; look at `errors`, or call `require_usable`.

    Raises:
      LayoutError: a named category is missing, or there is none at all; lists what is there.
    """
    data_dir = Path(data_dir)
    there = list_categories(data_dir)
    if tuple(names) == ("all",):
        names = there
    missing = [name for name in names if name not in there]
    if missing or not names:
        what = f"no category {', '.join(missing)}" if missing else "no category folder"
        hint = ", ".join(there) or "none"
        if (data_dir / "train").is_dir():
            hint += f"; this folder is a category itself: use its parent, {data_dir.parent}"
        raise LayoutError(f"{data_dir}: {what} in it; categories there: {hint}")
    return [scan(data_dir / name) for name in names]


def require_usable(categories: list[Category]) -> None:
    """Raises LayoutError with every error of every category, one a line, if there is any."""
    errors = [error for category in categories for error in category.errors]
    if errors:
        raise LayoutError("\n".join(errors))


def scan(category_dir: str | os.PathLike) -> Category:
    """Pairs images with masks and opens and decodes every one of them.

    Never raises for what is in the folder: whatever is wrong is collected, so that all bad files
    are named at once.

    Args:
      category_dir: one category's folder.

    Returns:
      The `Category`; its examples are sorted by folder and file name.
    """
    root = Path(category_dir)
    errors, warnings, spoken_for = [], [], set()

    train_dir = _good_folder(root / "train")
    train = tuple(Example(image, None, GOOD) for image in _images(train_dir))
    if not train:
        what = "holds no images" if train_dir.is_dir() else "is missing"
        errors.append(f"{train_dir}: {what}: put the images of good parts there")

    test = []
    mask_dirs = {folder.name: folder for folder in _folders(root / "ground_truth")}
    has_masks = any(_images(d) for name, d in mask_dirs.items() if name.casefold() != GOOD)
    for folder in _folders(root / "test"):
        images = _images(folder)
        mask_dir = mask_dirs.pop(folder.name, root / "ground_truth" / folder.name)
        masks = _images(mask_dir)
        spoken_for.update(masks)
        if folder.name.casefold() == GOOD:
            test += [Example(image, None, GOOD) for image in images]
            warnings += _masks_of_good(masks)
        elif not masks and has_masks and images:
            test += [Example(image, None, folder.name) for image in images]
            errors.append(
                f"{mask_dir}: holds no masks for the {len(images)} images of test/{folder.name}, "
                "though other defect types have theirs: add them, or remove ground_truth to go "
                "without pixel metrics"
            )
        else:
            pairs, pair_errors, unused = _pair(images, masks)
            test += [Example(image, pairs.get(image), folder.name) for image in images]
            errors += pair_errors
            warnings += [
                f"{mask}: is ignored: no image in test/{folder.name} goes with it"
                for mask in unused
            ]
    for name, folder in mask_dirs.items():
        masks = _images(folder)
        spoken_for.update(masks)
        if masks:
            warnings.append(f"{folder}: {len(masks)} masks are ignored: there is no test/{name}")
    if any(example.label for example in test) and not has_masks:
        warnings.append(f"{root / 'ground_truth'}: no masks there: pixel metrics are not available")

    sizes, formats = collections.Counter(), collections.Counter()
    mask_shares = collections.defaultdict(list)
    examples = (*train, *test)
    # Pillow releases the interpreter lock while it decodes.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for example, checked in zip(examples, pool.map(_check, examples), strict=True):
            errors += checked.errors
            warnings += checked.warnings
            sizes.update([checked.size] if checked.size else [])
            formats.update([checked.format] if checked.size else [])
            if checked.mask_share is not None:
                mask_shares[example.defect_type].append(checked.mask_share)

    for example in examples:
        spoken_for.update({example.image, example.mask})
    ignored = tuple(path for path in _walk(root) if path not in spoken_for)
    for folder, paths in _by_folder(p for p in ignored if p.suffix.lower() in IMAGE_SUFFIXES):
        number = "1 image is" if len(paths) == 1 else f"{len(paths)} images are"
        warnings.append(
            f"{folder}: {number} ignored: only train/good, test/<type> and "
            "ground_truth/<type> are read"
        )
    return Category(
        name=root.absolute().name,
        root=root,
        train=train,
        test=tuple(test),
        errors=tuple(errors),
        warnings=tuple(warnings),
        sizes=dict(sizes),
        formats=dict(formats),
        mask_shares={name: tuple(shares) for name, shares in mask_shares.items()},
        ignored=ignored,
    )


def _folders(folder: Path) -> list[Path]:
    """The visible sub-folders, sorted; none if `folder` is not there."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """The visible files with an image's extension, sorted; none if `folder` is not there."""
    if not folder.is_dir():
        return []
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and not p.is_dir()
    )


def _good_folder(split_dir: Path) -> Path:
    """`split_dir`/good, also when it is spelled Good or GOOD."""
    spelled = [folder for folder in _folders(split_dir) if folder.name.casefold() == GOOD]
    return spelled[0] if spelled else split_dir / GOOD


def _walk(folder: Path) -> list[Path]:
    """All files below `folder`, without the hidden ones and those in hidden folders."""
    # By itself: what epath's `walk` yields of gs:// lacks the gs:// with some of its backends.
    files, below = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.name.startswith("."):
            (below if path.is_dir() else files).append(path)
    return files + [file for inner in below for file in _walk(inner)]


def _by_folder(paths) -> list[tuple[Path, list[Path]]]:
    folders = collections.defaultdict(list)
    for path in paths:
        folders[path.parent].append(path)
    return list(folders.items())


def _stem(path: Path) -> str:
    # macOS writes an umlaut as two code points, other systems as one.
    return unicodedata.normalize("NFC", path.stem)


def _pair(images: list[Path], masks: list[Path]):
    """Pairs by name. Returns ({image: mask}, errors, masks that no image goes with)."""
    by_stem = collections.defaultdict(list)
    for mask in masks:
        by_stem[_stem(mask)].append(mask)
    pairs, errors = {}, []
    for image in images:
        stem = _stem(image)
        found = by_stem.get(f"{stem}_mask") or by_stem.get(stem) or []
        if len(found) > 1:
            names = ", ".join(mask.name for mask in found)
            errors.append(f"{image}: has more than one mask ({names}): remove all but one")
        elif found:
            pairs[image] = found[0]
        elif masks:
            errors.append(
                f"{image}: has no mask: {masks[0].parent / (stem + '_mask.png')} was expected; "
                "add it, or remove the image"
            )
    used = set(pairs.values())
    return pairs, errors, [mask for mask in masks if mask not in used]


def _masks_of_good(masks: list[Path]) -> list[str]:
    """Warns of masks of good parts that show a defect, or that cannot be read."""
    warnings = []
    for mask in masks:
        try:
            if read_mask(mask).any():
                warnings.append(f"{mask}: shows a defect, but its image is among the good ones")
        except LayoutError as error:
            warnings.append(f"{error} (ignored: masks of good parts are not used)")
    return warnings


@dataclasses.dataclass
class _Checked:
    """What reading one example showed."""

    size: tuple[int, int] | None = None
    format: str = ""
    mask_share: float | None = None
    errors: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


def _check(example: Example) -> _Checked:
    """Reads image and mask and compares them."""
    checked = _Checked()
    image = mask = None
    try:
        opened = open_image(example.image)
        image = to_rgb(opened, example.image)
        checked.size = image.shape[:2]
        checked.format = f"{opened.format} {opened.mode}"
        if image.max() <= 16:
            # What a 10-bit or 12-bit photograph saved in 16 bits looks like.
            checked.warnings.append(
                f"{example.image}: is almost black (brightest value {image.max()} of 255): "
                "use the whole range of the file's number format"
            )
    except LayoutError as error:
        checked.errors.append(str(error))
    if example.mask is None:
        return checked
    try:
        mask = read_mask(example.mask)
        checked.mask_share = float(mask.mean())
        if not mask.any():
            checked.warnings.append(
                f"{example.mask}: is empty, but its image is among the defective ones: draw the "
                f"defect, or move the image to test/{GOOD}"
            )
        elif mask.mean() > 0.9:
            checked.warnings.append(
                f"{example.mask}: covers {mask.mean():.0%} of the image: is it inverted?"
            )
    except LayoutError as error:
        checked.errors.append(str(error))
    if image is not None and mask is not None and mask.shape != image.shape[:2]:
        checked.errors.append(_size_mismatch(example, mask, image))
    return checked


def _size_mismatch(example: Example, mask: np.ndarray, image: np.ndarray) -> str:
    (mask_height, mask_width), (height, width) = mask.shape, image.shape[:2]
    return (
        f"{example.mask}: is {mask_width}x{mask_height} pixels, its image {example.name} is "
        f"{width}x{height} (width x height, upright): export the mask at the image's size"
    )


# Reporting.


def missing_metrics(category: Category) -> dict[str, str]:
    """Says which metrics cannot be computed on the category's test images, and why.

    Returns:
      {} when all can; else "image" (image AUROC) and/or "pixel" (pixel AUROC, AP, IoU, ...)
      with the reason in one line.
    """
    if not category.test:
        return dict.fromkeys(("image", "pixel"), "there are no test images")
    missing = {}
    labels = {example.label for example in category.test}
    if labels == {0}:
        return dict.fromkeys(("image", "pixel"), "there are no defective test images")
    if labels == {1}:
        missing["image"] = "there are no good test images"
    shares = [share for shares in category.mask_shares.values() for share in shares]
    if not shares:
        missing["pixel"] = "the defective test images have no masks"
    elif not any(shares):
        missing["pixel"] = "all masks are empty"
    return missing


def report(category: Category) -> str:
    """Returns what `scan` found as text for people: counts, sizes, masks, metrics, problems."""
    lines = [f"{category.name}  ({category.root})"]
    for split, examples in (("train", category.train), ("test", category.test)):
        counts = collections.Counter(example.defect_type for example in examples)
        text = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"
        lines.append(f"  {split:<8} {text}")
    sizes = collections.Counter(category.sizes).most_common()
    text = ", ".join(f"{count} of {width}x{height}" for (height, width), count in sizes[:5])
    if len(sizes) > 5:
        text += f", and {len(sizes) - 5} other sizes"
    formats = collections.Counter(category.formats).most_common()
    lines.append(f"  {'sizes':<8} {text or 'none readable'} (width x height)")
    lines.append(f"  {'formats':<8} {', '.join(f'{n} {name}' for name, n in formats) or 'none'}")
    for name, shares in sorted(category.mask_shares.items()):
        lines.append(
            f"  {'masks':<8} {len(shares)} {name}: median {statistics.median(shares):.2%}, "
            f"smallest {min(shares):.2%} of the image"
        )
    if category.ignored:
        names = [path.relative_to(category.root).as_posix() for path in category.ignored]
        more = f", and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"  {'ignored':<8} {', '.join(names[:4])}{more}")
    missing = missing_metrics(category)
    for kind in ("image", "pixel"):
        text = f"not available: {missing[kind]}" if kind in missing else "available"
        lines.append(f"  {kind + ' metrics':<14} {text}")
    lines += [f"  error: {error}" for error in category.errors]
    lines += [f"  warning: {warning}" for warning in category.warnings]
    number = len(category.errors)
    lines.append(f"  {'usable' if not number else f'not usable: {number} to repair'}")
    return "\n".join(lines)
