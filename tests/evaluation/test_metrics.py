"""Metrics against numbers worked by hand, scikit-learn, a plain AU-PRO and the shared fixture."""

import json
import math
import os
import pathlib
import tracemalloc

import numpy as np
import pytest
from drawings import draw_squares
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from anoseg_jax.evaluation import metrics, pixel_tables
from anoseg_jax.method import thresholds

SHARED = pathlib.Path(
    os.environ.get("ANOSEG_SHARED", pathlib.Path(__file__).resolve().parents[3] / "shared")
)
FIXTURE = SHARED / "ref_metrics" / "fixture.npz"
CASES = ("random", "informative", "ties", "diagonal", "saturated", "constant", "perfect")
NUMBERS = [name for name in metrics.PIXEL_METRICS if "threshold" not in name]

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
TIED = st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, 1.0, -2.0])
SATURATED = st.floats(-60, 60).map(lambda x: float(np.float32(1 / (1 + np.exp(-x)))))
MAPS = st.sampled_from([FLOATS, TIED, SATURATED]).flatmap(
    lambda values: hnp.arrays(np.float32, (2, 4, 5), elements=values)
)
MASKS = hnp.arrays(bool, (2, 4, 5)).filter(lambda mask: 0 < mask.sum() < mask.size)


def plain_au_pro(maps, masks, limit):
    """Visits every threshold, and every region at each."""
    regions = []
    for scores, mask in zip(maps, masks, strict=True):
        labels, number = ndimage.label(mask, np.ones((3, 3)))
        regions += [scores[labels == i + 1] for i in range(number)]
    normal = maps[~masks]
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        overlap = np.mean([np.mean(region >= threshold) for region in regions])
        points.append((np.mean(normal >= threshold), overlap))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 < limit and x1 > x0:
            x = min(x1, limit)
            area += (x - x0) * (y0 + y0 + (y1 - y0) * (x - x0) / (x1 - x0)) / 2
    return area / limit


def example(n=12, size=(24, 32), seed=0, kind="smooth"):
    """Returns maps [n, h, w], masks and types: the first third good, the others of two types."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, *size), bool)
    draw_squares(rng, masks[n // 3 :], 6)
    maps = rng.normal(size=masks.shape) + 1.5 * masks
    if kind == "tied":
        maps = np.round(maps * 2)
    elif kind == "saturated":
        maps = 1 / (1 + np.exp(-20 * maps))
    types = ["good"] * (n // 3) + ["cut", "scratch"] * n
    return maps.astype(np.float32), masks, types[:n]


def assert_same(a, b, tolerance=1e-12):
    """Compares two results, numbers to `tolerance`."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], tolerance)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, tolerance)
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=tolerance)
    else:
        assert a == b


def at_threshold(maps, masks, threshold, types=None):
    """Returns the metrics at a threshold; without types, images with an empty mask are good."""
    counts = metrics.RegionCounts()
    for i, (scores, mask) in enumerate(zip(maps, np.asarray(masks) != 0, strict=True)):
        kind = types[i] if types else "dent" if mask.any() else "good"
        counts.add(scores >= np.float32(threshold), mask, kind)
    return counts.metrics()


def accumulate(maps, masks, types=None, batch=5, **options):
    accumulator = metrics.SegmentationAccumulator(**options)
    for i in range(0, len(maps), batch):
        part = slice(i, i + batch)
        accumulator.add(maps[part], masks[part], None if types is None else types[part])
    return accumulator


def test_numbers_worked_by_hand():
    # Highest first: defect .9, good .8, defect .3, good .1; two defects of one pixel each.
    maps = np.array([[[0.9, 0.8, 0.3, 0.1]]], np.float32)
    masks = np.array([[[1, 0, 1, 0]]], np.uint8)
    result = metrics.segmentation_metrics(maps, masks)
    assert result["pixel_auroc"] == pytest.approx(3 / 4)
    assert result["pixel_ap"] == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert result["pixel_f1_max"] == pytest.approx(4 / 5)
    assert result["iou"] == pytest.approx(2 / 3)
    assert result["pixel_f1_max_threshold"] == result["iou_threshold"] == float(np.float32(0.3))
    assert result["au_pro"] == result["au_pro_0.05"] == pytest.approx(1 / 2)
    assert at_threshold(maps, masks, 0.5) == {
        "iou": pytest.approx(1 / 3),
        "mean_iou": pytest.approx(1 / 3),
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "false_positive_rate": 0.5,
        "good_images_flagged": None,
        "not_available": {"good_images_flagged": "no good images"},
    }
    assert (result["regions"], result["defect_pixels"], result["normal_pixels"]) == (2, 2, 2)


