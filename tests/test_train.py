"""The step and the loop: the same on any number of devices, and after any interruption."""

import contextlib
import itertools
import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anoseg_jax import evaluate
from anoseg_jax.method import models, predict, train, train_state
from anoseg_jax.running import checkpoint, train_log
from configs import test as test_config

ROOT = Path(__file__).resolve().parents[1]
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)


def make_config(**changes):
    config = test_config.get_config("bolt")
    config.augment.flip_horizontal = True
    config.update_from_flattened_dict(changes)
    return config


def batches(start, images=IMAGES):
    """The batch of each step, by the step's number alone."""
    for step in itertools.count(start):
        yield np.roll(images, step, axis=0)[:4]


def make_parts():
    """Of the preset with a kind of defects that takes from other images of the batch."""
    return train.create_parts(make_config(**{"defects.preset": "default"}))


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture(scope="module")
def initial(parts):
    return jax.device_get(parts.create_state(IMAGES[:8]))


def run_steps(parts, initial, devices, steps=20):
    """Returns the last state and each step's metrics [steps], on that many devices."""
    pmapped = jax.pmap(
        parts.train_step,
        axis_name="batch",
        in_axes=(None, 0, None),
        out_axes=(None, 0),
        devices=jax.devices()[:devices],
    )
    state, history = initial, []
    for step in range(steps):
        shards = np.roll(IMAGES, step, axis=0).reshape(devices, -1, 32, 32, 3)
        state, metrics = pmapped(state, shards, jax.random.key(7))
        history.append(jax.tree.map(lambda x: x[0].item(), jax.device_get(metrics)))
    return state, {name: [metrics[name] for metrics in history] for name in history[0]}


@pytest.fixture(scope="module")
def four_devices(parts, initial):
    return run_steps(parts, initial, 4)


EIGHT_DEVICES = """
import json, sys
sys.path.insert(0, "tests")
import jax, test_train
parts = test_train.make_parts()
initial = jax.device_get(parts.create_state(test_train.IMAGES))
print(json.dumps(test_train.run_steps(parts, initial, 8)[1]))
"""


