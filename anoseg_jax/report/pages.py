"""HTML pages of a finished run, from its files alone: no model, no data, no network to view them.

`W/report.html` has all categories, `W/<category>/report.html` one with its curves and every test
image. Equal files make equal pages, byte for byte.
"""

import base64
import csv
import functools
import io
import json
import re
import urllib.parse
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jinja2
import matplotlib.style
import numpy as np
from etils.epath import Path
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_curve

from anoseg_jax import UsageError
from anoseg_jax.evaluation.evaluate import METRICS, as_shown, image_iou
from anoseg_jax.evaluation.metrics import GOOD
from anoseg_jax.report.pictures import COLOURS, FOUND, TRUTH, outline
from anoseg_jax.running.files import write_text

# How each number is called, and what it says to someone who has not met it.
NAMES = {
    "image_auroc": ("Image AUROC", "how often a defective image scores above a good one"),
    "pixel_auroc": ("Pixel AUROC", "how often a defect pixel scores above a defect-free one"),
    "pixel_ap": ("Pixel AP", "precision of pixels, averaged over recall; small defects are hard"),
    "iou": ("IoU", "overlap of found and true pixels, at the best threshold of the test set"),
    "pixel_f1_max": ("Pixel F1-max", "the same overlap as F1: 2 IoU / (1 + IoU)"),
    "au_pro": ("AU-PRO", "share found of each defect region, over false-positive rates up to 0.3"),
    "image_ap": ("Image AP", "precision of images, averaged over recall"),
    "image_f1_max": ("Image F1-max", "of images, at the best threshold of the test set"),
    "au_pro_0.05": ("AU-PRO 0.05", "as AU-PRO, over false-positive rates up to 0.05"),
}
# The worst first; the last is for images of which nothing can be said.
VERDICTS = {
    "missed": ("Missed", "false negative"),
    "false_alarm": ("False alarm", "false positive"),
    "found": ("Found", "true positive"),
    "passed": ("Passed", "true negative"),
    "none": ("No verdict", "no image threshold"),
}
LOSSES = {
    "loss_segmentation": "segmentation",
    "loss_reconstruction": "reconstruction",
    "loss_adversarial": "adversarial",
    "loss_discriminator": "discriminator",
}
# Okabe and Ito's colours, told apart by the colour-blind.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a9199"
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
MAX_CARDS = 600  # images in a gallery; of more, the worst
MAX_GALLERY_BYTES = 12_000_000
PANEL_PIXELS = 30e6  # of all panels of a gallery together: about 6 MB of JPEG
SMALL = 192  # pixels: the height that smaller images are enlarged to


class ReportError(UsageError):
    """A report cannot be made of these files; the message is one line that names the file."""


@dataclass(frozen=True)
class Threshold:
    """What counts as defective.

    Attributes:
      value: of scores or of maps at or above it; None if there is none.
      how: a sentence: what it was made from.
      details: what else is recorded of it, by name.
    """

    value: float | None
    how: str
    details: dict[str, Any] = field(default_factory=dict)


class Card(NamedTuple):
    """One image of the gallery: its row of images.csv, and what is made of it."""

    index: int
    name: str
    defect_type: str
    label: int
    score: float
    has_mask: bool
    iou: float | None
    verdict: str


class Panel(NamedTuple):
    """A picture of a card."""

    caption: str
    uri: str
    width: int
    height: int


def read_results(workdir: Path) -> dict[str, Any]:
    """Reads `workdir`/results.json; ReportError if it is not one."""
    path = workdir / "results.json"
    try:
        results = json.loads(path.read_text())
    except FileNotFoundError:
        raise ReportError(
            f"{path}: there is no such file; --mode=train or evaluate writes it"
        ) from None
    except ValueError as error:
        raise ReportError(f"{path} cannot be read: {error}") from None
    if not isinstance(results, dict) or not isinstance(results.get("categories"), dict):
        raise ReportError(f"{path} has no categories: it is not the result file of a run")
    return results


