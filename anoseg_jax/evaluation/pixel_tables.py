"""Tables of anomaly scores with their pixel counts, and the pixel metrics computed from them.

A score is a float32. As a key, an unsigned integer in the same order, it can be sorted, counted and
made coarser by dropping its lowest bits. A table has one entry for each distinct key. See `metrics`
for the conventions and for the functions that take maps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NO_DEFECTS = "no defect pixels in the ground-truth masks"
NO_NORMALS = "no defect-free pixels in the ground-truth masks"


def keys_from_scores(scores: np.ndarray) -> np.ndarray:
    """Converts float32 scores to uint32 keys that have the same order and the same ties."""
    bits = (scores + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 = 0.0: both zeros are one score
    # Negative floats sort in reverse: flip all their bits. For the others, set the sign bit.
    bits ^= (bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(0x80000000)
    return bits


def scores_from_keys(keys: np.ndarray) -> np.ndarray:
    """Converts uint32 keys back to float32 scores (the inverse of `keys_from_scores`)."""
    flipped = np.where(keys >> 31 != 0, np.uint32(0x80000000), np.uint32(0xFFFFFFFF))
    return (keys.astype(np.uint32) ^ flipped).view(np.float32)


@dataclass
class ScoreTable:
    """The distinct keys of a set of pixels and the sums over the pixels of each key.

    Attributes:
      keys: uint32 [k], ascending.
      sums: float64 [1, k], the number of pixels; for defect pixels [2, k], the second row is the
        sum of 1 / area of the pixels' regions.
    """

    keys: np.ndarray
    sums: np.ndarray


def empty_table(columns: int) -> ScoreTable:
    """Returns a table without keys; `columns` is the number of sums of each key."""
    return ScoreTable(np.zeros(0, np.uint32), np.zeros((columns, 0)))


def _runs(sorted_keys: np.ndarray) -> np.ndarray:
    """Returns the index at which each run of equal keys starts."""
    starts = np.ones(len(sorted_keys), dtype=bool)
    np.not_equal(sorted_keys[1:], sorted_keys[:-1], out=starts[1:])
    return np.flatnonzero(starts)


def tabulate(keys: np.ndarray) -> ScoreTable:
    """Returns the table of defect-free pixels; sorts `keys` in place."""
    keys.sort()
    starts = _runs(keys)
    counts = np.diff(starts, append=len(keys)).astype(np.float64)  # integers, exact up to 2**53
    return ScoreTable(keys[starts], counts[None])


def tabulate_regions(keys: np.ndarray, weights: np.ndarray) -> ScoreTable:
    """Returns the table of defect pixels; the weights are 1 / area of each pixel's region."""
    order = np.argsort(keys)
    return sum_runs(keys[order], np.stack([np.ones(len(keys)), weights[order]]))


def sum_runs(sorted_keys: np.ndarray, sums: np.ndarray) -> ScoreTable:
    """Returns the table of sorted keys: the sums of equal keys are added."""
    starts = _runs(sorted_keys)
    return ScoreTable(sorted_keys[starts], np.add.reduceat(sums, starts, axis=1))


def merge(a: ScoreTable, b: ScoreTable) -> ScoreTable:
    """Returns the table of the pixels of both tables; may change `a`."""
    if not len(a.keys) or not len(b.keys):
        return a if len(a.keys) else b
    # Insertion needs a third of the peak memory of a sort of both.
    insert_at = np.searchsorted(a.keys, b.keys)
    in_both = a.keys[np.minimum(insert_at, len(a.keys) - 1)] == b.keys
    a.sums[:, insert_at[in_both]] += b.sums[:, in_both]
    insert_at = insert_at[~in_both]
    insert_at += np.arange(len(insert_at))  # positions of the new keys in the merged table
    from_a = np.ones(len(a.keys) + len(insert_at), dtype=bool)
    from_a[insert_at] = False
    keys = np.empty(len(from_a), np.uint32)
    keys[from_a], keys[insert_at] = a.keys, b.keys[~in_both]
    sums = np.empty((len(a.sums), len(from_a)))
    for merged_row, a_row, b_row in zip(sums, a.sums, b.sums, strict=True):
        merged_row[from_a], merged_row[insert_at] = a_row, b_row[~in_both]
    return ScoreTable(keys, sums)


def _at_or_above(table: ScoreTable, keys: np.ndarray, side: str = "left") -> np.ndarray:
    """Counts the pixels of `table` at or above each key; strictly above with side="right"."""
    total = np.concatenate([np.cumsum(table.sums[0][::-1])[::-1], [0.0]])
    return total[np.searchsorted(table.keys, keys, side=side)]


