"""The HTML page of a comparison: differences, and what two runs say of the same images.

From the files of finished runs alone. Each run is set beside the baseline, the first, image by
image: scores against scores, and the images in which the two are farthest apart.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils.epath import Path
from matplotlib.axes import Axes
from scipy import stats

from anoseg_jax.evaluation.evaluate import as_shown, read_results
from anoseg_jax.report import compare, pages
from anoseg_jax.running.files import write_text

SHOWN = 6  # images of a category and kind of disagreement
MAX_SHOWN = 240  # of a page: about 12 MB


class Seen(NamedTuple):
    """A category as one run saw it.

    Its results; the rows of images.csv by name, with their `index` in the arrays; the arrays of
    evaluation.npz, None with the reason in `missing`.
    """

    results: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    arrays: dict[str, np.ndarray] | None
    missing: str


class Image(NamedTuple):
    """A test image in two runs: everything of the first run comes first.

    Attributes:
      name: its path inside the category.
      defect_type: "good" for good parts.
      label: 1 where it is defective.
      scores: image-level scores, each on the scale of its run.
      places: of the scores among those of all images that both have, from 0, lowest, to 1.
      ious: at each run's best threshold; None where there is none.
      right: whether the scores are on the right side of each run's best threshold; None without.
    """

    name: str
    defect_type: str
    label: int
    scores: tuple[float, float]
    places: tuple[float, float]
    ious: tuple[float | None, float | None]
    right: tuple[bool | None, bool | None]


def read_category(folder: Path, category: str) -> Seen:
    """Reads what a run's workdir (that of one seed) has of a category."""
    results = read_results(folder)["categories"][category]
    rows, no_rows = pages.read_optional(folder / category / "images.csv", pages.parse_images)
    arrays, missing = pages.read_optional(folder / category / "evaluation.npz", pages.parse_arrays)
    if arrays is not None and len(arrays["map"]) != len(rows or []):
        arrays, missing = None, "evaluation.npz and images.csv are of different evaluations."
    by_name = {row["name"]: row | {"index": index} for index, row in enumerate(rows or [])}
    return Seen(results, by_name, arrays, no_rows or missing)


def places_of(scores: Sequence[float]) -> np.ndarray:
    """Returns where each score is among all of them, from 0, lowest, to 1; ties share a place."""
    return (stats.rankdata(scores) - 1) / max(len(scores) - 1, 1)


def match(first: Seen, other: Seen) -> list[Image]:
    """Returns the images that both runs have, in the order of the first."""
    both = [name for name in first.rows if name in other.rows]
    rows = [(first.rows[name], other.rows[name]) for name in both]
    places = [places_of([pair[run]["score"] for pair in rows]) for run in (0, 1)]
    at = [seen.results.get("image_f1_max_threshold") for seen in (first, other)]
    images = []
    for name, pair, *of_both in zip(both, rows, *places, strict=True):
        label = pair[0]["label"]
        scores = tuple(row["score"] for row in pair)
        right = tuple(
            None if threshold is None else (score >= threshold) == bool(label)
            for score, threshold in zip(scores, at, strict=True)
        )
        ious = tuple(row["iou"] for row in pair)
        kind = pair[0]["defect_type"]
        images.append(Image(name, kind, label, scores, tuple(map(float, of_both)), ious, right))
    return images


def gain_by_score(image: Image) -> float:
    """Returns how much better the other run places an image, from -1 to 1."""
    higher = image.places[1] - image.places[0]
    return higher if image.label else -higher


def gain_by_map(image: Image) -> float:
    """Returns how much better the other run's map is, from -1 to 1; 0 without both IoUs."""
    return 0.0 if None in image.ious else image.ious[1] - image.ious[0]


def farthest(images: Sequence[Image], gain: Any, count: int) -> list[Image]:
    """Returns the images by |gain|, the largest first, without those that have none."""
    ranked = sorted(images, key=lambda image: (-abs(gain(image)), image.name))
    return [image for image in ranked[:count] if gain(image)]


def draw(image: Image, first: Seen, other: Seen, names: tuple[str, str]) -> list[pages.Panel]:
    """Draws image and truth, then for each run its map and what is found at its best threshold."""
    panels = []
    for seen, run in ((first, names[0]), (other, names[1])):
        if seen.arrays is None:
            continue
        row = seen.rows[image.name]
        index = row["index"]
        best, scale = seen.results.get("iou_threshold"), seen.results.get("map_scale")
        drawn = pages.draw_panels(
            seen.arrays["image"][index],
            seen.arrays["mask"][index] if row["has_mask"] else None,
            seen.arrays["map"][index],
            pages.level_of(0.5 if best is None else float(as_shown(best, scale))),
            pages.SMALL,
        )
        panels += drawn[:2] if not panels else []
        panels += [panel._replace(caption=f"{run}: {panel.caption}") for panel in drawn[2:]]
    return panels


