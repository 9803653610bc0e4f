"""The demo: generated textures and objects, no files needed; minutes on two CPU cores.

python launch.py --config=configs/synthetic.py --workdir=runs/demo
"""

from ml_collections import ConfigDict

from configs import default


def get_config(categories: str = "all") -> ConfigDict:
    """Returns the options; `categories` is "all" or names separated by commas."""
    config = default.get_config()
    config.dataset = "synthetic_ad"
    config.categories = ("all",) if categories == "all" else tuple(categories.split(","))
    config.image_size = (64, 64)
    config.model.width = 16
    config.model.depth = 4
    config.batch_size = 16
    config.num_steps = 300
    config.warmup_steps = 30
    config.checkpoint_every = 150
    config.log_every = 25
    config.ema_decay = 0.98
    config.evaluate.pictures = 4
    return config
