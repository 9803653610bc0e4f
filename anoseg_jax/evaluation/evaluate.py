"""Evaluates models, maps of other methods and trivial baselines on test images.

Writes no files: see `results`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from anoseg_jax.evaluation import METRICS, baselines, metrics
from anoseg_jax.evaluation.results import IMAGE_COLUMNS, Evaluation
from anoseg_jax.images.decode import resize_image, resize_region
from anoseg_jax.method import predict

IMAGE_SCORES = ("map", "detector")  # the values of `config.evaluate.image_score`
CURVE_POINTS = 200
# Distinct scores up to which the pixel metrics are exact: 512 maps of 256x256, 400 MB.
MAX_SCORES = 2**25

Batch = dict[str, np.ndarray]  # of input_pipeline.test_batches


def evaluate(
    predictor: Any, batches: Iterable[Batch], *, detector: Any = None, **options: Any
) -> Evaluation:
    """Predicts the anomaly maps of all test images and computes their metrics.

    Args:
      predictor: the trained generator, a `deploy.trained_model.TrainedModel`.
      batches: test images, in order.
      detector: the image-level detector, if its scores are wanted in addition to the maps' scores.
      **options: of `measure`: masks, thresholds and which image score.
    """

    def predict_batches() -> Iterable[tuple[Batch, np.ndarray, dict[str, np.ndarray]]]:
        for batch in batches:
            maps, map_scores = predictor(batch["image"])
            scores = {"map": map_scores}
            if detector is not None:
                scores["detector"] = detector(batch["image"], maps)
            yield batch, maps, scores

    metadata = {"params_sha256": predictor.weights_sha256, "steps": predictor.step}
    metadata |= predictor.record
    if options.get("image_score") == "detector":
        image_threshold = detector.record["thresholds"]["image"]
        metadata["thresholds"] = predictor.record["thresholds"] | {"image": image_threshold}
    evaluation = measure(
        predict_batches(), metadata=metadata, image_size=predictor.image_size, **options
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
    predicted: Iterable[tuple[Batch, Sequence[np.ndarray], Mapping[str, np.ndarray]]],
    *,
    metadata: Mapping[str, Any],
    image_size: tuple[int, int],
    image_score: str = "map",
    native_masks: Sequence[np.ndarray] | None = None,
    native_ignored: Sequence[np.ndarray] | None = None,
    pixel_threshold: float | None = None,
    image_threshold: float | None = None,
) -> Evaluation:
    """Computes the metrics of anomaly maps of any origin; pixels to `ignore` do not count.

    The maps are kept and resized twice: the IoU of an image needs the best threshold of all images.

    Args:
      predicted: for each batch of test images a tuple: the batch, the maps of its images, float32
        [h, w] each of any size, and their scores [b] by kind: "map" and, if there is a detector,
        "detector".
      metadata: what is known of the model; it is copied to the results. Uses its `thresholds`
        (thresholds.thresholds_from_good) and, for maps that are not from 0 to 1, its `map_scale`.
      image_size: height and width of the images.
      image_score: the score that image metrics, verdicts and the image threshold use: "map" or
        "detector". `image_scores` of the results has the image metrics of both.
      native_masks: masks at the size of their files, bool [h, w] each, in the order of the images.
        If given, the pixel metrics are computed at this size; maps are resized (bilinear).
      native_ignored: likewise the pixels to ignore.
      pixel_threshold: in place of the one from good images, on the scale of the maps.
      image_threshold: in place of the one from good images, on the scale of the scores.
    """
    thresholds = select_thresholds(metadata, pixel_threshold, image_threshold)
    pixel_threshold = thresholds["pixel"]["threshold"]
    pixels = metrics.SegmentationAccumulator(max_scores=MAX_SCORES)
    at_threshold = metrics.RegionCounts()
    maps, truths, ignored, images = [], [], [], []
    for batch, batch_maps, batch_scores in predicted:
        truth, types = batch["mask"], batch["defect_type"].tolist()
        left_out = batch.get("ignore")
        if native_masks is not None:
            rows = slice(len(images), len(images) + len(batch_maps))
            truth, left_out = native_masks[rows], native_ignored and native_ignored[rows]
        resized = resize_maps(batch_maps, truth)
        has_masks = zip(truth, batch["has_mask"], strict=True)
        known = [mask if has_mask else None for mask, has_mask in has_masks]
        pixels.add(resized, known, types, left_out)
        left_out = left_out if left_out is not None else [None] * len(types)
        if pixel_threshold is not None:
            for image_map, mask, name, out in zip(resized, known, types, left_out, strict=True):
                if mask is not None:
                    at_threshold.add(image_map >= np.float32(pixel_threshold), mask, name, out)
        maps += list(batch_maps)
        truths += list(truth)
        ignored += list(left_out)
        images += image_rows(batch, batch_scores, image_score)
    pixel = pixels.result(curve_points=CURVE_POINTS)
    curves, scale = pixel.pop("curves"), metadata.get("map_scale")
    scores, labels = (np.array([row[key] for row in images]) for key in ("score", "label"))
    results = join_metrics(metrics.image_metrics(scores, labels), pixel)
    curves |= metrics.image_curves(scores, labels) if results["image_auroc"] is not None else {}
    shown = select_shown_thresholds(results, thresholds, scale)
    level = shown["region"]["threshold"]
    regions = measure_regions(images, maps, truths, ignored, level, image_size)
    if pixel_threshold is not None:
        thresholds["pixel"]["threshold"] = float(np.float32(pixel_threshold))
        thresholds["pixel"] |= at_threshold.metrics(pixel["not_available"].get("iou"))
    if images and thresholds["image"]["threshold"] is not None:
        thresholds["image"] |= image_verdicts(scores, labels, thresholds["image"]["threshold"])
    results["defect_types"] = {
        name: metrics_of_defect_type(name, images, pixel_metrics)
        for name, pixel_metrics in pixel["defect_types"].items()
    }
    results["image_scores"] = {
        kind: metrics.image_metrics(np.array([row[f"score_{kind}"] for row in images]), labels)
        for kind in IMAGE_SCORES
        if kind == "map" or any(row[f"score_{kind}"] is not None for row in images)
    }
    results |= {"test_images": len(images), **metadata}
    results |= {"thresholds": thresholds, "shown_thresholds": shown}
    results["warnings"] = check_thresholds(thresholds, maps, scores)
    return Evaluation(results, images, to_eight_bits(maps, scale, image_size), regions, curves)


def metrics_of_defect_type(
    name: str, images: Sequence[Mapping[str, Any]], pixel_metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the headline metrics of one defect type against all good images."""
    rows = [row for row in images if row["defect_type"] in (name, metrics.GOOD)]
    scores, labels = (np.array([row[key] for row in rows]) for key in ("score", "label"))
    of_type = join_metrics(metrics.image_metrics(scores, labels), pixel_metrics)
    return {"images": sum(row["defect_type"] == name for row in rows)} | headline(of_type)


