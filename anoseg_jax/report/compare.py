"""Finished runs side by side, from their files alone: differences, spread over seeds, intervals.

A run is a workdir with results.json, or with one such workdir for each seed, `seed_<s>/`. Values
come from results.json, exact. Their 95 % intervals come from resampling the test images, from
images.csv and the 8-bit maps of evaluation.npz. All metrics are better when higher. This module
needs neither jax nor a checkpoint.
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
from anoseg_jax.running import files

CONFIDENCE = 0.95
# Where the files of the images put a metric farther than this from results.json, they are too
# coarse (8 bits), of another size or of another evaluation: there is no interval.
MAX_ERROR = 0.02
# Below so many good or defective images an interval is too narrow, and the table says so.
FEW_IMAGES = 20
_ROUNDING = 1e-9  # differences below it are none
# Reasons of a difference that are told with the run's own value.
_NO_VALUE = "no value in "
_NO_INTERVAL = "no interval in "
# What numpy and csv raise on files that are cut off, damaged or of another kind.
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, LookupError, BadZipFile, zlib.error)
_LEVELS = 256
_KEYS = metrics._keys(np.arange(_LEVELS, dtype=np.float32) / 255)


class CompareError(UsageError):
    """Runs that cannot be compared; the message is one line that says which and why."""


# Several seeds as one.


def mean_over_seeds(results_by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Returns one dict in the shape of results.json from those of several seeds.

    A metric is its mean over seeds, and `<metric>_std` its standard deviation (n - 1). Both are
    None, with the reason, where a seed has none: the mean of the others would flatter. What is no
    number is itself where all seeds agree, else a list, one a seed; `params_sha256` is always such
    a list. A category that some seeds lack is of those that have it, named in its `seeds`. The
    `mean` is over categories; its std is of the seeds' own means over categories.
    """
    if not results_by_seed:
        raise CompareError("no results of any seed")
    by_seed = dict(sorted(results_by_seed.items()))
    categories = {}
    for name in _keys_of([results["categories"] for results in by_seed.values()]):
        found = {s: r["categories"][name] for s, r in by_seed.items() if name in r["categories"]}
        categories[name] = _over_seeds(found) | {
            "params_sha256": [category.get("params_sha256") for category in found.values()],
            "seeds": list(found),
        }
    mean: dict[str, float | None] = {}
    for metric in _keys_of([results["mean"] for results in by_seed.values()]):
        values = [c[metric] for c in categories.values() if c.get(metric) is not None]
        mean[metric] = float(np.mean(values)) if values else None
        complete = len(values) == len(categories) and all(
            len(category["seeds"]) == len(by_seed) for category in categories.values()
        )
        of_seeds = [results["mean"].get(metric) for results in by_seed.values()]
        mean[f"{metric}_std"] = _std(of_seeds) if complete else None
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


