"""The smallest options that train: the tests run them.

python launch.py --config=tests/tiny_config.py --config.data_dir=DIR --workdir=W
"""

from ml_collections import ConfigDict

from configs import default


def get_config(categories: str = "all") -> ConfigDict:
    """Returns the options; `categories` is "all" or names separated by commas."""
    config = default.get_config()
    config.categories = ("all",) if categories == "all" else tuple(categories.split(","))
    config.update_from_flattened_dict(
        {
            "image_size": (32, 32),
            "model.width": 8,
            "memory_bank.size": 64,
            "model.depth": 2,
            "model.latent": 8,
            "model.discriminator_width": 8,
            "model.discriminator_depth": 2,
            "detector.num_steps": 4,
            "detector.width": 8,
            "detector.latent": 8,
            "held_out": 0.4,
            "defects.preset": "paper",  # half of what compiles is the other defects
            "batch_size": 4,
            "num_steps": 6,
            "warmup_steps": 2,
            "checkpoint_every": 2,
            "log_every": 2,
            "evaluate.batch_size": 4,
            "evaluate.pictures": 2,
            "compilation_cache": "",  # tests/conftest.py sets one of their own
        }
    )
    return config