def test_the_lowest_of_the_best_thresholds_is_reported():
    # F1 is 2/3 both at .9, with one of two defects found, and at .6, with two false positives.
    maps, masks = np.array([[[0.9, 0.8, 0.7, 0.6]]], np.float32), np.array([[[1, 0, 0, 1]]])
    result = metrics.segmentation_metrics(maps, masks)
    assert result["pixel_f1_max"] == pytest.approx(2 / 3)
    assert result["pixel_f1_max_threshold"] == float(np.float32(0.6))


def test_au_pro_weighs_all_regions_equally():
    # The region of four pixels is found before any false positive, that of one pixel after them.
    maps = np.array([[[0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.1]]], np.float32)
    masks = np.array([[[1, 1, 1, 1, 0, 0, 1]]], bool)
    result = metrics.segmentation_metrics(maps, masks)
    assert result["au_pro"] == pytest.approx(1 / 2)
    assert result["pixel_auroc"] == pytest.approx(4 / 5)


def test_au_pro_is_interpolated_at_the_limit():
    # The curve is the line from (0, 0) to (1, 1): the area up to x is x^2 / 2.
    result = metrics.segmentation_metrics(np.full((1, 8, 8), 0.5), np.eye(8, dtype=bool)[None])
    assert result["au_pro"] == pytest.approx(0.15)
    assert result["au_pro_0.05"] == pytest.approx(0.025)


def test_pixels_that_touch_at_a_corner_are_one_region():
    masks = np.zeros((1, 6, 6), bool)
    masks[0, [0, 1, 2, 5], [0, 1, 2, 0]] = True
    assert metrics.segmentation_metrics(np.zeros(masks.shape), masks)["regions"] == 2


def test_a_score_at_the_threshold_is_predicted_defective():
    maps, masks = np.full((1, 1, 4), 0.1, np.float32), np.array([[[1, 1, 0, 0]]])
    at = at_threshold(maps, masks, 0.1)
    assert (at["recall"], at["false_positive_rate"]) == (1.0, 1.0)


def test_mean_iou_is_over_images_with_a_defect_only():
    maps = np.array([[[1, 1, 0, 0]], [[1, 0, 0, 0]], [[1, 0, 0, 0]]], np.float32)
    masks = np.array([[[1, 0, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]], bool)
    at = at_threshold(maps, masks, 0.5)
    assert at["mean_iou"] == pytest.approx((1 / 2 + 1) / 2)
    assert at["iou"] == pytest.approx(2 / 4)
    assert at["good_images_flagged"] == 1.0


@settings(deadline=None, max_examples=150, derandomize=True)
@given(MAPS, MASKS)
def test_agrees_with_scikit_learn_and_plain_au_pro(maps, masks):
    result = metrics.segmentation_metrics(maps, masks)
    truth, scores = masks.ravel(), maps.ravel() + np.float32(0)
    auroc = sklearn_metrics.roc_auc_score(truth, scores)
    assert result["pixel_auroc"] == pytest.approx(auroc, abs=1e-9)
    ap = sklearn_metrics.average_precision_score(truth, scores)
    assert result["pixel_ap"] == pytest.approx(ap, abs=1e-9)
    precision, recall, levels = sklearn_metrics.precision_recall_curve(truth, scores)
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-300))[:-1]
    assert result["pixel_f1_max"] == pytest.approx(max(f1), abs=1e-9)
    at = int(np.flatnonzero(levels == np.float32(result["pixel_f1_max_threshold"]))[0])
    assert f1[at] == pytest.approx(max(f1), abs=1e-9)
    iou = sklearn_metrics.jaccard_score(truth, scores >= result["iou_threshold"])
    assert result["iou"] == pytest.approx(iou, abs=1e-9)
    assert result["iou"] == pytest.approx(max(f1) / (2 - max(f1)), abs=1e-9)
    for limit, name in ((0.3, "au_pro"), (0.05, "au_pro_0.05")):
        assert result[name] == pytest.approx(plain_au_pro(maps, masks, limit), abs=1e-9)
        assert result[name] <= 1


