"""The method in PyTorch, for comparison: networks, losses, one training step, prediction.

It computes the same as anoseg_jax/method (models.py, memory_bank.py, losses.py, train.py,
predict.py), in plain PyTorch modules and NCHW. Images are float [b, 3, h, w] in [0, 1]; anomaly
maps and masks are [b, h, w], 1 = anomalous. `anoseg_jax.interop.torch_weights` gives the weights of
a trained model as a `state_dict` of these modules (docs/pytorch.md).

Two parts are left out. The synthetic defects: no other library draws the same random numbers, so
that a comparison replays batches (`benchmarks/torch_replay.py`). And building the memory bank,
which comes with the weights.
"""

import copy
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
    """Enlarges maps [b, h, w], bilinear, pixel centres at halves."""
    return F.interpolate(x[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


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
        return resize(output(x)[:, 0], (h, w))


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
        before, after = self.patch // 2 - 1, self.patch // 2
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

        With `image_ids` [b], to the nearest patch of any other image (leave-one-out); if all of the
        bank is of that image, nothing is left out. The result is [b, rows, columns].
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
        return ((distances - self.centre) / (self.spread + 1e-6)).clamp(-3, 10)


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
        memory_bank: Mapping[str, Any],
    ) -> None:
        """`memory_bank` are the options of that name; for the others see models.Generator."""
        super().__init__()
        self.coords = coords
        self.distance_weights: tuple[float, ...] = ()
        self.memory = self.coarse_memory = None
        if memory_bank["size"]:
            names = ("size", "patch", "stride", "components")
            options = {name: memory_bank[name] for name in names}
            self.memory, self.coarse_memory = PatchBank(**options), PatchBank(**options)
            self.distance_weights = tuple(memory_bank["distance_weights"])
        inputs = 3 + 2 * coords
        self.reconstructor = Reconstructor(inputs, width, depth, latent) if reconstruct else None
        self.map_head = AnomalyHead(
            inputs + 6 * reconstruct, width, depth, int(self.memory is not None)
        )

    def bank_distances(self, images: Tensor, image_ids: Tensor | None = None) -> Tensor | None:
        """Returns the distances to the memory bank's fine scale; None without a bank.

        They are leave-one-out with the `image_ids` of images that may be in the bank.
        """
        return None if self.memory is None else self.memory(images, image_ids)

    def forward(
        self, images: Tensor, bank_distances: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the map's logits [b, h, w] and the reconstruction [b, 3, h, w].

        `bank_distances` [b, rows, columns] are a further input of the anomaly head; None where
        there is no memory bank. Only prediction adds them to the logits (`generator_logits`).
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
            extra_features = resize(bank_distances, (h // 2, w // 2))[:, None]  # [b, 1, h/2, w/2]
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
    options = {name: config["model"][name] for name in ("width", "depth", "latent", "coords")}
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


def segmentation_loss(logits: Tensor, masks: Tensor, kind: str) -> Tensor:
    """Returns the pixel-wise loss: "l1", "bce" or "focal" (gamma 2, alpha 0.75, times 4)."""
    if kind == "l1":
        return (logits.sigmoid() - masks).abs().mean()
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    if kind == "bce":
        return entropy.mean()
    wrong = (-logits).sigmoid() * masks + logits.sigmoid() * (1 - masks)
    weight = 0.75 * masks + 0.25 * (1 - masks)
    return 4 * (weight * wrong**2 * entropy).mean()


def reconstruction_loss(reconstructions: Tensor, images: Tensor, masks: Tensor) -> Tensor:
    """Returns the mean absolute error over the normal region of each image."""
    normal = 1 - masks
    error = (reconstructions - images).abs().mean(dim=1)
    return ((error * normal).sum(dim=(1, 2)) / normal.sum(dim=(1, 2)).clamp(min=1)).mean()


def adversarial_loss(fake_logits: Tensor, kind: str) -> Tensor:
    """Returns the generator's side: -log D(fake) for "bce", -D(fake) for "hinge"."""
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str) -> Tensor:
    """Returns the discriminator's side of the adversarial loss."""
    if kind == "hinge":
        return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def training_losses(
    generator: Generator,
    discriminator: Discriminator,
    examples: Mapping[str, Tensor],
    loss: Mapping[str, Any],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns the losses of the generator and of the discriminator, and each term by name.

    Args:
      generator: the generator.
      discriminator: the discriminator.
      examples: `good` images [b, 3, h, w]; the same with synthetic defects, `defective`; their
        `masks` [b, h, w]; `image_ids` [b], for the leave-one-out distances to the memory bank.
      loss: the options `config["loss"]`. A term whose weight is zero is not computed.
    """
    good, defective, masks = (examples[name] for name in ("good", "defective", "masks"))
    bank_distances = generator.bank_distances(defective, examples["image_ids"])
    logits, reconstructions = generator(defective, bank_distances)
    terms = {"loss_segmentation": segmentation_loss(logits, masks, loss["segmentation"])}
    total = loss["segmentation_weight"] * terms["loss_segmentation"]
    if loss["reconstruction_weight"]:
        terms["loss_reconstruction"] = reconstruction_loss(reconstructions, good, masks)
        total = total + loss["reconstruction_weight"] * terms["loss_reconstruction"]
    if not loss["adversarial_weight"]:
        return total, torch.zeros_like(total), terms
    # Real pairs: a good image and an empty map. Generated pairs: the reconstruction, and the map
    # where the image is good; where it is defective the map should not be empty.
    fake_logits = discriminator(reconstructions, logits.sigmoid() * (1 - masks))
    real_logits = discriminator(good, torch.zeros_like(masks))
    kind = loss["adversarial"]
    terms["loss_adversarial"] = adversarial_loss(fake_logits, kind)
    total = total + loss["adversarial_weight"] * terms["loss_adversarial"]
    terms["loss_discriminator"] = discriminator_loss(real_logits, fake_logits, kind)
    return total, terms["loss_discriminator"], terms


def learning_rate(step: int, config: Mapping[str, Any]) -> float:
    """Returns the learning rate after `step` steps: linear warm-up, then half a cosine to zero."""
    peak, warmup = config["learning_rate"], config["warmup_steps"]
    if step < warmup:
        start = peak / (warmup + 1)
        return start + (peak - start) * step / warmup
    decay = max(config["num_steps"], warmup + 1) - warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(step - warmup, decay) / decay))


def clip(gradients: list[Tensor], largest: float) -> tuple[list[Tensor], Tensor]:
    """Scales gradients down to a global norm of at most `largest`; returns them and their norm."""
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    scale = (largest / norm).clamp(max=1.0)
    return [gradient * scale for gradient in gradients], norm


def gradients_of(loss: Tensor, player: nn.Module) -> list[Tensor]:
    """Returns the gradient of the loss by each parameter; keeps the graph of the forward pass."""
    parameters = list(player.parameters())
    if not loss.requires_grad:  # no adversarial loss
        return [torch.zeros_like(parameter) for parameter in parameters]
    return list(torch.autograd.grad(loss, parameters, retain_graph=True))


class Training:
    """Both players, their optimizers, and the average of the generator's weights.

    Attributes:
      generator: trained by AdamW; its memory bank is in buffers, which no step changes.
      discriminator: trained by Adam at its own learning rate.
      average: the generator with averaged weights: those that are evaluated.
      steps: the number of steps done.
      gradients: of the last step, by player, before clipping.
    """

    def __init__(
        self, generator: Generator, discriminator: Discriminator, config: Mapping[str, Any]
    ) -> None:
        """`config` are the options of a config.json."""
        self.generator, self.discriminator, self.config = generator, discriminator, config
        self.average = copy.deepcopy(generator).requires_grad_(False)
        self.steps = 0
        self.gradients: dict[str, list[Tensor]] = {}
        options = {"lr": 0.0, "eps": 1e-8, "fused": True}
        self.optimizers = {
            "generator": torch.optim.AdamW(
                generator.parameters(),
                betas=(0.9, 0.999),
                weight_decay=config["weight_decay"],
                **options,
            ),
            "discriminator": torch.optim.Adam(
                discriminator.parameters(), betas=(0.5, 0.999), **options
            ),
        }

    def step(self, examples: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Updates both players from one forward pass; returns losses and gradient norms.

        `examples` are those of `training_losses`.
        """
        total, discriminator_total, terms = training_losses(
            self.generator, self.discriminator, examples, self.config["loss"]
        )
        players = {"generator": self.generator, "discriminator": self.discriminator}
        # Each player has the gradient of its own loss by its own parameters.
        self.gradients = {
            "discriminator": gradients_of(discriminator_total, self.discriminator),
            "generator": gradients_of(total, self.generator),
        }
        metrics = {name: value.detach() for name, value in terms.items()}
        rate = learning_rate(self.steps, self.config)
        rates = {"generator": rate, "discriminator": self.config["discriminator_scale"] * rate}
        for name, player in players.items():
            clipped, norm = clip(self.gradients[name], self.config["clip_norm"])
            metrics[f"gradient_norm_{name}"] = norm
            for parameter, gradient in zip(player.parameters(), clipped, strict=True):
                parameter.grad = gradient
            self.optimizers[name].param_groups[0]["lr"] = rates[name]
            self.optimizers[name].step()
        self.update_average()
        self.steps += 1
        return metrics

    @torch.no_grad()
    def update_average(self) -> None:
        """Updates the average of the weights; its time constant is shorter at first."""
        decay = min(self.config["ema_decay"], (1 + self.steps) / (10 + self.steps))
        for old, new in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            old += (1 - decay) * (new - old)


def generator_logits(
    generator: Generator, images: Tensor, image_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the logits of the anomaly maps [b, h, w] and the reconstructions [b, 3, h, w].

    The weighted distances to both scales of the memory bank are added to what the head predicts.
    They are leave-one-out with the `image_ids` of images that may be in the bank.
    """
    fine = generator.bank_distances(images, image_ids)
    logits, reconstructions = generator(images, fine)
    if fine is not None:
        coarse = generator.coarse_memory(F.avg_pool2d(images, 2), image_ids)
        for distances, weight in zip((fine, coarse), generator.distance_weights, strict=True):
            logits = logits + weight * resize(distances, tuple(logits.shape[1:]))
    return logits, reconstructions


def peak_over_median(logits: Tensor, top_fraction: float) -> Tensor:
    """Returns how far each map's highest pixels are above its median, in logits, [b]."""
    pixels = logits.flatten(1)
    count = max(1, round(top_fraction * pixels.shape[1]))
    return pixels.topk(count).values.mean(dim=1) - pixels.quantile(0.5, dim=1)


@torch.no_grad()
def predict(
    generator: Generator, images: Tensor, *, top_fraction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns anomaly maps [b, h, w], image-level scores [b], reconstructions [b, 3, h, w].

    The scores are `peak_over_median`; `top_fraction` is `config["evaluate"]["top_fraction"]`.
    """
    logits, reconstructions = generator_logits(generator, images)
    scores = peak_over_median(logits, top_fraction)
    return logits.sigmoid(), scores, reconstructions.clamp(0, 1)


@torch.no_grad()
def detect(
    detector: Detector, discriminator: Discriminator, images: Tensor, maps: Tensor
) -> Tensor:
    """Returns the image-level detector's scores [b].

    A score is the distance of the observed pair from the reconstructed one in the discriminator's
    features.
    """
    observed = discriminator.features(images, maps)
    reconstructed = discriminator.features(*detector(images, maps))
    levels = [
        (a - b).square().mean(dim=(1, 2, 3)).sqrt()
        for a, b in zip(observed, reconstructed, strict=True)
    ]
    return torch.stack(levels).mean(dim=0)
