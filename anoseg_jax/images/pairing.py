"""Pairs images with their masks by name."""

import collections
import dataclasses
from collections.abc import Sequence

from etils.epath import Path

from anoseg_jax.images.decode import LayoutError, printable, read_mask
from anoseg_jax.images.examples import Example, ReadOptions
from anoseg_jax.images.folders import child, comparable, entries, identity, images, names_of
from anoseg_jax.images.layouts import GOOD, Group

# The masks of each stem (file name without suffix). A mask is one file, or the union of several.
Masks = dict[str, list[tuple[Path, ...]]]


@dataclasses.dataclass
class Pairs:
    """The examples of each split; the files that are used; errors and warnings, a line each."""

    examples: dict[str, list[Example]]
    used: set[Path]
    errors: list[str]
    warnings: list[str]


def pair(root: Path, groups: Sequence[Group], options: ReadOptions) -> Pairs:
    """Pairs the images of a category's folder, as a layout reads them, with their masks."""
    pairs = Pairs({"train": [], "validation": [], "test": []}, set(), _read_twice(groups), [])
    ignore_suffix = f"_{options.ignore_name}" if options.ignore_name else None
    masks = [_masks_in(group.mask_dir, ignore_suffix) for group in groups]
    has_masks = any(m for m, group in zip(masks, groups, strict=True) if group.defect_type != GOOD)
    for group, of_group in zip(groups, masks, strict=True):
        ignore = _ignore_masks(root, group, options)
        beside = {path for paths in ignore.values() for path in paths}
        pictures = [image for image in group.images if image not in beside]
        pairs.used |= {*group.images, *beside}
        pairs.used |= {path for same in of_group.values() for mask in same for path in mask}
        of_image = {}
        if group.defect_type == GOOD:
            pairs.warnings += _masks_of_good(of_group, options.max_megapixels)
        elif not of_group and has_masks and pictures:
            pairs.errors.append(
                f"{printable(group.mask_dir)}: holds no masks for the {len(pictures)} images of "
                f"{printable(group.folder)}, though other defect types have theirs: add them, or "
                "remove ground_truth to go without pixel metrics"
            )
        else:
            of_image = _pair_by_stem(pictures, of_group, group, options.mask_suffix, pairs)
        pairs.errors += _shared_stems(pictures, of_image)
        for image in pictures:
            pairs.examples[group.split].append(
                Example(
                    image,
                    of_image.get(image, ()),
                    group.defect_type,
                    printable(image.relative_to(root).as_posix()),
                    (*ignore[""], *ignore[stem_of(image)]),
                )
            )
    _masks_without_images(groups, pairs)
    if any(example.label for example in pairs.examples["test"]) and not has_masks:
        mask_dirs = [group.mask_dir.parent for group in groups if group.mask_dir]
        where = mask_dirs[0] if mask_dirs else root / "ground_truth"
        pairs.warnings.append(
            f"{printable(where)}: no masks there: pixel metrics are not available"
        )
    return pairs


def stem_of(path: Path) -> str:
    """Returns a file's stem, the same for two spellings of one name."""
    return printable(path.stem)


def _read_twice(groups: Sequence[Group]) -> list[str]:
    """Names the folders that are the same as another one, by a link."""
    errors, folders = [], {}
    for group in groups:
        if group.images:
            other = folders.setdefault(identity(group.folder), group.folder)
            if other != group.folder:
                errors.append(
                    f"{printable(group.folder)}: is the same folder as {printable(other)}, whose "
                    "images are read already: remove the link"
                )
    return errors


def _masks_in(mask_dir: Path | None, ignore_suffix: str | None) -> Masks:
    """The masks of a folder: its images, and the images of each folder in it."""
    masks = collections.defaultdict(list)
    if mask_dir:
        for path in images(mask_dir):
            if not (ignore_suffix and path.stem.endswith(ignore_suffix)):
                masks[stem_of(path)].append((path,))
        for folder in entries(mask_dir)[0]:
            files = tuple(images(folder))
            if files:
                masks[printable(folder.name)].append(files)
    return dict(masks)


def _ignore_masks(root: Path, group: Group, options: ReadOptions) -> dict[str, list[Path]]:
    """The masks of pixels to ignore by the stem of their image; "" is for every image."""
    name = options.ignore_name
    ignore = collections.defaultdict(list)
    if not name:
        return ignore
    ignore[""] = [path for path in images(root) if stem_of(path) == name]
    for path in (*group.images, *(images(group.mask_dir) if group.mask_dir else ())):
        if stem_of(path).endswith(f"_{name}"):
            ignore[stem_of(path).removesuffix(f"_{name}")].append(path)
    mirrors = [child(root, name, *group.folder.relative_to(root).parts)]
    if group.mask_dir:
        mirrors.append(child(group.mask_dir.parent, name, group.mask_dir.name))
    for path in (path for folder in mirrors for path in images(folder)):
        stem = stem_of(path).removesuffix(f"_{name}")
        ignore[stem.removesuffix(options.mask_suffix)].append(path)
    return ignore


