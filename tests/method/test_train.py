"""Training: the step on several devices, resuming, one compilation, and the trained model.

The loop with a step of one number: tests/running/test_loop.py.
"""

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
from flax.serialization import from_state_dict
from killed import Killed, killed_after

from anoseg_jax.deploy.trained_model import TrainedModel
from anoseg_jax.images import batches
from anoseg_jax.method import memory_bank, predict, thresholds, train, train_state
from anoseg_jax.running import checkpoint, loop

ROOT = Path(__file__).resolve().parents[2]
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
KEY = jax.random.key(7)


def make_config(**changes):
    config = tiny_config.get_config("bolt")
    config.augment.flip_horizontal = True
    config.memory_bank.distance_weights = (1.0, 1.0)  # enough to see in scores of six steps
    config.update_from_flattened_dict(changes)
    return config


def make_state():
    """Returns static options, arrays and a state, of the preset with all kinds of defects.

    One of them takes from other images of the batch.
    """
    config = make_config(**{"defects.preset": "default"})
    static, options = train_state.split_options(config)
    create = train_state.jit_create(train_state.create_state)
    state = create(KEY, options, static=static, image_size=(32, 32))
    config.model.coords = False  # positions have no weight to select: less to compile
    bank = memory_bank.build(
        IMAGES, np.arange(8, dtype=np.int32), seed=config.seed, options=config.memory_bank
    )
    return static, options, jax.device_get(state.replace(memory_bank=bank))


@pytest.fixture(scope="module")
def before():
    return make_state()


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
def four_devices(before):
    return run_steps(*before, devices=4)


