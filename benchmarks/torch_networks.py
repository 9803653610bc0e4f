"""The networks of the method in PyTorch: plain modules, NCHW, the same as models.py here.

Images are float [b, 3, h, w] in [0, 1]; anomaly maps and masks are [b, h, w], 1 = anomalous.
`anoseg_jax.interop.torch_weights` gives the weights of a trained model as a `state_dict` of these
modules (docs/pytorch.md). Building the memory bank is left out: it comes with the weights.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def add_coords(images: Tensor) -> Tensor:
    """Appends the two coordinate channels (row, column), each from -1 to 1: [b, c + 2, h, w]."""
    b, _, h, w = images.shape
    like = {"dtype": images.dtype, "device": images.device}
    rows, columns = torch.linspace(-1, 1, h, **like), torch.linspace(-1, 1, w, **like)
    coords = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    return torch.cat([images, coords.expand(b, 2, h, w)], dim=1)


def space_to_depth(x: Tensor) -> Tensor:
    """Folds each 2x2 square of pixels into channels: [b, 4 c, h/2, w/2].

    The channels of a pixel stay together; F.pixel_unshuffle has another order.
    """
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // 2, 2, w // 2, 2)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def depth_to_space(x: Tensor) -> Tensor:
    """Inverse of `space_to_depth`: [b, c / 4, 2 h, 2 w]."""
    b, c, h, w = x.shape
    x = x.reshape(b, 2, 2, c // 4, h, w)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(b, c // 4, 2 * h, 2 * w)


def upsample(x: Tensor) -> Tensor:
    """Doubles height and width, nearest neighbour."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarges maps [b, k, h, w], bilinear, pixel centres at halves."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def truncated_normal(weight: Tensor, scale: float) -> None:
    """Initializes weights from a normal of variance scale / fan-in, truncated at 2 deviations."""
    fan_in = weight[0].numel()
    std = math.sqrt(scale / fan_in) / 0.8796256610342398  # std of the truncated normal
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Conv(nn.Conv2d):
    """Convolution with XLA's "SAME" padding: the output's size is ceil(input's size / stride).

    Zeros are split evenly between both sides; an odd one goes to the bottom or to the right.
    """

    def __init__(
        self, inputs: int, outputs: int, size: int, *, stride: int = 1, bias: bool = True
    ) -> None:
        """Initializes weights with variance 1 / fan-in, biases with 0."""
        super().__init__(inputs, outputs, size, stride=stride, bias=bias)
        truncated_normal(self.weight, scale=1.0)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, inputs, h, w] to [b, outputs, ceil(h / stride), ceil(w / stride)]."""
        size, stride = self.kernel_size[0], self.stride[0]
        height, width = (
            max(0, (math.ceil(n / stride) - 1) * stride + size - n) for n in x.shape[2:]
        )
        if height == width == size - 1:  # even: the convolution's own padding is faster
            return F.conv2d(x, self.weight, self.bias, stride, padding=size // 2)
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, self.weight, self.bias, stride)


class ConvBlock(nn.Module):
    """3x3 convolution, GroupNorm, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        """Initializes weights with variance 2 / fan-in (He et al., arXiv 1502.01852)."""
        super().__init__()
        self.conv = Conv(inputs, outputs, 3, stride=stride, bias=False)
        truncated_normal(self.conv.weight, scale=2.0)
        self.norm = nn.GroupNorm(8, outputs, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, inputs, h, w] to [b, outputs, h / stride, w / stride]."""
        return F.leaky_relu(self.norm(self.conv(x)), 0.1)


def level_widths(width: int, depth: int) -> list[int]:
    """Returns the channels at half the image's size, a quarter ...: doubled up to eight times."""
    return [width * min(2**level, 8) for level in range(depth)]


