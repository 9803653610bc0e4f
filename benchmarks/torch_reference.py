"""The method once more, in PyTorch: networks, losses and one step of training, to compare with.

The same mathematics as anoseg_jax (models.py, losses.py, train.py, predict.py), written as a
PyTorch user expects it: plain modules, NCHW. Images are float [b, 3, h, w] in [0, 1], anomaly maps
and masks [b, h, w], 1 = anomalous. `anoseg_jax.interop.torch_weights` gives the weights of a
trained model as a `state_dict` of these modules; docs/pytorch.md says how.

Not here: the synthetic defects, whose random numbers no other library draws alike (a comparison
replays batches, `benchmarks/torch_replay.py`), and the making of the patch memories, which come
with the weights.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RECALL = (0.5, 0.25)  # weights in the map's logits of distances at half the size, at a quarter
PATCH, STRIDE = 8, 2  # of their patches, in pixels of the image at half its size, or a quarter
COMPONENTS = 32  # principal components that stand for a patch


def add_coords(images: Tensor) -> Tensor:
    """Appends the two coordinate channels (row, column), each from -1 to 1: [b, c + 2, h, w]."""
    b, _, h, w = images.shape
    like = {"dtype": images.dtype, "device": images.device}
    rows, columns = torch.linspace(-1, 1, h, **like), torch.linspace(-1, 1, w, **like)
    coords = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    return torch.cat([images, coords.expand(b, 2, h, w)], dim=1)


def space_to_depth(x: Tensor) -> Tensor:
    """Folds each 2x2 square of pixels into channels: [b, 4 c, h/2, w/2].

    The channels of a pixel stay together: F.pixel_unshuffle has them in another order.
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
    """Draws a convolution's weights with variance `scale` / fan-in, cut off at 2 deviations."""
    fan_in = weight[0].numel()
    std = math.sqrt(scale / fan_in) / 0.8796256610342398  # what the cut-off takes away
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Conv(nn.Conv2d):
    """A convolution whose output is the input's size over the stride, rounded up.

    What must be padded with zeros is divided evenly; what is left over goes to bottom and right.
    """

    def __init__(
        self, inputs: int, outputs: int, size: int, *, stride: int = 1, bias: bool = True
    ) -> None:
        """Weights are drawn with variance 1 / fan-in; biases are 0."""
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
        if height == width == size - 1:  # even: what the convolution pads itself is cheaper
            return F.conv2d(x, self.weight, self.bias, stride, padding=size // 2)
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, self.weight, self.bias, stride)


class ConvBlock(nn.Module):
    """3x3 convolution, GroupNorm, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        """Weights are drawn with variance 2 / fan-in (He et al., arXiv 1502.01852)."""
        super().__init__()
        self.conv = Conv(inputs, outputs, 3, stride=stride, bias=False)
        truncated_normal(self.conv.weight, scale=2.0)
        self.norm = nn.GroupNorm(8, outputs, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, inputs, h, w] to [b, outputs, h / stride, w / stride]."""
        return F.leaky_relu(self.norm(self.conv(x)), 0.1)


def level_widths(width: int, depth: int) -> list[int]:
    """Channels at half the image's size, at a quarter ...: doubled up to eight times."""
    return [width * min(2**level, 8) for level in range(depth)]


class Reconstructor(nn.Module):
    """Draws the part as it should look, through a bottleneck without skip connections."""

    def __init__(self, inputs: int, width: int, depth: int, latent: int, outputs: int = 3) -> None:
        """`blocks` are those of the encoder, one at the bottom, those of the decoder; `convs` the
        bottleneck, what narrows before each enlargement, and the output."""
        super().__init__()
        self.depth = depth
        widths = level_widths(width, depth)
        up = widths[-2::-1]  # of the decoder: from the narrowest level to half the image's size
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
        bottleneck, *narrow, output = self.convs
        x = space_to_depth(x)
        for block in self.blocks[: self.depth]:
            x = block(x)
        x = bottleneck(x)  # [b, latent, h/2**depth, w/2**depth]
        x = self.blocks[self.depth](x)
        for conv, block in zip(narrow, self.blocks[self.depth + 1 :], strict=True):
            x = block(upsample(conv(x)))
        return depth_to_space(output(x)) + 0.5