def run_with_devices(devices, program, *arguments):
    """Returns the JSON in the last line that a program prints, on that many virtual devices."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": os.pathsep.join([".", "tests", "tests/method"])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


EIGHT_DEVICES = """
import json, test_train
print(json.dumps(test_train.run_steps(*test_train.make_state(), devices=8)[1]))
"""


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_number_of_devices_changes_nothing_but_rounding(before, devices, four_devices):
    """Eight examples a step on 1, 2, 4 and 8 devices."""
    if devices == 8:
        metrics = run_with_devices(8, EIGHT_DEVICES)
    else:
        _, metrics = run_steps(*before, devices=devices)
    assert metrics.keys() == four_devices[1].keys()
    for name, expected in four_devices[1].items():
        np.testing.assert_allclose(metrics[name][0], expected[0], rtol=1e-5, err_msg=name)
        # Rounding puts single pixels of a defect on the other side of min_change.
        np.testing.assert_allclose(metrics[name], expected, rtol=2e-2, err_msg=name)


def test_after_a_step_all_replicas_of_all_leaves_are_equal_to_the_byte(four_devices):
    state, _ = four_devices
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        replicas = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == 4
        assert len(replicas) == 1, jax.tree_util.keystr(path)


def test_a_step_moves_both_players_and_the_average_follows_slowly(before, four_devices):
    initial, state = before[2], jax.device_get(four_devices[0])
    assert state.step == 20

    def distance(a, b):
        return sum(np.abs(x - y).sum() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    assert distance(initial.generator, state.generator) > 0
    assert distance(initial.discriminator, state.discriminator) > 0
    assert 0 < distance(initial.ema, state.ema) < distance(initial.generator, state.generator)
    jax.tree.map(np.testing.assert_array_equal, state.memory_bank, initial.memory_bank)


def test_the_memory_bank_has_patches_of_the_images_before_augmentation(before):
    """Not of mirrored ones, which training sees as well."""
    bank = before[2].memory_bank
    plain = memory_bank.to_float(IMAGES, bank.brightness)
    for scale, images in ((bank.fine, plain), (bank.coarse, memory_bank.halve(plain))):
        x, _ = memory_bank.embed_patches(images, before[0].grid)
        codes = (x.reshape(-1, x.shape[-1]) - scale.mean) @ scale.basis
        to_each = np.linalg.norm(codes[:, None] - scale.patches[:, :-2], axis=-1)
        np.testing.assert_allclose(to_each.min(axis=0), 0, atol=1e-3)


def test_training_distances_are_leave_one_out_by_the_ids_of_the_batch(before):
    static, _, state = before
    ids = np.array([3, 0, 3], np.int32)
    images = jnp.asarray(IMAGES[:3] / np.float32(255))
    distances = train.bank_distances(state, images, ids, static=static)
    fine, coarse = state.memory_bank.fine, state.memory_bank.coarse
    expected = memory_bank.standardized_distances(fine, images, ids, grid=static.grid)
    np.testing.assert_allclose(distances[..., 0], expected, atol=1e-4)
    halved = memory_bank.halve(images)
    expected = memory_bank.standardized_distances(coarse, halved, ids, grid=static.grid)
    enlarged = jax.image.resize(expected, distances.shape[:-1], "bilinear")
    np.testing.assert_allclose(distances[..., 1], enlarged, atol=1e-4)
    assert train.bank_distances(state, images, ids, static=static._replace(grid=None)) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder, and what `fit` returned: the run was killed once and resumed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.raises(Killed):
        train.fit(make_config(), IMAGES, folder, make_batches=killed_after(5))
    return folder, train.fit(make_config(), IMAGES, folder)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(trained, tmp_path):
    uninterrupted = train.fit(make_config(), IMAGES, tmp_path)
    assert trained[1].record["state_sha256"] == uninterrupted.record["state_sha256"]


def test_images_keep_their_ids_and_those_held_out_are_not_trained_on(tmp_path):
    images = IMAGES.copy()
    images[6] = images[2]
    ids = batches.assign_image_ids(images)
    kept, held_out = batches.hold_out(ids, fraction=0.4, seed=0)
    arrays = {}

    def make_batches(images_and_ids, start, **options):
        arrays.update(images_and_ids)
        raise Killed

    with pytest.raises(Killed):
        train.fit(make_config(), images, tmp_path, make_batches=make_batches)
    assert len(held_out) >= 2 and not set(ids[kept]) & set(ids[held_out])
    np.testing.assert_array_equal(arrays["image"], images[kept])
    np.testing.assert_array_equal(arrays["image_id"], np.where(kept == 6, 2, kept))


def largest_difference(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(np.abs(a - b).max() for a, b in pairs)


@pytest.mark.parametrize("change", ["nothing", "images", "seed", "held_out"])
def test_config_resume_continues_another_workdir(trained, tmp_path, capsys, change):
    """With other images, another seed or `held_out` the memory bank is built anew."""
    folder, before = trained[0], trained[1].state
    images = IMAGES[::-1].copy() if change == "images" else IMAGES
    config = make_config(num_steps=7, resume=str(folder))
    config.update({"seed": {"seed": 3}, "held_out": {"held_out": 0.2}}.get(change, {}))
    saved = train.fit(config, images, tmp_path)
    # From its weights: Adam moves a weight by about the learning rate in each step.
    lines = list(map(json.loads, (tmp_path / "train_log.jsonl").open()))
    # One step further; with other images, all steps of a new schedule.
    assert [line["step"] for line in lines] == ([2, 4, 6, 7] if change == "images" else [7])
    rates = train_state.learning_rate_schedule(
        np.arange(0 if change == "images" else 6, 7),
        train_state.split_options(config)[1]["optimizer"],
    )
    difference = largest_difference(saved.state["generator"], before["generator"])
    assert 0 < difference < 2 * float(np.sum(rates))
    is_stated = "new schedule of 7 steps" in capsys.readouterr().out
    assert is_stated == (change == "images")
    arrays, _ = train.split_images(config, images)
    fresh = memory_bank.build(
        arrays["image"], arrays["image_id"], seed=config.seed, options=config.memory_bank
    )
    bank = memory_bank.from_dicts(saved.state["memory_bank"])
    jax.tree.map(np.testing.assert_array_equal, bank, fresh)
    is_kept = np.array_equal(before["memory_bank"]["fine"]["patches"], fresh.fine.patches)
    assert is_kept == (change == "nothing")


def test_more_images_start_a_schedule_of_the_same_number_of_steps(trained, tmp_path):
    """From the weights of config.resume; then the folder's own checkpoint is resumed as ever."""
    images = np.concatenate([IMAGES, IMAGES[:2, ::-1]])
    config = make_config(resume=str(trained[0]))
    assert trained[1].step == config.num_steps
    with pytest.raises(Killed):
        train.fit(config, images, tmp_path, make_batches=killed_after(5))
    resumed = train.fit(config, images, tmp_path)
    whole = train.fit(config, images, tmp_path / "whole")
    assert resumed.step == config.num_steps
    assert resumed.record["state_sha256"] == whole.record["state_sha256"]
    with pytest.raises(loop.TrainingError, match="another images_sha256"):
        train.fit(config, IMAGES, tmp_path)


