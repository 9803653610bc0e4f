"""Batches of training images: their ids, which of them are held out, the order of the others.

Needs no TensorFlow. The order is a function of (seed, step), so that a resumed run sees the batches
that an uninterrupted run sees.
"""

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np


def assign_image_ids(images: np.ndarray) -> np.ndarray:
    """Returns each image's position in the list, int32 [n]; equal images share the first one's."""
    positions: dict[bytes, int] = {}
    hashes = (hashlib.sha256(np.ascontiguousarray(image)).digest() for image in images)
    ids = [positions.setdefault(digest, index) for index, digest in enumerate(hashes)]
    return np.array(ids, np.int32)


def hold_out(image_ids: np.ndarray, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions of the images to train on, and of those to make thresholds from.

    The fraction is rounded down, but of four or more images at least one is held out: without one
    there is no threshold. At least one image is left to train on. Equal images, which share an id,
    are on the same side. The split depends on the seed and the ids only.
    """
    unique = np.unique(image_ids)
    least = int(fraction > 0 and len(unique) >= 4)
    count = min(max(int(fraction * len(unique)), least), len(unique) - 1)
    # A random stream of its own: not the one that shuffles the first epoch.
    order = np.random.default_rng([seed, 0, 1]).permutation(len(unique))
    is_held_out = np.isin(image_ids, unique[order[: max(count, 0)]])
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def batch_order(*, count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Returns the positions of the images of the batch after `step` batches, int [batch_size].

    Each epoch is shuffled by (seed, epoch); a batch may span two epochs.
    """
    positions = step * batch_size + np.arange(batch_size)
    epochs = {epoch: np.random.default_rng([seed, epoch]) for epoch in set(positions // count)}
    orders = {epoch: generator.permutation(count) for epoch, generator in epochs.items()}
    return np.array([orders[p // count][p % count] for p in positions])


def train_batches(
    arrays: Mapping[str, np.ndarray],
    start_step: int,
    *,
    batch_size: int,
    seed: int,
    rows: slice = slice(None),
) -> Iterator[dict[str, np.ndarray]]:
    """Yields shuffled batches without end.

    Args:
      arrays: of n examples each, such as `image` uint8 [n, h, w, 3] and `image_id` int32 [n].
      start_step: the number of batches that the run has had already.
      batch_size: of all devices together.
      seed: of the order.
      rows: the rows of each batch that this process reads.
    """
    count = len(next(iter(arrays.values())))
    step = start_step
    while True:
        order = batch_order(count=count, batch_size=batch_size, seed=seed, step=step)[rows]
        yield {name: array[order] for name, array in arrays.items()}
        step += 1
