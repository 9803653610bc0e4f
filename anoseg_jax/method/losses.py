"""The losses of AnoSeg: pixel-wise segmentation, adversarial, masked reconstruction.

All return a scalar: the mean over the examples of a value that depends on one example alone, so
that the mean over devices equals the value of the whole batch. Masks and maps are [b, h, w],
1 = anomalous; the paper's masks are the other way round.
"""

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


def segmentation_focal(*, logits: Array, masks: Array, alpha: float = 0.75) -> Array:
    """Mean focal loss with gamma = 2 (Lin et al., arXiv 1708.02002), scaled by 4.

    `alpha` is the weight of the anomalous pixels, 1 - alpha that of the normal ones. The scale puts
    it in the range of the other segmentation losses, so that they can share one weight.
    """
    return 4 * jnp.mean(optax.sigmoid_focal_loss(logits, masks, alpha=alpha, gamma=2.0))


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
