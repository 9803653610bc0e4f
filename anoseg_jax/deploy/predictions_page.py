"""The page of a prediction run: counts, distribution of scores, gallery with defective first."""

import collections
import heapq
import time
from array import array
from typing import Any, NamedTuple

import jinja2
import numpy as np
from etils.epath import Path
from PIL import Image

from anoseg_jax.deploy.prediction import DEFECTIVE, GOOD, UNREADABLE, Prediction
from anoseg_jax.images import drawing
from anoseg_jax.images.decode import resize_region
from anoseg_jax.running.files import write_text

MAX_CARDS = 300  # the highest scores
MAX_REASONS = 100
PANEL = 224  # pixels: the longer side of a picture
BARS = 40  # of the distribution of the scores


class Card(NamedTuple):
    """A photograph on the page; the highest scores are kept."""

    score: float
    index: int
    name: str
    verdict: str
    normalized_score: float | None
    num_regions: int
    panels: list[dict[str, Any]]  # of drawing.as_panels


class Summary:
    """What the page says about all photographs; its size does not grow with their number.

    Attributes:
      counts: photographs by verdict, "" where there is no threshold.
      scores: of all photographs that could be read, 4 bytes each.
      cards: the MAX_CARDS highest scores, as a heap.
      reasons: (file, reason) of the unreadable ones that came first.
    """

    def __init__(self):
        """Begins with no photographs."""
        self.counts: collections.Counter = collections.Counter()
        self.scores = array("f")
        self.cards: list[Card] = []
        self.reasons: list[tuple[str, str]] = []
        self.began = time.monotonic()

    def is_on_page(self, score: float) -> bool:
        """Whether a photograph with such a score is among the highest so far."""
        return len(self.cards) < MAX_CARDS or score > self.cards[0].score

    def add_card(self, card: Card) -> None:
        """Adds a card, and drops the lowest if there are too many."""
        push = heapq.heappush if len(self.cards) < MAX_CARDS else heapq.heappushpop
        push(self.cards, card)

    def line(self, total: int | None = None) -> str:
        """Returns the progress as a line."""
        done, seconds = sum(self.counts.values()), time.monotonic() - self.began
        of_all = "" if total is None else f" of {total}"
        counts = [f"{self.counts[name]} {name}" for name in (DEFECTIVE, GOOD, UNREADABLE)]
        if self.counts[""]:
            counts[:2] = [f"{self.counts['']} without a verdict"]
        speed = done / seconds if seconds else 0.0
        return f"{done}{of_all} images, {speed:.1f} images/s: {', '.join(counts)}"

    def defective_names(self, limit: int = 5) -> str:
        """Returns the defective photographs by name, and how many more there are; maybe ""."""
        cards = sorted(self.cards, reverse=True)
        names = [card.name for card in cards if card.verdict == DEFECTIVE][:limit]
        more = self.counts[DEFECTIVE] - len(names)
        return ", ".join(names) + (f" and {more} more" if more else "")


def draw_panels(prediction: Prediction) -> list[dict[str, Any]]:
    """Returns small pictures of photograph, anomaly map and what was found (as_panels)."""
    height, width = prediction.size
    scale = PANEL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    photograph = Image.fromarray(prediction.image).resize(size, Image.Resampling.BICUBIC)
    heat = drawing.draw_heat_map(prediction.model_map).resize(size, Image.Resampling.BILINEAR)
    threshold, region = prediction.thresholds.pixel, None
    if threshold is not None:
        region = resize_region(prediction.model_map >= threshold, size[::-1])
    found = drawing.outline(photograph, region)
    return drawing.as_panels({"photograph": photograph, "anomaly map": heat, "found": found})


def write_page(path: Path, predictor: Any, summary: Summary) -> None:
    """Writes the page; it holds all it shows.

    Args:
      path: of report.html.
      predictor: the `Predictor`, for its model and its thresholds.
      summary: of the photographs so far.
    """
    cards = sorted(summary.cards, reverse=True)
    thresholds = {
        name: (getattr(predictor.thresholds, name), predictor.threshold_sources[name])
        for name in ("image", "pixel")
    }
    page = render(
        "predictions.html.jinja",
        counts=summary.counts,
        total=sum(summary.counts.values()),
        readable=len(summary.scores),
        seconds=time.monotonic() - summary.began,
        cards=cards,
        reasons=summary.reasons,
        thresholds=thresholds,
        bars=draw_bars(np.array(summary.scores), predictor.thresholds.image),
        scale=drawing.colour_scale(),
        model=predictor.folder,
        weights_sha256=predictor.model.weights_sha256,
        step=predictor.model.step,
        image_size=predictor.image_size,
    )
    write_text(path, page)


def draw_bars(scores: np.ndarray, threshold: float | None) -> dict[str, Any] | None:
    """Returns the distribution of the scores for an SVG of BARS by 100; None without scores.

    `heights` of the bars, up to 100; `low` and `high`: ends of the axis; `threshold`: where it is,
    from 0 to BARS, or None.
    """
    if not len(scores):
        return None
    low, high = float(scores.min()), float(scores.max())
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(scores, BARS, (low, high))
    heights = np.where(counts > 0, np.maximum(2, 100 * np.sqrt(counts / counts.max())), 0)
    position = None if threshold is None else BARS * (threshold - low) / (high - low)
    return {"heights": heights.tolist(), "low": low, "high": high, "threshold": position}


def render(template: str, **values: Any) -> str:
    """Fills a template of this folder; all text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("anoseg_jax", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(f"deploy/{template}").render(**values)
