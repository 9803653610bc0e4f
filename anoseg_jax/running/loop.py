"""The training loop: devices, logs, checkpoints, stopping and resuming.

It is independent of the method. A step is a pure function `(state, batch, key, options) -> (state,
metrics)`. The state has a `step` and no device axis; metrics are float32 scalars.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from flax.serialization import to_state_dict
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from anoseg_jax import UsageError
from anoseg_jax.running import checkpoint, distributed, files, progress, train_log

# Options that a resumed run may change.
MAY_CHANGE = (
    "num_steps log_every checkpoint_every accumulate remat resume dataset data_dir tfds_dir "
    "categories category_options shard variants evaluate detector maps_dir compilation_cache "
    "layout mask_suffix ignore_name max_megapixels"
).split()
# Options that may also differ from those of `config.resume`: the memory bank is then built anew.
MAY_CHANGE_ELSEWHERE = ["seed", "held_out", "learning_rate", "warmup_steps"]

Batch = dict[str, np.ndarray]
Record = dict[str, Any]


class TrainingError(UsageError):
    """Training cannot continue; the message is one line that says why."""


class Training(NamedTuple):
    """What the loop runs: a step, its arguments, and what checkpoints record.

    Attributes:
      network: the field of the state whose parameters parameters.txt lists.
      template: the state's shapes and dtypes.
      step: see `parallelize`; `key` and `options` are its last two arguments.
      key: the PRNG key of the seed, the same at every step.
      options: the arrays that the step takes.
      arrays: all training images, [n, ...], and their ids.
      learning_rate: from the number of completed steps to the next step's learning rate.
      check_record: raises if the record of a checkpoint in this folder does not fit this run.
      start: from the checkpoint to resume (or None) to the first state and the record so far.
      on_checkpoint: from state and step to additions to the record, and images for TensorBoard.
      has_data_of: whether a record is of this run's data; if not, a run with `config.resume` starts
        from the weights at step 0, with a schedule of its own.
    """

    network: str
    template: Any
    step: Callable
    key: Array
    options: Any
    arrays: Mapping[str, np.ndarray]
    learning_rate: Callable[[int], Any]
    check_record: Callable[[Record], None]
    start: Callable[[checkpoint.Saved | None], tuple[Any, Record]]
    on_checkpoint: Callable[[Any, int], tuple[Record, dict[str, np.ndarray]]]
    has_data_of: Callable[[Record], bool] = lambda record: True


@functools.cache
def parallelize(step: Callable, static: Any) -> Callable:
    """Returns the step on all local devices: one compiled program per set of static options.

    It takes state, batch, key and options. Batches have a device axis, the state has none.
    """
    return jax.pmap(
        functools.partial(step, static=static),
        axis_name="batch",
        in_axes=(None, 0, None, None),
        out_axes=(None, 0),
        donate_argnums=0,
    )


def replicate(tree: Any) -> Any:
    """Replicates arrays over the local devices, in the placement that `jax.pmap` returns.

    Without it, the first two steps would each compile: the first for the placement of its input,
    the second for the placement of the first one's output.
    """
    mesh = Mesh(jax.local_devices(), ("batch",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(batch: Batch) -> Batch:
    """Splits a process's batch over its devices: [b, ...] to [devices, b / devices, ...]."""
    devices = jax.local_device_count()
    return {name: x.reshape(devices, -1, *x.shape[1:]) for name, x in batch.items()}


def compile_ahead(training: Training, batch_size: int) -> Callable:
    """Returns the training's step; its first call says that it compiles.

    With one device, a thread compiles it at once, by running a step on zeros, and the first call
    waits for that thread. Several devices do not: their collective operations must run in one
    order and, on CPUs, need all threads.
    """
    began, calls, ahead = time.monotonic(), itertools.count(), None

    def run_on_zeros() -> None:
        zeros = lambda x, *shape: np.zeros(shape or x.shape, x.dtype)  # noqa: E731
        batch = {name: zeros(x, batch_size, *x.shape[1:]) for name, x in training.arrays.items()}
        state = jax.tree.map(zeros, training.template)
        state, *others = replicate((state, training.key, training.options))
        jax.block_until_ready(training.step(state, shard(batch), *others))

    if jax.device_count() == 1:
        executor = ThreadPoolExecutor(max_workers=1)
        ahead = executor.submit(run_on_zeros)
        executor.shutdown(wait=False)

    def run(*arguments: Any) -> Any:
        if next(calls):
            return training.step(*arguments)
        start = began if ahead else None
        with progress.waiting("compiling the training step", "usually under a minute", start):
            if ahead:
                ahead.exception()  # waits; if the thread failed, the step itself fails below
            return jax.block_until_ready(training.step(*arguments))

    return run