def _over_seeds(found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Returns one dict from one a seed; a dict with `not_available` holds metrics: they get a std.

    Whole numbers on which all seeds agree are counts, and stay as they are.
    """
    result: dict[str, Any] = {}
    missing: dict[str, str] = {}
    has_metrics = any("not_available" in values for values in found.values())
    for key in _keys_of(list(found.values())):
        values = [of_seed.get(key) for of_seed in found.values()]
        known = [value for value in values if value is not None]
        agree = all(value == values[0] for value in values)
        if key == "not_available":
            continue
        if known and all(isinstance(value, dict) for value in known):
            result[key] = _over_seeds({seed: d[key] for seed, d in found.items() if d.get(key)})
        elif not all(type(value) in (int, float) for value in known) or (
            agree and all(type(value) is int for value in values)
        ):
            result[key] = values[0] if agree else values
        else:
            reason = _reason(key, found)
            result[key] = float(np.mean(known)) if reason is None else None
            if has_metrics:
                result[f"{key}_std"] = _std(values)
                if reason is not None:
                    missing[key] = reason
                if reason is not None or len(values) == 1:
                    missing[f"{key}_std"] = reason or "one seed"
    return result | ({"not_available": missing} if has_metrics else {})


def _reason(metric: str, found: dict[int, dict[str, Any]]) -> str | None:
    """Returns why a metric is None in some of the results, one a seed; None when it never is."""
    reasons = {
        seed: values.get("not_available", {}).get(metric, "no value")
        for seed, values in found.items()
        if values.get(metric) is None
    }
    if len(reasons) == len(found) and len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"seed {seed}: {reason}" for seed, reason in reasons.items()) or None


def _std(values: Sequence[float | None]) -> float | None:
    if len(values) < 2 or None in values:
        return None
    return float(np.std(values, ddof=1))


def _keys_of(dicts: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the keys of all dicts once, in the order in which they come first."""
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
    there = workdir.iterdir() if workdir.is_dir() else ()
    seeds = [path.name[5:] for path in there if path.name.startswith("seed_") and path.is_dir()]
    # By number, then by name.
    seeds = sorted(seeds, key=lambda s: (not s.isdigit(), int(s) if s.isdigit() else 0, s)) or [""]
    results = []
    for seed in seeds:
        path = workdir / (f"seed_{seed}" if seed else "") / "results.json"
        try:
            found = json.loads(path.read_text())
            found["categories"], found["mean"]
        except FileNotFoundError:
            raise CompareError(f"{path.parent} has no results.json: is this run done?") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CompareError(f"{path} cannot be read: {type(error).__name__} {error}") from None
        results.append(found)
    return Run(name, workdir, tuple(seeds), tuple(results))


def run_names(workdirs: Sequence[str | Path]) -> list[str]:
    """Returns the folders' names; the paths as given where these agree, numbered if they do too."""
    names = [Path(workdir).resolve().name for workdir in workdirs]
    if len(set(names)) < len(names):
        names = [str(workdir) for workdir in workdirs]
    if len(set(names)) < len(names):
        names = [f"{name} ({index})" for index, name in enumerate(names, 1)]
    return names


@dataclass(frozen=True)
class Images:
    """The test images of a category as one run saw them, sorted by name.

    Attributes:
      names: their paths inside the category.
      labels: bool [n], True = defective.
      has_mask: bool [n]; images without a mask count in image metrics only.
      scores: float64 [n].
      size: height and width of maps and masks.
      masks_sha256: of all masks.
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
    """Returns [n, 3, 256]: defect-free and defect pixels, and 1 / area of the latter's regions.

    All by the value of the uint8 maps [n, h, w]; masks are bool [n, h, w].
    """
    counts = np.zeros((len(maps), 3, _LEVELS))
    for row, levels, mask in zip(counts, maps, masks, strict=True):
        row[0] = np.bincount(levels[~mask], minlength=_LEVELS)
        if mask.any():
            region = ndimage.label(mask, metrics._EIGHT_CONNECTED)[0][mask]
            weights = (1.0 / np.maximum(np.bincount(region), 1))[region]
            row[1] = np.bincount(levels[mask], minlength=_LEVELS)
            row[2] = np.bincount(levels[mask], weights, minlength=_LEVELS)
    return counts


def read_images(folder: Path) -> Images:
    """Reads images.csv and evaluation.npz of `W/<category>`; CompareError if these do not serve."""
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
    """Returns why two runs did not see the same test images with the same truth, or None."""
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


# Metrics of resampled images.


def resample_weights(strata: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Returns how often each image occurs, [1 + resamples, n]; the first row: once each.

    Drawn with replacement among the images of the same stratum (an integer each, [n]), so that a
    resample has as many good and as many defective images as there are.
    """
    weights = np.ones((1 + resamples, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        shares = np.full(len(members), 1 / len(members))
        weights[1:, members] = rng.multinomial(len(members), shares, size=resamples)
    return weights


def image_auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the image AUROC [b] under each row of weights [b, n].

    The share of pairs (defective, good) in which the defective image scores higher; ties are half.
    """
    defective, good = scores[labels, None], scores[None, ~labels]
    higher = (defective > good) + 0.5 * (defective == good)  # [defective, good]
    of_defective, of_good = weights[:, labels], weights[:, ~labels]
    pairs = of_defective.sum(axis=1) * of_good.sum(axis=1)
    wins = np.sum((of_defective @ higher) * of_good, axis=1)
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def histogram_metrics(counts: np.ndarray) -> tuple[dict[str, float], dict[str, float]] | None:
    """Returns the pixel metrics of one histogram [3, 256] (see `histograms`), and their bounds.

    A bound is how far rounding to 8 bits can have moved the metric: it made ties, as the bits that
    an accumulator drops do. None without defect or without defect-free pixels.
    """
    normal, defect = np.flatnonzero(counts[0]), np.flatnonzero(counts[1])
    if not len(normal) or not len(defect):
        return None
    group = metrics._Group(
        at_threshold={},
        normal=metrics._Table(_KEYS[normal], counts[:1, normal]),
        defect=metrics._Table(_KEYS[defect], counts[1:, defect]),
    )
    return metrics._pixel_metrics(metrics._count([group]), shift=0)


def resample(images: Images, weights: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Returns each metric [b] under each row of weights, nan where there is none, and the bounds.

    The bounds (see `histogram_metrics`) are those of the first row.
    """
    values = {name: np.full(len(weights), np.nan) for name in metrics.PIXEL_METRICS}
    values["image_auroc"] = image_auroc(images.scores, images.labels, weights)
    bounds: dict[str, float] = {"image_auroc": 0.0}
    sums = np.tensordot(weights, images.histograms, 1)  # [b, 3, 256]
    for index, counts in enumerate(sums):
        found = histogram_metrics(counts)
        if found is None:
            continue
        for name, value in found[0].items():
            values[name][index] = value
        if index == 0:
            bounds |= found[1]
    return values, bounds


@dataclass(frozen=True)
class _Draws:
    """A run's resamples in one category, or why there are none."""

    images: Images | None = None
    values: tuple[dict[str, np.ndarray], ...] = ()  # one a seed, see `resample`
    bounds: tuple[dict[str, float], ...] = ()
    reason: str | None = None


def _draw(run: Run, category: str, resamples: int, seed: int) -> _Draws:
    """Resamples a run's test images: the same ones in each seed, and in runs that are paired."""
    try:
        seen = [read_images(folder / category) for folder in run.folders]
    except CompareError as error:
        return _Draws(reason=str(error))
    for name, images in zip(run.seeds, seen, strict=True):
        reason = not_paired(seen[0], images)
        if reason is not None:
            return _Draws(reason=f"seeds {run.seeds[0]} and {name}: {reason}")
    # Equal images give equal weights, and other categories other ones.
    rng = np.random.default_rng([seed, zlib.crc32(category.encode())])
    weights = resample_weights(2 * seen[0].labels + seen[0].has_mask, resamples, rng)
    values, bounds = zip(*(resample(images, weights) for images in seen), strict=True)
    return _Draws(seen[0], values, bounds)


# The comparison.


def compare(
    runs: Sequence[str | Path], *, baseline: int = 0, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Compares finished runs.

    Args:
      runs: workdirs, two or more.
      baseline: index of the run that the others are compared with.
      bootstrap: resamples of the test images.
      seed: of the resampling.

    Returns:
      A dict that JSON can hold:
      runs: for each name its workdir, seeds and missing categories; baseline: a name; metrics;
        bootstrap, confidence: how the intervals were made.
      categories: {category: {"images": {run: {"good": n, "defective": n}}, "values": {run: {metric:
        VALUE}}, "differences": {run: {metric: DIFFERENCE}}}}, of the categories that all runs have.
      mean: values and differences of the mean over those categories in which every run has the
        metric ("of" in each: how many); its intervals need one in each of these.
      VALUE: value and std over seeds, seeds (the values), interval [low, high], bound and error
        (what 8-bit maps can do to the metric, and did); reason: why value or interval is None.
      DIFFERENCE: run minus baseline: value, interval (None where unpaired, with the reason), clear:
        "better" or "worse" when the interval excludes 0, else None.

    Raises:
      CompareError: fewer than two runs, one without results.json, no category in common.
    """
    if len(runs) < 2:
        raise CompareError(f"a comparison needs at least two runs, got {len(runs)}")
    if bootstrap < 1:
        raise CompareError(f"bootstrap={bootstrap} must be at least 1")
    opened = [open_run(path, name) for path, name in zip(runs, run_names(runs), strict=True)]
    if not 0 <= baseline < len(opened):
        raise CompareError(f"baseline={baseline} must be below {len(opened)}, the number of runs")
    every = _keys_of([results["categories"] for run in opened for results in run.results])
    common = [name for name in every if all(name in run.categories for run in opened)]
    if not common:
        lists = "; ".join(f"{run.name} has {', '.join(run.categories) or 'none'}" for run in opened)
        raise CompareError(f"no category in common: {lists}")
    first = opened[baseline]
    names = [
        metric
        for metric in first.results[0]["mean"]
        if not metric.endswith("_std") and all(metric in run.results[0]["mean"] for run in opened)
    ]

    categories, draws, unpaired = {}, {}, {}
    for category in common:
        drawn = {run.name: _draw(run, category, bootstrap, seed) for run in opened}
        found = {run.name: _values(run, category, names, drawn[run.name]) for run in opened}
        values = {name: of_run[0] for name, of_run in found.items()}
        draws[category] = {name: of_run[1] for name, of_run in found.items()}
        unpaired[category] = {name: _unpaired(drawn[first.name], drawn[name]) for name in drawn}
        categories[category] = {
            "images": {name: _image_counts(of_run.images) for name, of_run in drawn.items()},
            "values": values,
            "differences": _differences(values, draws[category], first.name, unpaired[category]),
        }
    return {
        "runs": {
            run.name: {
                "workdir": str(run.workdir),
                "seeds": [name for name in run.seeds if name],
                "missing": [name for name in every if name not in run.categories],
            }
            for run in opened
        },
        "baseline": first.name,
        "metrics": names,
        "bootstrap": {"resamples": bootstrap, "seed": seed},
        "confidence": CONFIDENCE,
        "categories": categories,
        "mean": _mean(opened, categories, draws, unpaired, names, first.name),
    }


def _image_counts(images: Images | None) -> dict[str, int] | None:
    if images is None:
        return None
    defective = int(images.labels.sum())
    return {"good": len(images.labels) - defective, "defective": defective}


def _values(
    run: Run, category: str, names: Sequence[str], drawn: _Draws
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Returns {metric: VALUE} of `compare`, and {metric: resamples [b]} where there is an interval.

    The resamples are moved by the metric's error of 8 bits, to where results.json has the value.
    """
    values, draws = {}, {}
    for metric in names:
        found = [results["categories"][category] for results in run.results]
        of_seeds = [results.get(metric) for results in found]
        reason = _reason(metric, dict(zip(run.seeds, found, strict=True)))
        value = _value(None if reason else float(np.mean(of_seeds)), of_seeds)
        values[metric] = value
        value["reason"] = reason or drawn.reason
        if value["reason"] is None and metric not in drawn.values[0]:
            value["reason"] = "intervals are not made for this metric"
        if value["reason"] is not None:
            continue
        resampled = np.mean([of_seed[metric] for of_seed in drawn.values], axis=0)
        files = [float(of_seed[metric][0]) for of_seed in drawn.values]
        errors = np.abs(np.subtract(files, of_seeds))
        undefined = int(np.count_nonzero(np.isnan(resampled)))
        worst = int(np.argmax(errors))
        if undefined:
            value["reason"] = f"{undefined} of {len(resampled)} resamples do not have it"
        elif errors[worst] > MAX_ERROR:
            value["reason"] = (
                f"the files of its images give {files[worst]:.4f}, results.json "
                f"{of_seeds[worst]:.4f}: too coarse, or of another evaluation"
            )
        else:
            value["error"] = float(errors[worst])
            value["bound"] = max(bounds[metric] for bounds in drawn.bounds)
            draws[metric] = resampled[1:] - resampled[0] + value["value"]
            value["interval"] = _interval(draws[metric], low=0.0, high=1.0)
    return values, draws


def _value(value: float | None, of_seeds: Sequence[float | None]) -> dict[str, Any]:
    return {
        "value": value,
        "std": _std(of_seeds),
        "seeds": list(of_seeds),
        "interval": None,
        "error": None,
        "bound": None,
        "reason": None,
    }


def _interval(draws: np.ndarray, *, low: float = -1.0, high: float = 1.0) -> list[float]:
    tail = (1 - CONFIDENCE) / 2
    return np.clip(np.quantile(draws, [tail, 1 - tail]), low, high).tolist()


def _unpaired(first: _Draws, other: _Draws) -> str | None:
    if first.images is None or other.images is None:
        return None  # no interval for another reason, that stands with the value
    return not_paired(first.images, other.images)


def _differences(
    values: dict[str, dict[str, dict[str, Any]]],
    draws: dict[str, dict[str, np.ndarray]],
    first: str,
    unpaired: dict[str, str | None],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns {run: {metric: DIFFERENCE}} of `compare`, of all runs but the first."""
    differences: dict[str, dict[str, dict[str, Any]]] = {}
    for name in values:
        if name == first:
            continue
        differences[name] = {}
        for metric, value in values[name].items():
            difference, interval, clear = None, None, None
            reason = unpaired[name] or None
            old, new = values[first][metric]["value"], value["value"]
            if old is None or new is None:
                reason = _NO_VALUE + (first if old is None else name)
            else:
                difference = new - old
            has_draws = metric in draws[first] and metric in draws[name]
            if reason is None and not has_draws:
                reason = _NO_INTERVAL + (name if metric in draws[first] else first)
            if reason is None:
                interval = _interval(draws[name][metric] - draws[first][metric])
                better, worse = interval[0] > _ROUNDING, interval[1] < -_ROUNDING
                clear = "better" if better else "worse" if worse else None
            differences[name][metric] = {
                "value": difference,
                "interval": interval,
                "clear": clear,
                "reason": reason,
            }
    return differences


def _mean(
    runs: Sequence[Run],
    categories: dict[str, dict[str, Any]],
    draws: dict[str, dict[str, dict[str, np.ndarray]]],
    unpaired: dict[str, dict[str, str | None]],
    names: Sequence[str],
    first: str,
) -> dict[str, Any]:
    """Returns values and differences of the mean over categories; these are resampled each alone.

    A seed's value is its own mean over the categories.
    """
    values: dict[str, dict[str, dict[str, Any]]] = {run.name: {} for run in runs}
    averaged: dict[str, dict[str, np.ndarray]] = {run.name: {} for run in runs}
    for metric in names:
        of = [
            name
            for name, category in categories.items()
            if all(values[metric]["value"] is not None for values in category["values"].values())
        ]
        for run in runs:
            found = [categories[name]["values"][run.name][metric] for name in of]
            of_seeds = np.mean([value["seeds"] for value in found], axis=0).tolist() if of else []
            mean = float(np.mean([value["value"] for value in found])) if of else None
            value = {**_value(mean, of_seeds), "of": len(of)}
            values[run.name][metric] = value
            without = [name for name in of if metric not in draws[name][run.name]]
            if not of:
                value["reason"] = "no category in which every run has it"
            elif without:
                value["reason"] = f"no interval in {', '.join(without)}"
            else:
                value["error"] = max(one["error"] for one in found)
                value["bound"] = max(one["bound"] for one in found)
                averaged[run.name][metric] = np.mean([draws[n][run.name][metric] for n in of], 0)
                value["interval"] = _interval(averaged[run.name][metric], low=0.0, high=1.0)
    reasons = {
        run.name: "; ".join(f"{c}: {of[run.name]}" for c, of in unpaired.items() if of[run.name])
        for run in runs
    }
    return {
        "values": values,
        "differences": _differences(values, averaged, first, reasons),
    }


# The table.


def as_markdown(comparison: dict[str, Any]) -> str:
    """Returns one table a metric, a row a category and a column a run, and the reasons beneath."""
    first = comparison["baseline"]
    names = list(comparison["runs"])
    others = [name for name in names if name != first]
    lines = ["# Comparison", ""]
    for name, run in comparison["runs"].items():
        seeds = f", seeds {', '.join(run['seeds'])}" if run["seeds"] else ""
        lines.append(f"- **{name}**: {run['workdir']}{seeds}")
    lines += [
        "",
        f"Mean over seeds ± their standard deviation, [{comparison['confidence']:.0%} interval "
        f"over test images]. Differences are to {first}; in bold, better or worse, where the "
        "interval excludes 0.",
    ]
    rows = comparison["categories"]
    if len(rows) > 1:
        rows = rows | {"**mean**": comparison["mean"]}
    for metric in comparison["metrics"]:
        header = ["category", *names, *(f"{name} - {first}" for name in others)]
        lines += ["", f"## {metric}", "", _line(header), "|---" * len(header) + "|"]
        for label, row in rows.items():
            values = [_value_cell(row["values"][name][metric]) for name in names]
            differences = [_difference_cell(row["differences"][n][metric]) for n in others]
            lines.append(_line([label, *values, *differences]))
    missing = [
        f"- {name} lacks {', '.join(run['missing'])}"
        for name, run in comparison["runs"].items()
        if run["missing"]
    ]
    if missing:
        lines += ["", "Not compared, because a run or one of its seeds lacks them:", "", *missing]
    notes = _notes(rows)
    if notes:
        lines += ["", "Not available:", "", *notes]
    lines += ["", "Intervals:", "", *_interval_notes(comparison)]
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _value_cell(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "-"
    spread = f" ± {found['std']:.4f}" if found["std"] is not None else ""
    return f"{found['value']:.4f}{spread}{_interval_cell(found['interval'], '')}"


def _difference_cell(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "-"
    cell = f"{found['value']:+.4f}{_interval_cell(found['interval'], '+')}"
    return f"**{cell} {found['clear']}**" if found["clear"] else cell


def _interval_cell(interval: list[float] | None, sign: str) -> str:
    return f" [{interval[0]:{sign}.4f}, {interval[1]:{sign}.4f}]" if interval else ""


def _notes(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Returns a line for each reason, with the metrics that it holds for."""
    lines = []
    for label, row in rows.items():
        of_reason: dict[tuple[str, str], list[str]] = {}
        for kind in ("values", "differences"):
            for name, found in row[kind].items():
                for metric, entry in found.items():
                    if entry["reason"] and not (
                        kind == "differences"
                        and entry["reason"].startswith((_NO_VALUE, _NO_INTERVAL))
                    ):
                        what = "value" if entry["value"] is None else "interval"
                        if kind == "differences":
                            what = f"paired {what}"
                        key = (f"{name}, no {what}", entry["reason"])
                        of_reason.setdefault(key, []).append(metric)
        for (what, reason), found_metrics in of_reason.items():
            lines.append(f"- {label}: {what} of {', '.join(found_metrics)}: {reason}")
    return lines


def _interval_notes(comparison: dict[str, Any]) -> list[str]:
    made = comparison["bootstrap"]
    lines = [
        f"- {made['resamples']} resamples of the test images (seed {made['seed']}), good and "
        "defective ones apart; the same images in both runs of a difference. They say nothing "
        "about another training: for that see the spread over seeds.",
    ]
    errors = [
        (entry["error"], entry["bound"], f"{metric}, {category}, {name}")
        for category, row in comparison["categories"].items()
        for name, found in row["values"].items()
        for metric, entry in found.items()
        if entry["error"] is not None
    ]
    if errors:
        error, bound, where = max(errors)
        lines.append(
            "- From maps of 8 bits, moved to the exact values above. These maps put a metric at "
            f"most {error:.4f} off ({where}; possible there: {bound:.4f})."
        )
    few = {
        f"{category} ({counts['good']} good, {counts['defective']} defective)": None
        for category, row in comparison["categories"].items()
        for counts in row["images"].values()
        if counts and min(counts.values()) < FEW_IMAGES
    }
    if few:
        lines.append(f"- Too narrow, because of few test images: {', '.join(few)}.")
    return lines


def write(comparison: dict[str, Any], folder: str | Path) -> None:
    """Writes comparison.json and comparison.md into a folder, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(comparison, indent=2, allow_nan=False) + "\n"
    files.write_text(folder / "comparison.json", text)
    files.write_text(folder / "comparison.md", as_markdown(comparison))
