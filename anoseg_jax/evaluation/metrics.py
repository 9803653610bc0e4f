"""Pixel, region and image metrics of anomaly maps, of whole data sets and in bounded memory.

Conventions, also in docs/metrics.md: a score is a float32, higher = more anomalous; a pixel counts
as predicted defective when `score >= threshold`; the pixels of all images are pooled; a region is
an 8-connected component of a defect mask; the false-positive rate is taken over all defect-free
pixels, those of defective images included. A metric that cannot be computed is None and has a
reason under "not_available": the state of the data never raises.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from anoseg_jax.method.thresholds import check_rate, first_allowed

GOOD = "good"  # the defect type of images without a defect, as MVTec AD names their folder

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
AT_THRESHOLD_METRICS = (
    "iou",
    "mean_iou",
    "precision",
    "recall",
    "f1",
    "false_positive_rate",
    "good_images_flagged",
)
IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max", "image_f1_max_threshold")

Maps = np.ndarray | Sequence[np.ndarray]
Masks = np.ndarray | Sequence[np.ndarray | None] | None

MAX_SCORES = 2**23  # distinct scores of an accumulator: 100 MB; 110 maps of 256x256 stay exact
_MAX_PENDING = 2**22  # pixels collected before they are sorted into the tables: 17 MB
_MAX_SHIFT = 23  # the mantissa bits of a float32: dropping more would merge exponents
_DEFECT_COST = 4  # a defect pixel's score counts as so many: the curves are computed from these
_NO_DEFECTS = "no defect pixels in the ground-truth masks"
_NO_NORMALS = "no defect-free pixels in the ground-truth masks"
_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


def _keys(scores: np.ndarray) -> np.ndarray:
    """Returns uint32 integers in the order of the float32 scores, equal where these are equal."""
    bits = (scores + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 = 0.0: both zeros are one score
    # Negative floats order backwards: flip all their bits; of the others set the sign bit.
    bits ^= (bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(0x80000000)
    return bits


def _scores(keys: np.ndarray) -> np.ndarray:
    """Returns the float32 scores of uint32 keys: the inverse of `_keys`."""
    flipped = np.where(keys >> 31 != 0, np.uint32(0x80000000), np.uint32(0xFFFFFFFF))
    return (keys.astype(np.uint32) ^ flipped).view(np.float32)


@dataclass
class _Table:
    """Distinct keys, ascending, and what belongs to each: all that the metrics need of pixels."""

    keys: np.ndarray  # uint32 [k]
    sums: np.ndarray  # float64 [c, k]: pixels; of defects also the sum of 1 / area of their regions


def _empty_table(columns: int) -> _Table:
    return _Table(np.zeros(0, np.uint32), np.zeros((columns, 0)))


def _runs(sorted_keys: np.ndarray) -> np.ndarray:
    """Returns the index at which each run of equal keys starts."""
    starts = np.ones(len(sorted_keys), dtype=bool)
    np.not_equal(sorted_keys[1:], sorted_keys[:-1], out=starts[1:])
    return np.flatnonzero(starts)


def _tabulate(keys: np.ndarray) -> _Table:
    """Counts the keys of defect-free pixels; sorts `keys` in place."""
    keys.sort()
    starts = _runs(keys)
    counts = np.diff(starts, append=len(keys)).astype(np.float64)  # integers, exact up to 2**53
    return _Table(keys[starts], counts[None])


def _tabulate_regions(keys: np.ndarray, weights: np.ndarray) -> _Table:
    """Counts the keys of defect pixels and sums their weights."""
    order = np.argsort(keys)
    return _sum_runs(keys[order], np.stack([np.ones(len(keys)), weights[order]]))


def _sum_runs(sorted_keys: np.ndarray, sums: np.ndarray) -> _Table:
    starts = _runs(sorted_keys)
    return _Table(sorted_keys[starts], np.add.reduceat(sums, starts, axis=1))


def _merge(a: _Table, b: _Table) -> _Table:
    """Returns one table of both; may change `a`."""
    if not len(a.keys) or not len(b.keys):
        return a if len(a.keys) else b
    # Insertion rather than a sort of both: a third of the memory at the peak.
    at = np.searchsorted(a.keys, b.keys)
    known = a.keys[np.minimum(at, len(a.keys) - 1)] == b.keys
    a.sums[:, at[known]] += b.sums[:, known]
    at = at[~known]
    at += np.arange(len(at))  # where the new ones come to lie
    old = np.ones(len(a.keys) + len(at), dtype=bool)
    old[at] = False
    keys = np.empty(len(old), np.uint32)
    keys[old], keys[at] = a.keys, b.keys[~known]
    sums = np.empty((len(a.sums), len(old)))
    for total, of_a, of_b in zip(sums, a.sums, b.sums, strict=True):
        total[old], total[at] = of_a, of_b[~known]
    return _Table(keys, sums)


def _at_or_above(table: _Table, keys: np.ndarray, side: str = "left") -> np.ndarray:
    """Returns how many pixels of `table` are at or above each key; above it with side="right"."""
    total = np.concatenate([np.cumsum(table.sums[0][::-1])[::-1], [0.0]])
    return total[np.searchsorted(table.keys, keys, side=side)]


@dataclass
class _Group:
    """The images of one defect type."""

    at_threshold: dict[str, np.ndarray]  # float64 [thresholds] each
    normal: _Table = field(default_factory=lambda: _empty_table(1))
    defect: _Table = field(default_factory=lambda: _empty_table(2))
    pending_normal: list[np.ndarray] = field(default_factory=list)
    pending_defect: list[np.ndarray] = field(default_factory=list)
    pending_weights: list[np.ndarray] = field(default_factory=list)
    images: int = 0
    images_with_defect: int = 0
    images_without_mask: int = 0  # not among `images`
    regions: int = 0
    non_finite_images: int = 0
    non_finite_pixels: int = 0


@dataclass
class _Counts:
    """What thresholds at the k distinct scores of the defect pixels do, highest first, [k] each.

    Other thresholds add nothing: from one of these down to the next only false positives are added,
    so that ROC and PRO curves are straight there, and F1 and IoU fall.
    """

    keys: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray
    false_positives_above: np.ndarray  # of the scores strictly above
    overlap: np.ndarray  # mean over regions of the share of the region that is found
    defect_pixels: float
    normal_pixels: float


def _count(groups: Sequence[_Group]) -> _Counts:
    defect = _empty_table(2)
    for group in groups:
        defect = _merge(_Table(defect.keys, defect.sums.copy()), group.defect)
    keys = defect.keys[::-1]
    true_positives, overlap = np.cumsum(defect.sums[:, ::-1], axis=1)
    false_positives, above = np.zeros(len(keys)), np.zeros(len(keys))
    for group in groups:
        false_positives += _at_or_above(group.normal, keys)
        above += _at_or_above(group.normal, keys, side="right")
    return _Counts(
        keys=keys,
        true_positives=true_positives,
        false_positives=false_positives,
        false_positives_above=above,
        overlap=overlap / overlap[-1:],  # the last is the number of regions, to rounding
        defect_pixels=float(defect.sums[0].sum()),
        normal_pixels=float(sum(group.normal.sums.sum() for group in groups)),
    )


def _rate_curve(counts: _Counts, rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the corners (false-positive rate, rate) of a ROC or PRO curve, (0, 0) to (1, 1)."""
    x = np.stack([counts.false_positives_above, counts.false_positives], axis=1).ravel()
    y = np.stack([np.append(0.0, rate[:-1]), rate], axis=1).ravel()
    x /= counts.normal_pixels
    return np.concatenate([[0.0], x, [1.0]]), np.concatenate([[0.0], y, [1.0]])


