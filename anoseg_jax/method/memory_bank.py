"""Memory bank: patches of good images, and the distance of any patch to the nearest of them.

The coreset of PatchCore (Roth et al., arXiv 2106.08265), of raw pixels instead of pretrained
features: what has no counterpart among good parts stands out, also if no synthetic defect looks
like it. Images are float [b, h, w, 3] in [0, 1] unless stated otherwise. An image's id is its
position in the sorted list of all good training images (`images.batches`): in training the
distances are leave-one-out, because an image has no unusual patches where it is in the bank itself.

The bank is built once a category, on the host where that is faster than compiling.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from threadpoolctl import threadpool_limits

CLIP = (-3.0, 10.0)  # of standardized distances: one patch must not outweigh all others
MAX_EXPOSURE = 2.0  # images are made brighter or darker by at most this factor
# Differences of large numbers: products in float32, also where the default is TF32 or bfloat16.
_exact_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class PatchGrid(NamedTuple):
    """How images are cut into patches, in pixels of the half-size image: hashable.

    Attributes:
      patch: side of a patch.
      stride: distance from one patch to the next.
    """

    patch: int
    stride: int


@flax.struct.dataclass
class PatchBank:
    """Coreset of good patches at one scale, with what is needed to measure distances to it.

    Attributes:
      mean: of the descriptors, [d].
      basis: their first principal components, [d, k].
      patches: the coreset, [size, k + 2]: principal components, then scaled position.
      patch_image_ids: the image that each patch is from, int32 [size].
      position_scale: factor of the positions, which are from -1 to 1; 0 where they do not count.
      distance_mean: mean distance of patches of good images that are not in the bank.
      distance_std: standard deviation of these distances.
    """

    mean: Array
    basis: Array
    patches: Array
    patch_image_ids: Array
    position_scale: Array
    distance_mean: Array
    distance_std: Array


@flax.struct.dataclass
class MemoryBank:
    """Patches at two scales, and the brightness that images are scaled to before they are compared.

    Attributes:
      fine: patches at half the image's size.
      coarse: patches at a quarter.
      brightness: mean of all good images that are trained on, float32 in [0, 1].
    """

    fine: PatchBank
    coarse: PatchBank
    brightness: Array


def from_dicts(saved: Mapping[str, Any] | None) -> MemoryBank | None:
    """Returns the bank of a checkpoint's nested dicts; None if it has none."""
    return saved and MemoryBank(
        fine=PatchBank(**saved["fine"]),
        coarse=PatchBank(**saved["coarse"]),
        brightness=saved["brightness"],
    )


def template(options: Mapping[str, Any], channels: int = 3) -> MemoryBank:
    """Returns the shapes and dtypes of a bank with these options (`config.memory_bank`)."""
    size, components = options["size"], options["components"]
    descriptor = options["patch"] ** 2 * channels
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    scale = PatchBank(
        mean=shape(descriptor),
        basis=shape(descriptor, components),
        patches=shape(size, components + 2),
        patch_image_ids=jax.ShapeDtypeStruct((size,), jnp.int32),
        position_scale=shape(),
        distance_mean=shape(),
        distance_std=shape(),
    )
    return MemoryBank(fine=scale, coarse=scale, brightness=shape())


def match_brightness(images: Array, brightness: Array) -> Array:
    """Scales each image [b, h, w, 3] so that its mean is `brightness`, then clips to [0, 1].

    Photographs of one part differ in exposure, which is no defect. The factor is at most
    MAX_EXPOSURE, at least its reciprocal.
    """
    means = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    factors = brightness / jnp.maximum(means, 1e-6)
    return jnp.clip(images * jnp.clip(factors, 1 / MAX_EXPOSURE, MAX_EXPOSURE), 0, 1)


def to_float(images: Array, brightness: Array | None) -> Array:
    """Returns uint8 images as float32 in [0, 1], scaled to `brightness` unless it is None."""
    images = images.astype(jnp.float32) / 255
    return images if brightness is None else match_brightness(images, brightness)


