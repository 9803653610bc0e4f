"""What the generator remembers of good images: their patches, and the distance to the nearest.

Images are float [b, h, w, c] in [0, 1].
"""

from collections.abc import Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

# Of the patch memories, all chosen by measuring (docs/experiments.md): pixels a side of a patch of
# the image at half its size, or a quarter, and pixels from one patch to the next; the principal
# components that stand for one; how much its place may count; and out of how many, if there are so
# many, one is recalled.
PATCH, STRIDE = 8, 2
COMPONENTS = 32
PLACES = (0.0, 0.5, 1.0, 2.0, 4.0)
CANDIDATES = 48


def halve(images: Array) -> Array:
    """Halves height and width, each pixel the mean of four: [b, h/2, w/2, c]."""
    b, h, w, c = images.shape
    return images.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def describe_patches(images: Array, *, patch: int, stride: int) -> tuple[Array, Array]:
    """Cuts images at half their size into overlapping patches, without their mean and contrast.

    Args:
      images: float [b, h, w, c] in [0, 1].
      patch: pixels a side.
      stride: pixels from one patch to the next.

    Returns:
      Descriptors [b, h / (2 stride), w / (2 stride), patch * patch * c]: pixels minus their mean,
      over their standard deviation plus 0.1, so that a plain patch is not all noise; and the
      coordinates of the patches [rows, columns, 2], from -1 to 1. At the edges the image is
      mirrored.
    """
    x = halve(images)
    h, w = x.shape[1:3]
    before, after = patch // 2 - 1, patch // 2
    x = jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)), mode="reflect")
    # First along the rows, then along the columns: fewer slices than one for each pixel of a patch.
    x = jnp.stack([x[:, :, j : j + w : stride] for j in range(patch)], axis=3)
    x = jnp.stack([x[:, i : i + h : stride] for i in range(patch)], axis=3)
    x = x.reshape(*x.shape[:3], -1)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x / (jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True)) + 0.1)
    rows, columns = (jnp.linspace(-1, 1, n) for n in x.shape[1:3])
    return x, jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1)