class MapHead(nn.Module):
    """An encoder-decoder with skip connections that draws the anomaly map."""

    def __init__(self, inputs: int, width: int, depth: int, beside: int = 0) -> None:
        """`blocks`: the first, two at each further level, one at each level up; `convs`: what
        narrows before each enlargement, and the output."""
        super().__init__()
        self.depth = depth
        widths = level_widths(width, depth)
        up = widths[-2::-1]
        down = []
        for a, b in zip(widths, widths[1:], strict=False):
            down += [ConvBlock(a, b, stride=2), ConvBlock(b, b)]
        self.blocks = nn.ModuleList(
            [ConvBlock(4 * inputs + beside, widths[0])]
            + down
            + [ConvBlock(2 * features, features) for features in up]
        )
        self.convs = nn.ModuleList(
            [Conv(a, b, 1) for a, b in zip(widths[::-1], up, strict=False)]
            + [Conv(widths[0], 1, 3)]
        )
        # Starts at about 2 % anomalous, which is what a mask holds on average.
        nn.init.constant_(self.convs[-1].bias, -4.0)

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """Maps [b, inputs, h, w] to logits [b, h, w]; `beside` [b, k, h/2, w/2] is seen as well."""
        h, w = x.shape[2:]
        *narrow, output = self.convs
        x = space_to_depth(x)
        if beside is not None:
            x = torch.cat([x, beside], dim=1)
        x = self.blocks[0](x)
        skips, bottom = [], 2 * self.depth - 1
        for first, second in zip(self.blocks[1:bottom:2], self.blocks[2:bottom:2], strict=True):
            skips.append(x)
            x = second(first(x))
        for conv, block in zip(narrow, self.blocks[bottom:], strict=True):
            x = block(torch.cat([upsample(conv(x)), skips.pop()], dim=1))
        return resize(output(x)[:, 0], (h, w))


class PatchMemory(nn.Module):
    """How far each patch of an image is from the nearest of the good patches that it remembers.

    Buffers: nothing here is learned by gradients. `patches` hold principal components of patches
    without their mean and contrast, and their coordinates times `place`.
    """

    def __init__(self, size: int) -> None:
        """`size` patches; all is zero until weights are loaded."""
        super().__init__()
        values = 3 * PATCH**2
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("basis", torch.zeros(values, COMPONENTS))
        self.register_buffer("patches", torch.zeros(size, COMPONENTS + 2))
        self.register_buffer("source", torch.zeros(size))
        self.register_buffer("place", torch.zeros(()))
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("spread", torch.zeros(()))

    def describe(self, images: Tensor) -> Tensor:
        """Cuts images at half their size into patches: [b, h/4, w/4, PATCH * PATCH * 3]."""
        x = F.avg_pool2d(images, 2)
        b, c, h, w = x.shape
        before, after = PATCH // 2 - 1, PATCH // 2
        x = F.pad(x, (before, after, before, after), mode="reflect")
        x = x.unfold(2, PATCH, STRIDE).unfold(3, PATCH, STRIDE)  # [b, c, rows, columns, i, j]
        x = x[:, :, : math.ceil(h / STRIDE), : math.ceil(w / STRIDE)]
        x = x.permute(0, 2, 3, 4, 5, 1).flatten(3)
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.square().mean(dim=-1, keepdim=True).sqrt() + 0.1)

    def distances(self, x: Tensor, left_out: Tensor) -> Tensor:
        """Maps an image's patches [rows, columns, d] to their distances [rows, columns].

        `left_out` [size] are those of the memory that do not count.
        """
        like = {"dtype": x.dtype, "device": x.device}
        rows, columns = (torch.linspace(-1, 1, n, **like) for n in x.shape[:2])
        coords = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        x = x - self.mean
        code = x @ self.basis
        rest = x.square().sum(dim=-1) - code.square().sum(dim=-1)  # what the components leave over
        code = torch.cat([code, self.place * coords], dim=-1)
        known = self.patches.square().sum(dim=-1).masked_fill(left_out, torch.inf)
        products = torch.addmm(known, code.flatten(0, 1), self.patches.T, alpha=-2)
        squared = products.amin(dim=-1).view_as(rest)
        return (squared + code.square().sum(dim=-1) + rest).clamp(min=0).sqrt()

    @torch.no_grad()
    def forward(self, images: Tensor, marks: Tensor | None = None) -> Tensor:
        """Maps images [b, 3, h, w] to [b, h/4, w/4]: deviations above the mean of good patches.

        `marks` [b]: patches of the image itself do not count, unless there are no others.
        """
        own = images.new_full((len(images),), torch.nan) if marks is None else marks
        left_out = self.source == own[:, None]
        left_out &= ~left_out.all(dim=1, keepdim=True)
        # Image by image: every patch of a batch against all of the memory would be gigabytes.
        patches = self.describe(images)
        distances = torch.stack(
            [self.distances(*one) for one in zip(patches, left_out, strict=True)]
        )
        return ((distances - self.centre) / (self.spread + 1e-6)).clamp(-3, 10)


