"""What a run would need: of the program that it would run, and nothing is touched."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from anoseg_jax import dry_run
from anoseg_jax.method import models, train
from configs import ablation, mvtec
from configs import test as test_config

ROOT = Path(__file__).resolve().parents[1]


def test_every_training_is_listed_and_those_of_one_program_are_together():
    config = ablation.get_config("screw,tile")
    config.batch_size = 16
    folders = [folder for folder, _ in dry_run.trainings(config)]
    assert len(folders) == 5 * 3 * 2 and "coordinates/seed_2/tile" in folders
    assert [len(group) for group in dry_run.programs(config)] == [6] * 5
    ((of_one_program),) = dry_run.programs(mvtec.get_config())
    assert [folder for folder, _ in of_one_program] == list(mvtec.CATEGORIES)
    assert [folder for folder, _ in dry_run.trainings(test_config.get_config())] == ["<category>"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (dry_run.scaled(1536, "B", 1024), "1.5 KiB"),
        (dry_run.scaled(2.5e12, "FLOP"), "2.5 TFLOP"),
        (dry_run.scaled(0, "B", 1024), "0 B"),
        (dry_run.in_time(90), "90 s"),
        (dry_run.in_time(7200), "2.0 h"),
    ],
)
def test_numbers_have_units(text, expected):
    assert text == expected


def test_the_numbers_are_those_of_the_program():
    """In two parts on four devices: memory is of all of it, operations are of every image."""
    config = test_config.get_config()
    config.update({"batch_size": 8, "accumulate": 2, "defects": {"preset": "plain"}})
    parts = train.create_parts(config)
    found = dry_run.analyse(parts, config)
    state = dry_run.size_of(found["state"])
    batch = 2 * 32 * 32 * 3  # uint8, two images a device
    assert state <= found["outputs"] < 1.1 * state
    assert state + batch <= found["arguments"] < 1.1 * state + batch
    assert found["temporaries"] <= found["memory"] - found["arguments"]
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    forward = partial(parts.generator.apply, recall=False)
    flops = models.count_flops(forward, {"params": found["state"].generator}, image)
    assert found["flops"] > 3 * 8 * flops  # forward, and twice that backward
    _, compiled = dry_run.compile_step(parts, config)
    results = re.findall(r"= (.*) all-reduce(?:-start)?\(", compiled.as_text())
    shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(results))
    elements = [np.prod([int(n) for n in shape.split(",") if n]) for shape in shapes]
    # XLA makes one number of the zeros that are the gradient of the patch memory.
    assert found["all_reduced"] == 4 * (sum(elements) - 1)


def test_it_prints_and_touches_nothing_without_data_and_without_tensorflow(tmp_path):
    program = """
import runpy, sys
from importlib.machinery import PathFinder

class WithoutTensorFlow(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "tensorboard"):
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [WithoutTensorFlow if f is PathFinder else f for f in sys.meta_path]
sys.path.insert(0, sys.argv[1])
sys.argv[:2] = [sys.argv[1] + "/launch.py"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    config = test_config.get_config()
    config.model.memory = 0
    flags = (
        *("--mode=dry_run", f"--config={ROOT}/configs/test.py", "--devices=2", "--workdir=w"),
        *("--config.data_dir=/none", "--config.model.memory=0", "--config.defects.preset=plain"),
        *("--config.detector.enabled=True", "--config.compilation_cache=cache"),
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), *flags],
        cwd=tmp_path,
        env=os.environ
        | {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "XLA_FLAGS": ""}
        | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    assert "dry run for 2 x cpu (virtual" in done.stdout
    create = train.create_parts(config).create_state
    state = jax.eval_shape(create, jax.ShapeDtypeStruct((4, 32, 32, 3), np.uint8))
    parameters = sum(x.size for x in jax.tree.leaves(state.generator))
    assert f"parameters         {parameters:,}, of its" in done.stdout
    size = dry_run.scaled(dry_run.size_of(state), "B", 1024)
    assert f"w/<category>/checkpoints/  2 x {size}" in done.stdout
    assert "w/<category>/detector/checkpoints/  2 x" in done.stdout
    assert "results.json" in done.stdout and "All trainings: " in done.stdout
