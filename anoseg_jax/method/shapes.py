"""Random shapes and changes of colour for synthetic defects.

One image at a time, float [h, w, 3] in [0, 1]; regions are bool [h, w]. Functions take `uniforms`,
random numbers in [0, 1), instead of a key: a defect takes all its numbers from one `draw`, because
each draw is a loop that compiles slowly.
"""

import math
from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Float = Array | float
Range = Array | tuple[float, float]  # smallest and largest, [2]


def draw(key: Array, image: Array, *shapes: tuple[int, ...]) -> list[Array]:
    """Returns an array of random numbers in [0, 1) for each shape, all from one draw."""
    # Each draw is a loop that takes 0.1 s to compile on a CPU. All kinds of defects draw one size,
    # more than most need: they share a key in `synthesize`, and XLA merges equal draws into one.
    sizes = [math.prod(shape) for shape in shapes]
    drawn = max(image.shape[0] * image.shape[1] + 4096, sum(sizes))
    offsets = np.cumsum([*sizes, drawn - sum(sizes)])
    uniforms = jnp.split(jax.random.uniform(key, (drawn,)), offsets[:-1])
    return [numbers.reshape(shape) for numbers, shape in zip(uniforms, shapes, strict=False)]


def integer(uniform: Array, limit: int) -> Array:
    """Returns an integer from 0 to `limit` - 1, all equally likely."""
    return (uniform * limit).astype(int)


def between(uniform: Array, bounds: Range) -> Array:
    """Returns a number between the bounds, drawn evenly."""
    return bounds[0] + (bounds[1] - bounds[0]) * uniform


def log_uniform(uniform: Array, bounds: Range) -> Array:
    """Returns a number between the bounds, drawn evenly on a logarithmic scale."""
    return bounds[0] * (bounds[1] / bounds[0]) ** uniform


def pick(uniform: Array, allowed_region: Array) -> Array:
    """Returns (row, column) of a pixel's centre, drawn evenly from a region [h, w] (bool)."""
    # Counts of the region's pixels: up to the end of each row, then within the chosen row.
    ends = jnp.cumsum(jnp.sum(allowed_region, axis=1))
    target = uniform * ends[-1]
    row = jnp.sum(ends <= target)
    target -= jnp.max(jnp.where(ends <= target, ends, 0))
    column = jnp.sum(jnp.cumsum(jnp.take(allowed_region, row, axis=0, mode="clip")) <= target)
    return jnp.stack([row, column]) + 0.5


@jax.jit  # one function in the traced program instead of eight copies
def standard_deviation(image: Array) -> Array:
    """Returns the standard deviation of all values of an image, with fewer operations."""
    return jnp.sqrt(jnp.mean(jnp.square(image - jnp.mean(image))))