@dataclass
class TypeTables:
    """The tables, counts and pending pixels of the images of one defect type."""

    normal: ScoreTable = field(default_factory=lambda: empty_table(1))
    defect: ScoreTable = field(default_factory=lambda: empty_table(2))
    pending_normal: list[np.ndarray] = field(default_factory=list)
    pending_defect: list[np.ndarray] = field(default_factory=list)
    pending_weights: list[np.ndarray] = field(default_factory=list)
    images: int = 0
    images_with_defect: int = 0
    images_without_mask: int = 0  # not among `images`
    regions: int = 0
    non_finite_images: int = 0
    non_finite_pixels: int = 0

    def merge_pending(self, shift: int) -> None:
        """Counts the pending pixels, whose keys have `shift` more bits than those of the tables."""
        if self.pending_normal:
            keys = np.concatenate(self.pending_normal)
            keys >>= np.uint32(shift)
            self.pending_normal.clear()
            self.normal = merge(self.normal, tabulate(keys))
        if self.pending_defect:
            keys = np.concatenate(self.pending_defect) >> np.uint32(shift)
            weights = np.concatenate(self.pending_weights)
            self.pending_defect.clear()
            self.pending_weights.clear()
            self.defect = merge(self.defect, tabulate_regions(keys, weights))

    def drop_bit(self) -> None:
        """Drops the lowest bit of all keys of the tables."""
        self.normal = sum_runs(self.normal.keys >> np.uint32(1), self.normal.sums)
        self.defect = sum_runs(self.defect.keys >> np.uint32(1), self.defect.sums)


@dataclass
class ThresholdCounts:
    """Counts at every threshold that matters: the k distinct scores of the defect pixels.

    The arrays are [k], the highest threshold first. Thresholds in between add only false positives:
    there the ROC and PRO curves are straight, and F1 and IoU fall.
    """

    keys: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray
    false_positives_above: np.ndarray  # pixels strictly above the threshold
    overlap: np.ndarray  # mean over regions of the detected share of the region
    defect_pixels: float
    normal_pixels: float


def count_at_thresholds(groups: Sequence[TypeTables]) -> ThresholdCounts:
    """Counts true and false positives over all images of the groups."""
    defect = empty_table(2)
    for group in groups:
        defect = merge(ScoreTable(defect.keys, defect.sums.copy()), group.defect)
    keys = defect.keys[::-1]
    true_positives, overlap = np.cumsum(defect.sums[:, ::-1], axis=1)
    false_positives, above = np.zeros(len(keys)), np.zeros(len(keys))
    for group in groups:
        false_positives += _at_or_above(group.normal, keys)
        above += _at_or_above(group.normal, keys, side="right")
    return ThresholdCounts(
        keys=keys,
        true_positives=true_positives,
        false_positives=false_positives,
        false_positives_above=above,
        overlap=overlap / overlap[-1:],  # the last is the number of regions, up to rounding
        defect_pixels=float(defect.sums[0].sum()),
        normal_pixels=float(sum(group.normal.sums.sum() for group in groups)),
    )


