"""Verdicts on test images: the thresholds of pages and pictures, and images in order of error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from anoseg_jax.evaluation.evaluate import image_iou, to_display_scale

# Title and technical term of each verdict. The last is for images without a threshold or without a
# finite score.
VERDICTS = {
    "missed": ("Missed", "false negative"),
    "false_alarm": ("False alarm", "false positive"),
    "found": ("Found", "true positive"),
    "passed": ("Passed", "true negative"),
    "none": ("No verdict", "no image threshold"),
}


@dataclass(frozen=True)
class Threshold:
    """A threshold of scores or of maps: at or above it, an image or a pixel is defective.

    Attributes:
      value: None if there is no threshold.
      how: a sentence that says how the value was chosen.
      details: other recorded values, by name.
    """

    value: float | None
    how: str
    details: dict[str, Any] = field(default_factory=dict)


class Card(NamedTuple):
    """A test image: its row of images.csv, its index there, its verdict (a key of VERDICTS)."""

    index: int
    name: str
    defect_type: str
    label: int
    score: float
    has_mask: bool
    iou: float | None
    verdict: str


def choose_thresholds(results: Mapping[str, Any]) -> dict[str, Threshold]:
    """Returns the "image" and the "pixel" threshold of a category's results.

    Those under `thresholds` (from good images, or set by the user) have priority. Without them,
    these are the best thresholds of the test set.
    """
    best = {
        "image": ("image_f1_max", "the best F1"),
        "pixel": ("iou", "the best IoU and the best F1"),
    }
    chosen = {}
    for kind, (metric, aim) in best.items():
        recorded = results.get("thresholds", {}).get(kind, {})
        value = results.get(f"{metric}_threshold")
        if recorded.get("threshold") is not None:
            details = {
                name: number
                for name, number in recorded.items()
                if name not in ("threshold", "how") and not isinstance(number, dict)
            }
            chosen[kind] = Threshold(recorded["threshold"], recorded["how"], details)
        elif value is not None:
            how = (
                f"the value with {aim} on these test images themselves, so what is counted with it "
                "flatters the model."
            )
            chosen[kind] = Threshold(value, how)
        else:
            how = f"not available: {results['not_available'].get(metric, 'not recorded')}."
            chosen[kind] = Threshold(None, how)
    return chosen


def measure_again(
    rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any], arrays: Mapping | None
) -> list[dict[str, Any]]:
    """Returns the rows of images.csv with the IoU at the pixel threshold of `choose_thresholds`.

    The IoU in `rows` was measured at `iou_threshold`. At another pixel threshold, this function
    measures it again, on the 8-bit maps; without maps there is no IoU.
    """
    pixel = choose_thresholds(results)["pixel"].value
    if pixel == results.get("iou_threshold"):
        return list(rows)
    ious = [None] * len(rows)
    if pixel is not None and arrays is not None:
        level = level_of(to_display_scale(pixel, results.get("map_scale")))
        for index, row in enumerate(rows):
            if row["has_mask"]:
                ious[index] = image_iou(arrays["map"][index], arrays["mask"][index], level)
    return [{**row, "iou": iou} for row, iou in zip(rows, ious, strict=True)]


def make_cards(rows: Sequence[Mapping[str, Any]], threshold: float | None) -> list[Card]:
    """Returns the cards of all rows of images.csv at an image threshold, the worst first."""
    cards = [
        Card(
            index,
            *(row[name] for name in Card._fields[1:-1]),
            verdict_of(row["label"], row["score"], threshold),
        )
        for index, row in enumerate(rows)
    ]
    return sorted(cards, key=lambda card: error_order(card, threshold))


def verdict_of(label: int, score: float, threshold: float | None) -> str:
    """Returns the verdict on an image, a key of VERDICTS."""
    if threshold is None or not np.isfinite(score):
        return "none"
    if score >= threshold:
        return "found" if label else "false_alarm"
    return "missed" if label else "passed"


def error_order(card: Card, threshold: float | None) -> tuple:
    """Returns the sort key of a card: worst first. The page describes the same order.

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
    """Returns the threshold of 8-bit maps, rounded as the maps are; above 0 unless it is 0."""
    return max(round(255 * threshold), int(threshold > 0))
