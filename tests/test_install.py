"""What is installed: the wheel outside the checkout, the small installation, what make does."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from drawings import photo, save

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    *("--config.image_size=32", "--config.model.width=8", "--config.model.depth=2"),
    *("--config.model.discriminator_depth=2", "--config.memory_bank.size=64"),
    *("--config.batch_size=4", "--config.num_steps=2", "--config.evaluate.baselines=False"),
    *("--config.compilation_cache=", "--config.defects.preset=paper"),
)
# Of the small installation: what only training and reports need is not there.
LEFT_OUT = ("tensorflow", "tensorflow_datasets", "tensorboard", "clu", "sklearn", "matplotlib")
WITHOUT = f"""
import sys
LEFT_OUT = {LEFT_OUT}
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in LEFT_OUT:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def names_of(requirements):
    lines = [line.strip() for line in requirements.splitlines()]
    return {line for line in lines if line and not line.startswith("#")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel unpacked, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "source").mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    for name in ("anoseg_jax", "configs", "data"):
        shutil.copytree(ROOT / name, folder / "source" / name)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    for command in (
        (*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"),
        (*pip, "install", "--no-deps", "--target", folder / "site", "--find-links", folder)
        + ("--no-index", "anoseg_jax"),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "source")
    return folder / "site"


RUN = """
import runpy, sys

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(installed, cwd, *arguments, before=""):
    """Runs the console script of the wheel in a folder outside the checkout."""
    return subprocess.run(
        [sys.executable, "-c", before + RUN, installed / "bin" / "anoseg", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(installed, tmp_path_factory):
    """The workdir of a training on generated parts, by the wheel's own config and builder."""
    folder = tmp_path_factory.mktemp("trained")
    tfds_dir = f"--config.tfds_dir={folder}/tfds"
    done = run(installed, folder, "--config=synthetic:weave", "--workdir=w", tfds_dir, *TINY)
    assert done.returncode == 0, done.stderr
    return folder / "w"


def test_every_package_is_in_the_wheel(installed):
    for top, root in {
        "anoseg_jax": "anoseg_jax",
        "configs": "anoseg_jax/bundled/configs",
        "data": "anoseg_jax/bundled/data",
    }.items():
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".jinja", ".bib", ".txt"):
                assert (installed / root / path.relative_to(ROOT / top)).exists(), path


def test_the_wheel_trains_outside_the_checkout_with_its_own_configs_and_builders(trained):
    results = json.loads((trained / "results.json").read_text())
    assert results["categories"]["weave"]["steps"] == 2
    assert results["command"].startswith("anoseg --config=synthetic:weave --workdir=w")
    assert (trained / "report.html").exists()


def test_photographs_are_predicted_without_what_only_training_needs(installed, trained, tmp_path):
    save(photo(1), tmp_path / "0.png")
    model = f"--workdir={trained / 'weave'}"
    predict = ("--mode=predict", model, "--out=out", "0.png")
    done = run(installed, tmp_path, *predict, before=WITHOUT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").exists()
    export = ("--mode=export", model, "--out=exported", "--format=stablehlo")
    done = run(installed, tmp_path, *export, before=WITHOUT)
    assert done.returncode == 0, done.stderr
    (tmp_path / "data" / "part").mkdir(parents=True)
    save(photo(1), tmp_path / "data" / "part" / "train" / "good" / "0.png")
    data = ("--config=folder:all:cpu", "--config.data_dir=data")
    assert run(installed, tmp_path, "--mode=check", *data, before=WITHOUT).returncode == 0
    for arguments in ((*data, "--workdir=w"), ("--mode=report", f"--workdir={trained}")):
        done = run(installed, tmp_path, *arguments, before=WITHOUT)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert re.search("needs .*, which the installation for predicting alone", done.stderr)


def test_predictor_is_imported_without_what_only_training_needs():
    program = f"{WITHOUT}\nfrom anoseg_jax import Predictor\nprint(Predictor.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "Predictor\n", done.stderr


def test_the_small_installation_is_a_part_of_the_whole_one():
    small = names_of((ROOT / "requirements-predict.txt").read_text())
    assert small < names_of(setup()["options"]["install_requires"])
    assert not {re.split(r"[<>=\[;]", name)[0] for name in small} & {
        *("tensorflow-cpu", "tensorflow", "clu", "scikit-learn", "matplotlib")
    }


def test_make_installs_what_tests_need_for_tests_alone(tmp_path):
    def commands(target):
        make = ("make", "--dry-run", f"VENV={tmp_path}/venv", target)
        return subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    for target in ("install", "demo"):
        assert "--editable ." in commands(target) and "[test]" not in commands(target)
    for target in ("test", "lint"):
        assert '--editable ".[test]"' in commands(target)
    assert "sleep 10" in commands("install")
