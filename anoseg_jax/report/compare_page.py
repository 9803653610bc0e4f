"""The HTML page of a comparison: differences of metrics, and scores of two runs image by image.

It reads only files of finished runs. Each run is compared with the baseline: a plot of the scores
of every image, and the images in which the two runs differ most.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils.epath import Path
from matplotlib.axes import Axes
from scipy import stats

from anoseg_jax.evaluation.evaluate import to_display_scale
from anoseg_jax.evaluation.results import read_results
from anoseg_jax.report import compare, pages, panels, plots
from anoseg_jax.running.files import write_text

SHOWN = 6  # images per category and kind of disagreement
MAX_SHOWN = 240  # images per page: about 12 MB


class RunCategory(NamedTuple):
    """Results of one run in one category.

    Attributes:
      results: of results.json.
      rows: of images.csv by name, with their `index` in the arrays.
      arrays: of evaluation.npz; None with the reason in `missing`.
    """

    results: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    arrays: dict[str, np.ndarray] | None
    missing: str


class Image(NamedTuple):
    """A test image in two runs; pairs are in the order (baseline, other run).

    Attributes:
      name: its path inside the category.
      defect_type: "good" for good parts.
      label: 1 for a defective image.
      scores: image-level scores, each on the scale of its run.
      ranks: of the scores among all images that both runs have, from 0 (lowest) to 1.
      ious: at each run's best threshold; None where there is none.
      right: whether each run's best threshold gives the right verdict; None without a threshold.
    """

    name: str
    defect_type: str
    label: int
    scores: tuple[float, float]
    ranks: tuple[float, float]
    ious: tuple[float | None, float | None]
    right: tuple[bool | None, bool | None]


def read_category(folder: Path, category: str) -> RunCategory:
    """Reads the files of a category in the workdir of a run or of one of its seeds."""
    results = read_results(folder)["categories"][category]
    rows, no_rows = pages.read_optional(folder / category / "images.csv", pages.parse_images)
    arrays, missing = pages.read_optional(folder / category / "evaluation.npz", pages.parse_arrays)
    if arrays is not None and len(arrays["map"]) != len(rows or []):
        arrays, missing = None, "evaluation.npz and images.csv are of different evaluations."
    by_name = {row["name"]: row | {"index": index} for index, row in enumerate(rows or [])}
    return RunCategory(results, by_name, arrays, no_rows or missing)


def ranks_of(scores: Sequence[float]) -> np.ndarray:
    """Returns the rank of each score, from 0 (lowest) to 1; ties share their mean rank."""
    return (stats.rankdata(scores) - 1) / max(len(scores) - 1, 1)


def match(baseline: RunCategory, other: RunCategory) -> list[Image]:
    """Returns the images that both runs have, in the order of the baseline."""
    both = [name for name in baseline.rows if name in other.rows]
    rows = [(baseline.rows[name], other.rows[name]) for name in both]
    ranks = [ranks_of([pair[run]["score"] for pair in rows]) for run in (0, 1)]
    thresholds = [run.results.get("image_f1_max_threshold") for run in (baseline, other)]
    images = []
    for name, pair, *of_runs in zip(both, rows, *ranks, strict=True):
        label = pair[0]["label"]
        scores = tuple(row["score"] for row in pair)
        right = tuple(
            None if threshold is None else (score >= threshold) == bool(label)
            for score, threshold in zip(scores, thresholds, strict=True)
        )
        ious = tuple(row["iou"] for row in pair)
        kind = pair[0]["defect_type"]
        images.append(Image(name, kind, label, scores, tuple(map(float, of_runs)), ious, right))
    return images


def gain_by_score(image: Image) -> float:
    """Returns how much better the other run ranks an image, from -1 to 1."""
    higher = image.ranks[1] - image.ranks[0]
    return higher if image.label else -higher


def gain_by_map(image: Image) -> float:
    """Returns how much better the other run's map is, from -1 to 1; 0 without both IoUs."""
    return 0.0 if None in image.ious else image.ious[1] - image.ious[0]


def farthest(images: Sequence[Image], gain: Any, count: int) -> list[Image]:
    """Returns the images with the largest |gain|, largest first; without images of gain 0."""
    ranked = sorted(images, key=lambda image: (-abs(gain(image)), image.name))
    return [image for image in ranked[:count] if gain(image)]


def draw(
    image: Image, baseline: RunCategory, other: RunCategory, names: tuple[str, str]
) -> list[panels.Panel]:
    """Draws image and truth, then each run's map and its region at the run's best threshold."""
    row_of_panels = []
    for run, name in ((baseline, names[0]), (other, names[1])):
        if run.arrays is None:
            continue
        row = run.rows[image.name]
        index = row["index"]
        best, scale = run.results.get("iou_threshold"), run.results.get("map_scale")
        drawn = panels.draw_panels(
            run.arrays["image"][index],
            run.arrays["mask"][index] if row["has_mask"] else None,
            run.arrays["map"][index],
            panels.level_of(0.5 if best is None else float(to_display_scale(best, scale))),
            panels.SMALL,
        )
        row_of_panels += drawn[:2] if not row_of_panels else []
        row_of_panels += [panel._replace(caption=f"{name}: {panel.caption}") for panel in drawn[2:]]
    return row_of_panels


