"""Panels of a test image (image, truth, anomaly map, overlay), and the cards of a gallery."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image
from scipy import ndimage

from anoseg_jax.evaluation.evaluate import image_iou, to_display_scale

COLOURS = matplotlib.colormaps["inferno"]
TRUTH, PREDICTION = (0, 200, 80), (255, 60, 60)  # colours of outlines
# Worst first. The last is for images without a threshold or without a finite score.
VERDICTS = {
    "missed": ("Missed", "false negative"),
    "false_alarm": ("False alarm", "false positive"),
    "found": ("Found", "true positive"),
    "passed": ("Passed", "true negative"),
    "none": ("No verdict", "no image threshold"),
}
MAX_GALLERY_BYTES = 12_000_000
PANEL_PIXELS = 30e6  # of all panels of a gallery together: about 6 MB of JPEG
SMALL = 192  # pixels: the height that smaller images are enlarged to


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
    """One image of the gallery: its row of images.csv, its index in the arrays, its verdict."""

    index: int
    name: str
    defect_type: str
    label: int
    score: float
    has_mask: bool
    iou: float | None
    verdict: str


class Panel(NamedTuple):
    """A picture of a card, as a data: URI."""

    caption: str
    uri: str
    width: int
    height: int


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


def make_cards(
    rows: Sequence[Mapping[str, Any]],
    maps: np.ndarray | None,
    masks: np.ndarray | None,
    thresholds: Mapping[str, Threshold],
    iou_threshold: float | None,
    scale: Mapping[str, Any] | None = None,
) -> list[Card]:
    """Returns the cards of all rows, the worst first.

    The IoU in `rows` was measured at `iou_threshold`. At another pixel threshold, this function
    measures it again, on the 8-bit maps; without maps there is no IoU. `scale` is the `map_scale`
    of results.json.
    """
    pixel, image = thresholds["pixel"].value, thresholds["image"].value
    cards = []
    for index, row in enumerate(rows):
        iou = row["iou"]
        if pixel != iou_threshold:
            measurable = pixel is not None and maps is not None and row["has_mask"]
            level = level_of(to_display_scale(pixel, scale)) if measurable else None
            iou = image_iou(maps[index], masks[index], level) if measurable else None
        verdict = verdict_of(row["label"], row["score"], image)
        cards.append(Card(**{**row, "iou": iou, "index": index, "verdict": verdict}))
    return sorted(cards, key=lambda card: error_order(card, image))


def outline(image: Image.Image, region: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
    """Draws the edge of a region [h, w] (bool, any size) into an image, two pixels wide."""
    region = Image.fromarray(region).resize(image.size, Image.Resampling.NEAREST)
    inside = np.asarray(region)
    edge = ndimage.binary_dilation(inside, iterations=2) & ~inside
    pixels = np.asarray(image).copy()
    pixels[edge] = colour
    return Image.fromarray(pixels)


def data_uri(image: Image.Image) -> str:
    """Returns a picture as a JPEG data: URI, without chroma subsampling: outlines stay sharp."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def cover(region: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a region [h, w] to `size` (width, height) and keeps even single pixels."""
    grey = Image.fromarray(region.astype(np.uint8) * 255)
    return np.asarray(grey.resize(size, Image.Resampling.BOX)) > 0


def overlay(photo: Image.Image, region: np.ndarray) -> Image.Image:
    """Tints a region of an image and draws its edge."""
    tint = Image.new("RGB", photo.size, PREDICTION)
    tinted = Image.composite(
        Image.blend(photo, tint, 0.25), photo, Image.fromarray(region.astype(np.uint8) * 255)
    )
    return outline(tinted, region, PREDICTION)


def draw_panels(
    image: np.ndarray, mask: np.ndarray | None, image_map: np.ndarray, level: int, height: int
) -> list[Panel]:
    """Draws image, truth, anomaly map and the region at or above the threshold.

    Args:
      image: uint8 [h, w, 3].
      mask: bool [h, w], or None where the truth is not known.
      image_map: uint8 [h, w], the map times 255; every picture has the same colours for the same
        values.
      level: threshold of `image_map`.
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
    """Draws the panels of each card, as large as MAX_GALLERY_BYTES allows.

    `threshold` is of maps in [0, 1].
    """
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
