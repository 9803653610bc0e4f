"""Finished runs: their result files, their test images, and the mean of one run's seeds.

A run is a workdir with results.json, or with one such workdir for each seed, `seed_<s>/`.
"""

import csv
import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
from etils.epath import Path
from scipy import ndimage

from anoseg_jax import UsageError
from anoseg_jax.evaluation import metrics

# What numpy and csv raise on truncated or damaged files, or on files of another format.
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, LookupError, BadZipFile, zlib.error)
LEVELS = 256  # values of 8-bit maps


class CompareError(UsageError):
    """Runs that cannot be compared; the message is one line that says which and why."""


# Several seeds as one.


def mean_over_seeds(results_by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Returns one dict in the shape of results.json from those of several seeds.

    A metric is its mean over seeds, and `<metric>_std` its standard deviation (n - 1). Both are
    None, with the reason, if any seed has no value: the mean of the others would flatter. Other
    entries keep their value if all seeds agree; else they are lists with one entry per seed.
    `params_sha256` is always such a list. A category's `seeds` names the seeds that have it. The
    `mean` is over categories; its std is that of the means that each seed has over categories.
    """
    if not results_by_seed:
        raise CompareError("no results of any seed")
    by_seed = dict(sorted(results_by_seed.items()))
    categories = {}
    for name in keys_of([results["categories"] for results in by_seed.values()]):
        of_category = {
            s: r["categories"][name] for s, r in by_seed.items() if name in r["categories"]
        }
        categories[name] = _over_seeds(of_category) | {
            "params_sha256": [category.get("params_sha256") for category in of_category.values()],
            "seeds": list(of_category),
        }
    mean: dict[str, float | None] = {}
    for metric in keys_of([results["mean"] for results in by_seed.values()]):
        values = [c[metric] for c in categories.values() if c.get(metric) is not None]
        mean[metric] = float(np.mean(values)) if values else None
        complete = len(values) == len(categories) and all(
            len(category["seeds"]) == len(by_seed) for category in categories.values()
        )
        of_seeds = [results["mean"].get(metric) for results in by_seed.values()]
        mean[f"{metric}_std"] = std_of(of_seeds) if complete else None
    others = [
        {key: value for key, value in results.items() if key not in ("categories", "mean")}
        for results in by_seed.values()
    ]
    return {
        "categories": categories,
        "mean": mean,
        "seeds": list(by_seed),
        **_over_seeds(dict(zip(by_seed, others, strict=True))),
    }


def _over_seeds(by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Returns one dict from one per seed; metrics get a std if a dict has `not_available`.

    Whole numbers on which all seeds agree are counts, and stay as they are.
    """
    result: dict[str, Any] = {}
    missing: dict[str, str] = {}
    has_metrics = any("not_available" in values for values in by_seed.values())
    for key in keys_of(list(by_seed.values())):
        values = [of_seed.get(key) for of_seed in by_seed.values()]
        known = [value for value in values if value is not None]
        agree = all(value == values[0] for value in values)
        if key == "not_available":
            continue
        if known and all(isinstance(value, dict) for value in known):
            result[key] = _over_seeds({seed: d[key] for seed, d in by_seed.items() if d.get(key)})
        elif not all(type(value) in (int, float) for value in known) or (
            agree and all(type(value) is int for value in values)
        ):
            result[key] = values[0] if agree else values
        else:
            reason = why_missing(key, by_seed)
            result[key] = float(np.mean(known)) if reason is None else None
            if has_metrics:
                result[f"{key}_std"] = std_of(values)
                if reason is not None:
                    missing[key] = reason
                if reason is not None or len(values) == 1:
                    missing[f"{key}_std"] = reason or "one seed"
    return result | ({"not_available": missing} if has_metrics else {})


def why_missing(metric: str, by_seed: dict[int, dict[str, Any]]) -> str | None:
    """Returns why a metric is None in results of some seeds; None if all seeds have it."""
    reasons = {
        seed: values.get("not_available", {}).get(metric, "no value")
        for seed, values in by_seed.items()
        if values.get(metric) is None
    }
    if len(reasons) == len(by_seed) and len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"seed {seed}: {reason}" for seed, reason in reasons.items()) or None


def std_of(values: Sequence[float | None]) -> float | None:
    """Returns the standard deviation (n - 1); None for a single value or with a missing one."""
    if len(values) < 2 or None in values:
        return None
    return float(np.std(values, ddof=1))


