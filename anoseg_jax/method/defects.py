"""Synthetic defects: `(key, image, *, other, part, options) -> (image, mask)`, on the device.

One image at a time, float [h, w, 3] in [0, 1]; masks are float [h, w] in {0, 1}, 1 = anomalous.
`other` is another good image, `part` [h, w] (bool) is where a defect may begin; left out, the image
stands in for the other one and all of it is the part. What is drawn depends on the key alone. A
mask marks exactly the pixels that differ from the good image: outside it the two are equal to the
bit, inside it they differ by at least `min_change` standard deviations of the image in a channel.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Range = tuple[float, float]  # smallest and largest


def log_uniform(key: Array, low: float, high: float) -> Array:
    """Returns a number between `low` and `high`, drawn evenly on a logarithmic scale."""
    return low * (high / low) ** jax.random.uniform(key)


def pick(key: Array, part: Array, *, tries: int = 64) -> Array:
    """Returns the (row, column) of a pixel's centre, drawn evenly from a part [h, w] (bool).

    The first of `tries` random pixels that lies in the part; should none, the first of all.
    """
    index = jax.random.randint(key, (tries,), 0, part.size)
    index = index[jnp.argmax(part.ravel()[index])]
    return jnp.stack(jnp.divmod(index, part.shape[1])) + 0.5


def everywhere(image: Array) -> Array:
    """Returns the part [h, w] that is all of the image."""
    return jnp.ones(image.shape[:2], bool)


def box_blur(image: Array, *, radius: int) -> Array:
    """Returns means over squares of 2 * radius + 1 pixels a side; the edge is repeated outwards."""
    width = 2 * radius + 1
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(image.ndim)]
        padded = jnp.pad(image, pad, mode="edge")
        pieces = [
            jax.lax.slice_in_dim(padded, i, i + image.shape[axis], axis=axis) for i in range(width)
        ]
        image = sum(pieces) / width
    return image


def find_object(image: Array, *, tolerance: float = 0.7, least: float = 0.02) -> Array:
    """Returns where the object is, [h, w] (bool), if it lies on a plain background; else all True.

    The background's colour is the median of the image's border. It is plain if nine tenths of the
    border are that colour, within `tolerance` standard deviations of the image in every channel;
    the object is what differs by more, and a margin of 3 pixels. Where that would leave less than
    `least` of the image, the estimate is not trusted.
    """
    border = jnp.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    colour = jnp.median(border, axis=0)
    bound = tolerance * jnp.std(image)
    plain = jnp.mean(jnp.max(jnp.abs(border - colour), axis=-1) <= bound) >= 0.9
    differs = jnp.max(jnp.abs(image - colour), axis=-1) > bound
    trusted = plain & (jnp.mean(differs) >= least)
    # A tenth of the square, so that single noisy pixels of the background stay background.
    return (box_blur(differs.astype(image.dtype), radius=3) > 0.1) | ~trusted


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


def tint(key: Array, image: Array, *, amount: Range) -> Array:
    """Returns the image lighter or darker, by `amount` standard deviations (log-uniform).

    An image that has colour is coloured a little, too.
    """
    sign_key, amount_key, colour_key = jax.random.split(key, 3)
    sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
    grey = jnp.all(image == image[..., :1])
    colour = jnp.where(grey, 0.0, jax.random.uniform(colour_key, (3,), minval=-0.5, maxval=0.5))
    return jnp.clip(
        image + jnp.std(image) * log_uniform(amount_key, *amount) * (sign + colour), 0, 1
    )


def rectangle(key: Array, part: Array, *, area: Range, aspect: float) -> Array:
    """Returns a region [h, w] (bool): a rectangle at any angle with its centre in the part.

    Args:
      key: a PRNG key.
      part: where the centre may lie, [h, w] (bool).
      area: smallest and largest area, as fractions of the image; drawn log-uniformly.
      aspect: largest ratio of the sides; drawn log-uniformly. Large values make thin strips.
    """
    h, w = part.shape
    place_key, area_key, aspect_key, angle_key = jax.random.split(key, 4)
    centre = pick(place_key, part)
    pixels = h * w * log_uniform(area_key, *area)
    # At least two pixels thick: thinner ones would fall between the pixels.
    breadth = jnp.maximum(jnp.sqrt(pixels / log_uniform(aspect_key, 1.0, aspect)), 2.0)
    length = pixels / breadth
    angle = jax.random.uniform(angle_key, maxval=jnp.pi)
    rows = jnp.arange(h)[:, None] + 0.5 - centre[0]
    columns = jnp.arange(w)[None, :] + 0.5 - centre[1]
    along = jnp.cos(angle) * columns + jnp.sin(angle) * rows
    across = jnp.cos(angle) * rows - jnp.sin(angle) * columns
    return (jnp.abs(along) <= length / 2) & (jnp.abs(across) <= breadth / 2)


def smooth_noise(key: Array, size: tuple[int, int], *, octaves: int = 4) -> Array:
    """Returns multi-scale noise [h, w] of mean 0 and standard deviation 1.

    Random grids of 4, 8, 16 ... cells a side are enlarged bicubically and added; each finer one
    weighs less, by a factor that is drawn: some fields are smooth, others ragged.
    """
    factor_key, *keys = jax.random.split(key, 1 + octaves)
    factor = jax.random.uniform(factor_key, minval=0.3, maxval=0.8)
    field = jnp.zeros(size)
    for octave, octave_key in enumerate(keys):
        grid = jax.random.normal(octave_key, (4 * 2**octave,) * 2)
        field += factor**octave * jax.image.resize(grid, size, "cubic", antialias=False)
    return (field - jnp.mean(field)) / jnp.std(field)


def blob(key: Array, part: Array, *, depth: Range, softness: float) -> Array:
    """Returns an opacity [h, w] from 0 to 1: smooth random shapes within the part.

    Smooth noise, cut off at `depth` below its highest point in the part: from a few pixels around
    that point to many islands.

    Args:
      key: a PRNG key.
      part: where the shapes may lie, [h, w] (bool).
      depth: smallest and largest, in standard deviations of the noise; drawn log-uniformly.
      softness: of the edges, from 0 (hard) to 1 (opaque at the highest point alone); drawn evenly
        from 0 to this.
    """
    noise_key, depth_key, soft_key = jax.random.split(key, 3)
    field = jnp.where(part, smooth_noise(noise_key, part.shape), -jnp.inf)
    below = log_uniform(depth_key, *depth)
    edge = below * jnp.maximum(softness * jax.random.uniform(soft_key), 0.01)
    return jnp.clip((field - jnp.max(field) + below) / edge, 0, 1)


def curve(key: Array, part: Array, *, length: Range, thickness: Range, segments: int = 8) -> Array:
    """Returns an opacity [h, w] from 0 to 1: a thin bent line that starts in the part.

    Args:
      key: a PRNG key.
      part: where it may start, [h, w] (bool).
      length: smallest and largest, as fractions of the image's shorter side; log-uniform.
      thickness: likewise; at least one pixel, with edges one pixel soft.
      segments: straight pieces that it is drawn with.
    """
    place_key, angle_key, length_key, bend_key, thick_key = jax.random.split(key, 5)
    h, w = part.shape
    side = min(h, w)
    start = pick(place_key, part)
    angle = jax.random.uniform(angle_key, maxval=2 * jnp.pi)
    along = side * log_uniform(length_key, *length) * jnp.stack([jnp.sin(angle), jnp.cos(angle)])
    bend = jax.random.uniform(bend_key, minval=-0.4, maxval=0.4)
    middle = start + along / 2 + bend * jnp.stack([along[1], -along[0]])
    # A quadratic Bezier curve through start, towards middle, to the end.
    t = jnp.linspace(0, 1, segments + 1)[:, None]
    points = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * (start + along)
    rows, columns = jnp.arange(h)[:, None] + 0.5, jnp.arange(w)[None, :] + 0.5
    squared = jnp.full((h, w), jnp.inf)  # distance to the nearest piece
    for a, b in zip(points[:-1], points[1:], strict=True):
        d = b - a
        s = ((rows - a[0]) * d[0] + (columns - a[1]) * d[1]) / jnp.maximum(d @ d, 1e-6)
        s = jnp.clip(s, 0, 1)
        squared = jnp.minimum(
            squared, (rows - a[0] - s * d[0]) ** 2 + (columns - a[1] - s * d[1]) ** 2
        )
    half = jnp.maximum(side * log_uniform(thick_key, *thickness), 1.0) / 2
    return jnp.clip(half + 0.5 - jnp.sqrt(squared), 0, 1)


def visible(image: Array, defective: Array, min_change: float) -> tuple[Array, Array]:
    """Returns the defective image and its mask; pixels that changed too little are put back.

    `min_change` is relative to the image's standard deviation (0.02 if that is less): what can be
    seen on a dull surface is lost on one of high contrast.
    """
    defective = jnp.clip(defective, 0, 1)
    bound = min_change * jnp.maximum(jnp.std(image), 0.02)
    changed = jnp.max(jnp.abs(defective - image), axis=-1) >= bound
    return jnp.where(changed[..., None], defective, image), changed.astype(image.dtype)


def blend(image: Array, piece: Array, opacity: Array, *, min_change: float) -> tuple[Array, Array]:
    """Lays `piece` over the image with an opacity [h, w]; returns the image and its mask."""
    return visible(image, image + opacity[..., None] * (piece - image), min_change)


def cut_and_paste(
    key: Array,
    image: Array,
    *,
    other: Array | None = None,  # noqa: ARG001
    part: Array | None = None,
    source: Array | None = None,
    regions: int = 3,
    area: Range = (0.0005, 0.05),
    aspect: float = 16.0,
    opacity: Range = (0.3, 1.0),
    min_change: float = 0.5,
) -> tuple[Array, Array]:
    """Cuts regions from `source` (default: the image itself) and pastes them elsewhere.

    Args:
      key: a PRNG key.
      image: float [h, w, 3] in [0, 1].
      other: not used.
      part: where the regions' centres may lie.
      source: what is cut from, of the image's shape.
      regions: largest number of regions; 1 to `regions` are pasted.
      area: smallest and largest area of a region, as fractions of the image.
      aspect: largest ratio of a region's sides.
      opacity: smallest and largest opacity of what is pasted.
      min_change: see `visible`.
    """
    size = image.shape[:2]
    source = image if source is None else source
    part = everywhere(image) if part is None else part
    count_key, *region_keys = jax.random.split(key, 1 + regions)
    count = jax.random.randint(count_key, (), 1, regions + 1)
    defective = image
    for index, region_key in enumerate(region_keys):
        shape_key, place_key, opacity_key = jax.random.split(region_key, 3)
        region = rectangle(shape_key, part, area=area, aspect=aspect) & (index < count)
        shift = jax.random.randint(place_key, (2,), 0, jnp.array(size))
        piece = jnp.roll(source, shift, axis=(0, 1))
        alpha = jax.random.uniform(opacity_key, minval=opacity[0], maxval=opacity[1])
        defective = jnp.where(region[..., None], defective + alpha * (piece - defective), defective)
    return visible(image, defective, min_change)


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
    **paste: Any,
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


def foreign_texture(
    key: Array,
    image: Array,
    *,
    other: Array | None = None,
    part: Array | None = None,
    depth: Range = (0.1, 1.0),
    softness: float = 0.5,
    opacity: Range = (0.2, 1.0),
    brightness: float = 0.5,
    min_change: float = 0.3,
) -> tuple[Array, Array]:
    """Blends in smooth random shapes of another image: turned, shifted, lighter or darker.

    Args:
      key: a PRNG key.
      image: float [h, w, 3] in [0, 1].
      other: where the texture is from.
      part: where the shapes may lie.
      depth: size of the shapes, see `blob`.
      softness: of their edges, see `blob`.
      opacity: smallest and largest.
      brightness: largest relative change of brightness and contrast, either way.
      min_change: see `visible`.
    """
    part = everywhere(image) if part is None else part
    shape_key, turn_key, shift_key, jitter_key, opacity_key = jax.random.split(key, 5)
    piece = rotate(turn_key, image if other is None else other)
    shift = jax.random.randint(shift_key, (2,), 0, jnp.array(image.shape[:2]))
    piece = jitter_color(
        jitter_key,
        jnp.roll(piece, shift, axis=(0, 1)),
        brightness=brightness,
        contrast=brightness,
        saturation=0.5,
        hue=60.0,
    )
    alpha = jax.random.uniform(opacity_key, minval=opacity[0], maxval=opacity[1])
    shapes = blob(shape_key, part, depth=depth, softness=softness)
    return blend(image, piece, alpha * shapes, min_change=min_change)


def scratch(
    key: Array,
    image: Array,
    *,
    other: Array | None = None,  # noqa: ARG001
    part: Array | None = None,
    lines: int = 3,
    length: Range = (0.03, 0.6),
    thickness: Range = (0.006, 0.025),
    amount: Range = (0.3, 3.0),
    min_change: float = 0.3,
) -> tuple[Array, Array]:
    """Draws 1 to `lines` thin bent lines, lighter or darker than the image.

    `length` and `thickness` are those of `curve`, `amount` that of `tint`.
    """
    part = everywhere(image) if part is None else part
    count_key, tint_key, *keys = jax.random.split(key, 2 + lines)
    count = jax.random.randint(count_key, (), 1, lines + 1)
    drawn = jnp.stack([curve(k, part, length=length, thickness=thickness) for k in keys])
    alpha = jnp.max(jnp.where((jnp.arange(lines) < count)[:, None, None], drawn, 0.0), axis=0)
    return blend(image, tint(tint_key, image, amount=amount), alpha, min_change=min_change)


def local_change(
    key: Array,
    image: Array,
    *,
    other: Array | None = None,  # noqa: ARG001
    part: Array | None = None,
    depth: Range = (0.1, 1.5),
    softness: float = 1.0,
    amount: Range = (0.3, 3.0),
    radius: int = 3,
    min_change: float = 0.3,
) -> tuple[Array, Array]:
    """Blurs the image, adds noise to it, or makes it lighter or darker, in smooth random shapes.

    `depth` and `softness` are those of `blob`, `amount` that of `tint` and the least amplitude of
    the noise, `radius` that of `box_blur`.
    """
    part = everywhere(image) if part is None else part
    shape_key, kind_key, noise_key, tint_key, amount_key = jax.random.split(key, 5)
    noise = jax.random.uniform(noise_key, (*image.shape[:2], 1), minval=-1.0)
    noise += jnp.sign(noise)  # no pixel stays as it was
    size = jnp.std(image) * log_uniform(amount_key, *amount)
    changed = [
        box_blur(image, radius=radius),
        jnp.clip(image + size * noise, 0, 1),
        tint(tint_key, image, amount=amount),
    ]
    piece = jnp.stack(changed)[jax.random.randint(kind_key, (), 0, len(changed))]
    shapes = blob(shape_key, part, depth=depth, softness=softness)
    return blend(image, piece, shapes, min_change=min_change)


# Every kind of defect: `config.defects.<name>` holds its options, the tests pick it up from here.
DEFECTS = {
    "cut_and_paste": cut_and_paste,
    "hard_augmentation": hard_augmentation,
    "foreign_texture": foreign_texture,
    "scratch": scratch,
    "local_change": local_change,
}


class Preset(NamedTuple):
    """How often each kind is drawn, relative to the others; whether defects keep to the object."""

    shares: Mapping[str, float]
    on_object: bool


# What `config.defects.preset` may name.
PRESETS = {
    # A bit of all: where the product is not known.
    "default": Preset(
        {"hard_augmentation": 4, "foreign_texture": 2, "scratch": 2, "local_change": 2}, True
    ),
    # Parts with a shape: pieces that are missing, moved or bent, scratches.
    "objects": Preset(
        {"hard_augmentation": 5, "foreign_texture": 2, "scratch": 2, "local_change": 1}, True
    ),
    # Surfaces without a shape: stains, scratches, places with another grain.
    "textures": Preset(
        {"hard_augmentation": 2, "foreign_texture": 3, "scratch": 2, "local_change": 3}, False
    ),
    "paper": Preset({"hard_augmentation": 1}, False),
    "plain": Preset({"cut_and_paste": 1}, False),  # the ablation: no hard augmentation
}

ANYWHERE = 0.1  # share of the images whose defects may lie on the background all the same


def synthesize(
    key: Array,
    image: Array,
    *,
    other: Array | None = None,
    preset: str,
    normal_fraction: float,
    on_object: bool,
    options: Mapping[str, Mapping[str, Any]],
) -> tuple[Array, Array]:
    """Draws a kind of defect from a preset and applies it, or leaves the image as it is.

    Args:
      key: a PRNG key.
      image: float [h, w, 3] in [0, 1].
      other: another good image of that shape; None: the image itself.
      preset: a key of `PRESETS`.
      normal_fraction: probability that the image is left normal and its mask empty.
      on_object: defects of a preset that says so begin on the object, if it lies on a plain
        background (`find_object`), in all but a tenth of the images.
      options: for each kind of defect, its options.

    Returns:
      The image [h, w, 3] and its defect mask [h, w].
    """
    normal_key, kind_key, defect_key, place_key = jax.random.split(key, 4)
    shares = PRESETS[preset].shares
    part = everywhere(image)
    if on_object and PRESETS[preset].on_object:
        part = find_object(image) | jax.random.bernoulli(place_key, ANYWHERE)
    draws = [
        partial(DEFECTS[kind], other=image if other is None else other, part=part, **options[kind])
        for kind in shares
    ]
    kind = jax.random.categorical(kind_key, jnp.log(jnp.array(list(shares.values()))))
    defective, mask = jax.lax.switch(kind, draws, defect_key, image)
    normal = jax.random.bernoulli(normal_key, normal_fraction)
    return jnp.where(normal, image, defective), jnp.where(normal, 0.0, mask)