def plot_pairs(
    axes: Axes,
    pairs: Mapping[int, Sequence[tuple[float, float]]],
    names: tuple[str, str],
    thresholds: tuple[float | None, float | None],
) -> None:
    """Plots the first run's values against the other's: {label: (first, other)}."""
    for label, name, colour in ((0, "good", pages.BLUE), (1, "defective", pages.ORANGE)):
        if points := pairs.get(label):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, ".", color=colour, alpha=0.6, label=f"{name}: {len(points)}")
    for line, threshold in ((axes.axvline, thresholds[0]), (axes.axhline, thresholds[1])):
        if threshold is not None:
            line(threshold, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel=pages._short(names[0], 40), ylabel=pages._short(names[1], 40))
    axes.legend(loc="best")


def plot_ious(axes: Axes, pairs: Sequence[tuple[float, float]], names: tuple[str, str]) -> None:
    """Plots the IoU of each defective image: above the line the other run is better."""
    axes.axline((0, 0), slope=1, color=pages.GREY, linewidth=1)
    plot_pairs(axes, {1: pairs}, names, (None, None))
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def draw_plots(
    images: Sequence[Image], first: Seen, other: Seen, names: tuple[str, str]
) -> list[dict[str, Any]]:
    """Returns the plots of a category: title, svg or None, and why None."""
    scores = {label: [i.scores for i in images if i.label == label] for label in (0, 1)}
    ious = [image.ious for image in images if image.label and None not in image.ious]
    at = tuple(seen.results.get("image_f1_max_threshold") for seen in (first, other))
    plots = [
        ("Scores of each image", images, lambda axes: plot_pairs(axes, scores, names, at)),
        ("IoU of each defective image", ious, lambda axes: plot_ious(axes, ious, names)),
    ]
    return [
        {
            "title": title,
            "svg": pages.draw_plot(plot) if there else None,
            "missing": "no image has it in both runs",
        }
        for title, there, plot in plots
    ]


def count_right(images: Sequence[Image]) -> dict[str, int] | None:
    """Returns on how many images both runs, one alone or none is right; None without verdicts."""
    if not images or None in images[0].right:
        return None
    counts = Counter(image.right for image in images)
    keys = {"both": (True, True), "first": (True, False), "other": (False, True)}
    return {name: counts[key] for name, key in (keys | {"none": (False, False)}).items()}


def category_section(
    category: str, folders: tuple[Path, Path], names: tuple[str, str], count: int
) -> dict[str, Any]:
    """Returns what the page shows of a category: plots, counts and cards."""
    first, other = (read_category(folder, category) for folder in folders)
    images = match(first, other)
    alone = [len(seen.rows) - len(images) for seen in (first, other)]
    scores = np.array([image.scores for image in images]).reshape(-1, 2)
    varied = len(images) > 1 and np.all(np.ptp(scores, axis=0) > 0)
    cards = {}
    for kind, gain in (("score", gain_by_score), ("map", gain_by_map)):
        cards[kind] = [
            {"image": image, "gain": gain(image), "panels": draw(image, first, other, names)}
            for image in farthest(images, gain, count)
        ]
    return {
        "name": category,
        "images": len(images),
        "alone": alone,
        "missing": {run: s.missing for run, s in zip(names, (first, other), strict=True)},
        "plots": draw_plots(images, first, other, names),
        "rank_correlation": float(stats.spearmanr(*scores.T)[0]) if varied else None,
        "right": count_right(images),
        "cards": cards,
    }


def difference_rows(
    comparison: Mapping[str, Any], first: str, name: str, notes: pages.Notes
) -> list[dict[str, Any]]:
    """Returns the table of one run against the baseline: a row a category, then the mean."""
    rows = comparison["categories"]
    if len(rows) > 1:
        rows = rows | {"Mean": comparison["mean"]}
    made = []
    for label, row in rows.items():
        cells = []
        for metric in comparison["metrics"]:
            values = [row["values"][run][metric] for run in (first, name)]
            difference = row["differences"][name][metric]
            reasons = [found["reason"] for found in (*values, difference) if found["reason"]]
            note = notes.number(f"{label}: {reasons[0]}") if reasons else None
            cells.append({"values": values, "note": note, **difference})
        made.append({"name": label, "cells": cells})
    return made


def page(comparison: Mapping[str, Any]) -> str:
    """Returns the page of what compare.compare returns; reads the runs' files again."""
    runs, first = comparison["runs"], comparison["baseline"]
    others = [name for name in runs if name != first]
    count = MAX_SHOWN // (2 * len(others) * len(comparison["categories"]))

    def folder_of(name: str) -> Path:
        seeds = runs[name]["seeds"]
        return Path(runs[name]["workdir"]) / (f"seed_{seeds[0]}" if seeds else "")

    notes = pages.Notes()
    pairs = [
        {
            "names": (first, name),
            "rows": difference_rows(comparison, first, name, notes),
            "seeds": {run: runs[run]["seeds"][0] for run in (first, name) if runs[run]["seeds"]},
            "categories": [
                category_section(
                    category,
                    (folder_of(first), folder_of(name)),
                    (first, name),
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
        about_intervals=[line.removeprefix("- ") for line in compare._interval_notes(comparison)],
    )


def write(comparison: Mapping[str, Any], folder: str | Path) -> None:
    """Writes `folder`/comparison.html, whole or not at all."""
    write_text(Path(folder) / "comparison.html", page(comparison))
