"""Finds the categories of a folder, pairs images with masks, and checks every file.

`images.layouts` knows the layouts; that of MVTec AD is

    <data_dir>/<category>/train/good/<stem>.png
                          test/good/<stem>.png
                          test/<defect type>/<stem>.png
                          ground_truth/<defect type>/<stem>_mask.png   (or <stem>.png)

Pixels to ignore are masks, too: <category>/ignore.png is for all images, the others for one:
ground_truth/<defect type>/<stem>_ignore.png or <category>/ignore/<path of the image>.
"""

import collections
import dataclasses
import itertools
import os
import statistics
from collections.abc import Sequence

from etils.epath import Path

from anoseg_jax.images import check, layouts
from anoseg_jax.images.decode import LayoutError, printable
from anoseg_jax.images.examples import Example, ReadOptions, load
from anoseg_jax.images.folders import (
    SIDE_SUFFIXES,
    by_folder,
    child,
    entries,
    is_image,
    names_of,
    walk,
)
from anoseg_jax.images.layouts import LAYOUTS
from anoseg_jax.images.pairing import pair

__all__ = ["Example", "LayoutError", "ReadOptions", "load"]


@dataclasses.dataclass(frozen=True)
class Category:
    """What `scan` returns: the examples, what is wrong with them, and figures for the report.

    `errors` make the category unusable (those of them that are `train_errors`, for training alone),
    `warnings` do not; each is one line that names a file or folder. `layout` is a key of LAYOUTS.
    `validation` are good images that the layout sets apart for thresholds. `bit_depth` is that of
    the training images, or as asked for. `checked` is what reading all images and masks showed.
    `ignored` are the files that are not used.
    """

    name: str
    root: Path
    train: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    validation: tuple[Example, ...] = ()
    layout: str = ""
    bit_depth: int = 8
    errors: tuple[str, ...] = ()
    train_errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    checked: tuple[check.Checked, ...] = ()
    ignored: tuple[Path, ...] = ()


# Categories.


def _category_folders(data_dir: Path, layout: str) -> dict[str, Path]:
    """The folders of `data_dir` that a layout fits, by their printable names.

    With the layout "photographs", and no folder of them in it, `data_dir` is the category itself.
    """
    if not data_dir.is_dir():
        raise LayoutError(
            f"{printable(data_dir)}: is not a folder: data_dir holds the category folders"
        )
    known = {folder: layouts.find(folder, layout) for folder in entries(data_dir)[0]}
    known = {folder: key for folder, key in known.items() if key}
    # The folders of a category may look like categories of good images.
    if set(known.values()) <= {"normal_abnormal", "only_good"} and layouts.find(data_dir):
        return {}
    if not known and layout == "photographs" and layouts.find(data_dir, layout):
        known = {data_dir.absolute(): layout}
    return {printable(folder.name): folder for folder in known}


def scan_categories(
    data_dir: str | os.PathLike, names: Sequence[str], options: ReadOptions | None = None
) -> list[Category]:
    """Scans the named categories.

    Args:
      data_dir: the folder that holds the category folders.
      names: category names, or ("all",) for each that is there; ("all/",) is a folder named "all".
      options: how folders and files are read.

    Returns:
      One `Category` a name, in the order of `names`; look at `errors`, or call `require_usable`.

    Raises:
      LayoutError: a named category is missing, or there is none at all; lists what is there.
    """
    if not os.fspath(data_dir):
        raise LayoutError(
            "data_dir is missing: --config.data_dir=DIR is the folder that holds a folder for each "
            "kind of part, with photographs of good parts in DIR/<category>/train/good"
        )
    data_dir, options = Path(data_dir), options or ReadOptions()
    folders = _category_folders(data_dir, options.layout)
    takes_all = tuple(names) == ("all",)
    names = folders if takes_all else [printable(name.removesuffix("/")) for name in names]
    missing = [name for name in names if name not in folders]
    if missing or not names:
        raise LayoutError(_no_category(data_dir, missing, folders, options.layout))
    categories = [scan(folders[name], options) for name in names]
    if takes_all:
        used = set(folders.values())
        others = [p for p in entries(data_dir)[0] if p not in used and any(map(is_image, _top(p)))]
        warnings = [f"{printable(p)}: is left out: {_misfit(p, options.layout)}" for p in others]
        first = categories[0]
        categories[0] = dataclasses.replace(first, warnings=(*first.warnings, *warnings))
    return categories


