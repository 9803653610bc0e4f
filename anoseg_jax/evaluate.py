"""From a predictor and test images to results, and the result files."""

import csv
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from anoseg_jax import metrics
from anoseg_jax.predict import Predictor

# The columns of results.md and what their mean is taken of.
METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "iou", "pixel_f1_max", "au_pro")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")


@dataclass
class Evaluation:
    """The results of one category.

    Attributes:
      results: what stands in results.json: metrics (None where there is none, with the reason under
        `not_available`) and what is known of the model.
      images: a dict an image: name, defect_type, label, score, has_mask and iou (at
        `iou_threshold`; None without a mask or a threshold).
      maps: uint8 [n, h, w], the anomaly maps times 255: for pictures, not for metrics.
    """

    results: dict[str, Any]
    images: list[dict[str, Any]]
    maps: np.ndarray


def params_sha256(params: Any) -> str:
    """Returns the SHA-256 of names, shapes, dtypes and bytes of all parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def image_iou(image_map: np.ndarray, mask: np.ndarray, threshold: float) -> float | None:
    """Returns the IoU of one map (at or above `threshold`) and its mask; None if both are empty."""
    found = image_map >= threshold
    union = np.count_nonzero(found | mask)
    return np.count_nonzero(found & mask) / union if union else None


def evaluate(predictor: Predictor, batches: Iterable[dict[str, np.ndarray]]) -> Evaluation:
    """Predicts and measures all images of `batches` (see input_pipeline.test_batches)."""
    maps, scores, masks, images = [], [], [], []
    for batch in batches:
        batch_maps, batch_scores, _ = predictor(batch["image"])
        maps.extend(batch_maps)
        scores.extend(batch_scores.tolist())
        masks.extend(
            mask if known else None
            for mask, known in zip(batch["mask"], batch["has_mask"], strict=True)
        )
        images += [
            {"name": str(name), "defect_type": str(defect_type), "label": int(label)}
            for name, defect_type, label in zip(
                batch["name"], batch["defect_type"], batch["label"], strict=True
            )
        ]
    pixel = metrics.segmentation_metrics(maps, masks)
    image = metrics.image_metrics(np.array(scores), np.array([x["label"] for x in images], int))
    threshold = pixel["iou_threshold"]
    for row, score, image_map, mask in zip(images, scores, maps, masks, strict=True):
        measurable = mask is not None and threshold is not None
        row["score"] = score
        row["has_mask"] = mask is not None
        row["iou"] = image_iou(image_map, mask, threshold) if measurable else None
    results = image | pixel
    results["not_available"] = image["not_available"] | pixel["not_available"]
    results |= {
        "params_sha256": params_sha256(predictor.params),
        "steps": predictor.step,
        "test_images": len(images),
    }
    results |= predictor.record
    shown = [np.round(255 * image_map).astype(np.uint8) for image_map in maps]
    return Evaluation(results, images, np.array(shown).reshape(-1, *predictor.image_size))


def mean_of(categories: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Returns the mean of each of METRICS over the categories that have it; None where none has."""
    values = {
        name: [c[name] for c in categories.values() if c.get(name) is not None] for name in METRICS
    }
    return {name: float(np.mean(found)) if found else None for name, found in values.items()}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the numbers depend on."""
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version()} | found


def as_markdown(results: dict[str, Any]) -> str:
    """Returns results.json's content as a table, one row a category, then the mean."""
    rows = [("category", *METRICS, "train seconds")]
    for name, category in results["categories"].items():
        values = [category.get(metric) for metric in METRICS]
        rows.append((name, *map(_number, values), f"{category['train_seconds']:.0f}"))
    rows.append(("**mean**", *(_number(results["mean"][metric]) for metric in METRICS), ""))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    reasons = [
        f"- {name}: {metric}: {reason}"
        for name, category in results["categories"].items()
        for metric, reason in category["not_available"].items()
        if metric in METRICS
    ]
    note = ["", "Not available:", *reasons] if reasons else []
    return "\n".join([*lines, *note, ""])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def summary(category: str, results: dict[str, Any]) -> str:
    """Returns one line: the category's metrics."""
    values = "  ".join(f"{metric} {_number(results[metric])}" for metric in METRICS)
    return f"{category}: {values}"


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it: it is whole or it is not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_results(workdir: Path, category: str, results: dict[str, Any], config: str) -> None:
    """Puts a category's results into `workdir`/results.json and results.md, beside the others.

    `config` is the JSON of the options of this run, hashed into `config_sha256`.
    """
    path = workdir / "results.json"
    categories = json.loads(path.read_text())["categories"] if path.exists() else {}
    categories[category] = results
    everything = {
        "categories": categories,
        "mean": mean_of(categories),
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    write_text(path, json.dumps(everything, indent=2, allow_nan=False) + "\n")
    write_text(workdir / "results.md", as_markdown(everything))


def write_images(path: Path, images: list[dict[str, Any]]) -> None:
    """Writes one line an image: name, defect type, label, score, IoU; empty where there is none."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        names = ["name", "defect_type", "label", "score", "has_mask", "iou"]
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(images)
    temporary.replace(path)
