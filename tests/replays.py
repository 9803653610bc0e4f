"""What the tests of interop/ replay: images that are not square, and options that compile fast."""

import numpy as np
import tiny_config

from anoseg_jax.interop import replay
from configs import paper

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), np.uint8)
IMAGES[5] = IMAGES[2]  # equal images have one id


def make_config(num_steps, bank_size=64):
    """Returns options of a run that logs each step."""
    config = tiny_config.get_config("bolt")
    config.update({"num_steps": num_steps, "checkpoint_every": num_steps, "log_every": 1})
    config.update({"image_size": (32, 48), "memory_bank": {"size": bank_size}})
    config.defects.preset = "plain"
    config.augment.light = 0.0  # good images are the photographs, scaled
    return config


def make_paper_config(num_steps):
    """Returns the same options with the losses of configs/paper.py."""
    config = make_config(num_steps)
    config.loss.update(paper.get_config().loss)
    return config


def export(folder, config):
    """Writes a replay into the folder and returns the folder."""
    replay.export(config, IMAGES, folder)
    return folder