def _rate_curve(counts: ThresholdCounts, rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the corners of a ROC or PRO curve, x (false-positive rate) and y, both 0 to 1."""
    x = np.stack([counts.false_positives_above, counts.false_positives], axis=1).ravel()
    y = np.stack([np.append(0.0, rate[:-1]), rate], axis=1).ravel()
    x /= counts.normal_pixels
    return np.concatenate([[0.0], x, [1.0]]), np.concatenate([[0.0], y, [1.0]])


def _area(x: np.ndarray, y: np.ndarray, limit: float) -> tuple[float, float]:
    """Returns the area under the curve up to x = limit, divided by limit, and its error bound.

    Dropped bits create ties, which are straight lines between two corners. The exact curve stays
    within the rectangle of these corners, so the error is at most half the rectangle. For the
    rectangle that the limit cuts, the bound is its part left of the limit.
    """
    end = int(np.searchsorted(x, limit, side="right"))
    bound = np.sum(np.diff(x[:end]) * np.diff(y[:end])) / 2
    area = np.sum(np.diff(x[:end]) * (y[1:end] + y[: end - 1])) / 2
    if end < len(x):
        width, rise = limit - x[end - 1], y[end] - y[end - 1]
        area += width * (y[end - 1] + rise * width / (x[end] - x[end - 1]) / 2)
        bound += width * rise
    return min(float(area / limit), 1.0), float(bound / limit)


def pixel_metrics(counts: ThresholdCounts, shift: int) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the values of PIXEL_METRICS, and the error bounds of all but the thresholds."""
    tp, fp, above = counts.true_positives, counts.false_positives, counts.false_positives_above
    defects = counts.defect_pixels
    values, bounds = {}, {}

    roc = _rate_curve(counts, tp / defects)
    pro = _rate_curve(counts, counts.overlap)
    values["pixel_auroc"], bounds["pixel_auroc"] = _area(*roc, 1.0)
    values["au_pro"], bounds["au_pro"] = _area(*pro, 0.3)
    values["au_pro_0.05"], bounds["au_pro_0.05"] = _area(*pro, 0.05)

    new_positives = np.diff(tp, prepend=0.0)
    ap = float(np.sum(new_positives * (tp / (tp + fp))) / defects)
    # Within a tie from dropped bits, the defect pixels come first at best and last at worst.
    best = np.sum(new_positives * (tp / (tp + above))) / defects
    lowest_tp = tp - new_positives + 1
    worst = np.sum(new_positives * (lowest_tp / (lowest_tp + fp))) / defects
    values["pixel_ap"], bounds["pixel_ap"] = min(ap, 1.0), float(max(best - ap, ap - worst))

    f1 = 2 * tp / (defects + tp + fp)
    # The lowest threshold that reaches the maximum.
    best_index = len(f1) - 1 - int(np.argmax(f1[::-1]))
    best_key = counts.keys[best_index : best_index + 1] << np.uint32(shift)
    threshold = float(scores_from_keys(best_key)[0])
    values["pixel_f1_max"] = float(f1[best_index])
    # IoU = F1 / (2 - F1), so both are highest at the same threshold.
    values["iou"] = float(tp[best_index] / (defects + fp[best_index]))
    values["pixel_f1_max_threshold"] = values["iou_threshold"] = threshold
    bounds["pixel_f1_max"] = float(np.max(2 * tp / (defects + tp + above)) - f1[best_index])
    bounds["iou"] = float(np.max(tp / (defects + above)) - values["iou"])
    return values, bounds


def _thin(x: np.ndarray, y: np.ndarray, points: int) -> tuple[list[float], list[float]]:
    """Returns at most `points` points of a curve, evenly spaced along it, with both ends."""
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    keep = np.searchsorted(length, np.linspace(0.0, length[-1], max(points, 2) - 1))
    keep = np.unique(np.append(np.minimum(keep, len(x) - 1), len(x) - 1))
    return x[keep].tolist(), y[keep].tolist()


def make_curves(
    groups: Sequence[TypeTables], counts: ThresholdCounts, shift: int, points: int
) -> dict[str, Any]:
    """Returns the ROC, PR, PRO and IoU curves for plotting, at most `points` points each."""
    roc = _thin(*_rate_curve(counts, counts.true_positives / counts.defect_pixels), points)
    pro = _thin(*_rate_curve(counts, counts.overlap), points)
    recall = counts.true_positives / counts.defect_pixels
    precision = counts.true_positives / (counts.true_positives + counts.false_positives)
    pr = _thin(recall, precision, points)

    ends = [t.keys[i] for g in groups for t in (g.normal, g.defect) if len(t.keys) for i in (0, -1)]
    low, high = scores_from_keys(np.array([min(ends), max(ends)], np.uint32) << np.uint32(shift))
    if low >= 0 and high <= 1:
        low, high = 0, 1
    thresholds = np.linspace(low, high, points, dtype=np.float64).astype(np.float32)
    keys = keys_from_scores(thresholds) >> np.uint32(shift)
    tp = sum(_at_or_above(group.defect, keys) for group in groups)
    fp = sum(_at_or_above(group.normal, keys) for group in groups)
    return {
        "roc": {"false_positive_rate": roc[0], "true_positive_rate": roc[1]},
        "pr": {"recall": pr[0], "precision": pr[1]},
        "pro": {"false_positive_rate": pro[0], "overlap": pro[1]},
        "iou": {
            "threshold": scores_from_keys(keys << np.uint32(shift)).tolist(),
            "iou": (tp / (counts.defect_pixels + fp)).tolist(),
        },
    }


def why_unusable(groups: Sequence[TypeTables]) -> str | None:
    """Returns the reason why no metric can be computed, or None."""
    images = sum(group.images for group in groups)
    if not images:
        without = sum(group.images_without_mask for group in groups)
        return f"none of the {without} images has a ground-truth mask" if without else "no images"
    non_finite = sum(group.non_finite_images for group in groups)
    if non_finite:
        pixels = sum(group.non_finite_pixels for group in groups)
        return f"{pixels} pixels in the maps of {non_finite} of {images} images are not finite"
    return None
