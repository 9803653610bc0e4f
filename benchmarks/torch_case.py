"""Examples and a training of the PyTorch twin to time, with a random memory bank."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch_networks
import torch_training


def draw_examples(batch_size: int, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns random training examples as `train.make_examples` does: float32, NHWC.

    A corner of each `defective` image is inverted.
    """
    rng = np.random.default_rng(0)
    shape, side = (batch_size, *image_size), min(image_size) // 8
    good, masks = rng.uniform(size=(*shape, 3)), np.zeros(shape)
    masks[:, :side, :side] = 1
    defective = np.where(masks[..., None] > 0, 1 - good, good)
    images = {"good": good, "defective": defective, "masks": masks}
    images["noise"] = rng.normal(size=(*shape, 4))
    examples = {name: array.astype(np.float32) for name, array in images.items()}
    return examples | {"image_ids": np.arange(batch_size, dtype=np.int32)}


def to_tensor(array: Any) -> torch.Tensor:
    """Returns an array as a tensor, images [b, h, w, c] as [b, c, h, w]."""
    array = np.array(array)
    return torch.from_numpy(array.transpose(0, 3, 1, 2).copy() if array.ndim == 4 else array)


def create_training(config: Mapping[str, Any]) -> torch_training.Training:
    """Returns the twin of a config with initial weights and a random memory bank, on the CPU."""
    generator, discriminator = torch_networks.create(config)
    rng = np.random.default_rng(0)
    for bank in (generator.memory, generator.coarse_memory):
        for array in bank.buffers() if bank is not None else ():
            array += torch.from_numpy(rng.normal(size=array.shape)).to(array.dtype)
    if generator.memory is not None:
        generator.brightness.fill_(0.5)
    return torch_training.Training(generator, discriminator, config)
