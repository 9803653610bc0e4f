"""Maps and scores of the networks of torch_networks.py, the same as predict.py here."""

import torch
from torch import Tensor
from torch_networks import Detector, Discriminator, Generator, resize


def generator_logits(
    generator: Generator, images: Tensor, image_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the logits of the anomaly maps [b, h, w] and the reconstructions [b, 3, h, w].

    The weighted distances to both scales of the memory bank are added to what the head predicts.
    They are leave-one-out with the `image_ids` of images that may be in the bank.
    """
    distances = generator.bank_distances(images, image_ids)
    logits, reconstructions = generator(images, distances)
    if distances is not None:
        fine, coarse = resize(distances, tuple(logits.shape[1:])).unbind(1)
        logits = logits + generator.distance_weights[0] * fine
        logits = logits + generator.distance_weights[1] * coarse
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

    `images` are [b, 3, h, w] in [0, 1], of any brightness. The scores are `peak_over_median`;
    `top_fraction` is `config["evaluate"]["top_fraction"]`.
    """
    logits, reconstructions = generator_logits(generator, generator.match_brightness(images))
    scores = peak_over_median(logits, top_fraction)
    return logits.sigmoid(), scores, reconstructions.clamp(0, 1)


@torch.no_grad()
def detect(
    generator: Generator,
    detector: Detector,
    discriminator: Discriminator,
    images: Tensor,
    maps: Tensor,
) -> Tensor:
    """Returns the image-level detector's scores [b].

    A score is the distance of the observed pair from the reconstructed one in the discriminator's
    features. `images` and `maps` are those of `predict` with this generator.
    """
    images = generator.match_brightness(images)
    observed = discriminator.features(images, maps)
    reconstructed = discriminator.features(*detector(images, maps))
    levels = [
        (a - b).square().mean(dim=(1, 2, 3)).sqrt()
        for a, b in zip(observed, reconstructed, strict=True)
    ]
    return torch.stack(levels).mean(dim=0)
