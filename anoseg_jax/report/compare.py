"""Finished runs side by side, from their files alone: differences, spread over seeds, intervals.

A run is a workdir with results.json, or with one such workdir for each seed, `seed_<s>/`. Values
come from results.json, exact. Their 95 % intervals come from resampling the test images, from
images.csv and the 8-bit maps of evaluation.npz. All metrics are better when higher. This module
needs neither jax nor a checkpoint.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils.epath import Path

from anoseg_jax.report.intervals import CONFIDENCE, Draws, draw, interval_of
from anoseg_jax.report.runs import (
    CompareError,
    Images,
    Run,
    keys_of,
    not_paired,
    open_run,
    run_names,
    std_of,
    why_missing,
)
from anoseg_jax.running import files

# Largest difference between a metric of the 8-bit maps and of results.json. Above it the maps are
# too coarse, of another size or of another evaluation, and there is no interval.
MAX_ERROR = 0.02
# With fewer good or defective images an interval is too narrow, and the table warns.
FEW_IMAGES = 20
_ROUNDING = 1e-9  # smaller differences count as 0
# Starts of reasons that the report lists with the value, and not again with the difference.
_NO_VALUE = "no value in "
_NO_INTERVAL = "no interval in "


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
    every = keys_of([results["categories"] for run in opened for results in run.results])
    common = [name for name in every if all(name in run.categories for run in opened)]
    if not common:
        lists = "; ".join(f"{run.name} has {', '.join(run.categories) or 'none'}" for run in opened)
        raise CompareError(f"no category in common: {lists}")
    baseline_run = opened[baseline].name
    names = [
        metric
        for metric in opened[baseline].results[0]["mean"]
        if not metric.endswith("_std") and all(metric in run.results[0]["mean"] for run in opened)
    ]

    categories, draws, unpaired = {}, {}, {}
    for category in common:
        drawn = {run.name: draw(run, category, bootstrap, seed) for run in opened}
        of_runs = {run.name: _values(run, category, names, drawn[run.name]) for run in opened}
        values = {name: of_run[0] for name, of_run in of_runs.items()}
        draws[category] = {name: of_run[1] for name, of_run in of_runs.items()}
        unpaired[category] = {name: _unpaired(drawn[baseline_run], drawn[name]) for name in drawn}
        categories[category] = {
            "images": {name: _image_counts(of_run.images) for name, of_run in drawn.items()},
            "values": values,
            "differences": _differences(values, draws[category], baseline_run, unpaired[category]),
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
        "baseline": baseline_run,
        "metrics": names,
        "bootstrap": {"resamples": bootstrap, "seed": seed},
        "confidence": CONFIDENCE,
        "categories": categories,
        "mean": _mean(opened, categories, draws, unpaired, names, baseline_run),
    }


def _image_counts(images: Images | None) -> dict[str, int] | None:
    if images is None:
        return None
    defective = int(images.labels.sum())
    return {"good": len(images.labels) - defective, "defective": defective}


def _values(
    run: Run, category: str, names: Sequence[str], drawn: Draws
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Returns {metric: VALUE} of `compare`, and {metric: resamples [b]} where there is an interval.

    The resamples are shifted by the error of 8 bits: without it they centre on results.json.
    """
    values, draws = {}, {}
    for metric in names:
        by_seed = [results["categories"][category] for results in run.results]
        of_seeds = [results.get(metric) for results in by_seed]
        reason = why_missing(metric, dict(zip(run.seeds, by_seed, strict=True)))
        value = _value(None if reason else float(np.mean(of_seeds)), of_seeds)
        values[metric] = value
        value["reason"] = reason or drawn.reason
        if value["reason"] is None and metric not in drawn.values[0]:
            value["reason"] = "intervals are not made for this metric"
        if value["reason"] is not None:
            continue
        resampled = np.mean([of_seed[metric] for of_seed in drawn.values], axis=0)
        from_files = [float(of_seed[metric][0]) for of_seed in drawn.values]
        errors = np.abs(np.subtract(from_files, of_seeds))
        undefined = int(np.count_nonzero(np.isnan(resampled)))
        worst = int(np.argmax(errors))
        if undefined:
            value["reason"] = f"{undefined} of {len(resampled)} resamples do not have it"
        elif errors[worst] > MAX_ERROR:
            value["reason"] = (
                f"the files of its images give {from_files[worst]:.4f}, results.json "
                f"{of_seeds[worst]:.4f}: too coarse, or of another evaluation"
            )
        else:
            value["error"] = float(errors[worst])
            value["bound"] = max(bounds[metric] for bounds in drawn.bounds)
            draws[metric] = resampled[1:] - resampled[0] + value["value"]
            value["interval"] = interval_of(draws[metric], low=0.0, high=1.0)
    return values, draws


def _value(value: float | None, of_seeds: Sequence[float | None]) -> dict[str, Any]:
    return {
        "value": value,
        "std": std_of(of_seeds),
        "seeds": list(of_seeds),
        "interval": None,
        "error": None,
        "bound": None,
        "reason": None,
    }


def _unpaired(baseline: Draws, other: Draws) -> str | None:
    if baseline.images is None or other.images is None:
        return None  # the value has the reason
    return not_paired(baseline.images, other.images)