def measure_regions(
    images: Sequence[dict[str, Any]],
    maps: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    ignored: Sequence[np.ndarray | None],
    threshold: float | None,
    image_size: tuple[int, int],
) -> np.ndarray:
    """Sets the `iou` of each row of `Evaluation.images`; returns the regions, bool [n, h, w].

    A region is what is at or above the threshold in a map, float32 [h, w] of any size, resized to
    the mask. Its IoU with the mask is None without a threshold or a mask, for a map that is not
    finite, and where both are empty. The regions that are returned have the size of the images.
    """
    regions = np.zeros((len(maps), *image_size), bool)
    inputs = zip(images, maps, truths, ignored, strict=True)
    for index, (row, image_map, truth, left_out) in enumerate(inputs):
        row["iou"] = None
        if threshold is None:
            continue
        image_map = resize_image(image_map, truth.shape)
        region = image_map >= np.float32(threshold)
        regions[index] = resize_region(region, image_size)
        if row["has_mask"] and np.isfinite(image_map).all():
            row["iou"] = metrics.RegionCounts().add(region, truth, row["defect_type"], left_out)
    return regions


def image_rows(
    batch: Batch, scores: Mapping[str, np.ndarray], image_score: str
) -> list[dict[str, Any]]:
    """Returns `Evaluation.images` of a batch, without `iou`; for the arguments see `measure`."""
    columns = {name: batch[name].tolist() for name in IMAGE_COLUMNS}
    columns["score"] = scores[image_score].tolist()
    unknown = np.full(len(batch["label"]), None)
    columns |= {f"score_{kind}": scores.get(kind, unknown).tolist() for kind in IMAGE_SCORES}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def evaluate_maps(
    maps: Sequence[np.ndarray],
    batches: Sequence[Batch],
    *,
    scores: np.ndarray | None = None,
    maps_dir: str,
    top_fraction: float,
    **options: Any,
) -> Evaluation:
    """Computes the metrics of another method's maps, with the same rules as `evaluate`.

    Args:
      maps: the maps of all images, in order, float32 [h, w] each of any size and range.
      batches: test images, in order.
      scores: the scores of all images, [n]; None: computed from the maps, see `with_scores`.
      maps_dir: the folder of the maps, recorded in the results.
      top_fraction: see `with_scores`.
      **options: of `measure`: the size of the images, masks and thresholds.
    """
    unknown = ("params_sha256", "steps", "train_seconds", "parameters", "flops_per_image")
    metadata = dict.fromkeys(unknown) | {"maps_dir": maps_dir, "map_scale": scale_of(maps)}
    how = "none: maps_dir has maps of test images alone; set evaluate.{}_threshold to have one"
    metadata["thresholds"] = {
        kind: {"threshold": None, "how": how.format(kind)} for kind in ("pixel", "image")
    }
    predicted = with_scores(maps, batches, scores=scores, top_fraction=top_fraction)
    return measure(predicted, metadata=metadata, **options)


