"""PNG files of the best, worst, missed and falsely detected test images of a category."""

import io
from typing import Any

import numpy as np
from etils.epath import Path
from PIL import Image, ImageDraw

from anoseg_jax.evaluation.evaluate import Evaluation, to_display_scale
from anoseg_jax.report.panels import COLOURS, PREDICTION, TRUTH, outline

PANEL = 256  # pixels: the height that each panel is drawn at


def draw_picture(
    image: np.ndarray, mask: np.ndarray | None, image_map: np.ndarray, threshold: float, title: str
) -> Image.Image:
    """Draws image, truth, anomaly map and the region at or above the threshold, side by side.

    Args:
      image: uint8 [h, w, 3].
      mask: bool [h, w], or None where the truth is not known.
      image_map: float [h, w] in [0, 1]; every picture has the same colours for the same values.
      threshold: of `image_map`.
      title: a line of text on top.
    """
    h, w = image_map.shape
    size = (max(1, round(PANEL * w / h)), PANEL)
    photo = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    heat = Image.fromarray((255 * COLOURS(image_map)[..., :3]).astype(np.uint8))
    panels = {
        "image": photo,
        "truth" if mask is not None else "truth: not known": (
            outline(photo, mask, TRUTH) if mask is not None else photo
        ),
        "anomaly map, 0 to 1": heat.resize(size, Image.Resampling.BILINEAR),
        f"found at {threshold:.3f}": outline(photo, image_map >= threshold, PREDICTION),
    }
    gap, top = 8, 40
    sheet = Image.new("RGB", (4 * (size[0] + gap) + gap, top + PANEL + gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 4), title, fill="black", font_size=13)
    for index, (name, panel) in enumerate(panels.items()):
        left = gap + index * (size[0] + gap)
        draw.text((left, 22), name, fill=(90, 90, 90), font_size=12)
        sheet.paste(panel, (left, top))
    return sheet


def choose(evaluation: Evaluation, count: int) -> dict[str, list[int]]:
    """Returns which images to show, by kind, as indices; at most `count` of each kind.

    best and worst: defective images by IoU (by score where there are no masks); missed: defective
    images whose score is below the threshold of the best image-level F1, the lowest first;
    false_alarm: good images at or above it, the highest first.
    """
    images = evaluation.images
    defective = [i for i, row in enumerate(images) if row["label"]]
    measured = [i for i in defective if images[i]["iou"] is not None]
    ranked = sorted(measured, key=lambda i: (images[i]["iou"], images[i]["score"]))
    if not ranked:
        ranked = sorted(defective, key=lambda i: images[i]["score"])
    chosen = {"best": ranked[::-1][:count], "worst": ranked[:count]}
    threshold = evaluation.results["image_f1_max_threshold"]
    if threshold is not None:
        by_score = sorted(range(len(images)), key=lambda i: images[i]["score"])
        chosen["missed"] = [
            i for i in by_score if images[i]["label"] and images[i]["score"] < threshold
        ][:count]
        chosen["false_alarm"] = [
            i for i in by_score[::-1] if not images[i]["label"] and images[i]["score"] >= threshold
        ][:count]
    return chosen


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
    threshold = evaluation.results["iou_threshold"]
    scale = evaluation.results.get("map_scale")
    threshold = 0.5 if threshold is None else float(to_display_scale(threshold, scale))
    for kind, indices in choose(evaluation, count).items():
        for rank, index in enumerate(indices):
            row = evaluation.images[index]
            picture = draw_picture(
                arrays["image"][index],
                arrays["mask"][index] if row["has_mask"] else None,
                evaluation.maps[index] / 255,
                threshold,
                f"{kind}: {row['name']}   score {row['score']:.3f}   IoU {_number(row['iou'])}",
            )
            stem = "_".join(Path(row["name"]).with_suffix("").parts[-2:])
            png = io.BytesIO()
            picture.save(png, "PNG")
            (temporary / f"{kind}_{rank:02d}_{stem}.png").write_bytes(png.getvalue())
    folder.rmtree(missing_ok=True)
    temporary.rename(folder)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"
