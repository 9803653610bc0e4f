"""Checkpoints with orbax: the train state, the config it was trained with, and a record.

A checkpoint is `<directory>/<step>/` with three items: `state` (arrays), and as JSON `config` and
`record`, the facts about the run so far: seconds of training, parameter count, thresholds ...
"""

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from anoseg_jax import UsageError, first_line

Manager = ocp.CheckpointManager
# Version of the arrays in a checkpoint. The record holds it; other versions are refused.
FORMAT = 5


class CheckpointError(UsageError):
    """There are checkpoints, but none can be read; the message is one line that says why."""


class Saved(NamedTuple):
    """A checkpoint: `state` of numpy arrays, `config` and `record` as JSON restores them."""

    state: Any
    config: dict
    record: dict
    step: int


@contextlib.contextmanager
def open_manager(directory: epath.PathLike, *, create: bool = True) -> Iterator[Manager]:
    """Opens the checkpoints in `directory`; keeps the two newest, waits for writes at exit.

    The second newest is a reserve for a damaged newest one. No "best" one is kept: to choose it
    would take defects, which training does not have.

    A missing directory is created, or with `create=False` refused (FileNotFoundError). Raises
    OSError if a checkpoint cannot be written.
    """
    directory = epath.Path(directory)
    if not create and not directory.exists():
        raise FileNotFoundError(f"no checkpoint in {directory}: train there first")
    manager = Manager(
        # `resolve` would turn gs://bucket into a local path.
        directory if directory.is_absolute() else directory.resolve(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(2),
            create=create,
            cleanup_tmp_directories=create,  # incomplete checkpoints that a kill left
        ),
    )
    with _without_orbax_warnings():
        try:
            yield manager
        except BaseException:
            with contextlib.suppress(Exception):  # it would hide the error that came before it
                manager.close()
            raise
        with _writing(directory):
            manager.close()


@contextlib.contextmanager
def _without_orbax_warnings() -> Iterator[None]:
    """Keeps orbax's tracebacks out of the log: it also raises the errors that it logs."""

    def passes(line: logging.LogRecord) -> bool:
        return "orbax" not in line.pathname or line.levelno < logging.WARNING

    logger = logging.getLogger("absl")
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
    """Raises the many errors of orbax and tensorstore as an OSError of one line."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{path}: checkpoint not written: {first_line(error)}") from error


def save(manager: Manager, state: Any, step: int, *, config: dict, record: dict) -> Saved:
    """Saves in the background and returns what is saved; the end of `open_manager` waits for it.

    Orbax writes under a temporary name and renames: no checkpoint is incomplete. The record gets
    `state_sha256`, by which `restore` detects damage, and `format`.

    Raises OSError if this checkpoint or the one before it cannot be written.
    """
    # On the host first: orbax refuses pmap's host-local arrays, and the step donates its state.
    state = jax.device_get(state)
    record = record | {"format": FORMAT, "state_sha256": arrays_sha256(state)}
    with _writing(epath.Path(manager.directory) / str(step)):
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                config=ocp.args.JsonSave(config),
                record=ocp.args.JsonSave(record),
            ),
        )
    return Saved(state, *json.loads(json.dumps([config, record])), step)


def restore(
    manager: Manager,
    *,
    template: Any = None,
    check: Callable[[dict, dict], None] = lambda config, record: None,
) -> Saved | None:
    """Returns the newest intact checkpoint, or None if there is no checkpoint.

    Warns on stderr about every damaged checkpoint that is newer, one line each.

    Args:
      manager: of `open_manager`.
      template: arrays or shapes (`jax.eval_shape`) in the structure of the result; with None the
        result is nested dicts.
      check: given config and record, raises if the checkpoint does not fit.

    Raises CheckpointError if there are checkpoints but none is intact, or if an older version of
    the program wrote them.
    """
    as_numpy = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), template)
    damaged = []
    for step in sorted(manager.all_steps(), reverse=True):
        folder = epath.Path(manager.directory) / str(step)
        try:
            config, record = (_read_json(manager, step, item) for item in ("config", "record"))
        except Exception as error:
            damaged.append(f"{folder}: {first_line(error)}")
            continue
        if record.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder} was written by an older version of anoseg_jax, which this one cannot "
                "read: train again in a new --workdir"
            )
        check(config, record)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(as_numpy))
            state = manager.restore(step, args=args).state
            if arrays_sha256(state) != record["state_sha256"]:
                raise ValueError("the arrays are not those that were saved")
        except Exception as error:
            damaged.append(f"{folder}: {first_line(error)}")
            continue
        for line in damaged:
            print(f"warning: damaged checkpoint {line}; step {step} is used", file=sys.stderr)
        return Saved(state, config, record, step)
    if damaged:
        raise CheckpointError(
            f"no checkpoint can be read: {'; '.join(damaged)}; to start anew remove "
            f"{manager.directory}"
        )
    return None


def _read_json(manager: Manager, step: int, item: str) -> dict:
    args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
    return manager.restore(step, args=args)[item]


def set_aside(manager: Manager, after: int) -> None:
    """Moves the checkpoints after step `after` to damaged_<step> beside their directory.

    These steps will be trained again, and orbax does not overwrite checkpoints.
    """
    steps = [step for step in manager.all_steps() if step > after]
    if steps and jax.process_index() == 0:
        directory = epath.Path(manager.directory)
        for step in steps:
            aside = directory.parent / f"damaged_{step}"
            if aside.exists():
                aside.rmtree()
            (directory / str(step)).rename(aside)
    ocp.multihost.sync_global_processes("set_aside")
    manager.reload()


def restore_newest(directory: epath.PathLike) -> Saved:
    """Returns the newest intact checkpoint (see `restore`) in `directory`, as nested dicts.

    Raises FileNotFoundError, naming the directory, if it holds none.
    """
    with open_manager(directory, create=False) as manager:
        saved = restore(manager)
    if saved is None:
        raise FileNotFoundError(f"no checkpoint in {directory}: train there first")
    return saved


def arrays_sha256(tree: Any) -> str:
    """Returns the SHA-256 of dtypes, shapes and bytes of all arrays of a tree, without their names.

    A state has the same hash as the nested dicts that it is restored as.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    digests = sorted(
        hashlib.sha256(f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes()).digest()
        for leaf in leaves
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()