def read_optional(path: Path, parse: Callable[[Path], Any]) -> tuple[Any, str]:
    """Returns what is in a file and "", or None and a sentence that says why not."""
    try:
        return parse(path), ""
    except FileNotFoundError:
        return None, f"{path.name} is not there."
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        return None, f"{path.name} cannot be read ({type(error).__name__}: {error})."


def parse_json(path: Path) -> Any:
    """Returns the content of a JSON file."""
    return json.loads(path.read_text())


def parse_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of train_log.jsonl but for a last one that a kill cut short."""
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def parse_images(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of images.csv with their types; see evaluate.write_evaluation."""
    return [
        {
            "name": row["name"],
            "defect_type": row["defect_type"],
            "label": int(row["label"]),
            "score": float(row["score"]),
            "has_mask": row["has_mask"] == "True",
            "iou": float(row["iou"]) if row["iou"] else None,
        }
        for row in csv.DictReader(io.StringIO(path.read_text()))
    ]


def parse_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns `image`, `mask` and `map` of evaluation.npz."""
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        return {name: arrays[name] for name in ("image", "mask", "map")}


def choose_thresholds(results: Mapping[str, Any]) -> dict[str, Threshold]:
    """Returns the "image" and the "pixel" threshold that a page is made with.

    Those under `thresholds` if they are there, {"pixel": {"threshold": .., "how": .., ..},
    "image": {..}}; else the best ones of the test set.
    """
    missing = results.get("not_available", {})
    best = {
        "image": ("image_f1_max_threshold", "image_f1_max", "the best F1"),
        "pixel": ("iou_threshold", "iou", "the best IoU and the best F1"),
    }
    chosen = {}
    for kind, (key, metric, aim) in best.items():
        held_out = (results.get("thresholds") or {}).get(kind) or {}
        value = held_out.get("threshold", held_out.get("value"))
        if value is not None:
            details = {
                name: number
                for name, number in held_out.items()
                if name not in ("threshold", "value", "how") and _is_scalar(number)
            }
            how = held_out.get("how", "made without the test images.")
            chosen[kind] = Threshold(value, str(how), details)
        elif results.get(key) is not None:
            how = (
                f"the value with {aim} on these test images themselves, so what is counted with it "
                "flatters the model."
            )
            chosen[kind] = Threshold(results[key], how)
        else:
            chosen[kind] = Threshold(None, f"not available: {missing.get(metric, 'not recorded')}.")
    return chosen


def verdict_of(label: int, score: float, threshold: float | None) -> str:
    """Returns a key of VERDICTS."""
    if threshold is None or not np.isfinite(score):
        return "none"
    if score >= threshold:
        return "found" if label else "false_alarm"
    return "missed" if label else "passed"


def error_order(card: Card, threshold: float | None) -> tuple:
    """Returns what cards are sorted by, the worst first; the page says the same in words.

    Wrong verdicts by distance of the score from the threshold, the farthest first; then the others
    by 1 - IoU, those without an IoU last, the score nearest to the threshold first.
    """
    score = card.score if np.isfinite(card.score) else 0.0
    if threshold is None:
        distance = score if card.label else -score
    else:
        distance = abs(score - threshold)
    if card.verdict in ("missed", "false_alarm"):
        return 0, -distance, 0.0, card.name
    return (1, 0.0 if card.iou is None else card.iou - 1, distance, card.name)


def level_of(threshold: float) -> int:
    """Returns the threshold of maps times 255: rounded as they are, above 0 unless it is 0."""
    return max(round(255 * threshold), int(threshold > 0))


def make_cards(
    rows: Sequence[Mapping[str, Any]],
    maps: np.ndarray | None,
    masks: np.ndarray | None,
    thresholds: Mapping[str, Threshold],
    iou_threshold: float | None,
    scale: Mapping[str, Any] | None = None,
) -> list[Card]:
    """Returns the cards of all rows, the worst first.

    `iou_threshold` is what the IoU in `rows` belongs to: at another threshold it is measured anew,
    on the maps times 255 that pictures are made of (no IoU if these are None). `scale`: see
    evaluate.as_shown.
    """
    pixel, image = thresholds["pixel"].value, thresholds["image"].value
    cards = []
    for index, row in enumerate(rows):
        iou = row["iou"]
        if pixel != iou_threshold:
            measurable = pixel is not None and maps is not None and row["has_mask"]
            level = level_of(as_shown(pixel, scale)) if measurable else None
            iou = image_iou(maps[index], masks[index], level) if measurable else None
        verdict = verdict_of(row["label"], row["score"], image)
        cards.append(Card(**{**row, "iou": iou, "index": index, "verdict": verdict}))
    return sorted(cards, key=lambda card: error_order(card, image))


def data_uri(image: Image.Image) -> str:
    """Returns a picture as a JPEG data: URI; coloured outlines stay sharp."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def cover(region: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a region [h, w] to `size` (width, height): a single pixel of it does not get lost."""
    grey = Image.fromarray(region.astype(np.uint8) * 255)
    return np.asarray(grey.resize(size, Image.Resampling.BOX)) > 0


