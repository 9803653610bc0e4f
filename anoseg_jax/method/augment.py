"""Mild augmentation that keeps a good image good, one image at a time, on the device.

Images are float [h, w, 3] in [0, 1]. Which changes are harmless depends on the product, so each has
its own option (`config.augment`, by category in `config.category_options`). Options may be traced:
categories with different options share one compiled program.
"""

import jax
import jax.numpy as jnp
from jax import Array


def warp(image: Array, angle: Array, offset: Array) -> Array:
    """Rotates about the centre by `angle` (radians), then shifts by `offset` (rows, columns).

    Bilinear interpolation. Pixels from outside the image repeat the nearest pixel of the edge.
    """
    h, w, c = image.shape
    rows = jnp.arange(h)[:, None] - (h - 1) / 2 - offset[0]
    columns = jnp.arange(w)[None, :] - (w - 1) / 2 - offset[1]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rows, columns = (
        jnp.clip(cos * rows + sin * columns + (h - 1) / 2, 0, h - 1),
        jnp.clip(cos * columns - sin * rows + (w - 1) / 2, 0, w - 1),
    )
    top, left = rows.astype(int), columns.astype(int)  # rounds down: none is negative
    bottom, right = jnp.minimum(top + 1, h - 1), jnp.minimum(left + 1, w - 1)
    down, across = (rows - top)[..., None], (columns - left)[..., None]
    # One index for a pixel: far fewer operations to compile than indexing by row and column.
    pixels = image.reshape(h * w, c)
    at = lambda row, column: jnp.take(pixels, row * w + column, axis=0, mode="clip")  # noqa: E731
    upper = at(top, left) * (1 - across) + at(top, right) * across
    lower = at(bottom, left) * (1 - across) + at(bottom, right) * across
    return upper * (1 - down) + lower * down


def augment(
    key: Array,
    image: Array,
    *,
    flip_horizontal: Array,
    flip_vertical: Array,
    rotation: Array,
    shift: Array,
    brightness: Array,
) -> Array:
    """Flips, rotates, shifts and brightens a good image at random: [h, w, 3] in [0, 1].

    The options are scalars, those of `config.augment`; 0 is off. Flips happen in half of the draws.
    The others are the largest change, either way. Under `jax.vmap` over images, leave the options
    unbatched: images are then warped only if `rotation` or `shift` is on.
    """
    h, w, _ = image.shape
    uniforms = jax.random.uniform(key, (6,))
    signed = 2 * uniforms - 1
    image = jnp.where((uniforms[0] < 0.5) & (flip_horizontal > 0), image[:, ::-1], image)
    image = jnp.where((uniforms[1] < 0.5) & (flip_vertical > 0), image[::-1], image)
    angle = jnp.deg2rad(rotation * signed[2])
    offset = shift * signed[3:5] * jnp.array([h, w])
    needs_warp = jnp.logical_or(rotation > 0, shift > 0)
    image = jax.lax.cond(needs_warp, warp, lambda image, *_: image, image, angle, offset)
    return jnp.clip(image * (1 + brightness * signed[5]), 0, 1)
