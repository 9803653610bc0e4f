"""What the devices tell each other in a training step: counted in the program that XLA makes of it.

python benchmarks/allreduce.py [configs/NAME.py ...]

Four virtual devices, an image each: the gradients are of the parameters, whatever the batch.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import importlib
import math
import re
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from anoseg_jax.method import train, train_state  # noqa: E402

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "u8": 1, "pred": 1}


def sent(program: str, operation: str) -> int:
    """Returns the bytes that a device puts into all operations of a kind."""
    total = 0
    for shapes in re.findall(rf"= (.*?) {operation}(?:-start)?\(", program):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            total += BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
    return total


def main(names: list[str]) -> None:
    """Prints a line a config."""
    devices = jax.local_device_count()
    print("| config | learned | discriminator | memory | MB all-reduced | MB permuted |")
    print("|---|---|---|---|---|---|")
    for name in names:
        module = name.removesuffix(".py").replace("/", ".")
        config = importlib.import_module(module).get_config()
        parts = train.create_parts(config)
        image = (*config.image_size, 3)
        state = jax.eval_shape(parts.create_state, jax.ShapeDtypeStruct((8, *image), np.uint8))
        images = jax.ShapeDtypeStruct((devices, 1, *image), np.uint8)
        step = jax.pmap(
            parts.train_step, axis_name="batch", in_axes=(None, 0, None), out_axes=(None, 0)
        )
        program = step.lower(state, images, parts.draw_key).compile().as_text()
        kept = train_state.is_learned(state.generator)
        sizes = jax.tree.map(lambda x: x.size, (state.generator, state.discriminator))
        every, discriminator = (sum(jax.tree.leaves(of_player)) for of_player in sizes)
        learned = sum(jax.tree.leaves(jax.tree.map(lambda n, k: n * k, sizes[0], kept)))
        counts = f"{learned:,} | {discriminator:,} | {every - learned:,}"
        reduced, permuted = (
            f"{sent(program, kind) / 1e6:.3f}" for kind in ("all-reduce", "collective-permute")
        )
        print(f"| {name} | {counts} | {reduced} | {permuted} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["configs/mvtec.py", "configs/cpu.py"])