def overlay(photo: Image.Image, region: np.ndarray) -> Image.Image:
    """Tints a region of an image and draws its edge."""
    tint = Image.new("RGB", photo.size, FOUND)
    tinted = Image.composite(
        Image.blend(photo, tint, 0.25), photo, Image.fromarray(region.astype(np.uint8) * 255)
    )
    return outline(tinted, region, FOUND)


def draw_panels(
    image: np.ndarray, mask: np.ndarray | None, image_map: np.ndarray, level: int, height: int
) -> list[Panel]:
    """Draws image, truth, anomaly map and what is found.

    Args:
      image: uint8 [h, w, 3].
      mask: bool [h, w], or None where the truth is not known.
      image_map: uint8 [h, w], the map times 255; every picture has the same colours for the same
        values.
      level: what counts as found, times 255.
      height: of each panel in pixels.
    """
    h, w = image_map.shape
    size = (max(1, round(height * w / h)), height)
    photo = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    heat = Image.fromarray(np.asarray(COLOURS(image_map, bytes=True))[..., :3])
    truth = "truth" if mask is not None and mask.any() else "truth: no defect"
    if mask is None:
        truth = "truth: not known"
    pictures = {
        "image": photo,
        truth: photo if mask is None else outline(photo, cover(mask, size), TRUTH),
        "anomaly map": heat.resize(size, Image.Resampling.BILINEAR),
        "found": overlay(photo, cover(image_map >= level, size)),
    }
    return [Panel(caption, data_uri(picture), *size) for caption, picture in pictures.items()]


def draw_gallery(
    cards: Sequence[Card], arrays: Mapping[str, np.ndarray], threshold: float
) -> list[list[Panel]]:
    """Draws the panels of each card, as large as MAX_GALLERY_BYTES allows."""
    if not cards:
        return []
    h, w = arrays["map"].shape[1:]
    height = round((PANEL_PIXELS / (4 * len(cards)) * h / w) ** 0.5)
    height = max(16, min(height, max(SMALL, h)))
    while True:
        panels = [
            draw_panels(
                arrays["image"][card.index],
                arrays["mask"][card.index] if card.has_mask else None,
                arrays["map"][card.index],
                level_of(threshold),
                height,
            )
            for card in cards
        ]
        total = sum(len(panel.uri) for row in panels for panel in row)
        if total <= MAX_GALLERY_BYTES or height <= 16:
            return panels
        height = max(16, int(0.95 * height * (MAX_GALLERY_BYTES / total) ** 0.5))


def colour_scale() -> str:
    """Returns the colours of maps from 0 to 1, left to right, as a data: URI."""
    row = np.asarray(COLOURS(np.arange(256, dtype=np.uint8), bytes=True))[None, :, :3]
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(row, 8, axis=0)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_plot(plot: Callable[[Axes], None]) -> str:
    """Returns what `plot` draws as an SVG that takes the width it is given."""
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
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # ids that each plot would have again
    return re.sub(r' (?:width|height)="[^"]*pt"', "", svg, count=2)


