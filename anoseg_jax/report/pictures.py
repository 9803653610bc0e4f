"""PNG files of the best, worst, missed and falsely detected test images of a category."""

import hashlib
import io
import os

import numpy as np
from etils.epath import Path
from PIL import Image, ImageDraw

from anoseg_jax.evaluation.results import Evaluation
from anoseg_jax.report.panels import draw_panels
from anoseg_jax.report.verdicts import Card, make_cards, shown_threshold

PANEL = 256  # pixels: the height that each panel is drawn at
MAX_BYTES = 180  # of the part of a file name that names the image


def draw_sheet(panels: dict[str, Image.Image], title: str) -> Image.Image:
    """Returns panels of equal size side by side, each below its caption, and a title on top."""
    gap, top = 8, 40
    width = gap + sum(panel.width + gap for panel in panels.values())
    sheet = Image.new("RGB", (width, top + PANEL + gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 4), title, fill="black", font_size=13)
    left = gap
    for caption, panel in panels.items():
        draw.text((left, 22), caption, fill=(90, 90, 90), font_size=12)
        sheet.paste(panel, (left, top))
        left += panel.width + gap
    return sheet


def choose(cards: list[Card], count: int) -> dict[str, list[Card]]:
    """Returns which images to show, by kind; at most `count` of each kind.

    best and worst: defective images by IoU (by score where there are no masks); missed and
    false_alarm: images with this verdict, in the order of `cards`. Without any defective image,
    good ones by score, the highest first.
    """
    defective = [card for card in cards if card.label]
    ranked = [card for card in defective if card.iou is not None]
    if ranked:
        ranked.sort(key=lambda card: (card.iou, card.score, card.index))
    else:
        ranked = sorted(defective, key=lambda card: (card.score, card.index))
    chosen = {"best": ranked[::-1], "worst": ranked}
    for verdict in ("missed", "false_alarm"):
        chosen[verdict] = [card for card in cards if card.verdict == verdict]
    if not defective:
        passed = [card for card in cards if card.verdict != "false_alarm"]
        chosen["good"] = sorted(passed, key=lambda card: (-card.score, card.index))
    return {kind: of_kind[:count] for kind, of_kind in chosen.items()}


def picture_name(prefix: str, name: str) -> str:
    """Returns the file name of a picture of the image `name`: two of its parts, or a hash of it.

    A legal name may have 255 bytes; with the prefix and the folder's name it would be too long.
    """
    stem = "_".join(Path(name).with_suffix("").parts[-2:])
    if len(os.fsencode(stem)) > MAX_BYTES:
        start = os.fsencode(stem)[:MAX_BYTES].decode(errors="ignore")
        stem = f"{start}_{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"
    return f"{prefix}_{stem}.png"


def write_pictures(
    folder: str | Path, evaluation: Evaluation, arrays: dict[str, np.ndarray], count: int
) -> None:
    """Draws the chosen images of an evaluation into `folder` and replaces its content.

    Args:
      folder: `W/<category>/pictures`.
      evaluation: of the images in `arrays`, in the same order.
      arrays: `image` uint8 [n, h, w, 3] and `mask` bool [n, h, w].
      count: largest number of each kind.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    temporary.rmtree(missing_ok=True)
    arrays = arrays | {"map": evaluation.maps, "region": evaluation.regions}
    cards = make_cards(evaluation.images, shown_threshold(evaluation.results, "image"))
    threshold = shown_threshold(evaluation.results, "region")
    at = "" if threshold is None else f"   found at {threshold:.4g}"
    try:
        temporary.mkdir(parents=True)
        for kind, of_kind in choose(cards, count).items():
            for rank, card in enumerate(of_kind):
                iou = "-" if card.iou is None else f"{card.iou:.3f}"
                title = f"{kind}: {card.name}   score {card.score:.3f}   IoU {iou}{at}"
                png = io.BytesIO()
                draw_sheet(draw_panels(arrays, card, PANEL), title).save(png, "PNG")
                name = picture_name(f"{kind}_{rank:02d}", card.name)
                (temporary / name).write_bytes(png.getvalue())
        folder.rmtree(missing_ok=True)
        temporary.rename(folder)
    finally:
        temporary.rmtree(missing_ok=True)
