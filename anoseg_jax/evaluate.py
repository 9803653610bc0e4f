"""From a predictor and test images to results, and the result files."""

import csv
import hashlib
import importlib.metadata
import io
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
CURVE_POINTS = 200
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
      curves: for plotting: "roc", "pr", "pro", "iou" of metrics.segmentation_metrics.
    """

    results: dict[str, Any]
    images: list[dict[str, Any]]
    maps: np.ndarray
    curves: dict[str, dict[str, list[float]]]


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
    types = [row["defect_type"] for row in images]
    labels = np.array([row["label"] for row in images], int)
    pixel = metrics.segmentation_metrics(maps, masks, defect_types=types, curve_points=CURVE_POINTS)
    curves = pixel.pop("curves")
    pixel.pop("at_threshold")
    image = metrics.image_metrics(np.array(scores), labels)
    threshold = pixel["iou_threshold"]
    for row, score, image_map, mask in zip(images, scores, maps, masks, strict=True):
        measurable = mask is not None and threshold is not None
        row["score"] = score
        row["has_mask"] = mask is not None
        row["iou"] = image_iou(image_map, mask, threshold) if measurable else None
    results = image | pixel
    results["not_available"] = image["not_available"] | pixel["not_available"]
    results["defect_types"] = {
        name: of_defect_type(name, types, scores, labels, pixel["defect_types"].get(name))
        for name in sorted(set(types) - {metrics.GOOD})
    }
    results |= {
        "params_sha256": params_sha256(predictor.params),
        "steps": predictor.step,
        "test_images": len(images),
    }
    results |= predictor.record
    shown = [np.round(255 * image_map).astype(np.uint8) for image_map in maps]
    shown = np.array(shown, np.uint8).reshape(-1, *predictor.image_size)
    return Evaluation(results, images, shown, curves)


def of_defect_type(
    name: str, types: list[str], scores: list[float], labels: np.ndarray, pixel: dict | None
) -> dict[str, Any]:
    """Returns METRICS of one defect type against all good images, with the reasons of each None.

    `pixel` are the pixel metrics of that type; None if it has no mask.
    """
    chosen = np.array([kind in (name, metrics.GOOD) for kind in types])
    image = metrics.image_metrics(np.array(scores)[chosen], labels[chosen])
    if pixel is None:
        pixel = metrics.segmentation_metrics([], None)
    both = image | pixel
    reasons = image["not_available"] | pixel["not_available"]
    return {
        "images": types.count(name),
        **{metric: both[metric] for metric in METRICS},
        "not_available": {metric: reasons[metric] for metric in METRICS if metric in reasons},
    }


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


def write_evaluation(folder: Path, evaluation: Evaluation, arrays: dict[str, np.ndarray]) -> None:
    """Writes what pictures and reports are made of, each file whole or not at all.

    images.csv: a line an image: name, defect_type, label, score, has_mask, iou (empty where there
    is none). curves.json: `Evaluation.curves`. evaluation.npz, in the order of images.csv: `image`
    uint8 [n, h, w, 3], `mask` bool [n, h, w], `map` uint8 [n, h, w] (times 255).
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, ("name", "defect_type", "label", "score", "has_mask", "iou"))
    writer.writeheader()
    writer.writerows(evaluation.images)
    write_text(folder / "images.csv", table.getvalue())
    write_text(folder / "curves.json", json.dumps(evaluation.curves))
    temporary = folder / "evaluation.tmp.npz"
    np.savez_compressed(temporary, image=arrays["image"], mask=arrays["mask"], map=evaluation.maps)
    temporary.replace(folder / "evaluation.npz")