def halve(images: Array) -> Array:
    """Halves height and width, each pixel the mean of four: [b, h/2, w/2, c]."""
    b, h, w, c = images.shape
    return images.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def embed_patches(images: Array, grid: PatchGrid) -> tuple[Array, Array]:
    """Returns descriptors of the overlapping patches of half-size images, and their positions.

    A descriptor is a patch's pixels minus their mean, over their standard deviation plus 0.1, so
    that noise in a plain patch counts little. At the edges the image is mirrored.

    Returns:
      Descriptors [b, h / (2 stride), w / (2 stride), d], where d = patch * patch * c, and positions
      [rows, columns, 2], each from -1 to 1.
    """
    x = halve(images)
    h, w = x.shape[1:3]
    before, after = (grid.patch - 1) // 2, grid.patch // 2
    x = jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)), mode="reflect")
    # Along the rows, then along the columns: fewer slices than one for each pixel of a patch.
    x = jnp.stack([x[:, :, j : j + w : grid.stride] for j in range(grid.patch)], axis=3)
    x = jnp.stack([x[:, i : i + h : grid.stride] for i in range(grid.patch)], axis=3)
    x = x.reshape(*x.shape[:3], -1)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x / (jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True)) + 0.1)
    rows, columns = (jnp.linspace(-1, 1, n) for n in x.shape[1:3])
    return x, jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1)


def _project(bank: PatchBank, x: Array) -> tuple[Array, Array]:
    """Returns the principal components of descriptors, [n, k], and their squared residuals, [n]."""
    x = x - bank.mean
    code = _exact_matmul(x, bank.basis)
    return code, jnp.sum(x**2, axis=-1) - jnp.sum(code**2, axis=-1)


def distances(
    bank: PatchBank, images: Array, image_ids: Array | None = None, *, grid: PatchGrid
) -> Array:
    """Returns the distance of each patch to the nearest in the bank: [b, rows, columns].

    With `image_ids` [b], to the nearest patch of any other image (leave-one-out); if all of the
    bank is of that image, nothing is left out.
    """
    image_ids = jnp.full(images.shape[0], -1) if image_ids is None else image_ids  # -1: no image's

    def distances_of_image(args: tuple[Array, Array]) -> Array:
        image, image_id = args
        x, positions = embed_patches(image[None], grid)
        code, rest = _project(bank, x[0].reshape(-1, x.shape[-1]))
        code = jnp.concatenate([code, bank.position_scale * positions.reshape(-1, 2)], axis=-1)
        same_image = bank.patch_image_ids == image_id
        left_out = same_image & ~jnp.all(same_image)
        norms = jnp.where(left_out, jnp.inf, jnp.sum(bank.patches**2, axis=-1))
        nearest = jnp.min(norms - 2 * _exact_matmul(code, bank.patches.T), axis=-1)
        squared = nearest + jnp.sum(code**2, axis=-1) + rest
        return jnp.sqrt(jnp.maximum(squared, 0.0)).reshape(x.shape[1:3])

    # Image by image: all patches of a batch against all of the bank would be gigabytes.
    return jax.lax.map(distances_of_image, (images, image_ids))


