"""Images from files or from TFDS to numpy batches: the only module with TensorFlow in it.

Images stay uint8 until they are on the device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from anoseg_jax.images.batches import batch_order

# The accelerator's memory belongs to jax.
tf.config.set_visible_devices([], "GPU")

Arrays = dict[str, np.ndarray]


def from_files(examples: Sequence[Any], load: Callable[[Any], dict]) -> tf.data.Dataset:
    """Returns the examples as a data set, read from their files each time it is iterated.

    Args:
      examples: what `load` takes.
      load: returns a dict of `image` (uint8 [h, w, 3]), `mask` (bool [h, w] or None), `label`
        (0 or 1), `defect_type` and `name`; called from several threads.
    """

    def read(index: int) -> tuple:
        example = load(examples[index])
        image, mask = example["image"], example["mask"]
        has_mask = mask is not None
        mask = mask if has_mask else np.zeros(image.shape[:2], bool)
        mask = mask[..., None].astype(np.uint8)
        return image, mask, has_mask, example["label"], example["defect_type"], example["name"]

    names = ("image", "mask", "has_mask", "label", "defect_type", "name")
    types = (tf.uint8, tf.uint8, tf.bool, tf.int64, tf.string, tf.string)
    return tf.data.Dataset.range(len(examples)).map(
        lambda index: dict(zip(names, tf.numpy_function(read, [index], types), strict=True)),
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 [h, w, 3] to `size` (height, width), bilinear and antialiased."""
    if image.shape[:2] == tuple(size):
        return image
    resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a mask [h, w] (bool or 0/1) to `size` by nearest neighbour, bool.

    A defect never vanishes: if none of its pixels is left, every pixel of the result that covers
    a part of it is set.
    """
    mask = mask.astype(bool)
    if mask.shape == tuple(size):
        return mask
    resized = np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
    if mask.any() and not resized.any():
        resized = np.zeros(size, bool)
        rows, columns = np.nonzero(mask)
        for row, column in zip(rows, columns, strict=True):
            top, bottom = (np.array([row, row + 1]) * size[0]) / mask.shape[0]
            left, right = (np.array([column, column + 1]) * size[1]) / mask.shape[1]
            resized[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = True
    return resized


def load_arrays(dataset: tf.data.Dataset, image_size: tuple[int, int]) -> Arrays:
    """Decodes and resizes a whole split, once, and keeps it in memory.

    Returns:
      `image` uint8 [n, h, w, 3], `mask` bool [n, h, w], `has_mask` bool [n], `label` int [n],
      `defect_type` and `name` str [n].
    """
    size = tuple(image_size)

    def resize(example: dict) -> dict:
        image = tf.numpy_function(lambda x: resize_image(x, size), [example["image"]], tf.uint8)
        mask = tf.numpy_function(lambda x: resize_mask(x[..., 0], size), [example["mask"]], tf.bool)
        return example | {
            "image": tf.ensure_shape(image, (*size, 3)),
            "mask": tf.ensure_shape(mask, size),
        }

    count = int(dataset.cardinality())
    if not count:
        empty = {"has_mask": bool, "label": np.int64, "defect_type": str, "name": str}
        return {
            "image": np.zeros((0, *size, 3), np.uint8),
            "mask": np.zeros((0, *size), bool),
        } | {key: np.zeros(0, dtype) for key, dtype in empty.items()}
    resized = dataset.map(resize, num_parallel_calls=tf.data.AUTOTUNE).batch(count)
    arrays = next(resized.as_numpy_iterator())
    for key in ("defect_type", "name"):
        arrays[key] = np.array([text.decode() for text in arrays[key]])
    return arrays


def load_masks(dataset: tf.data.Dataset) -> list[np.ndarray]:
    """Returns the masks of a split at the size they have in their files: bool [h, w] each."""
    return [example["mask"][..., 0].astype(bool) for example in dataset.as_numpy_iterator()]


def train_batches(
    arrays: Mapping[str, np.ndarray],
    start_step: int,
    *,
    batch_size: int,
    seed: int,
    rows: slice = slice(None),
) -> Iterator[Arrays]:
    """Yields shuffled batches without end, two of them prepared ahead.

    The same as `images.batches.train_batches`, which says what the arguments are, as a tf.data
    pipeline.
    """
    cached = {name: tf.constant(array) for name, array in arrays.items()}
    count = len(next(iter(arrays.values())))

    def orders() -> Iterator[np.ndarray]:
        step = start_step
        while True:
            order = batch_order(count=count, batch_size=batch_size, seed=seed, step=step)
            yield order[rows]
            step += 1

    signature = tf.TensorSpec((None,), tf.int64)
    dataset = tf.data.Dataset.from_generator(orders, output_signature=signature)
    gather = lambda order: {name: tf.gather(x, order) for name, x in cached.items()}  # noqa: E731
    return dataset.map(gather).prefetch(2).as_numpy_iterator()


def test_batches(arrays: Arrays, batch_size: int) -> Iterator[Arrays]:
    """Yields a split in order, in batches of the same keys; the last one may be shorter."""
    for start in range(0, len(arrays["label"]), batch_size):
        yield {key: values[start : start + batch_size] for key, values in arrays.items()}