@settings(deadline=None, max_examples=100, derandomize=True)
@given(MAPS, MASKS, st.permutations([0, 1, 2, 3]), st.integers(1, 3))
def test_order_and_batches_do_not_change_the_result(maps, masks, order, batch):
    maps, masks = np.concatenate([maps, maps[::-1] + 1]), np.concatenate([masks, masks])
    types = ["cut", "good", "cut", "bent"]
    expected = metrics.segmentation_metrics(maps, masks, defect_types=types, curve_points=9)
    names = [types[i] for i in order]
    accumulator = accumulate(maps[order], masks[order], names, batch)
    assert_same(accumulator.result(curve_points=9), expected)


@pytest.mark.parametrize("kind", ["smooth", "tied", "saturated"])
def test_accumulator_equals_arrays_with_many_merges(kind):
    maps, masks, types = example(kind=kind)
    accumulator = accumulate(maps, masks, types, batch=1, max_pending=1000)
    accumulator.result()  # more can be added after a result
    accumulator.add(maps[:3], masks[:3], types[:3])
    expected = metrics.segmentation_metrics(
        np.concatenate([maps, maps[:3]]),
        np.concatenate([masks, masks[:3]]),
        defect_types=types + types[:3],
    )
    assert expected["exact"]
    assert_same(accumulator.result(), expected)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(MAPS, MASKS, st.integers(1, 30))
def test_error_bounds_hold_when_there_are_too_many_scores(maps, masks, max_scores):
    exact = metrics.segmentation_metrics(maps, masks)
    result = accumulate(maps, masks, batch=1, max_scores=max_scores).result()
    assert result["error_bounds"].keys() == set(NUMBERS)
    for name in NUMBERS:
        assert abs(result[name] - exact[name]) <= result["error_bounds"][name] + 1e-12


def test_dropped_bits_are_reported_and_cost_little():
    maps, masks, types = example(n=60, size=(64, 64))
    exact = metrics.segmentation_metrics(maps, masks, defect_types=types)
    result = accumulate(maps, masks, types, max_scores=60_000, max_pending=3000).result()
    assert exact["exact"] and not result["exact"] and 0 < result["score_bits_dropped"] < 15
    assert set(exact["error_bounds"].values()) == {0.0}
    for name in NUMBERS:
        assert 0 < result["error_bounds"][name] < 1e-3
        assert abs(result[name] - exact[name]) <= result["error_bounds"][name]
    # The reported threshold selects the very pixels that were counted.
    hit = maps >= np.float32(result["iou_threshold"])
    assert result["iou"] == pytest.approx((hit & masks).sum() / (hit | masks).sum(), abs=1e-12)


def test_memory_does_not_grow_with_the_number_of_images():
    maps, masks, _ = example(n=8, size=(32, 32))
    rng = np.random.default_rng(0)

    def peak(batches):
        accumulator = metrics.SegmentationAccumulator(max_scores=2**13, max_pending=2**13)
        tracemalloc.start()
        for _ in range(batches):
            accumulator.add(maps + rng.normal(size=maps.shape), masks)
        accumulator.result()
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    few, many = peak(20), peak(120)
    assert many < 1.2 * few < 120 * maps.nbytes / 2


def test_counts_go_beyond_the_integers_of_float32():
    side = 4100  # 16,810,000 pixels: adding ones in float32 stops at 16,777,216
    mask = np.zeros((1, side, side), bool)
    mask[0, 0, 0] = True
    maps = np.zeros(mask.shape, np.float32)
    accumulator = metrics.SegmentationAccumulator()
    accumulator.add(maps, mask)
    accumulator.add(maps[:, :10, :10], mask[:, :10, :10])
    result = accumulator.result()
    assert result["normal_pixels"] == side**2 + 100 - 2
    assert result["pixel_ap"] == pytest.approx(2 / (side**2 + 100), rel=1e-12)


def test_defect_type_is_computed_against_all_good_images():
    maps, masks, types = example()
    result = metrics.segmentation_metrics(maps, masks, defect_types=types, curve_points=20)
    assert list(result["defect_types"]) == ["cut", "scratch"]
    for name, of_type in result["defect_types"].items():
        chosen = [i for i, kind in enumerate(types) if kind in ("good", name)]
        alone = metrics.segmentation_metrics(maps[chosen], masks[chosen], curve_points=20)
        assert alone.pop("defect_types") == {}
        assert_same(of_type, alone)


