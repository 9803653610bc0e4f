"""The losses of AnoSeg: pixel-wise segmentation, adversarial, masked reconstruction.

All return a scalar: the mean over the examples of a value that depends on one example alone, so
that the mean over devices equals the value of the whole batch. Masks and maps are [b, h, w],
1 = anomalous; in the paper (arXiv 2110.03396) 1 = normal.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array


def segmentation_l1(*, logits: Array, masks: Array) -> Array:
    """Mean absolute difference of map and mask: the pixel-wise loss of the paper's family."""
    return jnp.mean(jnp.abs(jax.nn.sigmoid(logits) - masks))


def segmentation_bce(*, logits: Array, masks: Array) -> Array:
    """Mean binary cross-entropy of map and mask."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, masks))


def segmentation_focal(*, logits: Array, masks: Array) -> Array:
    """Mean focal loss (Lin et al., arXiv 1708.02002) with gamma = 2 and alpha = 0.75, times 4.

    Anomalous pixels have the weight alpha, normal ones 1 - alpha: anomalous ones are rare. The
    factor gives it the range of the other segmentation losses, so that all can share one weight.
    """
    return 4 * jnp.mean(optax.sigmoid_focal_loss(logits, masks, alpha=0.75, gamma=2.0))


def masked_reconstruction(*, reconstructions: Array, images: Array, masks: Array) -> Array:
    """Mean absolute error over the normal region, normalised by that region's area in each image.

    An image without a normal pixel counts as 0.
    """
    normal = 1.0 - masks  # [b, h, w]
    error = jnp.mean(jnp.abs(reconstructions - images), axis=-1)
    area = jnp.sum(normal, axis=(1, 2))
    return jnp.mean(jnp.sum(error * normal, axis=(1, 2)) / jnp.maximum(area, 1.0))


def adversarial_bce(*, fake_logits: Array) -> Array:
    """The generator's non-saturating loss: -log D(fake) (Goodfellow et al., arXiv 1406.2661)."""
    return jnp.mean(jax.nn.softplus(-fake_logits))


def discriminator_bce(*, real_logits: Array, fake_logits: Array) -> Array:
    """The discriminator's loss: -log D(real) - log(1 - D(fake))."""
    return jnp.mean(jax.nn.softplus(-real_logits)) + jnp.mean(jax.nn.softplus(fake_logits))


def adversarial_hinge(*, fake_logits: Array) -> Array:
    """The generator's side of the hinge loss (Lim and Ye, arXiv 1705.02894)."""
    return -jnp.mean(fake_logits)


def discriminator_hinge(*, real_logits: Array, fake_logits: Array) -> Array:
    """The discriminator's side of the hinge loss."""
    return jnp.mean(jax.nn.relu(1 - real_logits)) + jnp.mean(jax.nn.relu(1 + fake_logits))


# What `config.loss.segmentation` and `config.loss.adversarial` may name.
SEGMENTATION = {"l1": segmentation_l1, "bce": segmentation_bce, "focal": segmentation_focal}
ADVERSARIAL = {
    "bce": (adversarial_bce, discriminator_bce),
    "hinge": (adversarial_hinge, discriminator_hinge),
}


def adversarial(
    discriminator_fn: Callable[..., Array],
    params: Any,
    *,
    kind: str,
    fake: tuple[Array, Array],
    real: tuple[Array, Array],
) -> tuple[Array, Array]:
    """Returns the losses of the network that makes the fake pairs, and of the discriminator.

    `discriminator_fn` maps parameters, images [b, h, w, 3] and maps [b, h, w] to logits; `fake` and
    `real` are such pairs of images and maps.
    """
    network_side, discriminator_side = ADVERSARIAL[kind]
    fake_logits, real_logits = (discriminator_fn(params, *pair) for pair in (fake, real))
    return network_side(fake_logits=fake_logits), discriminator_side(
        real_logits=real_logits, fake_logits=fake_logits
    )
