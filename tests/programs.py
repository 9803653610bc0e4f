"""Programs that tests start in a process of their own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(program: str, *arguments) -> subprocess.CompletedProcess:
    """Runs Python code from the root of the checkout; returns its output and exit code."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
