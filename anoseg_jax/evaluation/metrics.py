"""Pixel, region and image metrics of anomaly maps, from arrays or batch by batch in bounded memory.

Conventions, also in docs/metrics.md: a score is a float32, higher = more anomalous; a pixel counts
as predicted defective when `score >= threshold`; the pixels of all images are pooled; a region is
an 8-connected component of a defect mask; the false-positive rate is taken over all defect-free
pixels, also those of defective images. A metric that cannot be computed is None and has a reason
under "not_available": unusable data does not raise an error.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from anoseg_jax.evaluation import pixel_tables

GOOD = "good"  # the defect type of images without a defect (MVTec AD's folder name)

PIXEL_METRICS = (
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1_max",
    "pixel_f1_max_threshold",
    "iou",
    "iou_threshold",
    "au_pro",
    "au_pro_0.05",
)
IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max", "image_f1_max_threshold")

Maps = np.ndarray | Sequence[np.ndarray]
Masks = np.ndarray | Sequence[np.ndarray | None] | None

MAX_SCORES = 2**23  # distinct scores of an accumulator: 100 MB; 110 maps of 256x256 stay exact
MAX_PENDING = 2**22  # pixels collected before they are sorted into the tables: 17 MB
_MAX_SHIFT = 23  # the mantissa bits of a float32: dropping more would merge exponents
# A distinct score of a defect pixel counts as four: each one is a threshold of the curves, with
# several counts of its own (pixel_tables.ThresholdCounts).
_DEFECT_COST = 4
EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


def _check_images(
    maps: Maps, defect_masks: Masks, defect_types: Sequence[str] | None
) -> list[tuple[np.ndarray, np.ndarray | None, str | None]]:
    """Returns (float32 map [h, w], bool mask [h, w] or None, type or None) of each image."""
    nothing = [None] * len(maps)
    masks = nothing if defect_masks is None else defect_masks
    types = nothing if defect_types is None else defect_types
    images = []
    for i, (scores, mask, name) in enumerate(zip(maps, masks, types, strict=True)):
        with np.errstate(over="ignore"):  # too large for float32: counted as not finite
            scores = np.asarray(scores).astype(np.float32, copy=False)
        mask = None if mask is None else np.asarray(mask)
        if scores.ndim != 2 or (mask is not None and mask.shape != scores.shape):
            shape = None if mask is None else mask.shape
            raise ValueError(f"Map {i} has the shape {scores.shape}, its mask {shape}, not [h, w]")
        images.append((scores, None if mask is None else mask != 0, name))
    return images


class SegmentationAccumulator:
    """Computes the metrics of `segmentation_metrics` batch by batch, without keeping the maps.

    It keeps each distinct float32 score with its counts, so the metrics are exact in any order and
    any batch size. When there are more than `max_scores` distinct scores, the lowest mantissa bit
    of all scores is dropped until they fit: scores that agree in the other bits become ties. The
    result reports the number of dropped bits and an error bound for each metric (docs/metrics.md).
    """

    def __init__(self, *, max_scores: int | None = MAX_SCORES, max_pending: int = MAX_PENDING):
        """Creates an empty accumulator.

        Args:
            max_scores: the largest number of distinct scores to keep, summed over defect types. A
                score of a defect pixel counts as four. A score takes 12 bytes, and four times as
                much during a merge. None: no limit.
            max_pending: pixels to collect before they are sorted and counted.
        """
        self.max_scores = max_scores
        self.max_pending = max_pending
        self._shift = 0  # low bits of the keys that were dropped
        self._pending = 0  # pixels
        self._groups: dict[str | None, pixel_tables.TypeTables] = {}

    def add(
        self,
        maps: Maps,
        defect_masks: Masks,
        defect_types: Sequence[str] | None = None,
        ignored: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            maps: float [n, h, w], or n arrays [h, w] of any sizes; rounded to float32.
            defect_masks: bool or integer, shaped as the maps, nonzero = defect; empty for a good
                image. An image without a mask (None) is used for no metric, and counted.
            defect_types: n names, "good" for good images. Without them an image is good when its
                mask is empty, and there are no results per defect type.
            ignored: bool, shaped as the maps: True for pixels that do not count.

        Raises:
            ValueError: lengths or shapes differ. Nothing is added in this case.
        """
        images = _check_images(maps, defect_masks, defect_types)
        ignored = [None] * len(images) if ignored is None else ignored
        for (scores, mask, name), left_out in zip(images, ignored, strict=True):
            if name is None and mask is not None and not mask.any():
                name = GOOD
            group = self._groups.setdefault(name, pixel_tables.TypeTables())
            if mask is None:
                group.images_without_mask += 1
            else:
                self._add_image(group, scores, mask, left_out)
            if self.max_scores is not None and self._pending >= self.max_pending:
                self._flush()

    def _add_image(
        self,
        group: pixel_tables.TypeTables,
        scores: np.ndarray,
        mask: np.ndarray,
        ignored: np.ndarray | None,
    ) -> None:
        group.images += 1
        non_finite = scores.size - int(np.count_nonzero(np.isfinite(scores)))
        if non_finite:
            group.non_finite_images += 1
            group.non_finite_pixels += non_finite
            return

        keys = pixel_tables.keys_from_scores(scores)
        normal = ~mask
        if ignored is not None:
            mask, normal = mask & ~ignored, normal & ~ignored
        if mask.any():
            weights, number = pixel_weights(mask)
            group.pending_defect.append(keys[mask])
            group.pending_weights.append(weights)
            group.regions += number
            group.images_with_defect += 1
        group.pending_normal.append(keys[normal])
        self._pending += scores.size

    def _flush(self) -> None:
        """Merges the pending pixels into the tables and drops bits if the tables are too large."""
        for group in self._groups.values():
            group.merge_pending(self._shift)
        self._pending = 0
        limit = np.inf if self.max_scores is None else self.max_scores
        while self._shift < _MAX_SHIFT and limit < sum(
            len(group.normal.keys) + _DEFECT_COST * len(group.defect.keys)
            for group in self._groups.values()
        ):
            self._shift += 1
            for group in self._groups.values():
                group.drop_bit()

    def result(self, *, curve_points: int = 0) -> dict[str, Any]:
        """Returns the metrics of all images added so far; more can be added afterwards.

        For the argument and the dict that is returned see `segmentation_metrics`.
        """
        self._flush()
        result = self._result(list(self._groups), curve_points)
        good = [GOOD] if GOOD in self._groups else []
        result["defect_types"] = {
            name: self._result([*good, name], curve_points)
            for name in sorted(name for name in self._groups if name not in (None, GOOD))
        }
        return result

    def _result(self, names: Sequence[str | None], curve_points: int) -> dict[str, Any]:
        groups = [self._groups[name] for name in names]
        counts = pixel_tables.count_at_thresholds(groups)
        reason = pixel_tables.why_unusable(groups)
        if reason is None and not counts.defect_pixels:
            reason = pixel_tables.NO_DEFECTS
        elif reason is None and not counts.normal_pixels:
            reason = pixel_tables.NO_NORMALS
        result: dict[str, Any] = dict.fromkeys(PIXEL_METRICS)
        bounds: dict[str, float] = {}
        if reason is None:
            values, bounds = pixel_tables.pixel_metrics(counts, self._shift)
            result.update(values)
        result["not_available"] = dict.fromkeys(PIXEL_METRICS, reason) if reason else {}
        for name in ("images", "images_with_defect", "images_without_mask", "regions"):
            result[name] = sum(getattr(group, name) for group in groups)
        result["defect_pixels"] = int(counts.defect_pixels)
        result["normal_pixels"] = int(counts.normal_pixels)
        result["exact"] = self._shift == 0
        result["score_bits_dropped"] = self._shift
        result["error_bounds"] = bounds if self._shift else dict.fromkeys(bounds, 0.0)
        if curve_points > 0:
            points = max(curve_points, 2)
            result["curves"] = (
                {} if reason else pixel_tables.make_curves(groups, counts, self._shift, points)
            )
        return result


