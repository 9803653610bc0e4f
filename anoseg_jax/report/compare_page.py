"""The HTML page of a comparison: differences of metrics, and scores of two runs image by image.

It reads only files of finished runs. Each run is compared with the baseline: a plot of the scores
of every image, and the images in which the two runs differ most.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils.epath import Path
from matplotlib.axes import Axes
from scipy import stats

from anoseg_jax.evaluation.results import read_images, read_results, seed_folder
from anoseg_jax.report import compare, pages, panels, plots
from anoseg_jax.report.verdicts import Card, make_cards
from anoseg_jax.running.files import write_text

SHOWN = 6  # images per category and kind of disagreement
MAX_SHOWN = 240  # images per page: about 12 MB


class RunCategory(NamedTuple):
    """The files of a run in one category, and the reason why one is `missing`.

    `cards` has all images by name; their verdicts are at the run's best threshold.
    """

    results: dict[str, Any]
    cards: dict[str, Card]
    arrays: dict[str, np.ndarray] | None
    missing: str


class Pair(NamedTuple):
    """A test image in two runs, in the order (baseline, other run).

    The ranks of its scores are among all images that both runs have, from 0 (lowest) to 1.
    """

    cards: tuple[Card, Card]
    ranks: tuple[float, float]

    @property
    def ious(self) -> tuple[float | None, float | None]:
        """The IoU at each run's best threshold."""
        return self.cards[0].iou, self.cards[1].iou

    @property
    def right(self) -> tuple[bool | None, ...]:
        """Whether the verdict of each run is right; None without a verdict."""
        is_right = {"found": True, "passed": True, "missed": False, "false_alarm": False}
        return tuple(is_right.get(card.verdict) for card in self.cards)


def read_category(workdir: Path, category: str) -> RunCategory:
    """Reads the files of a category in the workdir of a run or of one of its seeds."""
    results = read_results(workdir)["categories"][category]
    rows, arrays, missing = read_images(workdir / category)
    cards = make_cards(rows or [], results["image_f1_max_threshold"])
    cards.sort(key=lambda card: card.index)
    return RunCategory(results, {card.name: card for card in cards}, arrays, missing)


def ranks_of(scores: Sequence[float]) -> np.ndarray:
    """Returns the rank of each score, from 0 (lowest) to 1; ties share their mean rank."""
    return (stats.rankdata(scores) - 1) / max(len(scores) - 1, 1)


def match(baseline: RunCategory, other: RunCategory) -> list[Pair]:
    """Returns the images that both runs have, in the order of the baseline."""
    both = [(card, other.cards[n]) for n, card in baseline.cards.items() if n in other.cards]
    ranks = [ranks_of([cards[run].score for cards in both]).tolist() for run in (0, 1)]
    return [Pair(cards, tuple(of_runs)) for cards, *of_runs in zip(both, *ranks, strict=True)]


def gain_by_score(pair: Pair) -> float:
    """Returns how much better the other run ranks an image, from -1 to 1."""
    higher = pair.ranks[1] - pair.ranks[0]
    return higher if pair.cards[0].label else -higher


def gain_by_map(pair: Pair) -> float:
    """Returns how much better the other run's map is, from -1 to 1; 0 without both IoUs."""
    return 0.0 if None in pair.ious else pair.ious[1] - pair.ious[0]


def farthest(pairs: Sequence[Pair], gain: Callable[[Pair], float], count: int) -> list[Pair]:
    """Returns the images with the largest |gain|, largest first; without images of gain 0."""
    ranked = sorted(pairs, key=lambda pair: (-abs(gain(pair)), pair.cards[0].name))
    return [pair for pair in ranked[:count] if gain(pair)]


def draw(pair: Pair, runs: Mapping[str, RunCategory]) -> list[dict[str, Any]]:
    """Draws image and truth, then each run's map and its region at the run's best threshold."""
    drawn: dict[str, Any] = {}
    for (name, run), card in zip(runs.items(), pair.cards, strict=True):
        if run.arrays is None:
            continue
        image, truth, *of_run = panels.draw_panels(run.arrays, card, panels.SMALL).items()
        drawn = drawn or dict([image, truth])
        drawn |= {f"{name}: {caption}": picture for caption, picture in of_run}
    return panels.as_panels(drawn)


