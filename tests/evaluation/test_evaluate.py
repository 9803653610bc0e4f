"""Evaluation results: metrics, reasons for unavailable metrics, and the result files."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from result_files import write_results

from anoseg_jax.evaluation import METRICS, evaluate
from anoseg_jax.evaluation.results import write_evaluation
from anoseg_jax.images import drawing
from anoseg_jax.method import predict, thresholds
from anoseg_jax.report import pages, pictures


class FixedPredictor:
    """Returns the red channel of each image as its anomaly map."""

    image_size = (4, 4)
    weights_sha256 = "cafe"
    step = 3
    record = {"train_seconds": 1.5, "parameters": 2, "flops_per_image": 8.0}

    def __call__(self, images):
        maps = images[..., 0].astype(np.float32) / 255
        return maps, maps.max(axis=(1, 2))


def batch(*, reds, masks, labels, types):
    images = np.zeros((len(reds), 4, 4, 3), np.uint8)
    images[..., 0] = np.array(reds)
    known = [mask is not None for mask in masks]
    masks = [np.zeros((4, 4), bool) if mask is None else mask for mask in masks]
    names = [f"test/{kind}/{index}.png" for index, kind in enumerate(types)]
    return {
        "image": images,
        "mask": np.array(masks),
        "has_mask": np.array(known),
        "label": np.array(labels),
        "defect_type": np.array(types),
        "name": np.array(names),
    }


OF_MAPS = {"maps_dir": "M", "image_size": (4, 4), "top_fraction": 0.25}
CORNER = np.zeros((4, 4), bool)
CORNER[:2, :2] = True


@pytest.fixture
def small_batch():
    """Two black good images, and a defective one whose map has one false-positive pixel."""
    red = 200 * CORNER.astype(np.uint8)
    red[3, 3] = 200
    nothing = np.zeros((4, 4), np.uint8)
    return batch(
        reds=[nothing, nothing, red],
        masks=[np.zeros((4, 4), bool), np.zeros((4, 4), bool), CORNER],
        labels=[0, 0, 1],
        types=["good", "good", "dent"],
    )


def test_results_by_hand(small_batch):
    evaluation = evaluate.evaluate(FixedPredictor(), [small_batch])
    results = evaluation.results
    assert results["image_auroc"] == 1.0
    assert results["iou"] == pytest.approx(4 / 5)
    assert results["iou_threshold"] == pytest.approx(200 / 255)
    assert results["pixel_f1_max"] == pytest.approx(2 * 0.8 / 1.8)
    assert results["pixel_ap"] == pytest.approx(4 / 5)
    # 4 defective pixels; of 44 normal ones 1 ties with them and 43 are below.
    assert results["pixel_auroc"] == pytest.approx((43 + 0.5) / 44)
    assert results["not_available"] == {}
    assert [row["iou"] for row in evaluation.images] == [None, None, pytest.approx(4 / 5)]
    assert results["steps"] == 3 and results["train_seconds"] == 1.5
    assert results["params_sha256"] == "cafe"


def test_batches_do_not_change_the_results(small_batch):
    whole = evaluate.evaluate(FixedPredictor(), [small_batch]).results
    batches = [{key: values[i : i + 1] for key, values in small_batch.items()} for i in range(3)]
    assert evaluate.evaluate(FixedPredictor(), batches).results == whole


def test_without_masks_only_image_metrics_are_available(small_batch):
    small_batch["has_mask"][2] = False
    results = evaluate.evaluate(FixedPredictor(), [small_batch]).results
    assert results["image_auroc"] == 1.0
    assert results["pixel_auroc"] is None and results["pixel_auroc"] is None
    assert "defect" in results["not_available"]["pixel_auroc"]
    assert "image_auroc" not in results["not_available"]


def test_good_images_alone_have_no_auroc(small_batch):
    good = {key: values[:2] for key, values in small_batch.items()}
    results = evaluate.evaluate(FixedPredictor(), [good]).results
    assert results["image_auroc"] is None and results["iou"] is None
    assert set(METRICS) <= set(results["not_available"])


def test_no_test_images_at_all_are_null_with_a_reason():
    results = evaluate.evaluate(FixedPredictor(), []).results
    assert all(results[metric] is None for metric in METRICS)
    assert set(METRICS) <= set(results["not_available"])


def test_result_files_hold_all_categories_and_their_mean(small_batch, tmp_path):
    results = evaluate.evaluate(FixedPredictor(), [small_batch]).results
    worse = results | {"image_auroc": 0.5, "iou": None, "not_available": {"iou": "no masks"}}
    write_results(tmp_path, "bolt", results, config="{}", command="c")
    write_results(tmp_path, "nut", worse, config="{}", command="c")
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written["categories"]) == ["bolt", "nut"]
    assert written["mean"]["image_auroc"] == 0.75
    assert written["mean"]["iou"] == results["iou"]  # of those that have one
    assert len(written["config_sha256"]) == 64 and written["versions"]["jax"]
    table = (tmp_path / "results.md").read_text()
    assert "| nut | 0.5000 |" in table and "- nut: iou: no masks" in table
    assert not list(tmp_path.glob("*.tmp"))


def test_evaluation_files_are_written_completely(small_batch, tmp_path):
    evaluation = evaluate.evaluate(FixedPredictor(), [small_batch])
    write_evaluation(tmp_path, evaluation, small_batch)
    rows = list(csv.DictReader((tmp_path / "images.csv").open(newline="")))
    assert [row["name"] for row in rows] == list(small_batch["name"])
    assert rows[0]["iou"] == "" and float(rows[2]["iou"]) == pytest.approx(0.8)
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert set(curves) == {"roc", "pr", "pro", "iou", "image_roc", "image_pr"}
    assert curves["image_roc"]["true_positive_rate"] == [0, 1, 1]
    with np.load(tmp_path / "evaluation.npz") as arrays:
        np.testing.assert_array_equal(arrays["map"], small_batch["image"][..., 0])
        np.testing.assert_array_equal(arrays["mask"], small_batch["mask"])
        np.testing.assert_array_equal(arrays["region"], small_batch["image"][..., 0] >= 200)
    write_evaluation(tmp_path, evaluation, small_batch, store_maps=False)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"images.csv", "curves.json", "histograms.npz"}


def test_each_defect_type_is_measured_against_all_good_images(small_batch):
    worse = {key: np.concatenate([values, values[2:]]) for key, values in small_batch.items()}
    worse["defect_type"][3] = "scr"
    worse["image"][3] = 0  # a scratch that is not seen at all
    worse["has_mask"][3] = False
    types = evaluate.evaluate(FixedPredictor(), [worse]).results["defect_types"]
    assert types["dent"]["image_auroc"] == 1.0 and types["scr"]["image_auroc"] == 0.5
    assert types["dent"]["iou"] == pytest.approx(4 / 5) and types["dent"]["images"] == 1
    assert types["scr"]["iou"] is None and types["scr"]["not_available"]["iou"]


def test_pictures_show_best_worst_missed_and_false_alarms(tmp_path):
    flat, corner = np.ones((4, 4), np.uint8), CORNER.astype(np.uint8)
    images = batch(
        reds=[10 * flat, 10 * flat, 230 * flat, 250 * corner, 235 * flat, 220 * corner, 5 * flat],
        masks=[np.zeros((4, 4), bool)] * 3 + [CORNER] * 4,
        labels=[0, 0, 0, 1, 1, 1, 1],
        types=["good"] * 3 + ["dent"] * 4,
    )
    evaluation = evaluate.evaluate(FixedPredictor(), [images])
    assert evaluation.results["image_f1_max_threshold"] == pytest.approx(220 / 255)
    for _ in range(2):  # the second time replaces the first
        pictures.write_pictures(tmp_path / "pictures", evaluation, images, 1)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [
        "best_00_dent_3.png",
        "false_alarm_00_good_2.png",
        "missed_00_dent_6.png",
        "worst_00_dent_6.png",
    ]


def test_thresholds_match_the_requested_rates_on_good_images():
    maps = np.arange(1000.0).reshape(10, 10, 10) / 1000
    chosen = thresholds.thresholds_from_good(
        maps, maps.max(axis=(1, 2)), pixel_rate=0.01, image_rate=0.2, what="good images"
    )
    assert np.mean(maps >= chosen["pixel"]["threshold"]) == pytest.approx(0.01)
    assert np.sum(maps.max(axis=(1, 2)) >= chosen["image"]["threshold"]) == 2
    assert chosen["image"]["images"] == 10 and "20%" in chosen["image"]["how"]
    few = thresholds.thresholds_from_good(
        maps[:2], np.ones(2), pixel_rate=0.01, image_rate=0.05, what="good images"
    )
    assert few["image"]["threshold"] > 1 and "above all 2 good images" in few["image"]["how"]
    # None of 2: a rate of 1 - 0.05 ** (1 / 2) has none with a probability of 5 %.
    assert few["image"]["how"].endswith("up to 78% may reach it")
    assert thresholds.highest_rate(2, 10) == pytest.approx(0.507, abs=1e-3)  # Clopper, Pearson
    assert thresholds.highest_rate(3, 3) == 1


def test_verdicts_at_a_threshold_by_hand(small_batch):
    predictor = FixedPredictor()
    predictor.record = predictor.record | {
        "thresholds": {
            "pixel": {"threshold": 0.5, "how": "held out"},
            "image": {"threshold": 0.9, "how": "held out"},
        }
    }
    results = evaluate.evaluate(predictor, [small_batch]).results["thresholds"]
    assert results["pixel"]["iou"] == pytest.approx(4 / 5)
    assert results["pixel"]["precision"] == pytest.approx(4 / 5)
    assert results["image"]["missed"] == 1 and results["image"]["precision"] is None
    user = evaluate.evaluate(predictor, [small_batch], image_threshold=0.0).results["thresholds"]
    assert user["image"]["false_alarms"] == 2 and user["image"]["precision"] == pytest.approx(1 / 3)
    assert "set by the user" in user["image"]["how"] and user["pixel"]["how"] == "held out"


def test_native_size_measures_at_the_size_of_the_masks(small_batch):
    large = [np.kron(mask, np.ones((3, 5), bool)) for mask in small_batch["mask"]]
    evaluation = evaluate.evaluate(FixedPredictor(), [small_batch], native_masks=large)
    assert evaluation.results["defect_pixels"] == 4 * 15
    # The only image with a defect, or with a pixel at or above the threshold.
    assert evaluation.images[2]["iou"] == evaluation.results["iou"] > 0.5
    assert evaluation.regions.shape == (3, 4, 4) and evaluation.regions[2].any()


class NarrowPredictor(FixedPredictor):
    """Maps from 0.0001 to 0.0015, as after few steps: none reaches half of 1 / 255."""

    def __call__(self, images):
        maps, _ = super().__call__(images)
        maps = (0.0001 + 0.0014 * maps).astype(np.float32)
        return maps, maps.max(axis=(1, 2))


@pytest.mark.parametrize("native", [False, True])
def test_maps_in_a_narrow_range_have_one_iou_in_all_files_and_regions(
    small_batch, tmp_path, native
):
    """With a pixel threshold from good images, too."""
    small_batch["image"][2, 3, 3] = 0  # without it, the map finds the defect exactly
    masks = None
    if native:
        masks = [np.kron(mask, np.ones((2, 2), bool)) for mask in small_batch["mask"]]
    evaluation = evaluate.evaluate(
        NarrowPredictor(), [small_batch], native_masks=masks, pixel_threshold=0.0005
    )
    iou = evaluation.results["iou"]
    assert iou == 1.0 if not native else iou > 0.7  # enlarging blurs the edge
    assert [row["iou"] for row in evaluation.images] == [None, None, iou]
    assert evaluation.maps.max() == 0
    assert not evaluation.regions[:2].any() and evaluation.regions[2, 0, 0]
    if not native:
        np.testing.assert_array_equal(evaluation.regions[2], CORNER)
    folder = tmp_path / "bolt"
    folder.mkdir()
    write_evaluation(folder, evaluation, small_batch)
    assert float((folder / "images.csv").read_text().splitlines()[-1].split(",")[-1]) == iou
    write_results(tmp_path, "bolt", evaluation.results, config="{}", command="c")
    pages.write_run(tmp_path)
    page = (folder / "report.html").read_text()
    assert f"IoU {iou:.3f}" in page and f"{evaluation.results['iou_threshold']:.4g}" in page
    pictures.write_pictures(folder / "pictures", evaluation, small_batch, 1)
    sheet = np.asarray(Image.open(folder / "pictures" / "best_00_dent_2.png"))
    found = sheet[40:, -264:].reshape(-1, 3)  # the last panel
    assert (found == drawing.FOUND).all(axis=1).any()


def test_scores_of_one_8_bit_level_are_told_apart(small_batch):
    class Predictor(FixedPredictor):
        def __call__(self, images):
            maps = np.full(images.shape[:3], 0.5, np.float32)
            maps[2, :2, :2] = np.nextafter(np.float32(0.5), 1)
            return maps, maps.max(axis=(1, 2))

    evaluation = evaluate.evaluate(Predictor(), [small_batch])
    assert evaluation.images[2]["iou"] == 1.0
    np.testing.assert_array_equal(evaluation.regions, small_batch["mask"])


def test_a_single_pixel_of_a_large_mask_is_drawn(small_batch):
    large = [np.zeros((400, 400), bool) for _ in range(3)]
    large[2][333, 77] = True
    maps = [10.0 * mask.astype(np.float32) for mask in large]
    evaluation = evaluate.evaluate_maps(maps, [small_batch], native_masks=large, **OF_MAPS)
    assert evaluation.images[2]["iou"] == 1.0
    assert np.argwhere(evaluation.regions).tolist() == [[2, 3, 0]]


def test_without_a_best_iou_the_pixel_threshold_gives_regions_and_ious(small_batch):
    good = {key: values[:2] for key, values in small_batch.items()}
    good["image"][1, 0, 0] = 200
    evaluation = evaluate.evaluate(FixedPredictor(), [good], pixel_threshold=0.5)
    assert [row["iou"] for row in evaluation.images] == [None, 0.0]
    assert np.argwhere(evaluation.regions).tolist() == [[1, 0, 0]]
    shown = evaluation.results["shown_thresholds"]
    assert shown["region"]["threshold"] == 0.5 and "set by the user" in shown["region"]["how"]
    assert shown["image"] == {
        "threshold": None,
        "how": "not available: no defective images",
    }
    evaluation = evaluate.evaluate(FixedPredictor(), [good])
    assert evaluation.results["shown_thresholds"]["region"]["threshold"] is None
    assert evaluation.images[1]["iou"] is None and not evaluation.regions.any()


@pytest.mark.filterwarnings("error")
def test_maps_that_are_not_finite_have_no_iou(small_batch):
    class Predictor(FixedPredictor):
        def __call__(self, images):
            maps, scores = super().__call__(images)
            maps[2, 0, 0] = np.nan
            return maps, scores

    evaluation = evaluate.evaluate(Predictor(), [small_batch], pixel_threshold=0.5)
    assert evaluation.results["iou"] is None and evaluation.images[2]["iou"] is None
    at_threshold = evaluation.results["thresholds"]["pixel"]
    assert at_threshold["iou"] is None and "not finite" in at_threshold["not_available"]["iou"]


def test_a_threshold_outside_of_all_scores_is_a_warning(small_batch, tmp_path, capsys):
    def warnings(**thresholds):
        results = evaluate.evaluate(FixedPredictor(), [small_batch], **thresholds).results
        write_results(tmp_path, "bolt", results, config="{}", command="c")
        printed = capsys.readouterr().err.splitlines()
        assert printed == [f"warning: bolt: {line}" for line in results["warnings"]]
        return results["warnings"]

    assert warnings(image_threshold=0.5, pixel_threshold=0.0) == []
    (low,) = warnings(image_threshold=-1.0)
    assert low.startswith("the image threshold -1, set by the user")
    assert low.endswith("outside of all image scores, 0 to 0.7843: every image counts as defective")
    image, pixel = sorted(warnings(image_threshold=5.0, pixel_threshold=0.9))
    assert "no image counts as defective" in image and "no pixel counts as defective" in pixel


def test_legal_names_of_any_length_give_distinct_picture_names(small_batch, tmp_path):
    stem = "é裂" * 50  # 250 bytes
    small_batch["name"] = np.array([f"test/{stem}/{stem}{i}.png" for i in range(3)])
    evaluation = evaluate.evaluate(FixedPredictor(), [small_batch])
    for count in (0, 1, 2):
        pictures.write_pictures(tmp_path / "pictures", evaluation, small_batch, count)
    names = [path.name for path in (tmp_path / "pictures").iterdir()]
    assert len(names) == 2 and all(len(name.encode()) <= 255 for name in names)
    shortened = {pictures.picture_name("best_00", name) for name in small_batch["name"]}
    assert len(shortened) == 3 and all(len(name.encode()) <= 255 for name in shortened)
    # Names that are not UTF-8, as os.listdir returns them.
    assert pictures.picture_name("best_00", "test/dent/\udcff.png") == "best_00_dent_\udcff.png"


def test_pictures_that_cannot_be_written_leave_the_earlier_ones(small_batch, tmp_path):
    evaluation = evaluate.evaluate(FixedPredictor(), [small_batch])
    pictures.write_pictures(tmp_path / "pictures", evaluation, small_batch, 1)
    before = sorted((tmp_path / "pictures").iterdir())
    small_batch["name"] = np.array(["test/dent/nul\0.png"] * 3)
    with pytest.raises((OSError, ValueError)):
        pictures.write_pictures(
            tmp_path / "pictures",
            evaluate.evaluate(FixedPredictor(), [small_batch]),
            small_batch,
            1,
        )
    assert sorted((tmp_path / "pictures").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_the_image_score_is_the_mean_of_the_highest_pixels():
    maps = jnp.arange(16.0).reshape(1, 4, 4)
    assert predict.image_scores(maps, 0.25)[0] == pytest.approx((12 + 13 + 14 + 15) / 4)
    assert predict.image_scores(maps, 1e-9)[0] == 15
    # The same light on all of a map makes no difference.
    heights = predict.peak_over_median(jnp.concatenate([maps, maps + 7]), 0.25)
    np.testing.assert_allclose(heights, [13.5 - 7.5] * 2)


class TopPredictor(FixedPredictor):
    """As FixedPredictor, with image scores computed from the maps."""

    def __call__(self, images):
        maps, _ = super().__call__(images)
        return maps, np.asarray(predict.image_scores(jnp.asarray(maps), 0.25))


OF_A_MODEL = ("params_sha256", "steps", "train_seconds", "parameters", "flops_per_image")


@pytest.mark.parametrize("native", [False, True])
def test_external_maps_have_the_same_metrics_as_a_predictor(small_batch, native):
    masks = (
        [np.kron(mask, np.ones((3, 5), bool)) for mask in small_batch["mask"]] if native else None
    )
    batches = [{key: values[i : i + 2] for key, values in small_batch.items()} for i in (0, 2)]
    expected = evaluate.evaluate(TopPredictor(), batches, native_masks=masks)
    maps, scores = TopPredictor()(small_batch["image"])
    given = evaluate.evaluate_maps(maps, batches, native_masks=masks, **OF_MAPS)
    assert [row["score"] for row in given.images] == [row["score"] for row in expected.images]
    assert given.curves == expected.curves
    differ = {k for k, v in expected.results.items() if given.results[k] != v}
    assert differ == {*OF_A_MODEL, "thresholds", "shown_thresholds"}
    assert all(given.results[key] is None for key in OF_A_MODEL)
    # With other scores and another range, rank metrics and pictures of the maps stay the same.
    scaled = evaluate.evaluate_maps(
        1e4 * maps - 77, batches, scores=np.array([3.0, 2, 1]), native_masks=masks, **OF_MAPS
    )
    for metric in ("pixel_auroc", "pixel_ap", "iou", "au_pro"):
        assert scaled.results[metric] == pytest.approx(expected.results[metric], abs=1e-6)
    assert scaled.results["image_auroc"] == 0.0
    np.testing.assert_array_equal(scaled.maps, given.maps)
    assert scaled.maps.min() == 0 and scaled.maps.max() == 255


def test_maps_of_another_size_are_resized(small_batch):
    small = [image_map[::2, ::2] for image_map in TopPredictor()(small_batch["image"])[0]]
    given = evaluate.evaluate_maps(small, [small_batch], **OF_MAPS)
    assert given.maps.shape == (3, 4, 4) and given.results["normal_pixels"] == 44


def test_display_scale_gives_rare_scores_high_levels_and_keeps_the_order():
    maps = np.arange(10_000.0, dtype=np.float32).reshape(1, 100, 100) ** 2
    scale = evaluate.scale_of(maps)
    levels = evaluate.to_display_scale(np.sort(maps.ravel()), scale)
    assert np.all(np.diff(levels) > 0) and (levels[0], levels[-1]) == (0, 1)
    assert evaluate.to_display_scale(maps[0, 99, 0], scale) == pytest.approx(0.5, abs=0.01)
    assert evaluate.to_display_scale(5.0, evaluate.scale_of(np.full((2, 3, 3), 5.0))) == 0
    assert evaluate.to_display_scale(0.3, None) == 0.3 and len(evaluate.scale_of([])["scores"]) == 1


def test_baselines_are_in_the_results_of_the_model(small_batch, tmp_path):
    train = np.zeros((2, 4, 4, 3), np.uint8)
    baselines = evaluate.evaluate_baselines(train, [small_batch], top_fraction=0.25)
    # The red of the defect is the only difference to the mean: as good as the model.
    assert baselines["distance_to_mean"]["iou"] == pytest.approx(4 / 5)
    assert baselines["z_score"]["image_auroc"] == 1.0
    nothing = evaluate.evaluate_baselines(train, [], top_fraction=0.25)["pca_patches"]
    assert nothing["iou"] is None and nothing["not_available"]["iou"]
    results = evaluate.evaluate(FixedPredictor(), [small_batch]).results
    results |= {"baselines": baselines, "iou": 0.1, "train_seconds": None}
    write_results(tmp_path, "bolt", results, config="{}", command="c")
    table = (tmp_path / "results.md").read_text()
    assert "| - |" in table.splitlines()[2] and "| bolt | pca_patches |" in table
    assert "| **0.8000** |" in next(line for line in table.splitlines() if "z_score" in line)
