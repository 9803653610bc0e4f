"""What each part of the method is worth: parts added one after the other, over several seeds.

python launch.py --config=configs/ablation.py:screw,tile --config.data_dir=DIR --workdir=W
python launch.py --config=configs/ablation.py:screw,tile:paper ...      at the scale of mvtec.py

Writes W/ablation.md and .json; each row's own results and reports are in W/<row>/seed_N/. Stopped
at any moment, the same command goes on. Other steps or seeds: --config.num_steps=600
"--config.seeds=(0,1)".
"""

from ml_collections import ConfigDict

from configs import cpu, mvtec

# Each row differs from the one before in what it is named after. Written out, so that the rows stay
# what they are when a default changes.
ROWS = {
    # row: (defects, adversarial weight, reconstruction weight, coordinates, memory bank's size)
    "baseline": ("plain", 0.0, 0.0, False, 0),
    "hard_augmentation": ("paper", 0.0, 0.0, False, 0),
    "adversarial_reconstruction": ("paper", 0.01, 1.0, False, 0),
    "coordinates": ("paper", 0.01, 1.0, True, 0),
    # What this project adds to the paper's parts: together they are configs/default.py. Images are
    # scaled to one brightness only with a memory bank.
    "memory_and_more_defects": ("default", 0.01, 1.0, True, 4000),
}


def get_config(argument: str = "all") -> ConfigDict:
    """Returns the options; `argument` is CATEGORIES or CATEGORIES:paper.

    CATEGORIES are names separated by commas, or "all" for every category folder of data_dir. With
    ":paper" all but the rows is as in configs/mvtec.py, else as in configs/cpu.py with fewer steps.
    """
    categories, _, size = argument.partition(":")
    if size not in ("", "paper"):
        raise ValueError(f"configs/ablation.py:{argument}: the size can only be paper: {size!r}")
    config = mvtec.get_config(categories) if size == "paper" else cpu.get_config(categories)
    if categories == "all":
        config.categories = ("all",)
    if size != "paper":
        config.batch_size = 8  # more steps for the same seconds
        config.num_steps = 150
        config.warmup_steps = 15
    config.seeds = (0, 1, 2)
    # The same in all rows, and many times over.
    config.evaluate.baselines = False
    config.evaluate.pictures = 0
    for row, (preset, adversarial, reconstruction, coords, bank_size) in ROWS.items():
        config.variants[row] = {
            "defects": {"preset": preset},
            "loss": {
                "segmentation_weight": 1.0,
                "adversarial_weight": adversarial,
                "reconstruction_weight": reconstruction,
            },
            "model": {"coords": coords},
            "memory_bank": {"size": bank_size},
        }
    return config
