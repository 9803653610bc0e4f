"""Generator, discriminator and detector of AnoSeg as pure functions of their variables.

Images are float [b, h, w, 3] in [0, 1]; anomaly maps are float [b, h, w], 1 = anomalous. Layer
tables are this project's own choice: the paper's are not known to it (docs/method.md).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

Dtype = Any


def add_coords(images: Array) -> Array:
    """Appends the two coordinate channels (row, column), each from -1 to 1: [b, h, w, c + 2].

    The third part of the method (arXiv 2110.03396): a convolution cannot know where it is.
    """
    b, h, w, _ = images.shape
    rows = jnp.broadcast_to(jnp.linspace(-1, 1, h, dtype=images.dtype)[:, None], (h, w))
    columns = jnp.broadcast_to(jnp.linspace(-1, 1, w, dtype=images.dtype)[None, :], (h, w))
    coords = jnp.broadcast_to(jnp.stack([rows, columns], axis=-1), (b, h, w, 2))
    return jnp.concatenate([images, coords], axis=-1)


def space_to_depth(x: Array, block: int = 2) -> Array:
    """Folds each block x block square of pixels into channels: [b, h/n, w/n, c * n * n]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // block, block, w // block, block, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // block, w // block, block * block * c)


def depth_to_space(x: Array, block: int = 2) -> Array:
    """Inverse of `space_to_depth`: [b, h * n, w * n, c / (n * n)]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, block, block, c // (block * block))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * block, w * block, c // (block * block))


def upsample(x: Array) -> Array:
    """Doubles height and width, nearest neighbour: [b, 2 h, 2 w, c]."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def at_least_float32(dtype: Any) -> Any:
    """Returns float32 for bfloat16, and what is as wide or wider as it is."""
    return jnp.promote_types(dtype, jnp.float32)


class ConvBlock(nn.Module):
    """3x3 convolution, GroupNorm, leaky ReLU."""

    features: int
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [b, h, w, c] to [b, h / stride, w / stride, features]."""
        x = nn.Conv(
            self.features,
            (3, 3),
            strides=self.stride,
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
        )(x)
        # GroupNorm, not BatchNorm: an image's result depends on nothing else in its batch, so it
        # is the same on any number of devices.
        x = nn.GroupNorm(num_groups=8, dtype=self.dtype)(x)
        return nn.leaky_relu(x, 0.1)


class Reconstructor(nn.Module):
    """Draws the part as it should look, through a bottleneck without skip connections.

    Nothing but `latent` numbers for each cell of 2**depth x 2**depth pixels reaches the decoder: it
    cannot copy what it has never seen.
    """

    width: int
    depth: int
    latent: int
    dtype: Dtype = jnp.float32
    outputs: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [b, h, w, c] to [b, h, w, outputs] around 0.5, in float32, not clipped."""
        x = space_to_depth(x.astype(self.dtype))  # [b, h/2, w/2, 4c]
        widths = [self.width * min(2**level, 8) for level in range(self.depth)]
        x = ConvBlock(widths[0], dtype=self.dtype)(x)
        for features in widths[1:]:
            x = ConvBlock(features, stride=2, dtype=self.dtype)(x)
        x = nn.Conv(self.latent, (1, 1), dtype=self.dtype)(x)  # [b, h/2**depth, w/2**depth, latent]
        x = ConvBlock(widths[-1], dtype=self.dtype)(x)
        for features in widths[-2::-1]:
            x = upsample(nn.Conv(features, (1, 1), dtype=self.dtype)(x))
            x = ConvBlock(features, dtype=self.dtype)(x)
        # The last layer in float32, here and below: bfloat16 has 8 bits, too few for an image's
        # grey levels and for the order of a map's pixels.
        x = nn.Conv(4 * self.outputs, (3, 3), dtype=at_least_float32(self.dtype))(x)
        return depth_to_space(x) + 0.5  # [b, h, w, outputs]


