"""What the TFDS builders of this folder have in common: the features of an example."""

from collections.abc import Iterable

import numpy as np
import tensorflow_datasets as tfds


def configs(categories: Iterable[str]) -> list[tfds.core.BuilderConfig]:
    """Returns one builder config a category."""
    return [
        tfds.core.BuilderConfig(name=name, description=f"The category {name}.")
        for name in categories
    ]


def features() -> tfds.features.FeaturesDict:
    """Returns the features of every data set here."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            # 1 where defective, else 0.
            "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            # False for a defective part without ground truth: its mask is zeros, and no truth.
            "has_mask": np.bool_,
            "label": tfds.features.ClassLabel(names=["good", "defective"]),
            "defect_type": tfds.features.Text(),
            "name": tfds.features.Text(),
        }
    )


def encode(example: dict) -> dict:
    """Returns a dict as `layout.load` gives it, in the form that `features` takes.

    Pixels to ignore are not part of it.
    """
    image, mask = example["image"], example["mask"]
    example = {key: value for key, value in example.items() if key != "ignore"}
    has_mask = mask is not None
    if not has_mask:
        mask = np.zeros(image.shape[:2], bool)
    return {**example, "mask": mask.astype(np.uint8)[..., None], "has_mask": has_mask}
