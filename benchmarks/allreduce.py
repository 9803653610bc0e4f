"""Counts the bytes that devices exchange in a training step, in the program that XLA compiles.

python benchmarks/allreduce.py [configs/NAME.py ...]

Four virtual devices with one image each: the size of the gradients does not depend on the batch.
Prints a row for each config: learned parameters of both players, the memory bank's numbers,
megabytes.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import importlib
import math
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from anoseg_jax.method import train, train_state  # noqa: E402
from anoseg_jax.running import loop  # noqa: E402

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "u8": 1, "pred": 1}


def sent(program: str, operation: str) -> int:
    """Returns the bytes that a device sends in all operations of a kind."""
    total = 0
    for shapes in re.findall(rf"= (.*?) {operation}(?:-start)?\(", program):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            total += BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
    return total


def size(tree: Any) -> int:
    """Returns the number of numbers in all arrays of a tree."""
    return sum(x.size for x in jax.tree.leaves(tree))


def main(names: list[str]) -> None:
    """Prints a row for each config."""
    devices = jax.local_device_count()
    print("| config | generator | discriminator | memory bank | MB all-reduced | MB permuted |")
    print("|---|---|---|---|---|---|")
    for name in names:
        module = name.removesuffix(".py").replace("/", ".")
        config = importlib.import_module(module).get_config()
        static, options = train_state.split_options(config)
        state = train_state.template(config)
        batch = {
            "image": jax.ShapeDtypeStruct((devices, 1, *config.image_size, 3), jnp.uint8),
            "image_id": jax.ShapeDtypeStruct((devices, 1), jnp.int32),
        }
        step = loop.parallelize(train.train_step, static)
        program = step.lower(state, batch, jax.random.key(0), options).compile().as_text()
        trees = state.generator, state.discriminator, state.memory_bank
        counts = " | ".join(f"{size(tree):,}" for tree in trees)
        reduced, permuted = (
            f"{sent(program, kind) / 1e6:.3f}" for kind in ("all-reduce", "collective-permute")
        )
        print(f"| {name} | {counts} | {reduced} | {permuted} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["configs/mvtec.py", "configs/cpu.py"])
