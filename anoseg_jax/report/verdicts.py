"""Verdicts on test images, and the images in order of error."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Title and technical term of each verdict. The last is for images without a threshold or without a
# finite score.
VERDICTS = {
    "missed": ("Missed", "false negative"),
    "false_alarm": ("False alarm", "false positive"),
    "found": ("Found", "true positive"),
    "passed": ("Passed", "true negative"),
    "none": ("No verdict", "no image threshold"),
}


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


def shown_threshold(results: Mapping[str, Any], kind: str) -> float | None:
    """Returns the "image" or "region" threshold of evaluate.select_shown_thresholds."""
    return results.get("shown_thresholds", {}).get(kind, {}).get("threshold")


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
