"""The networks of AnoSeg: generator, discriminator and image-level detector.

Images are float [b, h, w, 3] in [0, 1]; anomaly maps are float [b, h, w], 1 = anomalous.

The paper (arXiv 2110.03396) gives the players, their inputs and outputs; its layer tables are not
known to this project. The layers here are choices of this project (docs/method.md):

  width: channels at half the image's size; doubled at each halving, up to eight times.
  depth: number of halvings; height and width must be multiples of 2**depth.
  latent: channels of a reconstructor's bottleneck.
  coords: the coordinate channels are appended to the input.
  dtype: of the computation; parameters and outputs are float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

Dtype = Any


def add_coords(images: Array) -> Array:
    """Appends the two coordinate channels (row, column), each from -1 to 1: [b, h, w, c + 2].

    The third part of the method: a convolution alone does not know its position in the image.
    """
    b, h, w, _ = images.shape
    rows = jnp.broadcast_to(jnp.linspace(-1, 1, h, dtype=images.dtype)[:, None], (h, w))
    columns = jnp.broadcast_to(jnp.linspace(-1, 1, w, dtype=images.dtype)[None, :], (h, w))
    coords = jnp.broadcast_to(jnp.stack([rows, columns], axis=-1), (b, h, w, 2))
    return jnp.concatenate([images, coords], axis=-1)


def space_to_depth(x: Array) -> Array:
    """Folds each 2x2 square of pixels into channels: [b, h/2, w/2, 4c]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)


def depth_to_space(x: Array) -> Array:
    """Inverse of `space_to_depth`: [b, 2h, 2w, c/4]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, 2, c // 4)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)


def upsample(x: Array) -> Array:
    """Doubles height and width, nearest neighbour: [b, 2 h, 2 w, c]."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def at_least_float32(dtype: Dtype) -> Dtype:
    """Returns the dtype, or float32 if it is narrower."""
    return jnp.promote_types(dtype, jnp.float32)


