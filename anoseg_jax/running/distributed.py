"""The processes of a run: how they connect, stop on signals, and lock a folder.

Needs neither TensorFlow nor the data. All processes run the same program with the same options;
only the main process (number 0) writes.
"""

import contextlib
import itertools
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from anoseg_jax import UsageError, first_line

# Exit codes. STOPPED: a signal stopped the run and everything is saved (EX_TEMPFAIL: try again).
# PEER_FAILED: this process ended because another process of the run did.
STOPPED = 75
PEER_FAILED = 76
# Seconds without a heartbeat after which a process counts as lost, and the run ends.
HEARTBEAT_TIMEOUT = 30
# Seconds that processes wait for each other at the start and at the end.
START_TIMEOUT = 300

_signals: list[int] = []
# Numbers of the points at which processes agree to stop; no step number of orbax is that large.
_points = itertools.count(2**30)


class Stopped(Exception):
    """The run ends because a signal asked for it; a checkpoint is saved."""


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects to the run's other processes; must come before any other use of jax.

    `coordinator` is the "HOST:PORT" of process 0. All three arguments are None if jax finds the
    processes by itself (Slurm, Open MPI, Cloud TPU, GKE).

    Raises UsageError if they cannot be found or do not start within `START_TIMEOUT` seconds.
    """
    flags = (coordinator, num_processes, process_id)
    if None in flags and any(value is not None for value in flags):
        raise UsageError("--coordinator, --num_processes and --process_id need each other")
    try:
        jax.distributed.initialize(
            *flags,
            initialization_timeout=START_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=START_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        hint = "" if coordinator else "; if jax finds no cluster give --coordinator=HOST:PORT"
        raise UsageError(
            f"the processes of this run cannot connect: {first_line(error)}{hint}"
        ) from error
    require_devices()
    # CPU processes connect at their first exchange and wait 30 s for it: now, while all are here.
    ones = np.ones(jax.local_device_count())
    jax.block_until_ready(jax.pmap(lambda x: jax.lax.psum(x, "all"), axis_name="all")(ones))
    multihost_utils.process_allgather(ones)


def require_devices() -> None:
    """Raises UsageError if JAX finds no device of the kind that JAX_PLATFORMS asks for."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # jax has an assertion where none is found
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = f" ({first_line(error)})" if str(error) else ""
        raise UsageError(
            f"JAX_PLATFORMS={asked}: JAX finds no such device here{why}: unset JAX_PLATFORMS to "
            "take what there is, or install the driver and jax[cuda12], jax[cuda13] or jax[tpu]"
        ) from error


def is_distributed() -> bool:
    """Returns whether `start` has connected this process to others."""
    return jax.distributed.is_initialized()


def peer_failed(error: Exception) -> str:
    """Returns the message for an error that the end of another process may have caused."""
    traceback.print_exception(error)
    return (
        f"{first_line(error)}; if another process of this run ended, its output says why. "
        "Checkpoints are kept. Start all processes again to resume."
    )


def leave(code: int) -> NoReturn:
    """Ends this process with an exit code.

    A failed process must not wait for the others at exit, as jax does: they wait for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_distributed() and code not in (0, STOPPED):
        os._exit(code)
    sys.exit(code)


def is_main_process() -> bool:
    """Returns whether this process is the one that writes files and messages."""
    return jax.process_index() == 0


def rows(batch_size: int) -> slice:
    """Returns the rows of the batch of all devices that this process reads."""
    count = batch_size // jax.process_count()
    return slice(jax.process_index() * count, (jax.process_index() + 1) * count)


def check_equal(values: Mapping[str, str]) -> None:
    """Raises UsageError if processes differ in one of these hexadecimal hashes, by name.

    Training would not fail, but no run could reproduce its weights.
    """
    for name, value in values.items():
        digests = multihost_utils.process_allgather(
            np.frombuffer(bytes.fromhex(value), np.uint8).astype(np.int32)
        )
        others = np.flatnonzero((digests != digests[0]).any(axis=1))
        if len(others):
            raise UsageError(
                f"process {others[0]} differs from process 0 in its {name}: all processes need "
                "the same command, images and --workdir, on storage that all of them see"
            )


def broadcast(tree: Any) -> Any:
    """Returns the main process's arrays in all processes, as numpy arrays."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def stop_on_signals() -> None:
    """Lets SIGTERM end the run at the next `must_stop`; a second one ends the process at once.

    SIGINT (Ctrl-C) ends the process at once, even while Python waits for a compiler; see
    `finish_step_on_interrupt` for the exception.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not is_distributed():  # otherwise jax's preemption service listens to SIGTERM
        signal.signal(signal.SIGTERM, _note_signal)


@contextlib.contextmanager
def finish_step_on_interrupt() -> Iterator[None]:
    """Lets SIGINT (Ctrl-C) end the run at the next `must_stop`; a second one ends the process."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:  # the handler of a notebook or a test
        yield
        return
    signal.signal(signal.SIGINT, _note_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _note_signal(number: int, _: object) -> None:
    again = "; press Ctrl-C again to stop now" if number == signal.SIGINT else ""
    # Not print: the signal may have interrupted a print, which cannot be entered twice.
    os.write(2, f"\n{signal.Signals(number).name}: stopping after this step{again}\n".encode())
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if is_distributed():  # see must_stop
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _signals.append(number)


def must_stop() -> bool:
    """Returns whether a signal has asked the run to end: the same in all processes.

    All processes must call it equally often: once a step, and between long tasks.
    """
    if not is_distributed():
        return bool(_signals)
    # A signal reaches each process at another step, or only one of them. jax's preemption service
    # listens to SIGTERM and names a step that no process has passed.
    return multihost_utils.reached_preemption_sync_point(next(_points))


def stop_if_asked(where: str) -> None:
    """Raises Stopped, saying where, if a signal has asked the run to end; see `must_stop`."""
    if must_stop():
        raise Stopped(f"stopped {where}")


@contextlib.contextmanager
def lock(folder: epath.PathLike, *, shared: bool = False) -> Iterator[None]:
    """Creates `folder` and locks it against other runs, until the block or the process ends.

    Several runs may hold a `shared` lock. On storage without locks (gs://) nothing is locked.

    Raises UsageError if another run holds the lock; OSError if the folder cannot be written to.
    """
    folder = epath.Path(folder)
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
    if not is_main_process() or "://" in os.fspath(folder):
        yield
        return
    try:
        import fcntl
    except ImportError:
        raise UsageError(
            "this system has no file locks: on Windows, train in WSL (Windows Subsystem for Linux)"
        ) from None
    # Not with epath: a lock needs a local file.
    with os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT), "r+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{folder} is in use by {file.read().strip() or 'another run'}: wait for it, or "
                "take another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
