"""From a predictor and test images to results, and the result files."""

import csv
import hashlib
import importlib.metadata
import io
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from anoseg_jax import metrics
from anoseg_jax.checkpoint import params_sha256
from anoseg_jax.predict import DetectorPredictor, Predictor

# The columns of results.md and what their mean is taken of.
METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "iou", "pixel_f1_max", "au_pro")
IMAGE_COLUMNS = ("name", "defect_type", "label", "has_mask")
CURVE_POINTS = 200
# Distinct scores up to which the pixel metrics are exact: 512 maps of 256x256, 400 MB.
MAX_SCORES = 2**25
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")


@dataclass
class Evaluation:
    """The results of one category.

    Attributes:
      results: what stands in results.json: metrics (None where there is none, with the reason under
        `not_available`) and what is known of the model.
      images: a dict an image: name, defect_type, label, has_mask, score (the one that is used),
        score_map, score_detector (None without one) and iou (of the 8-bit map at `iou_threshold`;
        None without a mask or a threshold).
      maps: uint8 [n, h, w], the anomaly maps times 255: for pictures, not for metrics.
      curves: for plotting: "roc", "pr", "pro", "iou" of metrics.segmentation_metrics.
    """

    results: dict[str, Any]
    images: list[dict[str, Any]]
    maps: np.ndarray
    curves: dict[str, dict[str, list[float]]]


def image_iou(image_map: np.ndarray, mask: np.ndarray, threshold: float) -> float | None:
    """Returns the IoU of one map at a threshold, uint8 both, and its mask; None if all is empty."""
    found = image_map >= threshold
    union = np.count_nonzero(found | mask)
    return np.count_nonzero(found & mask) / union if union else None


