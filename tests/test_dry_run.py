"""The dry run: numbers of the program that training would run, and no file is touched."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_config

from anoseg_jax import dry_run
from anoseg_jax.method import memory_bank, models, train_state
from configs import ablation, mvtec

ROOT = Path(__file__).resolve().parents[1]


def test_every_training_is_listed_and_those_that_share_a_program_are_grouped():
    config = ablation.get_config("screw,tile")
    config.batch_size = 16
    folders = [folder for folder, _ in dry_run.trainings(config)]
    assert len(folders) == 5 * 3 * 2 and "coordinates/seed_2/tile" in folders
    assert [len(group) for group in dry_run.group_by_program(config)] == [6] * 5
    ((one_program),) = dry_run.group_by_program(mvtec.get_config())
    assert [folder for folder, _ in one_program] == list(mvtec.CATEGORIES)
    assert [folder for folder, _ in dry_run.trainings(tiny_config.get_config())] == ["<category>"]


@pytest.mark.parametrize(
    ("changes", "num_programs"),
    [
        ({"augment": {"rotation": 5.0}, "num_steps": 9, "ema_decay": 0.5}, 1),
        ({"defects": {"normal_fraction": 0.5}, "loss": {"reconstruction_weight": 2.0}}, 1),
        ({"defects": {"preset": "plain"}}, 2),
        ({"loss": {"adversarial_weight": 0.0}}, 2),
        ({"memory_bank": {"size": 32}}, 2),
        ({"image_size": (32, 48)}, 2),
        ({"detector": {"enabled": True}}, 2),
    ],
)
def test_categories_share_a_program_if_static_options_and_sizes_are_equal(changes, num_programs):
    config = tiny_config.get_config("bolt,nut")
    config.category_options.nut = changes
    assert len(dry_run.group_by_program(config)) == num_programs


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
    config = tiny_config.get_config()
    config.update({"batch_size": 8, "accumulate": 2, "defects": {"preset": "plain"}})
    (step,) = dry_run.training_steps(config)
    analysis = dry_run.analyze(step, config)
    state = dry_run.size_of(step.state)
    batch = 2 * (32 * 32 * 3 + 4)  # two uint8 images and their ids a device
    assert state <= analysis["outputs"] < 1.1 * state
    assert state + batch <= analysis["arguments"] < 1.1 * state + batch
    assert analysis["temporaries"] <= analysis["memory"] - analysis["arguments"]
    generator, _ = models.create(config.model, config.loss)
    image, distances = (jax.ShapeDtypeStruct((1, 32, 32, c), np.float32) for c in (3, 2))
    flops = models.count_flops(models.apply_fn(generator), step.params[0], image, distances)
    assert analysis["flops"] > 3 * 8 * flops  # forward, and twice that backward
    program = dry_run.compile_step(step, config).as_text()
    results = re.findall(r"= (.*) all-reduce(?:-start)?\(", program)
    shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(results))
    elements = [np.prod([int(n) for n in shape.split(",") if n]) for shape in shapes]
    assert analysis["all_reduced"] == 4 * sum(elements)


def test_parameters_are_what_is_learned():
    """Also those of the detector; the memory bank is part of the state but not learned."""
    config = tiny_config.get_config()
    config.detector.enabled = True
    generator, detector = dry_run.training_steps(config)
    analysis = dict.fromkeys(("memory", "arguments", "outputs", "temporaries"), 0)
    analysis |= {"all_reduced": 0, "flops": 1.0}
    text = dry_run.describe(generator, analysis, config, speed=1.0)
    learned = sum(x.size for x in jax.tree.leaves(generator.state.ema))
    assert f"parameters         {learned:,}, of its discriminator" in text
    bank = dry_run.size_of(memory_bank.template(config.memory_bank))
    config.memory_bank.size = 0
    without, _ = dry_run.training_steps(config)
    head_input = learned - sum(x.size for x in jax.tree.leaves(without.state.ema))
    # The first convolution's channels of the distances.
    assert head_input == 3 * 3 * config.model.width * config.model.distance_scales
    # Parameters are in the state four times: with their average and Adam's two.
    difference = dry_run.size_of(generator.state) - dry_run.size_of(without.state)
    assert difference == bank + 4 * 4 * head_input
    learned = sum(x.size for x in jax.tree.leaves(detector.state.ema))
    assert f"{learned:,}, of" in dry_run.describe(detector, analysis, config, speed=1.0)


def test_it_prints_and_touches_nothing_without_data_and_without_tensorflow(tmp_path):
    program = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import without_tensorflow
sys.argv[:2] = [sys.argv[1] + "/launch.py"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    config = tiny_config.get_config()
    config.memory_bank.size = 0
    flags = (
        *("--mode=dry_run", f"--config={ROOT}/tests/tiny_config.py", "--devices=2", "--workdir=w"),
        *(
            "--config.data_dir=/none",
            "--config.memory_bank.size=0",
            "--config.defects.preset=plain",
        ),
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
    state = train_state.template(config)
    parameters = sum(x.size for x in jax.tree.leaves(state.generator))
    assert f"parameters         {parameters:,}, of its" in done.stdout
    size = dry_run.scaled(dry_run.size_of(state), "B", 1024)
    assert f"w/<category>/checkpoints/  2 x {size}" in done.stdout
    assert "w/<category>/detector/checkpoints/  2 x" in done.stdout
    assert "results.json" in done.stdout and "All trainings: " in done.stdout
