"""As small as it gets: what the tests run.

python launch.py --config=tests/tiny_config.py --config.data_dir=DIR --workdir=W
"""

from ml_collections import ConfigDict

from configs import default


def get_config(categories: str = "all") -> ConfigDict:
    """Returns the options; `categories` is "all" or names separated by commas."""
    config = default.get_config()
    config.categories = ("all",) if categories == "all" else tuple(categories.split(","))
    config.image_size = (32, 32)
    config.model.width = 8
    config.memory_bank.size = 64
    config.model.depth = 2
    config.model.latent = 8
    config.model.discriminator_width = 8
    config.model.discriminator_depth = 2
    config.detector.num_steps = 4
    config.detector.width = 8
    config.detector.latent = 8
    config.held_out = 0.4
    config.defects.preset = "paper"  # half of what compiles is the other defects
    config.batch_size = 4
    config.num_steps = 6
    config.warmup_steps = 2
    config.checkpoint_every = 2
    config.log_every = 2
    config.evaluate.batch_size = 4
    config.evaluate.pictures = 2
    config.compilation_cache = ""  # tests/conftest.py sets one of their own
    return config
