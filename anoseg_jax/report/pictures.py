"""PNG files of the best, worst, missed and falsely detected test images of a category."""

import io

import numpy as np
from etils.epath import Path
from PIL import Image, ImageDraw

from anoseg_jax.evaluation.evaluate import to_display_scale
from anoseg_jax.evaluation.results import Evaluation
from anoseg_jax.report.panels import draw_panels
from anoseg_jax.report.verdicts import Card, choose_thresholds, make_cards, measure_again

PANEL = 256  # pixels: the height that each panel is drawn at


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
    false_alarm: images with this verdict, in the order of `cards`.
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
    return {kind: of_kind[:count] for kind, of_kind in chosen.items()}


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
    temporary.mkdir(parents=True)
    results, arrays = evaluation.results, arrays | {"map": evaluation.maps}
    thresholds = choose_thresholds(results)
    cards = make_cards(measure_again(evaluation.images, results, arrays), thresholds["image"].value)
    pixel = thresholds["pixel"].value
    drawn_at = 0.5 if pixel is None else float(to_display_scale(pixel, results.get("map_scale")))
    for kind, of_kind in choose(cards, count).items():
        for rank, card in enumerate(of_kind):
            iou = "-" if card.iou is None else f"{card.iou:.3f}"
            title = f"{kind}: {card.name}   score {card.score:.3f}   IoU {iou}"
            sheet = draw_sheet(draw_panels(arrays, card, drawn_at, PANEL), title)
            stem = "_".join(Path(card.name).with_suffix("").parts[-2:])
            png = io.BytesIO()
            sheet.save(png, "PNG")
            (temporary / f"{kind}_{rank:02d}_{stem}.png").write_bytes(png.getvalue())
    folder.rmtree(missing_ok=True)
    temporary.rename(folder)