def _area(x: np.ndarray, y: np.ndarray, limit: float) -> tuple[float, float]:
    """Returns the area under the curve up to x = limit, over limit, and how far it can be off.

    Where dropped bits made ties, the curve without them rises from one corner to the next within
    the rectangle that these span, instead of along its diagonal: half the rectangle is the bound,
    and of the rectangle that the limit cuts, what is left of the limit.
    """
    end = int(np.searchsorted(x, limit, side="right"))
    bound = np.sum(np.diff(x[:end]) * np.diff(y[:end])) / 2
    area = np.sum(np.diff(x[:end]) * (y[1:end] + y[: end - 1])) / 2
    if end < len(x):
        width, rise = limit - x[end - 1], y[end] - y[end - 1]
        area += width * (y[end - 1] + rise * width / (x[end] - x[end - 1]) / 2)
        bound += width * rise
    return min(float(area / limit), 1.0), float(bound / limit)


def _pixel_metrics(counts: _Counts, shift: int) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the values of PIXEL_METRICS, and how far those that are no threshold can be off."""
    tp, fp, above = counts.true_positives, counts.false_positives, counts.false_positives_above
    defects = counts.defect_pixels
    values, bounds = {}, {}

    roc = _rate_curve(counts, tp / defects)
    pro = _rate_curve(counts, counts.overlap)
    values["pixel_auroc"], bounds["pixel_auroc"] = _area(*roc, 1.0)
    values["au_pro"], bounds["au_pro"] = _area(*pro, 0.3)
    values["au_pro_0.05"], bounds["au_pro_0.05"] = _area(*pro, 0.05)

    found = np.diff(tp, prepend=0.0)
    ap = float(np.sum(found * (tp / (tp + fp))) / defects)
    # Where dropped bits made ties, the defect pixels come first at best and last at worst.
    best = np.sum(found * (tp / (tp + above))) / defects
    first = tp - found + 1
    worst = np.sum(found * (first / (first + fp))) / defects
    values["pixel_ap"], bounds["pixel_ap"] = min(ap, 1.0), float(max(best - ap, ap - worst))

    f1 = 2 * tp / (defects + tp + fp)
    at = len(f1) - 1 - int(np.argmax(f1[::-1]))  # the lowest threshold that reaches the maximum
    threshold = float(_scores(counts.keys[at : at + 1] << np.uint32(shift))[0])
    values["pixel_f1_max"] = float(f1[at])
    # IoU = F1 / (2 - F1), so that it is best at the same threshold.
    values["iou"] = float(tp[at] / (defects + fp[at]))
    values["pixel_f1_max_threshold"] = values["iou_threshold"] = threshold
    bounds["pixel_f1_max"] = float(np.max(2 * tp / (defects + tp + above)) - f1[at])
    bounds["iou"] = float(np.max(tp / (defects + above)) - values["iou"])
    return values, bounds


def _thin(x: np.ndarray, y: np.ndarray, points: int) -> tuple[list[float], list[float]]:
    """Keeps at most `points` of a curve, even along its length, with the first and the last."""
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    keep = np.searchsorted(length, np.linspace(0.0, length[-1], max(points, 2) - 1))
    keep = np.unique(np.append(np.minimum(keep, len(x) - 1), len(x) - 1))
    return x[keep].tolist(), y[keep].tolist()


def _curves(groups: Sequence[_Group], counts: _Counts, shift: int, points: int) -> dict[str, Any]:
    roc = _thin(*_rate_curve(counts, counts.true_positives / counts.defect_pixels), points)
    pro = _thin(*_rate_curve(counts, counts.overlap), points)
    recall = counts.true_positives / counts.defect_pixels
    precision = counts.true_positives / (counts.true_positives + counts.false_positives)
    pr = _thin(recall, precision, points)

    ends = [t.keys[i] for g in groups for t in (g.normal, g.defect) if len(t.keys) for i in (0, -1)]
    low, high = _scores(np.array([min(ends), max(ends)], np.uint32) << np.uint32(shift))
    if low >= 0 and high <= 1:
        low, high = 0, 1
    thresholds = np.linspace(low, high, points, dtype=np.float64).astype(np.float32)
    keys = _keys(thresholds) >> np.uint32(shift)
    tp = sum(_at_or_above(group.defect, keys) for group in groups)
    fp = sum(_at_or_above(group.normal, keys) for group in groups)
    return {
        "roc": {"false_positive_rate": roc[0], "true_positive_rate": roc[1]},
        "pr": {"recall": pr[0], "precision": pr[1]},
        "pro": {"false_positive_rate": pro[0], "overlap": pro[1]},
        "iou": {
            "threshold": _scores(keys << np.uint32(shift)).tolist(),
            "iou": (tp / (counts.defect_pixels + fp)).tolist(),
        },
    }


def _unusable(groups: Sequence[_Group]) -> str | None:
    """Returns why nothing at all can be computed, or None."""
    images = sum(group.images for group in groups)
    if not images:
        left_out = sum(group.images_without_mask for group in groups)
        return f"none of the {left_out} images has a ground-truth mask" if left_out else "no images"
    non_finite = sum(group.non_finite_images for group in groups)
    if non_finite:
        pixels = sum(group.non_finite_pixels for group in groups)
        return f"{pixels} pixels in the maps of {non_finite} of {images} images are not finite"
    return None


def _at_threshold(
    groups: Sequence[_Group],
    good: _Group | None,
    index: int,
    counts: _Counts,
    unusable: str | None,
) -> dict[str, Any]:
    """Returns AT_THRESHOLD_METRICS from the counts taken image by image."""
    tp, fp, iou = (
        float(sum(group.at_threshold[name][index] for group in groups))
        for name in ("tp", "fp", "iou")
    )
    defects, normals = counts.defect_pixels, counts.normal_pixels
    with_defect = sum(group.images_with_defect for group in groups)
    good_images = good.images if good else 0
    flagged = float(good.at_threshold["flagged"][index]) if good else 0.0
    none_found = "no pixel is at or above the threshold"
    ratios = {  # numerator, denominator, why when it is 0
        "iou": (tp, defects and defects + fp, _NO_DEFECTS),
        "mean_iou": (iou, with_defect, _NO_DEFECTS),
        "precision": (tp, defects and tp + fp, none_found if defects else _NO_DEFECTS),
        "recall": (tp, defects, _NO_DEFECTS),
        "f1": (2 * tp, defects and defects + tp + fp, _NO_DEFECTS),
        "false_positive_rate": (fp, normals, _NO_NORMALS),
        "good_images_flagged": (flagged, good_images, "no good images"),
    }
    values: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, (numerator, denominator, reason) in ratios.items():
        available = unusable is None and denominator > 0
        values[name] = numerator / denominator if available else None
        if not available:
            missing[name] = unusable or reason
    return {**values, "not_available": missing}


def _checked(
    maps: Maps, defect_masks: Masks, defect_types: Sequence[str] | None
) -> list[tuple[np.ndarray, np.ndarray | None, str | None]]:
    """Returns (float32 map [h, w], bool mask [h, w] or None, type or None) of each image."""
    n = len(maps)
    masks = [None] * n if defect_masks is None else defect_masks
    types = [None] * n if defect_types is None else defect_types
    if not n == len(masks) == len(types):
        raise ValueError(f"Got {n} maps, {len(masks)} defect masks and {len(types)} defect types")
    images = []
    for i, (scores, mask, name) in enumerate(zip(maps, masks, types, strict=True)):
        with np.errstate(over="ignore"):  # too large for float32: counted as not finite
            scores = np.asarray(scores).astype(np.float32, copy=False)
        if scores.ndim != 2:
            raise ValueError(f"Map {i} has the shape {scores.shape}, expected [h, w]")
        if mask is not None:
            mask = np.asarray(mask)
            if mask.shape != scores.shape:
                raise ValueError(f"Map {i} has the shape {scores.shape}, its mask {mask.shape}")
            if mask.dtype.kind not in "bui":
                raise ValueError(f"Defect mask {i} is {mask.dtype}, expected bool or integers")
            mask = mask != 0
        images.append((scores, mask, name))
    return images


class SegmentationAccumulator:
    """Computes what `segmentation_metrics` does from batch after batch, without keeping the maps.

    It keeps each distinct float32 score with its number of pixels, and for defect pixels the sum of
    1 / area of their regions: all is exact, ties and saturation included, whatever the order and
    the batches. When there are more than `max_scores` distinct scores, the lowest mantissa bit of
    all is dropped, and again until they fit: memory stops growing, scores that agree in the other
    bits count as ties, and `result` says so and bounds the error of each number. Counts are whole
    numbers in float64, exact up to 2**53 pixels.
    """

    def __init__(self, *, thresholds: Iterable[float] = (), max_scores: int | None = MAX_SCORES):
        """Makes an empty accumulator.

        Args:
            thresholds: pixel thresholds, rounded to float32, at which `result` reports
                AT_THRESHOLD_METRICS, always exactly. To be known beforehand: the IoU of single
                images needs the maps.
            max_scores: how many distinct scores to keep, summed over defect types, one of defect
                pixels counted as four; 12 bytes each, and four times this while they are merged.
                None: no limit.

        Raises:
            ValueError: max_scores is below 1.
        """
        if max_scores is not None and max_scores < 1:
            raise ValueError(f"max_scores must be None or at least 1, got {max_scores}")
        self.thresholds = np.array(list(thresholds), np.float32)
        self.max_scores = max_scores
        self._shift = 0  # low bits of the keys that were dropped
        self._pending = 0  # pixels
        self._groups: dict[str | None, _Group] = {}

    def add(
        self, maps: Maps, defect_masks: Masks, defect_types: Sequence[str] | None = None
    ) -> None:
        """Adds a batch.

        Args:
            maps: float [n, h, w], or n arrays [h, w] of any sizes; rounded to float32.
            defect_masks: bool or integer, shaped as the maps, nonzero = defect. None for an image,
                or for all, without ground truth: it is left out of everything and counted as one
                of images_without_mask. A good image needs an empty mask.
            defect_types: n names, "good" for good images. Without them an image is good when its
                mask is empty, and there are no results per defect type.

        Raises:
            ValueError: numbers or shapes do not fit or a mask is neither bool nor integer; nothing
                was added.
        """
        for scores, mask, name in _checked(maps, defect_masks, defect_types):
            if name is None and mask is not None and not mask.any():
                name = GOOD
            if name not in self._groups:
                zeros = {
                    key: np.zeros(len(self.thresholds)) for key in ("tp", "fp", "iou", "flagged")
                }
                self._groups[name] = _Group(at_threshold=zeros)
            if mask is None:
                self._groups[name].images_without_mask += 1
            else:
                self._add_image(self._groups[name], scores, mask)
            if self.max_scores is not None and self._pending >= _MAX_PENDING:
                self._flush()

    def _add_image(self, group: _Group, scores: np.ndarray, mask: np.ndarray) -> None:
        group.images += 1
        non_finite = scores.size - int(np.count_nonzero(np.isfinite(scores)))
        if non_finite:
            group.non_finite_images += 1
            group.non_finite_pixels += non_finite
            return

        keys = _keys(scores)
        if mask.any():
            regions, number = ndimage.label(mask, _EIGHT_CONNECTED)
            region = regions[mask]
            group.pending_defect.append(keys[mask])
            group.pending_weights.append((1.0 / np.maximum(np.bincount(region), 1))[region])
            group.pending_normal.append(keys[~mask])
            group.regions += number
            group.images_with_defect += 1
        else:
            group.pending_normal.append(keys.ravel())
        self._pending += scores.size

        for i, threshold in enumerate(self.thresholds):
            predicted = scores >= threshold
            positives = np.count_nonzero(predicted)
            tp = np.count_nonzero(predicted & mask)
            group.at_threshold["tp"][i] += tp
            group.at_threshold["fp"][i] += positives - tp
            group.at_threshold["flagged"][i] += positives > 0
            if mask.any():
                group.at_threshold["iou"][i] += tp / (np.count_nonzero(mask) + positives - tp)

    def _flush(self) -> None:
        """Moves the pending pixels into the tables and keeps these below their limit."""
        shift = np.uint32(self._shift)
        for group in self._groups.values():
            if group.pending_normal:
                keys = np.concatenate(group.pending_normal)
                group.pending_normal.clear()
                group.normal = _merge(group.normal, _tabulate(keys >> shift if shift else keys))
            if group.pending_defect:
                keys = np.concatenate(group.pending_defect) >> shift
                weights = np.concatenate(group.pending_weights)
                group.pending_defect.clear()
                group.pending_weights.clear()
                group.defect = _merge(group.defect, _tabulate_regions(keys, weights))
        self._pending = 0
        limit = np.inf if self.max_scores is None else self.max_scores
        while self._entries() > limit and self._shift < _MAX_SHIFT:
            self._shift += 1
            for group in self._groups.values():
                group.normal = _sum_runs(group.normal.keys >> np.uint32(1), group.normal.sums)
                group.defect = _sum_runs(group.defect.keys >> np.uint32(1), group.defect.sums)

    def _entries(self) -> int:
        groups = self._groups.values()
        return sum(len(g.normal.keys) + _DEFECT_COST * len(g.defect.keys) for g in groups)

    def result(self, *, curve_points: int = 0) -> dict[str, Any]:
        """Returns the metrics of all that was added; more can be added afterwards.

        Args:
            curve_points: when above 0, the most points of each curve under "curves".

        Returns:
            The dict that `segmentation_metrics` describes.
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
        counts = _count(groups)
        unusable = _unusable(groups)
        reason = unusable
        if reason is None and not counts.defect_pixels:
            reason = _NO_DEFECTS
        elif reason is None and not counts.normal_pixels:
            reason = _NO_NORMALS
        result: dict[str, Any] = dict.fromkeys(PIXEL_METRICS)
        bounds: dict[str, float] = {}
        if reason is None:
            values, bounds = _pixel_metrics(counts, self._shift)
            result.update(values)
        result["not_available"] = dict.fromkeys(PIXEL_METRICS, reason) if reason else {}
        good = self._groups.get(GOOD)
        result["at_threshold"] = [
            {"threshold": float(threshold), **_at_threshold(groups, good, i, counts, unusable)}
            for i, threshold in enumerate(self.thresholds)
        ]
        for name in ("images", "images_with_defect", "images_without_mask", "regions"):
            result[name] = sum(getattr(group, name) for group in groups)
        result["defect_pixels"] = int(counts.defect_pixels)
        result["normal_pixels"] = int(counts.normal_pixels)
        result["exact"] = self._shift == 0
        result["score_bits_dropped"] = self._shift
        result["error_bounds"] = bounds if self._shift else dict.fromkeys(bounds, 0.0)
        if curve_points > 0:
            points = max(curve_points, 2)
            result["curves"] = {} if reason else _curves(groups, counts, self._shift, points)
        return result

    def threshold_from_good(self, false_positive_rate: float) -> float | None:
        """Returns the lowest threshold that at most a given share of good images' pixels reaches.

        As `thresholds.threshold_from_good`; None also without good images. Dropped bits can make it
        higher than need be; the share is kept all the same.

        Raises:
            ValueError: false_positive_rate is not in [0, 1].
        """
        check_rate(false_positive_rate)
        self._flush()
        good = self._groups.get(GOOD)
        if good is None or good.non_finite_images or not len(good.normal.keys):
            return None
        table = good.normal
        keys = np.append(table.keys, table.keys[-1] + np.uint32(1))
        at = first_allowed(table.sums[0], false_positive_rate)
        return float(_scores(keys[at : at + 1] << np.uint32(self._shift))[0])