def _pair_by_stem(
    pictures: Sequence[Path], masks: Masks, group: Group, suffix: str, pairs: Pairs
) -> dict[Path, tuple[Path, ...]]:
    """Returns the mask of each image; adds errors and warnings to `pairs`."""
    of_image, missing = {}, []
    for image in pictures:
        stem = stem_of(image)
        same = masks.get(stem + suffix) or masks.get(stem) or []
        if len(same) > 1:
            several = ", ".join(printable(path.name) for mask in same for path in mask)
            pairs.errors.append(
                f"{printable(image)}: has more than one mask ({several}): remove all but one"
            )
        elif same:
            of_image[image] = same[0]
        elif masks:
            missing.append(image)
    used = set(of_image.values())
    unused = {stem: mask for stem, same in masks.items() for mask in same if mask not in used}
    pairs.errors += _missing_masks(missing, unused, group.mask_dir, suffix)
    files = sorted(path for mask in unused.values() for path in mask)
    what = f"ignored: no image in {printable(group.folder)} goes with "
    if len(files) == 1:
        pairs.warnings.append(f"{printable(files[0])}: is {what}it")
    elif files:
        where, names = printable(group.mask_dir), printable(names_of(files))
        pairs.warnings.append(f"{where}: {len(files)} masks are {what}them ({names})")
    return of_image


def _missing_masks(
    missing: Sequence[Path], unused: dict[str, tuple[Path, ...]], mask_dir: Path, suffix: str
) -> list[str]:
    """Names the images without a mask, or the suffix that the masks of all of them have."""
    endings = {
        mask.removeprefix(stem_of(image))
        for image in missing
        for mask in unused
        if mask.startswith(stem_of(image))
    }
    for ending in sorted(endings):
        if all(stem_of(image) + ending in unused for image in missing):
            return [
                f"{printable(mask_dir)}: the masks of {len(missing)} images end in {ending!r}, not "
                f"in {suffix!r}: set --config.mask_suffix={ending}"
            ]
    return [
        f"{printable(image)}: has no mask: {printable(mask_dir)}/{stem_of(image)}{suffix}.png was "
        "expected; add it, or remove the image"
        for image in missing
    ]


def _shared_stems(pictures: Sequence[Path], of_image: dict[Path, tuple[Path, ...]]) -> list[str]:
    """Names the images that share a stem: which of them a mask belongs to cannot be told."""
    by_stem = collections.defaultdict(list)
    for image in pictures:
        by_stem[stem_of(image)].append(image)
    errors = []
    for same in by_stem.values():
        if len(same) > 1:
            masks = {mask for image in same for mask in of_image.get(image, ())}
            whose = "".join(f", and one mask, {printable(mask)}" for mask in sorted(masks))
            errors.append(
                f"{printable(same[0])}: has the same stem as {printable(names_of(same[1:]))}"
                f"{whose}: rename or remove all but one"
            )
    return errors


def _masks_of_good(masks: Masks, max_megapixels: float) -> list[str]:
    """Warns of masks of good parts that show a defect, or that cannot be read."""
    warnings = []
    for path in sorted(path for same in masks.values() for mask in same for path in mask):
        try:
            if read_mask(path, max_megapixels=max_megapixels).any():
                warnings.append(
                    f"{printable(path)}: shows a defect, but its image is among the good ones"
                )
        except LayoutError as error:
            warnings.append(f"{error} (ignored: masks of good parts are not used)")
    return warnings


def _masks_without_images(groups: Sequence[Group], pairs: Pairs) -> None:
    """Warns of folders of masks to which no folder of images belongs."""
    known = {comparable(group.mask_dir.name) for group in groups if group.mask_dir}
    parents = dict.fromkeys(group.mask_dir.parent for group in groups if group.mask_dir)
    for folder in (folder for parent in parents for folder in entries(parent)[0]):
        masks = images(folder)
        if masks and comparable(folder.name) not in known:
            pairs.used.update(masks)
            pairs.warnings.append(
                f"{printable(folder)}: {len(masks)} masks are ignored: there is no folder of "
                f"images of the type {printable(folder.name)}"
            )
