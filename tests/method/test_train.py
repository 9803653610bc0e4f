"""The step on several devices and the loop: logs, checkpoints, resuming, one compilation."""

import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from anoseg_jax.deploy.predictor import Predictor
from anoseg_jax.images import batches
from anoseg_jax.method import losses, memory_bank, train, train_state
from anoseg_jax.running import checkpoint, loop, train_log

ROOT = Path(__file__).resolve().parents[2]
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
KEY = jax.random.key(7)


def make_config(**changes):
    config = tiny_config.get_config("bolt")
    config.augment.flip_horizontal = True
    config.update_from_flattened_dict(changes)
    return config


def make_parts():
    """Returns static options, arrays and a state, of the preset with all kinds of defects.

    One of them takes from other images of the batch.
    """
    config = make_config(**{"defects.preset": "default"})
    static, options = train_state.split_options(config)
    state = train_state.create_state(KEY, options, static=static, image_size=(32, 32))
    bank = train.build_memory_bank(config, IMAGES, np.arange(8, dtype=np.int32))
    return static, options, jax.device_get(state.replace(memory_bank=bank))


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture(scope="module")
def initial(parts):
    return parts[2]


def run_steps(static, options, initial, *, devices, steps=20):
    """Returns the last state and each step's metrics [steps], on that many devices."""
    pmapped = jax.pmap(
        partial(train.train_step, static=static),
        axis_name="batch",
        in_axes=(None, 0, None, None),
        out_axes=(None, 0),
        devices=jax.devices()[:devices],
    )
    state, history = initial, []
    for step in range(steps):
        rows = np.roll(np.arange(8), step).reshape(devices, -1)
        batch = {"image": IMAGES[rows], "image_id": rows.astype(np.int32)}
        state, metrics = pmapped(state, batch, KEY, options)
        history.append(jax.tree.map(lambda x: x[0].item(), jax.device_get(metrics)))
    return state, {name: [metrics[name] for metrics in history] for name in history[0]}


@pytest.fixture(scope="module")
def four_devices(parts):
    return run_steps(*parts, devices=4)