def segmentation_metrics(
    maps: Maps,
    defect_masks: Masks,
    *,
    defect_types: Sequence[str] | None = None,
    curve_points: int = 0,
) -> dict[str, Any]:
    """Computes the pixel and region metrics of anomaly maps from one sort of the scores.

    AU-PRO is the area under the PRO curve up to a false-positive rate of 0.3, where the curve is
    interpolated linearly, divided by 0.3 (Bergmann et al., "The MVTec Anomaly Detection Dataset",
    IJCV 2021). The result is always exact. Unlike the accumulator, memory grows with the maps.

    Args:
        maps, defect_masks, defect_types: see `SegmentationAccumulator.add`.
        curve_points: if above 0, the largest number of points of each curve under "curves".

    Returns:
        A dict of plain Python values:
        pixel_auroc, pixel_ap, pixel_f1_max, iou (the best over thresholds), au_pro, au_pro_0.05:
            float in [0, 1] or None; pixel_f1_max_threshold, iou_threshold: float or None.
        not_available: {metric: reason} of each None.
        images, images_with_defect, images_without_mask, regions, defect_pixels, normal_pixels: int.
        exact: bool; score_bits_dropped: int; error_bounds: {metric: largest error that the
            dropped bits can cause}.
        curves: "roc", "pr", "pro" and "iou", each {axis: list of float}; {} when not available. The
            IoU is at thresholds from 0 to 1, or from the lowest to the highest score if a score
            lies outside.
        defect_types: {type: the same dict, without defect_types, for the images of this type and
            all good images}.
    """
    accumulator = SegmentationAccumulator(max_scores=None)
    accumulator.add(maps, defect_masks, defect_types)
    return accumulator.result(curve_points=curve_points)