def _top(folder: Path) -> list[Path]:
    """The files of a folder and of the folders in it."""
    folders, files = entries(folder)
    return [*files, *(file for inner in folders for file in entries(inner)[1])]


def _misfit(folder: Path, name: str) -> str:
    """Says what was looked for in a folder that fits no layout, or not the one asked for."""
    keys = [key for key in LAYOUTS if key != "photographs"] if name == "auto" else [name]
    trees = "; ".join(f"{LAYOUTS[key].tree} ({LAYOUTS[key].title})" for key in keys)
    return f"looked for {trees}; there: {_contents(folder)}"


def _contents(folder: Path) -> str:
    folders, files = entries(folder)
    pictures = [path for path in files if is_image(path)]
    parts = [f"{len(pictures)} images ({names_of(pictures)})"] if pictures else []
    parts += [f"folders {names_of(folders)}"] if folders else []
    return printable(" and ".join(parts) or "no images and no folders")


def _no_category(
    data_dir: Path, missing: Sequence[str], folders: dict[str, Path], layout: str
) -> str:
    """The message of a category that is missing, or of a data_dir without any."""
    here = printable(data_dir)
    if not folders and layouts.find(data_dir):
        parent = printable(data_dir.absolute().parent)
        return f"{here}: is a category itself: use its parent, --config.data_dir={parent}"
    if not folders and (flat := _flat_folders(data_dir)):
        return _flat_message(data_dir, flat)
    if not folders:
        return (
            f"{here}: no category folder in it: put photographs of good parts into "
            f"{here}/<category>/train/good, or name another folder; in each folder of it was "
            f"{_misfit(data_dir, layout)}"
        )
    quoted = [f'"{name}"' if set(name) & set(",:") or name == "all" else name for name in folders]
    hint = f"; categories there: {', '.join(quoted)}"
    if ",".join(missing) in folders:
        hint += (
            f"; a name with a comma is chosen by --config.categories='(\"{','.join(missing)}\",)'"
        )
    for name in missing:
        if child(data_dir, name).is_dir():
            hint += f"; in the folder {name} was {_misfit(child(data_dir, name), layout)}"
    if len(missing) > 4:
        hint += "; --config.categories=all takes all that are there"
        missing = [*missing[:4], f"and {len(missing) - 4} more"]
    return f"{here}: no category {', '.join(missing)} in it{hint}"


def _flat_folders(data_dir: Path) -> list[Path]:
    """The folders that hold photographs in no folder: `data_dir`, or else those in it."""
    folders = [data_dir], entries(data_dir)[0]
    flat = (
        [folder for folder in some if any(map(is_image, entries(folder)[1]))] for some in folders
    )
    return next(filter(None, flat), [])


def _flat_message(data_dir: Path, flat: list[Path]) -> str:
    """The message for photographs that lie in folders without the folders of a layout."""
    here, in_itself = printable(data_dir), flat == [data_dir]
    where = here if in_itself else f"{here}: {printable(names_of(flat))}"
    pictures = [path for path in entries(flat[0])[1] if is_image(path)]
    one, names = len(flat) == 1, printable(names_of([folder.absolute() for folder in flat]))
    category = f"{here}/<category>" if in_itself else f"{here}/{printable(flat[0].name)}"
    return (
        f"{where}: photographs ({printable(names_of(pictures, 2))}) are not in folders that say "
        f"what they show: move good parts to {category}/train/good, some of them to "
        f"{category}/test/good, defective parts to {category}/test/<defect type>; or, if all of "
        "them show good parts, leave them there and add --config.layout=photographs "
        f"({'the category is' if one else 'the categories are'} {names})"
    )


