"""`make demo`: generated parts, a training, predictions of new photographs, and where to look."""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CATEGORIES = ("sheet", "blister")
TINY = {
    **{"image_size": 32, "model.width": 8, "model.depth": 2, "model.latent": 8},
    **{"model.discriminator_width": 8, "model.discriminator_depth": 2, "memory_bank.size": 64},
    **{"defects.preset": "paper", "batch_size": 4, "num_steps": 2, "warmup_steps": 1},
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What a tiny demo prints, the folder that it writes to, and the home of its user."""
    folder, home = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("home")
    flags = " ".join(f"--config.{name}={value}" for name, value in TINY.items())
    variables = {"DEMO": folder, "DEMO_FLAGS": flags, "BIN": Path(sys.executable).parent}
    variables["DEMO_CACHE"] = os.environ.get("JAX_COMPILATION_CACHE_DIR", folder / "cache")
    make = ["make", "--assume-old=install", "demo", *(f"{k}={v}" for k, v in variables.items())]
    # Not a part of the `make test` that may have started the tests.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    env["HOME"] = str(home)
    done = subprocess.run(make, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder, home


def test_the_demo_names_the_page_to_open_as_a_path(demo):
    output, folder, _ = demo
    page = re.search(r"^Open this page: +(\S+)$", output, re.M)
    assert page.group(1) == f"{folder}/report.html" and Path(page.group(1)).is_file()
    others = re.search(r"^The new ones: +(.+)$", output, re.M).group(1).split(", ")
    assert len(others) == 2 and all((ROOT / other).is_file() for other in others)


def test_the_demo_ends_with_three_commands_for_your_own_photographs(demo):
    output, _, _ = demo
    commands = [shlex.split(line) for line in output.splitlines()[-3:]]
    assert all(command[1] == "launch.py" for command in commands)
    assert [command[-1] for command in commands] == [
        "--mode=check",
        "--workdir=runs/mine",
        "PHOTOGRAPHS",
    ]


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_demo_judges_new_photographs_of_each_part(demo, category):
    _, folder, _ = demo
    with (folder / "predictions" / category / "predictions.csv").open() as file:
        files = [Path(row["file"]).name for row in csv.DictReader(file)]
    assert sorted(files) == sorted(path.name for path in (folder / "new" / category).iterdir())
    assert len(files) == 6


def test_the_demo_writes_nothing_in_the_home_folder_and_speaks_of_no_download(demo):
    output, _, home = demo
    assert not list(home.iterdir())
    assert "ownload" not in output