def check_finite(metrics: Mapping[str, np.ndarray], last_step: int) -> None:
    """Raises TrainingError with the first step, and its metrics, that are not finite.

    `metrics` have one value per step, [steps]; the last one is that of `last_step`.
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
    """Raises TrainingError with every option that a resumed run must not change but does."""
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
    manager: checkpoint.Manager, config: ConfigDict, training: Training
) -> checkpoint.Saved | None:
    """Returns the checkpoint to resume from, or None for a fresh start.

    1. The newest intact checkpoint of this folder, which `manager` has open.
    2. The newest one of `config.resume`. It may have another seed, `held_out`, learning rate and
       warm-up, and other images; with these it is returned as step 0 of a new schedule.

    Raises:
      TrainingError: options differ, or `config.resume` has no checkpoint or all steps already.
      checkpoint.CheckpointError: there are checkpoints, and none can be read.
    """
    options = json.loads(config.to_json())

    def check(saved_options: dict, record: Record) -> None:
        check_same_options(saved_options, options, MAY_CHANGE)
        training.check_record(record)

    def check_elsewhere(saved_options: dict, _: Record) -> None:
        check_same_options(saved_options, options, MAY_CHANGE + MAY_CHANGE_ELSEWHERE)

    saved = checkpoint.restore(manager, template=training.template, check=check)
    if saved is not None:
        checkpoint.set_aside(manager, saved.step)
    elif config.resume:
        where = f"config.resume={config.resume}"
        with checkpoint.open_manager(epath.Path(config.resume) / "checkpoints", create=False) as m:
            saved = checkpoint.restore(m, template=training.template, check=check_elsewhere)
        if saved is None:
            raise TrainingError(f"{where}: there is no checkpoint")
        if not training.has_data_of(saved.record):
            state = saved.state.replace(step=np.zeros_like(saved.state.step))
            return saved._replace(state=state, step=0)
        if saved.step >= config.num_steps:
            raise TrainingError(
                f"{where} is at step {saved.step} already: num_steps={config.num_steps} must be "
                "larger"
            )
    return saved


def begin(config: ConfigDict, folder: epath.Path, state: Any, network: str) -> None:
    """Checks that all processes agree, prints what is trained, writes config.json, parameters.txt.

    Lines of train_log.jsonl that are ahead of the state are removed.

    Raises UsageError if processes differ in their options or in the state.
    """
    params, step = getattr(state, network), int(state.step)
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


def run(
    config: ConfigDict,
    folder: epath.PathLike,
    training: Training,
    *,
    make_batches: Callable[..., Iterator[Batch]],
    writer: Any = None,
) -> checkpoint.Saved:
    """Trains until `config.num_steps`, or resumes; returns the newest checkpoint.

    Of `config` the loop reads num_steps, log_every, checkpoint_every, batch_size, seed and resume;
    all options are saved. The other arguments, the result and errors are those of `train.fit`.
    """
    folder = epath.Path(folder)
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        saved = restore(manager, config, training)
        if saved is None or saved.step < config.num_steps:
            step = compile_ahead(training, config.batch_size)  # while the state is created
            state, record = training.start(saved)
            begin(config, folder, state, training.network)
            batches = make_batches(
                training.arrays,
                int(state.step),
                batch_size=config.batch_size,
                seed=config.seed,
                rows=distributed.rows(config.batch_size),
            )
            training = training._replace(step=step)
            saved = run_steps(config, manager, training, state, record, batches, writer)
    return saved._replace(state=to_state_dict(saved.state))


def run_steps(
    config: ConfigDict,
    manager: checkpoint.Manager,
    training: Training,
    state: Any,
    record: Record,
    batches: Iterator[Batch],
    writer: Any,
) -> checkpoint.Saved:
    """Runs steps from `state` until `config.num_steps`; returns the last checkpoint; see `run`."""
    start, is_main = int(state.step), distributed.is_main_process()
    log_path = epath.Path(manager.directory).parent / "train_log.jsonl"
    options_json = json.loads(config.to_json())
    earlier_seconds, began = record["train_seconds"], time.monotonic()
    state, key, options = replicate((state, training.key, training.options))
    pending: list[dict[str, Array]] = []  # metrics of the steps since the last line of the log
    step, saved = start, None
    with contextlib.ExitStack() as stack:
        steps = range(start + 1, config.num_steps + 1)
        for step, batch in zip(steps, batches, strict=False):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = training.step(state, shard(batch), key, options)
            pending.append(metrics)
            # Two queued steps keep devices busy; hundreds starve the threads of CPU devices.
            jax.block_until_ready(pending[-3:][0])
            if step == start + 1:  # it compiled: speed is measured from here on
                stack.enter_context(distributed.finish_step_on_interrupt())
                timed_step, timed_at = step, time.monotonic()
                bar = stack.enter_context(_progress_bar(config, step, is_main))
            bar.update()
            stop = distributed.must_stop()
            save = stop or step % config.checkpoint_every == 0 or step == config.num_steps

            # Log.
            if save or step % config.log_every == 0:
                line, pending = {"step": step} | _means(pending, step), []
                line["learning_rate"] = float(training.learning_rate(step - 1))
                now = time.monotonic()
                if step > timed_step:
                    speed = (step - timed_step) * config.batch_size / (now - timed_at)
                    line["images_per_second"] = speed
                timed_step, timed_at = step, now
                if is_main:
                    train_log.write_line(log_path, line, bar, config.num_steps, writer)

            # Save. All processes predict and save together; orbax lets one of them write.
            if save:
                seconds = earlier_seconds + time.monotonic() - began
                with progress.waiting("predicting good images for thresholds", "compiles once"):
                    additions, images = training.on_checkpoint(state, step)
                record |= additions | {"train_seconds": seconds}
                saved = checkpoint.save(manager, state, step, config=options_json, record=record)
                if writer is not None:
                    writer.write_images(step, images)
                    writer.flush()
                timed_at = time.monotonic()
            if stop and step < config.num_steps:
                raise distributed.Stopped(f"stopped at step {step} of {config.num_steps}")
    if step < config.num_steps:
        raise TrainingError(f"the training images ended at step {step}")
    return saved


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
        disable=None if is_main else True,  # None: disabled unless there is a terminal
        unit="step",
        leave=False,
    )