def plot_rates(
    axes: Axes, curves: Mapping[str, tuple[Any, Any, str]], x_name: str, y_name: str
) -> None:
    """Plots curves in the unit square: {"pixels" or "images": (x, y, label)}."""
    for name, (x, y, label) in curves.items():
        axes.plot(x, y, color={"pixels": BLUE, "images": ORANGE}[name], label=label)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), xlabel=x_name, ylabel=y_name)
    axes.legend(loc="best")


def plot_pro(axes: Axes, curve: Mapping[str, list[float]], area: float | None) -> None:
    """Plots the PRO curve up to the false-positive rate that counts, with the area that counts."""
    x, y = np.array(curve["false_positive_rate"]), np.array(curve["overlap"])
    axes.plot(x, y, color=BLUE, label=_label("AU-PRO", area))
    inside = np.append(x[x < 0.3], 0.3)
    axes.fill_between(inside, np.interp(inside, x, y), color=BLUE, alpha=0.12, linewidth=0)
    axes.axvline(0.3, color=GREY, linestyle=":", linewidth=1)
    axes.set(xlim=(-0.005, 0.35), ylim=(-0.01, 1.02))
    axes.set(xlabel="false-positive rate of pixels", ylabel="share found of a region, mean")
    axes.legend(loc="best")


def plot_iou(axes: Axes, curve: Mapping[str, list[float]], threshold: float | None) -> None:
    """Plots the IoU against the threshold, and the threshold of this page."""
    axes.plot(curve["threshold"], curve["iou"], color=BLUE, label="IoU")
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label="threshold")
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
        if found := scores[label]:
            axes.hist(
                found,
                bins=edges,
                weights=np.full(len(found), 100 / len(found)),
                color=colour,
                alpha=0.55,
                label=f"{name}: {len(found)}",
            )
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label="threshold")
    axes.set(xlabel="score of the image", ylabel="% of the images of its kind")
    axes.legend(loc="best")


def plot_types(axes: Axes, cards: Sequence[Card], threshold: float | None) -> None:
    """Plots the score of each image, a row a defect type."""
    types = types_of(cards)
    for row, defect_type in enumerate(types):
        scores = sorted(c.score for c in cards if c.defect_type == defect_type)
        # Side by side where they would hide one another, in an order that is always the same.
        heights = row + 0.3 * np.sin(2.4 * np.arange(len(scores)))
        colour = BLUE if defect_type == GOOD else ORANGE
        axes.plot(scores, heights, ".", color=colour, alpha=0.6, markersize=4)
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(types)), [_short(name) for name in types])
    axes.set(xlabel="score of the image", ylim=(len(types) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)


def plot_losses(axes: Axes, log: Sequence[Mapping[str, Any]]) -> None:
    """Plots the losses that are in the log."""
    for (name, label), colour in zip(LOSSES.items(), (BLUE, GREEN, ORANGE, PURPLE), strict=True):
        points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=_mark(points))
    values = [line[name] for line in log for name in LOSSES if line.get(name) is not None]
    if values and min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlabel="step", ylabel="loss")
    if values:
        axes.legend(loc="best")