def test_images_may_differ_in_size():
    maps, masks, _ = example(n=4)
    cut_maps = [maps[0], maps[1, :9], maps[2, :, :7], maps[3, :1, :1]]
    cut_masks = [masks[0], masks[1, :9], masks[2, :, :7], masks[3, :1, :1]]
    result = metrics.segmentation_metrics(cut_maps, cut_masks)
    truth = np.concatenate([mask.ravel() for mask in cut_masks])
    scores = np.concatenate([scores.ravel() for scores in cut_maps])
    assert result["pixel_auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(truth, scores))


def test_inputs_are_not_modified():
    maps, masks, _ = example(n=4)
    maps.flags.writeable = masks.flags.writeable = False
    before = maps.copy()
    metrics.segmentation_metrics(maps, masks)
    np.testing.assert_array_equal(maps, before)


def test_masks_of_0_and_255_equal_bool_masks():
    maps, masks, _ = example(n=4)
    assert_same(
        metrics.segmentation_metrics(maps, masks.astype(np.uint8) * 255),
        metrics.segmentation_metrics(maps, masks),
    )


def test_results_are_plain_json():
    maps, masks, types = example(n=6)
    result = metrics.segmentation_metrics(maps, masks, defect_types=types, curve_points=5)
    result |= metrics.image_metrics(maps.max((1, 2)), masks.any((1, 2)))
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_images_without_mask_are_left_out_and_counted():
    maps, masks, _ = example(n=6)
    expected = metrics.segmentation_metrics(maps[:4], masks[:4])
    maps[5] = np.nan  # does not matter: the image is not used
    result = metrics.segmentation_metrics(maps, [*masks[:4], None, None])
    assert result.pop("images_without_mask") == 2
    assert expected.pop("images_without_mask") == 0
    assert_same(result, expected)


ONES = np.ones((2, 4, 4), bool)
ONE_PIXEL = np.zeros((2, 4, 4), bool)
ONE_PIXEL[0, 1, 2] = True
RAMP = np.arange(32, dtype=np.float32).reshape(2, 4, 4)
NAN = np.where(np.arange(32).reshape(2, 4, 4) == 5, np.nan, RAMP)
HUGE = np.where(np.arange(32).reshape(2, 4, 4) == 5, 1e300, RAMP.astype(np.float64))


@pytest.mark.parametrize(
    ("maps", "masks", "reason"),
    [
        ([], [], "no images"),
        (np.zeros((0, 4, 4)), np.zeros((0, 4, 4), bool), "no images"),
        (RAMP, None, "none of the 2 images has a ground-truth mask"),
        (RAMP, ~ONES, "no defect pixels in the ground-truth masks"),
        (RAMP, ONES, "no defect-free pixels in the ground-truth masks"),
        (NAN, ONE_PIXEL, "1 pixels in the maps of 1 of 2 images are not finite"),
        (-np.inf * np.ones((2, 4, 4)), ONE_PIXEL, "32 pixels in the maps of 2 of 2 images"),
        (HUGE, ONE_PIXEL, "1 pixels in the maps of 1 of 2 images are not finite"),
        (np.zeros((1, 0, 4)), np.zeros((1, 0, 4), bool), "no defect pixels"),
    ],
)
def test_unavailable_metrics_are_none_with_a_reason(maps, masks, reason):
    result = metrics.segmentation_metrics(maps, masks, curve_points=5)
    for name in metrics.PIXEL_METRICS:
        assert result[name] is None
        assert reason in result["not_available"][name]
    assert result["curves"] == {}


def test_metrics_at_a_threshold_are_computed_where_possible():
    at = at_threshold(RAMP, ~ONES, 24)
    assert (at["false_positive_rate"], at["good_images_flagged"]) == (0.25, 0.5)
    assert at["iou"] is None and at["not_available"]["iou"] == pixel_tables.NO_DEFECTS
    at = at_threshold(RAMP, ONES, 24)
    assert (at["recall"], at["iou"], at["precision"]) == (0.25, 0.25, 1.0)
    assert at["false_positive_rate"] is None
    at = at_threshold(RAMP, ONE_PIXEL, 99)
    assert (at["recall"], at["iou"], at["f1"], at["precision"]) == (0.0, 0.0, 0.0, None)
    assert at["not_available"] == {"precision": "no pixel is at or above the threshold"}
    unusable = metrics.RegionCounts().metrics("no images")
    assert set(unusable["not_available"].values()) == {"no images"}


def test_a_single_pixel_of_defect_gives_numbers():
    result = metrics.segmentation_metrics(RAMP, ONE_PIXEL)
    assert result["not_available"] == {}
    assert result["pixel_auroc"] == pytest.approx(6 / 31)
    assert result["pixel_ap"] == pytest.approx(1 / 26)
    assert result["au_pro"] == 0.0


def test_no_good_images_gives_numbers_from_the_defective_ones():
    result = metrics.segmentation_metrics(RAMP[:1], ONE_PIXEL[:1], defect_types=["cut"])
    assert result["pixel_auroc"] == result["defect_types"]["cut"]["pixel_auroc"] == 6 / 15
    at = at_threshold(RAMP[:1], ONE_PIXEL[:1], 3)
    assert at["good_images_flagged"] is None and at["false_positive_rate"] == 12 / 15


def test_a_defect_without_mask_pixels_counts_as_defect_free_pixels():
    result = metrics.segmentation_metrics(RAMP, ONE_PIXEL, defect_types=["cut", "bent"])
    assert result["pixel_auroc"] == pytest.approx(6 / 31)
    assert result["defect_types"]["cut"]["pixel_auroc"] == pytest.approx(6 / 15)
    bent = result["defect_types"]["bent"]
    assert bent["pixel_auroc"] is None
    assert bent["not_available"]["au_pro"] == "no defect pixels in the ground-truth masks"


def test_non_finite_maps_affect_their_own_defect_type_only():
    maps = np.concatenate([RAMP, NAN])
    masks = np.concatenate([ONE_PIXEL, ONE_PIXEL])
    types = ["cut", "good", "bent", "good"]
    result = metrics.segmentation_metrics(maps, masks, defect_types=types)
    assert result["pixel_auroc"] is None
    assert "not finite" in result["defect_types"]["bent"]["not_available"]["iou"]
    assert result["defect_types"]["cut"]["pixel_auroc"] is not None


@pytest.mark.parametrize(
    ("maps", "masks", "types", "message"),
    [
        (RAMP, ONES[:1], None, "argument 2 is shorter"),
        (RAMP, ONES, ["cut"], "argument 3 is shorter"),
        (RAMP, ONES[:, :3], None, r"Map 0 has the shape \(4, 4\), its mask \(3, 4\)"),
        (RAMP[..., None], ONES[..., None], None, r"Map 0 has the shape \(4, 4, 1\)"),
    ],
)
def test_wrong_shapes_are_refused_before_anything_is_added(maps, masks, types, message):
    accumulator = metrics.SegmentationAccumulator()
    with pytest.raises(ValueError, match=message):
        accumulator.add(maps, masks, types)
    assert accumulator.result()["images"] == 0


@settings(deadline=None, derandomize=True)
@given(hnp.arrays(np.float32, (30,), elements=FLOATS))
def test_keys_keep_the_order_of_scores_and_convert_back(scores):
    scores = np.concatenate([scores, -scores]) + np.float32(0)
    keys = pixel_tables.keys_from_scores(scores)
    np.testing.assert_array_equal(pixel_tables.scores_from_keys(keys), scores)
    np.testing.assert_array_equal(keys[:, None] < keys[None], scores[:, None] < scores[None])


def test_curves_have_their_ends_their_area_and_no_more_points():
    maps, masks, _ = example(n=9, size=(48, 48))
    result = metrics.segmentation_metrics(maps, masks, curve_points=200)
    curves = result["curves"]
    for curve in curves.values():
        assert {len(axis) for axis in curve.values()} <= set(range(2, 201))
        assert len({len(axis) for axis in curve.values()}) == 1
    roc, pro = curves["roc"], curves["pro"]
    for x, y in (roc.values(), pro.values()):
        assert (x[0], y[0], x[-1], y[-1]) == (0.0, 0.0, 1.0, 1.0)
    area = np.trapezoid(roc["true_positive_rate"], roc["false_positive_rate"])
    assert area == pytest.approx(result["pixel_auroc"], abs=2e-3)
    assert curves["pr"]["recall"][-1] == 1.0
    assert curves["pr"]["precision"][-1] >= masks.mean()


@pytest.mark.parametrize("kind", ["smooth", "saturated"])
def test_iou_curve_is_the_iou_at_its_thresholds(kind):
    maps, masks, _ = example(kind=kind)
    curve = metrics.segmentation_metrics(maps, masks, curve_points=21)["curves"]["iou"]
    ends = (0.0, 1.0) if kind == "saturated" else (float(maps.min()), float(maps.max()))
    assert (curve["threshold"][0], curve["threshold"][-1]) == pytest.approx(ends)
    exact = [at_threshold(maps, masks, threshold)["iou"] for threshold in curve["threshold"]]
    assert_same(curve["iou"], exact)


RATES = st.sampled_from([0.0, 0.01, 0.05, 0.29, 0.5, 1.0])


@settings(deadline=None, max_examples=100, derandomize=True)
@given(MAPS, RATES)
def test_threshold_from_good_is_the_lowest_score_within_the_rate(maps, rate):
    maps = maps + np.float32(0)
    threshold = thresholds.threshold_from_good(maps, rate)
    assert np.mean(maps >= threshold) <= rate
    below = maps[maps < threshold]
    if below.size:
        assert np.mean(maps >= below.max()) > rate


@pytest.mark.parametrize("scores", [[], [0.1, np.nan], [np.inf]])
def test_threshold_from_good_is_none_without_finite_scores(scores):
    assert thresholds.threshold_from_good(np.array(scores), 0.1) is None


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_threshold_from_good_refuses_a_rate_outside_0_to_1(rate):
    with pytest.raises(ValueError, match=r"false_positive_rate must be in \[0, 1\]"):
        thresholds.threshold_from_good(np.ones(3), rate)


def test_image_metrics_worked_by_hand():
    result = metrics.image_metrics(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
    assert result["image_auroc"] == pytest.approx(3 / 4)
    assert result["image_ap"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["image_f1_max"] == pytest.approx(4 / 5)
    assert result["image_f1_max_threshold"] == 0.35
    assert result["not_available"] == {}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("scores", "labels", "reason"),
    [
        ([], [], "no images"),
        ([0.1, 0.2], [0, 0], "no defective images"),
        ([0.1, 0.2], [1, 1], "no good images"),
        ([0.1, np.nan, np.inf], [0, 1, 1], "the scores of 2 of 3 images are not finite"),
    ],
)
def test_image_metrics_are_none_with_a_reason(scores, labels, reason):
    result = metrics.image_metrics(np.array(scores), np.array(labels))
    for name in metrics.IMAGE_METRICS:
        assert result[name] is None
        assert result["not_available"][name] == reason


@pytest.mark.filterwarnings("error")
def test_image_metrics_when_the_highest_scores_are_good_images():
    result = metrics.image_metrics(np.array([0.9, 0.8, 0.1]), np.array([0, 0, 1]))
    assert result["image_f1_max"] == pytest.approx(1 / 2)


@pytest.mark.skipif(not FIXTURE.exists(), reason=f"{FIXTURE} is not there")
@pytest.mark.parametrize("source", ["arrays", "accumulator"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_shared_fixture(case, source):
    fixture = np.load(FIXTURE)
    maps, masks = fixture[f"{case}/maps"], fixture[f"{case}/masks"]
    if source == "arrays":
        result = metrics.segmentation_metrics(maps, masks)
    else:
        result = accumulate(maps, masks, batch=2).result()
    at = at_threshold(maps, masks, 0.5)
    image = metrics.image_metrics(maps.max((1, 2)), masks.any((1, 2)))
    values = {
        "au_pro_0.3": result["au_pro"],
        "au_pro_0.05": result["au_pro_0.05"],
        "pixel_iou_max": result["iou"],
        "pixel_iou_at_0.5": at["iou"],
        "image_mean_iou_at_0.5": at["mean_iou"],
        "image_auroc_sklearn": image["image_auroc"],
        "image_ap": image["image_ap"],
    }
    for name in ("pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_f1_max_threshold"):
        values[name] = result[name]
    for name, value in values.items():
        tolerance = 1e-6 if "au_pro" in name else 1e-9  # as its README states
        assert value == pytest.approx(float(fixture[f"{case}/{name}"]), abs=tolerance), name


@pytest.mark.parametrize("kind", ["smooth", "tied", "saturated"])
def test_agrees_with_adeval(kind, monkeypatch):
    pytest.importorskip("cv2")
    adeval = pytest.importorskip("adeval")
    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)  # gone from numpy 2.4
    maps, masks, _ = example(n=9, size=(64, 64), kind=kind)
    maps = np.round(maps, 3)  # wider than adeval's bins
    # adeval starts its curves at the highest score: unless that is a lone pixel, they lack an end.
    maps[-1, 0, 0] = 1.001 * maps.max()
    masks[-1, 0, 0] = True
    result = metrics.segmentation_metrics(maps, masks)
    # Its average precision joins the points of the curve by lines: not compared.
    auroc, _, au_pro = adeval.auroc_aupr_aupro(maps, masks.astype(np.uint8), nstrips=20_000)
    assert result["pixel_auroc"] == pytest.approx(auroc, abs=1e-6)
    assert result["au_pro"] == pytest.approx(au_pro, abs=1e-6)