def remember_patches(
    key: Array,
    images: Array,
    *,
    size: int,
    coords: bool,
    distinct: bool = False,
    components: int = COMPONENTS,
    patch: int = PATCH,
    stride: int = STRIDE,
) -> dict[str, Array]:
    """Chooses random patches of good images, and what measures distances to them; jit-able.

    Args:
      key: a PRNG key.
      images: good images, float [n, h, w, c] in [0, 1].
      size: how many patches.
      coords: where a patch lies counts as well.
      distinct: no patch is taken twice, so that there may be fewer.
      components: principal components that stand for a descriptor.
      patch: see `describe_patches`.
      stride: likewise.

    Returns:
      `mean` [d] and `basis` [d, components] of the descriptors; `patches` [size, components + 2],
      their principal components and their coordinates times `place`, the descriptors' standard
      deviation (0 without `coords`). Unless `distinct` also `centre` and `spread`, mean and
      standard deviation of the distances of patches that are drawn beside them.
    """
    others = 0 if distinct else 2048  # what distances are measured of
    each = -(-(size + others) // len(images))
    position_key, order_key = jax.random.split(key)

    def some(args: tuple[Array, Array]) -> tuple[Array, Array]:
        key, image = args
        found, places = describe_patches(image[None], patch=patch, stride=stride)
        there = places[..., 0].size
        if distinct:
            chosen = jax.random.permutation(key, there)[:each]
        else:
            chosen = jax.random.randint(key, (each,), 0, there)
        return found.reshape(-1, found.shape[-1])[chosen], places.reshape(-1, 2)[chosen]

    # Image by image: the patches of all of them would take a lot of memory.
    x, places = jax.lax.map(some, (jax.random.split(position_key, len(images)), images))
    x, places = (a.reshape(-1, a.shape[-1]) for a in (x, places))
    order = jax.random.permutation(order_key, len(x))
    x, places = x[order], places[order]
    mean = jnp.mean(x, axis=0)
    variance, basis = jnp.linalg.eigh(jnp.cov(x, rowvar=False))  # from the smallest on
    basis = basis[:, ::-1][:, :components]
    place = coords * jnp.sqrt(jnp.sum(variance))
    x = x - mean
    patches = jnp.concatenate([x @ basis, place * places], axis=-1)[:size]
    memory = {"basis": basis, "patches": patches, "place": place}
    if distinct:
        return memory | {"mean": mean}
    distances = nearest_distance(x[size:], places[size:], **memory)
    return memory | {"mean": mean, "centre": jnp.mean(distances), "spread": jnp.std(distances)}


def nearest_distance(
    x: Array, coords: Array, *, basis: Array, patches: Array, place: Array
) -> Array:
    """Returns the distance of descriptors [..., d] to the nearest of the remembered `patches`.

    `x` are descriptors minus their mean, `coords` [..., 2] where they lie; the others are those of
    `remember_patches`. What the principal components leave over counts in full.
    """
    exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # differences of large numbers
    code = exact(x, basis)
    rest = jnp.sum(x**2, axis=-1) - jnp.sum(code**2, axis=-1)
    coords = jnp.broadcast_to(place * coords, (*code.shape[:-1], 2))
    code = jnp.concatenate([code, coords], axis=-1)
    # As one matrix: on a CPU a third of the time that the minimum over [rows, columns, size] takes.
    products = exact(code.reshape(-1, code.shape[-1]), patches.T)
    squared = jnp.min(jnp.sum(patches**2, axis=-1) - 2 * products, axis=-1).reshape(rest.shape)
    return jnp.sqrt(jnp.maximum(squared + jnp.sum(code**2, axis=-1) + rest, 0.0))


def patch_distances(
    memory: Mapping[str, Array],
    images: Array,
    *,
    patch: int = PATCH,
    stride: int = STRIDE,
    shift: int = 0,
) -> Array:
    """Returns the distance of each patch of the images to the nearest in memory: [b, h/4, w/4].

    With `shift`, of each patch as if it lay so many patches further down and to the right.
    """
    known = {name: memory[name] for name in ("basis", "patches", "place")}

    def of_one(image: Array) -> Array:
        x, coords = describe_patches(image[None], patch=patch, stride=stride)
        coords = jnp.roll(coords, (-shift, -shift), axis=(0, 1))
        return nearest_distance(x[0] - memory["mean"], coords, **known)

    # Image by image: every patch of a batch against all of the memory would be gigabytes.
    return jax.lax.map(of_one, images)


def average_precision(scores: Array, labels: Array) -> Array:
    """Returns the area under the precision-recall curve; `labels` are 1, 0 or -1 (not counted)."""
    labels = labels.ravel()[jnp.argsort(-scores.ravel())]
    hits = jnp.cumsum(labels == 1)
    precision = hits / jnp.maximum(hits + jnp.cumsum(labels == 0), 1)
    return jnp.sum(precision * (labels == 1)) / jnp.maximum(hits[-1], 1)


def weigh_place(memory: dict[str, Array], weight: Array | float) -> dict[str, Array]:
    """Returns a memory of `remember_patches` in which place counts `weight` times as much."""
    patches = memory["patches"].at[:, -2:].multiply(weight)
    return memory | {"patches": patches, "place": weight * memory["place"]}


def thin_out(memory: dict[str, Array], size: int) -> dict[str, Array]:
    """Returns a memory of those `size` of its patches that leave none of the others far from them.

    Each is the one that is farthest from those chosen so far: the greedy coreset of PatchCore (Roth
    et al., arXiv 2106.08265). Most patches of a part on a plain background are that background;
    drawn at random they would fill the memory.
    """
    patches = memory["patches"]

    norms = jnp.sum(patches**2, axis=-1)

    def choose(i: Array, args: tuple[Array, Array]) -> tuple[Array, Array]:
        squared, chosen = args
        farthest = jnp.argmax(squared)
        # By the norms and a product: on a CPU less than half the time that the differences take.
        products = jnp.matmul(patches, patches[farthest], precision=jax.lax.Precision.HIGHEST)
        squared = jnp.minimum(squared, norms + norms[farthest] - 2 * products)
        return squared, chosen.at[i].set(patches[farthest])

    start = jnp.full(len(patches), jnp.inf), jnp.zeros((size, patches.shape[1]))
    return memory | {"patches": jax.lax.fori_loop(0, size, choose, start)[1]}


def calibrate(memory: dict[str, Array], good: Array) -> dict[str, Array]:
    """Returns the memory with `centre` and `spread` of all patches of images that it is not of."""
    distances = patch_distances(memory, good)
    return memory | {"centre": jnp.mean(distances), "spread": jnp.std(distances)}


def choose_place(memory: dict[str, Array], good: Array, defective: Array, masks: Array) -> Array:
    """Chooses how much the place of a patch counts: a lot where all parts lie alike, else less.

    The weight of PLACES with the largest product of two average precisions of the distances: of
    synthetic defects, and of good patches that are said to lie an eighth of the image's size from
    where they do, among good ones that are not.

    Args:
      memory: of `remember_patches`, with coords.
      good: good images that the memory is not of, float [n, h, w, c] in [0, 1].
      defective: the same with synthetic defects.
      masks: their defect masks [n, h, w].

    Returns:
      The weight, for `weigh_place`.
    """
    n, h, w = masks.shape
    cell = 2 * STRIDE
    share = masks.reshape(n, h // cell, cell, w // cell, cell).mean(axis=(2, 4))
    labels = jnp.where(share >= 0.25, 1, jnp.where(share > 0, -1, 0))

    def find(weight: Array) -> Array:
        known = weigh_place(memory, weight)
        usual = patch_distances(known, good)
        moved = patch_distances(known, good, shift=-(-usual.shape[1] // 8))
        which = jnp.concatenate([jnp.zeros_like(usual), jnp.ones_like(moved)])
        misplaced = average_precision(jnp.concatenate([usual, moved]), which)
        return misplaced * average_precision(patch_distances(known, defective), labels)

    weights = jnp.array(PLACES)
    return weights[jnp.argmax(jax.lax.map(find, weights))]


class PatchMemory(nn.Module):
    """How far each patch of an image is from the nearest of the good patches that it remembers.

    What has no counterpart among good parts stands out without having been seen as a synthetic
    defect. The patches are parameters that are set when the module is initialised, from the images
    it is initialised with, and that no gradient changes; `train.create_parts` sets those that are
    recalled anew.
    """

    size: int
    coords: bool = True
    components: int = COMPONENTS
    patch: int = PATCH
    stride: int = STRIDE

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps images [b, h, w, c] to distances [b, h/4, w/4] in float32.

        In standard deviations above the mean of good patches, from -3 to 10.
        """
        cut = {"patch": self.patch, "stride": self.stride}
        remember = partial(
            remember_patches,
            size=self.size,
            components=self.components,
            coords=self.coords,
            **cut,
        )
        memory = jax.lax.stop_gradient(self.param("memory", remember, images))
        distances = patch_distances(memory, images, **cut)
        return jnp.clip((distances - memory["centre"]) / (memory["spread"] + 1e-6), -3, 10)
