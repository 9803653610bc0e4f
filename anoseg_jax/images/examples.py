"""An image with its masks, how its files are read, and what is read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils.epath import Path

from anoseg_jax.images.decode import (
    BIT_DEPTHS,
    MAX_MEGAPIXELS,
    LayoutError,
    printable,
    read_image,
    read_mask,
)
from anoseg_jax.images.layouts import GOOD


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """The options of configs/default.py that say how folders and files are read."""

    layout: str = "auto"
    mask_suffix: str = "_mask"
    ignore_name: str = "ignore"
    bit_depth: str | int = "auto"
    max_megapixels: float = MAX_MEGAPIXELS

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ReadOptions":
        """Returns those of a config; LayoutError if one cannot work."""
        options = cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})
        if str(options.bit_depth) not in ("auto", *map(str, BIT_DEPTHS)):
            raise LayoutError(
                f"bit_depth={options.bit_depth!r} must be auto or one of "
                f"{', '.join(map(str, BIT_DEPTHS))}"
            )
        return options


@dataclasses.dataclass(frozen=True)
class Example:
    """An image file and its mask files.

    The union of `masks` is the defect, `ignore` the pixels that count neither way. `defect_type` is
    "good" for good parts. `name` is the image's path inside its category folder, such as
    "test/scratch/000.png", as text that can be printed and stored (`decode.printable`).
    """

    image: Path
    masks: tuple[Path, ...]
    defect_type: str
    name: str
    ignore: tuple[Path, ...] = ()

    @property
    def label(self) -> int:
        """0 for a good part, 1 for a defective one."""
        return int(self.defect_type != GOOD)


def load(
    example: Example, *, bit_depth: int | None = None, max_megapixels: float = MAX_MEGAPIXELS
) -> dict[str, Any]:
    """Reads one example.

    Args:
      example: as `layout.scan` lists it.
      bit_depth: that of the category (`Category.bit_depth`) or of the model; see
        `decode.read_image`.
      max_megapixels: see `decode.read_image`.

    Returns:
      `image` uint8 `[h, w, 3]`; `mask` bool `[h, w]`, all False for a good part, None for a
      defective part without ground truth; `ignore` bool `[h, w]`, None where every pixel counts;
      `label` 0 or 1; `defect_type` and `name`, strings.

    Raises:
      LayoutError: a file cannot be read, or differs from its image in size.
    """
    image = read_image(example.image, bit_depth=bit_depth, max_megapixels=max_megapixels)
    masks = {}
    for paths in (example.masks, example.ignore):
        for path in paths:
            masks[path] = read_mask(path, max_megapixels=max_megapixels)
            if masks[path].shape != image.shape[:2]:
                raise LayoutError(size_mismatch(example, path, masks[path].shape, image.shape[:2]))
    mask = np.any([masks[path] for path in example.masks], axis=0) if example.masks else None
    if mask is None and not example.label:
        mask = np.zeros(image.shape[:2], bool)
    ignore = np.any([masks[path] for path in example.ignore], axis=0) if example.ignore else None
    return {
        "image": image,
        "mask": mask,
        "ignore": ignore,
        "label": example.label,
        "defect_type": example.defect_type,
        "name": example.name,
    }


def size_mismatch(
    example: Example, path: Path, mask_size: tuple[int, int], size: tuple[int, int]
) -> str:
    """Says that a mask and its image differ in size, (height, width) each."""
    return (
        f"{printable(path)}: is {mask_size[1]}x{mask_size[0]} pixels, its image {example.name} is "
        f"{size[1]}x{size[0]} (width x height, upright): export the mask at the image's size"
    )