def require_usable(categories: Sequence[Category], *, training: bool = True) -> None:
    """Raises LayoutError with every error of every category, one a line, if there is any.

    Without `training`, a category without images to train on is usable.
    """
    errors = [
        error
        for category in categories
        for error in category.errors
        if training or error not in category.train_errors
    ]
    if errors:
        raise LayoutError("\n".join(errors))


# One category.


def scan(category_dir: str | os.PathLike, options: ReadOptions | None = None) -> Category:
    """Pairs images with masks and opens and decodes every one of them.

    Never raises for what is in the folder: whatever is wrong is collected, so that all bad files
    are named at once.

    Args:
      category_dir: one category's folder.
      options: how folders and files are read.

    Returns:
      The `Category`; its examples are sorted by folder and file name.
    """
    root, options = Path(category_dir), options or ReadOptions()
    category = Category(name=printable(root.absolute().name), root=root)
    try:
        key = layouts.find(root, options.layout)
        if key:
            return _scan_groups(dataclasses.replace(category, layout=key), options)
        error = f"{printable(root)}: fits no layout: {_misfit(root, options.layout)}"
    except (LayoutError, OSError) as reason:
        error = printable(reason)
    return dataclasses.replace(category, errors=(error,))


def _scan_groups(category: Category, options: ReadOptions) -> Category:
    """Scans the groups of images that the category's layout reads."""
    root = category.root
    groups = LAYOUTS[category.layout].read(root)
    pairs = pair(root, groups, options)
    examples, errors, warnings = pairs.examples, pairs.errors, pairs.warnings
    warnings += [group.warning for group in groups if group.warning]
    train_errors = ()
    if not examples["train"]:
        folder = next(group.folder for group in groups if group.split == "train")
        what = "holds no images" if folder.is_dir() else "is missing"
        train_errors = (f"{printable(folder)}: {what}: put the images of good parts there",)
        errors += train_errors

    checked = check.check_files(list(itertools.chain(*examples.values())), options)
    errors += [error for one in checked for error in one.errors]
    train = checked[: len(examples["train"])]
    # Without images to train on, a model has its own bit depth.
    bit_depth = check.choose_bit_depth(train or checked, options.bit_depth)
    errors += check.bit_depth_errors(checked, bit_depth)
    warnings += check.image_warnings(checked, bit_depth) + check.mask_warnings(checked)
    files, links = walk(root)
    ignored = tuple(path for path in files if path not in pairs.used)
    warnings += _ignored_warnings(ignored, {group.folder for group in groups}, category.layout)
    warnings += [
        f"{printable(link)}: is a link to a folder that is listed already: it is not followed"
        for link in links
    ]
    return dataclasses.replace(
        category,
        **{split: tuple(of_split) for split, of_split in examples.items()},
        bit_depth=bit_depth,
        errors=tuple(errors),
        train_errors=train_errors,
        warnings=tuple(warnings),
        checked=tuple(checked),
        ignored=ignored,
    )


def _ignored_warnings(ignored: Sequence[Path], folders: set[Path], layout: str) -> list[str]:
    """Warns of images that are out of place, and of files beside images that are none."""
    pictures = [path for path in ignored if is_image(path)]
    warnings = []
    for folder, paths in by_folder(pictures).items():
        number = "1 image is" if len(paths) == 1 else f"{len(paths)} images are"
        warnings.append(
            f"{printable(folder)}: {number} ignored: only {LAYOUTS[layout].tree} are read"
        )
    rest = set(ignored) - set(pictures)
    unknown = [p for p in ignored if p in rest and p.suffix.lower() not in SIDE_SUFFIXES]
    for folder, paths in by_folder(unknown).items():
        if folder in folders:
            counts = collections.Counter(path.suffix.lower() or "no suffix" for path in paths)
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
            warnings.append(
                f"{printable(folder)}: {len(paths)} files are skipped, which Pillow does not read "
                f"({printable(kinds)}): convert those that are images to PNG"
            )
    return warnings


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
    with_mask = itertools.chain(*check.masks_by_type(category.checked).values())
    shares = [one.share for one in with_mask]
    if not shares:
        missing["pixel"] = "the defective test images have no masks"
    elif not any(shares):
        missing["pixel"] = "all masks are empty"
    return missing