def plot_pairs(
    axes: Axes,
    pairs: Mapping[int, Sequence[tuple[float, float]]],
    names: tuple[str, str],
    thresholds: tuple[float | None, float | None],
) -> None:
    """Plots values of the two runs against each other: {label: (baseline, other)}."""
    for label, name, colour in ((0, "good", plots.BLUE), (1, "defective", plots.ORANGE)):
        if points := pairs.get(label):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, ".", color=colour, alpha=0.6, label=f"{name}: {len(points)}")
    for line, threshold in ((axes.axvline, thresholds[0]), (axes.axhline, thresholds[1])):
        if threshold is not None:
            line(threshold, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel=plots.shorten(names[0], 40), ylabel=plots.shorten(names[1], 40))
    axes.legend(loc="best")


def plot_ious(axes: Axes, pairs: Sequence[tuple[float, float]], names: tuple[str, str]) -> None:
    """Plots the IoU of each defective image: above the line the other run is better."""
    axes.axline((0, 0), slope=1, color=plots.GREY, linewidth=1)
    plot_pairs(axes, {1: pairs}, names, (None, None))
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def draw_plots(
    images: Sequence[Image], baseline: RunCategory, other: RunCategory, names: tuple[str, str]
) -> list[dict[str, Any]]:
    """Returns the plots of a category: title, svg or None, and why None."""
    scores = {label: [i.scores for i in images if i.label == label] for label in (0, 1)}
    ious = [image.ious for image in images if image.label and None not in image.ious]
    thresholds = tuple(run.results.get("image_f1_max_threshold") for run in (baseline, other))
    named_plots = [
        ("Scores of each image", images, lambda axes: plot_pairs(axes, scores, names, thresholds)),
        ("IoU of each defective image", ious, lambda axes: plot_ious(axes, ious, names)),
    ]
    return [
        {
            "title": title,
            "svg": plots.draw_plot(plot) if has_data else None,
            "missing": "no image has it in both runs",
        }
        for title, has_data, plot in named_plots
    ]


def count_right(images: Sequence[Image]) -> dict[str, int] | None:
    """Counts images where both, one or none of the runs is right; None without verdicts."""
    if not images or None in images[0].right:
        return None
    counts = Counter(image.right for image in images)
    keys = {"both": (True, True), "baseline": (True, False), "other": (False, True)}
    return {name: counts[key] for name, key in (keys | {"none": (False, False)}).items()}


def category_section(
    category: str, folders: tuple[Path, Path], names: tuple[str, str], count: int
) -> dict[str, Any]:
    """Returns what the page shows of a category: plots, counts and cards."""
    baseline, other = (read_category(folder, category) for folder in folders)
    images = match(baseline, other)
    alone = [len(run.rows) - len(images) for run in (baseline, other)]
    scores = np.array([image.scores for image in images]).reshape(-1, 2)
    varied = len(images) > 1 and np.all(np.ptp(scores, axis=0) > 0)
    cards = {}
    for kind, gain in (("score", gain_by_score), ("map", gain_by_map)):
        cards[kind] = [
            {"image": image, "gain": gain(image), "panels": draw(image, baseline, other, names)}
            for image in farthest(images, gain, count)
        ]
    return {
        "name": category,
        "images": len(images),
        "alone": alone,
        "missing": {run: s.missing for run, s in zip(names, (baseline, other), strict=True)},
        "plots": draw_plots(images, baseline, other, names),
        "rank_correlation": float(stats.spearmanr(*scores.T)[0]) if varied else None,
        "right": count_right(images),
        "cards": cards,
    }


def difference_rows(
    comparison: Mapping[str, Any], baseline: str, name: str, notes: pages.Notes
) -> list[dict[str, Any]]:
    """Returns the table of one run against the baseline: a row per category, then the mean."""
    rows = comparison["categories"]
    if len(rows) > 1:
        rows = rows | {"Mean": comparison["mean"]}
    table = []
    for label, row in rows.items():
        cells = []
        for metric in comparison["metrics"]:
            values = [row["values"][run][metric] for run in (baseline, name)]
            difference = row["differences"][name][metric]
            reasons = [entry["reason"] for entry in (*values, difference) if entry["reason"]]
            note = notes.number(f"{label}: {reasons[0]}") if reasons else None
            cells.append({"values": values, "note": note, **difference})
        table.append({"name": label, "cells": cells})
    return table


def page(comparison: Mapping[str, Any]) -> str:
    """Returns the page of what compare.compare returns; it reads the runs' files again."""
    runs, baseline = comparison["runs"], comparison["baseline"]
    others = [name for name in runs if name != baseline]
    count = MAX_SHOWN // (2 * len(others) * len(comparison["categories"]))

    def folder_of(name: str) -> Path:
        seeds = runs[name]["seeds"]
        return Path(runs[name]["workdir"]) / (f"seed_{seeds[0]}" if seeds else "")

    notes = pages.Notes()
    pairs = [
        {
            "names": (baseline, name),
            "rows": difference_rows(comparison, baseline, name, notes),
            "seeds": {run: runs[run]["seeds"][0] for run in (baseline, name) if runs[run]["seeds"]},
            "categories": [
                category_section(
                    category,
                    (folder_of(baseline), folder_of(name)),
                    (baseline, name),
                    max(1, min(SHOWN, count)),
                )
                for category in comparison["categories"]
            ],
        }
        for name in others
    ]
    return pages.render(
        "compare_page.html.jinja",
        comparison=comparison,
        pairs=pairs,
        notes=notes,
        interval_notes=[line.removeprefix("- ") for line in compare.interval_notes(comparison)],
    )


def write(comparison: Mapping[str, Any], folder: str | Path) -> None:
    """Writes `folder`/comparison.html, whole or not at all."""
    write_text(Path(folder) / "comparison.html", page(comparison))
