"""Panels of a test image (image, truth, anomaly map, region found), for pages and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils.epath import Path
from PIL import Image

from anoseg_jax.evaluation.results import ARRAYS
from anoseg_jax.images.decode import resize_region
from anoseg_jax.images.drawing import COLOURS, FOUND, as_panels, outline
from anoseg_jax.report.verdicts import Card

TRUTH = (0, 200, 80)  # colour of its outline
PANEL_PIXELS = 30e6  # of all panels of a gallery together: about 6 MB of JPEG
STRIP = 128  # pixels: the height of the pictures of a strip
SMALL = 192  # pixels: the height that smaller images are enlarged to


def overlay(image: Image.Image, region: np.ndarray) -> Image.Image:
    """Tints a region of an image, bool [h, w], and draws its edge."""
    tint = Image.blend(image, Image.new("RGB", image.size, FOUND), 0.25)
    return outline(Image.composite(tint, image, Image.fromarray(region)), region)


def draw_panels(
    arrays: Mapping[str, np.ndarray], card: Card, height: int
) -> dict[str, Image.Image]:
    """Draws image, truth, anomaly map and the region that was found, by caption.

    Args:
      arrays: of evaluation.npz (see results.write_evaluation); every picture has the same colours
        for the same values of the map.
      card: which image; without a mask its truth is not known.
      height: of each panel in pixels.
    """
    image, mask, image_map, region = (arrays[name][card.index] for name in ARRAYS["evaluation.npz"])
    h, w = image_map.shape
    width = max(1, round(height * w / h))
    photo = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    heat = Image.fromarray(COLOURS[image_map])
    truth = "truth" if mask.any() else "truth: no defect"
    if not card.has_mask:
        truth = "truth: not known"
    mask, region = (resize_region(pixels, (height, width)) for pixels in (mask, region))
    return {
        "image": photo,
        truth: outline(photo, mask, TRUTH) if card.has_mask else photo,
        "anomaly map": heat.resize((width, height), Image.Resampling.BILINEAR),
        "found": overlay(photo, region),
    }


def draw_strip(cards: Sequence[Card], arrays: Mapping[str, np.ndarray] | None) -> list[dict]:
    """Returns a card, a short name, truth and anomaly map of each image; [] without `arrays`."""
    strip = []
    for card in cards if arrays is not None else ():
        pair = list(draw_panels(arrays, card, STRIP).items())[1:3]
        name = "/".join(Path(card.name).with_suffix("").parts[-2:])
        strip.append({"card": card, "name": name, "panels": as_panels(dict(pair))})
    return strip


def draw_gallery(
    cards: Sequence[Card], arrays: Mapping[str, np.ndarray], max_bytes: int
) -> list[list[dict[str, Any]]]:
    """Draws the panels of each card, as large as `max_bytes` allows; see `draw_panels`."""
    h, w = arrays["map"].shape[1:]
    height = round((PANEL_PIXELS / (4 * max(1, len(cards))) * h / w) ** 0.5)
    height = max(16, min(height, max(SMALL, h)))
    while True:
        gallery = [as_panels(draw_panels(arrays, card, height)) for card in cards]
        total = sum(len(panel["uri"]) for panels in gallery for panel in panels)
        if total <= max_bytes or height <= 16:
            return gallery
        height = max(16, int(0.95 * height * (max_bytes / total) ** 0.5))
