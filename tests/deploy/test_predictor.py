"""The predictor of scripts: files, arrays and folders of any size to scores, maps, regions."""

import shutil

import numpy as np
import pytest
from part_images import draw_part
from PIL import Image

from anoseg_jax.deploy.model_folder import ModelError
from anoseg_jax.deploy.prediction import Prediction, Region, Thresholds, Unreadable, find_regions
from anoseg_jax.deploy.predictor import Predictor
from anoseg_jax.images.decode import LayoutError


@pytest.fixture(scope="module")
def predictor(workdir):
    return Predictor(workdir)


THRESHOLDS = Thresholds(image=1.0, pixel=0.5)


def prediction_of(model_map, size, thresholds=THRESHOLDS, score=3.0):
    image = np.zeros((*model_map.shape, 3), np.uint8)
    return Prediction("a.png", score, thresholds, size, 0.0, image, model_map.astype(np.float32))


def test_a_file_an_array_and_a_pil_image_of_it_give_the_same_prediction(predictor, photographs):
    path = photographs / "monday" / "a.png"
    of_file = predictor(path)
    image = Image.open(path)
    for other in (predictor(str(path)), predictor(np.asarray(image)), predictor(image)):
        assert other.score == of_file.score
        np.testing.assert_array_equal(other.anomaly_map, of_file.anomaly_map)
    assert of_file.name == str(path) and of_file.size == (40, 60)


def test_photographs_are_resized_with_bilinear_interpolation_of_pillow(predictor):
    image = draw_part(1, (75, 50))
    resized = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR))
    maps, scores = predictor.compute(resized[None])
    assert predictor(image).score == scores[0]
    np.testing.assert_array_equal(predictor(image).model_map, maps[0])


