"""Pixels to ignore count neither way: metrics are those of the other pixels alone."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from anoseg_jax.evaluation import evaluate

SIZE = (12, 16)


@pytest.mark.parametrize("native", [False, True])
def test_the_metrics_are_those_of_the_other_pixels(native):
    rng = np.random.default_rng(0)
    maps, masks, ignored = rng.random((3, *SIZE), np.float32), np.zeros((3, *SIZE), bool), None
    masks[1, 2:6, 3:9] = masks[2, 8:, 8:] = True
    maps[masks] += 0.2
    ignored = np.zeros((3, *SIZE), bool)
    ignored[:, 4:10, 5:12] = True
    maps[0, 5, 6] = 9.0  # in a good image, where nothing counts
    batch = {
        "mask": masks,
        "has_mask": np.ones(3, bool),
        "label": np.array([0, 1, 1]),
        "defect_type": np.array(["good", "hole", "hole"]),
        "name": np.array(["a", "b", "c"]),
    }
    options = {"native_masks": list(masks), "native_ignored": list(ignored)} if native else {}
    unknown = dict.fromkeys(("pixel", "image"), {"threshold": None, "how": "none"})
    evaluation = evaluate.measure(
        [(batch | ({} if native else {"ignore": ignored}), maps, {"map": maps.max((1, 2))})],
        metadata={"thresholds": unknown},
        image_size=SIZE,
        pixel_threshold=0.6,
        **options,
    )
    results, counted = evaluation.results, ~ignored
    truth, scores = masks[counted], maps[counted]
    assert results["pixel_auroc"] == pytest.approx(roc_auc_score(truth, scores))
    assert results["pixel_ap"] == pytest.approx(average_precision_score(truth, scores))
    assert results["defect_pixels"] == truth.sum()
    found = scores >= np.float32(0.6)
    iou = (found & truth).sum() / (found | truth).sum()
    assert results["thresholds"]["pixel"]["iou"] == pytest.approx(iou)
    best = np.float32(results["iou_threshold"])
    for row, image_map, mask, out in zip(evaluation.images, maps, masks, ignored, strict=True):
        region = (image_map >= best) & ~out
        union = (region | (mask & ~out)).sum()
        expected = (region & mask).sum() / union if union else None
        assert row["iou"] == (None if expected is None else pytest.approx(expected))