def segmentation_metrics(
    maps: Maps,
    defect_masks: Masks,
    *,
    defect_types: Sequence[str] | None = None,
    thresholds: Iterable[float] = (),
    curve_points: int = 0,
) -> dict[str, Any]:
    """Computes the pixel and region metrics of anomaly maps, all from one sort of the scores.

    AU-PRO is the area under the PRO curve up to a false-positive rate of 0.3, where the curve is
    interpolated linearly, divided by 0.3 (Bergmann et al., "The MVTec Anomaly Detection Dataset",
    IJCV 2021). Always exact: unlike the accumulator's, its memory grows with the maps.

    Args:
        maps: as in `SegmentationAccumulator.add`.
        defect_masks: as there.
        defect_types: as there.
        thresholds: pixel thresholds at which AT_THRESHOLD_METRICS are reported.
        curve_points: when above 0, the most points of each curve under "curves".

    Returns:
        A dict of plain Python values:
        pixel_auroc, pixel_ap, pixel_f1_max, iou (the best over thresholds), au_pro, au_pro_0.05:
            float in [0, 1] or None; pixel_f1_max_threshold, iou_threshold: float or None.
        not_available: {metric: reason} of each None.
        at_threshold: for each threshold a dict of threshold, AT_THRESHOLD_METRICS, not_available.
            mean_iou is over the images with a defect; good_images_flagged is the share of good
            images with a pixel at or above the threshold.
        images, images_with_defect, images_without_mask, regions, defect_pixels, normal_pixels: int.
        exact: bool; score_bits_dropped: int; error_bounds: {metric: how far dropped bits can have
            moved it}.
        curves: "roc", "pr", "pro" and "iou", each {axis: list of float}; {} when not available. The
            IoU is at thresholds from 0 to 1, or from the lowest to the highest score if one lies
            outside.
        defect_types: {type: such a dict, without defect_types, of the images of this type and all
            good ones}.

    Raises:
        ValueError: numbers or shapes do not fit, or a mask is neither bool nor integer.
    """
    accumulator = SegmentationAccumulator(thresholds=thresholds, max_scores=None)
    accumulator.add(maps, defect_masks, defect_types)
    return accumulator.result(curve_points=curve_points)


def image_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Computes the image metrics, with scikit-learn.

    Args:
        scores: float [n], higher = more anomalous.
        labels: bool or integer [n], nonzero = defective.

    Returns:
        image_auroc, image_ap and image_f1_max in [0, 1], image_f1_max_threshold (`score >=
        threshold`): float or None; not_available: {metric: reason} of each None.

    Raises:
        ValueError: shapes are not [n] and [n].
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels) != 0
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"Expected scores [n], labels [n], got {scores.shape}, {labels.shape}")
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