def local_contrast(image: Array) -> Array:
    """Returns the standard deviation of each pixel's surroundings, [h, w]: the largest channel's.

    The surroundings are a square of a twelfth of the image's height a side.
    """
    radius = max(2, image.shape[0] // 24)
    squared = jnp.square(image - box_blur(image, radius=radius))
    return jnp.sqrt(channel_max(box_blur(squared, radius=radius)))


# Lower limit of a contrast that changes are measured in: on a plain surface, camera noise is not a
# measure of what is visible.
CONTRAST_FLOOR = 0.03


def contrast_within(image: Array, shapes: Array) -> Array:
    """Returns the mean of `local_contrast` over shapes, weighted by their opacity [h, w]."""
    contrast = jnp.maximum(local_contrast(image), CONTRAST_FLOOR)
    return jnp.sum(contrast * shapes) / (jnp.sum(shapes) + 1e-6)


def is_grey(image: Array) -> Array:
    """Returns whether all channels are equal, a bool scalar."""
    return jnp.all(image == image[..., :1])


def channel_max(image: Array) -> Array:
    """Returns the largest value of each pixel, [h, w]; faster than jnp.max over few channels."""
    return reduce(jnp.maximum, jnp.unstack(image, axis=-1))


def take_pixels(image: Array, index: Array) -> Array:
    """Returns the pixels [h, w, c] with the flat indices [h, w]."""
    # Far fewer operations than indexing by row and column, than jnp.roll and than jnp.rot90.
    return jnp.take(image.reshape(-1, image.shape[-1]), index, axis=0, mode="clip")


def box_blur(image: Array, *, radius: int) -> Array:
    """Returns means over squares of 2 * radius + 1 pixels a side; the edge is repeated outwards."""
    width = 2 * radius + 1
    rows, columns = (np.clip(np.arange(-radius, n + radius), 0, n - 1) for n in image.shape[:2])
    image = take_pixels(image, rows[:, None] * image.shape[1] + columns)
    for window in ((width, 1, 1), (1, width, 1)):
        image = jax.lax.reduce_window(image, 0.0, jax.lax.add, window, (1, 1, 1), "VALID")
    return image / width**2


def find_object(image: Array) -> Array:
    """Returns the mask [h, w] (bool) of an object on a plain background; otherwise all True.

    The background's colour is the median of the image's border. It is plain if nine tenths of the
    border have that colour, within 0.7 standard deviations of the image in every channel. The
    object is everything that differs by more, with a margin of 3 pixels; if that is less than 2 %
    of the image, the estimate is not trusted.
    """
    border = jnp.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    # The median, of an even number of pixels. jnp.median compiles to far more operations.
    color = jnp.mean(jax.lax.top_k(border.T, len(border) // 2 + 1)[0][:, -2:], axis=1)
    bound = 0.7 * standard_deviation(image)
    plain = jnp.mean(channel_max(jnp.abs(border - color)) <= bound) >= 0.9
    differs = channel_max(jnp.abs(image - color)) > bound
    trusted = plain & (jnp.mean(differs) >= 0.02)
    # A tenth of the square, so that single noisy pixels of the background stay background.
    return (box_blur(differs[..., None] * 1.0, radius=3)[..., 0] > 0.1) | ~trusted


def rotate(uniform: Array, image: Array) -> Array:
    """Rotates a square image by 90, 180 or 270 degrees, any other image by 180 degrees."""
    if image.shape[0] != image.shape[1]:
        return image[::-1, ::-1]
    turns = 1 + integer(uniform, 3)
    ahead = jnp.arange(image.shape[0])
    rows = jnp.where(turns < 3, ahead[::-1], ahead)
    columns = jnp.where(turns > 1, ahead[::-1], ahead)
    across, along = jnp.where(turns == 2, len(ahead), 1), jnp.where(turns == 2, 1, len(ahead))
    return take_pixels(image, rows[:, None] * across + columns * along)


def roll(uniforms: Array, image: Array) -> Array:
    """Shifts an image cyclically by a random number of rows and columns; takes two uniforms."""
    h, w, _ = image.shape
    rows = jax.lax.rem(jnp.arange(h) + integer(uniforms[0], h), h)
    columns = jax.lax.rem(jnp.arange(w) + integer(uniforms[1], w), w)
    return take_pixels(image, rows[:, None] * w + columns)


def permute(uniforms: Array, image: Array, *, grid: int) -> Array:
    """Cuts the image into grid x grid patches and shuffles them; takes grid * grid uniforms.

    Where the grid does not divide the image, the remaining rows and columns are not moved.
    """
    h, w, c = image.shape
    rows, columns = h // grid, w // grid
    core = image[: rows * grid, : columns * grid]
    patches = core.reshape(grid, rows, grid, columns, c).transpose(0, 2, 1, 3, 4)
    patches = patches.reshape(grid * grid, rows, columns, c)
    patches = jnp.take(patches, jnp.argsort(uniforms), axis=0, mode="clip")
    patches = patches.reshape(grid, grid, rows, columns, c).transpose(0, 2, 1, 3, 4)
    return jax.lax.dynamic_update_slice(image, patches.reshape(core.shape), (0, 0, 0))


def jitter_color(uniforms: Array, image: Array, strength: Sequence[Float]) -> Array:
    """Changes brightness, contrast, saturation and hue; a grey image stays grey.

    Takes four uniforms. `strength` is the largest relative change in both directions of the first
    three, then the largest rotation about the grey axis, in degrees.
    """
    change = jnp.stack(strength) * (2 * uniforms - 1)
    brightness, contrast, saturation = 1 + change[:3]
    angle = jnp.deg2rad(change[3])
    # Rodrigues' rotation about (1, 1, 1), the grey axis. The grey value is kept, the chroma scaled:
    # each channel becomes a weighted mean of itself and the channels before and after it.
    cos, sin = saturation * jnp.cos(angle), saturation * jnp.sin(angle) / math.sqrt(3)
    colors = (
        (1 + 2 * cos) / 3 * image
        + ((1 - cos) / 3 + sin) * jnp.roll(image, 1, axis=-1)
        + ((1 - cos) / 3 - sin) * jnp.roll(image, -1, axis=-1)
    )
    mean = jnp.mean(image)
    return jnp.clip(brightness * (mean + contrast * (colors - mean)), 0, 1)


def tint(uniforms: Array, image: Array, contrast: Array, *, amount: Range) -> Array:
    """Makes the image lighter or darker, by `amount` times `contrast` (log-uniform).

    Takes five uniforms. The colour of an image that is not grey also changes.
    """
    sign = jnp.where(uniforms[0] < 0.5, 1.0, -1.0)
    color = jnp.where(is_grey(image), 0.0, 2 * uniforms[2:] - 1)
    size = contrast * log_uniform(uniforms[1], amount)
    return jnp.clip(image + size * (sign + color), 0, 1)


def rectangle(uniforms: Array, allowed_region: Array, *, area: Range, aspect: Float) -> Array:
    """Returns the mask [h, w] (bool) of a rectangle at any angle, with its centre in a region.

    Takes four uniforms. `area` is the smallest and largest, as fractions of the image; `aspect` is
    the largest ratio of the sides, large values make thin strips. Both are drawn log-uniformly.
    """
    h, w = allowed_region.shape
    center = pick(uniforms[0], allowed_region)
    pixels = h * w * log_uniform(uniforms[1], area)
    # At least two pixels thick: thinner ones would fall between the pixels.
    breadth = jnp.maximum(jnp.sqrt(pixels / log_uniform(uniforms[2], (1.0, aspect))), 2.0)
    length = pixels / breadth
    angle = jnp.pi * uniforms[3]
    rows = jnp.arange(h)[:, None] + 0.5 - center[0]
    columns = jnp.arange(w)[None, :] + 0.5 - center[1]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    along, across = cos * columns + sin * rows, cos * rows - sin * columns
    return (jnp.abs(along) <= length / 2) & (jnp.abs(across) <= breadth / 2)


def cubic_weights(size: int, cells: int) -> np.ndarray:
    """Returns the matrix [size, cells] that enlarges `cells` values to `size` ones, bicubically."""
    # Keys' kernel with a = -1/2, as in jax.image.resize, whose weights would be compiled.
    x = np.abs((np.arange(size)[:, None] + 0.5) * cells / size - 0.5 - np.arange(cells))
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


OCTAVES = (4, 8, 16, 32)  # cells a side of the grids of smooth noise
NOISE_NUMBERS = 1 + sum(OCTAVES) ** 2


def smooth_noise(uniforms: Array, size: tuple[int, int]) -> Array:
    """Returns multi-scale noise [h, w] of mean 0 and standard deviation 1.

    Takes `NOISE_NUMBERS` uniforms. Grids of normal noise, `OCTAVES` cells a side, are enlarged
    bicubically and added. Each finer grid has less weight, by a random factor: some fields are
    smooth, others ragged.
    """
    # All grids in one block-diagonal matrix [cells, cells]: two products instead of eight.
    octave = np.repeat(np.arange(len(OCTAVES)), OCTAVES)
    weight = jnp.where(octave[:, None] == octave, between(uniforms[0], (0.3, 0.8)) ** octave, 0)
    # Normal noise, up to a factor. The uniforms are multiples of 2**-23: half a step more keeps
    # the noise symmetric and finite.
    normal = jax.lax.erf_inv(2 * uniforms[1:] - (1 - 2**-23)).reshape(weight.shape)
    rows, columns = (
        np.concatenate([cubic_weights(pixels, cells) for cells in OCTAVES], axis=1)
        for pixels in size
    )
    field = rows @ (weight * normal) @ columns.T
    field -= jnp.mean(field)
    return field / standard_deviation(field)


def sample(image: Array, rows: Array, columns: Array) -> Array:
    """Returns the pixels at fractional positions [h, w], by bilinear interpolation: [h, w, c].

    Positions outside the image take the nearest pixel of the edge.
    """
    h, w, _ = image.shape
    rows, columns = jnp.clip(rows, 0, h - 1), jnp.clip(columns, 0, w - 1)
    top, left = rows.astype(int), columns.astype(int)  # rounds down: none is negative
    bottom, right = jnp.minimum(top + 1, h - 1), jnp.minimum(left + 1, w - 1)
    down, across = (rows - top)[..., None], (columns - left)[..., None]
    at = lambda row, column: take_pixels(image, row * w + column)  # noqa: E731
    upper = at(top, left) * (1 - across) + at(top, right) * across
    lower = at(bottom, left) * (1 - across) + at(bottom, right) * across
    return upper * (1 - down) + lower * down


BLOB_NUMBERS = 2 + NOISE_NUMBERS


def blob(uniforms: Array, allowed_region: Array, *, depth: Range, softness: Float) -> Array:
    """Returns the opacity [h, w] in [0, 1] of smooth random shapes within a region [h, w].

    Smooth noise, cut off at `depth` below its highest point in the region: from a few pixels around
    that point to many islands. Takes `BLOB_NUMBERS` uniforms. `depth` is the smallest and largest,
    in standard deviations of the noise, drawn log-uniformly. The edges' softness is drawn evenly
    from 0 (hard) to `softness`, at most 1 (opaque at the highest point alone).
    """
    field = smooth_noise(uniforms[2:], allowed_region.shape)
    field = jnp.where(allowed_region, field, -jnp.inf)
    below = log_uniform(uniforms[0], depth)
    edge = below * jnp.maximum(softness * uniforms[1], 0.01)
    return jnp.clip((field - jnp.max(field) + below) / edge, 0, 1)