def mean_over_patches(distances: Array, grid: PatchGrid) -> Array:
    """Returns the mean distance of all patches that contain a pixel: [b, rows, columns], as given.

    A patch that only touches a defect is unusual, too: the distances themselves draw a defect wider
    than it is, by half a patch on each side.
    """
    cells = max(1, grid.patch // grid.stride)
    # Patch i begins (patch - 1) // 2 pixels before pixel i, see embed_patches.
    offsets = np.arange(cells) - cells // 2
    for axis in (1, 2):
        size = distances.shape[axis]
        nearby = np.clip(np.arange(size)[:, None] + offsets, 0, size - 1)
        distances = jnp.take(distances, nearby, axis=axis).mean(axis=axis + 1)
    return distances


def standardized_distances(
    bank: PatchBank, images: Array, image_ids: Array | None = None, *, grid: PatchGrid
) -> Array:
    """Returns `distances` in standard deviations from the mean of good patches: [b, rows, columns].

    They are clipped to CLIP, then `mean_over_patches`.
    """
    raw = distances(bank, images, image_ids, grid=grid)
    standardized = jnp.clip((raw - bank.distance_mean) / (bank.distance_std + 1e-6), *CLIP)
    return mean_over_patches(standardized, grid)


def bank_distances(
    bank: MemoryBank, images: Array, image_ids: Array | None = None, *, grid: PatchGrid
) -> Array:
    """Returns the `standardized_distances` to both scales: [b, rows, columns, 2].

    The fine scale's, and the coarse scale's enlarged to them.
    """
    fine = standardized_distances(bank.fine, images, image_ids, grid=grid)
    coarse = standardized_distances(bank.coarse, halve(images), image_ids, grid=grid)
    return jnp.stack([fine, jax.image.resize(coarse, fine.shape, "bilinear")], axis=-1)


def split_bank_images(
    image_ids: np.ndarray, *, num_images: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits images into those of the bank and those that calibrate it; returns their positions.

    The seed draws the split; equal images are on one side, a single image on both. Then they are
    repeated or thinned out to three quarters and one quarter of `num_images`.
    """
    unique = np.unique(image_ids, return_index=True)[1]
    order = np.random.default_rng([seed, 0, 2]).permutation(unique)
    num_calibration = max(1, len(order) // 4) if len(order) > 1 else 0
    sides = order[num_calibration:], order[: max(1, num_calibration)]
    counts = num_images - num_images // 4, num_images // 4
    return tuple(
        side[np.arange(count) * len(side) // count]
        for side, count in zip(sides, counts, strict=True)
    )


@partial(jax.jit, static_argnames=("grid", "components", "halvings"))
def _embed_candidates(
    images: Array,
    chosen: Array,
    brightness: Array,
    *,
    grid: PatchGrid,
    components: int,
    halvings: int,
) -> tuple[Array, ...]:
    """Returns mean, basis and total variance of chosen descriptors, their codes and positions.

    `images` are uint8 [n, h, w, c], `chosen` int [n, k] patches of each. Codes are [n * k,
    components], positions [n * k, 2].
    """

    def embed_chosen(args: tuple[Array, Array]) -> tuple[Array, Array]:
        image, index = args
        image = to_float(image[None], brightness)
        for _ in range(halvings):
            image = halve(image)
        x, positions = embed_patches(image, grid)
        return x.reshape(-1, x.shape[-1])[index], positions.reshape(-1, 2)[index]

    x, positions = jax.lax.map(embed_chosen, (images, chosen))
    x, positions = (a.reshape(-1, a.shape[-1]) for a in (x, positions))
    mean = jnp.mean(x, axis=0)
    x = x - mean
    covariance = _exact_matmul(x.T, x) / (len(x) - 1)
    variance, basis = jnp.linalg.eigh(covariance)  # ascending
    basis = basis[:, ::-1][:, :components]
    return mean, basis, jnp.sum(variance), _exact_matmul(x, basis), positions


def k_center_greedy(patches: np.ndarray, size: int, *, block: int = 2048) -> np.ndarray:
    """Returns the indices of a greedy k-center coreset of float32 patches [n, k]: int [size].

    The first patch, then always the one that is farthest from all chosen so far (PatchCore, Roth et
    al., arXiv 2106.08265, algorithm 1). If there are fewer than `size` distinct patches, some are
    chosen again.

    It is exact, in blocks: distances only shrink, so that an old distance is an upper bound. The
    `block` patches with the largest bounds are kept up to date for as long as the farthest of them
    is at least as far as every other patch's bound; then one matrix product updates all.
    """
    norms = np.einsum("ij,ij->i", patches, patches)
    chosen = [0]
    bounds = norms + norms[0] - 2 * patches @ patches[0]
    while len(chosen) < size:
        if len(patches) > block:
            order = np.argpartition(-bounds, block)
            rows, outside = np.sort(order[:block]), bounds[order[block]]
        else:
            rows, outside = np.arange(len(patches)), -np.inf
        inside, inside_norms, squared = patches[rows], norms[rows], bounds[rows]
        first_new = len(chosen)
        while len(chosen) < size:
            farthest = np.argmax(squared)
            if squared[farthest] < outside:
                break
            chosen.append(rows[farthest])
            products = inside @ inside[farthest]
            update = inside_norms + inside_norms[farthest] - 2 * products
            squared = np.minimum(squared, update)
        new = chosen[first_new:]
        for start in range(0, len(patches), block):  # in blocks, which stay in the cache
            rows = slice(start, start + block)
            squared = norms[rows, None] + norms[new] - 2 * patches[rows] @ patches[new].T
            bounds[rows] = np.minimum(bounds[rows], squared.min(axis=1))
    return np.array(chosen)


_jitted_distances = jax.jit(distances, static_argnames="grid")


def build(
    images: np.ndarray, image_ids: np.ndarray, *, seed: int, options: Mapping[str, Any]
) -> MemoryBank:
    """Builds the memory bank; train.py broadcasts it, as last bits can differ between CPUs.

    Args:
      images: good images that are trained on, without augmentation: it blurs them, and those to be
        judged are not blurred. uint8 [n, h, w, 3].
      image_ids: int32 [n].
      seed: of the split and of the candidates.
      options: `config.memory_bank`.
    """
    grid = PatchGrid(options["patch"], options["stride"])
    in_bank, in_calibration = split_bank_images(
        image_ids, num_images=options["num_bank_images"], seed=seed
    )
    distinct = np.unique(image_ids, return_index=True)[1]
    brightness = np.float32(images.mean(axis=(1, 2, 3))[distinct].mean() / 255)
    calibration = jax.jit(to_float)(images[in_calibration], brightness)
    scales = []
    for halvings in (0, 1):
        rng = np.random.default_rng([seed, 0, 3 + halvings])
        bank = _candidates(
            rng, images[in_bank], image_ids[in_bank], brightness, options, halvings=halvings
        )
        with threadpool_limits(1):  # thousands of small products: threads would wait for each other
            chosen = k_center_greedy(bank.patches, options["size"])
        bank = bank.replace(
            patches=bank.patches[chosen], patch_image_ids=bank.patch_image_ids[chosen]
        )
        scaled = jax.jit(halve)(calibration) if halvings else calibration
        others = scaled if len(np.unique(image_ids)) > 1 else None
        scales.append(_calibrate(bank, others, grid=grid))
    return MemoryBank(*scales, brightness=brightness)


def _candidates(
    rng: np.random.Generator,
    images: np.ndarray,
    image_ids: np.ndarray,
    brightness: np.float32,
    options: Mapping[str, Any],
    *,
    halvings: int,
) -> PatchBank:
    """Returns a bank of all candidates for the coreset: random patches, none drawn twice.

    Positions of weight 1 count as much as all of a descriptor varies.
    """
    cell = 2 * options["stride"] * 2**halvings
    num_patches = (images.shape[1] // cell) * (images.shape[2] // cell)
    each = min(num_patches, -(-options["size"] * options["candidates_per_patch"] // len(images)))
    positions = np.tile(np.arange(num_patches, dtype=np.int32), (len(images), 1))
    mean, basis, variance, codes, positions = map(
        np.asarray,
        _embed_candidates(
            images,
            rng.permuted(positions, axis=1)[:, :each],
            brightness,
            grid=PatchGrid(options["patch"], options["stride"]),
            components=options["components"],
            halvings=halvings,
        ),
    )
    position_scale = np.float32(options["position_weight"] * np.sqrt(variance))
    return PatchBank(
        mean=mean,
        basis=basis,
        patches=np.concatenate([codes, position_scale * positions], axis=-1),
        patch_image_ids=np.repeat(image_ids, each),
        position_scale=position_scale,
        distance_mean=np.float32(0),
        distance_std=np.float32(1),
    )


def _calibrate(bank: PatchBank, images: Array | None, *, grid: PatchGrid) -> PatchBank:
    """Returns the bank with mean and standard deviation of the distances of images not in it.

    Without images, of the bank's patches to each other (leave-one-out).
    """
    if images is not None:
        nearest = np.asarray(_jitted_distances(bank, images, grid=grid))
    else:
        patches = np.unique(bank.patches, axis=0).astype(np.float64)
        norms = np.sum(patches**2, axis=-1)
        squared = norms[:, None] + norms - 2 * patches @ patches.T
        np.fill_diagonal(squared, np.inf if len(patches) > 1 else 0)
        nearest = np.sqrt(np.maximum(squared.min(axis=-1), 0))
    return bank.replace(
        distance_mean=np.float32(nearest.mean()), distance_std=np.float32(nearest.std())
    )
