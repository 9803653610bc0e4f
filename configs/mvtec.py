"""MVTec AD at 256x256, sized for an accelerator.

    python launch.py --config=configs/mvtec.py --config.data_dir=DIR --workdir=W
    python launch.py --config=configs/mvtec.py:screw,tile ...      some of the categories

DIR holds the category folders (bottle/, cable/, ...). Every category that is asked for is trained
by itself, one after the other; without a list, all fifteen.
"""

from ml_collections import ConfigDict

from configs import default

# Augmentation that keeps a good part good, by category. Textures may be flipped, parts that lie
# freely may be rotated. Categories whose position or orientation is inspected (cable, capsule,
# transistor ...) have no augmentation.
FLIPS = {"flip_horizontal": True, "flip_vertical": True}
AUGMENT = {
    "bottle": FLIPS | {"rotation": 10.0},
    "carpet": FLIPS,
    "grid": FLIPS,
    "hazelnut": FLIPS | {"rotation": 10.0},
    "leather": FLIPS,
    "metal_nut": {"rotation": 5.0},
    "screw": FLIPS | {"rotation": 5.0, "shift": 0.02},
    "tile": FLIPS,
    "wood": FLIPS,
}
CATEGORIES = (
    *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut"),
    *("pill", "screw", "tile", "toothbrush", "transistor", "wood", "zipper"),
)


def get_config(categories: str = "all") -> ConfigDict:
    """Returns the options; `categories` is "all" or names separated by commas."""
    config = default.get_config()
    config.categories = CATEGORIES if categories == "all" else tuple(categories.split(","))
    for category, options in AUGMENT.items():
        config.category_options[category] = {"augment": options}
    return config