def test_other_images_are_refused_in_the_same_workdir(trained):
    message = (
        "trained with another images_sha256: [0-9a-f]{12}, now [0-9a-f]{12}. Restore the images.*"
        f"--config.resume={trained[0]} starts from these weights"
    )
    with pytest.raises(loop.TrainingError, match=message):
        train.fit(make_config(num_steps=9), IMAGES[::-1].copy(), trained[0])


def test_the_memory_bank_of_the_folders_own_checkpoint_is_kept(trained, tmp_path):
    """Also where it is not the bank that would be built now."""
    state, config, record, step = trained[1]
    state = jax.tree.map(np.copy, state)
    state["memory_bank"]["coarse"]["distance_mean"] += 1
    with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
        train_state_of = from_state_dict(train_state.template(make_config()), state)
        checkpoint.save(manager, train_state_of, step, config=config, record=record)
    resumed = train.fit(make_config(num_steps=7, resume=str(trained[0])), IMAGES, tmp_path)
    before, after = state["memory_bank"], resumed.state["memory_bank"]
    jax.tree.map(np.testing.assert_array_equal, after, before)


def fit_two_categories(folder):
    """Trains two categories with different options that are arrays; resumes the second one.

    Returns for each of the three runs the number of programs that were compiled during each of its
    steps; step 3 of the second run saves.
    """
    compilations, runs = [], []

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

    # A grid that no other test has: nothing is compiled yet.
    one = make_config(**{"defects.hard_augmentation.grid": 5, "log_every": 100})
    one.checkpoint_every = 100
    other = one.copy_and_resolve_references()
    other.update({"num_steps": 9, "checkpoint_every": 3, "ema_decay": 0.5, "weight_decay": 0.1})
    other.update({"augment": {"rotation": 5.0, "flip_vertical": True, "shift": 0.1}})
    other.update({"defects": {"normal_fraction": 0.5, "hard_augmentation": {"hue": 10.0}}})
    jax.monitoring.register_event_duration_secs_listener(listen)
    for config, name, steps in ((one, "a", 4), (other, "b", 5), (other, "b", 2)):
        with pytest.raises(Killed):
            train.fit(config, IMAGES, folder / name, make_batches=count_compilations(steps))
    return [np.diff(before_steps).tolist() for before_steps in runs]


ONE_DEVICE_WITHOUT_TENSORFLOW = """
import without_tensorflow
import json, sys
from pathlib import Path
import test_train
from anoseg_jax import options

options.check(test_train.make_config(), training=True)
counts = test_train.fit_two_categories(Path(sys.argv[1]))
maps, _ = test_train.TrainedModel(Path(sys.argv[1]) / "b")(test_train.IMAGES)
assert maps.shape == (8, 32, 32)
assert not [name for name in sys.modules if name.split(".")[0].startswith("tensorflow")]
print(json.dumps(counts))
"""


@pytest.mark.parametrize("devices", [1, 4])
def test_two_categories_compile_the_step_once_also_after_resuming(tmp_path, devices):
    """On one device in a process without TensorFlow, which then predicts."""
    if devices == 1:
        one, other, resumed = run_with_devices(1, ONE_DEVICE_WITHOUT_TENSORFLOW, tmp_path)
    else:
        one, other, resumed = fit_two_categories(tmp_path)
        assert one[0] > 0
    assert one[1:] == [0, 0, 0]
    del other[2]  # saving a checkpoint predicts, which also compiles once
    assert other == [0, 0, 0, 0] and resumed == [0, 0]