def evaluate(
    predictor: Predictor,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    native_masks: Sequence[np.ndarray] | None = None,
    pixel_threshold: float | None = None,
    image_threshold: float | None = None,
    detector: DetectorPredictor | None = None,
    image_score: str = "map",
) -> Evaluation:
    """Predicts and measures all images of `batches` (see input_pipeline.test_batches).

    Args:
      predictor: the trained generator.
      batches: test images, in order.
      native_masks: masks at the size of their files, bool [h, w] each, in the order of the images;
        where given, maps are enlarged to them (bilinear) for the pixel metrics.
      pixel_threshold: stands in for the threshold from held-out images.
      image_threshold: likewise.
      detector: the image-level detector, where its score is asked for beside the map's.
      image_score: the score that the image metrics, verdicts and thresholds of the results are of:
        "map" or "detector". `image_scores` has the image metrics of both.
    """
    thresholds = chosen_thresholds(predictor.record, pixel_threshold, image_threshold)
    if image_score == "detector":
        of_detector = chosen_thresholds(detector.record, pixel_threshold, image_threshold)
        thresholds["image"] = of_detector["image"]
    at = thresholds["pixel"]["threshold"]
    pixels = metrics.SegmentationAccumulator(
        thresholds=() if at is None else (at,), max_scores=MAX_SCORES
    )
    maps, masks, images = [np.zeros((0, *predictor.image_size), np.uint8)], [], []
    for batch in batches:
        batch_maps, batch_scores, _ = predictor(batch["image"])
        known = batch["has_mask"]
        if native_masks is None:
            at_size, truth = list(batch_maps), list(batch["mask"])
        else:
            truth = native_masks[len(images) : len(images) + len(batch_maps)]
            at_size = [resize_map(*pair) for pair in zip(batch_maps, truth, strict=True)]
        truth = [mask if has_mask else None for mask, has_mask in zip(truth, known, strict=True)]
        pixels.add(at_size, truth, batch["defect_type"].tolist())
        maps.append(np.round(255 * batch_maps).astype(np.uint8))
        masks += list(batch["mask"])
        columns = {name: batch[name].tolist() for name in IMAGE_COLUMNS}
        scores = {"map": batch_scores.tolist(), "detector": [None] * len(batch_scores)}
        if detector is not None:
            scores["detector"] = detector(batch["image"], batch_maps).tolist()
        columns |= {"score": scores[image_score]}
        columns |= {f"score_{kind}": values for kind, values in scores.items()}
        images += [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
    pixel = pixels.result(curve_points=CURVE_POINTS)
    curves, at_threshold = pixel.pop("curves"), pixel.pop("at_threshold")
    maps = np.concatenate(maps)
    for row, image_map, mask in zip(images, maps, masks, strict=True):
        best = pixel["iou_threshold"] if row["has_mask"] else None
        row["iou"] = None if best is None else image_iou(image_map, mask, round(255 * best))
    scores, labels = (np.array([row[key] for row in images]) for key in ("score", "label"))
    types = [row["defect_type"] for row in images]
    image = metrics.image_metrics(scores, labels)
    if at_threshold:
        thresholds["pixel"] |= at_threshold[0]
    if images and thresholds["image"]["threshold"] is not None:
        thresholds["image"] |= image_verdicts(scores, labels, thresholds["image"]["threshold"])
    results = image | pixel
    results["not_available"] = image["not_available"] | pixel["not_available"]
    results["defect_types"] = {
        name: of_defect_type(name, types, scores, labels, pixel["defect_types"].get(name))
        for name in sorted(set(types) - {metrics.GOOD})
    }
    results["image_scores"] = {"map": image_metrics_of("map", images)}
    if detector is not None:
        seconds = detector.record["train_seconds"]
        results["image_scores"]["detector"] = image_metrics_of("detector", images) | {
            "train_seconds": seconds,
            "train_share": seconds / (seconds + predictor.record["train_seconds"]),
            "flops_per_image": detector.record["flops_per_image"],
            "parameters": detector.record["parameters"],
            "params_sha256": detector.params_sha256,
            "steps": detector.step,
        }
    results |= {
        "params_sha256": params_sha256(predictor.params),
        "steps": predictor.step,
        "test_images": len(images),
    }
    results |= predictor.record
    results["thresholds"] = thresholds
    return Evaluation(results, images, maps, curves)


def image_metrics_of(kind: str, images: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the image metrics (metrics.image_metrics) of the scores "map" or "detector"."""
    scores, labels = (np.array([row[key] for row in images]) for key in (f"score_{kind}", "label"))
    return metrics.image_metrics(scores, labels)


def chosen_thresholds(
    record: dict[str, Any], pixel: float | None, image: float | None
) -> dict[str, dict[str, Any]]:
    """Returns the checkpoint's thresholds (predict.thresholds_from_good), or the user's own."""
    made = record.get("thresholds", {})
    own = {"how": "set by the user (evaluate.pixel_threshold, evaluate.image_threshold)"}
    none = {"threshold": None, "how": "none: the checkpoint has none"}
    return {
        name: own | {"threshold": value} if value is not None else dict(made.get(name, none))
        for name, value in (("pixel", pixel), ("image", image))
    }


def image_verdicts(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, Any]:
    """Returns what the verdicts `score >= threshold` are worth: counts and rates.

    A rate that nothing counts for is None: precision without an image called defective, recall
    without a defective one.
    """
    called, defective = scores >= threshold, labels != 0
    found, false_alarms = int(np.sum(called & defective)), int(np.sum(called & ~defective))
    good = int(np.sum(~defective))
    return {
        "precision": found / called.sum() if called.any() else None,
        "recall": found / defective.sum() if defective.any() else None,
        "f1": 2 * found / (called.sum() + defective.sum()) if defective.any() else None,
        "found": found,
        "missed": int(defective.sum()) - found,
        "false_alarms": false_alarms,
        "good_images": good,
    }


def resize_map(image_map: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Resizes a map, float32 [h, w], to the size of a mask, bilinear."""
    size = mask.shape[1], mask.shape[0]
    return np.asarray(Image.fromarray(image_map).resize(size, Image.Resampling.BILINEAR))


def of_defect_type(
    name: str, types: list[str], scores: np.ndarray, labels: np.ndarray, pixel: dict | None
) -> dict[str, Any]:
    """Returns METRICS of one defect type against all good images, with the reasons of each None.

    `pixel` are the pixel metrics of that type; None if it has no mask.
    """
    chosen = np.array([kind in (name, metrics.GOOD) for kind in types])
    image = metrics.image_metrics(scores[chosen], labels[chosen])
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
        values = [_with_spread(category, metric) for metric in METRICS]
        rows.append((name, *values, f"{category['train_seconds']:.0f}"))
    rows.append(("**mean**", *(_with_spread(results["mean"], metric) for metric in METRICS), ""))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    reasons = [
        f"- {name}: {metric}: {reason}"
        for name, category in results["categories"].items()
        for metric, reason in category["not_available"].items()
        if metric in METRICS
    ]
    note = ["", "Not available:", *reasons] if reasons else []
    return "\n".join([*lines, *image_score_lines(results["categories"]), *note, ""])


def image_score_lines(categories: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the image AUROC of both scores as a table, if a category has a detector's."""
    rows = [
        (name, *(_with_spread(scores[kind], "image_auroc") for kind in ("map", "detector")))
        + (f"{scores['detector']['train_seconds']:.0f}", f"{scores['detector']['train_share']:.0%}")
        for name, scores in ((name, c.get("image_scores", {})) for name, c in categories.items())
        if "detector" in scores
    ]
    if not rows:
        return []
    header = ("image_auroc of", "map", "detector", "its train seconds", "of all training")
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return ["", lines[0], "|---" * len(header) + "|", *lines[1:]]


def _with_spread(values: dict[str, Any], metric: str) -> str:
    spread = values.get(f"{metric}_std")  # of several seeds
    return _number(values.get(metric)) + ("" if spread is None else f" ± {spread:.4f}")


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


def read_results(workdir: Path) -> dict[str, Any]:
    """Returns the content of `workdir`/results.json."""
    return json.loads((workdir / "results.json").read_text())


def write_everything(workdir: Path, everything: dict[str, Any]) -> None:
    """Writes results.json and results.md."""
    write_text(workdir / "results.json", json.dumps(everything, indent=2, allow_nan=False) + "\n")
    write_text(workdir / "results.md", as_markdown(everything))


def write_results(
    workdir: Path, category: str, results: dict[str, Any], *, config: str, command: str
) -> None:
    """Puts a category's results into `workdir`/results.json and results.md, beside the others.

    `config` is the JSON of the options of this run, hashed into `config_sha256`; `command` is how
    it was called.
    """
    there = (workdir / "results.json").exists()
    categories = read_results(workdir)["categories"] if there else {}
    categories[category] = results
    everything = {
        "categories": categories,
        "mean": mean_of(categories),
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "command": command,
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    write_everything(workdir, everything)


def write_evaluation(folder: Path, evaluation: Evaluation, arrays: dict[str, np.ndarray]) -> None:
    """Writes what pictures and reports are made of, each file whole or not at all.

    images.csv: a line an image, with the keys of `Evaluation.images` (empty where there is no
    value). curves.json: `Evaluation.curves`. evaluation.npz, in the order of images.csv: `image`
    uint8 [n, h, w, 3], `mask` bool [n, h, w], `map` uint8 [n, h, w] (times 255).
    """
    table = io.StringIO()
    scores = ("score", "score_map", "score_detector")
    writer = csv.DictWriter(table, (*IMAGE_COLUMNS, *scores, "iou"))
    writer.writeheader()
    writer.writerows(evaluation.images)
    write_text(folder / "images.csv", table.getvalue())
    write_text(folder / "curves.json", json.dumps(evaluation.curves))
    temporary = folder / "evaluation.tmp.npz"
    np.savez_compressed(temporary, image=arrays["image"], mask=arrays["mask"], map=evaluation.maps)
    temporary.replace(folder / "evaluation.npz")
