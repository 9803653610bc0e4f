"""The folder layouts that are known: one entry of LAYOUTS each.

A layout reads a category's folder into groups of images that share a split and a defect type. It
only lists files: `images.layout` pairs images with masks and checks them.
"""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence

from etils.epath import Path

from anoseg_jax.images.decode import LayoutError, printable
from anoseg_jax.images.folders import child, comparable, entries, images

GOOD = "good"
GOOD_NAMES = ("good", "ok", "normal")
DEFECTIVE_NAMES = (
    *("abnormal", "anomalous", "anomaly", "anomalies", "bad", "defect", "defects", "defective"),
    *("faulty", "ko", "ng", "nok", "not_good"),
)
MASK_NAMES = ("ground_truth", "masks", "mask")


@dataclasses.dataclass(frozen=True)
class Group:
    """Images of one split ("train", "validation" or "test") and one defect type.

    `folder` is where they are (or would be), `mask_dir` where their masks are, if there are any.
    `warning` is what a user has to know about the choice of the images.
    """

    split: str
    folder: Path
    images: Sequence[Path]
    defect_type: str = GOOD
    mask_dir: Path | None = None
    warning: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout: its title, its folders in a line, whether a category's folder is of it, its reader.

    A layout that never fits is used where `config.layout` asks for it.
    """

    title: str
    tree: str
    fits: Callable[[Path], bool]
    read: Callable[[Path], list[Group]]


def _good_folder(folder: Path) -> Path:
    """The sub-folder of good images: `good`, or another name of it that exists."""
    candidates = [child(folder, name) for name in GOOD_NAMES]
    return next((path for path in candidates if path.is_dir()), candidates[0])


def _splits(
    root: Path,
    *,
    test: str = "test",
    masks: Sequence[str] = ("ground_truth",),
    validation: bool = False,
) -> list[Group]:
    """The groups of train/good, validation/good and <test>/<type>, masks in <masks>/<type>."""
    groups = []
    for split in ("train", "validation") if validation else ("train",):
        folder = _good_folder(child(root, split))
        groups.append(Group(split, folder, images(folder)))
    for folder in entries(child(root, test))[0]:
        if comparable(folder.name) == masks[-1]:
            continue
        is_good = comparable(folder.name) in GOOD_NAMES
        defect_type = GOOD if is_good else printable(folder.name)
        mask_dir = child(root, *masks, folder.name)
        groups.append(Group("test", folder, images(folder), defect_type, mask_dir))
    return groups


def _has_train_or_test(root: Path) -> bool:
    return child(root, "train").is_dir() or child(root, "test").is_dir()


def _is_loco(root: Path) -> bool:
    """Good validation images, and masks in a folder for each image or LOCO's two defect types."""
    if not images(child(root, "validation", GOOD)):
        return False
    types = {comparable(folder.name) for folder in entries(child(root, "test"))[0]}
    nested = any(entries(folder)[0] for folder in entries(child(root, "ground_truth"))[0])
    return nested or bool(types & {"logical_anomalies", "structural_anomalies"})


def _is_btad(root: Path) -> bool:
    return child(root, "train", "ok").is_dir() and not child(root, "train", GOOD).is_dir()


def _visa(root: Path) -> list[Group]:
    normal = child(root, "Data", "Images", "Normal")
    anomaly = child(root, "Data", "Images", "Anomaly")
    masks = child(root, "Data", "Masks", "Anomaly")
    good, defective = images(normal), images(anomaly)
    table = root.parent / "split_csv" / "1cls.csv"
    if not table.is_file():
        return [*_every_fifth(normal, good), Group("test", anomaly, defective, "anomaly", masks)]
    rows = list(csv.DictReader(io.StringIO(table.read_bytes().decode("utf-8-sig", "replace"))))
    if not rows or not {"object", "split", "image"} <= rows[0].keys():
        raise LayoutError(
            f"{printable(table)}: has no lines of the columns object, split, image: copy it again"
        )
    split_of = {
        tuple(map(comparable, row["image"].split("/")[-2:])): row["split"]
        for row in rows
        if row["object"] == root.name
    }

    def split(path: Path) -> str | None:
        return split_of.get((comparable(path.parent.name), comparable(path.name)))

    train = [path for path in good if split(path) == "train"]
    unlisted = sum(split(path) is None for path in (*good, *defective))
    warning = ""
    if unlisted:
        warning = (
            f"{printable(table)}: does not list {unlisted} of the {len(good) + len(defective)} "
            f"images of {printable(root.name)}: these are tested on, not trained on"
        )
    rest = [path for path in good if path not in set(train)]
    return [
        Group("train", normal, train, warning=warning),
        Group("test", normal, rest),
        Group("test", anomaly, defective, "anomaly", masks),
    ]