def evaluate_baselines(
    train: np.ndarray,
    batches: Sequence[Batch],
    *,
    top_fraction: float,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Returns METRICS of each of `baselines.BASELINES`, with a reason for each None.

    `train` has the good images that the model was trained on, uint8 [n, h, w, 3]. `options` are of
    `measure`: native masks. For the other arguments see `evaluate_maps`.
    """
    images = [batch["image"] for batch in batches]
    results_of = {}
    for name, baseline in baselines.BASELINES.items():
        maps = baseline(train, np.concatenate(images)) if images else []
        evaluation = measure(
            with_scores(maps, batches, top_fraction=top_fraction),
            metadata={"map_scale": {"scores": [0.0], "levels": [0.0]}},  # no pictures are drawn
            image_size=train.shape[1:3],
            **options,
        )
        results_of[name] = headline(evaluation.results)
    return results_of


def with_scores(
    maps: Sequence[np.ndarray],
    batches: Sequence[Batch],
    *,
    scores: np.ndarray | None = None,
    top_fraction: float,
) -> Iterable[tuple[Batch, Sequence[np.ndarray], dict[str, np.ndarray]]]:
    """Yields the tuples (batch, maps, scores) of `measure` for maps that are already computed.

    Without `scores`, the score of an image is computed from its map at the image's size, as for the
    model (predict.image_scores): the mean of the highest pixels.
    """
    start = 0
    for batch in batches:
        stop = start + len(batch["label"])
        batch_maps = maps[start:stop]
        if scores is None:
            resized = resize_maps(batch_maps, batch["mask"])
            batch_scores = predict.image_scores(jnp.asarray(np.stack(resized)), top_fraction)
        else:
            batch_scores = scores[start:stop]
        yield batch, batch_maps, {"map": batch_scores}
        start = stop


def scale_of(maps: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Returns the display scale (`map_scale`) of maps of any range; see `to_display_scale`.

    The level of a score depends on how rare it is. A score that the share s of all N pixels reaches
    has the level log(s) / log(1/N). So a few outliers do not compress the levels of all other
    scores, and 8 bits keep the differences that the metrics depend on.
    """
    if not len(maps):
        return {"scores": [0.0], "levels": [0.0]}
    # Every step-th pixel: a few million are enough. `| 1` makes the step odd (and at least 1): an
    # even step could divide the maps' width and take the pixels of the same columns only.
    step = sum(image_map.size for image_map in maps) // 2**22 | 1
    ends = [[min(map(np.min, maps)), max(map(np.max, maps))]]
    pixels = np.concatenate(ends + [np.ravel(image_map)[::step] for image_map in maps])
    levels = np.linspace(0, 1, 65)
    shares = float(len(pixels)) ** -levels
    shares[-1] = 0  # the highest score of all
    scores, indices = np.unique(np.quantile(pixels, 1 - shares), return_index=True)
    levels = levels[indices] / max(levels[indices][-1], levels[1])
    return {"scores": scores.astype(float).tolist(), "levels": levels.tolist()}


def to_display_scale(scores: Any, scale: Mapping[str, Sequence[float]] | None) -> Any:
    """Converts pixel scores to their levels in pictures, from 0 to 1; see `scale_of`.

    `scale` has ascending `scores` and their `levels`; the levels between them are interpolated
    linearly. Without a scale, the scores are returned unchanged.
    """
    return scores if scale is None else np.interp(scores, scale["scores"], scale["levels"])


def select_thresholds(
    metadata: Mapping[str, Any], pixel: float | None, image: float | None
) -> dict[str, dict[str, Any]]:
    """Returns the user's thresholds or else the checkpoint's (thresholds.thresholds_from_good)."""
    from_checkpoint = metadata.get("thresholds", {})
    from_user = {"how": "set by the user (evaluate.pixel_threshold, evaluate.image_threshold)"}
    none = {"threshold": None, "how": "none: the checkpoint has none"}
    return {
        name: from_user | {"threshold": value}
        if value is not None
        else dict(from_checkpoint.get(name, none))
        for name, value in (("pixel", pixel), ("image", image))
    }


def select_shown_thresholds(
    results: Mapping[str, Any], thresholds: Mapping[str, Mapping[str, Any]], scale: Mapping | None
) -> dict[str, dict[str, Any]]:
    """Returns the thresholds that pages and pictures use: threshold (or None) and, in words, how.

    image: of the verdicts. The image threshold, else that of the best F1 of the test set.
    region: of the region that is drawn as found, and of the IoU of an image. The threshold of the
    best IoU of the test set, so that the IoUs of images agree with `iou` and runs can be compared;
    else the pixel threshold. `level` is this threshold on the display scale.
    """
    on_test = "on these test images themselves, so what is counted with it flatters the model"
    image, pixel, missing = thresholds["image"], thresholds["pixel"], results["not_available"]
    options = {
        "image": (
            (image["threshold"], image["how"]),
            (results["image_f1_max_threshold"], f"the value with the best F1 {on_test}"),
            (None, f"not available: {missing.get('image_f1_max')}"),
        ),
        "region": (
            (results["iou_threshold"], f"the value with the best IoU {on_test}"),
            (pixel["threshold"], f"the pixel threshold: {pixel['how']}"),
            (None, f"not available: {missing.get('iou')}"),
        ),
    }
    shown = {}
    for kind, of_kind in options.items():
        value, how = next((pair for pair in of_kind if pair[0] is not None), of_kind[-1])
        shown[kind] = {"threshold": value, "how": how}
    region = shown["region"]["threshold"]
    level = None if region is None else float(np.clip(to_display_scale(region, scale), 0, 1))
    shown["region"]["level"] = level
    return shown


def check_thresholds(
    thresholds: Mapping[str, Mapping[str, Any]], maps: Sequence[np.ndarray], scores: np.ndarray
) -> list[str]:
    """Returns a line for each threshold that lies outside of all scores seen."""
    warnings = []
    ends = [end(image_map) for image_map in maps for end in (np.min, np.max)]
    for kind, seen in (("pixel", np.array(ends)), ("image", scores)):
        threshold = thresholds[kind]["threshold"]
        if threshold is None or not len(seen) or not np.isfinite(seen).all():
            continue
        low, high = seen.min(), seen.max()
        if not low <= threshold <= high:
            warnings.append(
                f"the {kind} threshold {threshold:.4g}, {thresholds[kind]['how']}, is outside of "
                f"all {kind} scores, {low:.4g} to {high:.4g}: "
                f"{'every' if threshold < low else 'no'} {kind} counts as defective"
            )
    return warnings


def image_verdicts(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, Any]:
    """Returns precision, recall, F1 and counts of the verdicts `score >= threshold`.

    Precision is None if no image is called defective; recall and F1 are None if none is defective.
    """
    called, defective = scores >= threshold, labels != 0
    detected, false_alarms = int(np.sum(called & defective)), int(np.sum(called & ~defective))
    return {
        "precision": detected / called.sum() if called.any() else None,
        "recall": detected / defective.sum() if defective.any() else None,
        "f1": 2 * detected / (called.sum() + defective.sum()) if defective.any() else None,
        "found": detected,
        "missed": int(defective.sum()) - detected,
        "false_alarms": false_alarms,
        "good_images": int(np.sum(~defective)),
    }


def resize_maps(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Resizes maps, float32 [h, w] each, to the sizes of their masks."""
    return [resize_image(x, mask.shape) for x, mask in zip(maps, masks, strict=True)]


def to_eight_bits(
    maps: Sequence[np.ndarray], scale: Mapping | None, image_size: tuple[int, int]
) -> np.ndarray:
    """Returns maps on the display scale times 255, uint8 [n, h, w]."""
    shown = np.zeros((len(maps), *image_size), np.uint8)
    for index, image_map in enumerate(maps):
        levels = to_display_scale(resize_image(image_map, image_size), scale)
        shown[index] = np.round(255 * np.clip(np.nan_to_num(levels), 0, 1))
    return shown


def join_metrics(image: Mapping[str, Any], pixel: Mapping[str, Any]) -> dict[str, Any]:
    """Returns image and pixel metrics as one dict, with the reasons of both."""
    reasons = image["not_available"] | pixel["not_available"]
    return {**image, **pixel, "not_available": reasons}


def headline(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns METRICS of a dict of metrics, with a reason for each None."""
    reasons = values["not_available"]
    reasons = {metric: reasons[metric] for metric in METRICS if metric in reasons}
    return {metric: values[metric] for metric in METRICS} | {"not_available": reasons}
