"""Synthetic defects: `(key, image, *, other, allowed_region, **options) -> (image, mask)`.

One image at a time, float [h, w, 3] in [0, 1]. Masks are float [h, w] in {0, 1}, 1 = anomalous.
`other` is another good image. A defect may start in `allowed_region` [h, w] (bool). What is drawn
depends on the key alone. A mask marks exactly the pixels that differ from the good image: outside
the mask both are equal to the bit, inside they differ by at least `min_change` times the
contrast of their surroundings in some channel.

Options are those of `config.defects`; configs/default.py has their values and units. They may be
traced, except `STATIC_OPTIONS`: categories that differ in the others share one compiled program. To
compile fast, a defect takes all its random numbers from one draw.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import Array

from anoseg_jax.method.shapes import (
    BLOB_NUMBERS,
    Float,
    Range,
    between,
    blob,
    box_blur,
    channel_max,
    contrast_within,
    draw,
    find_object,
    integer,
    jitter_color,
    local_contrast,
    log_uniform,
    permute,
    rectangle,
    roll,
    rotate,
    tint,
)

# Options that shape the compiled program: Python integers.
STATIC_OPTIONS = ("regions", "grid", "radius")


# Lower limit of the contrast that `min_change` is relative to.
VISIBLE_CONTRAST = 0.06


def visible(image: Array, defective: Array, min_change: Float) -> tuple[Array, Array]:
    """Returns the defective image and its mask; pixels that changed too little are restored.

    `min_change` is relative to the contrast of a pixel's surroundings (VISIBLE_CONTRAST if that is
    less): a change that is visible on a dull surface is lost on one of high contrast.
    """
    defective = jnp.clip(defective, 0, 1)
    bound = min_change * jnp.maximum(local_contrast(image), VISIBLE_CONTRAST)
    changed = channel_max(jnp.abs(defective - image)) >= bound
    return jnp.where(changed[..., None], defective, image), changed.astype(image.dtype)


def paste_regions(
    uniforms: Array,
    image: Array,
    copy: Array,
    allowed_region: Array,
    *,
    area: Range,
    aspect: Float,
    opacity: Range,
    min_change: Float,
) -> tuple[Array, Array]:
    """Cuts 1 to `regions` rectangles from a changed copy of the image and pastes them elsewhere.

    Takes [1 + regions, 7] uniforms. `area` and `aspect` are those of `rectangle`; `opacity` is the
    smallest and largest of a rectangle.
    """
    regions = len(uniforms) - 1
    count = 1 + integer(uniforms[0, 0], regions)
    shape = partial(rectangle, area=area, aspect=aspect)
    masks = jax.vmap(shape, in_axes=(0, None))(uniforms[1:, :4], allowed_region)
    masks &= (jnp.arange(regions) < count)[:, None, None]
    alpha = (masks * between(uniforms[1:, 4], opacity)[:, None, None])[..., None]
    pieces = jax.vmap(roll, in_axes=(0, None))(uniforms[1:, 5:], copy)
    defective = image
    for index in range(regions):
        defective += alpha[index] * (pieces[index] - defective)
    return visible(image, defective, min_change)


def cut_and_paste(
    key: Array, image: Array, *, other: Array, allowed_region: Array, regions: int, **paste: Any
) -> tuple[Array, Array]:
    """Cuts up to `regions` rectangles from the image and pastes them elsewhere into it.

    `paste` are the options of `paste_regions`.
    """
    (uniforms,) = draw(key, image, (1 + regions, 7))
    return paste_regions(uniforms, image, image, allowed_region, **paste)


def hard_augmentation(
    key: Array,
    image: Array,
    *,
    other: Array,
    allowed_region: Array,
    rotate_probability: Float,
    permute_probability: Float,
    jitter_probability: Float,
    regions: int,
    grid: int,
    brightness: Float,
    contrast: Float,
    saturation: Float,
    hue: Float,
    **paste: Any,
) -> tuple[Array, Array]:
    """The paper's hard augmentation: pastes regions of a rotated, permuted, colour-jittered copy.

    Each of the three happens with its own probability. `grid` is that of `permute`; `brightness`
    to `hue` are those of `jitter_color`; `regions` and `paste` are those of `cut_and_paste`. The
    paper (arXiv 2110.03396) gives no values: all are choices of this project.
    """
    happens, turn, order, color, uniforms = draw(
        key, image, (3,), (), (grid**2,), (4,), (1 + regions, 7)
    )
    copy = jnp.where(happens[0] < rotate_probability, rotate(turn, image), image)
    copy = jnp.where(happens[1] < permute_probability, permute(order, copy, grid=grid), copy)
    jittered = jitter_color(color, copy, (brightness, contrast, saturation, hue))
    copy = jnp.where(happens[2] < jitter_probability, jittered, copy)
    return paste_regions(uniforms, image, copy, allowed_region, **paste)


def foreign_texture(
    key: Array,
    image: Array,
    *,
    other: Array,
    allowed_region: Array,
    opacity: Range,
    brightness: Float,
    min_change: Float,
    **outline: Any,
) -> tuple[Array, Array]:
    """Blends in smooth random shapes of another image: rotated, shifted, colour-jittered.

    `outline` are the options of `blob`. `brightness` is the largest relative change of
    brightness and contrast.
    """
    shape, turn, shift, color, alpha = draw(key, image, (BLOB_NUMBERS,), (), (2,), (4,), ())
    piece = roll(shift, rotate(turn, other))
    piece = jitter_color(color, piece, (brightness, brightness, 0.5, 60.0))
    shapes = blob(shape, allowed_region, **outline)
    alpha = between(alpha, opacity) * shapes
    return visible(image, image + alpha[..., None] * (piece - image), min_change)


def local_change(
    key: Array,
    image: Array,
    *,
    other: Array,
    allowed_region: Array,
    radius: int,
    amount: Range,
    min_change: Float,
    **outline: Any,
) -> tuple[Array, Array]:
    """Blurs the image, adds noise to it, or makes it lighter or darker, in smooth random shapes.

    `outline` are the options of `blob`, `radius` is that of `box_blur`. `amount` is that of
    `tint` and the least amplitude of the noise.
    """
    shape, change, size, color, noise = draw(
        key, image, (BLOB_NUMBERS,), (), (), (5,), (*image.shape[:2], 1)
    )
    shapes = blob(shape, allowed_region, **outline)
    contrast = contrast_within(image, shapes)
    noise = 2 * noise - 1
    noise += jnp.sign(noise)  # changes every pixel
    noisy = image + contrast * log_uniform(size, amount) * noise
    piece = jax.lax.select_n(
        integer(change, 3),
        box_blur(image, radius=radius),
        jnp.clip(noisy, 0, 1),
        tint(color, image, contrast, amount=amount),
    )
    return visible(image, image + shapes[..., None] * (piece - image), min_change)


def foreign_structure(
    key: Array,
    image: Array,
    *,
    other: Array,
    allowed_region: Array,
    gain: Range,
    min_change: Float,
    **outline: Any,
) -> tuple[Array, Array]:
    """Replaces the fine structure in smooth random shapes by that of another place or image.

    Brightness and colour stay, so that no edge gives the piece away (the aim of the Poisson
    blending of NSA, Schluter et al., arXiv 2109.15222). `gain` is the factor of the structure's
    contrast; `outline` are the options of `blob`.
    """
    shape, turn, shift, choice = draw(key, image, (BLOB_NUMBERS,), (), (2,), (3,))
    source = jnp.where(choice[0] < 0.5, other, image)
    source = roll(shift, jnp.where(choice[1] < 0.5, rotate(turn, source), source))
    # Twice: nearly a Gaussian.
    radius = max(2, image.shape[0] // 16)
    smooth = lambda x: box_blur(box_blur(x, radius=radius), radius=radius)  # noqa: E731
    structure = log_uniform(choice[2], gain) * (source - smooth(source))
    piece = jnp.clip(smooth(image) + structure, 0, 1)
    shapes = blob(shape, allowed_region, **outline)
    return visible(image, image + shapes[..., None] * (piece - image), min_change)


# Every kind of defect: `config.defects.<name>` holds its options; the tests run over this dict.
DEFECTS = {
    "cut_and_paste": cut_and_paste,
    "hard_augmentation": hard_augmentation,
    "foreign_texture": foreign_texture,
    "local_change": local_change,
    "foreign_structure": foreign_structure,
}


# Values of `config.defects.preset`: the kinds that are drawn, each as often as the others.
PRESETS = {
    "default": (
        "hard_augmentation",
        "foreign_texture",
        "local_change",
        "foreign_structure",
    ),
    "paper": ("hard_augmentation",),
    "plain": ("cut_and_paste",),  # the ablation: no hard augmentation
}


def split_options(config_defects: Mapping[str, Any]) -> tuple[FrozenDict, dict[str, Any]]:
    """Splits `config.defects` into static options and arrays, for the kinds that its preset draws.

    Returns:
      The kinds with their static options: hashable, and equal if the compiled program is. Then
      float32 arrays: "normal_fraction", "on_object" (never with the presets "paper" and "plain"),
      and "options" by kind and name.
    """
    preset = config_defects["preset"]
    static, options = {}, {}
    for kind in PRESETS[preset]:
        values = config_defects[kind]
        static[kind] = {name: int(values[name]) for name in STATIC_OPTIONS if name in values}
        options[kind] = {
            name: np.asarray(values[name], np.float32)
            for name in values
            if name not in static[kind]
        }
    arrays = {
        "normal_fraction": np.asarray(config_defects["normal_fraction"], np.float32),
        "on_object": np.asarray(preset == "default" and config_defects["on_object"], np.float32),
        "options": options,
    }
    return FrozenDict(static), arrays


ANYWHERE = 0.1  # share of the images whose defects may also lie on the background


def synthesize(
    key: Array,
    image: Array,
    *,
    other: Array,
    static: Mapping[str, Mapping[str, int]],
    arrays: Mapping[str, Any],
) -> tuple[Array, Array]:
    """Draws a kind of defect and applies it; returns the image [h, w, 3] and its mask [h, w].

    `static` and `arrays` are those of `split_options`. "normal_fraction" is the probability that
    the image is left normal, with an empty mask. With "on_object", if the background is plain
    (`find_object`), defects start on the object in all but a tenth of the images.
    """
    choice_key, defect_key = jax.random.split(key)
    kind, normal, anywhere = jax.random.uniform(choice_key, (3,))
    allowed_region = find_object(image) | (anywhere < ANYWHERE) | (arrays["on_object"] == 0)
    draws = [
        partial(
            DEFECTS[name],
            other=other,
            allowed_region=allowed_region,
            **options,
            **arrays["options"][name],
        )
        for name, options in static.items()
    ]
    defective, mask = jax.lax.switch(integer(kind, len(draws)), draws, defect_key, image)
    normal = normal < arrays["normal_fraction"]
    return jnp.where(normal, image, defective), jnp.where(normal, 0.0, mask)