def run_with_devices(devices, program, *arguments):
    """Returns what a program prints in its last line, as JSON, on that many virtual devices."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    paths = "import json, sys; sys.path[:0] = ['tests', 'tests/method']; import test_train\n"
    done = subprocess.run(
        [sys.executable, "-c", paths + program, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


EIGHT_DEVICES = """
print(json.dumps(test_train.run_steps(*test_train.make_parts(), devices=8)[1]))
"""


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_number_of_devices_changes_nothing_but_rounding(parts, devices, four_devices):
    """Eight examples a step on 1, 2, 4 and 8 devices."""
    if devices == 8:
        metrics = run_with_devices(8, EIGHT_DEVICES)
    else:
        _, metrics = run_steps(*parts, devices=devices)
    assert metrics.keys() == four_devices[1].keys()
    for name, expected in four_devices[1].items():
        np.testing.assert_allclose(metrics[name][0], expected[0], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-3, err_msg=name)


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


def test_training_leaves_the_memory_bank_as_it_was_to_the_bit(initial, four_devices):
    after = jax.device_get(four_devices[0].memory_bank)
    jax.tree.map(np.testing.assert_array_equal, after, initial.memory_bank)


def test_the_memory_bank_is_of_the_images_as_they_are(initial):
    """Not of mirrored ones, which training sees as well."""
    plain = IMAGES / np.float32(255)
    grid = memory_bank.PatchGrid(8, 2)
    bank = initial.memory_bank
    for scale, images in ((bank.fine, plain), (bank.coarse, memory_bank.halve(plain))):
        x, _ = memory_bank.embed_patches(images, grid)
        codes = (x.reshape(-1, x.shape[-1]) - scale.mean) @ scale.basis
        to_each = np.linalg.norm(codes[:, None] - scale.patches[:, :-2], axis=-1)
        np.testing.assert_allclose(to_each.min(axis=0), 0, atol=1e-3)


def test_training_distances_are_leave_one_out_by_the_ids_of_the_batch(parts):
    static, _, state = parts
    ids = np.array([3, 0, 3], np.int32)
    images = jnp.asarray(IMAGES[:3] / np.float32(255))
    expected = memory_bank.standardized_distances(
        state.memory_bank.fine, images, ids, grid=static.grid
    )
    distances = train.bank_distances(state, images, ids, static=static)
    np.testing.assert_allclose(distances, expected, atol=1e-4)
    assert train.bank_distances(state, images, ids, static=static._replace(grid=None)) is None


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train.fit(make_config(), IMAGES, folder)
    return folder


def log_lines(folder):
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def test_the_log_has_a_line_every_n_steps_with_all_its_keys(uninterrupted):
    lines = log_lines(uninterrupted)
    assert [line["step"] for line in lines] == [2, 4, 6]
    keys = {"step", "learning_rate", "images_per_second", *train_log.LOSSES}
    assert all(keys <= line.keys() for line in lines)
    assert all(isinstance(line[key], float) for line in lines for key in keys - {"step"})


class Killed(Exception):
    """Stands for the end of the process: nothing after it runs."""


def killed_after(steps):
    def make_batches(arrays, start, **options):
        yield from itertools.islice(batches.train_batches(arrays, start, **options), steps)
        raise Killed

    return make_batches


def starts_of(starts):
    """Returns a `make_batches` that adds the number of steps done to the list `starts`."""

    def make_batches(arrays, start, **options):
        starts.append(start)
        return batches.train_batches(arrays, start, **options)

    return make_batches


def test_a_finished_run_is_not_trained_again(uninterrupted):
    before, starts = (uninterrupted / "train_log.jsonl").read_text(), []
    state = train.fit(make_config(), IMAGES, uninterrupted, make_batches=starts_of(starts))
    assert int(state.step) == 6 and not starts
    assert (uninterrupted / "train_log.jsonl").read_text() == before


def test_images_keep_their_ids_and_those_held_out_are_not_trained_on(tmp_path):
    images = IMAGES.copy()
    images[6] = images[2]
    ids = batches.assign_image_ids(images)
    kept, held_out = batches.hold_out(ids, fraction=0.4, seed=0)
    arrays = {}

    def make_batches(given, start, **options):
        arrays.update(given)
        raise Killed

    with pytest.raises(Killed):
        train.fit(make_config(), images, tmp_path, make_batches=make_batches)
    assert len(held_out) >= 2 and not set(ids[kept]) & set(ids[held_out])
    np.testing.assert_array_equal(arrays["image"], images[kept])
    np.testing.assert_array_equal(arrays["image_id"], np.where(kept == 6, 2, kept))


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(uninterrupted, tmp_path):
    with pytest.raises(Killed):
        train.fit(make_config(), IMAGES, tmp_path, make_batches=killed_after(5))
    assert [line["step"] for line in log_lines(tmp_path)] == [2, 4]
    # As if it had been killed after a line that no checkpoint covers, and while writing another.
    with (tmp_path / "train_log.jsonl").open("a") as log:
        log.write('{"step": 5, "loss_segmentation": 1.0}\n{"step": 6, "lo')
    train.fit(make_config(), IMAGES, tmp_path)
    resumed, complete = (
        checkpoint.restore_newest(folder / "checkpoints") for folder in (tmp_path, uninterrupted)
    )
    assert resumed.record["state_sha256"] == complete.record["state_sha256"]
    logs = log_lines(tmp_path), log_lines(uninterrupted)
    for line in itertools.chain(*logs):
        line.pop("images_per_second")
    assert logs[0] == logs[1]


def largest_difference(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(np.abs(a - b).max() for a, b in pairs)


@pytest.mark.parametrize("change", ["nothing", "images", "seed", "held_out"])
def test_config_resume_continues_another_workdir(uninterrupted, tmp_path, change):
    """With other images, another seed or `held_out` the memory bank is built anew."""
    images = IMAGES[::-1].copy() if change == "images" else IMAGES
    config = make_config(num_steps=7, resume=str(uninterrupted))
    config.update({"seed": {"seed": 3}, "held_out": {"held_out": 0.2}}.get(change, {}))
    starts = []
    state = train.fit(config, images, tmp_path, make_batches=starts_of(starts))
    state = jax.device_get(state)
    assert state.step == 7 and starts == [6] and [x["step"] for x in log_lines(tmp_path)] == [7]
    before = checkpoint.restore_newest(uninterrupted / "checkpoints").state
    # One step further, not from the beginning: Adam moves a weight by about the learning rate.
    rate = log_lines(tmp_path)[0]["learning_rate"]
    assert 0 < largest_difference(state.generator, before["generator"]) < 2 * rate
    kept, _ = batches.hold_out(np.arange(len(images)), fraction=config.held_out, seed=config.seed)
    fresh = train.build_memory_bank(config, images[kept], kept.astype(np.int32))
    jax.tree.map(np.testing.assert_array_equal, state.memory_bank, fresh)
    old = memory_bank.from_dicts(before["memory_bank"])
    same = np.array_equal(old.fine.patches, fresh.fine.patches)
    assert same == (change == "nothing")


def test_a_workdirs_own_checkpoint_comes_before_that_of_config_resume(
    uninterrupted, tmp_path, monkeypatch
):
    config = make_config(num_steps=7, resume=str(uninterrupted))
    bank = train.fit(config, IMAGES[::-1].copy(), tmp_path).memory_bank
    expected = jax.device_get(bank)
    # Resumed with the same images and seed, the bank is that of the checkpoint.
    monkeypatch.delattr(train, "build_memory_bank")
    starts = []
    config.num_steps = 8
    state = train.fit(config, IMAGES[::-1].copy(), tmp_path, make_batches=starts_of(starts))
    assert starts == [7]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.memory_bank), expected)


def test_config_resume_of_a_run_that_has_all_steps_already_is_refused(uninterrupted, tmp_path):
    message = "is at step 6 already: num_steps=6 must be larger"
    with pytest.raises(loop.TrainingError, match=message):
        train.fit(make_config(resume=str(uninterrupted)), IMAGES, tmp_path)


def test_config_resume_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train.fit(make_config(resume="nowhere"), IMAGES, tmp_path)


def fit_two_categories(folder):
    """Trains two categories with different options that are arrays; resumes the second one.

    Returns how often the step's body was traced, and for each of the three runs the number of
    programs that were compiled during each of its steps; step 3 of the second run saves.
    """
    traces, compilations, runs = [], [], []

    def counted(**arrays):
        traces.append(arrays)
        return losses.segmentation_focal(**arrays)

    def listen(event, *args, **kwargs):
        if event.endswith("backend_compile_duration"):
            compilations.append(event)

    def count_compilations(steps):
        before_steps = []
        runs.append(before_steps)

        def make_batches(arrays, start, **options):
            stream = batches.train_batches(arrays, start, **options)
            for batch in itertools.islice(stream, steps):
                before_steps.append(len(compilations))
                yield batch
            before_steps.append(len(compilations))
            raise Killed

        return make_batches

    first = make_config(**{"loss.segmentation": "counted", "log_every": 100})
    first.checkpoint_every = 100
    second = first.copy_and_resolve_references()
    second.update({"num_steps": 9, "checkpoint_every": 3, "ema_decay": 0.5, "weight_decay": 0.1})
    second.update({"augment": {"rotation": 5.0, "flip_vertical": True, "shift": 0.1}})
    second.update({"defects": {"normal_fraction": 0.5, "hard_augmentation": {"hue": 10.0}}})
    jax.monitoring.register_event_duration_secs_listener(listen)
    with pytest.MonkeyPatch.context() as patch:
        # A loss of its own: no other test has these static options.
        patch.setitem(losses.SEGMENTATION, "counted", counted)
        for config, name, steps in ((first, "a", 4), (second, "b", 5), (second, "b", 2)):
            with pytest.raises(Killed):
                train.fit(config, IMAGES, folder / name, make_batches=count_compilations(steps))
    return len(traces), [np.diff(before_steps).tolist() for before_steps in runs]


ONE_DEVICE = """
from pathlib import Path
print(json.dumps(test_train.fit_two_categories(Path(sys.argv[1]))))
"""


@pytest.mark.parametrize("devices", [1, 4])
def test_two_categories_trace_and_compile_the_step_once_also_after_resuming(tmp_path, devices):
    if devices == 1:
        traces, (first, second, resumed) = run_with_devices(1, ONE_DEVICE, tmp_path)
    else:
        traces, (first, second, resumed) = fit_two_categories(tmp_path)
    assert traces == 1
    assert first[1:] == [0, 0, 0]  # the first step waits for a thread that compiles it
    del second[2]  # saving a checkpoint predicts, which is compiled once, too
    assert second == [0, 0, 0, 0] and resumed == [0, 0]


def test_other_options_than_the_checkpoints_are_refused_with_the_difference(uninterrupted):
    config = make_config(learning_rate=0.5, num_steps=9, log_every=3)
    with pytest.raises(loop.TrainingError, match=r"learning_rate was 0\.001, is 0\.5") as caught:
        train.fit(config, IMAGES, uninterrupted)
    assert "num_steps" not in str(caught.value) and "log_every" not in str(caught.value)


@pytest.mark.parametrize("option", ["seed", "held_out"])
def test_another_seed_or_held_out_is_refused_in_the_same_workdir(uninterrupted, option):
    config = make_config(num_steps=9)
    config[option] = {"seed": 3, "held_out": 0.2}[option]
    with pytest.raises(loop.TrainingError, match=f"{option} was"):
        train.fit(config, IMAGES, uninterrupted)


def test_other_images_are_refused_in_the_same_workdir(uninterrupted):
    message = (
        "trained with another images_sha256: [0-9a-f]{12}, now [0-9a-f]{12}. Restore the images"
    )
    with pytest.raises(loop.TrainingError, match=message):
        train.fit(make_config(num_steps=9), IMAGES[::-1].copy(), uninterrupted)


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(
    tmp_path, monkeypatch
):
    config = make_config(log_every=3, num_steps=9)
    real = train.parallel_train_step

    def poisoned(static):
        def step(*arguments):
            state, metrics = real(static)(*arguments)
            if int(state.step) == 5:
                metrics["loss_segmentation"] *= jnp.nan
            return state, metrics

        return step

    monkeypatch.setattr(train, "parallel_train_step", poisoned)
    with pytest.raises(loop.TrainingError, match="not finite at step 5: loss_segmentation. The"):
        train.fit(config, IMAGES, tmp_path)
    assert checkpoint.restore_newest(tmp_path / "checkpoints").step == 4


def test_check_finite_names_the_first_step_and_all_that_is_wrong_there():
    metrics = {
        "a": np.array([1.0, np.inf, np.nan]),
        "b": np.array([1.0, np.nan, 1.0]),
        "c": np.array([1.0, 2.0, np.nan]),
    }
    with pytest.raises(loop.TrainingError, match="step 19: a, b. "):
        loop.check_finite(metrics, 20)
    loop.check_finite({"c": metrics["c"][:2]}, 20)


def test_batches_that_end_early_are_an_error(tmp_path):
    def make_batches(arrays, start, **options):
        return itertools.islice(batches.train_batches(arrays, start, **options), 3)

    with pytest.raises(loop.TrainingError, match="ended at step 3"):
        train.fit(make_config(), IMAGES, tmp_path, make_batches=make_batches)


def test_a_predictor_pads_the_last_batch_and_refuses_other_images(uninterrupted):
    predictor = Predictor(uninterrupted)
    maps, scores = predictor(IMAGES[:5])
    assert maps.shape == (5, 32, 32) and scores.shape == (5,)
    assert 0 <= maps.min() and maps.max() <= 1 and scores.min() >= 0
    with_more = predictor(IMAGES[:5], reconstructions=True)
    np.testing.assert_array_equal(with_more[0], maps)
    assert with_more[2].shape == (5, 32, 32, 3)
    assert 0 <= with_more[2].min() and with_more[2].max() <= 1
    np.testing.assert_allclose(predictor(IMAGES[4:5])[0][0], maps[4], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"uint8 \[b, 32, 32, 3\].*float64 \[1, 32, 32, 3\]"):
        predictor(np.zeros((1, 32, 32, 3)))
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        Predictor(uninterrupted / "other")


def test_the_hash_of_a_predictors_weights_covers_average_and_memory_bank(uninterrupted, tmp_path):
    state, config, record, step = checkpoint.restore_newest(uninterrupted / "checkpoints")
    hashes = [Predictor(uninterrupted).weights_sha256]
    state["memory_bank"]["coarse"]["distance_mean"] += 1
    with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
        checkpoint.save(manager, state, step, config=config, record=record)
    hashes.append(Predictor(tmp_path).weights_sha256)
    assert len(set(hashes)) == 2
    bank = memory_bank.from_dicts(state["memory_bank"])
    assert hashes[1] == checkpoint.arrays_sha256((state["ema"], bank))


def test_recorded_thresholds_are_of_images_that_were_held_out(uninterrupted):
    predictor = Predictor(uninterrupted)
    _, held_out = batches.hold_out(np.arange(8), fraction=0.4, seed=0)
    maps, scores = predictor(IMAGES[held_out])
    recorded = predictor.record["thresholds"]
    assert recorded["pixel"]["images"] == recorded["image"]["images"] == 3
    # At most 0.1 % of 3072 pixels, and none of three images.
    assert np.sum(maps >= recorded["pixel"]["threshold"] * (1 + 1e-5)) <= 3
    assert recorded["image"]["threshold"] == pytest.approx(scores.max(), rel=1e-4)


def test_without_tensorflow_and_memory_bank_it_trains_on_arrays_and_predicts(tmp_path):
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
import numpy as np
from anoseg_jax import options
from anoseg_jax.deploy.predictor import Predictor
from anoseg_jax.method import train
sys.path.insert(0, "tests")
import tiny_config

config = tiny_config.get_config("bolt")
config.num_steps = 2
config.memory_bank.size = 0
options.check(config)
images = np.zeros((4, 32, 32, 3), np.uint8)
assert train.fit(config, images, sys.argv[1]).memory_bank is None
maps, scores = Predictor(sys.argv[1])(images)
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
