"""Verdicts on test images, the images in order of error, and thresholds in words."""

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
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
HIGHLIGHTS = 6  # of each kind


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


def highlights(cards: Sequence[Card]) -> dict[str, list[Card]]:
    """Returns the cards to show before all others, by verdict: successes, misses, false alarms.

    Successes are defects that were found, the highest IoU first (without masks the highest score),
    and one of each defect type before a second. One whose map has nothing of the defect is none.
    Without any of the three verdicts: the first of `cards`, under their verdict.
    """
    successes, of_type = [], Counter()
    caught = [card for card in cards if card.verdict == "found" and card.iou != 0]
    for card in sorted(caught, key=lambda card: (-(card.iou or 0), -card.score, card.name)):
        successes.append((of_type[card.defect_type], card))
        of_type[card.defect_type] += 1
    groups = {"found": [card for _, card in sorted(successes, key=lambda pair: pair[0])]}
    for verdict in ("missed", "false_alarm"):
        groups[verdict] = [card for card in cards if card.verdict == verdict]
    if cards and not any(groups.values()):
        groups[cards[0].verdict] = [c for c in cards if c.verdict == cards[0].verdict]
    return {verdict: group[:HIGHLIGHTS] for verdict, group in groups.items() if group}


def success_first(cards: Sequence[Card]) -> list[Card]:
    """Returns all cards: first the successes of `highlights`, then the others in their order."""
    successes = highlights(cards).get("found", [])
    return [*successes, *(card for card in cards if card not in successes)]


def tally(counts: Mapping[str, int]) -> str:
    """Returns what numbers of verdicts mean: "finds 15 of 18 defective parts and ..."; maybe ""."""
    defective = counts["found"] + counts["missed"]
    good = counts["false_alarm"] + counts["passed"]
    clauses = [f"finds {counts['found']} of {defective} defective parts"] if defective else []
    clauses += [f"flags {counts['false_alarm']} of {good} good parts"] if good else []
    return " and ".join(clauses)


def threshold_lines(results: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each threshold of a category: its value, and what it was chosen for.

    image: of the verdicts; pixel: of new photographs; region: of pictures, where it is another.
    """
    recorded = results.get("thresholds", {})
    chosen = dict(recorded) | results.get("shown_thresholds", {})
    subjects = {
        "image": "A photograph counts as defective",
        "pixel": "In new photographs, a pixel is marked",
        "region": "In the pictures of these results, a pixel is marked",
    }
    values = {kind: chosen.get(kind, {}).get("threshold") for kind in subjects}
    if values["region"] == values["pixel"]:
        subjects["pixel"], values["region"] = "A pixel is marked", None
    return [
        f"{subjects[k]} from {value:.4g} on: {_in_words(k, recorded.get(k, {}), chosen[k])}"
        for k, value in values.items()
        if value is not None
    ]


def _in_words(kind: str, recorded: Mapping[str, Any], threshold: Mapping[str, Any]) -> str:
    """Returns why a threshold has its value; `recorded` is the one from good images, if any."""
    rate, count = recorded.get("rate"), recorded.get("images")
    if rate is None or recorded["threshold"] != threshold["threshold"]:
        return threshold["how"]
    share = Fraction(rate).limit_denominator(10_000)
    share = f"{share.numerator} of {share.denominator:,}"
    if kind == "image":
        if count * rate < 1:
            return f"above all {count} good photographs, too few to allow {share}"
        return f"this flags at most {share} good parts, by {count} good photographs"
    words = f"this marks at most {share} pixels of {count} good photographs"
    recall, flagged = recorded.get("recall"), recorded.get("good_images_flagged")
    if recall is not None and flagged is not None:
        words += f"; on test images, {recall:.0%} of the defects' pixels, and at least one pixel "
        words += f"on {flagged:.0%} of the good parts"
    return words
