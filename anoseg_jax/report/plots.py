"""Plots of a page as SVG: curves of a category, its scores, and its training."""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from anoseg_jax.evaluation.metrics import GOOD
from anoseg_jax.report.verdicts import Card, shown_threshold

# From the palette of Okabe and Ito, for readers with colour blindness.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a9199"
LOSS_COLOURS = {
    "loss_segmentation": BLUE,
    "loss_reconstruction": GREEN,
    "loss_adversarial": ORANGE,
    "loss_discriminator": PURPLE,
    "loss_penalty": GREY,
}
PLOT_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and readable by machines
    "svg.hashsalt": "anoseg_jax",  # equal plots, equal bytes
    "text.parse_math": False,  # a defect type may be called "$"
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ebee",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}


def draw_plot(plot: Callable[[Axes], None]) -> str:
    """Returns what `plot` draws as an SVG without a width: the page sets it."""
    with matplotlib.style.context(["default", PLOT_STYLE]), warnings.catch_warnings():
        # The font lacks some letters that names may have; the browser that draws them does not.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(4.5, 3.3), layout="constrained")
        plot(figure.subplots())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # the same ids in every plot
    return re.sub(r' (?:width|height)="[^"]*pt"', "", svg, count=2)


def titled(
    title: str, has_data: Any, plot: Callable[[Axes], None], reason: str = ""
) -> dict[str, Any]:
    """Returns a plot of a page: title, svg, and `missing`, the reason why svg is None."""
    return {"title": title, "svg": draw_plot(plot) if has_data else None, "missing": reason}


def mark_threshold(line: Callable[..., Any], threshold: float | None, **options: Any) -> None:
    """Draws a threshold with `axes.axvline` or `axes.axhline`; None is not drawn."""
    if threshold is not None:
        line(threshold, color="black", linestyle="--", linewidth=1, **options)


def plot_rates(
    axes: Axes, curves: Mapping[str, tuple[Any, Any, str]], x_name: str, y_name: str
) -> None:
    """Plots curves in the unit square: {"pixels" or "images": (x, y, label)}."""
    for name, (x, y, label) in curves.items():
        axes.plot(x, y, color={"pixels": BLUE, "images": ORANGE}[name], label=label)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), xlabel=x_name, ylabel=y_name)
    axes.legend(loc="best")


def plot_pro(axes: Axes, curve: Mapping[str, list[float]], area: float) -> None:
    """Plots the PRO curve, and fills the area that AU-PRO measures."""
    x, y = np.array(curve["false_positive_rate"]), np.array(curve["overlap"])
    axes.plot(x, y, color=BLUE, label=f"AU-PRO {area:.4f}")
    inside = np.append(x[x < 0.3], 0.3)
    axes.fill_between(inside, np.interp(inside, x, y), color=BLUE, alpha=0.12, linewidth=0)
    axes.axvline(0.3, color=GREY, linestyle=":", linewidth=1)
    axes.set(xlim=(-0.005, 0.35), ylim=(-0.01, 1.02))
    axes.set(xlabel="false-positive rate of pixels", ylabel="share found of a region, mean")
    axes.legend(loc="best")


def plot_iou(axes: Axes, curve: Mapping[str, list[float]], threshold: float | None) -> None:
    """Plots the IoU against the threshold, and the threshold of this page."""
    axes.plot(curve["threshold"], curve["iou"], color=BLUE, label="IoU")
    mark_threshold(axes.axvline, threshold, label="threshold")
    axes.set(xlabel="threshold of the anomaly map", ylabel="IoU of all pixels")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")


def plot_histogram(axes: Axes, cards: Sequence[Card], threshold: float | None) -> None:
    """Plots how scores of good and of defective images are distributed."""
    scores = {
        label: [c.score for c in cards if c.label == label and np.isfinite(c.score)]
        for label in (0, 1)
    }
    edges = np.histogram_bin_edges(scores[0] + scores[1], bins=30)
    for label, name, colour in ((0, "good", BLUE), (1, "defective", ORANGE)):
        if values := scores[label]:
            axes.hist(
                values,
                bins=edges,
                weights=np.full(len(values), 100 / len(values)),
                color=colour,
                alpha=0.55,
                label=f"{name}: {len(values)}",
            )
    mark_threshold(axes.axvline, threshold, label="threshold")
    axes.set(xlabel="score of the image", ylabel="% of the images of its kind")
    axes.legend(loc="best")


