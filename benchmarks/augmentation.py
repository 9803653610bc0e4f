"""Times making the examples on the device (augmentation, synthetic defects) in a training step.

python benchmarks/augmentation.py --config=configs/mvtec.py:screw [--config.KEY=VALUE]

Alternates the whole step and making its examples alone, on the same random images. Prints the
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
from anoseg_jax import options  # noqa: E402
from anoseg_jax.method import memory_bank, train, train_state  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", "configs/mvtec.py:screw", "Options.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each.")


def seconds(function, *arguments) -> float:
    """Returns the seconds that a call takes until its result is computed."""
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began


def main(_):
    """Prints one line: medians and the ratio."""
    config = options.of_category(CONFIG.value, CONFIG.value.categories[0])
    static, arrays = train_state.split_options(config)
    size = tuple(config.image_size)
    images = np.random.default_rng(0).integers(0, 256, (config.batch_size, *size, 3), np.uint8)
    batch = {"image": images, "image_id": np.arange(config.batch_size, dtype=np.int32)}
    init_key, step_key = train_state.seed_keys(config.seed)
    create = train_state.jit_create(train_state.create_state)
    state = create(init_key, arrays, static=static, image_size=size)
    if static.grid:  # distances take as long to a bank of zeros
        shapes = memory_bank.template(config.memory_bank)
        bank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        state = state.replace(memory_bank=bank)
    state, batch, arrays = jax.device_put((state, batch, arrays))
    brightness = state.memory_bank and state.memory_bank.brightness
    step = jax.jit(partial(train.train_step, static=static, axis_name=None))
    make_examples = partial(train.jitted_make_examples, static=static)
    timed = [
        (
            seconds(step, state, batch, step_key, arrays),
            seconds(make_examples, step_key, batch, arrays, brightness),
        )
        for _ in range(REPEATS.value + 1)
    ]
    # The first run compiles.
    step_seconds, examples_seconds = (
        statistics.median(column) for column in zip(*timed[1:], strict=True)
    )
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {config.batch_size} of "
        f"{config.image_size[0]}x{config.image_size[1]}, width {config.model.width}: "
        f"step {step_seconds:.3f} s, examples {examples_seconds:.4f} s, "
        f"{examples_seconds / step_seconds:.1%} of the step"
    )


if __name__ == "__main__":
    app.run(main)