def plot_pairs(
    axes: Axes,
    values: Mapping[int, Sequence[tuple[float, float]]],
    names: Sequence[str],
    thresholds: Sequence[float | None] = (None, None),
) -> None:
    """Plots values of the two runs against each other: {label: (baseline, other)}."""
    for label, name, colour in ((0, "good", plots.BLUE), (1, "defective", plots.ORANGE)):
        if points := values.get(label):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, ".", color=colour, alpha=0.6, label=f"{name}: {len(points)}")
    plots.mark_threshold(axes.axvline, thresholds[0])
    plots.mark_threshold(axes.axhline, thresholds[1])
    axes.set(xlabel=plots.shorten(names[0], 40), ylabel=plots.shorten(names[1], 40))
    axes.legend(loc="best")


def plot_ious(axes: Axes, ious: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Plots the IoU of each defective image: above the line the other run is better."""
    axes.axline((0, 0), slope=1, color=plots.GREY, linewidth=1)
    plot_pairs(axes, {1: ious}, names)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def draw_plots(pairs: Sequence[Pair], runs: Mapping[str, RunCategory]) -> list[dict[str, Any]]:
    """Returns the plots of a category: title, svg or None, and why None."""
    names, scores = list(runs), {0: [], 1: []}
    for baseline, other in (pair.cards for pair in pairs):
        scores[baseline.label].append((baseline.score, other.score))
    ious = [pair.ious for pair in pairs if pair.cards[0].label and None not in pair.ious]
    thresholds = [run.results["image_f1_max_threshold"] for run in runs.values()]
    named = {
        "Scores of each image": (pairs, lambda axes: plot_pairs(axes, scores, names, thresholds)),
        "IoU of each defective image": (ious, lambda axes: plot_ious(axes, ious, names)),
    }
    missing = "no image has it in both runs"
    return [plots.titled(title, *plot, missing) for title, plot in named.items()]


def count_right(pairs: Sequence[Pair]) -> dict[str, int] | None:
    """Counts images where both, one or none of the runs is right; None without verdicts."""
    counts = Counter(pair.right for pair in pairs)
    if not pairs or any(None in right for right in counts):
        return None
    keys = {"both": (True, True), "baseline": (True, False), "other": (False, True)}
    return {name: counts[key] for name, key in (keys | {"none": (False, False)}).items()}


def category_section(category: str, folders: Mapping[str, Path], count: int) -> dict[str, Any]:
    """Returns what the page shows of a category: plots, counts and cards.

    `folders` has the workdirs of the baseline and of the other run by name.
    """
    runs = {name: read_category(folder, category) for name, folder in folders.items()}
    pairs = match(*runs.values())
    scores = np.array([[card.score for card in pair.cards] for pair in pairs]).reshape(-1, 2)
    varied = len(pairs) > 1 and np.all(np.ptp(scores, axis=0) > 0)
    return {
        "name": category,
        "images": len(pairs),
        "alone": [len(run.cards) - len(pairs) for run in runs.values()],
        "missing": {name: run.missing for name, run in runs.items()},
        "plots": draw_plots(pairs, runs),
        "rank_correlation": float(stats.spearmanr(*scores.T)[0]) if varied else None,
        "right": count_right(pairs),
        "cards": {
            kind: [
                {"pair": pair, "gain": gain(pair), "panels": draw(pair, runs)}
                for pair in farthest(pairs, gain, count)
            ]
            for kind, gain in (("score", gain_by_score), ("map", gain_by_map))
        },
    }


def page(comparison: Mapping[str, Any]) -> str:
    """Returns the page of what compare.compare returns; it reads the runs' files again."""
    runs, baseline = comparison["runs"], comparison["baseline"]
    others = [name for name in runs if name != baseline]
    count = MAX_SHOWN // (2 * len(others) * len(comparison["categories"]))
    seeds = {name: run["seeds"][0] for name, run in runs.items() if run["seeds"]}
    folders = {n: seed_folder(run["workdir"], seeds.get(n, "")) for n, run in runs.items()}
    blocks = dict(comparison["categories"])
    if len(blocks) > 1:
        blocks["Mean"] = comparison["mean"]
    pairs = [
        {
            "names": (baseline, name),
            "seeds": {run: seeds[run] for run in (baseline, name) if run in seeds},
            "categories": [
                category_section(
                    category,
                    {run: folders[run] for run in (baseline, name)},
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
        blocks=blocks,
        notes=pages.Notes(),
        interval_notes=compare.interval_notes(comparison),
    )


def write(comparison: Mapping[str, Any], folder: str | Path) -> None:
    """Writes `folder`/comparison.html, whole or not at all."""
    write_text(Path(folder) / "comparison.html", page(comparison))