def test_a_predictor_of_what_fit_returned_equals_that_of_the_folder(trained):
    folder, saved = trained
    of_folder, of_saved = TrainedModel(folder), TrainedModel(saved)
    for name in ("weights_sha256", "record", "config", "step", "image_size", "batch_size"):
        assert getattr(of_folder, name) == getattr(of_saved, name)
    for one, other in zip(of_folder(IMAGES), of_saved(IMAGES), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_predictor_pads_the_last_batch_and_refuses_other_images(trained):
    predictor = TrainedModel(trained[1])
    maps, scores = predictor(IMAGES[:5])
    assert maps.shape == (5, 32, 32) and scores.shape == (5,)
    assert 0 <= maps.min() and maps.max() <= 1 and scores.min() >= 0
    np.testing.assert_allclose(predictor(IMAGES[4:5])[0][0], maps[4], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"uint8 \[b, 32, 32, 3\].*float64 \[1, 32, 32, 3\]"):
        predictor(np.zeros((1, 32, 32, 3)))
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        TrainedModel(trained[0] / "other")


def test_the_hash_of_a_predictors_weights_covers_average_and_memory_bank(trained):
    hashes = {TrainedModel(trained[1]).weights_sha256}
    for name in ("ema", "memory_bank", "discriminator"):
        state = jax.tree.map(np.copy, trained[1].state)
        jax.tree.leaves(state[name])[0][...] += 1
        hashes.add(TrainedModel(trained[1]._replace(state=state)).weights_sha256)
    assert len(hashes) == 3  # the discriminator does not predict


def test_recorded_thresholds_are_of_good_images_compared_with_other_images(trained):
    predictor, predict_fn = TrainedModel(trained[1]), predict.sharded_predict_fn(make_config())
    variables = predict.replicate(predict.variables_of(trained[1].state))
    # The images are all different: with the ids of those held out, which have no patch in the bank,
    # it is as without ids.
    maps, scores = predict_fn(variables, IMAGES, np.arange(8, dtype=np.int32), outputs=2)
    kept, _ = batches.hold_out(np.arange(8), fraction=0.4, seed=0)
    assert scores[kept].max() > 1.1 * predictor(IMAGES[kept])[1].max()  # with their own patches
    recorded = predictor.record["thresholds"]
    assert recorded["pixel"]["images"] == recorded["image"]["images"] == 8
    # At most 0.1 % of 8192 pixels, and none of eight images.
    assert np.sum(maps >= recorded["pixel"]["threshold"] * (1 + 1e-5)) <= 8
    assert recorded["image"]["threshold"] == pytest.approx(scores.max(), rel=1e-4)
    other = TrainedModel(trained[1], top_fraction=0.5)
    assert other.record["thresholds"]["image"]["threshold"] is None
    assert predictor.record["thresholds"] == recorded == trained[1].record["thresholds"]


@pytest.mark.parametrize(
    ("most", "held_out", "rows"),
    [(0, 2, []), (4, 2, [0, 5]), (9, 2, [0, 1, 2, 3, 4, 5]), (9, 0, [0, 1, 2, 3, 4, 5])],
)
def test_thresholds_are_made_from_held_out_images_first(most, held_out, rows):
    config = make_config(**{"evaluate.threshold_images": most})
    arrays = {"image": IMAGES[:6], "image_id": np.arange(10, 16, dtype=np.int32)}
    images, image_ids, what = thresholds.good_images(config, arrays, IMAGES[:held_out])
    np.testing.assert_array_equal(images, IMAGES[[*range(held_out), *rows]])
    assert image_ids.tolist() == [-1] * held_out + [10 + row for row in rows]
    assert f"by leave-one-out: {len(rows)})" in what or not rows


def test_three_good_images_are_too_few_for_thresholds():
    arrays = {"image": IMAGES[:3], "image_id": np.arange(3, dtype=np.int32)}
    assert not len(thresholds.good_images(make_config(), arrays, IMAGES[:0])[0])


def test_validation_images_are_held_out_and_no_other(tmp_path):
    config = tiny_config.get_config("bolt")
    config.memory_bank.size, config.num_steps = 0, 2
    images = np.random.default_rng(0).integers(0, 255, (7, 32, 32, 3), np.uint8)
    saved = train.fit(config, images[:4], tmp_path, validation=images[4:])
    assert saved.record["thresholds"]["image"]["images"] == 3  # of them alone: there is no bank
    with pytest.raises(loop.TrainingError, match="images_sha256"):
        train.fit(config, images[:4], tmp_path, validation=images[5:])
