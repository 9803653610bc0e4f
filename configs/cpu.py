"""The same method sized for CPUs: 128x128, about ten minutes a category on two cores.

python launch.py --config=configs/cpu.py:screw --config.data_dir=DIR --workdir=W
"""

from ml_collections import ConfigDict

from configs import mvtec


def get_config(categories: str = "all") -> ConfigDict:
    """Returns the options; `categories` is "all" or names separated by commas."""
    config = mvtec.get_config(categories)
    config.image_size = (128, 128)
    config.model.width = 16
    config.model.depth = 4
    config.model.distance_scales = 1
    config.memory_bank.distance_weights = (0.5, 0.125)
    config.detector.width = 16
    config.detector.num_steps = 200
    config.batch_size = 16
    config.num_steps = 1500
    config.warmup_steps = 100
    config.checkpoint_every = 200
    config.log_every = 10
    config.ema_decay = 0.99
    return config
