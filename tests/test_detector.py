"""The image-level detector: what it learns, what it leaves alone, and whose it is."""

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anoseg_jax import evaluate
from anoseg_jax.method import detector, models, predict, train
from anoseg_jax.running import checkpoint
from configs import test as test_config

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)


def make_config(**changes):
    config = test_config.get_config("bolt")
    config.log_every = 1
    config.augment.flip_horizontal = True
    config.detector.enabled = True
    config.update_from_flattened_dict(changes)
    return config


def batches(start, images=IMAGES):
    """The batch of each step, by the step's number alone."""
    for step in itertools.count(start):
        yield np.roll(images, step, axis=0)[:4]


class Killed(Exception):
    """Stands for the end of the process: nothing after it runs."""


def killed_after(steps):
    def killed_batches(start):
        yield from itertools.islice(batches(start), steps)
        raise Killed

    return killed_batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A category with a generator; its detector is killed once and resumed."""
    folder = tmp_path_factory.mktemp("bolt")
    train.fit(make_config(), batches, folder)
    files = sorted((folder / "checkpoints").rglob("*"))
    before = [path.read_bytes() for path in files if path.is_file()]
    with pytest.raises(Killed):
        detector.fit(make_config(), killed_after(3), folder, held_out=IMAGES[:2])
    detector.fit(make_config(), batches, folder, held_out=IMAGES[:2])
    assert [path.read_bytes() for path in files if path.is_file()] == before
    return folder


@pytest.fixture(scope="module")
def predictor(folder):
    return predict.Predictor(folder, batch_size=4, detector=True)


def test_the_distance_by_hand_is_zero_for_equal_pairs():
    features = [jnp.ones((2, 4, 4, 3)), jnp.arange(2 * 8.0).reshape(2, 2, 2, 2)]
    np.testing.assert_array_equal(predict.feature_distance(features, features), [0, 0])
    moved = [features[0].at[1, 0, 0].add(4.0), features[1]]
    # 3 of 48 features of one of two levels are 4 away: the root of 3 * 16 / 48, halved.
    np.testing.assert_allclose(predict.feature_distance(features, moved), [0, 0.5])


def test_a_pair_that_is_reconstructed_exactly_scores_zero(predictor):
    class Copy:
        def apply(self, variables, images, maps):
            return images, maps

    discriminator = models.create_detector(make_config().model, make_config().detector)[1]
    maps = jnp.full((4, 32, 32), 0.3)
    scores = predict.detect_fn(
        predictor.detector.params, IMAGES[:4], maps, detector=Copy(), discriminator=discriminator
    )
    np.testing.assert_array_equal(scores, 0)


def test_it_trains_both_its_players_and_not_the_generator(folder, predictor):
    generator, _, _, _ = checkpoint.restore_variables(folder / "checkpoints")
    parts = detector.create_parts(make_config(), generator)
    initial = jax.device_get(parts.create_state(IMAGES[:4]))
    state, config, record, step = checkpoint.restore_newest(folder / "detector" / "checkpoints")
    assert step == 4 and config["num_steps"] == 4
    for player in ("generator", "discriminator", "ema"):
        before, after = getattr(initial, player), state[player]
        assert checkpoint.params_sha256(before) != checkpoint.params_sha256(after)
    assert record["generator_sha256"] == checkpoint.params_sha256(generator)
    assert record["thresholds"].keys() == {"image"} and record["train_seconds"] > 0
    held_out = predictor.detector(IMAGES[:2], predictor(IMAGES[:2])[0])
    assert record["thresholds"]["image"]["threshold"] == pytest.approx(held_out.max(), rel=1e-5)


def test_a_resumed_detector_equals_an_uninterrupted_one_to_the_bit(folder, tmp_path):
    (tmp_path / "checkpoints").symlink_to(folder / "checkpoints")
    detector.fit(make_config(), batches, tmp_path)
    whole, resumed = (
        checkpoint.restore_newest(path / "detector" / "checkpoints")[0]
        for path in (tmp_path, folder)
    )
    assert checkpoint.params_sha256(whole) == checkpoint.params_sha256(resumed)
    lines = [
        [json.loads(line) for line in (path / "detector" / "train_log.jsonl").open()]
        for path in (tmp_path, folder)
    ]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4]
    for line in itertools.chain(*lines):
        line.pop("images_per_second")
    assert lines[0] == lines[1]


def test_the_number_of_devices_changes_nothing_but_rounding(folder):
    """The first line of the log is of four devices; here the same step on one."""
    generator = checkpoint.restore_variables(folder / "checkpoints")[0]
    parts = detector.create_parts(make_config(), generator)
    state = parts.create_state(IMAGES[:4])
    step = jax.jit(partial(parts.train_step, axis_name=None))
    _, metrics = step(state, IMAGES[:4], parts.draw_key, *parts.frozen)
    of_four = json.loads((folder / "detector" / "train_log.jsonl").read_text().splitlines()[0])
    assert {name for name in metrics if name.startswith("loss_")} == {
        *("loss_reconstruction", "loss_adversarial", "loss_discriminator")
    }
    for name, value in metrics.items():
        assert of_four[name] == pytest.approx(float(value), rel=1e-5), name


def test_another_generator_is_refused_in_one_line(folder, tmp_path):
    (tmp_path / "detector").symlink_to(folder / "detector")
    state, config, record, step = checkpoint.restore_newest(folder / "checkpoints")
    state["ema"] = jax.tree.map(lambda x: x + 1e-6, state["ema"])
    with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
        checkpoint.save(manager, state, step, config=config, record=record)
    for use in (
        lambda: detector.fit(make_config(), batches, tmp_path),
        lambda: predict.Predictor(tmp_path, detector=True),
    ):
        with pytest.raises(predict.DetectorError, match="remove that folder") as caught:
            use()
        assert "\n" not in str(caught.value)
    predict.Predictor(tmp_path)


def test_other_options_of_the_detector_are_refused(folder):
    with pytest.raises(train.TrainingError, match="learning_rate was"):
        detector.fit(make_config(**{"detector.learning_rate": 0.5}), batches, folder)


def test_results_have_both_scores_and_those_that_are_asked_for_on_top(predictor, tmp_path):
    rng = np.random.default_rng(1)
    batch = {
        "image": rng.integers(0, 256, (6, 32, 32, 3), np.uint8),
        "mask": np.zeros((6, 32, 32), bool),
        "has_mask": np.zeros(6, bool),
        "label": np.array([0, 0, 0, 1, 1, 1]),
        "defect_type": np.array(["good"] * 3 + ["dent"] * 3),
        "name": np.array([f"{index}.png" for index in range(6)]),
    }
    both = {}
    for kind in ("map", "detector"):
        evaluation = evaluate.evaluate(
            predictor, [batch], detector=predictor.detector, image_score=kind
        )
        both[kind] = results = evaluation.results
        scores = results["image_scores"]
        assert results["image_auroc"] == scores[kind]["image_auroc"]
        assert all(row["score"] == row[f"score_{kind}"] for row in evaluation.images)
        record = (predictor if kind == "map" else predictor.detector).record
        made = record["thresholds"]["image"]["threshold"]
        assert results["thresholds"]["image"]["threshold"] == made
        assert scores["detector"]["train_seconds"] > 0 and 0 < scores["detector"]["train_share"] < 1
    assert both["map"]["image_scores"] == both["detector"]["image_scores"]
    assert evaluation.images[0]["score_map"] != evaluation.images[0]["score_detector"]
    evaluate.write_results(tmp_path, "bolt", both["map"], config="{}", command="")
    evaluate.write_evaluation(tmp_path, evaluation, batch)
    assert "| image_auroc of | map | detector |" in (tmp_path / "results.md").read_text()
    header = (tmp_path / "images.csv").read_text().splitlines()[0]
    assert header == "name,defect_type,label,has_mask,score,score_map,score_detector,iou"
