"""The job that this process is, or is a part of: its processes, signals, and the lock on a folder.

Needs neither TensorFlow nor the data. The processes of a job run the same program on the same
options; what they write, the first of them writes.
"""

import contextlib
import fcntl
import itertools
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from anoseg_jax import UsageError, first_line

# Exit codes: stopped by a signal with everything saved (EX_TEMPFAIL: to be tried again); ended
# because another process of the job did.
STOPPED = 75
PEER_FAILED = 76
# Seconds after which a process that gives no sign of life is given up, and the job with it.
SILENCE = 30
# Seconds that processes wait for each other at the start and at the end.
PATIENCE = 300

_signals: list[int] = []
# jax numbers the points at which processes agree to stop; from where no step of orbax's can be.
_points = itertools.count(2**30)


class Stopped(Exception):
    """The job ends because a signal asked for it; what was done is saved."""


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the job's other processes; must come before anything else is done with jax.

    Args:
      coordinator: "HOST:PORT" of the first process; all three None where jax finds them by itself
        (Slurm, Open MPI, Cloud TPU, GKE).
      num_processes: of the job.
      process_id: from 0 to `num_processes` - 1.

    Raises UsageError if they cannot be found, or are not there within `PATIENCE` seconds.
    """
    given = (coordinator, num_processes, process_id)
    if None in given and any(value is not None for value in given):
        raise UsageError("--coordinator, --num_processes and --process_id need each other")
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=PATIENCE,
        )
    except (ValueError, RuntimeError) as error:
        hint = "" if coordinator else "; where jax finds no cluster give --coordinator=HOST:PORT"
        raise UsageError(f"the job's processes do not meet: {first_line(error)}{hint}") from error
    # CPUs connect at the first exchange, for which they wait 30 s: now, as all are there.
    ones = np.ones(jax.local_device_count())
    jax.block_until_ready(jax.pmap(lambda x: jax.lax.psum(x, "all"), axis_name="all")(ones))
    multihost_utils.process_allgather(ones)


def is_distributed() -> bool:
    """Returns whether `start` has joined this process to others."""
    return jax.distributed.is_initialized()


def peer_failed(error: Exception) -> str:
    """Returns what to say of an error that may come from the end of another process of the job."""
    traceback.print_exception(error)
    return (
        f"{first_line(error)}; if another process of this job ended, its own output says why; "
        "everything up to the last checkpoint is saved: start all processes again"
    )


def leave(code: int) -> NoReturn:
    """Ends this process with an exit code.

    One of several that failed does not wait for the others, as jax does: they would wait for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_distributed() and code not in (0, STOPPED):
        os._exit(code)
    sys.exit(code)


def is_main_process() -> bool:
    """Returns whether this process is the one that writes and speaks for the job."""
    return jax.process_index() == 0


def rows(batch_size: int) -> slice:
    """Returns which rows of the batch of all devices this process reads: each row is of one."""
    count = batch_size // jax.process_count()
    return slice(jax.process_index() * count, (jax.process_index() + 1) * count)


def check_equal(values: Mapping[str, str]) -> None:
    """Raises UsageError, naming the first, if processes differ in one of these hexadecimal hashes.

    Training on would not fail: it would give weights that no run can repeat.
    """
    if jax.process_count() == 1:
        return
    for name, value in values.items():
        digests = multihost_utils.process_allgather(
            np.frombuffer(bytes.fromhex(value), np.uint8).astype(np.int32)
        )
        others = np.flatnonzero((digests != digests[0]).any(axis=1))
        if len(others):
            raise UsageError(
                f"process {others[0]} has other {name} than process 0: all processes need the same "
                "command, images and --workdir, on storage that all of them see"
            )


def stop_on_signals() -> None:
    """Lets SIGTERM and SIGINT end the job at the next `must_stop`; a second one ends it at once."""
    several = is_distributed()

    def note(number: int, frame: object) -> None:
        del frame
        print(f"{signal.Signals(number).name}: saves and stops", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if several:  # see must_stop
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _signals.append(number)

    signal.signal(signal.SIGINT, note)
    if not several:
        signal.signal(signal.SIGTERM, note)


def must_stop() -> bool:
    """Returns whether a signal has asked the job to end: in all processes at the same call.

    To be called by all processes equally often: once a step, and between what takes long.
    """
    if not is_distributed():
        return bool(_signals)
    # A signal reaches each process at another step, or one of them alone: jax's preemption service
    # listens to SIGTERM and names a step that none of them has passed.
    return multihost_utils.reached_preemption_sync_point(next(_points))


def stop_if_asked(where: str) -> None:
    """Raises Stopped, saying where, if a signal has asked the job to end; see `must_stop`."""
    if must_stop():
        raise Stopped(f"stopped {where}")


@contextlib.contextmanager
def lock(folder: epath.PathLike, *, shared: bool = False) -> Iterator[None]:
    """Holds `folder`, which is made, against other jobs; the end of the process ends it, too.

    With `shared`, jobs that share it may hold it together. On storage without locks (gs://)
    nothing is held.

    Raises UsageError if another job holds it; OSError if the folder cannot be written to.
    """
    folder = epath.Path(folder)
    if not is_main_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    if "://" in os.fspath(folder):
        yield
        return
    # Not through epath: a lock is on a file of this machine.
    with os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT), "r+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{folder} is in use by {file.read().strip() or 'another job'}: wait for it, or "
                "take another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
