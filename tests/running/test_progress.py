"""What the program says while the user waits."""

import io
import re
import sys
import time

import pytest

from anoseg_jax.running import progress


class Output(io.StringIO):
    """Stands for stderr."""

    def __init__(self, *, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def wait_for_text(self):
        began = time.monotonic()
        while not self.getvalue() and time.monotonic() - began < 10:
            time.sleep(0.01)
        return self.getvalue()


def test_a_short_wait_is_not_announced(capsys):
    with progress.waiting("compiling", "about 30 s, once"):
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_long_wait_is_announced_and_then_how_long_it_took(monkeypatch, terminal):
    """In a terminal in one line that is written over; also if the block fails."""
    output = Output(terminal=terminal)
    monkeypatch.setattr(sys, "stderr", output)
    began = time.monotonic()
    with pytest.raises(ValueError, match="failed"):
        with progress.waiting("compiling", "about 30 s, once"):
            announced = output.wait_for_text().rstrip("\n")
            assert time.monotonic() - began >= 1
            raise ValueError("failed")
    assert announced == "compiling (about 30 s, once) ..."
    before_end = "\r\x1b[K" if terminal else "\n"
    expected = re.escape(announced + before_end + "compiling: ") + r"\d+ s\n"
    assert re.fullmatch(expected, output.getvalue())