def size_warnings(category: Category, image_size: tuple[int, int]) -> list[str]:
    """Warns of images that `image_size` squeezes, and of defects that it makes too small."""
    warnings = check.size_warnings(category.checked, image_size)
    return [f"{printable(category.root)}: {warning}" for warning in warnings]


def report(category: Category, image_size: tuple[int, int] | None = None) -> str:
    """Returns what `scan` found as text for people: counts, sizes, masks, metrics, problems.

    With `image_size` (height, width), also what becomes of the images at that size.
    """
    lines = [f"{category.name}  ({printable(category.root)})"]
    if category.layout:
        layout = LAYOUTS[category.layout]
        lines.append(f"  {'layout':<8} {category.layout}: {layout.title} ({layout.tree})")
    for split in ("train", "validation", "test"):
        examples = getattr(category, split)
        counts = collections.Counter(example.defect_type for example in examples)
        text = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"
        if examples or split != "validation":
            lines.append(f"  {split:<8} {text}")
    readable = [one for one in category.checked if one.size]
    sizes = collections.Counter(one.size for one in readable).most_common()
    text = ", ".join(f"{count} of {width}x{height}" for (height, width), count in sizes[:5])
    if len(sizes) > 5:
        text += f", and {len(sizes) - 5} other sizes"
    formats = collections.Counter(one.format for one in readable).most_common()
    lines.append(f"  {'sizes':<8} {text or 'none readable'} (width x height)")
    lines.append(f"  {'formats':<8} {', '.join(f'{n} {name}' for name, n in formats) or 'none'}")
    lines.append(f"  {'depth':<8} bit_depth={category.bit_depth}: {_explain(category.bit_depth)}")
    for name, with_mask in sorted(check.masks_by_type(category.checked).items()):
        shares = [one.share for one in with_mask]
        lines.append(
            f"  {'masks':<8} {len(shares)} {name}: median {statistics.median(shares):.2%}, "
            f"smallest {min(shares):.2%} of the image"
        )
    kinds = collections.Counter(k for one in category.checked for k in one.mask_kinds.values())
    for kind, count in sorted(kinds.items()):
        lines.append(f"  {'':<8} {count} with {kind}")
    ignoring = sum(bool(x.ignore) for x in (*category.train, *category.validation, *category.test))
    if ignoring:
        lines.append(f"  {'ignore':<8} {ignoring} images have pixels that count neither way")
    if category.ignored:
        names = [path.relative_to(category.root).as_posix() for path in category.ignored]
        more = f", and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"  {'ignored':<8} {printable(', '.join(names[:4]))}{more}")
    missing = missing_metrics(category)
    for kind in ("image", "pixel"):
        text = f"not available: {missing[kind]}" if kind in missing else "available"
        lines.append(f"  {kind + ' metrics':<14} {text}")
    warnings = [*category.warnings, *(size_warnings(category, image_size) if image_size else ())]
    lines += [f"  error: {error}" for error in category.errors]
    lines += [f"  warning: {warning}" for warning in warnings]
    number = len(category.errors)
    verdict = "usable" if not number else f"not usable: {number} to repair"
    if number and category.errors == category.train_errors:
        verdict += " (usable for --mode=evaluate of a trained model)"
    lines.append(f"  {verdict}")
    return "\n".join(lines)


def _explain(bit_depth: int) -> str:
    if bit_depth == 8:
        return "values from 0 to 255"
    what = "float images" if bit_depth == 1 else "images of more than 8 bits"
    return f"values from 0 to {2**bit_depth - 1} in {what}"
