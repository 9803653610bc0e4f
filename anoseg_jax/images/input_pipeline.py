"""Images from files or from TFDS to numpy batches, by tf.data.

No other module of anoseg_jax imports TensorFlow at the top of its file. Images stay uint8
until they are on the device.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from anoseg_jax.images.batches import batch_order
from anoseg_jax.images.decode import resize_image, resize_mask

# The accelerator's memory belongs to jax.
tf.config.set_visible_devices([], "GPU")

Arrays = dict[str, np.ndarray]


def from_files(
    examples: Sequence[Any], load: Callable[[Any], dict], *, with_ignore: bool = False
) -> tf.data.Dataset:
    """Returns the examples as a data set, read from their files each time it is iterated.

    Args:
      examples: what `load` takes.
      load: returns a dict of `image` (uint8 [h, w, 3]), `mask` and `ignore` (bool [h, w] or None),
        `label` (0 or 1), `defect_type` and `name`; called from several threads. What it raises,
        `load_arrays` and `load_masks` raise.
      with_ignore: the data set has the key `ignore`.
    """
    errors: list[Exception] = []

    def read(index: int) -> tuple:
        try:
            example = load(examples[index])
        except Exception as error:
            errors.append(error)
            raise
        image, mask = example["image"], example["mask"]
        masks = (mask, example["ignore"]) if with_ignore else (mask,)
        masks = [np.zeros(image.shape[:2], bool) if x is None else x for x in masks]
        masks = [x[..., None].astype(np.uint8) for x in masks]
        texts = example["defect_type"], example["name"]
        return image, mask is not None, example["label"], *texts, *masks

    names = ("image", "has_mask", "label", "defect_type", "name", "mask", "ignore")
    types = (tf.uint8, tf.bool, tf.int64, tf.string, tf.string, tf.uint8, tf.uint8)
    if not with_ignore:
        names, types = names[:-1], types[:-1]
    dataset = tf.data.Dataset.range(len(examples)).map(
        lambda index: dict(zip(names, tf.numpy_function(read, [index], types), strict=True)),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    dataset.read_errors = errors
    return dataset


@contextlib.contextmanager
def _own_errors(dataset: tf.data.Dataset) -> Iterator[None]:
    """Raises what `load` of `from_files` raised instead of TensorFlow's account of it."""
    errors = getattr(dataset, "read_errors", [])
    try:
        yield
    except tf.errors.OpError:
        if not errors:
            raise
        error = errors[0]
        errors.clear()
        raise error from None


def load_arrays(dataset: tf.data.Dataset, image_size: tuple[int, int]) -> Arrays:
    """Decodes and resizes a whole split, once, and keeps it in memory.

    Returns:
      `image` uint8 [n, h, w, 3], `mask` bool [n, h, w], `has_mask` bool [n], `label` int [n],
      `defect_type` and `name` str [n]; where any example has pixels to ignore, also `ignore` bool
      [n, h, w], True at these, where the image has the mean colour of its other pixels: what was
      there reaches neither training nor scores.

    Raises:
      decode.LayoutError: a file cannot be read, for example because it was removed since the check.
    """
    size = tuple(image_size)

    def resize(example: dict) -> dict:
        image = tf.numpy_function(lambda x: resize_image(x, size), [example["image"]], tf.uint8)
        resized = {"image": tf.ensure_shape(image, (*size, 3))}
        for key in example.keys() & {"mask", "ignore"}:
            mask = tf.numpy_function(
                lambda x: resize_mask(x[..., 0], size), [example[key]], tf.bool
            )
            resized[key] = tf.ensure_shape(mask, size)
        return example | resized

    count = int(dataset.cardinality())
    if not count:
        empty = {"has_mask": bool, "label": np.int64, "defect_type": str, "name": str}
        return {
            "image": np.zeros((0, *size, 3), np.uint8),
            "mask": np.zeros((0, *size), bool),
        } | {key: np.zeros(0, dtype) for key, dtype in empty.items()}
    resized = dataset.map(resize, num_parallel_calls=tf.data.AUTOTUNE).batch(count)
    with _own_errors(dataset):
        arrays = next(resized.as_numpy_iterator())
    for key in ("defect_type", "name"):
        arrays[key] = np.array([text.decode() for text in arrays[key]])
    if "ignore" in arrays:
        arrays["image"] = arrays["image"].copy()  # TensorFlow's cannot be written to
        for image, ignored in zip(arrays["image"], arrays["ignore"], strict=True):
            if not ignored.all():
                image[ignored] = image[~ignored].mean(axis=0).round()
    return arrays


def load_masks(dataset: tf.data.Dataset, key: str = "mask") -> list[np.ndarray] | None:
    """Returns the masks of a split at the size they have in their files: bool [h, w] each.

    `key` is "mask", or "ignore" for the pixels to ignore; None if the split has none.
    """
    if key not in dataset.element_spec:
        return None
    with _own_errors(dataset):
        return [example[key][..., 0].astype(bool) for example in dataset.as_numpy_iterator()]


def train_batches(
    arrays: Mapping[str, np.ndarray], start_step: int, *, rows: slice = slice(None), **order: int
) -> Iterator[Arrays]:
    """Yields shuffled batches without end, two of them prepared ahead.

    The same as `images.batches.train_batches`, as a tf.data pipeline. `order` is `batch_size` and
    `seed`.
    """
    cached = {name: tf.constant(array) for name, array in arrays.items()}
    count = len(next(iter(arrays.values())))
    closed = False

    def orders() -> Iterator[np.ndarray]:
        step = start_step
        while not closed:
            yield batch_order(count=count, step=step, **order)[rows]
            step += 1

    signature = tf.TensorSpec((None,), tf.int64)
    dataset = tf.data.Dataset.from_generator(orders, output_signature=signature)
    gather = lambda rows: {name: tf.gather(x, rows) for name, x in cached.items()}  # noqa: E731
    batches = dataset.map(gather).prefetch(2).as_numpy_iterator()
    try:
        yield from batches
    finally:
        # TensorFlow deletes the pipeline with Python's global lock held, and waits for its thread,
        # which needs that lock to draw an order: up to a minute in which nothing happens.
        closed = True
        collections.deque(batches, maxlen=0)


def test_batches(arrays: Arrays, batch_size: int) -> Iterator[Arrays]:
    """Yields a split in order, in batches of the same keys; the last one may be shorter."""
    for start in range(0, len(arrays["label"]), batch_size):
        yield {key: values[start : start + batch_size] for key, values in arrays.items()}
