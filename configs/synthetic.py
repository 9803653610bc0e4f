"""The demo: a perforated sheet and a blister pack, generated; minutes on two CPU cores.

`make demo` draws them as PNG files and trains on these. Other generated parts: two textures (weave,
grain), two objects (washer, capsule); `:all` takes all six.

python launch.py --config=configs/synthetic.py --workdir=W
"""

from ml_collections import ConfigDict

from configs import cpu


def get_config(categories: str = "sheet,blister") -> ConfigDict:
    """Returns the options; `categories` is "all" or names separated by commas."""
    config = cpu.get_config(categories)
    config.dataset = "synthetic_ad"
    if categories == "all":
        config.categories = ("all",)
    config.image_size, config.batch_size = (64, 64), 8
    config.num_steps, config.warmup_steps = 600, 30
    config.checkpoint_every, config.log_every = 300, 50
    config.detector.num_steps = 150
    config.evaluate.pictures = 4
    config.category_options = ConfigDict()
    # The objects lie a little differently in each picture; the textures are learned sooner.
    moved = {"augment": {"rotation": 5.0, "shift": 0.03}}
    config.category_options.capsule = moved | {"num_steps": 400}
    config.category_options.washer = moved | {"num_steps": 550}
    config.category_options.grain = {"num_steps": 200}
    config.category_options.weave = {"num_steps": 200}
    return config