def _differences(
    values: dict[str, dict[str, dict[str, Any]]],
    draws: dict[str, dict[str, np.ndarray]],
    baseline: str,
    unpaired: dict[str, str | None],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns {run: {metric: DIFFERENCE}} of `compare`, for every run but the baseline."""
    differences: dict[str, dict[str, dict[str, Any]]] = {}
    for name in values:
        if name == baseline:
            continue
        differences[name] = {}
        for metric, value in values[name].items():
            difference, interval, clear = None, None, None
            reason = unpaired[name] or None
            old, new = values[baseline][metric]["value"], value["value"]
            if old is None or new is None:
                reason = _NO_VALUE + (baseline if old is None else name)
            else:
                difference = new - old
            has_draws = metric in draws[baseline] and metric in draws[name]
            if reason is None and not has_draws:
                reason = _NO_INTERVAL + (name if metric in draws[baseline] else baseline)
            if reason is None:
                interval = interval_of(draws[name][metric] - draws[baseline][metric])
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
    baseline: str,
) -> dict[str, Any]:
    """Returns values and differences of the mean over categories, each resampled on its own.

    The value of a seed is its mean over the categories.
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
            entries = [categories[name]["values"][run.name][metric] for name in of]
            of_seeds = np.mean([value["seeds"] for value in entries], axis=0).tolist() if of else []
            mean = float(np.mean([value["value"] for value in entries])) if of else None
            value = {**_value(mean, of_seeds), "of": len(of)}
            values[run.name][metric] = value
            without = [name for name in of if metric not in draws[name][run.name]]
            if not of:
                value["reason"] = "no category in which every run has it"
            elif without:
                value["reason"] = f"no interval in {', '.join(without)}"
            else:
                value["error"] = max(entry["error"] for entry in entries)
                value["bound"] = max(entry["bound"] for entry in entries)
                averaged[run.name][metric] = np.mean([draws[n][run.name][metric] for n in of], 0)
                value["interval"] = interval_of(averaged[run.name][metric], low=0.0, high=1.0)
    reasons = {
        run.name: "; ".join(f"{c}: {of[run.name]}" for c, of in unpaired.items() if of[run.name])
        for run in runs
    }
    return {
        "values": values,
        "differences": _differences(values, averaged, baseline, reasons),
    }


# The table.


def as_markdown(comparison: dict[str, Any]) -> str:
    """Returns a Markdown table per metric, with a row per category and a column per run.

    The reasons for missing values follow the tables.
    """
    baseline = comparison["baseline"]
    names = list(comparison["runs"])
    others = [name for name in names if name != baseline]
    lines = ["# Comparison", ""]
    for name, run in comparison["runs"].items():
        seeds = f", seeds {', '.join(run['seeds'])}" if run["seeds"] else ""
        lines.append(f"- **{name}**: {run['workdir']}{seeds}")
    lines += [
        "",
        f"Mean over seeds ± their standard deviation, [{comparison['confidence']:.0%} interval "
        f"over test images]. Differences are to {baseline}; in bold, better or worse, where the "
        "interval excludes 0.",
    ]
    rows = comparison["categories"]
    if len(rows) > 1:
        rows = rows | {"**mean**": comparison["mean"]}
    for metric in comparison["metrics"]:
        header = ["category", *names, *(f"{name} - {baseline}" for name in others)]
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
    lines += ["", "Intervals:", "", *interval_notes(comparison)]
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _value_cell(entry: dict[str, Any]) -> str:
    if entry["value"] is None:
        return "-"
    spread = f" ± {entry['std']:.4f}" if entry["std"] is not None else ""
    return f"{entry['value']:.4f}{spread}{_interval_cell(entry['interval'], '')}"


def _difference_cell(entry: dict[str, Any]) -> str:
    if entry["value"] is None:
        return "-"
    cell = f"{entry['value']:+.4f}{_interval_cell(entry['interval'], '+')}"
    return f"**{cell} {entry['clear']}**" if entry["clear"] else cell


def _interval_cell(interval: list[float] | None, sign: str) -> str:
    return f" [{interval[0]:{sign}.4f}, {interval[1]:{sign}.4f}]" if interval else ""


def _notes(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Returns a line for each reason, with its metrics."""
    lines = []
    for label, row in rows.items():
        of_reason: dict[tuple[str, str], list[str]] = {}
        for kind in ("values", "differences"):
            for name, entries in row[kind].items():
                for metric, entry in entries.items():
                    if entry["reason"] and not (
                        kind == "differences"
                        and entry["reason"].startswith((_NO_VALUE, _NO_INTERVAL))
                    ):
                        what = "value" if entry["value"] is None else "interval"
                        if kind == "differences":
                            what = f"paired {what}"
                        key = (f"{name}, no {what}", entry["reason"])
                        of_reason.setdefault(key, []).append(metric)
        for (what, reason), reason_metrics in of_reason.items():
            lines.append(f"- {label}: {what} of {', '.join(reason_metrics)}: {reason}")
    return lines


def interval_notes(comparison: dict[str, Any]) -> list[str]:
    """Returns lines on how the intervals were made and how far to trust them."""
    bootstrap = comparison["bootstrap"]
    lines = [
        f"- {bootstrap['resamples']} resamples of the test images (seed {bootstrap['seed']}), good "
        "and defective ones apart; the same images in both runs of a difference. They say nothing "
        "about another training: for that see the spread over seeds.",
    ]
    errors = [
        (entry["error"], entry["bound"], f"{metric}, {category}, {name}")
        for category, row in comparison["categories"].items()
        for name, entries in row["values"].items()
        for metric, entry in entries.items()
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
