"""Mild augmentation that keeps a good image good, one image at a time, on the device.

Images are float [h, w, 3] in [0, 1]. Which changes are harmless depends on the product, so each has
its own option (`config.augment`, by category in `config.category_options`). Options may be traced:
categories with different options share one compiled program.
"""

import jax
import jax.numpy as jnp
from jax import Array

from anoseg_jax.method.shapes import sample


def warp(image: Array, angle: Array, offset: Array) -> Array:
    """Rotates about the centre by `angle` (radians), then shifts by `offset` (rows, columns).

    Bilinear interpolation. Pixels from outside the image repeat the nearest pixel of the edge.
    """
    h, w, _ = image.shape
    rows = jnp.arange(h)[:, None] - (h - 1) / 2 - offset[0]
    columns = jnp.arange(w)[None, :] - (w - 1) / 2 - offset[1]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return sample(
        image,
        cos * rows + sin * columns + (h - 1) / 2,
        cos * columns - sin * rows + (w - 1) / 2,
    )


def augment(
    key: Array,
    image: Array,
    *,
    flip_horizontal: Array,
    flip_vertical: Array,
    rotation: Array,
    shift: Array,
    light: Array,
) -> Array:
    """Flips, rotates, shifts and relights a good image at random: [h, w, 3] in [0, 1].

    The options are scalars, those of `config.augment`; 0 is off. Flips happen in half of the draws.
    The others are the largest change, either way. Under `jax.vmap` over images, leave the options
    unbatched: images are then warped only if `rotation` or `shift` is on.
    """
    h, w, _ = image.shape
    uniforms = jax.random.uniform(key, (8,))
    signed = 2 * uniforms - 1
    image = jnp.where((uniforms[0] < 0.5) & (flip_horizontal > 0), image[:, ::-1], image)
    image = jnp.where((uniforms[1] < 0.5) & (flip_vertical > 0), image[::-1], image)
    angle = jnp.deg2rad(rotation * signed[2])
    offset = shift * signed[3:5] * jnp.array([h, w])
    needs_warp = jnp.logical_or(rotation > 0, shift > 0)
    image = jax.lax.cond(needs_warp, warp, lambda image, *_: image, image, angle, offset)
    return relight(light * signed[5:], image)


def relight(change: Array, image: Array) -> Array:
    """Changes gamma, contrast and brightness a little, as between two days: [h, w, 3].

    `change` are three numbers about 0: the logarithm of gamma, the relative change of the contrast,
    and twice that of the brightness. Colours stay: a head that has to ignore changes of 3 % in the
    gain of a channel does not see faintly coloured defects either (docs/lab/experiments.md, 70).
    """
    x = jnp.maximum(image, 1e-6) ** jnp.exp(change[0])  # 1e-6: no infinite slope at 0
    mean = jnp.mean(image)
    x = mean + (x - mean) * (1 + change[1]) + change[2] / 2
    return jnp.where(jnp.any(change != 0), jnp.clip(x, 0, 1), image)