def level_widths(width: int, depth: int) -> list[int]:
    """Returns the channels at half the image's size, a quarter ... (see `width` above)."""
    return [width * min(2**level, 8) for level in range(depth)]


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
    """Autoencoder without skip connections that reconstructs the good part.

    Only `latent` numbers for each cell of 2**depth x 2**depth pixels reach the decoder, so that it
    cannot copy a defect.
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
        widths = level_widths(self.width, self.depth)
        x = ConvBlock(widths[0], dtype=self.dtype)(x)
        for features in widths[1:]:
            x = ConvBlock(features, stride=2, dtype=self.dtype)(x)
        x = nn.Conv(self.latent, (1, 1), dtype=self.dtype)(x)  # [b, h/2**depth, w/2**depth, latent]
        x = ConvBlock(widths[-1], dtype=self.dtype)(x)
        for features in widths[-2::-1]:
            x = upsample(nn.Conv(features, (1, 1), dtype=self.dtype)(x))
            x = ConvBlock(features, dtype=self.dtype)(x)
        # The last layer is in float32, here and below: the 8 significant bits of bfloat16 are too
        # few for the grey levels of an image and for the ranking of pixels by the map.
        x = nn.Conv(4 * self.outputs, (3, 3), dtype=at_least_float32(self.dtype))(x)
        return depth_to_space(x) + 0.5  # [b, h, w, outputs]


class AnomalyHead(nn.Module):
    """Encoder-decoder with skip connections (U-Net) that predicts the anomaly map."""

    width: int
    depth: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, extra_features: Array | None = None) -> Array:
        """Maps [b, h, w, c] to the logits of the anomaly map [b, h, w], float32.

        `extra_features` [b, h/2, w/2, k] are concatenated to the input at half its size.
        """
        x = space_to_depth(x.astype(self.dtype))  # [b, h/2, w/2, 4c]
        if extra_features is not None:
            x = jnp.concatenate([x, extra_features.astype(self.dtype)], axis=-1)
        widths = level_widths(self.width, self.depth)
        x = ConvBlock(widths[0], dtype=self.dtype)(x)
        skips = []
        for features in widths[1:]:
            skips.append(x)
            x = ConvBlock(features, stride=2, dtype=self.dtype)(x)
            x = ConvBlock(features, dtype=self.dtype)(x)
        for features in widths[-2::-1]:
            # Fewer channels before upsampling: the next convolution costs half as much.
            x = upsample(nn.Conv(features, (1, 1), dtype=self.dtype)(x))
            x = ConvBlock(features, dtype=self.dtype)(jnp.concatenate([x, skips.pop()], axis=-1))
        # The bias starts at about 2 % anomalous, the average of the masks: the first steps need not
        # learn that most pixels are good.
        x = nn.Conv(
            1, (3, 3), bias_init=nn.initializers.constant(-4.0), dtype=at_least_float32(self.dtype)
        )(x)
        b, h, w, _ = x.shape
        return jax.image.resize(x[..., 0], (b, 2 * h, 2 * w), "bilinear")


# The generator's networks, by the names of their parameters.
NETWORKS = ("reconstructor", "anomaly_head")


class Generator(nn.Module):
    """Predicts an anomaly map and a reconstruction of the image.

    Without `reconstruct` there is no reconstructor; the image is its own reconstruction.
    """

    width: int
    depth: int
    latent: int
    coords: bool = True
    reconstruct: bool = True
    distance_scales: int = 2
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, bank_distances: Array | None = None) -> tuple[Array, Array]:
        """Returns the map's logits [b, h, w] and the reconstruction [b, h, w, 3], both float32.

        The first `distance_scales` of `bank_distances` [b, rows, columns, 2] (those of
        memory_bank.bank_distances) are a further input of the anomaly head; None without a bank.
        """
        check_size(images.shape[1:3], self.depth)
        x = 2 * images - 1
        x = add_coords(x) if self.coords else x
        reconstruction = images
        if self.reconstruct:
            reconstructor = Reconstructor(
                self.width, self.depth, self.latent, self.dtype, name="reconstructor"
            )
            reconstruction = reconstructor(x)
            # The head learns from the reconstruction's errors; the reconstructor must not learn to
            # make errors that help the head.
            fixed = jax.lax.stop_gradient(reconstruction)
            x = jnp.concatenate([x, 2 * fixed - 1, 4 * jnp.abs(images - fixed)], axis=-1)
        extra_features = None
        if bank_distances is not None:
            b, h, w = images.shape[:3]
            seen = bank_distances[..., : self.distance_scales]
            shape = (b, h // 2, w // 2, self.distance_scales)
            extra_features = jax.image.resize(seen, shape, "bilinear")
        head = AnomalyHead(self.width, self.depth, self.dtype, name="anomaly_head")
        return head(x, extra_features), reconstruction


class Discriminator(nn.Module):
    """Discriminator of (image, anomaly map) pairs: real or generated, for each patch.

    A PatchGAN (Isola et al., arXiv 1611.07004), because defects are local.
    """

    width: int
    depth: int
    coords: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Array, maps: Array, *, features: bool = False
    ) -> Array | tuple[Array, list[Array]]:
        """Maps images [b, h, w, 3] and maps [b, h, w] to logits [b, h/2**depth, w/2**depth].

        With `features`, also returns the features of each level, [b, h/2**k, w/2**k, c] for k from
        1 to depth.
        """
        x = 2 * jnp.concatenate([images, maps[..., None]], axis=-1) - 1
        x = add_coords(x) if self.coords else x
        x = space_to_depth(x.astype(self.dtype))  # [b, h/2, w/2, 4c]
        levels = [nn.leaky_relu(nn.Conv(self.width, (3, 3), dtype=self.dtype)(x), 0.2)]
        for channels in level_widths(self.width, self.depth)[1:]:
            levels.append(ConvBlock(channels, stride=2, dtype=self.dtype)(levels[-1]))
        # It starts undecided everywhere: random logits would have slopes that the gradient penalty
        # takes hundreds of steps to flatten.
        logits = nn.Conv(
            1, (3, 3), kernel_init=nn.initializers.zeros, dtype=at_least_float32(self.dtype)
        )(levels[-1])[..., 0]
        return (logits, levels) if features else logits


class Detector(nn.Module):
    """Image-level detector: reconstructs the (image, anomaly map) pair of a good part.

    It is trained on good parts alone, so that it reconstructs the pairs of defective parts badly.
    The map is an input because a defect that is faint in the image is clear in the map.
    """

    width: int
    depth: int
    latent: int
    coords: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, maps: Array) -> tuple[Array, Array]:
        """Returns reconstructed images [b, h, w, 3] and maps [b, h, w], float32, not clipped."""
        check_size(images.shape[1:3], self.depth)
        x = 2 * jnp.concatenate([images, maps[..., None]], axis=-1) - 1
        x = add_coords(x) if self.coords else x
        pair = Reconstructor(self.width, self.depth, self.latent, self.dtype, outputs=4)(x)
        return pair[..., :3], pair[..., 3] - 0.5  # a good part's map is about zero


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


def create_discriminator(model: Mapping[str, Any]) -> nn.Module:
    """Returns the discriminator that `config.model` describes."""
    width, depth = model["discriminator_width"], model["discriminator_depth"]
    return Discriminator(width, depth, model["coords"], jnp.dtype(model["dtype"]))


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
    if model["distance_scales"] not in (1, 2):
        raise ValueError(f"model.distance_scales={model['distance_scales']} must be 1 or 2")
    generator = Generator(
        width=model["width"],
        depth=model["depth"],
        latent=model["latent"],
        coords=model["coords"],
        reconstruct=bool(loss["reconstruction_weight"] or loss["adversarial_weight"]),
        distance_scales=model["distance_scales"],
        dtype=jnp.dtype(model["dtype"]),
    )
    return generator, create_discriminator(model)


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
    width, latent, depth = detector["width"], detector["latent"], model["depth"]
    dtype = jnp.dtype(model["dtype"])
    return Detector(width, depth, latent, model["coords"], dtype), create_discriminator(model)


def apply_fn(module: nn.Module, *, remat: bool = False) -> Callable[..., Any]:
    """Returns `module.apply` as a function of parameters and arrays.

    With `remat` the gradient recomputes the activations instead of keeping them: the same result,
    less memory, more time.
    """

    def apply(params: Any, *arrays: Array | None) -> Any:
        return module.apply({"params": params}, *arrays)

    return jax.checkpoint(apply) if remat else apply


def count_flops(function: Callable, *inputs: Any) -> float:
    """Returns the floating-point operations of `function` on inputs of these shapes, by XLA.

    They are those of the program before optimisation: nothing is compiled or run.
    """
    return float(jax.jit(function).lower(*inputs).cost_analysis()["flops"])