class Reconstructor(nn.Module):
    """Autoencoder without skip connections that reconstructs the good part."""

    def __init__(self, inputs: int, width: int, depth: int, latent: int, outputs: int = 3) -> None:
        """Creates `blocks` and `convs`.

        `blocks`: encoder, one after the bottleneck, decoder. `convs`: bottleneck, one before each
        upsampling, output.
        """
        super().__init__()
        self.depth = depth
        widths = level_widths(width, depth)
        up = widths[-2::-1]  # of the decoder: from the deepest level to half the image's size
        self.blocks = nn.ModuleList(
            [ConvBlock(4 * inputs, widths[0])]
            + [ConvBlock(a, b, stride=2) for a, b in zip(widths, widths[1:], strict=False)]
            + [ConvBlock(latent, widths[-1])]
            + [ConvBlock(features, features) for features in up]
        )
        self.convs = nn.ModuleList(
            [Conv(widths[-1], latent, 1)]
            + [Conv(a, b, 1) for a, b in zip(widths[::-1], up, strict=False)]
            + [Conv(widths[0], 4 * outputs, 3)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, inputs, h, w] to [b, outputs, h, w] around 0.5, not clipped."""
        bottleneck, *reduce, output = self.convs
        x = space_to_depth(x)
        for block in self.blocks[: self.depth]:
            x = block(x)
        x = bottleneck(x)  # [b, latent, h/2**depth, w/2**depth]
        x = self.blocks[self.depth](x)
        for conv, block in zip(reduce, self.blocks[self.depth + 1 :], strict=True):
            x = block(upsample(conv(x)))
        return depth_to_space(output(x)) + 0.5


class AnomalyHead(nn.Module):
    """Encoder-decoder with skip connections (U-Net) that predicts the anomaly map."""

    def __init__(self, inputs: int, width: int, depth: int, extra_features: int = 0) -> None:
        """Creates `blocks` and `convs`.

        `blocks`: the first, two at each further level down, one at each level up. `convs`: one
        before each upsampling, output.
        """
        super().__init__()
        self.depth = depth
        widths = level_widths(width, depth)
        up = widths[-2::-1]
        down = []
        for a, b in zip(widths, widths[1:], strict=False):
            down += [ConvBlock(a, b, stride=2), ConvBlock(b, b)]
        self.blocks = nn.ModuleList(
            [ConvBlock(4 * inputs + extra_features, widths[0])]
            + down
            + [ConvBlock(2 * features, features) for features in up]
        )
        self.convs = nn.ModuleList(
            [Conv(a, b, 1) for a, b in zip(widths[::-1], up, strict=False)]
            + [Conv(widths[0], 1, 3)]
        )
        # Starts at about 2 % anomalous, the average of the masks.
        nn.init.constant_(self.convs[-1].bias, -4.0)

    def forward(self, x: Tensor, extra_features: Tensor | None = None) -> Tensor:
        """Maps [b, inputs, h, w] to the logits of the anomaly map [b, h, w].

        `extra_features` [b, k, h/2, w/2] are concatenated to the input at half its size.
        """
        h, w = x.shape[2:]
        *reduce, output = self.convs
        x = space_to_depth(x)
        if extra_features is not None:
            x = torch.cat([x, extra_features], dim=1)
        x = self.blocks[0](x)
        skips, bottom = [], 2 * self.depth - 1
        for down, block in zip(self.blocks[1:bottom:2], self.blocks[2:bottom:2], strict=True):
            skips.append(x)
            x = block(down(x))
        for conv, block in zip(reduce, self.blocks[bottom:], strict=True):
            x = block(torch.cat([upsample(conv(x)), skips.pop()], dim=1))
        return resize(output(x), (h, w))[:, 0]


class PatchBank(nn.Module):
    """Coreset of good patches at one scale, and the distances of other patches to it.

    All arrays are buffers: they have no gradient and no weight decay. Their names are those of the
    weight files (docs/pytorch.md).
    """

    def __init__(self, size: int, *, patch: int, stride: int, components: int) -> None:
        """All buffers are zero until weights are loaded; the options are `config.memory_bank`."""
        super().__init__()
        self.patch, self.stride = patch, stride
        descriptor = 3 * patch**2
        self.register_buffer("mean", torch.zeros(descriptor))
        self.register_buffer("basis", torch.zeros(descriptor, components))
        # Principal components, then the position times `place`.
        self.register_buffer("patches", torch.zeros(size, components + 2))
        self.register_buffer("source", torch.zeros(size, dtype=torch.int32))  # image id
        self.register_buffer("place", torch.zeros(()))  # scale of the position
        self.register_buffer("centre", torch.zeros(()))  # mean of good distances
        self.register_buffer("spread", torch.zeros(()))  # their standard deviation

    def embed_patches(self, images: Tensor) -> Tensor:
        """Returns descriptors of the patches of half-size images: [b, rows, columns, d]."""
        x = F.avg_pool2d(images, 2)
        before, after = (self.patch - 1) // 2, self.patch // 2
        x = F.pad(x, (before, after, before, after), mode="reflect")
        # [b, c, rows, columns, patch, patch]
        x = x.unfold(2, self.patch, self.stride).unfold(3, self.patch, self.stride)
        x = x.permute(0, 2, 3, 4, 5, 1).flatten(3)
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.square().mean(dim=-1, keepdim=True).sqrt() + 0.1)

    def distances(self, x: Tensor, left_out: Tensor) -> Tensor:
        """Maps an image's descriptors [rows, columns, d] to distances [rows, columns].

        `left_out` [size] is True for patches of the bank that do not count.
        """
        like = {"dtype": x.dtype, "device": x.device}
        rows, columns = (torch.linspace(-1, 1, n, **like) for n in x.shape[:2])
        positions = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        x = x - self.mean
        code = x @ self.basis
        rest = x.square().sum(dim=-1) - code.square().sum(dim=-1)  # outside the components
        code = torch.cat([code, self.place * positions], dim=-1)
        norms = self.patches.square().sum(dim=-1).masked_fill(left_out, torch.inf)
        products = torch.addmm(norms, code.flatten(0, 1), self.patches.T, alpha=-2)
        squared = products.amin(dim=-1).view_as(rest)
        return (squared + code.square().sum(dim=-1) + rest).clamp(min=0).sqrt()

    @torch.no_grad()
    def forward(self, images: Tensor, image_ids: Tensor | None = None) -> Tensor:
        """Returns the standardized distance of each patch to the nearest in the bank.

        They are averaged over all patches that contain a pixel: [b, rows, columns]. With
        `image_ids` [b], to the nearest patch of any other image (leave-one-out); if all of the bank
        is of that image, nothing is left out.
        """
        if image_ids is None:
            image_ids = self.source.new_full((len(images),), -1)  # no image's
        same_image = self.source == image_ids[:, None]
        left_out = same_image & ~same_image.all(dim=1, keepdim=True)
        # Image by image: every patch of a batch against all of the bank would be gigabytes.
        descriptors = self.embed_patches(images)
        distances = torch.stack(
            [self.distances(*args) for args in zip(descriptors, left_out, strict=True)]
        )
        distances = ((distances - self.centre) / (self.spread + 1e-6)).clamp(-3, 10)
        cells = max(1, self.patch // self.stride)
        before, after = cells // 2, (cells - 1) // 2
        padded = F.pad(distances[:, None], (before, after, before, after), mode="replicate")
        return F.avg_pool2d(padded, cells, stride=1)[:, 0]


class Generator(nn.Module):
    """Predicts an anomaly map and a reconstruction of the image."""

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        latent: int,
        coords: bool,
        reconstruct: bool,
        distance_scales: int,
        memory_bank: Mapping[str, Any],
    ) -> None:
        """`memory_bank` are the options of that name; for the others see models.Generator."""
        super().__init__()
        self.coords, self.distance_scales = coords, distance_scales
        self.distance_weights: tuple[float, ...] = ()
        self.memory = self.coarse_memory = None
        if memory_bank["size"]:
            names = ("size", "patch", "stride", "components")
            options = {name: memory_bank[name] for name in names}
            self.memory, self.coarse_memory = PatchBank(**options), PatchBank(**options)
            self.distance_weights = tuple(memory_bank["distance_weights"])
            self.register_buffer("brightness", torch.zeros(()))  # mean of the good images
        inputs = 3 + 2 * coords
        self.reconstructor = Reconstructor(inputs, width, depth, latent) if reconstruct else None
        seen = distance_scales if self.memory else 0
        self.map_head = AnomalyHead(inputs + 6 * reconstruct, width, depth, seen)

    def match_brightness(self, images: Tensor) -> Tensor:
        """Scales each image so that its mean is that of the good images; unchanged without a bank.

        The factor is from 0.5 to 2, and the result is clipped to [0, 1].
        """
        if self.memory is None:
            return images
        means = images.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
        return (images * (self.brightness / means).clamp(0.5, 2)).clamp(0, 1)

    def bank_distances(self, images: Tensor, image_ids: Tensor | None = None) -> Tensor | None:
        """Returns the distances to the memory bank [b, 2, rows, columns]; None without a bank.

        Those to the coarse scale are enlarged. They are leave-one-out with the `image_ids` of
        images that may be in the bank.
        """
        if self.memory is None:
            return None
        fine = self.memory(images, image_ids)[:, None]
        coarse = self.coarse_memory(F.avg_pool2d(images, 2), image_ids)[:, None]
        return torch.cat([fine, resize(coarse, tuple(fine.shape[2:]))], dim=1)

    def forward(
        self, images: Tensor, bank_distances: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the map's logits [b, h, w] and the reconstruction [b, 3, h, w].

        The first `distance_scales` of `bank_distances` [b, 2, rows, columns] are a further input of
        the anomaly head; None where there is no memory bank. Only prediction adds them to the
        logits (`generator_logits`).
        """
        h, w = images.shape[2:]
        x = 2 * images - 1
        x = add_coords(x) if self.coords else x
        reconstruction = images
        if self.reconstructor is not None:
            reconstruction = self.reconstructor(x)
            # The head learns from the reconstruction's errors; the reconstructor must not learn to
            # make errors that help the head.
            fixed = reconstruction.detach()
            x = torch.cat([x, 2 * fixed - 1, 4 * (images - fixed).abs()], dim=1)
        extra_features = None
        if bank_distances is not None:
            seen = bank_distances[:, : self.distance_scales]
            extra_features = resize(seen, (h // 2, w // 2))
        return self.map_head(x, extra_features), reconstruction


class Discriminator(nn.Module):
    """PatchGAN discriminator of (image, anomaly map) pairs: real or generated, for each patch."""

    def __init__(self, *, width: int, depth: int, coords: bool) -> None:
        """The arguments are the attributes of anoseg_jax.method.models.Discriminator."""
        super().__init__()
        self.coords = coords
        widths = level_widths(width, depth)
        self.convs = nn.ModuleList(
            [Conv(4 * (4 + 2 * coords), widths[0], 3), Conv(widths[-1], 1, 3)]
        )
        self.blocks = nn.ModuleList(
            ConvBlock(a, b, stride=2) for a, b in zip(widths, widths[1:], strict=False)
        )

    def features(self, images: Tensor, maps: Tensor) -> list[Tensor]:
        """Returns the features of each level, [b, c, h/2**k, w/2**k] for k from 1 to depth."""
        x = 2 * torch.cat([images, maps[:, None]], dim=1) - 1
        x = add_coords(x) if self.coords else x
        levels = [F.leaky_relu(self.convs[0](space_to_depth(x)), 0.2)]
        for block in self.blocks:
            levels.append(block(levels[-1]))
        return levels

    def forward(self, images: Tensor, maps: Tensor) -> Tensor:
        """Maps images [b, 3, h, w] and maps [b, h, w] to logits [b, h/2**depth, w/2**depth]."""
        return self.convs[1](self.features(images, maps)[-1])[:, 0]


class Detector(nn.Module):
    """Image-level detector: reconstructs the (image, anomaly map) pair of a good part."""

    def __init__(self, *, width: int, depth: int, latent: int, coords: bool) -> None:
        """The arguments are the attributes of anoseg_jax.method.models.Detector."""
        super().__init__()
        self.coords = coords
        self.reconstructor = Reconstructor(4 + 2 * coords, width, depth, latent, outputs=4)

    def forward(self, images: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns reconstructed images [b, 3, h, w] and maps [b, h, w], not clipped."""
        x = 2 * torch.cat([images, maps[:, None]], dim=1) - 1
        pair = self.reconstructor(add_coords(x) if self.coords else x)
        return pair[:, :3], pair[:, 3] - 0.5


def create(config: Mapping[str, Any]) -> tuple[Generator, Discriminator]:
    """Returns the generator and discriminator that the options of a config.json describe."""
    loss = config["loss"]
    names = ("width", "depth", "latent", "coords", "distance_scales")
    options = {name: config["model"][name] for name in names}
    reconstruct = bool(loss["reconstruction_weight"] or loss["adversarial_weight"])
    generator = Generator(reconstruct=reconstruct, memory_bank=config["memory_bank"], **options)
    return generator, create_discriminator(config)


def create_discriminator(config: Mapping[str, Any]) -> Discriminator:
    """Returns the discriminator that the options of a config.json describe."""
    model = config["model"]
    return Discriminator(
        width=model["discriminator_width"],
        depth=model["discriminator_depth"],
        coords=model["coords"],
    )


def create_detector(config: Mapping[str, Any]) -> tuple[Detector, Discriminator]:
    """Returns the detector and discriminator that the options of a config.json describe."""
    options = {name: config["model"][name] for name in ("depth", "coords")}
    options |= {name: config["detector"][name] for name in ("width", "latent")}
    return Detector(**options), create_discriminator(config)