def test_exif_orientation_is_applied(predictor, tmp_path):
    image = draw_part(2, (40, 60), defect=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(np.rot90(image)).save(tmp_path / "turned.png", exif=exif)
    assert predictor(tmp_path / "turned.png").score == predictor(image).score


def test_several_photographs_are_a_list_in_their_order(predictor, photographs):
    images = [draw_part(seed, (30 + seed, 40)) for seed in range(7)]
    scores = [prediction.score for prediction in predictor(images)]
    np.testing.assert_allclose(scores, [predictor(image).score for image in images], rtol=1e-6)
    assert len(set(scores)) == 7
    same_size = np.stack([draw_part(seed) for seed in range(3)])
    assert [x.score for x in predictor(same_size)] == [predictor(x).score for x in same_size]
    names = [prediction.name for prediction in predictor(photographs)]
    assert names == sorted(map(str, photographs.rglob("*.*")))


def test_the_prediction_has_map_mask_regions_and_verdict_at_the_photographs_size():
    small = np.zeros((8, 8))
    small[2:4, 4:7] = 1.0
    prediction = prediction_of(small, (16, 32))
    assert prediction.anomaly_map.shape == prediction.mask.shape == (16, 32)
    assert prediction.mask.sum() == prediction.regions[0].area
    region = prediction.regions[0]
    assert (region.x, region.width) == pytest.approx((16, 12), abs=1)
    assert (region.y, region.height) == pytest.approx((4, 4), abs=1)
    assert prediction.is_defective and prediction.verdict == "defective"
    assert prediction.normalized_score == 0.75


def test_at_the_threshold_a_score_is_defective_and_normalized_to_one_half():
    prediction = prediction_of(np.zeros((8, 8)), (8, 8), Thresholds(3.0, 0.5))
    assert prediction.is_defective and prediction.normalized_score == 0.5
    assert prediction.regions == [] and not prediction.mask.any()


def test_without_thresholds_there_is_a_score_and_no_verdict():
    prediction = prediction_of(np.ones((8, 8)), (8, 8), Thresholds(None, None))
    assert prediction.is_defective is None and prediction.verdict == ""
    assert prediction.normalized_score is None and prediction.mask is None
    assert prediction.regions == []


def test_regions_touch_at_corners_and_the_largest_comes_first():
    mask = np.zeros((6, 8), bool)
    mask[0, 0] = True
    mask[2:4, 2:4] = mask[4, 4] = True
    assert find_regions(mask) == [Region(5, 2, 2, 3, 3), Region(1, 0, 0, 1, 1)]


def test_an_unreadable_photograph_is_named_and_the_stream_goes_on(predictor, photographs):
    (photographs / "monday" / "broken.png").write_bytes(b"")
    with pytest.raises(LayoutError, match="broken.png: is empty"):
        predictor(photographs)
    results = list(predictor.stream(map(str, sorted(photographs.rglob("*.*")))))
    assert [isinstance(result, Unreadable) for result in results] == [False, False, True] + 3 * [
        False
    ]


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_photograph_is_refused(predictor, image):
    with pytest.raises(ValueError, match="a photograph must"):
        predictor(image)


def test_more_than_8_bits_are_scaled_by_the_bit_depth_of_the_training_images(
    workdir, predictor, tmp_path
):
    grey = draw_part(5)[..., 0]
    wide = grey.astype(np.uint16) * 16  # 12 bits
    Image.fromarray(wide).save(tmp_path / "wide.png")
    as_12_bits = np.round(wide * (255 / 4095)).astype(np.uint8)
    assert predictor(wide).score == predictor(tmp_path / "wide.png").score
    assert predictor(wide).score == predictor(as_12_bits).score  # the smallest that holds it
    other = Predictor(workdir)
    other.reading = other.reading._replace(bit_depth=16)
    assert other(wide).score == predictor(np.round(wide * (255 / 65535)).astype(np.uint8)).score
    other.reading = other.reading._replace(bit_depth=10)
    with pytest.raises(LayoutError, match="wide.png: has values up to .* bit_depth=10"):
        other(tmp_path / "wide.png")


def test_grey_arrays_are_photographs(predictor):
    grey = draw_part(3)[..., 0]
    assert predictor(grey).score == predictor(np.repeat(grey[..., None], 3, axis=2)).score


def test_thresholds_are_the_models_unless_given(workdir, predictor):
    recorded = predictor.model.record["thresholds"]
    assert predictor.thresholds.image == recorded["image"]["threshold"]
    assert predictor.thresholds.pixel == recorded["pixel"]["threshold"]
    mine = Predictor(workdir, image_threshold=2.5)
    assert mine.thresholds == (2.5, recorded["pixel"]["threshold"])
    assert "set by the user" in mine.threshold_sources["image"]
    with pytest.raises(ValueError, match="pixel_threshold=128"):
        Predictor(workdir, pixel_threshold=128)


def test_recalibrated_thresholds_are_kept_beside_the_model_and_belong_to_its_weights(
    workdir, tmp_path
):
    shutil.copytree(workdir / "bolt", tmp_path / "bolt")
    predictor = Predictor(tmp_path / "bolt")
    good = [draw_part(seed, (40, 40)) for seed in range(100, 112)]
    made = predictor.recalibrate(good)
    scores = [prediction.score for prediction in predictor(good)]
    assert made.image > max(scores)  # of 12 images none may be above at a rate of 5 %
    again = Predictor(tmp_path / "bolt")
    assert again.thresholds == made and "12 good images" in again.threshold_sources["image"]
    assert again.thresholds != Predictor(workdir).thresholds
    text = (tmp_path / "bolt" / "thresholds.json").read_text()
    changed = text.replace(predictor.model.weights_sha256, "0" * 64)
    (tmp_path / "bolt" / "thresholds.json").write_text(changed)
    assert Predictor(tmp_path / "bolt").thresholds == Predictor(workdir).thresholds
    with pytest.raises(ValueError, match="photographs of good parts"):
        predictor.recalibrate([])


def test_the_model_is_looked_for_in_runs_seeds_and_variants(workdir, tmp_path):
    weights = Predictor(workdir / "bolt").model.weights_sha256
    run = tmp_path / "run"
    shutil.copytree(workdir / "bolt", run / "seed_0" / "bolt")
    assert Predictor(run).model.weights_sha256 == weights
    assert Predictor(run / "seed_0", category="bolt").model.weights_sha256 == weights
    shutil.copytree(workdir / "bolt", run / "seed_1" / "bolt")
    with pytest.raises(ModelError, match="several models of bolt.*seed_0.*seed_1"):
        Predictor(run)
    shutil.copytree(workdir / "bolt", run / "seed_1" / "nut")
    with pytest.raises(ModelError, match="bolt, nut: choose one, for example --category=bolt"):
        Predictor(run)
    assert Predictor(run, category="nut").folder.name == "nut"
    for missing, message in ((tmp_path, "ring"), (tmp_path / "none", "is not a folder")):
        with pytest.raises(ModelError, match=message):
            Predictor(missing, category="ring")


def test_plot_is_a_figure_with_photograph_map_and_edges(predictor):
    figure = predictor(draw_part(4, (40, 60), defect=True)).plot()
    assert [axes.get_title() for axes in figure.axes] == ["photograph", "anomaly map", "found"]
