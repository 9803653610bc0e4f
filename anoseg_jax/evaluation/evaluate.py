"""From a predictor, or from maps, and test images to results, and the result files."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from PIL import Image

from anoseg_jax.evaluation import baselines, metrics
from anoseg_jax.method import predict
from anoseg_jax.running import versions
from anoseg_jax.running.files import write_bytes, write_text

# The columns of results.md and what their mean is taken of.
METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "iou", "pixel_f1_max", "au_pro")
IMAGE_COLUMNS = ("name", "defect_type", "label", "has_mask")
IMAGE_SCORES = ("map", "detector")  # what `config.evaluate.image_score` may name
CURVE_POINTS = 200
# Distinct scores up to which the pixel metrics are exact: 512 maps of 256x256, 400 MB.
MAX_SCORES = 2**25


@dataclass
class Evaluation:
    """The results of one category.

    Attributes:
      results: what stands in results.json: metrics (None where there is none, with the reason under
        `not_available`) and what is known of the model.
      images: a dict an image: name, defect_type, label, has_mask, score (the one that is used),
        score_map, score_detector (None without one) and iou (of the 8-bit map at `iou_threshold`;
        None without a mask or a threshold).
      maps: uint8 [n, h, w], the maps (see `as_shown`), times 255: for pictures, not for metrics.
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
    predictor: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    native_masks: Sequence[np.ndarray] | None = None,
    pixel_threshold: float | None = None,
    image_threshold: float | None = None,
    detector: Any = None,
    image_score: str = "map",
) -> Evaluation:
    """Predicts and measures all images of `batches` (see input_pipeline.test_batches).

    Args:
      predictor: the trained generator, a `deploy.predictor.Predictor`.
      batches: test images, in order.
      native_masks: masks at the size of their files, bool [h, w] each, in the order of the images;
        where given, maps are enlarged to them (bilinear) for the pixel metrics.
      pixel_threshold: stands in for the threshold from held-out images.
      image_threshold: likewise.
      detector: the image-level detector, where its score is asked for beside the map's.
      image_score: the score that the image metrics, verdicts and thresholds of the results are of:
        "map" or "detector". `image_scores` has the image metrics of both.
    """

    def predicted() -> Iterable[tuple[dict, np.ndarray, dict[str, np.ndarray]]]:
        for batch in batches:
            maps, scores = predictor(batch["image"])
            found = {"map": scores}
            if detector is not None:
                found["detector"] = detector(batch["image"], maps)
            yield batch, maps, found

    about = {"params_sha256": predictor.weights_sha256, "steps": predictor.step}
    about |= predictor.record
    if image_score == "detector":
        about["thresholds"] = predictor.record["thresholds"] | {
            "image": detector.record["thresholds"]["image"]
        }
    evaluation = measure(
        predicted(),
        about=about,
        image_size=predictor.image_size,
        image_score=image_score,
        native_masks=native_masks,
        pixel_threshold=pixel_threshold,
        image_threshold=image_threshold,
    )
    if detector is not None:
        seconds = detector.record["train_seconds"]
        evaluation.results["image_scores"]["detector"] |= {
            "train_seconds": seconds,
            "train_share": seconds / (seconds + predictor.record["train_seconds"]),
            "flops_per_image": detector.record["flops_per_image"],
            "parameters": detector.record["parameters"],
            "params_sha256": detector.weights_sha256,
            "steps": detector.step,
        }
    return evaluation


