"""The loop with a step of one number: logs, checkpoints, resuming, and what stops it."""

import itertools
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from killed import Killed, killed_after

from anoseg_jax.images import batches
from anoseg_jax.running import checkpoint, loop, train_log

ARRAYS = {"image": np.arange(8, dtype=np.uint8)}


@flax.struct.dataclass
class State:
    step: jax.Array
    network: dict


def step(state, batch, key, options, *, static):
    """Walks to the mean of the images; `options` name the step whose metrics are not finite."""
    mean = jax.lax.pmean(jnp.mean(batch["image"].astype(jnp.float32)), "batch")
    noise = jax.random.normal(jax.random.fold_in(key, state.step))
    weight = state.network["weight"]
    weight += 0.1 * (mean - weight) + 1e-3 * noise
    number = state.step + 1
    metrics = {
        "loss_segmentation": jnp.where(number == options["bad_step"], jnp.nan, weight),
        "gradient_norm": jnp.where(number == options["bad_step"], -jnp.inf, weight),
        "loss_adversarial": weight,
    }
    return State(step=number, network={"weight": weight}), metrics


def check_record(record):
    if record["data"] != "these":
        raise loop.TrainingError("other data")


def start(saved):
    if saved is not None:
        return saved.state, saved.record
    state = State(step=jnp.int32(0), network={"weight": jnp.float32(1)})
    return state, {"train_seconds": 0.0, "data": "these"}


def make_config(**changes):
    config = tiny_config.get_config("bolt")
    config.update_from_flattened_dict(changes)
    return config


def fit(folder, *, bad_step=0, make_batches=batches.train_batches, **changes):
    training = loop.Training(
        network="network",
        template=start(None)[0],
        step=loop.parallelize(step, None),
        key=jax.random.key(0),
        options={"bad_step": np.int32(bad_step)},
        arrays=ARRAYS,
        learning_rate=lambda step: 0.1 / (1 + step),
        check_record=check_record,
        start=start,
        on_checkpoint=lambda state, step: ({"checked_at": int(state.step)}, {}),
    )
    return loop.run(make_config(**changes), folder, training, make_batches=make_batches)


def no_batches(arrays, start, **options):
    raise Killed


def log_lines(folder):
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, fit(folder)


def test_the_log_has_a_line_every_n_steps_with_all_its_keys(finished):
    lines = log_lines(finished[0])
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.1 / 2, 0.1 / 4, 0.1 / 6])
    assert all(line["images_per_second"] > 0 for line in lines)
    assert all(line.keys() >= set(train_log.LOSSES) for line in lines)
    assert all(line["loss_discriminator"] is None for line in lines)  # this step has none
    assert lines[-1]["loss_segmentation"] == pytest.approx(lines[-1]["loss_adversarial"])


def test_what_is_returned_is_what_is_saved(finished):
    folder, returned = finished
    restored = checkpoint.restore_newest(folder / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, returned.state, restored.state)
    assert returned[1:] == restored[1:]
    assert returned.step == returned.record["checked_at"] == 6
    assert returned.config == json.loads(make_config().to_json())


def test_a_finished_run_is_not_trained_again_and_returns_its_checkpoint(finished):
    folder, returned = finished
    before = (folder / "train_log.jsonl").read_text()
    again = fit(folder, make_batches=no_batches)
    jax.tree.map(np.testing.assert_array_equal, again.state, returned.state)
    assert again[1:] == returned[1:]
    assert (folder / "train_log.jsonl").read_text() == before


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(finished, tmp_path):
    with pytest.raises(Killed):
        fit(tmp_path, make_batches=killed_after(5))
    assert [line["step"] for line in log_lines(tmp_path)] == [2, 4]
    # As if it had been killed after a line that no checkpoint covers, and while writing another.
    with (tmp_path / "train_log.jsonl").open("a") as log:
        log.write('{"step": 5, "loss_segmentation": 1.0}\n{"step": 6, "lo')
    resumed = fit(tmp_path)
    assert resumed.record["state_sha256"] == finished[1].record["state_sha256"]
    logs = log_lines(tmp_path), log_lines(finished[0])
    for line in itertools.chain(*logs):
        line.pop("images_per_second")
    assert logs[0] == logs[1]


def test_metrics_that_are_not_finite_stop_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    message = "not finite at step 5: gradient_norm, loss_segmentation. The last good checkpoint"
    with pytest.raises(loop.TrainingError, match=message):
        fit(tmp_path, bad_step=5, log_every=3, num_steps=9)
    assert checkpoint.restore_newest(tmp_path / "checkpoints").step == 4


def test_batches_that_end_early_are_an_error(tmp_path):
    def make_batches(arrays, start, **options):
        return itertools.islice(batches.train_batches(arrays, start, **options), 3)

    with pytest.raises(loop.TrainingError, match="ended at step 3"):
        fit(tmp_path, make_batches=make_batches)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate", 0.5, r"learning_rate was 0\.001, is 0\.5"),
        ("seed", 3, "seed was 0, is 3"),
        ("held_out", 0.2, r"held_out was 0\.4, is 0\.2"),
    ],
)
def test_other_options_than_the_checkpoints_are_refused_with_the_difference(
    finished, key, value, message
):
    with pytest.raises(loop.TrainingError, match=f": {message}. Restore") as error:
        fit(finished[0], **{key: value, "num_steps": 9, "log_every": 3})
    assert "num_steps" not in str(error.value) and "log_every" not in str(error.value)


def test_a_record_of_other_data_is_refused_but_not_with_config_resume(finished, tmp_path):
    saved = finished[1]
    state = State(**saved.state)
    with checkpoint.open_manager(tmp_path / "a" / "checkpoints") as manager:
        record = saved.record | {"data": "others"}
        checkpoint.save(manager, state, 6, config=saved.config, record=record)
    with pytest.raises(loop.TrainingError, match="other data"):
        fit(tmp_path / "a", num_steps=7)
    resumed = fit(tmp_path / "b", num_steps=7, seed=3, resume=str(tmp_path / "a"))
    assert resumed.step == 7 and [line["step"] for line in log_lines(tmp_path / "b")] == [7]
    # From now on the folder's own checkpoint is the one to resume.
    with pytest.raises(loop.TrainingError, match="other data"):
        fit(tmp_path / "b", num_steps=8, seed=3, resume=str(tmp_path / "a"))


def test_config_resume_must_have_a_checkpoint_with_fewer_steps(finished, tmp_path):
    message = "is at step 6 already: num_steps=6 must be larger"
    with pytest.raises(loop.TrainingError, match=message):
        fit(tmp_path, resume=str(finished[0]))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit(tmp_path, resume="nowhere")
