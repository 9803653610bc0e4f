"""Finished runs side by side, from their files alone: differences, spread over seeds, intervals.

A run is a workdir with results.json, or with one such workdir for each seed, `seed_<s>/`. Values
come from results.json, exact. Their 95 % intervals come from resampling the test images, from
images.csv and the histograms of the 8-bit maps. All metrics are better when higher. This module
needs neither jax nor a checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils.epath import Path

from anoseg_jax.evaluation import METRICS
from anoseg_jax.evaluation.intervals import CONFIDENCE, SEED, Draws, draw, interval_of, not_paired
from anoseg_jax.evaluation.results import (
    ResultsError,
    keys_of,
    read_seeds,
    std_of,
    why_missing,
    write_json,
)
from anoseg_jax.report.templates import render
from anoseg_jax.running.files import write_text

# Largest difference between a metric of the 8-bit maps and of results.json. Above it the maps are
# too coarse, of another size or of another evaluation, and there is no interval.
MAX_ERROR = 0.02
# With fewer good or defective images an interval is too narrow, and the table warns.
FEW_IMAGES = 20
_ROUNDING = 1e-9  # smaller differences count as 0
# Starts of reasons that the report lists with the value, and not again with the difference.
_NO_VALUE = "no value in "
_NO_INTERVAL = "no interval in "


@dataclass(frozen=True)
class Run:
    """A workdir of a comparison, its unique name, and its results by seed (see `read_seeds`)."""

    name: str
    workdir: Path
    results: dict[str, dict[str, Any]]

    @property
    def categories(self) -> list[str]:
        """The categories that all seeds have."""
        of_seeds = [results["categories"] for results in self.results.values()]
        return [name for name in of_seeds[0] if all(name in of_seed for of_seed in of_seeds)]


@dataclass
class Value:
    """A metric of a run in a category, or its mean over `of` categories: a VALUE of `compare`.

    `seeds` has the value of each seed, `draws` that of each resample [b], None without an interval.
    """

    value: float | None
    seeds: list[float | None]
    reason: str | None = None
    of: int | None = None
    error: float | None = None
    bound: float | None = None
    draws: np.ndarray | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        of = {} if self.of is None else {"of": self.of}
        return {
            "value": self.value,
            "std": std_of(self.seeds),
            "seeds": self.seeds,
            "interval": None if self.draws is None else interval_of(self.draws, low=0.0),
            "error": self.error,
            "bound": self.bound,
            "reason": self.reason,
        } | of


Values = dict[str, dict[str, Value]]  # {run: {metric: Value}}; the first run is the baseline


def open_runs(workdirs: Sequence[str | Path]) -> list[Run]:
    """Reads results.json of each run; ResultsError without one.

    Their names are those of the folders, else the paths as given, else these with a number.
    """
    names = [Path(workdir).resolve().name for workdir in workdirs]
    if len(set(names)) < len(names):
        names = [str(workdir) for workdir in workdirs]
    if len(set(names)) < len(names):
        names = [f"{name} ({index})" for index, name in enumerate(names, 1)]
    pairs = zip(names, workdirs, strict=True)
    return [Run(name, Path(workdir), read_seeds(workdir)) for name, workdir in pairs]


def compare(runs: Sequence[str | Path], *, bootstrap: int = 1000) -> dict[str, Any]:
    """Compares finished runs with the first of them, the baseline.

    Args:
      runs: workdirs, two or more.
      bootstrap: resamples of the test images.

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
      ResultsError: fewer than two runs, one without results.json, no category in common.
    """
    if len(runs) < 2:
        raise ResultsError(f"a comparison needs at least two runs, got {len(runs)}")
    opened = open_runs(runs)
    every = keys_of(r["categories"] for run in opened for r in run.results.values())
    common = [name for name in every if all(name in run.categories for run in opened)]
    if not common:
        lists = "; ".join(f"{run.name} has {', '.join(run.categories) or 'none'}" for run in opened)
        raise ResultsError(f"no category in common: {lists}")

    categories, values, unpaired = {}, {}, {}
    for category in common:
        drawn = {run.name: draw(run.workdir, run.results, category, bootstrap) for run in opened}
        images = {name: of_run.images for name, of_run in drawn.items()}
        baseline = images[opened[0].name]
        unpaired[category] = {name: not_paired(baseline, of_run) for name, of_run in images.items()}
        values[category] = {run.name: _values(run, category, drawn[run.name]) for run in opened}
        categories[category] = {
            "images": {name: of_run and of_run.counts for name, of_run in images.items()},
            **_block(values[category], unpaired[category]),
        }
    reasons = {
        run.name: "; ".join(f"{c}: {of[run.name]}" for c, of in unpaired.items() if of[run.name])
        for run in opened
    }
    return {
        "runs": {
            run.name: {
                "workdir": str(run.workdir),
                "seeds": [name for name in run.results if name],
                "missing": [name for name in every if name not in run.categories],
            }
            for run in opened
        },
        "baseline": opened[0].name,
        "metrics": list(METRICS),
        "bootstrap": {"resamples": bootstrap, "seed": SEED},
        "confidence": CONFIDENCE,
        "categories": categories,
        "mean": _block(_mean(values), reasons),
    }


def _values(run: Run, category: str, drawn: Draws) -> dict[str, Value]:
    """Returns {metric: Value} of a run in a category.

    The resamples are shifted by the error of 8 bits: without it they centre on results.json.
    """
    by_seed = {seed: results["categories"][category] for seed, results in run.results.items()}
    values = {}
    for metric in METRICS:
        of_seeds = [results[metric] for results in by_seed.values()]
        missing = why_missing(metric, by_seed)
        value = Value(None if missing else float(np.mean(of_seeds)), of_seeds)
        values[metric] = value
        value.reason = missing or drawn.reason
        if value.reason:
            continue
        resampled = np.mean([of_seed[metric] for of_seed in drawn.values], axis=0)
        from_files = [float(of_seed[metric][0]) for of_seed in drawn.values]
        errors = np.abs(np.subtract(from_files, of_seeds))
        undefined = int(np.count_nonzero(np.isnan(resampled)))
        worst = int(np.argmax(errors))
        if undefined:
            value.reason = f"{undefined} of {len(resampled)} resamples do not have it"
        elif errors[worst] > MAX_ERROR:
            value.reason = (
                f"the files of its images give {from_files[worst]:.4f}, results.json "
                f"{of_seeds[worst]:.4f}: too coarse, or of another evaluation"
            )
        else:
            value.error = float(errors[worst])
            value.bound = max(bounds[metric] for bounds in drawn.bounds)
            value.draws = resampled[1:] - resampled[0] + value.value
    return values


def _mean(categories: Mapping[str, Values]) -> Values:
    """Returns the means over categories, each resampled on its own.

    The value of a seed is its mean over the categories.
    """
    means: Values = {run: {} for of_runs in categories.values() for run in of_runs}
    for metric in METRICS:
        of = [
            category
            for category, of_runs in categories.items()
            if all(of_run[metric].value is not None for of_run in of_runs.values())
        ]
        for run, of_metric in means.items():
            if not of:
                reason = "no category in which every run has it"
                of_metric[metric] = Value(None, [], reason, of=0)
                continue
            values = [categories[category][run][metric] for category in of]
            of_seeds = np.mean([value.seeds for value in values], axis=0).tolist()
            mean = Value(float(np.mean([value.value for value in values])), of_seeds, of=len(of))
            of_metric[metric] = mean
            without = [c for c, value in zip(of, values, strict=True) if value.draws is None]
            if without:
                mean.reason = _NO_INTERVAL + ", ".join(without)
            else:
                mean.error = max(value.error for value in values)
                mean.bound = max(value.bound for value in values)
                mean.draws = np.mean([value.draws for value in values], axis=0)
    return means


def _block(values: Values, unpaired: Mapping[str, str | None]) -> dict[str, Any]:
    """Returns the values and differences of a category or of the mean, as `compare` does."""
    baseline, *others = values
    return {
        "values": {
            run: {metric: value.as_dict() for metric, value in of_run.items()}
            for run, of_run in values.items()
        },
        "differences": {
            run: {
                metric: _difference(value, values[run][metric], (baseline, run), unpaired[run])
                for metric, value in values[baseline].items()
            }
            for run in others
        },
    }


def _difference(
    old: Value, new: Value, names: tuple[str, str], unpaired: str | None
) -> dict[str, Any]:
    """Returns a DIFFERENCE of `compare`."""
    difference, interval, clear, reason = None, None, None, unpaired or None
    if old.value is None or new.value is None:
        reason = _NO_VALUE + names[old.value is not None]
    else:
        difference = new.value - old.value
        if reason is None and (old.draws is None or new.draws is None):
            reason = _NO_INTERVAL + names[old.draws is not None]
    if reason is None:
        interval = interval_of(new.draws - old.draws)
        better, worse = interval[0] > _ROUNDING, interval[1] < -_ROUNDING
        clear = "better" if better else "worse" if worse else None
    return {"value": difference, "interval": interval, "clear": clear, "reason": reason}


def as_markdown(comparison: dict[str, Any]) -> str:
    """Returns a Markdown table per metric, with a row per category and a column per run.

    The reasons for missing values follow the tables.
    """
    blocks = comparison["categories"]
    if len(blocks) > 1:
        blocks = blocks | {"**mean**": comparison["mean"]}
    notes = [note for label, block in blocks.items() for note in _notes(label, block)]
    context = {"blocks": blocks, "notes": notes, "interval_notes": interval_notes(comparison)}
    return render("comparison.md.jinja", **comparison, **context).rstrip() + "\n"


def _notes(label: str, block: dict[str, Any]) -> list[str]:
    """Returns a line for each reason of a block of the table, with its metrics."""
    of_reason: dict[tuple[str, str], list[str]] = {}
    for kind, pair in (("values", ""), ("differences", "paired ")):
        for name, entries in block[kind].items():
            for metric, entry in entries.items():
                reason = entry["reason"]
                if not reason or (pair and reason.startswith((_NO_VALUE, _NO_INTERVAL))):
                    continue
                what = pair + ("value" if entry["value"] is None else "interval")
                of_reason.setdefault((f"{name}, no {what}", reason), []).append(metric)
    return [
        f"{label}: {what} of {', '.join(names)}: {reason}"
        for (what, reason), names in of_reason.items()
    ]


def interval_notes(comparison: dict[str, Any]) -> list[str]:
    """Returns lines on how the intervals were made and how far to trust them."""
    bootstrap = comparison["bootstrap"]
    lines = [
        f"{bootstrap['resamples']} resamples of the test images (seed {bootstrap['seed']}), good "
        "and defective ones apart; the same images in both runs of a difference. They say nothing "
        "about another training: for that see the spread over seeds."
    ]
    errors = [
        (entry["error"], entry["bound"], f"{metric}, {category}, {name}")
        for category, block in comparison["categories"].items()
        for name, entries in block["values"].items()
        for metric, entry in entries.items()
        if entry["error"] is not None
    ]
    if errors:
        error, bound, where = max(errors)
        lines.append(
            "From maps of 8 bits, moved to the exact values above. These maps put a metric at "
            f"most {error:.4f} off ({where}; possible there: {bound:.4f})."
        )
    few = {
        f"{category} ({counts['good']} good, {counts['defective']} defective)": None
        for category, block in comparison["categories"].items()
        for counts in block["images"].values()
        if counts and min(counts.values()) < FEW_IMAGES
    }
    if few:
        lines.append(f"Too narrow, because of few test images: {', '.join(few)}.")
    return lines


def write(comparison: dict[str, Any], folder: str | Path) -> None:
    """Writes comparison.json and comparison.md into a folder, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", comparison)
    write_text(folder / "comparison.md", as_markdown(comparison))
