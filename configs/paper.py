"""AnoSeg as its paper describes it (arXiv 2110.03396), without this project's additions.

python launch.py --config=configs/paper.py:screw,tile --config.data_dir=DIR --workdir=W
python launch.py --config=configs/paper.py:screw:cpu ...      at 128x128, for a CPU

Hard augmentation alone makes the synthetic defects; the losses are the pixel-wise, the adversarial
and the masked reconstruction loss; the networks take coordinate channels. There is no memory bank.

These choices are still this project's own:
- layers, hyper-parameters and loss weights, as in configs/default.py: the paper's are not known;
- the focal loss as pixel-wise loss; --config.loss.segmentation=l1 is closer to the paper;
- the augmentation of each category, as in configs/mvtec.py;
- the image-level score, which is computed from the map.
The paper's image-level detector is off; --config.detector.enabled=True trains it, too.
"""

from ml_collections import ConfigDict

from configs import cpu, mvtec


def get_config(argument: str = "all") -> ConfigDict:
    """Returns the options; `argument` is CATEGORIES or CATEGORIES:cpu, "all" or names with commas.

    With ":cpu" the network and the schedule are those of configs/cpu.py.
    """
    categories, _, size = argument.partition(":")
    if size not in ("", "cpu"):
        raise ValueError(f"configs/paper.py:{argument}: the size can only be cpu, not {size!r}")
    config = cpu.get_config(categories) if size == "cpu" else mvtec.get_config(categories)
    config.defects.preset = "paper"
    config.memory_bank.size = 0
    config.augment.light = 0.0
    config.loss.label_smoothing = 0.0
    config.loss.limit_adversarial = False
    config.loss.gradient_penalty = 0.0
    return config