@dataclasses.dataclass
class RegionCounts:
    """Pixel counts of regions found at one threshold, added image by image."""

    found_defect: int = 0
    found_normal: int = 0
    defect: int = 0
    normal: int = 0
    good_images: int = 0
    good_images_flagged: int = 0
    ious: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # by defect type

    def add(
        self,
        region: np.ndarray,
        mask: np.ndarray,
        defect_type: str,
        ignored: np.ndarray | None = None,
    ) -> float | None:
        """Adds a region and its mask, bool [h, w]; returns their IoU, None if both are empty.

        The pixels that are True in `ignored`, bool [h, w], do not count.
        """
        counted = mask.size
        if ignored is not None:
            region, mask = region & ~ignored, mask & ~ignored
            counted -= int(np.count_nonzero(ignored))
        both, size, defect = (int(np.count_nonzero(a)) for a in (region & mask, region, mask))
        self.found_defect += both
        self.found_normal += size - both
        self.defect += defect
        self.normal += counted - defect
        if defect_type == GOOD:
            self.good_images += 1
            self.good_images_flagged += size > 0
        union = size + defect - both
        if defect:
            self.ious.setdefault(defect_type, []).append(both / union)
        return both / union if union else None

    def metrics(self, unusable: str | None = None) -> dict[str, Any]:
        """Returns the metrics at the threshold, and the reasons for None under not_available.

        mean_iou is over the images with a defect; good_images_flagged is the share of good images
        with a pixel at or above the threshold. `unusable` is the reason why pixel metrics are None
        (see `segmentation_metrics`); what can be computed without defects has a value even so.
        """
        if unusable in (pixel_tables.NO_DEFECTS, pixel_tables.NO_NORMALS):
            unusable = None
        tp, fp, defects = self.found_defect, self.found_normal, self.defect
        no_defects, empty = pixel_tables.NO_DEFECTS, "no pixel is at or above the threshold"
        mean_iou = float(sum(map(sum, self.ious.values()))), sum(map(len, self.ious.values()))
        ratios = {  # numerator, denominator, why when it is 0
            "iou": (tp, defects and defects + fp, no_defects),
            "mean_iou": (*mean_iou, no_defects),
            "precision": (tp, defects and tp + fp, empty if defects else no_defects),
            "recall": (tp, defects, no_defects),
            "f1": (2 * tp, defects and defects + tp + fp, no_defects),
            "false_positive_rate": (fp, self.normal, pixel_tables.NO_NORMALS),
            "good_images_flagged": (self.good_images_flagged, self.good_images, "no good images"),
        }
        reasons = {
            name: unusable or reason
            for name, (_, denominator, reason) in ratios.items()
            if unusable or not denominator
        }
        values = {
            name: None if name in reasons else numerator / denominator
            for name, (numerator, denominator, _) in ratios.items()
        }
        return values | {"not_available": reasons}


