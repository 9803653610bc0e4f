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
from typing import Any, NamedTuple

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
    curve,
    draw,
    find_object,
    integer,
    is_grey,
    jitter_color,
    local_contrast,
    log_uniform,
    permute,
    rectangle,
    roll,
    rotate,
    sample,
    texture,
    tint,
)

# Options that shape the compiled program: Python integers.
STATIC_OPTIONS = ("regions", "lines", "grid", "radius")


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


def scratch(
    key: Array,
    image: Array,
    *,
    other: Array,
    allowed_region: Array,
    lines: int,
    length: Range,
    thickness: Range,
    amount: Range,
    min_change: Float,
) -> tuple[Array, Array]:
    """Draws 1 to `lines` thin bent lines, lighter or darker than the image.

    `length` and `thickness` are those of `curve`, `amount` is that of `tint`.
    """
    count, color, uniforms = draw(key, image, (), (5,), (lines, 5))
    shape = partial(curve, length=length, thickness=thickness)
    curves = jax.vmap(shape, in_axes=(0, None))(uniforms, allowed_region)
    drawn = jnp.arange(lines) < 1 + integer(count, lines)
    alpha = jnp.max(curves * drawn[:, None, None], axis=0)
    piece = tint(color, image, contrast_within(image, alpha), amount=amount)
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


def random_texture(
    key: Array,
    image: Array,
    *,
    other: Array,
    allowed_region: Array,
    amount: Range,
    opacity: Range,
    min_change: Float,
    **outline: Any,
) -> tuple[Array, Array]:
    """Paints a texture of random spectrum and colours in smooth random shapes.

    It covers the surface, in its colour there or in a random colour, or is added to it. No outside
    images are needed (DRAEM, Zavrtanik et al., arXiv 2108.07610, takes photographs of textures).
    `outline` are the options of `blob`; `amount` is the texture's contrast, relative to the
    image's within the shapes.
    """
    shape, spectrum, color, choice, noise = draw(
        key, image, (BLOB_NUMBERS,), (6,), (7,), (4,), image.shape[:2]
    )
    shapes = blob(shape, allowed_region, **outline)
    grey = is_grey(image)
    direction = jnp.where(grey | (choice[0] < 0.5), 1.0, 2 * color[:3] - 1)
    size = contrast_within(image, shapes) * log_uniform(color[6], amount)
    pattern = size * texture(spectrum, noise - 0.5)[..., None] * direction
    mean_color = jnp.sum(image * shapes[..., None], (0, 1)) / (jnp.sum(shapes) + 1e-6)
    random_color = jnp.where(grey, color[3], color[3:6])
    covering = jnp.where(choice[1] < 0.5, mean_color, random_color)
    piece = jnp.clip(jnp.where(choice[2] < 0.4, image, covering) + pattern, 0, 1)
    alpha = between(choice[3], opacity) * shapes
    return visible(image, image + alpha[..., None] * (piece - image), min_change)


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


def displacement(
    key: Array,
    image: Array,
    *,
    other: Array,
    allowed_region: Array,
    distance: Range,
    min_change: Float,
    **outline: Any,
) -> tuple[Array, Array]:
    """Pushes the image aside in smooth random shapes: bent, dented and shifted pieces.

    `distance` is the largest shift, as a fraction of the image's height (log-uniform); `outline`
    are the options of `blob`.
    """
    shape, move = draw(key, image, (BLOB_NUMBERS,), (2,))
    h, w, _ = image.shape
    shapes = blob(shape, allowed_region, **outline)
    shift = shapes * h * log_uniform(move[0], distance)
    angle = 2 * jnp.pi * move[1]
    rows = jnp.arange(h)[:, None] + jnp.sin(angle) * shift
    columns = jnp.arange(w) + jnp.cos(angle) * shift
    piece = jnp.where((shapes > 0)[..., None], sample(image, rows, columns), image)
    return visible(image, piece, min_change)


# Every kind of defect: `config.defects.<name>` holds its options; the tests run over this dict.
DEFECTS = {
    "cut_and_paste": cut_and_paste,
    "hard_augmentation": hard_augmentation,
    "foreign_texture": foreign_texture,
    "scratch": scratch,
    "local_change": local_change,
    "random_texture": random_texture,
    "foreign_structure": foreign_structure,
    "displacement": displacement,
}


class Preset(NamedTuple):
    """How often each kind is drawn, relative to the others; whether defects keep to the object."""

    shares: Mapping[str, float]
    on_object: bool


# Values of `config.defects.preset`.
PRESETS = {
    # Some of each, for unknown products.
    "default": Preset(
        {
            "hard_augmentation": 2,
            "foreign_texture": 2,
            "scratch": 2,
            "local_change": 2,
            "random_texture": 2,
            "foreign_structure": 2,
            "displacement": 1,
        },
        True,
    ),
    # Products with a shape: pieces that are missing, moved or bent, scratches.
    "objects": Preset(
        {
            "hard_augmentation": 3,
            "foreign_texture": 2,
            "scratch": 2,
            "local_change": 1,
            "random_texture": 1,
            "foreign_structure": 2,
            "displacement": 2,
        },
        True,
    ),
    # Surfaces without a shape: stains, scratches, patches of another grain.
    "textures": Preset(
        {
            "hard_augmentation": 1,
            "foreign_texture": 2,
            "scratch": 2,
            "local_change": 3,
            "random_texture": 3,
            "foreign_structure": 2,
        },
        False,
    ),
    "paper": Preset({"hard_augmentation": 1}, False),
    "plain": Preset({"cut_and_paste": 1}, False),  # the ablation: no hard augmentation
}


def split_options(config_defects: Mapping[str, Any]) -> tuple[FrozenDict, dict[str, Any]]:
    """Splits `config.defects` into static options and arrays, for the kinds that its preset draws.

    Returns:
      The kinds in the order of `DEFECTS` with their static options: hashable, and equal if the
      compiled program is. Then float32 arrays: "shares" [k] of the kinds in that order,
      "normal_fraction", "on_object" (1 if preset and config both ask for it, else 0), and
      "options" by kind and name.
    """
    preset = PRESETS[config_defects["preset"]]
    static, options = {}, {}
    for kind in (kind for kind in DEFECTS if kind in preset.shares):
        values = config_defects[kind]
        static[kind] = {name: int(values[name]) for name in STATIC_OPTIONS if name in values}
        options[kind] = {
            name: np.asarray(values[name], np.float32)
            for name in values
            if name not in static[kind]
        }
    arrays = {
        "shares": np.array([preset.shares[kind] for kind in static], np.float32),
        "normal_fraction": np.asarray(config_defects["normal_fraction"], np.float32),
        "on_object": np.asarray(preset.on_object and config_defects["on_object"], np.float32),
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
    ends = jnp.cumsum(arrays["shares"])
    kind = jnp.sum(kind * ends[-1] >= ends[:-1], dtype=jnp.int32)
    defective, mask = jax.lax.switch(kind, draws, defect_key, image)
    normal = normal < arrays["normal_fraction"]
    return jnp.where(normal, image, defective), jnp.where(normal, 0.0, mask)