def plot_learning_rate(axes: Axes, log: Sequence[Mapping[str, Any]]) -> None:
    """Plots the learning rate of the generator."""
    points = [(line["step"], line["learning_rate"]) for line in log if "learning_rate" in line]
    if points:
        axes.plot(*zip(*points, strict=True), color=BLUE, marker=_mark(points))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
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
    thresholds: Mapping[str, Threshold],
) -> list[dict[str, Any]]:
    """Returns the plots of a category: title, what it says in words, svg or None, and why None."""
    labels = np.array([card.label for card in cards], int)
    scores = np.array([card.score for card in cards], float)
    image_curves = len(set(labels)) == 2 and bool(np.isfinite(scores).all())
    missing = results.get("not_available", {})
    roc, pr = {}, {}
    if "roc" in curves and "pr" in curves:
        x, y = curves["roc"]["false_positive_rate"], curves["roc"]["true_positive_rate"]
        roc["pixels"] = (x, y, _label("pixels: AUROC", results.get("pixel_auroc")))
        x, y = curves["pr"]["recall"], curves["pr"]["precision"]
        pr["pixels"] = (x, y, _label("pixels: AP", results.get("pixel_ap")))
    if image_curves:
        x, y, _ = roc_curve(labels, scores)
        roc["images"] = (x, y, _label("images: AUROC", results.get("image_auroc")))
        # The last point, recall 0 and precision 1, is drawn by convention and of no image.
        y, x, _ = precision_recall_curve(labels, scores)
        pr["images"] = (x[:-1], y[:-1], _label("images: AP", results.get("image_ap")))
    pixel, image = thresholds["pixel"].value, thresholds["image"].value
    no_pixels = missing.get("pixel_auroc", "curves.json is not there")
    no_images = "there are no scores" if not cards else ""
    rates = ("false-positive rate", "true-positive rate")
    plots = [
        ("ROC", roc, lambda axes: plot_rates(axes, roc, *rates), no_pixels),
        (
            "Precision and recall",
            pr,
            lambda axes: plot_rates(axes, pr, "recall", "precision"),
            no_pixels,
        ),
        (
            "PRO: share found of each defect region",
            "pro" in curves,
            lambda axes: plot_pro(axes, curves["pro"], results.get("au_pro")),
            no_pixels,
        ),
        (
            "IoU at every threshold",
            "iou" in curves,
            lambda axes: plot_iou(axes, curves["iou"], pixel),
            no_pixels,
        ),
        (
            "Scores of good and defective images",
            np.isfinite(scores).any(),
            lambda axes: plot_histogram(axes, cards, image),
            no_images or "no score is finite",
        ),
        (
            "Scores by defect type",
            np.isfinite(scores).any(),
            lambda axes: plot_types(axes, cards, image),
            no_images or "no score is finite",
        ),
    ]
    return [
        {"title": title, "svg": draw_plot(plot) if there else None, "missing": reason}
        for title, there, plot, reason in plots
    ]