def on_eight_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    program = [sys.executable, "-c", EIGHT_DEVICES]
    done = subprocess.run(
        program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_number_of_devices_changes_nothing_but_rounding(parts, initial, devices, four_devices):
    """Eight examples a step on 1, 2, 4 and 8 devices."""
    found = on_eight_devices() if devices == 8 else run_steps(parts, initial, devices)[1]
    assert found.keys() == four_devices[1].keys()
    for name, expected in four_devices[1].items():
        np.testing.assert_allclose(found[name][0], expected[0], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(found[name], expected, rtol=1e-3, err_msg=name)


def test_after_a_step_all_replicas_of_all_leaves_are_equal_to_the_byte(four_devices):
    state, _ = four_devices
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        replicas = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == 4
        assert len(replicas) == 1, jax.tree_util.keystr(path)


def test_a_step_moves_both_players_and_the_average_follows_slowly(initial, four_devices):
    state = jax.device_get(four_devices[0])
    assert state.step == 20

    def distance(a, b):
        return sum(np.abs(x - y).sum() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    assert distance(initial.generator, state.generator) > 0
    assert distance(initial.discriminator, state.discriminator) > 0
    assert 0 < distance(initial.ema, state.ema) < distance(initial.generator, state.generator)


def test_each_player_follows_its_own_loss_alone(parts, initial):
    """The two gradients of the step are those of two separate losses."""
    good, defective, masks, marks = parts.draw_examples(jax.random.key(0), IMAGES[:2], 0)
    keywords = parts.train_step.keywords
    loss_fn = partial(
        train.loss_fn,
        good=good,
        defective=defective,
        masks=masks,
        marks=marks,
        **{name: keywords[name] for name in ("generator", "discriminator", "loss")},
    )

    @jax.jit
    def both(g, d):
        _, gradients_of, _ = jax.vjp(loss_fn, g, d, has_aux=True)
        one, zero = jnp.ones(()), jnp.zeros(())
        separate = (
            jax.grad(lambda p: loss_fn(p, d)[0][0])(g),
            jax.grad(lambda p: loss_fn(g, p)[0][1])(d),
        )
        return (gradients_of((one, zero))[0], gradients_of((zero, one))[1]), separate

    shared, separate = both(initial.generator, initial.discriminator)
    players = (initial.generator, initial.discriminator)
    learned = jax.tree.leaves([train_state.is_learned(params) for params in players])
    assert not all(learned)  # the patch memory
    leaves = (jax.tree.leaves(side) for side in (shared, separate))
    for a, b, changes in zip(*leaves, learned, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert np.any(b) == changes or b.size < 64


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ({}, {"segmentation", "reconstruction", "adversarial", "discriminator"}),
        ({"adversarial_weight": 0.0}, {"segmentation", "reconstruction"}),
        ({"adversarial_weight": 0.0, "reconstruction_weight": 0.0}, {"segmentation"}),
    ],
)
def test_a_loss_without_weight_is_not_computed(weights, names):
    config = make_config(**{f"loss.{name}": value for name, value in weights.items()})
    parts = train.create_parts(config)
    step = partial(parts.train_step, axis_name=None)
    state = jax.eval_shape(parts.create_state, IMAGES[:4])
    _, metrics = jax.eval_shape(step, state, IMAGES[:4], jax.random.key(0))
    assert {k.removeprefix("loss_") for k in metrics if k.startswith("loss_")} == names


def test_training_leaves_the_patch_memories_as_they_were_to_the_bit(parts, initial):
    state, _ = run_steps(parts, initial, devices=2, steps=2)
    for name in ("PatchMemory_0", "PatchMemory_1"):
        before = initial.generator[name]
        for after in (state.generator[name], state.ema[name]):
            jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(after))


def test_the_memories_are_of_the_images_as_they_are(initial):
    """Not of mirrored ones, which training sees as well."""
    plain = IMAGES / np.float32(255)
    for index, images in enumerate((plain, models.halve(plain))):
        memory = initial.generator[f"PatchMemory_{index}"]["memory"]
        found, _ = models.describe_patches(images, patch=models.PATCH, stride=models.STRIDE)
        codes = (found.reshape(-1, found.shape[-1]) - memory["mean"]) @ memory["basis"]
        to_each = np.linalg.norm(codes[:, None] - memory["patches"][:, :-2], axis=-1)
        np.testing.assert_allclose(to_each.min(axis=0), 0, atol=1e-3)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    schedule = train_state.learning_rate_schedule(1.0, num_steps=100, warmup=10)
    np.testing.assert_allclose(schedule(0), 1 / 11, rtol=1e-6)
    np.testing.assert_allclose([schedule(10), schedule(55), schedule(100)], [1, 0.5, 0], atol=1e-6)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train.fit(make_config(), batches, folder)
    return folder


def log_lines(folder):
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def test_the_log_has_a_line_every_n_steps_with_all_its_keys(uninterrupted):
    lines = log_lines(uninterrupted)
    assert [line["step"] for line in lines] == [2, 4, 6]
    keys = {"step", "learning_rate", "images_per_second", *train_log.LOSSES}
    assert all(keys <= line.keys() for line in lines)
    assert all(isinstance(line[key], float) for line in lines for key in keys - {"step"})


def test_a_finished_run_is_not_trained_again(uninterrupted):
    def never(start):
        raise AssertionError(f"asked for batches after step {start}")

    before = (uninterrupted / "train_log.jsonl").read_text()
    assert int(train.fit(make_config(), never, uninterrupted).step) == 6
    assert (uninterrupted / "train_log.jsonl").read_text() == before


class Killed(Exception):
    """Stands for the end of the process: nothing after it runs."""


def killed_after(steps):
    def killed_batches(start):
        yield from itertools.islice(batches(start), steps)
        raise Killed

    return killed_batches


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(uninterrupted, tmp_path):
    with pytest.raises(Killed):
        train.fit(make_config(), killed_after(5), tmp_path)
    assert [line["step"] for line in log_lines(tmp_path)] == [2, 4]
    # As if it had been killed after a line that no checkpoint covers, and while writing another.
    with (tmp_path / "train_log.jsonl").open("a") as log:
        log.write('{"step": 5, "loss_segmentation": 1.0}\n{"step": 6, "lo')
    train.fit(make_config(), batches, tmp_path)
    for name in ("state", "log"):
        if name == "log":
            a, b = log_lines(tmp_path), log_lines(uninterrupted)
            for line in (*a, *b):
                line.pop("images_per_second")
            assert a == b
        else:
            a, b = (
                evaluate.params_sha256(checkpoint.restore_variables(folder / "checkpoints")[0])
                for folder in (tmp_path, uninterrupted)
            )
            assert a == b


def test_config_resume_continues_another_workdir(uninterrupted, tmp_path):
    config = make_config(num_steps=8, resume=str(uninterrupted))
    seen = []

    def noted(start):
        seen.append(start)
        return batches(start)

    assert int(train.fit(config, noted, tmp_path).step) == 8
    assert seen == [6]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train.fit(make_config(resume="nowhere"), batches, tmp_path / "other")


def compilations_of_the_step(config, batches_of, folder):
    """Runs `fit` and returns how often what jax.pmap made of the step was compiled."""
    names = []

    class Collector(logging.Handler):
        def emit(self, record):
            if "Finished XLA compilation of" in record.getMessage():
                names.append(record.getMessage().split()[4])

    logger, collector = logging.getLogger("jax"), Collector()
    logger.addHandler(collector)
    try:
        with jax.log_compiles(), contextlib.suppress(Killed):
            train.fit(config, batches_of, folder)
    finally:
        logger.removeHandler(collector)
    return sum("_fun" in name or "train_step" in name for name in names)


def test_the_step_compiles_once_also_after_resuming(tmp_path):
    assert compilations_of_the_step(make_config(), killed_after(4), tmp_path) == 1
    assert compilations_of_the_step(make_config(), batches, tmp_path) == 1


def test_other_options_than_the_checkpoints_are_refused_with_the_difference(uninterrupted):
    config = make_config(learning_rate=0.5, num_steps=9, log_every=3)
    with pytest.raises(train.TrainingError, match=r"learning_rate was 0\.001, is 0\.5") as caught:
        train.fit(config, batches, uninterrupted)
    assert "num_steps" not in str(caught.value) and "log_every" not in str(caught.value)


def test_other_images_than_the_checkpoints_are_refused(uninterrupted):
    message = "other images_sha256: None, now abababababab; put back what it was trained with"
    with pytest.raises(train.TrainingError, match=message):
        train.fit(make_config(num_steps=9), batches, uninterrupted, images_sha256="ab" * 32)


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    config = make_config(**{"log_every": 3, "num_steps": 9, "clip_norm": 1.0})
    real = train.train_step

    def poisoned(state, images, key, **kwargs):
        new, metrics = real(state, images, key, **kwargs)
        loss = jnp.where(state.step == 4, jnp.nan, metrics["loss_segmentation"])
        return new, metrics | {"loss_segmentation": loss}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", poisoned)
        with pytest.raises(train.TrainingError, match="not finite at step 5: loss_segmentation;"):
            train.fit(config, batches, tmp_path)
    assert checkpoint.restore_variables(tmp_path / "checkpoints")[3] == 4


def test_check_finite_names_the_first_step_and_all_that_is_wrong_there():
    metrics = {
        "a": np.array([1.0, np.inf, np.nan]),
        "b": np.array([1.0, np.nan, 1.0]),
        "c": np.array([1.0, 2.0, np.nan]),
    }
    with pytest.raises(train.TrainingError, match="step 19: a, b;"):
        train.check_finite(metrics, 20)
    train.check_finite({"c": metrics["c"][:2]}, 20)


def test_batches_that_end_early_are_an_error(tmp_path):
    with pytest.raises(train.TrainingError, match="ended at step 3"):
        train.fit(make_config(), lambda start: itertools.islice(batches(start), 3), tmp_path)


def test_a_predictor_pads_the_last_batch_and_refuses_other_images(uninterrupted):
    predictor = predict.Predictor(uninterrupted)
    maps, scores, reconstructions = predictor(IMAGES[:5])
    assert maps.shape == (5, 32, 32) and scores.shape == (5,)
    assert reconstructions.shape == (5, 32, 32, 3)
    assert 0 <= maps.min() and maps.max() <= 1
    np.testing.assert_allclose(predictor(IMAGES[4:5])[0][0], maps[4], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"uint8 \[b, 32, 32, 3\].*float64 \[1, 32, 32, 3\]"):
        predictor(np.zeros((1, 32, 32, 3)))
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        predict.Predictor(uninterrupted / "other")


def test_without_tensorflow_the_core_trains_on_arrays_and_predicts(tmp_path):
    program = """
import sys
from importlib.machinery import PathFinder

class WithoutTensorFlow(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "tensorboard"):
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [WithoutTensorFlow if f is PathFinder else f for f in sys.meta_path]
import itertools
import numpy as np
from anoseg_jax import options
from anoseg_jax.method import predict, train
from configs import test

config = test.get_config("bolt")
config.num_steps = 2
options.check(config)
images = np.zeros((4, 32, 32, 3), np.uint8)
train.fit(config, lambda start: itertools.repeat(images), sys.argv[1])
maps, scores, _ = predict.Predictor(sys.argv[1])(images)
assert maps.shape == (4, 32, 32) and np.isfinite(scores).all()
assert not [name for name in sys.modules if name.split(".")[0].startswith("tensorflow")]
print("trained and predicted")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("trained and predicted\n"), done.stderr
