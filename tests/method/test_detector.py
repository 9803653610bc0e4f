"""The image-level detector: its training, its scores, and the generator that it belongs to."""

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from killed import Killed, killed_after
from result_files import write_results

from anoseg_jax.deploy.trained_model import TrainedModel
from anoseg_jax.evaluation import evaluate
from anoseg_jax.evaluation.results import write_evaluation
from anoseg_jax.images import batches
from anoseg_jax.method import detector, models, predict, train, train_state
from anoseg_jax.running import checkpoint, loop

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)


def make_config(**changes):
    config = tiny_config.get_config("bolt")
    config.log_every = 1
    config.augment.flip_horizontal = True
    config.detector.enabled = True
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """A category's folder, and what `train.fit` returned."""
    folder = tmp_path_factory.mktemp("bolt")
    return folder, train.fit(make_config(), IMAGES, folder)


@pytest.fixture(scope="module")
def trained(generator):
    """What `detector.fit` returned; the generator is read from its folder, and stays as it is."""
    folder, _ = generator
    files = [path for path in sorted((folder / "checkpoints").rglob("*")) if path.is_file()]
    before = [path.read_bytes() for path in files]
    saved = detector.fit(make_config(), IMAGES, folder)
    assert [path.read_bytes() for path in files] == before
    return saved


@pytest.fixture(scope="module")
def predictor(generator, trained):
    return TrainedModel(generator[0], batch_size=4, detector=True)


def log_lines(folder):
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def initial_state():
    static, options = detector.split_options(make_config())
    create = train_state.jit_create(detector.create_state)
    return create(detector.seed_keys(0)[0], options, static=static, image_size=(32, 32))


def test_the_distance_by_hand_is_zero_for_equal_pairs():
    features = [jnp.ones((2, 4, 4, 3)), jnp.arange(2 * 8.0).reshape(2, 2, 2, 2)]
    np.testing.assert_array_equal(predict.feature_distance(features, features), [0, 0])
    moved = [features[0].at[1, 0, 0].add(4.0), features[1]]
    # 3 of 48 features of one of two levels are 4 away: the root of 3 * 16 / 48, halved.
    np.testing.assert_allclose(predict.feature_distance(features, moved), [0, 0.5])


def test_a_pair_that_is_reconstructed_exactly_scores_zero(trained):
    class Copy:
        def apply(self, variables, images, maps):
            return images, maps

    discriminator = models.create_discriminator(make_config().model)
    params = {"detector": {}, "discriminator": trained.state["discriminator"], "brightness": None}
    maps = jnp.full((4, 32, 32), 0.3)
    scores = predict.detect_fn(
        params, IMAGES[:4], maps, detector=Copy(), discriminator=discriminator
    )
    np.testing.assert_array_equal(scores, 0)


def test_it_trains_both_its_players_for_the_generator_of_its_record(trained, predictor):
    initial = initial_state()
    state, config, record, step = trained
    assert step == 4 and config["num_steps"] == 4
    for player in ("detector", "discriminator", "ema"):
        before, after = getattr(initial, player), state[player]
        assert checkpoint.arrays_sha256(before) != checkpoint.arrays_sha256(after)
    assert "memory_bank" not in state
    assert record["generator_sha256"] == predictor.weights_sha256
    assert record["thresholds"].keys() == {"image"} and record["train_seconds"] > 0
    _, held_out = train.split_images(make_config(), IMAGES)
    scores = predictor.detector(held_out, predictor(held_out)[0])
    assert record["thresholds"]["image"]["threshold"] == pytest.approx(scores.max(), rel=1e-5)


def test_the_maps_it_learns_from_are_leave_one_out(generator):
    """The images are in the bank; distances to themselves would hide what is unusual in them."""
    static, options = detector.split_options(make_config(**{"augment.flip_horizontal": False}))
    options |= predict.variables_of(generator[1].state)
    in_bank = np.unique(options["memory_bank"].fine.patch_image_ids)
    batch = {"image": IMAGES[in_bank], "image_id": in_bank.astype(np.int32)}
    make_examples = jax.jit(partial(detector.make_examples, static=static))
    maps = make_examples(jax.random.key(0), batch, options)["maps"]
    unknown = batch | {"image_id": np.full(len(in_bank), -1, np.int32)}
    assert np.mean(maps) > np.mean(make_examples(jax.random.key(0), unknown, options)["maps"])


def test_a_resumed_detector_equals_an_uninterrupted_one_to_the_bit(generator, trained, tmp_path):
    """Here the generator is not read again, but what `train.fit` returned is given."""
    fit = partial(detector.fit, make_config(), IMAGES, tmp_path, generator=generator[1])
    with pytest.raises(Killed):
        fit(make_batches=killed_after(3))
    assert fit().record["state_sha256"] == trained.record["state_sha256"]
    logs = [log_lines(folder / "detector") for folder in (tmp_path, generator[0])]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4]
    for line in itertools.chain(*logs):
        line.pop("images_per_second")
    assert logs[0] == logs[1]


