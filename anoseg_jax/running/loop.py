"""The training loop: devices, logs, checkpoints, stopping and resuming.

It knows nothing of what a step does. A step is a pure function `(state, batch, key, options) ->
(state, metrics)`; a state has a `step` and no device axis; metrics are float32 scalars.
"""

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from anoseg_jax import UsageError
from anoseg_jax.running import checkpoint, distributed, files, progress, train_log

# Options that a resumed run may change.
MAY_CHANGE = (
    "num_steps log_every checkpoint_every accumulate remat resume dataset data_dir tfds_dir "
    "categories category_options shard variants evaluate detector maps_dir compilation_cache"
).split()
# Also with config.resume: the memory bank is built anew for them.
MAY_CHANGE_ELSEWHERE = ["seed", "held_out"]

Batch = dict[str, np.ndarray]


class TrainingError(UsageError):
    """Training cannot continue; the message is one line that says why."""


def parallelize(step: Callable) -> Callable:
    """Returns the step on all local devices: batches get a device axis, the state has none."""
    return jax.pmap(
        step,
        axis_name="batch",
        in_axes=(None, 0, None, None),
        out_axes=(None, 0),
        donate_argnums=0,
    )


def replicate(tree: Any) -> Any:
    """Replicates arrays over the local devices, as `jax.pmap` returns them.

    Otherwise the first two steps would each compile: for the placement that they are given, and for
    the one that they return.
    """
    mesh = Mesh(jax.local_devices(), ("batch",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def compile_ahead(
    step_fn: Callable,
    template: Any,
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    key: Array,
    options: Any,
) -> Callable:
    """Returns the step, whose first call compiles and says so.

    Where one process has one device, a thread starts to compile at once, by running a step on
    zeros, and the first call waits for it. Several devices do not, because their collective
    operations need one order and, on CPUs, all of the threads.

    Args:
      step_fn: of `parallelize`.
      template: shapes of the state.
      arrays: of all training images; a batch has `batch_size` of them.
      batch_size: of all devices together.
      key, options: the step's arguments.
    """
    began = time.monotonic()
    calls = itertools.count()

    def run_on_zeros() -> None:
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
        batch = {name: np.zeros((batch_size, *x.shape[1:]), x.dtype) for name, x in arrays.items()}
        state, *others = replicate((state, key, options))
        jax.block_until_ready(step_fn(state, shard(batch), *others))

    ahead = None
    if jax.device_count() == 1:
        executor = ThreadPoolExecutor(max_workers=1)
        ahead = executor.submit(run_on_zeros)
        executor.shutdown(wait=False)

    def run(*arguments: Any) -> Any:
        if next(calls):
            return step_fn(*arguments)
        start = began if ahead else None
        with progress.waiting("compiling the training step", "usually under a minute", start):
            if ahead:
                ahead.exception()  # waits; should it have failed, so does the step itself
            return jax.block_until_ready(step_fn(*arguments))

    return run


def shard(batch: Batch) -> Batch:
    """Splits a process's batch over its devices: [b, ...] to [devices, b / devices, ...]."""
    devices = jax.local_device_count()
    return {name: x.reshape(devices, -1, *x.shape[1:]) for name, x in batch.items()}


def check_finite(metrics: Mapping[str, np.ndarray], last_step: int) -> None:
    """Raises TrainingError naming the first step and the metrics that are not finite.

    `metrics` hold one value a step, [steps], the last of them at `last_step`.
    """
    bad = {name: ~np.isfinite(values) for name, values in metrics.items()}
    steps = np.flatnonzero(np.any(list(bad.values()), axis=0))
    if len(steps):
        names = ", ".join(name for name in metrics if bad[name][steps[0]])
        step = last_step - len(next(iter(bad.values()))) + 1 + steps[0]
        raise TrainingError(
            f"not finite at step {step}: {names}. The last good checkpoint is kept. Try a smaller "
            "learning_rate or clip_norm, or model.dtype=float32"
        )


def check_same_options(
    saved: Mapping[str, Any], config: Mapping[str, Any], may_change: list[str]
) -> None:
    """Raises TrainingError naming every option that a resumed run must not change but does."""
    different = [
        f"{key} was {saved.get(key)}, is {config.get(key)}"
        for key in sorted({*saved, *config} - set(may_change))
        if saved.get(key) != config.get(key)
    ]
    if different:
        raise TrainingError(
            f"the checkpoint was trained with other options: {'; '.join(different)}. Restore them, "
            "or train in a new --workdir"
        )


def restore(
    manager: checkpoint.Manager,
    config: ConfigDict,
    template: Any,
    check_record: Callable[[Mapping[str, Any]], None],
) -> checkpoint.Saved | None:
    """Returns the checkpoint to resume from, or None for a fresh start.

    1. The newest intact checkpoint of this workdir; 2. the newest of `config.resume`, which may
    have another seed and `held_out`, and is not given to `check_record`.

    Args:
      manager: of this workdir's checkpoints.
      config: the options of this run.
      template: a state of the same shapes.
      check_record: raises if a record is not of what this run is trained on.

    Raises:
      TrainingError: options differ, or `config.resume` has no checkpoint or all steps already.
      checkpoint.CheckpointError: there are checkpoints, and none can be read.
    """
    options = json.loads(config.to_json())

    def check(saved_options: dict, record: dict) -> None:
        check_same_options(saved_options, options, MAY_CHANGE)
        check_record(record)

    saved = checkpoint.restore(manager, template=template, check=check)
    if saved is not None:
        checkpoint.set_aside(manager, saved.step)
    elif config.resume:
        may_change = MAY_CHANGE + MAY_CHANGE_ELSEWHERE
        with checkpoint.open_manager(epath.Path(config.resume) / "checkpoints", create=False) as m:
            saved = checkpoint.restore(
                m,
                template=template,
                check=lambda saved_options, _: check_same_options(
                    saved_options, options, may_change
                ),
            )
        if saved is None:
            raise TrainingError(f"config.resume={config.resume}: there is no checkpoint")
        if saved.step >= config.num_steps:
            raise TrainingError(
                f"config.resume={config.resume} is at step {saved.step} already: num_steps="
                f"{config.num_steps} must be larger"
            )
    return saved


def begin(config: ConfigDict, folder: epath.PathLike, state: Any, network: str) -> None:
    """Says what is trained, checks that all processes agree, and writes the run's description.

    Args:
      config: the options of the run, written to config.json.
      folder: of the run. Lines of train_log.jsonl that are ahead of the state are removed.
      state: to start from.
      network: name of the field of the state with the parameters that are listed in
        parameters.txt.

    Raises UsageError if processes differ in their options or in the state.
    """
    folder, params, step = epath.Path(folder), getattr(state, network), int(state.step)
    parameters = sum(x.size for x in jax.tree.leaves(params))
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    resumed = f"; resumed at step {step}" if step else ""
    device = jax.local_devices()[0].device_kind
    print(
        f"{network}: {parameters:,} parameters; {jax.device_count()} x {device}{processes}{resumed}"
    )
    if jax.process_count() > 1:
        options_sha256 = hashlib.sha256(config.to_json().encode()).hexdigest()
        state_sha256 = checkpoint.arrays_sha256(state)
        distributed.check_equal({"options": options_sha256, "initial weights": state_sha256})
    if distributed.is_main_process():
        overview = parameter_overview.get_parameter_overview(params, include_stats=False)
        files.write_text(folder / "parameters.txt", overview + "\n")
        files.write_text(folder / "config.json", config.to_json(indent=2) + "\n")
        train_log.keep_until(folder / "train_log.jsonl", step)


def run_steps(
    config: ConfigDict,
    manager: checkpoint.Manager,
    state: Any,
    record: dict[str, Any],
    *,
    step_fn: Callable,
    arrays: Mapping[str, np.ndarray],
    make_batches: Callable[..., Iterator[Batch]],
    key: Array,
    options: Any,
    learning_rate: Callable[[int], float],
    on_checkpoint: Callable[[Any, int], tuple[dict[str, Any], dict[str, np.ndarray]]],
    writer: Any = None,
) -> Any:
    """Runs steps until `config.num_steps`; returns the last state.

    Args:
      config: num_steps, log_every, checkpoint_every, batch_size; it is saved with checkpoints.
      manager: of the checkpoints. The other files are written to the folder above.
      state: to start from.
      record: saved with checkpoints: `train_seconds` and what is known of the run.
      arrays, make_batches: the training images and `images.batches.train_batches`.
      step_fn, key, options: the step (`compile_ahead`) and its arguments.
      learning_rate: given the number of steps done, returns the next step's.
      on_checkpoint: given state and step, returns additions to the record, and pictures by name.
      writer: of clu.metric_writers, for TensorBoard, or None.

    Raises TrainingError if a metric is not finite or batches end early, Stopped after a signal.
    """
    start, is_main = int(state.step), distributed.is_main_process()
    log_path = epath.Path(manager.directory).parent / "train_log.jsonl"
    options_json = json.loads(config.to_json())
    earlier_seconds, began = record["train_seconds"], time.monotonic()
    state, key, options = replicate((state, key, options))
    rows = distributed.rows(config.batch_size)
    batches = make_batches(arrays, start, batch_size=config.batch_size, seed=config.seed, rows=rows)
    pending: list[dict[str, Array]] = []  # metrics of the steps since the last line of the log
    step = start
    with contextlib.ExitStack() as stack:
        steps = range(start + 1, config.num_steps + 1)
        for step, batch in zip(steps, batches, strict=False):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = step_fn(state, shard(batch), key, options)
            pending.append(metrics)
            # Two queued steps keep devices busy; hundreds starve the threads of CPU devices.
            jax.block_until_ready(pending[-3:][0])
            if step == start + 1:  # what follows does not compile: from here time is speed
                stack.enter_context(distributed.finish_step_on_interrupt())
                timed_step, timed_at = step, time.monotonic()
                bar = stack.enter_context(_progress_bar(config, step, is_main))
            bar.update()
            stop = distributed.must_stop()
            save = stop or step % config.checkpoint_every == 0 or step == config.num_steps
            if save or step % config.log_every == 0:
                line, pending = {"step": step} | _means(pending, step), []
                line["learning_rate"] = float(learning_rate(step - 1))
                now = time.monotonic()
                if step > timed_step:
                    speed = (step - timed_step) * config.batch_size / (now - timed_at)
                    line["images_per_second"] = speed
                timed_step, timed_at = step, now
                if is_main:
                    train_log.write_line(log_path, line, bar, config.num_steps, writer)
            if save:
                seconds = earlier_seconds + time.monotonic() - began
                with progress.waiting("predicting the held-out images", "compiles once"):
                    additions, pictures = on_checkpoint(state, step)
                record |= additions | {"train_seconds": seconds}
                checkpoint.save(manager, state, step, config=options_json, record=record)
                if writer is not None:
                    writer.write_images(step, pictures)
                    writer.flush()
                timed_at = time.monotonic()
            if stop and step < config.num_steps:
                raise distributed.Stopped(f"stopped at step {step} of {config.num_steps}")
    if step < config.num_steps:
        raise TrainingError(f"the training images ended at step {step}")
    return state


def _means(pending: list[dict[str, Array]], last_step: int) -> dict[str, float]:
    """Returns the mean of each metric over steps; raises TrainingError if one is not finite."""
    fetched = jax.device_get(pending)
    stacked = {name: np.array([float(m[name][0]) for m in fetched]) for name in fetched[0]}
    check_finite(stacked, last_step)
    return {name: values.mean() for name, values in stacked.items()}


def _progress_bar(config: ConfigDict, step: int, is_main: bool) -> tqdm:
    return tqdm(
        initial=step - 1,
        total=config.num_steps,
        disable=None if is_main else True,  # None: where there is no terminal
        unit="step",
        leave=False,
    )
