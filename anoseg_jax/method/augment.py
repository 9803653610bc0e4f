"""Mild augmentation that keeps a good part good, one image at a time, on the device.

Images are float [h, w, 3] in [0, 1]. What is harmless depends on the product: each transformation
is switched on its own (`config.augment`, by category in `config.category_options`).
"""

import jax
import jax.numpy as jnp
from jax import Array


def warp(image: Array, angle: Array, offset: Array) -> Array:
    """Rotates about the centre by `angle` (radians), then shifts by `offset` (rows, columns).

    Bilinear; what comes in from outside repeats the nearest pixel of the edge.
    """
    h, w, _ = image.shape
    rows = jnp.arange(h)[:, None] - (h - 1) / 2 - offset[0]
    columns = jnp.arange(w)[None, :] - (w - 1) / 2 - offset[1]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rows, columns = (
        jnp.clip(cos * rows + sin * columns + (h - 1) / 2, 0, h - 1),
        jnp.clip(cos * columns - sin * rows + (w - 1) / 2, 0, w - 1),
    )
    top, left = jnp.floor(rows).astype(int), jnp.floor(columns).astype(int)
    bottom, right = jnp.minimum(top + 1, h - 1), jnp.minimum(left + 1, w - 1)
    down, across = (rows - top)[..., None], (columns - left)[..., None]
    upper = image[top, left] * (1 - across) + image[top, right] * across
    lower = image[bottom, left] * (1 - across) + image[bottom, right] * across
    return upper * (1 - down) + lower * down


def augment(
    key: Array,
    image: Array,
    *,
    flip_horizontal: bool = False,
    flip_vertical: bool = False,
    rotation: float = 0.0,
    shift: float = 0.0,
    brightness: float = 0.0,
) -> Array:
    """Returns the image as another good part of the same kind could look: [h, w, 3] in [0, 1].

    Args:
      key: a PRNG key; the result depends on it and the image alone.
      image: float [h, w, 3] in [0, 1].
      flip_horizontal: mirrors left and right in half of the draws.
      flip_vertical: mirrors top and bottom in half of the draws.
      rotation: largest angle, in degrees, either way.
      shift: largest shift, as a fraction of the height and of the width, either way.
      brightness: largest relative change of brightness, either way.
    """
    h, w, _ = image.shape
    flip_key, mirror_key, angle_key, shift_key, brightness_key = jax.random.split(key, 5)
    if flip_horizontal:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    if flip_vertical:
        image = jnp.where(jax.random.bernoulli(mirror_key), image[::-1], image)
    if rotation or shift:
        angle = jnp.deg2rad(jax.random.uniform(angle_key, minval=-rotation, maxval=rotation))
        offset = jax.random.uniform(shift_key, (2,), minval=-shift, maxval=shift)
        image = warp(image, angle, offset * jnp.array([h, w]))
    if brightness:
        gain = jax.random.uniform(brightness_key, minval=1 - brightness, maxval=1 + brightness)
        image = jnp.clip(image * gain, 0, 1)
    return image