class MapHead(nn.Module):
    """An encoder-decoder with skip connections that draws the anomaly map."""

    width: int
    depth: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, beside: Array | None = None) -> Array:
        """Maps [b, h, w, c] to logits of the anomaly map [b, h, w], float32.

        `beside` [b, h/2, w/2, k] is seen beside it, at half its size.
        """
        x = space_to_depth(x.astype(self.dtype))  # [b, h/2, w/2, 4c]
        if beside is not None:
            x = jnp.concatenate([x, beside.astype(self.dtype)], axis=-1)
        widths = [self.width * min(2**level, 8) for level in range(self.depth)]
        x = ConvBlock(widths[0], dtype=self.dtype)(x)
        skips = []
        for features in widths[1:]:
            skips.append(x)
            x = ConvBlock(features, stride=2, dtype=self.dtype)(x)
            x = ConvBlock(features, dtype=self.dtype)(x)
        for features in widths[-2::-1]:
            # Narrowed before it is enlarged: the convolution that follows costs half as much.
            x = upsample(nn.Conv(features, (1, 1), dtype=self.dtype)(x))
            x = ConvBlock(features, dtype=self.dtype)(jnp.concatenate([x, skips.pop()], axis=-1))
        # Starts at about 2 % anomalous, which is what a mask holds on average: the first steps are
        # not spent on learning that most pixels are good.
        x = nn.Conv(
            1, (3, 3), bias_init=nn.initializers.constant(-4.0), dtype=at_least_float32(self.dtype)
        )(x)
        b, h, w, _ = x.shape
        return jax.image.resize(x[..., 0], (b, 2 * h, 2 * w), "bilinear")


# Of the patch memories, all chosen by measuring (docs/experiments.md): pixels a side of a patch of
# the image at half its size, or a quarter, and pixels from one patch to the next; the principal
# components that stand for one; how much its place may count; out of how many, if there are so
# many, one is recalled; and the weights of the distances in the map's logits, at half the size and
# at a quarter.
PATCH, STRIDE = 8, 2
COMPONENTS = 32
PLACES = (0.0, 0.5, 1.0, 2.0, 4.0)
CANDIDATES = 48
RECALL = (0.5, 0.25)


