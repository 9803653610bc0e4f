"""The losses and one training step in PyTorch, the same as in losses.py and train.py here.

Left out are the synthetic defects: no other library draws the same random numbers, so that a
comparison replays batches (torch_replay.py). The training step of the detector is left out, too.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_networks import Discriminator, Generator

Pair = tuple[Tensor, Tensor]  # images [b, 3, h, w] and maps [b, h, w]


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


def masked_l1(reconstructions: Tensor, images: Tensor, masks: Tensor) -> Tensor:
    """Returns the mean absolute error over the normal region of each image."""
    normal = 1 - masks
    error = (reconstructions - images).abs().mean(dim=1)
    return ((error * normal).sum(dim=(1, 2)) / normal.sum(dim=(1, 2)).clamp(min=1)).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, smoothing: float) -> Tensor:
    """Returns the binary cross-entropy with targets of 1 - smoothing and smoothing."""
    loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
    return loss + smoothing * (real_logits.mean() - fake_logits.mean())


def limit_gradients(gradients: Pair) -> tuple[Pair, Tensor]:
    """Scales each example's gradients down to the norm of those of a mean absolute error.

    Also returns the mean norm before, in units of that limit.
    """
    limited, norms = [], []
    for gradient in gradients:
        # Each of n numbers of a mean absolute error has the gradient 1 / n, or -1 / n.
        limit = math.sqrt(gradient[0].numel()) / gradient.numel()
        norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1) / limit
        scale = norm.clamp(min=1).reciprocal()
        limited.append(gradient * scale.view(-1, *[1] * (gradient.ndim - 1)))
        norms.append(norm)
    return (limited[0], limited[1]), torch.cat(norms).mean()


def gradient_penalty(
    discriminator: Discriminator, pair: Pair, logits: Tensor, noise: Tensor
) -> Tensor:
    """Returns the mean squared slope of the logits of `pair` along the normal noise [b, 4, h, w].

    The slope is a difference quotient over noise of standard deviation 0.05.
    """
    images, maps = pair
    moved_logits = discriminator(images + 0.05 * noise[:, :3], maps + 0.05 * noise[:, 3])
    return ((moved_logits - logits) / 0.05).square().mean()


def adversarial_losses(
    discriminator: Discriminator,
    fake: Pair,
    real: Pair,
    noise: Tensor | None,
    loss: Mapping[str, Any],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns what generator and discriminator minimise, and the terms by name.

    `noise` is that of `gradient_penalty`; `loss` are the options `config["loss"]`. With limited
    gradients the first value is not the loss: only its gradients have a meaning.
    """
    weight = loss["gradient_penalty"]
    fake_logits, real_logits = discriminator(*fake), discriminator(*real)
    generator_total = F.softplus(-fake_logits).mean()
    discriminator_total = discriminator_loss(real_logits, fake_logits, loss["label_smoothing"])
    gradients = torch.autograd.grad(generator_total, fake, retain_graph=True)
    limited, norm = limit_gradients(gradients)
    terms = {"loss_adversarial": generator_total, "gradient_norm_adversarial": norm}
    if loss["limit_adversarial"]:
        generator_total = sum(
            (gradient * x).sum() for gradient, x in zip(limited, fake, strict=True)
        )
    terms["loss_discriminator"] = discriminator_total
    if weight:
        fixed = (fake[0].detach(), fake[1].detach())
        penalty = gradient_penalty(discriminator, fixed, fake_logits, noise)
        penalty = penalty + gradient_penalty(discriminator, real, real_logits, noise)
        terms["loss_penalty"] = penalty
        discriminator_total = discriminator_total + weight * penalty
    return generator_total, discriminator_total, terms


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
        `masks` [b, h, w]; `image_ids` [b], for the leave-one-out distances to the memory bank; with
        a gradient penalty its `noise` [b, 4, h, w].
      loss: the options `config["loss"]`. A term whose weight is zero is not computed.
    """
    good, defective, masks = (examples[name] for name in ("good", "defective", "masks"))
    bank_distances = generator.bank_distances(defective, examples["image_ids"])
    logits, reconstructions = generator(defective, bank_distances)
    terms = {"loss_segmentation": segmentation_loss(logits, masks, loss["segmentation"])}
    total = loss["segmentation_weight"] * terms["loss_segmentation"]
    if loss["reconstruction_weight"]:
        terms["loss_reconstruction"] = masked_l1(reconstructions, good, masks)
        total = total + loss["reconstruction_weight"] * terms["loss_reconstruction"]
    if not loss["adversarial_weight"]:
        return total, torch.zeros_like(total), terms
    # Real pairs: a good image and an empty map. Generated pairs: the reconstruction, and the map
    # where the image is good; where it is defective the map should not be empty.
    adversarial, discriminator_total, adversarial_terms = adversarial_losses(
        discriminator,
        fake=(reconstructions, logits.sigmoid() * (1 - masks)),
        real=(good, torch.zeros_like(masks)),
        noise=examples.get("noise"),
        loss=loss,
    )
    total = total + loss["adversarial_weight"] * adversarial
    return total, discriminator_total, terms | adversarial_terms


def learning_rate(step: int, config: Mapping[str, Any]) -> float:
    """Returns the learning rate after `step` steps: linear warm-up, then half a cosine to zero."""
    peak, warmup = config["learning_rate"], config["warmup_steps"]
    if step < warmup:
        start = peak / (warmup + 1)
        return start + (peak - start) * step / warmup
    decay = max(config["num_steps"], warmup + 1) - warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(step - warmup, decay) / decay))


def clip(gradients: list[Tensor], largest: float) -> tuple[list[Tensor], Tensor]:
    """Scales a network's gradients down to a norm of at most `largest`; returns both.

    The norm is that of all of the network's gradients, before.
    """
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

    def networks(self) -> dict[str, nn.Module]:
        """Returns the networks whose gradients are clipped, each by itself, by name."""
        heads = {
            "reconstructor": self.generator.reconstructor,
            "anomaly_head": self.generator.map_head,
            "discriminator": self.discriminator,
        }
        return {name: network for name, network in heads.items() if network is not None}

    def step(self, examples: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Updates both players from one forward pass; returns losses and gradient norms.

        `examples` are those of `training_losses`.
        """
        total, discriminator_total, terms = training_losses(
            self.generator, self.discriminator, examples, self.config["loss"]
        )
        players = {"discriminator": self.discriminator, "generator": self.generator}
        totals = {"discriminator": discriminator_total, "generator": total}
        # Each player has the gradient of its own loss by its own parameters.
        self.gradients = {
            name: gradients_of(totals[name], player) for name, player in players.items()
        }
        for name, player in players.items():
            for parameter, gradient in zip(player.parameters(), self.gradients[name], strict=True):
                parameter.grad = gradient
        metrics = {name: value.detach() for name, value in terms.items()}
        for name, network in self.networks().items():
            parameters = list(network.parameters())
            clipped, norm = clip([p.grad for p in parameters], self.config["clip_norm"])
            metrics[f"gradient_norm_{name}"] = norm
            for parameter, gradient in zip(parameters, clipped, strict=True):
                parameter.grad = gradient
        rate = learning_rate(self.steps, self.config)
        rates = {"generator": rate, "discriminator": self.config["discriminator_scale"] * rate}
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = rates[name]
            optimizer.step()
        self.update_average()
        self.steps += 1
        return metrics

    @torch.no_grad()
    def update_average(self) -> None:
        """Updates the average of the weights; its time constant is shorter at first."""
        decay = min(self.config["ema_decay"], (1 + self.steps) / (10 + self.steps))
        for old, new in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            old += (1 - decay) * (new - old)
