"""Reads anomaly maps of other methods from files, to evaluate them with the same metrics.

    <maps_dir>/<category>/<defect type>/<image stem>.npy | .tiff | .tif | .png    one per test image
    <maps_dir>/<category>/scores.csv           optional; columns name,score as in images.csv

A map is [h, w] of any size and numeric type, with finite values of any range, higher = more
anomalous. Other axes of length 1 are dropped. "good" is a defect type, too. A PNG must have 16
bits. It is read only if the image has no other map file, because it may be a picture of that map.
"""

import csv
import io
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from etils.epath import Path
from PIL import Image

from anoseg_jax import UsageError

SUFFIXES = (".npy", ".tiff", ".tif")
PICTURE = ".png"
_SHOWN = 3  # most names in a message; the others are counted


class MapsError(UsageError):
    """Maps or scores cannot be used; the message is one line and names the first of them."""


def find_maps(folder: Path, names: Sequence[str]) -> list[Path]:
    """Finds the map file of each test image.

    Args:
      folder: `maps_dir`/<category>.
      names: the names of the images, as in images.csv: "test/<defect type>/<file>".

    Raises:
      MapsError: the folder does not exist, an image has no map or more than one, or two images
        would have the same map.
    """
    if not folder.is_dir():
        raise MapsError(f"{folder}: there is no such folder; maps_dir has one a category")
    maps: dict[tuple[str, str], list[Path]] = {}
    pictures: dict[tuple[str, str], list[Path]] = {}
    type_folders = [path for path in folder.iterdir() if path.is_dir()]
    for path in sorted(path for type_folder in type_folders for path in type_folder.iterdir()):
        suffix = path.suffix.lower()
        if suffix in (*SUFFIXES, PICTURE) and not path.name.startswith("."):
            (pictures if suffix == PICTURE else maps).setdefault(_key(path), []).append(path)
    files = pictures | maps
    wanted = [_key(Path(name)) for name in names]
    counts = Counter(wanted)
    shared = [name for name, key in zip(names, wanted, strict=True) if counts[key] > 1]
    if shared:
        raise MapsError(
            f"{folder}: {_some(shared)} would have the same map: rename the images, the stems of a "
            "defect type must differ"
        )
    missing = ["/".join(key) for key in wanted if key not in files]
    if missing:
        raise MapsError(
            f"{folder}: no map (.npy, .tiff, .tif or .png) for {len(missing)} of {len(names)} test "
            f"images: {_some(missing)}"
        )
    several = [files[key] for key in wanted if len(files[key]) > 1]
    if several:
        pairs = [" and ".join(f"{p.parent.name}/{p.name}" for p in paths) for paths in several]
        raise MapsError(f"{folder}: {len(several)} images have two maps: {_some(pairs)}: keep one")
    return [files[key][0] for key in wanted]


def read_map(path: Path) -> np.ndarray:
    """Reads a map, float32 [h, w]; raises MapsError for invalid files and non-finite values."""
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        else:
            with Image.open(io.BytesIO(path.read_bytes())) as image:
                if getattr(image, "n_frames", 1) > 1:
                    raise ValueError(f"it has {image.n_frames} pages")
                values = np.asarray(image)
    # Decoders raise many types of errors on damaged files: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise MapsError(f"{path}: cannot be read ({why}): save it as .npy") from error
    shape = values.shape
    if path.suffix.lower() == PICTURE and values.dtype.itemsize == 1:
        raise MapsError(
            f"{path}: is {values.dtype} {list(shape)}: a PNG that is a map is grey with 16 bits: "
            "256 levels do not tell apart what metrics depend on; or save it as .npy"
        )
    values = values.squeeze()
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiub":
        raise MapsError(
            f"{path}: has shape {list(shape)} and type {values.dtype}; a map is numbers [h, w]"
        )
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(values, np.float32)
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise MapsError(f"{path}: {bad} of {values.size} values are not finite in float32")
    return values


def read_maps(folder: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Reads the map of each test image, float32 [h, w] each; see `find_maps`, `read_map`."""
    return [read_map(path) for path in find_maps(folder, names)]


def read_scores(folder: Path, names: Sequence[str]) -> np.ndarray | None:
    """Reads the score of each test image from scores.csv, float64 [n]; None without the file.

    Raises:
      MapsError: the file is not in UTF-8, lacks a column or an image, has an image twice, or has a
        score that is not a finite number.
    """
    path = folder / "scores.csv"
    if not path.exists():
        return None
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MapsError(f"{path}: is not in UTF-8 ({error.reason}): save it as such") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not {"name", "score"} <= set(reader.fieldnames or ()):
        raise MapsError(f"{path}: needs the columns name,score; has {reader.fieldnames}")
    scores = {}
    for name, text in ((row["name"] or "", row["score"]) for row in reader):
        try:
            score = float(text)
        except (TypeError, ValueError):
            score = np.nan
        if not np.isfinite(score):
            raise MapsError(f"{path}: the score of {name} is {text!r}, which is no finite number")
        if _key(Path(name)) in scores:
            raise MapsError(f"{path}: has {name} twice")
        scores[_key(Path(name))] = score
    missing = [name for name in names if _key(Path(name)) not in scores]
    if missing:
        raise MapsError(
            f"{path}: no score for {len(missing)} of {len(names)} test images: {_some(missing)}; "
            "a name ends with <defect type>/<file>, as those of images.csv"
        )
    return np.array([scores[_key(Path(name))] for name in names], np.float64)


def _key(path: Path) -> tuple[str, str]:
    """Returns the defect type and stem of an image or a map, in the Unicode form NFC."""
    # macOS stores an umlaut as two code points, other systems as one.
    normal = unicodedata.normalize
    return normal("NFC", path.parent.name), normal("NFC", path.stem)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