def draw_training(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the plots of a training log, as `draw_curves` does."""
    plots = {
        "Losses": lambda axes: plot_losses(axes, log),
        "Learning rate": lambda axes: plot_learning_rate(axes, log),
    }
    return [{"title": title, "svg": draw_plot(plot)} for title, plot in plots.items()]


class Notes(list):
    """The reasons below a table, each once."""

    def number(self, reason: str) -> int:
        """Returns the number of a reason, from 1."""
        if reason not in self:
            self.append(reason)
        return self.index(reason) + 1


def metric_cells(results: Mapping[str, Any], names: Sequence[str], notes: Notes) -> list[dict]:
    """Returns a table's cells: value, and number of the note that says why it is None."""
    reasons = results.get("not_available", {})
    cells = []
    for name in names:
        value = results.get(name)
        reason = reasons.get(name, "not in results.json")
        note = notes.number(reason) if value is None else None
        cells.append({"value": value, "note": note, "reason": reason})
    return cells


def mean_cells(results: Mapping[str, Any], notes: Notes) -> list[dict]:
    """Returns the cells of the mean; a note says so where it is not of all categories."""
    categories = results["categories"]
    cells = []
    for name in METRICS:
        value = results.get("mean", {}).get(name)
        having = sum(category.get(name) is not None for category in categories.values())
        reason = f"the mean is of the {having} of {len(categories)} categories that have a number"
        if not having:
            reason = "no category has a number"
        incomplete = value is None or having < len(categories)
        note = notes.number(reason) if incomplete else None
        cells.append({"value": value, "note": note, "reason": reason})
    return cells


def type_rows(results: Mapping[str, Any], cards: Sequence[Card], notes: Notes) -> list[dict]:
    """Returns the table of defect types: name, images, how many of them are missed, metrics."""
    missed = Counter(card.defect_type for card in cards if card.verdict == "missed")
    judged = {card.defect_type for card in cards if card.verdict != "none"}
    return [
        {
            "name": name,
            "images": of_type.get("images"),
            "missed": missed[name] if name in judged else None,
            "cells": metric_cells(of_type, METRICS, notes),
        }
        for name, of_type in sorted((results.get("defect_types") or {}).items())
    ]


def baseline_rows(results: Mapping[str, Any]) -> list[dict]:
    """Returns the table of the model and the trivial baselines, none if there are no baselines.

    A cell of the model is `below` where the best baseline has a higher value.
    """
    baselines = results.get("baselines") or {}
    rows = [{"name": "this model", "cells": [results.get(metric) for metric in METRICS]}]
    rows += [
        {"name": name.replace("_", " "), "cells": [found.get(metric) for metric in METRICS]}
        for name, found in baselines.items()
    ]
    best = [
        max(
            (found[metric] for found in baselines.values() if found.get(metric) is not None),
            default=0,
        )
        for metric in METRICS
    ]
    for row in rows:
        row["cells"] = [
            {"value": value, "below": row is rows[0] and value is not None and value < most}
            for value, most in zip(row["cells"], best, strict=True)
        ]
    return rows if baselines else []


def category_page(
    workdir: Path, results: Mapping[str, Any], category: str, command: str | None
) -> str:
    """Returns the page of one category."""
    folder = workdir / category
    mine = results["categories"][category]
    rows, no_rows = read_optional(folder / "images.csv", parse_images)
    arrays, no_arrays = read_optional(folder / "evaluation.npz", parse_arrays)
    curves, _ = read_optional(folder / "curves.json", parse_json)
    log, no_log = read_optional(folder / "train_log.jsonl", parse_log)
    config, no_config = read_optional(folder / "config.json", parse_json)
    if rows is not None and arrays is not None and len(rows) != len(arrays["map"]):
        no_arrays = (
            f"evaluation.npz has {len(arrays['map'])} images and images.csv {len(rows)}: "
            "evaluate again."
        )
        arrays = None

    thresholds = choose_thresholds(mine)
    maps, masks = (None, None) if arrays is None else (arrays["map"], arrays["mask"])
    scale = mine.get("map_scale")
    cards = make_cards(rows or [], maps, masks, thresholds, mine.get("iou_threshold"), scale)
    shown = cards[:MAX_CARDS] if arrays is not None else []
    pixel_threshold = thresholds["pixel"].value
    drawn_at = 0.5 if pixel_threshold is None else float(as_shown(pixel_threshold, scale))
    gallery = draw_gallery(shown, arrays, drawn_at) if shown else []
    notes = Notes()
    types = types_of(cards)
    counts = Counter(card.verdict for card in cards)
    # Without a threshold nothing is missed or found: no zeros that look like results.
    verdicts = dict.fromkeys(VERDICTS, 0) if thresholds["image"].value is not None else {}
    verdicts = {name: counts[name] for name in {**verdicts, **counts}}
    if not counts["none"]:
        verdicts.pop("none", None)
    totals = Counter(card.label for card in cards)
    return render(
        kind="category",
        title=category,
        results=mine,
        steps=mine.get("steps"),
        good=totals[0],
        defective=totals[1],
        headline=METRICS,
        others=[name for name in NAMES if name not in METRICS and name in mine],
        thresholds=thresholds,
        baseline_rows=baseline_rows(mine),
        drawn_at=drawn_at,
        verdicts=verdicts,
        of_all={"missed": totals[1], "found": totals[1], "false_alarm": totals[0]}
        | {"passed": totals[0], "none": len(cards)},
        type_rows=type_rows(mine, cards, notes),
        notes=notes,
        curves=draw_curves(mine, curves or {}, cards, thresholds),
        training=draw_training(log) if log else [],
        no_training=no_log or "train_log.jsonl is empty.",
        cards=list(zip(shown, gallery, strict=True)),
        images=len(cards),
        no_gallery=no_rows or no_arrays or "There are no test images.",
        types=types,
        type_counts=Counter(card.defect_type for card in cards),
        config=json.dumps(config, indent=2, ensure_ascii=False) if config is not None else None,
        no_config=no_config,
        command=command,
        run=results,
    )


def count_verdicts(folder: Path, results: Mapping[str, Any]) -> list[str]:
    """Returns how many of the defective are missed and of the good are alarms, as "1 of 8"."""
    rows, _ = read_optional(folder / "images.csv", parse_images)
    threshold = choose_thresholds(results)["image"].value
    if rows is None or threshold is None:
        return ["not available"] * 2
    found = Counter((row["label"], row["score"] >= threshold) for row in rows)
    missed, alarms = found[1, False], found[0, True]
    return [f"{missed} of {missed + found[1, True]}", f"{alarms} of {alarms + found[0, False]}"]


def run_page(workdir: Path, results: Mapping[str, Any], command: str | None) -> str:
    """Returns the page of all categories."""
    notes = Notes()
    rows = [
        {
            "name": name,
            "link": urllib.parse.quote(name, safe="") + "/report.html",
            "cells": metric_cells(category, METRICS, notes),
            "verdicts": count_verdicts(workdir / name, category),
            "seconds": category.get("train_seconds"),
        }
        for name, category in results["categories"].items()
    ]
    return render(
        kind="run",
        title="All categories",
        headline=METRICS,
        rows=rows,
        mean=mean_cells(results, notes),
        notes=notes,
        command=command,
        run=results,
    )


@functools.cache
def load_template(name: str) -> jinja2.Template:
    """Returns a template of this package, compiled once for all pages; it escapes all text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"metric": _metric, "duration": _duration, "short": _short}
    environment.filters |= {"plain": _plain}
    return environment.get_template(name)


def render(template: str = "report.html.jinja", **values: Any) -> str:
    """Fills a template (see `load_template`)."""
    return load_template(template).render(
        names=NAMES,
        verdict_names=VERDICTS,
        scale=colour_scale(),
        truth_colour=f"rgb{TRUTH}",
        found_colour=f"rgb{FOUND}",
        **values,
    )


def write_category(workdir: Path, category: str) -> None:
    """Writes `workdir`/<category>/report.html from the files of that category.

    Raises:
      ReportError: there is no results.json, or the category is not in it.
    """
    workdir = Path(workdir)
    results = read_results(workdir)
    if category not in results["categories"]:
        there = ", ".join(results["categories"]) or "none"
        raise ReportError(
            f"{workdir / 'results.json'} has no category {category!r}; there are: {there}"
        )
    page = category_page(workdir, results, category, results.get("command"))
    (workdir / category).mkdir(exist_ok=True)
    write_text(workdir / category / "report.html", page)


def write_run(workdir: Path, command: str | None = None) -> None:
    """Writes `workdir`/report.html and the page of each category.

    Args:
      workdir: of a run with a results.json.
      command: what the run was started with; None takes what results.json says.

    Raises:
      ReportError: there is no results.json.
    """
    workdir = Path(workdir)
    results = read_results(workdir)
    command = command or results.get("command")
    for category in results["categories"]:
        page = category_page(workdir, results, category, command)
        (workdir / category).mkdir(exist_ok=True)
        write_text(workdir / category / "report.html", page)
    write_text(workdir / "report.html", run_page(workdir, results, command))


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _label(name: str, value: float | None) -> str:
    return name if value is None else f"{name} {value:.4f}"


def _metric(value: float) -> str:
    return f"{value:.4f}"


def _plain(value: Any) -> str:
    if value is None:
        return "not available"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _mark(points: Sequence) -> str | None:
    return "o" if len(points) < 3 else None  # a single point has no line