def plot_types(axes: Axes, cards: Sequence[Card], threshold: float | None) -> None:
    """Plots the score of each image, a row a defect type."""
    types = types_of(cards)
    for row, defect_type in enumerate(types):
        scores = sorted(c.score for c in cards if c.defect_type == defect_type)
        # Jitter, so that points do not hide each other. It is the same in every page.
        heights = row + 0.3 * np.sin(2.4 * np.arange(len(scores)))
        colour = BLUE if defect_type == GOOD else ORANGE
        axes.plot(scores, heights, ".", color=colour, alpha=0.6, markersize=4)
    mark_threshold(axes.axvline, threshold)
    axes.set_yticks(range(len(types)), [shorten(name) for name in types])
    axes.set(xlabel="score of the image", ylim=(len(types) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)


def plot_log(
    axes: Axes, log: Sequence[Mapping[str, Any]], curves: Mapping[str, tuple[str | None, str]]
) -> None:
    """Plots values of the log against the step: {name of the value: (label, colour)}."""
    for name, (label, colour) in curves.items():
        points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
        if points:
            marker = "o" if len(points) < 3 else None  # a single point has no line
            axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def plot_losses(axes: Axes, log: Sequence[Mapping[str, Any]]) -> None:
    """Plots every loss of the log; the page has the legend, with explanations."""
    plot_log(axes, log, {name: (None, colour) for name, colour in LOSS_COLOURS.items()})
    values = [line[name] for line in log for name in LOSS_COLOURS if line.get(name) is not None]
    if values and min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="step", ylabel="loss")


def plot_learning_rate(axes: Axes, log: Sequence[Mapping[str, Any]]) -> None:
    """Plots the learning rate of the generator."""
    plot_log(axes, log, {"learning_rate": (None, BLUE)})
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    axes.set(xlabel="step", ylabel="learning rate")
    axes.set_ylim(bottom=0)


def types_of(cards: Sequence[Card]) -> list[str]:
    """Returns the defect types, good first."""
    return sorted({card.defect_type for card in cards}, key=lambda name: (name != GOOD, name))


def draw_curves(
    results: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, list[float]]],
    cards: Sequence[Card],
) -> list[dict[str, Any]]:
    """Returns the plots of a category: title, svg or None, and the reason for None (missing)."""
    missing = results["not_available"]
    roc, pr = {}, {}
    for kind, prefix in (("pixels", ""), ("images", "image_")):
        if f"{prefix}roc" in curves:
            metric = prefix or "pixel_"
            auroc, ap = results[f"{metric}auroc"], results[f"{metric}ap"]
            roc[kind] = (*curves[f"{prefix}roc"].values(), f"{kind}: AUROC {auroc:.4f}")
            pr[kind] = (*curves[f"{prefix}pr"].values(), f"{kind}: AP {ap:.4f}")
    region, image = (shown_threshold(results, kind) for kind in ("region", "image"))
    no_pixels = missing.get("pixel_auroc", "curves.json is not there")
    no_images = "no score is finite" if cards else "there are no scores"
    rates = ("false-positive rate", "true-positive rate")
    finite = any(np.isfinite(card.score) for card in cards)
    pro, iou = curves.get("pro"), curves.get("iou")
    plots = {
        "ROC": (roc, lambda axes: plot_rates(axes, roc, *rates)),
        "Precision and recall": (pr, lambda axes: plot_rates(axes, pr, "recall", "precision")),
        "PRO: share found of each defect region": (
            pro,
            lambda axes: plot_pro(axes, pro, results["au_pro"]),
        ),
        "IoU at every threshold": (iou, lambda axes: plot_iou(axes, iou, region)),
    }
    of_images = {
        "Scores of good and defective images": lambda axes: plot_histogram(axes, cards, image),
        "Scores by defect type": lambda axes: plot_types(axes, cards, image),
    }
    return [titled(name, *plot, no_pixels) for name, plot in plots.items()] + [
        titled(name, finite, plot, no_images) for name, plot in of_images.items()
    ]


def draw_training(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the plots of a training log: title, svg, and of losses a legend {name: colour}."""
    logged = {name for line in log for name, value in line.items() if value is not None}
    legend = {name: colour for name, colour in LOSS_COLOURS.items() if name in logged}
    return [
        titled("Losses", log, lambda axes: plot_losses(axes, log)) | {"legend": legend},
        titled("Learning rate", log, lambda axes: plot_learning_rate(axes, log)),
    ]


def shorten(name: str, length: int = 24) -> str:
    """Returns a name of at most `length` letters; a longer one ends in an ellipsis."""
    return name if len(name) <= length else name[: length - 1] + "…"