def halve(images: Array) -> Array:
    """Halves height and width, each pixel the mean of four: [b, h/2, w/2, c]."""
    b, h, w, c = images.shape
    return images.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def image_marks(images: Array) -> Array:
    """Returns a number for each image by which it is told from others: float32 [b].

    `images` are uint8 [b, h, w, c]. Equal images have equal marks; two that differ have with a
    chance of one in 16 million.
    """
    pixels = images.reshape(len(images), -1).astype(jnp.uint32)
    # An odd factor for each place, which looks drawn at random: a multiple of 2**32 over the golden
    # ratio (Knuth, The Art of Computer Programming, 6.4), its upper bits mixed into the lower ones.
    factors = jnp.arange(pixels.shape[1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
    factors = (factors ^ (factors >> 15)) * jnp.uint32(0x85EBCA6B) | 1
    # The upper 24 bits: as many as a float32 holds.
    return (jnp.sum(pixels * factors, axis=1, dtype=jnp.uint32) >> 8).astype(jnp.float32)


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
    marks: Array,
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
      marks: what each is told from the others by, [n] (`image_marks`).
      size: how many patches.
      coords: where a patch lies counts as well.
      distinct: no patch is taken twice, so that there may be fewer.
      components: principal components that stand for a descriptor.
      patch: see `describe_patches`.
      stride: likewise.

    Returns:
      `mean` [d] and `basis` [d, components] of the descriptors; `patches` [size, components + 2],
      their principal components and their coordinates times `place`, the descriptors' standard
      deviation (0 without `coords`); `source` [size], the marks of the images that they are of.
      Unless `distinct` also `centre` and `spread`, mean and standard deviation of the distances of
      patches that are drawn beside them.
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
    x, places, marks = x[order], places[order], jnp.repeat(marks, len(x) // len(images))[order]
    mean = jnp.mean(x, axis=0)
    variance, basis = jnp.linalg.eigh(jnp.cov(x, rowvar=False))  # from the smallest on
    basis = basis[:, ::-1][:, :components]
    place = coords * jnp.sqrt(jnp.sum(variance))
    x = x - mean
    patches = jnp.concatenate([x @ basis, place * places], axis=-1)[:size]
    memory = {"basis": basis, "patches": patches, "place": place}
    about = {"mean": mean, "source": marks[:size]}
    if distinct:
        return memory | about
    distances = nearest_distance(x[size:], places[size:], **memory)
    return memory | about | {"centre": jnp.mean(distances), "spread": jnp.std(distances)}


def nearest_distance(
    x: Array,
    coords: Array,
    *,
    basis: Array,
    patches: Array,
    place: Array,
    left_out: Array | bool = False,
) -> Array:
    """Returns the distance of descriptors [..., d] to the nearest of the remembered `patches`.

    `x` are descriptors minus their mean, `coords` [..., 2] where they lie; the others are those of
    `remember_patches`. What the principal components leave over counts in full. Patches that are
    `left_out`, bool [size], are not among those that are remembered.
    """
    exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # differences of large numbers
    code = exact(x, basis)
    rest = jnp.sum(x**2, axis=-1) - jnp.sum(code**2, axis=-1)
    coords = jnp.broadcast_to(place * coords, (*code.shape[:-1], 2))
    code = jnp.concatenate([code, coords], axis=-1)
    # As one matrix: on a CPU a third of the time that the minimum over [rows, columns, size] takes.
    products = exact(code.reshape(-1, code.shape[-1]), patches.T)
    known = jnp.where(left_out, jnp.inf, jnp.sum(patches**2, axis=-1))
    squared = jnp.min(known - 2 * products, axis=-1).reshape(rest.shape)
    return jnp.sqrt(jnp.maximum(squared + jnp.sum(code**2, axis=-1) + rest, 0.0))


def patch_distances(
    memory: Mapping[str, Array],
    images: Array,
    marks: Array | None = None,
    *,
    patch: int = PATCH,
    stride: int = STRIDE,
    shift: int = 0,
) -> Array:
    """Returns the distance of each patch of the images to the nearest in memory: [b, h/4, w/4].

    With `marks` [b], to the nearest that is of another image, if any is: as far as it would be if
    the image itself were not remembered. With `shift`, of each patch as if it lay so many patches
    further down and to the right.
    """
    known = {name: memory[name] for name in ("basis", "patches", "place")}
    marks = jnp.full(len(images), jnp.nan) if marks is None else marks  # nan: no image's

    def of_one(args: tuple[Array, Array]) -> Array:
        image, mark = args
        own = memory["source"] == mark
        x, coords = describe_patches(image[None], patch=patch, stride=stride)
        coords = jnp.roll(coords, (-shift, -shift), axis=(0, 1))
        left_out = own & ~jnp.all(own)
        return nearest_distance(x[0] - memory["mean"], coords, left_out=left_out, **known)

    # Image by image: every patch of a batch against all of the memory would be gigabytes.
    return jax.lax.map(of_one, (images, marks))


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
        return squared, chosen.at[i].set(farthest)

    start = jnp.full(len(patches), jnp.inf), jnp.zeros(size, jnp.int32)
    _, chosen = jax.lax.fori_loop(0, size, choose, start)
    return memory | {"patches": patches[chosen], "source": memory["source"][chosen]}


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
    it is initialised with, and that no gradient changes; `train.create_parts` sets them anew.
    """

    size: int
    coords: bool = True
    components: int = COMPONENTS
    patch: int = PATCH
    stride: int = STRIDE

    @nn.compact
    def __call__(self, images: Array, marks: Array | None = None) -> Array:
        """Maps images [b, h, w, c] to distances [b, h/4, w/4] in float32.

        In standard deviations above the mean of good patches, from -3 to 10. `marks` [b]: see
        `patch_distances`.
        """
        cut = {"patch": self.patch, "stride": self.stride}
        remember = partial(
            remember_patches,
            size=self.size,
            components=self.components,
            coords=self.coords,
            **cut,
        )
        source = jnp.arange(len(images), dtype=jnp.float32) if marks is None else marks
        memory = jax.lax.stop_gradient(self.param("memory", remember, images, source))
        distances = patch_distances(memory, images, marks, **cut)
        return jnp.clip((distances - memory["centre"]) / (memory["spread"] + 1e-6), -3, 10)


class Generator(nn.Module):
    """Puts out an anomaly map and a reconstruction of the image.

    Attributes:
      width: channels at half the image's size; doubled at each halving, up to eight times.
      depth: number of halvings; height and width must be multiples of 2**depth.
      latent: channels of the reconstruction's bottleneck.
      coords: appends the coordinate channels to what the networks see.
      reconstruct: has a reconstruction; without one the map is drawn from the image alone and the
        image stands in for its reconstruction.
      memory: patches of good images that each `PatchMemory` remembers; 0 for none.
      dtype: of the computation; parameters and outputs are float32.
    """

    width: int = 32
    depth: int = 4
    latent: int = 32
    coords: bool = True
    reconstruct: bool = True
    memory: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Array, marks: Array | None = None, *, recall: bool = True
    ) -> tuple[Array, Array]:
        """Returns the map's logits [b, h, w] and the reconstruction [b, h, w, 3], both float32.

        The map head sees the distances of a memory. With `recall` they are added to what it says,
        and those of a second memory, of patches twice as large: of parts that lie where they should
        not. Training does without: the head learns to see for itself, and what it has learned from
        synthetic defects alone cannot talk it out of what the memories say.

        In training `marks` [b] say which images these are made of (`image_marks`), and the distance
        is to patches of others: an image that is remembered has no unusual patches, and the head
        would take those of any other for defects.
        """
        check_size(images.shape[1:3], self.depth)
        x = 2 * images - 1
        x = add_coords(x) if self.coords else x
        reconstruction = images
        if self.reconstruct:
            reconstruction = Reconstructor(self.width, self.depth, self.latent, self.dtype)(x)
            # The map is taught to read the reconstruction's errors, the reconstruction is not
            # taught to make errors that suit the map.
            seen = jax.lax.stop_gradient(reconstruction)
            x = jnp.concatenate([x, 2 * seen - 1, 4 * jnp.abs(images - seen)], axis=-1)
        head = MapHead(self.width, self.depth, self.dtype)
        if not self.memory:
            return head(x), reconstruction
        b, h, w = images.shape[:3]
        fine = PatchMemory(self.memory, coords=self.coords)(images, marks)
        logits = head(x, jax.image.resize(fine, (b, h // 2, w // 2), "bilinear")[..., None])
        if recall:
            coarse = PatchMemory(self.memory, coords=self.coords)(halve(images))
            for distances, weight in zip((fine, coarse), RECALL, strict=True):
                logits += weight * jax.image.resize(distances, (b, h, w), "bilinear")
        return logits, reconstruction


class Discriminator(nn.Module):
    """Tells real (image, anomaly map) pairs from generated ones, patch by patch."""

    width: int = 32
    depth: int = 4
    coords: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Array, maps: Array, *, features: bool = False
    ) -> Array | tuple[Array, list[Array]]:
        """Maps images [b, h, w, 3] and maps [b, h, w] to logits [b, h/2**depth, w/2**depth].

        With `features`, returns beside them what each halving put out: [b, h/2**k, w/2**k, c] for
        k from 1 to depth.
        """
        x = 2 * jnp.concatenate([images, maps[..., None]], axis=-1) - 1
        x = add_coords(x) if self.coords else x
        x = space_to_depth(x.astype(self.dtype))  # [b, h/2, w/2, 4c]
        levels = [nn.leaky_relu(nn.Conv(self.width, (3, 3), dtype=self.dtype)(x), 0.2)]
        for level in range(1, self.depth):
            block = ConvBlock(self.width * min(2**level, 8), stride=2, dtype=self.dtype)
            levels.append(block(levels[-1]))
        logits = nn.Conv(1, (3, 3), dtype=at_least_float32(self.dtype))(levels[-1])[..., 0]
        return (logits, levels) if features else logits


class Detector(nn.Module):
    """Draws the pair of image and anomaly map as it would be of a good part.

    Learns from good parts alone; what it cannot draw is what a part should not look like. The map
    goes in beside the image: where the generator saw a defect, the observed pair differs even if
    the image is hard to tell from a good one.

    Attributes:
      width: channels at half the image's size; doubled at each halving, up to eight times.
      depth: number of halvings; height and width must be multiples of 2**depth.
      latent: channels of the bottleneck.
      coords: appends the coordinate channels to what the network sees.
      dtype: of the computation; parameters and outputs are float32.
    """

    width: int = 32
    depth: int = 4
    latent: int = 32
    coords: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, maps: Array) -> tuple[Array, Array]:
        """Returns images [b, h, w, 3] and maps [b, h, w] after these, float32, not clipped."""
        check_size(images.shape[1:3], self.depth)
        x = 2 * jnp.concatenate([images, maps[..., None]], axis=-1) - 1
        x = add_coords(x) if self.coords else x
        pair = Reconstructor(self.width, self.depth, self.latent, self.dtype, outputs=4)(x)
        return pair[..., :3], pair[..., 3] - 0.5  # a good part's map is about zero


# What `config.model.name` may name.
GENERATORS = {"Generator": Generator}


def check_size(image_size: tuple[int, int], depth: int) -> None:
    """Raises ValueError unless height and width are multiples of 2**depth."""
    height, width = image_size
    step = 2**depth
    if height % step or width % step or min(height, width) < 1:
        good = tuple(max(step, round(side / step) * step) for side in (height, width))
        raise ValueError(
            f"image_size {height}x{width} does not fit model.depth={depth}: height and width must "
            f"be multiples of {step}, for example {good[0]}x{good[1]}"
        )


def create(model: Mapping[str, Any], loss: Mapping[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Returns the generator and discriminator that `config.model` and `config.loss` describe.

    Raises ValueError if an option is out of range.
    """
    if model["width"] % 8 or model["discriminator_width"] % 8:
        raise ValueError(
            f"model.width={model['width']} and model.discriminator_width="
            f"{model['discriminator_width']} must be multiples of 8, the groups of GroupNorm"
        )
    if model["dtype"] not in ("float32", "bfloat16"):
        raise ValueError(f'model.dtype={model["dtype"]!r} must be "float32" or "bfloat16"')
    if model["memory"] < 0 or (model["memory"] and model["depth"] < 2):
        raise ValueError(
            f"model.memory={model['memory']} must not be negative, and needs model.depth=2 or more"
        )
    if model["name"] not in GENERATORS:
        raise ValueError(f"model.name={model['name']!r} must be one of {sorted(GENERATORS)}")
    shared = {"coords": model["coords"], "dtype": jnp.dtype(model["dtype"])}
    generator = GENERATORS[model["name"]](
        width=model["width"],
        depth=model["depth"],
        latent=model["latent"],
        reconstruct=bool(loss["reconstruction_weight"] or loss["adversarial_weight"]),
        memory=model["memory"],
        **shared,
    )
    discriminator = Discriminator(
        width=model["discriminator_width"], depth=model["discriminator_depth"], **shared
    )
    return generator, discriminator


def create_detector(
    model: Mapping[str, Any], detector: Mapping[str, Any]
) -> tuple[nn.Module, nn.Module]:
    """Returns the detector and discriminator that `config.model`, `config.detector` describe.

    Raises ValueError if an option is out of range.
    """
    if detector["width"] % 8:
        raise ValueError(
            f"detector.width={detector['width']} must be a multiple of 8, the groups of GroupNorm"
        )
    shared = {"coords": model["coords"], "dtype": jnp.dtype(model["dtype"])}
    return Detector(
        width=detector["width"], depth=model["depth"], latent=detector["latent"], **shared
    ), Discriminator(
        width=model["discriminator_width"], depth=model["discriminator_depth"], **shared
    )


def applied(module: nn.Module, *, remat: bool, **options: Any) -> Callable[..., Any]:
    """Returns `module.apply` as a function of parameters and arrays.

    With `remat` the gradient computes what the layers put out a second time instead of keeping it:
    the same result, less memory, more time.
    """

    def apply(params: Any, *arrays: Array) -> Any:
        return module.apply({"params": params}, *arrays, **options)

    return jax.checkpoint(apply) if remat else apply


def count_flops(function: Callable, *inputs: Any) -> float:
    """Returns the floating-point operations of `function` on inputs of such shapes, as XLA counts.

    Of the program before optimisation: nothing is compiled or run.
    """
    return float(jax.jit(function).lower(*inputs).cost_analysis()["flops"])


def flops_per_image(generator: nn.Module, image_size: tuple[int, int]) -> float:
    """Returns the floating-point operations of the generator for one image (see `count_flops`)."""
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    variables = jax.eval_shape(generator.init, jax.random.key(0), images)
    return count_flops(generator.apply, variables, images)