def keys_of(dicts: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the keys of all dicts without duplicates, in order of first occurrence."""
    return list(dict.fromkeys(key for values in dicts for key in values))


# Runs and their files.


@dataclass(frozen=True)
class Run:
    """A name and the results of each seed's workdir; `seeds` are "" for a run without seeds."""

    name: str
    workdir: Path
    seeds: tuple[str, ...]
    results: tuple[dict[str, Any], ...]

    @property
    def folders(self) -> list[Path]:
        """The workdir of each seed."""
        return [self.workdir / f"seed_{seed}" if seed else self.workdir for seed in self.seeds]

    @property
    def categories(self) -> list[str]:
        """The categories that all seeds have."""
        return [
            name
            for name in self.results[0]["categories"]
            if all(name in results["categories"] for results in self.results)
        ]


def open_run(workdir: str | Path, name: str) -> Run:
    """Reads results.json of a workdir, or of each `seed_<s>/` in it; CompareError without one."""
    workdir = Path(workdir)
    children = workdir.iterdir() if workdir.is_dir() else ()
    seeds = [path.name[5:] for path in children if path.name.startswith("seed_") and path.is_dir()]
    # By number, then by name.
    seeds = sorted(seeds, key=lambda s: (not s.isdigit(), int(s) if s.isdigit() else 0, s)) or [""]
    results = []
    for seed in seeds:
        path = workdir / (f"seed_{seed}" if seed else "") / "results.json"
        try:
            seed_results = json.loads(path.read_text())
            seed_results["categories"], seed_results["mean"]
        except FileNotFoundError:
            raise CompareError(f"{path.parent} has no results.json: is this run done?") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CompareError(f"{path} cannot be read: {type(error).__name__} {error}") from None
        results.append(seed_results)
    return Run(name, workdir, tuple(seeds), tuple(results))


def run_names(workdirs: Sequence[str | Path]) -> list[str]:
    """Returns unique names: the folder names, else the paths as given, else these with a number."""
    names = [Path(workdir).resolve().name for workdir in workdirs]
    if len(set(names)) < len(names):
        names = [str(workdir) for workdir in workdirs]
    if len(set(names)) < len(names):
        names = [f"{name} ({index})" for index, name in enumerate(names, 1)]
    return names


@dataclass(frozen=True)
class Images:
    """The test images of a category with the scores of one run, sorted by name.

    Attributes:
      names: their paths inside the category.
      labels: bool [n], True = defective.
      has_mask: bool [n]; images without a mask count in image metrics only.
      scores: float64 [n].
      size: height and width of maps and masks.
      masks_sha256: SHA-256 of all masks.
      histograms: float64 [n, 3, 256], see `histograms`.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    has_mask: np.ndarray
    scores: np.ndarray
    size: tuple[int, int]
    masks_sha256: str
    histograms: np.ndarray


def histograms(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Returns three histograms of map values per image, [n, 3, 256].

    Of defect-free pixels; of defect pixels; of defect pixels weighted by 1 / area of their region.
    The maps are uint8 [n, h, w], the masks bool [n, h, w].
    """
    counts = np.zeros((len(maps), 3, LEVELS))
    for row, levels, mask in zip(counts, maps, masks, strict=True):
        row[0] = np.bincount(levels[~mask], minlength=LEVELS)
        if mask.any():
            region = ndimage.label(mask, metrics.EIGHT_CONNECTED)[0][mask]
            weights = (1.0 / np.maximum(np.bincount(region), 1))[region]
            row[1] = np.bincount(levels[mask], minlength=LEVELS)
            row[2] = np.bincount(levels[mask], weights, minlength=LEVELS)
    return counts


def read_images(folder: Path) -> Images:
    """Reads images.csv and evaluation.npz of `W/<category>`; CompareError if this fails."""
    try:
        rows = list(csv.DictReader(io.StringIO((folder / "images.csv").read_text())))
        with np.load(io.BytesIO((folder / "evaluation.npz").read_bytes())) as arrays:
            maps, masks = arrays["map"], arrays["mask"]
        if not len(rows) == len(maps) == len(masks):
            raise ValueError(f"{len(rows)} lines, {len(maps)} maps and {len(masks)} masks")
        order = sorted(range(len(rows)), key=lambda index: rows[index]["name"])
        rows, maps, masks = [rows[index] for index in order], maps[order], masks[order]
        has_mask = np.array([row["has_mask"] == "True" for row in rows], bool)
        masks = masks & has_mask[:, None, None]
        counts = histograms(maps, masks) * has_mask[:, None, None]
        return Images(
            names=tuple(row["name"] for row in rows),
            labels=np.array([row["label"] != "0" for row in rows], bool),
            has_mask=has_mask,
            scores=np.array([row["score"] for row in rows], np.float64),
            size=maps.shape[1:],
            masks_sha256=hashlib.sha256(np.packbits(masks).tobytes()).hexdigest(),
            histograms=counts,
        )
    except FileNotFoundError:
        name = "evaluation.npz" if (folder / "images.csv").exists() else "images.csv"
        raise CompareError(f"there is no {folder / name}") from None
    except _UNREADABLE as error:
        what = f"{type(error).__name__} {error}"
        raise CompareError(f"images.csv and evaluation.npz of {folder}: {what}") from None


def not_paired(a: Images, b: Images) -> str | None:
    """Returns why two runs cannot be paired (other images or other masks), or None."""
    only_a, only_b = len(set(a.names) - set(b.names)), len(set(b.names) - set(a.names))
    if only_a or only_b:
        return f"not the same images: {only_a} only in the one, {only_b} only in the other"
    if a.names != b.names:
        return "not the same images: some names occur more than once"
    differ = np.count_nonzero((a.labels != b.labels) | (a.has_mask != b.has_mask))
    if differ:
        return f"not the same truth: {differ} images have another label, or a mask in one run only"
    if a.size == b.size and a.masks_sha256 != b.masks_sha256:
        return "not the same truth: the masks differ"
    return None
