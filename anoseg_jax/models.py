"""Generator, discriminator and detector of AnoSeg as pure functions of their variables.

Images are float [b, h, w, 3] in [0, 1]; anomaly maps are float [b, h, w], 1 = anomalous. Layer
tables are this project's own choice: the paper's are not known to it (docs/method.md).
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from anoseg_jax.memory import PatchMemory, halve

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


# Weights in the map's logits of the distances to recalled patches, at half the size and at a
# quarter; chosen by measuring (docs/experiments.md).
RECALL = (0.5, 0.25)


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
    def __call__(self, images: Array, *, recall: bool = True) -> tuple[Array, Array]:
        """Returns the map's logits [b, h, w] and the reconstruction [b, h, w, 3], both float32.

        The map head sees the distances of a memory. With `recall`, those of two others are added to
        what it says, the second of patches twice as large: of parts that lie where they should not.
        Training does without: the head learns to see for itself, and what it has learned from
        synthetic defects alone cannot talk it out of what the memories say.
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
        distances = PatchMemory(self.memory, coords=self.coords)(images)
        b, h, w = images.shape[:3]
        logits = head(x, jax.image.resize(distances, (b, h // 2, w // 2), "bilinear")[..., None])
        if recall:
            for scaled, weight in zip((images, halve(images)), RECALL, strict=True):
                distances = PatchMemory(self.memory, coords=self.coords)(scaled)
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
