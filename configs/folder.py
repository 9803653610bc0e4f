"""Train on your own images, in folders as below; other layouts: images/layouts.py.

python launch.py --config=configs/folder.py --config.data_dir=DIR --workdir=W
python launch.py --config=configs/folder.py:bolt,nut:cpu ...      some folders, CPU-sized

DIR/<category>/train/good/*.png           good parts, to learn from
DIR/<category>/test/good/*.png            good parts, to test with        (may be missing)
DIR/<category>/test/<defect>/*.png        defective parts, to test with   (may be missing)
DIR/<category>/ground_truth/<defect>/<name>_mask.png   their masks        (may be missing)
"""

from ml_collections import ConfigDict

from configs import cpu, default


def get_config(argument: str = "all") -> ConfigDict:
    """Returns the options; `argument` is CATEGORIES or CATEGORIES:cpu, "all" or names with commas.

    "cpu" is "all:cpu". With ":cpu" the network and the schedule are those of configs/cpu.py.
    """
    categories, _, size = ("all:cpu" if argument == "cpu" else argument).partition(":")
    if size not in ("", "cpu"):
        raise ValueError(f"configs/folder.py:{argument}: the size can only be cpu, not {size!r}")
    config = cpu.get_config() if size == "cpu" else default.get_config()
    config.categories = ("all",) if categories == "all" else tuple(categories.split(","))
    config.category_options = ConfigDict()
    return config
