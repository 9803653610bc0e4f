"""What a run without test images ends in: thresholds, held-out photographs, the next command."""

import shlex
from collections.abc import Mapping
from typing import Any

from anoseg_jax.report.verdicts import threshold_lines


def is_only_good(results: Mapping[str, Any]) -> bool:
    """Returns whether a category's results show held-out good photographs, not test images."""
    return bool(results.get("held_out_images"))


def predict_command(command: str | None, category: str) -> str:
    """Returns the command that judges new photographs, from the command that trained."""
    words = shlex.split(command or "")
    end = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    workdir = "W"
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--workdir", "-workdir"):
            workdir = (value if equals else following).rstrip("/")
    program = words[:end] if end < len(words) else ["python", "launch.py"]
    folder = f"{workdir}/{category}"
    options = ["--mode=predict", f"--workdir={folder}", f"--out={folder}/predictions"]
    return f"{shlex.join([*program, *options])} PHOTOGRAPHS"


def summary(category: str, results: Mapping[str, Any], command: str) -> str:
    """Returns what the terminal shows at the end of such a category."""
    held_out = results["held_out_images"]
    lines = [
        f"{category}: there are no test images, so nothing is measured",
        *threshold_lines(results),
        f"pictures: {held_out} held-out good photographs with maps, in {category}/report.html",
        f"judge new photographs: {predict_command(command, category)}",
    ]
    return "\n  ".join(lines)