class Generator(nn.Module):
    """Puts out an anomaly map and a reconstruction of the image."""

    def __init__(
        self,
        *,
        width: int = 32,
        depth: int = 4,
        latent: int = 32,
        coords: bool = True,
        reconstruct: bool = True,
        memory: int = 0,
    ) -> None:
        """Attributes as of anoseg_jax.method.models.Generator."""
        super().__init__()
        self.coords = coords
        inputs = 3 + 2 * coords
        self.reconstructor = Reconstructor(inputs, width, depth, latent) if reconstruct else None
        self.map_head = MapHead(inputs + 6 * reconstruct, width, depth, beside=int(memory > 0))
        self.memory = PatchMemory(memory) if memory else None
        self.coarse_memory = PatchMemory(memory) if memory else None

    def forward(
        self, images: Tensor, marks: Tensor | None = None, *, recall: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Returns the map's logits [b, h, w] and the reconstruction [b, 3, h, w].

        The map head sees the distances of a memory; with `recall` they are added to what it says,
        and those of a second memory, of patches twice as large. Training does without, and says
        with `marks` [b] which images these are made of: the memory does not know them then.
        """
        h, w = images.shape[2:]
        x = 2 * images - 1
        x = add_coords(x) if self.coords else x
        reconstruction = images
        if self.reconstructor is not None:
            reconstruction = self.reconstructor(x)
            # The map is taught to read the reconstruction's errors, the reconstruction is not
            # taught to make errors that suit the map.
            seen = reconstruction.detach()
            x = torch.cat([x, 2 * seen - 1, 4 * (images - seen).abs()], dim=1)
        if self.memory is None:
            return self.map_head(x), reconstruction
        fine = self.memory(images, marks)
        logits = self.map_head(x, resize(fine, (h // 2, w // 2))[:, None])
        if recall:
            coarse = self.coarse_memory(F.avg_pool2d(images, 2))
            for distances, weight in zip((fine, coarse), RECALL, strict=True):
                logits = logits + weight * resize(distances, (h, w))
        return logits, reconstruction


class Discriminator(nn.Module):
    """Tells real (image, anomaly map) pairs from generated ones, patch by patch."""

    def __init__(self, *, width: int = 32, depth: int = 4, coords: bool = True) -> None:
        """Attributes as of anoseg_jax.method.models.Discriminator."""
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
        """Returns what each halving puts out, [b, c, h/2**k, w/2**k] for k from 1 to depth."""
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
    """Draws the pair of image and anomaly map as it would be of a good part."""

    def __init__(
        self, *, width: int = 32, depth: int = 4, latent: int = 32, coords: bool = True
    ) -> None:
        """Attributes as of anoseg_jax.method.models.Detector."""
        super().__init__()
        self.coords = coords
        self.reconstructor = Reconstructor(4 + 2 * coords, width, depth, latent, outputs=4)

    def forward(self, images: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns images [b, 3, h, w] and maps [b, h, w] after these, not clipped."""
        x = 2 * torch.cat([images, maps[:, None]], dim=1) - 1
        pair = self.reconstructor(add_coords(x) if self.coords else x)
        return pair[:, :3], pair[:, 3] - 0.5


def create(config: Mapping[str, Any]) -> tuple[Generator, Discriminator]:
    """Returns generator and discriminator for the options of a config.json."""
    model, loss = config["model"], config["loss"]
    generator = Generator(
        width=model["width"],
        depth=model["depth"],
        latent=model["latent"],
        coords=model["coords"],
        reconstruct=bool(loss["reconstruction_weight"] or loss["adversarial_weight"]),
        memory=model["memory"],
    )
    return generator, create_discriminator(config)


def create_discriminator(config: Mapping[str, Any]) -> Discriminator:
    """Returns the discriminator for the options of a config.json."""
    model = config["model"]
    return Discriminator(
        width=model["discriminator_width"],
        depth=model["discriminator_depth"],
        coords=model["coords"],
    )


def create_detector(config: Mapping[str, Any]) -> tuple[Detector, Discriminator]:
    """Returns the detector and its discriminator for the options of a config.json."""
    model, own = config["model"], config["detector"]
    detector = Detector(
        width=own["width"], depth=model["depth"], latent=own["latent"], coords=model["coords"]
    )
    return detector, create_discriminator(config)


def segmentation_loss(logits: Tensor, masks: Tensor, kind: str) -> Tensor:
    """The pixel-wise loss: mean of "l1", "bce", or "focal" (gamma 2, alpha 0.75, times 4)."""
    if kind == "l1":
        return (logits.sigmoid() - masks).abs().mean()
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    if kind == "bce":
        return entropy.mean()
    wrong = (-logits).sigmoid() * masks + logits.sigmoid() * (1 - masks)
    weight = 0.75 * masks + 0.25 * (1 - masks)
    return 4 * (weight * wrong**2 * entropy).mean()


def reconstruction_loss(reconstructions: Tensor, images: Tensor, masks: Tensor) -> Tensor:
    """Mean absolute error over the normal region, over that region's area in each image."""
    normal = 1 - masks
    error = (reconstructions - images).abs().mean(dim=1)
    return ((error * normal).sum(dim=(1, 2)) / normal.sum(dim=(1, 2)).clamp(min=1)).mean()


def adversarial_loss(fake_logits: Tensor, kind: str) -> Tensor:
    """The generator's side: -log D(fake) for "bce", or -D(fake) for "hinge"."""
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str) -> Tensor:
    """The discriminator's side."""
    if kind == "hinge":
        return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def training_losses(
    generator: Generator,
    discriminator: Discriminator,
    good: Tensor,
    defective: Tensor,
    masks: Tensor,
    marks: Tensor,
    loss: Mapping[str, Any],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns the losses of the generator and of the discriminator, and each term by name.

    `good` are images [b, 3, h, w], `defective` the same with synthetic defects, `masks` [b, h, w]
    where these are, `marks` [b] of the images that they are made of, `loss` the config's "loss".
    A term whose weight is zero is not computed.
    """
    logits, reconstructions = generator(defective, marks, recall=False)
    terms = {"loss_segmentation": segmentation_loss(logits, masks, loss["segmentation"])}
    total = loss["segmentation_weight"] * terms["loss_segmentation"]
    if loss["reconstruction_weight"]:
        terms["loss_reconstruction"] = reconstruction_loss(reconstructions, good, masks)
        total = total + loss["reconstruction_weight"] * terms["loss_reconstruction"]
    if not loss["adversarial_weight"]:
        return total, torch.zeros_like(total), terms
    # Real pairs: a good image and an empty map. Generated pairs: the reconstruction, and the map
    # where the image is good; where it is defective the map is right not to be empty.
    fake_logits = discriminator(reconstructions, logits.sigmoid() * (1 - masks))
    real_logits = discriminator(good, torch.zeros_like(masks))
    kind = loss["adversarial"]
    terms["loss_adversarial"] = adversarial_loss(fake_logits, kind)
    total = total + loss["adversarial_weight"] * terms["loss_adversarial"]
    terms["loss_discriminator"] = discriminator_loss(real_logits, fake_logits, kind)
    return total, terms["loss_discriminator"], terms


def learning_rate(step: int, config: Mapping[str, Any]) -> float:
    """The generator's learning rate after `step` steps: linear warm-up, then half a cosine."""
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
    """Returns the gradient of the loss by each parameter; the forward pass can be used again."""
    parameters = list(player.parameters())
    if not loss.requires_grad:  # no adversarial loss
        return [torch.zeros_like(parameter) for parameter in parameters]
    return list(torch.autograd.grad(loss, parameters, retain_graph=True))


class Training:
    """Both players, their optimizers, and the average of the generator's weights.

    Attributes:
      generator: trained by AdamW; its patch memories are buffers and stay as they are.
      discriminator: trained by Adam at a learning rate of its own.
      average: the generator with averaged weights, which are what is evaluated.
      steps: how many are done.
      gradients: those of the last step by player, before clipping.
    """

    def __init__(
        self, generator: Generator, discriminator: Discriminator, config: Mapping[str, Any]
    ) -> None:
        """`config` holds the options of a config.json."""
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

    def step(
        self, good: Tensor, defective: Tensor, masks: Tensor, marks: Tensor
    ) -> dict[str, Tensor]:
        """Updates both players from one forward pass; returns losses and gradient norms."""
        total, discriminator_total, terms = training_losses(
            self.generator, self.discriminator, good, defective, masks, marks, self.config["loss"]
        )
        players = {"generator": self.generator, "discriminator": self.discriminator}
        # Each player takes the gradient of its own loss by its own parameters.
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
        """Moves the average towards the weights: with a shorter memory at first."""
        decay = min(self.config["ema_decay"], (1 + self.steps) / (10 + self.steps))
        for old, new in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            old += (1 - decay) * (new - old)


@torch.no_grad()
def predict(
    generator: Generator, images: Tensor, *, top_fraction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns anomaly maps [b, h, w], image-level scores [b], reconstructions [b, 3, h, w].

    The score is how far the highest `top_fraction` of a map's logits stand out from their median.
    """
    logits, reconstructions = generator(images)
    flat = logits.flatten(1)
    count = max(1, round(top_fraction * flat.shape[1]))
    scores = flat.topk(count).values.mean(dim=1) - flat.quantile(0.5, dim=1)
    return logits.sigmoid(), scores, reconstructions.clamp(0, 1)


@torch.no_grad()
def detect(
    detector: Detector, discriminator: Discriminator, images: Tensor, maps: Tensor
) -> Tensor:
    """Returns the detector's image-level scores [b]: how far the observed pairs are from drawn ones
    in the discriminator's features."""
    observed = discriminator.features(images, maps)
    drawn = discriminator.features(*detector(images, maps))
    levels = [
        (a - b).square().mean(dim=(1, 2, 3)).sqrt() for a, b in zip(observed, drawn, strict=True)
    ]
    return torch.stack(levels).mean(dim=0)