def test_a_predictor_of_what_fit_returned_equals_that_of_the_folder(generator, trained, predictor):
    other = TrainedModel(generator[1], batch_size=4, detector=trained)
    for name in ("weights_sha256", "record", "config", "step"):
        assert getattr(other.detector, name) == getattr(predictor.detector, name)
    maps, _ = predictor(IMAGES)
    np.testing.assert_array_equal(other.detector(IMAGES, maps), predictor.detector(IMAGES, maps))


def test_the_number_of_devices_and_of_chunks_changes_nothing_but_rounding(generator, trained):
    """The first line of the log is of four devices; here the same step on one, in two chunks."""
    static, options = detector.split_options(make_config(accumulate=2))
    options |= predict.variables_of(generator[1].state)
    arrays, _ = train.split_images(make_config(), IMAGES)
    batch = next(batches.train_batches(arrays, 0, batch_size=4, seed=0))
    step = jax.jit(partial(detector.train_step, static=static, axis_name=None))
    _, metrics = step(initial_state(), batch, detector.seed_keys(0)[1], options)
    four_devices = log_lines(generator[0] / "detector")[0]
    assert {name for name in metrics if name.startswith("loss_")} == {
        *("loss_reconstruction", "loss_adversarial", "loss_discriminator", "loss_penalty")
    }
    for name, value in metrics.items():
        assert four_devices[name] == pytest.approx(float(value), rel=1e-5), name


def test_another_category_compiles_nothing_for_its_steps(generator, trained, tmp_path):
    """With other options that are arrays, after a category with equal static options."""
    compilations, before_steps = [], []

    def listen(event, *args, **kwargs):
        if event.endswith("backend_compile_duration"):
            compilations.append(event)

    def make_batches(arrays, start, **options):
        for batch in batches.train_batches(arrays, start, **options):
            before_steps.append(len(compilations))
            yield batch

    jax.monitoring.register_event_duration_secs_listener(listen)
    config = make_config(**{"augment.rotation": 5.0, "ema_decay": 0.5, "detector.num_steps": 6})
    detector.fit(config, IMAGES, tmp_path, generator=generator[1], make_batches=make_batches)
    assert len(before_steps) == 6 and len(set(before_steps)) == 1


@pytest.mark.parametrize("other", ["weights", "memory bank"])
def test_another_generator_is_refused_in_one_line(generator, trained, tmp_path, other):
    (tmp_path / "detector").symlink_to(generator[0] / "detector")
    state, config, record, step = generator[1]
    state = jax.tree.map(np.copy, state)
    if other == "weights":
        state["ema"] = jax.tree.map(lambda x: x + 1e-6, state["ema"])
    else:
        state["memory_bank"]["fine"]["patches"][0, 0] += 1e-3
    with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
        checkpoint.save(manager, state, step, config=config, record=record)
    for use in (
        lambda: detector.fit(make_config(), IMAGES, tmp_path),
        lambda: TrainedModel(tmp_path, detector=True),
    ):
        with pytest.raises(detector.DetectorError, match="remove that folder") as caught:
            use()
        assert "\n" not in str(caught.value)
    TrainedModel(tmp_path)


def test_other_options_of_the_detector_are_refused(generator, trained):
    config = make_config(**{"detector.learning_rate": 0.5, "detector.num_steps": 5})
    with pytest.raises(loop.TrainingError, match="learning_rate was"):
        detector.fit(config, IMAGES, generator[0])


def test_other_images_than_the_generators_are_refused(generator):
    with pytest.raises(detector.DetectorError, match="generator was trained on other images"):
        detector.fit(make_config(), IMAGES[::-1].copy(), generator[0])


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
    results_of = {}
    for kind in ("map", "detector"):
        evaluation = evaluate.evaluate(
            predictor, [batch], detector=predictor.detector, image_score=kind
        )
        results_of[kind] = results = evaluation.results
        scores = results["image_scores"]
        assert results["image_auroc"] == scores[kind]["image_auroc"]
        assert all(row["score"] == row[f"score_{kind}"] for row in evaluation.images)
        record = (predictor if kind == "map" else predictor.detector).record
        recorded = record["thresholds"]["image"]["threshold"]
        assert results["thresholds"]["image"]["threshold"] == recorded
        assert scores["detector"]["train_seconds"] > 0 and 0 < scores["detector"]["train_share"] < 1
    assert results_of["map"]["image_scores"] == results_of["detector"]["image_scores"]
    assert evaluation.images[0]["score_map"] != evaluation.images[0]["score_detector"]
    write_results(tmp_path, "bolt", results_of["map"], config="{}", command="")
    write_evaluation(tmp_path, evaluation, batch)
    assert "| image_auroc of | map | detector |" in (tmp_path / "results.md").read_text()
    header = (tmp_path / "images.csv").read_text().splitlines()[0]
    assert header == "name,defect_type,label,has_mask,score,score_map,score_detector,iou"
