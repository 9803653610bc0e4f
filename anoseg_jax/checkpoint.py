"""Checkpoints with orbax: the train state, the config it was trained with, and a record.

A checkpoint is `<directory>/<step>/` with three items: `state` (arrays), `config` and `record`
(JSON; `record` holds what belongs to the run so far: seconds of training, parameter count ...).
"""

import hashlib
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

State = TypeVar("State")
Manager = ocp.CheckpointManager


def create_manager(directory: epath.PathLike, *, create: bool = True) -> Manager:
    """Opens the checkpoints in `directory`; keeps the two newest.

    A directory that is not there is made, or with `create=False` refused (FileNotFoundError).

    Two: should the newest turn out damaged, one is left. No "best" one is kept: the only data that
    could tell which is best without looking at the test set would be defects, and there are none.
    """
    directory = epath.Path(directory)
    if not create and not directory.exists():
        raise FileNotFoundError(f"no checkpoint in {directory}: train there first")
    return Manager(
        directory.resolve(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(2), create=create
        ),
    )


def save(manager: Manager, state: Any, step: int, *, config: dict, record: dict) -> None:
    """Saves in the background; `manager.wait_until_finished()` waits for it.

    Orbax writes under a temporary name and renames: a checkpoint is whole or it is not there.
    """
    # On the host first: orbax refuses pmap's host-local arrays, and the step donates its state.
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(jax.device_get(state)),
            config=ocp.args.JsonSave(config),
            record=ocp.args.JsonSave(record),
        ),
    )


def restore(manager: Manager, step: int, template: State) -> tuple[State, dict, dict]:
    """Returns the state (numpy arrays), config and record of `step`.

    `template` is a state of the same shapes: arrays or what `jax.eval_shape` returns.
    """
    as_numpy = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), template)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(as_numpy),
            config=ocp.args.JsonRestore(),
            record=ocp.args.JsonRestore(),
        ),
    )
    return restored.state, restored.config, restored.record


def restore_newest(directory: epath.PathLike) -> tuple[dict, dict, dict, int]:
    """Returns the state (nested dicts of numpy arrays), config, record and step of the newest.

    Raises FileNotFoundError, naming the directory, if it holds no checkpoint.
    """
    with create_manager(directory, create=False) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {directory}: train there first")
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(),
                config=ocp.args.JsonRestore(),
                record=ocp.args.JsonRestore(),
            ),
        )
    return restored.state, restored.config, restored.record, step


def read_record(directory: epath.PathLike) -> dict | None:
    """Returns the record of the newest checkpoint in `directory`; None if there is none."""
    if not epath.Path(directory).exists():
        return None
    with create_manager(directory, create=False) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        restored = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
    return restored.record


def restore_variables(directory: epath.PathLike) -> tuple[dict, dict, dict, int]:
    """Returns the evaluated (averaged) generator parameters, config, record and step.

    Raises FileNotFoundError, naming the directory, if it holds no checkpoint.
    """
    state, config, record, step = restore_newest(directory)
    return state["ema"], config, record, step


def params_sha256(params: Any) -> str:
    """Returns the SHA-256 of names, shapes, dtypes and bytes of all parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