def measure(
    predicted: Iterable[
        tuple[dict[str, np.ndarray], Sequence[np.ndarray], Mapping[str, np.ndarray]]
    ],
    *,
    about: Mapping[str, Any],
    image_size: tuple[int, int],
    image_score: str = "map",
    native_masks: Sequence[np.ndarray] | None = None,
    pixel_threshold: float | None = None,
    image_threshold: float | None = None,
) -> Evaluation:
    """Measures anomaly maps, wherever they come from.

    Args:
      predicted: for each batch of test images the batch (see input_pipeline.test_batches), the
        images' maps, float32 [h, w] each of any size, and their scores [b] by kind: "map" and,
        where there is one, "detector".
      about: what is known of the model, for the results: its `thresholds`
        (thresholds.thresholds_from_good) and, where maps are not from 0 to 1, its `map_scale`.
      image_size: height and width of the images.
      image_score: see `evaluate`.
      native_masks: see `evaluate`; maps are resized to them or else to the batch's masks.
      pixel_threshold: see `evaluate`.
      image_threshold: see `evaluate`.
    """
    thresholds = chosen_thresholds(about, pixel_threshold, image_threshold)
    scale = about.get("map_scale")
    at = thresholds["pixel"]["threshold"]
    pixels = metrics.SegmentationAccumulator(
        thresholds=() if at is None else (at,), max_scores=MAX_SCORES
    )
    maps, masks, images = [np.zeros((0, *image_size), np.uint8)], [], []
    for batch, batch_maps, batch_scores in predicted:
        known = batch["has_mask"]
        truth = batch["mask"]
        if native_masks is not None:
            truth = native_masks[len(images) : len(images) + len(batch_maps)]
        at_size = [resize_map(*pair) for pair in zip(batch_maps, truth, strict=True)]
        truth = [mask if has_mask else None for mask, has_mask in zip(truth, known, strict=True)]
        pixels.add(at_size, truth, batch["defect_type"].tolist())
        batch_maps = [resize_map(*pair) for pair in zip(batch_maps, batch["mask"], strict=True)]
        maps.append(np.round(255 * as_shown(np.stack(batch_maps), scale)).astype(np.uint8))
        masks += list(batch["mask"])
        columns = {name: batch[name].tolist() for name in IMAGE_COLUMNS}
        columns["score"] = batch_scores[image_score].tolist()
        for kind in IMAGE_SCORES:
            there = kind in batch_scores
            columns[f"score_{kind}"] = batch_scores[kind].tolist() if there else [None] * len(known)
        images += [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
    pixel = pixels.result(curve_points=CURVE_POINTS)
    curves, at_threshold = pixel.pop("curves"), pixel.pop("at_threshold")
    maps = np.concatenate(maps)
    for row, image_map, mask in zip(images, maps, masks, strict=True):
        best = pixel["iou_threshold"] if row["has_mask"] else None
        row["iou"] = (
            None if best is None else image_iou(image_map, mask, round(255 * as_shown(best, scale)))
        )
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
    kinds = [
        kind for kind in IMAGE_SCORES if any(row[f"score_{kind}"] is not None for row in images)
    ]
    results["image_scores"] = {kind: image_metrics_of(kind, images) for kind in kinds or ["map"]}
    results |= {"test_images": len(images)} | about
    results["thresholds"] = thresholds
    return Evaluation(results, images, maps, curves)


def image_metrics_of(kind: str, images: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the image metrics (metrics.image_metrics) of the scores "map" or "detector"."""
    scores, labels = (np.array([row[key] for row in images]) for key in (f"score_{kind}", "label"))
    return metrics.image_metrics(scores, labels)


def evaluate_maps(
    maps: Sequence[np.ndarray],
    batches: Sequence[dict[str, np.ndarray]],
    *,
    scores: np.ndarray | None = None,
    maps_dir: str,
    image_size: tuple[int, int],
    top_fraction: float,
    native_masks: Sequence[np.ndarray] | None = None,
    pixel_threshold: float | None = None,
    image_threshold: float | None = None,
) -> Evaluation:
    """Measures the maps of another method as `evaluate` does those of a model of ours.

    Args:
      maps: of the images of all batches, in order, float32 [h, w] each of any size and range.
      batches: see `evaluate`.
      scores: of the images, [n]; None takes those of `with_scores`.
      maps_dir: where the maps are from, for the results.
      image_size: height and width of the images in `batches`.
      top_fraction: see `with_scores`.
      native_masks: see `evaluate`.
      pixel_threshold: see `evaluate`; on the scale of the maps.
      image_threshold: see `evaluate`; on the scale of the scores.
    """
    how = "none: {} has no held-out images; set evaluate.{}_threshold to have one"
    about = {
        **dict.fromkeys(("params_sha256", "steps", "train_seconds", "parameters")),
        "flops_per_image": None,
        "maps_dir": maps_dir,
        "map_scale": scale_of(maps),
        "thresholds": {
            kind: {"threshold": None, "how": how.format("maps_dir", kind)}
            for kind in ("pixel", "image")
        },
    }
    return measure(
        with_scores(maps, batches, scores=scores, top_fraction=top_fraction),
        about=about,
        image_size=image_size,
        native_masks=native_masks,
        pixel_threshold=pixel_threshold,
        image_threshold=image_threshold,
    )


def evaluate_baselines(
    train: np.ndarray,
    batches: Sequence[dict[str, np.ndarray]],
    *,
    top_fraction: float,
    native_masks: Sequence[np.ndarray] | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns METRICS of each of `baselines.BASELINES`, with the reasons of each None.

    `train` are the good images that the model was trained on, uint8 [n, h, w, 3]; for the others
    see `evaluate_maps`.
    """
    images = [batch["image"] for batch in batches]
    found = {}
    for name, baseline in baselines.BASELINES.items():
        maps = baseline(train, np.concatenate(images)) if images else []
        results = measure(
            with_scores(maps, batches, top_fraction=top_fraction),
            about={"map_scale": {"scores": [0.0], "levels": [0.0]}},  # no pictures are made of them
            image_size=train.shape[1:3],
            native_masks=native_masks,
        ).results
        reasons = results["not_available"]
        found[name] = {metric: results[metric] for metric in METRICS} | {
            "not_available": {metric: reasons[metric] for metric in METRICS if metric in reasons}
        }
    return found


def with_scores(
    maps: Sequence[np.ndarray],
    batches: Sequence[dict[str, np.ndarray]],
    *,
    scores: np.ndarray | None = None,
    top_fraction: float,
) -> Iterable[tuple[dict[str, np.ndarray], Sequence[np.ndarray], dict[str, np.ndarray]]]:
    """Yields what `measure` takes of maps that are there already.

    Without `scores` an image's is the mean of the highest pixels of its map at the image's size, as
    for a model of ours (predict.image_scores).
    """
    start = 0
    for batch in batches:
        part = slice(start, start + len(batch["label"]))
        start = part.stop
        if scores is None:
            at_size = [resize_map(*pair) for pair in zip(maps[part], batch["mask"], strict=True)]
            of_maps = predict.image_scores(jnp.asarray(np.stack(at_size)), top_fraction)
        else:
            of_maps = scores[part]
        yield batch, maps[part], {"map": of_maps}


def scale_of(maps: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Returns `map_scale`: how maps of any range are shown from 0 to 1, see `as_shown`.

    By how rare a score is: what the share s of all N pixels reaches is shown as log(s) / log(1/N).
    So outliers leave the others their levels, and 8 bits tell apart what metrics depend on.
    """
    if not len(maps):
        return {"scores": [0.0], "levels": [0.0]}
    # A few million pixels tell; an odd step does not keep to one column.
    step = sum(image_map.size for image_map in maps) // 2**22 | 1
    ends = [[min(map(np.min, maps)), max(map(np.max, maps))]]
    pixels = np.concatenate(ends + [np.ravel(image_map)[::step] for image_map in maps])
    levels = np.linspace(0, 1, 65)
    shares = float(len(pixels)) ** -levels
    shares[-1] = 0  # the highest score of all
    scores, first = np.unique(np.quantile(pixels, 1 - shares), return_index=True)
    levels = levels[first] / max(levels[first][-1], levels[1])
    return {"scores": scores.astype(float).tolist(), "levels": levels.tolist()}


def as_shown(scores: Any, scale: Mapping[str, Sequence[float]] | None) -> Any:
    """Returns what scores of pixels are in pictures, from 0 to 1; without a `scale` they are it.

    `scale` has `scores`, rising, and the `levels` that these are shown at; between them straight.
    """
    return scores if scale is None else np.interp(scores, scale["scores"], scale["levels"])


def chosen_thresholds(
    record: dict[str, Any], pixel: float | None, image: float | None
) -> dict[str, dict[str, Any]]:
    """Returns the checkpoint's thresholds (thresholds.thresholds_from_good), or the user's own."""
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
    """Resizes a map, float32 [h, w], to the size of a mask, bilinear and antialiased."""
    if image_map.shape == mask.shape:
        return image_map
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


def as_markdown(results: dict[str, Any]) -> str:
    """Returns results.json's content as a table, one row a category, then the mean."""
    rows = [("category", *METRICS, "train seconds")]
    for name, category in results["categories"].items():
        values = [_with_spread(category, metric) for metric in METRICS]
        seconds = category.get("train_seconds")  # None where there is no model
        rows.append((name, *values, "-" if seconds is None else f"{seconds:.0f}"))
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
    categories = results["categories"]
    return "\n".join(
        [*lines, *image_score_lines(categories), *note, *_baselines_table(categories), ""]
    )


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


def _baselines_table(categories: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the lines of the table of baselines; none if no category has any.

    In bold what is above the model's value.
    """
    rows = []
    for name, category in categories.items():
        for baseline, found in (category.get("baselines") or {}).items():
            cells = []
            for metric in METRICS:
                cell, mine, its = _with_spread(found, metric), category.get(metric), found[metric]
                cells.append(f"**{cell}**" if None not in (mine, its) and its > mine else cell)
            rows.append(f"| {name} | {baseline} | " + " | ".join(cells) + " |")
    if not rows:
        return []
    header = "| " + " | ".join(("category", "trivial baseline", *METRICS)) + " |"
    note = (
        "Trivial baselines through the same evaluator; in bold where one is above the table above:"
    )
    return ["", note, "", header, "|---" * (2 + len(METRICS)) + "|", *rows]


def _with_spread(values: dict[str, Any], metric: str) -> str:
    spread = values.get(f"{metric}_std")  # of several seeds
    return _number(values.get(metric)) + ("" if spread is None else f" ± {spread:.4f}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def summary(category: str, results: dict[str, Any]) -> str:
    """Returns one line: the category's metrics."""
    values = "  ".join(f"{metric} {_number(results[metric])}" for metric in METRICS)
    return f"{category}: {values}"


def read_results(folder: Path) -> dict[str, Any]:
    """Returns the content of results.json of a workdir or of a category folder."""
    return json.loads((folder / "results.json").read_text())


def write_everything(workdir: Path, everything: dict[str, Any]) -> None:
    """Writes results.json and results.md."""
    write_text(workdir / "results.json", json.dumps(everything, indent=2, allow_nan=False) + "\n")
    write_text(workdir / "results.md", as_markdown(everything))


def write_category(folder: Path, results: dict[str, Any], *, config: str, command: str) -> None:
    """Writes `folder`/results.json: the `results` of a category, and how they were made.

    `config` is the JSON of the options of this run, hashed into `config_sha256`; `command` is how
    it was called.
    """
    of_category = {
        "results": results,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "command": command,
        "versions": versions.versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(of_category, indent=2, allow_nan=False) + "\n"
    write_text(folder / "results.json", text)


def assemble(workdir: Path, categories: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Writes results.json and results.md of `workdir` from those of its category folders.

    Other categories that are in results.json stay there. Returns what `write_category` wrote, by
    category; those that have nothing yet are left out, and without any nothing is written.
    """
    found = {
        name: read_results(workdir / name)
        for name in categories
        if (workdir / name / "results.json").exists()
    }
    if not found:
        return {}
    there = read_results(workdir)["categories"] if (workdir / "results.json").exists() else {}
    others = {name: results for name, results in there.items() if name not in found}
    every = others | {name: of_category["results"] for name, of_category in found.items()}
    made = [{k: v for k, v in one.items() if k != "results"} for one in found.values()]
    write_everything(workdir, {"categories": every, "mean": mean_of(every)} | _either(made))
    return found


def _either(values: Sequence[Any]) -> Any:
    """Returns the value that all have; where they differ each once, with "; " between."""
    if all(value == values[0] for value in values):
        return values[0]
    if isinstance(values[0], dict):
        return {key: _either([value[key] for value in values]) for key in values[0]}
    return "; ".join(dict.fromkeys(values))


def write_results(
    workdir: Path, category: str, results: dict[str, Any], *, config: str, command: str
) -> None:
    """Writes a category's results into its folder, and beside the others into `workdir`'s files.

    See `write_category`, `assemble`.
    """
    write_category(workdir / category, results, config=config, command=command)
    assemble(workdir, [category])


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
    packed = io.BytesIO()
    np.savez_compressed(packed, image=arrays["image"], mask=arrays["mask"], map=evaluation.maps)
    write_bytes(folder / "evaluation.npz", packed.getvalue())
