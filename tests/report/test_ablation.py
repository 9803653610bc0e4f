"""The table of an ablation, from results.json files, and the runs that it is made of."""

import json

import pytest

from anoseg_jax.evaluation import METRICS
from anoseg_jax.evaluation.results import mean_of
from anoseg_jax.report import ablation

NO_MASKS = "no defect is annotated"
EVERY_METRIC = ", ".join(METRICS)


def results_of(value, steps=4):
    """Every metric has the value; a None has a reason."""
    missing = dict.fromkeys(METRICS, NO_MASKS) if value is None else {}
    return {
        **dict.fromkeys(METRICS, value),
        "not_available": missing,
        "steps": steps,
        "train_seconds": 1.0,
    }


def write(folder, values):
    """Writes results.json of {category: value}."""
    folder.mkdir(parents=True)
    categories = {name: results_of(value) for name, value in values.items()}
    text = json.dumps({"categories": categories, "mean": mean_of(categories)})
    (folder / "results.json").write_text(text)


def as_markdown(table):
    made = {"image_size": [16, 20], "command": "python launch.py", "failures": []}
    return ablation.as_markdown(table | made)


@pytest.fixture
def two_variants(tmp_path):
    """Two categories, two seeds; the second variant is better by 0.2 on average."""
    for variant, seed, screw, tile in (
        ("baseline", 0, 0.2, 0.6),
        ("baseline", 1, 0.4, 0.4),
        ("more_parts", 0, 0.4, 0.6),
        ("more_parts", 1, 0.8, 0.6),
    ):
        write(tmp_path / variant / f"seed_{seed}", {"screw": screw, "tile": tile})
    return tmp_path


def test_mean_spread_and_difference_by_hand(two_variants):
    variants = ["baseline", "more_parts"]
    table = ablation.tabulate(two_variants, variants, ["screw", "tile"], (0, 1))
    first, second = (table["categories"]["screw"][name]["iou"] for name in variants)
    assert first["value"] == pytest.approx(0.3) and first["std"] == pytest.approx(0.2 / 2**0.5)
    assert first["difference"] is None and second["difference"] == pytest.approx(0.3)
    first, second = (table["mean"][name]["iou"] for name in variants)
    # Of the seeds' own means over categories: 0.4, 0.4 and 0.5, 0.7.
    assert first["seeds"] == pytest.approx([0.4, 0.4]) and first["std"] == pytest.approx(0)
    assert second["value"] == pytest.approx(0.6)
    assert second["std"] == pytest.approx(0.2 / 2**0.5)
    assert second["difference"] == pytest.approx(0.2)
    text = as_markdown(table)
    assert text.count("| 0.6000 ± 0.2828 (+0.3000) ") == len(METRICS)
    assert "| **mean** | + more parts | 0.6000 ± 0.1414 (+0.2000) |" in text
    assert "over 2 seeds (0, 1)" in text and "screw 4; tile 4. Images: 16x20." in text
    assert "Not available" not in text
    json.dumps(table, allow_nan=False)


def test_what_no_variant_can_have_is_left_out_of_the_mean(tmp_path):
    for variant, screw in (("baseline", 0.2), ("more_parts", 0.4)):
        write(tmp_path / variant, {"screw": screw, "bare": None})
    table = ablation.tabulate(tmp_path, ["baseline", "more_parts"], ["screw", "bare"])
    assert table["mean"]["more_parts"]["iou"]["value"] == 0.4
    text = as_markdown(table)
    assert "| bare | + more parts | - | - |" in text and " ± " not in text.split("\n\n")[1]
    assert f"- bare: {EVERY_METRIC}: {NO_MASKS}" in text
    assert "- **mean** of iou: over screw alone." in text


def test_what_is_not_finished_has_neither_value_nor_mean_nor_difference(two_variants):
    """Nor has the next row a difference to it: means of other seeds would flatter."""
    write(two_variants / "last" / "seed_0", {"screw": 0.5, "tile": 0.5})
    write(two_variants / "last" / "seed_1", {"tile": 0.5})
    (two_variants / "more_parts" / "seed_1" / "results.json").unlink()
    variants = ["baseline", "more_parts", "last"]
    table = ablation.tabulate(two_variants, variants, ["screw", "tile"], (0, 1))
    more, last = (table["categories"]["tile"][name]["iou"] for name in variants[1:])
    assert more["value"] is None and more["reason"] == "seed 1: not finished"
    assert last["value"] == 0.5 and last["difference"] is None
    assert table["mean"]["last"]["iou"]["reason"] == "no value in screw"
    text = as_markdown(table)
    assert f"- tile (+ more parts): {EVERY_METRIC}: seed 1" in text
    assert "- screw (+ more parts; + last): " in text
