"""Results of several seeds as one, by hand."""

import json

import numpy as np
import pytest

from anoseg_jax.evaluation import METRICS
from anoseg_jax.evaluation.results import as_markdown, mean_of, mean_over_seeds


def seed_results(iou, *, auroc=0.5, sha="a", **more):
    category = {name: auroc for name in METRICS} | {
        "iou": iou,
        "not_available": {} if iou is not None else {"iou": "broken"},
        "test_images": 160,
        "error_bounds": {"iou": 0.0},
        "defect_types": {"dent": {"images": 3, "iou": iou, "not_available": {}}},
        "params_sha256": sha,
        "train_seconds": 2.0,
        "note": sha,
        **more,
    }
    categories = {"screw": category}
    return {"categories": categories, "mean": mean_of(categories), "device": "cpu"}


def test_mean_over_seeds_by_hand():
    combined = mean_over_seeds({1: seed_results(0.4, sha="b"), 0: seed_results(0.2)})
    screw = combined["categories"]["screw"]
    assert screw["iou"] == pytest.approx(0.3)
    assert screw["iou_std"] == pytest.approx(np.sqrt(2 * 0.1**2))
    assert screw["image_auroc"] == 0.5 and screw["image_auroc_std"] == 0
    assert screw["seeds"] == [0, 1] and screw["params_sha256"] == ["a", "b"]
    assert screw["test_images"] == 160 and screw["note"] == ["a", "b"]
    assert screw["error_bounds"] == {"iou": 0.0}
    assert screw["defect_types"]["dent"]["images"] == 3
    assert screw["defect_types"]["dent"]["iou"] == pytest.approx(0.3)
    assert screw["not_available"] == {}
    assert combined["seeds"] == [0, 1] and combined["device"] == "cpu"
    assert combined["mean"]["iou"] == pytest.approx(0.3)
    assert combined["mean"]["iou_std"] == screw["iou_std"]


def test_mean_over_seeds_is_results_in_shape():
    combined = mean_over_seeds({seed: seed_results(0.1 * seed) for seed in range(3)})
    assert mean_of(combined["categories"]) == {m: combined["mean"][m] for m in METRICS}
    assert "| screw | 0.5000 ± 0.0000 |" in as_markdown(combined)
    assert "0.1000 ± 0.1000" in as_markdown(combined)
    json.dumps(combined, allow_nan=False)


def test_baselines_have_mean_and_spread_over_seeds():
    by_seed = {}
    for seed, iou in ((0, 0.2), (1, 0.4)):
        by_seed[seed] = seed_results(0.3)
        aurocs = dict.fromkeys(METRICS, 0.1) | {"iou": iou, "image_auroc": None}
        aurocs["not_available"] = {"image_auroc": "no good images"}
        by_seed[seed]["categories"]["screw"]["baselines"] = {"z_score": aurocs}
    both = mean_over_seeds(by_seed)
    z_score = both["categories"]["screw"]["baselines"]["z_score"]
    assert z_score["iou"] == pytest.approx(0.3) and z_score["image_auroc"] is None
    assert z_score["not_available"]["image_auroc"] == "no good images"
    assert "| z_score | - | 0.1000 ± 0.0000 |" in as_markdown(both)


def test_one_seed_has_no_spread():
    combined = mean_over_seeds({7: seed_results(0.2)})
    screw = combined["categories"]["screw"]
    assert screw["iou"] == 0.2 and screw["iou_std"] is None
    assert screw["not_available"]["iou_std"] == "one seed"
    assert combined["mean"]["iou_std"] is None and screw["params_sha256"] == ["a"]


def test_a_metric_that_one_seed_lacks_has_no_mean():
    combined = mean_over_seeds({0: seed_results(0.2), 3: seed_results(None)})
    screw = combined["categories"]["screw"]
    assert screw["iou"] is None and screw["iou_std"] is None
    assert screw["not_available"] == {"iou": "seed 3: broken", "iou_std": "seed 3: broken"}
    assert combined["mean"]["iou"] is None and combined["mean"]["iou_std"] is None
    assert "- screw: iou: seed 3: broken" in as_markdown(combined)
    both = mean_over_seeds({0: seed_results(None), 3: seed_results(None)})
    assert both["categories"]["screw"]["not_available"]["iou"] == "broken"


def test_a_category_that_one_seed_lacks_names_the_others():
    more = seed_results(0.4)
    more["categories"]["tile"] = seed_results(0.6)["categories"]["screw"]
    more["mean"] = mean_of(more["categories"])
    combined = mean_over_seeds({0: more, 1: seed_results(0.2)})
    assert combined["categories"]["tile"]["seeds"] == [0]
    assert combined["mean"]["iou"] == pytest.approx(0.45)
    assert combined["mean"]["iou_std"] is None  # the seeds' means are over other categories
