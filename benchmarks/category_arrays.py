"""Images of a category as arrays, from its folder or from an npz file; needs no TensorFlow.

An npz file holds what a training and its evaluation need at one size, so that a category can travel
to a machine that has neither its folder nor TensorFlow.
"""

import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from etils.epath import Path

from anoseg_jax import UsageError
from anoseg_jax.images import layout
from anoseg_jax.images.decode import resize_image, resize_mask
from anoseg_jax.running import files

Arrays = dict[str, np.ndarray]
TEST = "test_"  # before the names of the test images' arrays in an npz file


class Images(NamedTuple):
    """A category at one size.

    Attributes:
      category: its name.
      train: the good images, sorted by name, uint8 [n, h, w, 3].
      validation: good images that the layout sets apart, likewise; None if it has none.
      test: the arrays of `images.input_pipeline.load_arrays`.
    """

    category: str
    train: np.ndarray
    validation: np.ndarray | None
    test: Arrays


def read_split(examples: Sequence[layout.Example], size: tuple[int, int], **options: Any) -> Arrays:
    """Returns what `images.input_pipeline.load_arrays` returns of the same files.

    `options` are those of `layout.load`.
    """

    def read(example: layout.Example) -> dict[str, Any]:
        loaded = layout.load(example, **options)
        resized = {"image": resize_image(loaded["image"], size)}
        for key in ("mask", "ignore"):
            has_pixels = loaded[key] is not None
            resized[key] = resize_mask(loaded[key], size) if has_pixels else np.zeros(size, bool)
        if resized["ignore"].any() and not resized["ignore"].all():
            image, ignored = resized["image"].copy(), resized["ignore"]
            image[ignored] = image[~ignored].mean(axis=0).round()
            resized["image"] = image
        return loaded | resized | {"has_mask": loaded["mask"] is not None}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(read, examples))
    keys = {"label": np.int64, "defect_type": str, "name": str, "has_mask": bool}
    arrays = {key: np.array([row[key] for row in rows], dtype) for key, dtype in keys.items()}
    shapes = {"image": ((*size, 3), np.uint8), "mask": (size, bool), "ignore": (size, bool)}
    for key, (shape, dtype) in shapes.items():
        arrays[key] = np.array([row[key] for row in rows], dtype).reshape(-1, *shape)
    if not any(example.ignore for example in examples):
        del arrays["ignore"]
    return arrays


def read_folder(folder: str | os.PathLike, config: Mapping[str, Any]) -> Images:
    """Returns the images of a category folder at `config.image_size`.

    Raises LayoutError, a line for each file or folder that cannot be used.
    """
    how = layout.ReadOptions.of(config)
    category = layout.scan(folder, how)
    layout.require_usable([category])
    read = partial(
        read_split,
        size=tuple(config["image_size"]),
        bit_depth=category.bit_depth,
        max_megapixels=how.max_megapixels,
    )

    def read_good(examples: Sequence[layout.Example]) -> np.ndarray:
        return read(sorted(examples, key=lambda example: example.name))["image"]

    validation = read_good(category.validation) if category.validation else None
    return Images(category.name, read_good(category.train), validation, read(category.test))


def write_npz(images: Images, path: str | os.PathLike) -> None:
    """Writes a compressed npz file; grey images are stored with one channel."""
    arrays = {"category": np.array(images.category), "train": images.train}
    if images.validation is not None:
        arrays["validation"] = images.validation
    arrays |= {TEST + key: array for key, array in images.test.items()}
    pictures = [key for key in ("train", "validation", f"{TEST}image") if key in arrays]
    if all((arrays[key] == arrays[key][..., :1]).all() for key in pictures):
        arrays |= {key: arrays[key][..., :1] for key in pictures}
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(Path(path), data.getvalue())


def read_npz(path: str | os.PathLike, config: Mapping[str, Any]) -> Images:
    """Returns the images that `write_npz` wrote; UsageError if they have another size."""
    with Path(path).open("rb") as file, np.load(file) as stored:
        arrays = dict(stored)
    for key in ("train", "validation", f"{TEST}image"):
        if key in arrays:
            arrays[key] = np.broadcast_to(arrays[key], (*arrays[key].shape[:3], 3)).copy()
    size, asked = arrays["train"].shape[1:3], tuple(config["image_size"])
    if size != asked:
        raise UsageError(
            f"{path}: holds images of {size[0]}x{size[1]}, image_size={asked}: write it again at "
            f"that size, or set --config.image_size='{size}'"
        )
    test = {key.removeprefix(TEST): x for key, x in arrays.items() if key.startswith(TEST)}
    return Images(str(arrays["category"]), arrays["train"], arrays.get("validation"), test)


def read(path: str | os.PathLike, config: Mapping[str, Any]) -> Images:
    """Returns the images of an npz file or of a category folder; UsageError if it is neither."""
    if Path(path).is_dir():
        return read_folder(path, config)
    if Path(path).suffix != ".npz" or not Path(path).exists():
        raise UsageError(f"{path}: is neither a category folder nor an npz file of --write-npz")
    return read_npz(path, config)


def category_of(path: str | os.PathLike) -> str:
    """Returns the name of the category of an npz file or a folder without reading its images."""
    if Path(path).suffix != ".npz":
        return Path(path).absolute().name
    with Path(path).open("rb") as file, np.load(file) as stored:
        return str(stored["category"])


def describe(images: Images) -> str:
    """Returns one line: the category, its size, and how many images of which kind it has."""
    height, width = images.train.shape[1:3]
    types, counts = np.unique(images.test["defect_type"], return_counts=True)
    test = ", ".join(f"{count} {name}" for name, count in zip(types, counts, strict=True))
    set_apart = 0 if images.validation is None else len(images.validation)
    return (
        f"{images.category}: {height}x{width}, {len(images.train)} to train on, {set_apart} set "
        f"apart, test: {test or 'none'}"
    )