def image_curves(scores: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Returns the curves "image_roc" and "image_pr" of scores whose `image_metrics` exist."""
    x, y, _ = sklearn_metrics.roc_curve(labels, scores)
    precision, recall, _ = sklearn_metrics.precision_recall_curve(labels, scores)
    # scikit-learn appends recall 0 and precision 1 by convention: no image is there.
    precision, recall = precision[:-1].tolist(), recall[:-1].tolist()
    return {
        "image_roc": {"false_positive_rate": x.tolist(), "true_positive_rate": y.tolist()},
        "image_pr": {"recall": recall, "precision": precision},
    }


def level_histograms(levels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns three histograms of the values of an 8-bit map, uint8 [h, w]: float64 [3, 256].

    Of defect-free pixels; of defect pixels; of defect pixels weighted by 1 / area of their region.
    """
    counts = np.zeros((3, 256))
    counts[0] = np.bincount(levels[~mask], minlength=256)
    if mask.any():
        weights, _ = pixel_weights(mask)
        counts[1] = np.bincount(levels[mask], minlength=256)
        counts[2] = np.bincount(levels[mask], weights, minlength=256)
    return counts


def pixel_weights(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns 1 / area of the region of each defect pixel, and the number of regions."""
    regions, number = ndimage.label(mask, EIGHT_CONNECTED)
    region = regions[mask]
    return (1.0 / np.maximum(np.bincount(region), 1))[region], number


def image_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Computes AUROC, AP and best F1 of image scores, with scikit-learn.

    Args:
        scores: float [n], higher = more anomalous.
        labels: bool or integer [n], nonzero = defective.

    Returns:
        image_auroc, image_ap and image_f1_max in [0, 1], image_f1_max_threshold (`score >=
        threshold`): float or None; not_available: {metric: reason} of each None.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels) != 0
    non_finite = scores.size - int(np.count_nonzero(np.isfinite(scores)))
    reason = None
    if not scores.size:
        reason = "no images"
    elif non_finite:
        reason = f"the scores of {non_finite} of {scores.size} images are not finite"
    elif not labels.any():
        reason = "no defective images"
    elif labels.all():
        reason = "no good images"
    if reason is not None:
        missing = dict.fromkeys(IMAGE_METRICS, reason)
        return {**dict.fromkeys(IMAGE_METRICS), "not_available": missing}
    precision, recall, thresholds = sklearn_metrics.precision_recall_curve(labels, scores)
    # Above the scores of all defective images precision and recall are 0: the maximum avoids 0 / 0.
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    best = int(np.argmax(f1))
    return {
        "image_auroc": float(sklearn_metrics.roc_auc_score(labels, scores)),
        "image_ap": float(sklearn_metrics.average_precision_score(labels, scores)),
        "image_f1_max": float(f1[best]),
        "image_f1_max_threshold": float(thresholds[best]),
        "not_available": {},
    }
