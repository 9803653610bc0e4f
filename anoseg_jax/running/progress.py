"""Says what the program is doing while the user waits."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from anoseg_jax.running import distributed

# Seconds until a wait is announced, and between two lines where there is no terminal.
ANNOUNCE_AFTER = 1.0
REPEAT_AFTER = 10.0


@contextlib.contextmanager
def waiting(what: str, duration: str, began: float | None = None) -> Iterator[None]:
    """Announces what the `with` block does if it takes longer than a second.

    In a terminal a clock counts the seconds; elsewhere a line is printed at the start, every ten
    seconds and at the end. A separate thread writes: the block may be in a compiler that does not
    return to Python.

    Args:
      what: for example "compiling the training step".
      duration: how long it takes, for example "usually under a minute, once".
      began: the `time.monotonic()` of its start; None is now.
    """
    if not distributed.is_main_process():
        yield
        return
    began, done = began or time.monotonic(), threading.Event()
    terminal = sys.stderr.isatty()

    def say(text: str, end: str) -> None:
        print(text, end=end, file=sys.stderr, flush=True)

    def announce() -> None:
        if done.wait(ANNOUNCE_AFTER):
            return
        say(f"{what} ({duration}) ...", "" if terminal else "\n")
        while not done.wait(1.0 if terminal else REPEAT_AFTER):
            clock = f"... {time.monotonic() - began:.0f} s"
            say(*((f"\r{what} ({duration}) {clock}", "") if terminal else (clock, "\n")))
        seconds = time.monotonic() - began
        say(("\r\033[K" if terminal else "") + f"{what}: {seconds:.0f} s", "\n")

    thread = threading.Thread(target=announce, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
