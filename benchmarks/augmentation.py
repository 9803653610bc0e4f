"""What the augmentation on the device costs, as a share of the training step it is part of.

python benchmarks/augmentation.py --config=configs/mvtec.py:screw [--config.KEY=VALUE]

Alternates the whole step and its augmentation alone on the same random images, and prints the
medians and their ratio.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from anoseg_jax import options
from anoseg_jax.method import train  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", "configs/mvtec.py:screw", "Options.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each.")


def seconds(function, *arguments) -> float:
    """Returns the seconds that a call takes, with its result on the device."""
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began


def main(_):
    """Prints one line: medians and the ratio."""
    config = options.of_category(CONFIG.value, CONFIG.value.categories[0])
    parts = train.create_parts(config)
    images = np.random.default_rng(0).integers(
        0, 256, (config.batch_size, *config.image_size, 3), np.uint8
    )
    key = jax.random.key(0)
    state = parts.create_state(images)
    step = jax.jit(partial(parts.train_step, axis_name=None))
    augment = jax.jit(parts.draw_examples)
    seconds(step, state, images, key), seconds(augment, key, images, 0)  # compiles
    timed = [
        (seconds(step, state, images, key), seconds(augment, key, images, 0))
        for _ in range(REPEATS.value)
    ]
    whole, part = (statistics.median(column) for column in zip(*timed, strict=True))
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {config.batch_size} of "
        f"{config.image_size[0]}x{config.image_size[1]}, width {config.model.width}: "
        f"step {whole:.3f} s, augmentation {part:.4f} s, {part / whole:.1%} of the step"
    )


if __name__ == "__main__":
    app.run(main)
