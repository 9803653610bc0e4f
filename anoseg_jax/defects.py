"""Synthetic defects: `(key, image, *, options) -> (image, mask)`, one image, on the device.

Images are float [h, w, 3] in [0, 1], masks float [h, w] in {0, 1}, 1 = anomalous. What is drawn
depends on the key alone. A mask marks exactly the pixels that differ from the good image: outside
it the two are equal to the bit, inside it they differ by at least `min_change` in some channel.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def rotate(key: Array, image: Array) -> Array:
    """Turns a square image by 90, 180 or 270 degrees, any other by 180."""
    if image.shape[0] != image.shape[1]:
        return image[::-1, ::-1]
    turns = [partial(jnp.rot90, k=k) for k in (1, 2, 3)]
    return jax.lax.switch(jax.random.randint(key, (), 0, 3), turns, image)


def permute(key: Array, image: Array, *, grid: int) -> Array:
    """Cuts the image into grid x grid patches and shuffles them.

    Where the grid does not divide the image, the rows and columns left over stay in place.
    """
    h, w, c = image.shape
    rows, columns = h // grid, w // grid
    core = image[: rows * grid, : columns * grid]
    patches = core.reshape(grid, rows, grid, columns, c).transpose(0, 2, 1, 3, 4)
    patches = patches.reshape(grid * grid, rows, columns, c)
    patches = patches[jax.random.permutation(key, grid * grid)]
    patches = patches.reshape(grid, grid, rows, columns, c).transpose(0, 2, 1, 3, 4)
    return image.at[: rows * grid, : columns * grid].set(patches.reshape(core.shape))


def jitter_color(
    key: Array, image: Array, *, brightness: float, contrast: float, saturation: float, hue: float
) -> Array:
    """Changes brightness, contrast, saturation and hue; a grey image stays grey.

    The first three are the largest relative changes either way; `hue` is the largest turn about
    the grey axis, in degrees.
    """
    keys = jax.random.split(key, 4)
    draw = lambda k, size: 1 + jax.random.uniform(k, minval=-size, maxval=size)  # noqa: E731
    image = image * draw(keys[0], brightness)
    mean = jnp.mean(image)
    image = mean + (image - mean) * draw(keys[1], contrast)
    grey = jnp.mean(image, axis=-1, keepdims=True)
    chroma = image - grey
    angle = jnp.deg2rad(jax.random.uniform(keys[3], minval=-hue, maxval=hue))
    # Rodrigues' rotation about (1, 1, 1): chroma has no part along the axis.
    across = (jnp.roll(chroma, 1, axis=-1) - jnp.roll(chroma, -1, axis=-1)) / jnp.sqrt(3.0)
    chroma = jnp.cos(angle) * chroma + jnp.sin(angle) * across
    return jnp.clip(grey + chroma * draw(keys[2], saturation), 0, 1)


def rectangle(
    key: Array, size: tuple[int, int], *, area: tuple[float, float], aspect: float
) -> Array:
    """Returns a region [h, w] (bool): a rectangle at a random place and angle.

    Args:
      key: a PRNG key.
      size: height and width of the image.
      area: smallest and largest area, as fractions of the image; drawn log-uniformly.
      aspect: largest ratio of the sides; drawn log-uniformly. Large values make thin strips.
    """
    h, w = size
    place_key, area_key, aspect_key, angle_key = jax.random.split(key, 4)
    centre = jax.random.uniform(place_key, (2,)) * jnp.array([h, w])
    bounds = jnp.log(jnp.array(area))
    pixels = h * w * jnp.exp(jax.random.uniform(area_key, minval=bounds[0], maxval=bounds[1]))
    ratio = jnp.exp(jax.random.uniform(aspect_key, maxval=jnp.log(aspect)))
    # At least two pixels thick: thinner ones would fall between the pixels.
    breadth = jnp.maximum(jnp.sqrt(pixels / ratio), 2.0)
    length = pixels / breadth
    angle = jax.random.uniform(angle_key, maxval=jnp.pi)
    rows = jnp.arange(h)[:, None] + 0.5 - centre[0]
    columns = jnp.arange(w)[None, :] + 0.5 - centre[1]
    along = jnp.cos(angle) * columns + jnp.sin(angle) * rows
    across = jnp.cos(angle) * rows - jnp.sin(angle) * columns
    return (jnp.abs(along) <= length / 2) & (jnp.abs(across) <= breadth / 2)


def cut_and_paste(
    key: Array,
    image: Array,
    *,
    source: Array | None = None,
    regions: int = 3,
    area: tuple[float, float] = (0.0005, 0.05),
    aspect: float = 16.0,
    opacity: tuple[float, float] = (0.3, 1.0),
    min_change: float = 0.08,
) -> tuple[Array, Array]:
    """Cuts regions from `source` (default: the image itself) and pastes them elsewhere.

    Args:
      key: a PRNG key.
      image: float [h, w, 3] in [0, 1].
      source: what is cut from, of the image's shape.
      regions: largest number of regions; 1 to `regions` are pasted.
      area: smallest and largest area of a region, as fractions of the image.
      aspect: largest ratio of a region's sides.
      opacity: smallest and largest opacity of what is pasted.
      min_change: smallest change, in the channel that changes most, that counts as a defect;
        pixels that would change less keep their value and stay outside the mask.
    """
    h, w, _ = image.shape
    source = image if source is None else source
    count_key, *region_keys = jax.random.split(key, 1 + regions)
    count = jax.random.randint(count_key, (), 1, regions + 1)
    defective = image
    for index, region_key in enumerate(region_keys):
        shape_key, place_key, opacity_key = jax.random.split(region_key, 3)
        region = rectangle(shape_key, (h, w), area=area, aspect=aspect) & (index < count)
        shift = jax.random.randint(place_key, (2,), 0, jnp.array([h, w]))
        piece = jnp.roll(source, shift, axis=(0, 1))
        alpha = jax.random.uniform(opacity_key, minval=opacity[0], maxval=opacity[1])
        blend = defective + alpha * (piece - defective)
        defective = jnp.where(region[..., None], blend, defective)
    changed = jnp.max(jnp.abs(defective - image), axis=-1) >= min_change
    return jnp.where(changed[..., None], defective, image), changed.astype(image.dtype)


def hard_augmentation(
    key: Array,
    image: Array,
    *,
    rotate_probability: float = 0.5,
    permute_probability: float = 0.5,
    jitter_probability: float = 0.5,
    grid: int = 4,
    brightness: float = 0.5,
    contrast: float = 0.5,
    saturation: float = 0.5,
    hue: float = 90.0,
    **paste: float,
) -> tuple[Array, Array]:
    """The paper's hard augmentation: pastes regions of a rotated, permuted, colour-jittered copy.

    Each of the three happens with its own probability; `paste` are options of `cut_and_paste`,
    the rest those of `permute` and `jitter_color`. Every number is this project's choice.
    """
    keys = jax.random.split(key, 7)
    happens = lambda k, p: jax.random.bernoulli(k, p)  # noqa: E731
    copy = jnp.where(happens(keys[0], rotate_probability), rotate(keys[1], image), image)
    copy = jnp.where(happens(keys[2], permute_probability), permute(keys[3], copy, grid=grid), copy)
    jittered = jitter_color(
        keys[5], copy, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
    )
    copy = jnp.where(happens(keys[4], jitter_probability), jittered, copy)
    return cut_and_paste(keys[6], image, source=copy, **paste)


# Every kind of defect: `config.defects.<name>` holds its options, the tests pick it up from here.
DEFECTS = {"cut_and_paste": cut_and_paste, "hard_augmentation": hard_augmentation}

# What `config.defects.preset` may name: how often each kind is drawn, relative to the others.
PRESETS = {
    "paper": {"hard_augmentation": 1.0},
    "plain": {"cut_and_paste": 1.0},  # the ablation: no hard augmentation
}


def synthesize(
    key: Array,
    image: Array,
    *,
    preset: str,
    normal_fraction: float,
    options: Mapping[str, Mapping[str, float]],
) -> tuple[Array, Array]:
    """Draws a kind of defect from a preset and applies it, or leaves the image as it is.

    Args:
      key: a PRNG key.
      image: float [h, w, 3] in [0, 1].
      preset: a key of `PRESETS`.
      normal_fraction: probability that the image is left normal and its mask empty.
      options: for each kind of defect, its options.

    Returns:
      The image [h, w, 3] and its defect mask [h, w].
    """
    normal_key, kind_key, defect_key = jax.random.split(key, 3)
    shares = PRESETS[preset]
    kinds = [partial(DEFECTS[kind], **options[kind]) for kind in shares]
    kind = jax.random.categorical(kind_key, jnp.log(jnp.array(list(shares.values()))))
    defective, mask = jax.lax.switch(kind, kinds, defect_key, image)
    normal = jax.random.bernoulli(normal_key, normal_fraction)
    return jnp.where(normal, image, defective), jnp.where(normal, 0.0, mask)