def _every_fifth(folder: Path, good: list[Path]) -> list[Group]:
    """Trains on four of five good images and tests on the fifth: the folder has no split."""
    tested = good[1::5]
    warning = (
        f"{printable(folder)}: has no split: {len(tested)} of its {len(good)} images, every fifth, "
        "are tested on and not trained on"
    )
    return [
        Group("train", folder, [p for p in good if p not in set(tested)], warning=warning),
        Group("test", folder, tested),
    ]


def _defective_folders(root: Path) -> list[Path]:
    return [p for p in entries(root)[0] if comparable(p.name) in DEFECTIVE_NAMES and images(p)]


def _has_good_alone(root: Path) -> bool:
    return not _has_train_or_test(root) and bool(images(_good_folder(root)))


def _normal_abnormal(root: Path) -> list[Group]:
    folder = _good_folder(root)
    groups = _every_fifth(folder, images(folder))
    masks = next((p for p in (child(root, name) for name in MASK_NAMES) if p.is_dir()), None)
    for path in _defective_folders(root):
        mask_dir = masks and (child(masks, path.name) if entries(masks)[0] else masks)
        groups.append(Group("test", path, images(path), printable(path.name), mask_dir))
    return groups


# In this order: the first that fits is used.
LAYOUTS = {
    "mvtec_loco": Layout(
        "MVTec LOCO AD",
        "train/good, validation/good, test/<type>, ground_truth/<type>/<name>/",
        fits=_is_loco,
        read=lambda root: _splits(root, validation=True),
    ),
    "mvtec_ad_2": Layout(
        "MVTec AD 2",
        "train/good, validation/good, test_public/<type>, test_public/ground_truth/<type>",
        fits=lambda root: child(root, "test_public").is_dir(),
        read=lambda root: _splits(
            root, test="test_public", masks=("test_public", "ground_truth"), validation=True
        ),
    ),
    "visa": Layout(
        "VisA",
        "Data/Images/Normal, Data/Images/Anomaly, Data/Masks/Anomaly, ../split_csv/1cls.csv",
        fits=lambda root: child(root, "Data", "Images", "Normal").is_dir(),
        read=_visa,
    ),
    "btad": Layout(
        "BTAD",
        "train/ok, test/ok, test/ko, ground_truth/ko",
        fits=_is_btad,
        read=_splits,
    ),
    "mvtec_ad": Layout(
        "MVTec AD",
        "train/good, test/good, test/<type>, ground_truth/<type>",
        fits=_has_train_or_test,
        read=_splits,
    ),
    "normal_abnormal": Layout(
        "good and defective images",
        "normal (or good, ok), abnormal (or anomaly, bad, defect, ng ...), ground_truth",
        fits=lambda root: _has_good_alone(root) and bool(_defective_folders(root)),
        read=_normal_abnormal,
    ),
    "only_good": Layout(
        "only good images",
        "good (or normal, ok)",
        fits=_has_good_alone,
        read=lambda root: [Group("train", (good := _good_folder(root)), images(good))],
    ),
    "photographs": Layout(
        "only good images, in no sub-folder",
        "*.png, *.jpg ...",
        fits=lambda root: False,  # nothing says that photographs in a folder show good parts
        read=lambda root: [Group("train", root, images(root))],
    ),
}


def find(root: Path, name: str = "auto") -> str | None:
    """Returns the key of a folder's layout in LAYOUTS; None if no layout fits.

    `name` is "auto" for the first layout that fits, or a key: that one fits where it reads images.
    """
    if name == "auto":
        return next((key for key, layout in LAYOUTS.items() if layout.fits(root)), None)
    if name not in LAYOUTS:
        raise LayoutError(f"layout={name!r} must be auto or one of {', '.join(LAYOUTS)}")
    return name if any(group.images for group in LAYOUTS[name].read(root)) else None
