"""Checkpoints: damaged ones are named and skipped, and intact ones are kept."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest

from anoseg_jax.method.train_state import TrainState
from anoseg_jax.running import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def make_state(step):
    params = {"kernel": jnp.full((64, 64), float(step)) + jnp.arange(64.0), "bias": jnp.zeros(3)}
    return TrainState(
        step=jnp.int32(step),
        generator=params,
        discriminator={"w": jnp.ones(2)},
        generator_opt=optax.adam(1e-3).init(params),
        discriminator_opt=(),
        ema=params,
    )


@pytest.fixture
def directory(tmp_path):
    with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
        for step in (2, 4):
            checkpoint.save(manager, make_state(step), step, config={"a": 1}, record={"b": step})
    return tmp_path / "checkpoints"


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate_arrays(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_item(item):
    def remove(folder):
        for path in sorted((folder / item).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (folder / item).rmdir()

    return remove


def lose_an_array(folder):
    """Stands for a file system that loses the content of a file: the hash does not match."""
    record = folder / "record" / "metadata"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"state_sha256": "0" * 64}))


FAULTS = {
    "truncated arrays": truncate_arrays,
    "a flipped bit": flip_a_bit,
    "no state": remove_item("state"),
    "no record": remove_item("record"),
    "no config": remove_item("config"),
    "other arrays": lose_an_array,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_is_used(
    directory, fault, capsys
):
    FAULTS[fault](directory / "4")
    saved = checkpoint.restore_newest(directory)
    assert saved.step == 2 and saved.record["b"] == 2
    np.testing.assert_array_equal(saved.state["ema"]["kernel"], make_state(2).ema["kernel"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: damaged checkpoint {directory / '4'}: ")
    assert line.endswith("; step 2 is used")


def test_a_damaged_checkpoint_is_set_aside_when_its_step_is_saved_again(directory):
    truncate_arrays(directory / "4")
    with checkpoint.open_manager(directory) as manager:
        saved = checkpoint.restore(manager, template=make_state(0))
        checkpoint.set_aside(manager, saved.step)
        checkpoint.save(manager, make_state(4), 4, config={}, record={})
    assert checkpoint.restore_newest(directory).step == 4
    assert (directory.parent / "damaged_4" / "state").exists()


def test_if_all_are_damaged_training_does_not_start_anew_by_itself(directory):
    for step in ("2", "4"):
        truncate_arrays(directory / step)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.restore_newest(directory)
    assert "\n" not in str(caught.value)
    assert all(str(directory / step) in str(caught.value) for step in ("2", "4"))
    assert f"to start anew remove {directory}" in str(caught.value)


def test_a_state_is_restored_to_the_bit_with_and_without_a_template(directory):
    with checkpoint.open_manager(directory, create=False) as manager:
        saved = checkpoint.restore(manager, template=make_state(0))
    assert isinstance(saved.state, TrainState) and saved.state.step == 4
    assert checkpoint.arrays_sha256(saved.state) == checkpoint.arrays_sha256(make_state(4))
    assert (
        checkpoint.arrays_sha256(checkpoint.restore_newest(directory).state)
        == (saved.record["state_sha256"])
    )


def test_the_hash_is_of_dtypes_shapes_and_values():
    """Names do not count: a state has the hash of the nested dicts that it is restored as."""
    arrays = {"a": np.arange(4.0), "b": np.zeros(2)}
    sha256 = checkpoint.arrays_sha256(arrays)
    assert sha256 == checkpoint.arrays_sha256([np.zeros(2), arrays["a"].copy()])
    others = [
        {"a": np.arange(4.0) + 1e-12, "b": np.zeros(2)},
        {"a": np.arange(4.0).reshape(2, 2), "b": np.zeros(2)},
        {"a": np.arange(4.0), "b": np.zeros(2, np.float32)},
        {"a": np.arange(4.0), "b": np.zeros(2), "c": np.zeros(2)},
    ]
    assert sha256 not in {checkpoint.arrays_sha256(other) for other in others}


def test_a_checkpoint_of_an_older_version_is_refused_in_one_line(directory):
    """Before its options are compared and its arrays are read: both have changed."""
    path = directory / "4" / "record" / "metadata"
    record = json.loads(path.read_text())
    assert record.pop("format") == 5
    for older in (record, record | {"format": 2}, record | {"format": 4}):
        path.write_text(json.dumps(older))
        with pytest.raises(checkpoint.CheckpointError) as caught:
            checkpoint.restore_newest(directory)
        assert str(caught.value) == (
            f"{directory / '4'} was written by an older version of anoseg_jax, which this one "
            "cannot read: train again in a new --workdir"
        )


def test_a_half_written_checkpoint_is_ignored_and_removed(directory):
    (directory / "4").rename(directory / "6.orbax-checkpoint-tmp")
    with checkpoint.open_manager(directory) as manager:
        assert checkpoint.restore(manager).step == 2
        checkpoint.save(manager, make_state(8), 8, config={}, record={})
    assert {path.name for path in directory.iterdir()} == {"2", "8"}


def test_on_a_full_disk_the_error_is_one_line_and_the_previous_checkpoint_is_kept(directory):
    """A limit on the size of files stands for the disk: it needs no privileges."""
    program = """
import resource, sys
import numpy as np
from anoseg_jax.running import checkpoint
try:
    with checkpoint.open_manager(sys.argv[1]) as manager:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        state = {"a": np.random.default_rng(0).random((300, 300))}
        checkpoint.save(manager, state, 6, config={}, record={})
except OSError as error:
    print(error)
"""
    done = programs.run(program, directory)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{directory}") and ": checkpoint not written: " in line
    assert "File too large" in line
    assert "Traceback" not in done.stderr
    assert checkpoint.restore_newest(directory).step == 4
