"""The losses of AnoSeg: pixel-wise segmentation, adversarial, masked reconstruction.

All return a scalar: the mean over the examples of a value that depends on one example alone, so
that the mean over devices equals the value of the whole batch. Masks and maps are [b, h, w],
1 = anomalous; in the paper (arXiv 2110.03396) 1 = normal.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

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


def masked_l1(*, reconstructions: Array, images: Array, masks: Array) -> Array:
    """Mean absolute error over the normal region, normalised by that region's area in each image.

    The paper's loss. An image without a normal pixel counts as 0.
    """
    normal = 1.0 - masks  # [b, h, w]
    error = jnp.mean(jnp.abs(reconstructions - images), axis=-1)
    area = jnp.sum(normal, axis=(1, 2))
    return jnp.mean(jnp.sum(error * normal, axis=(1, 2)) / jnp.maximum(area, 1.0))


def network_loss(fake_logits: Array) -> Array:
    """The network's non-saturating loss: -log D(fake) (Goodfellow et al., arXiv 1406.2661)."""
    return jnp.mean(jax.nn.softplus(-fake_logits))


def discriminator_loss(
    *, real_logits: Array, fake_logits: Array, smoothing: Array | float
) -> Array:
    """The discriminator's binary cross-entropy, with targets of 1 - smoothing and smoothing.

    With smoothed labels (Salimans et al., arXiv 1606.03498) its logits do not grow without bound,
    also where it can tell every pair: with 0.1 they settle at about 2 and -2.
    """
    loss = jnp.mean(jax.nn.softplus(-real_logits)) + jnp.mean(jax.nn.softplus(fake_logits))
    return loss + smoothing * (jnp.mean(real_logits) - jnp.mean(fake_logits))


# What `config.loss.segmentation` may name.
SEGMENTATION = {"l1": segmentation_l1, "bce": segmentation_bce, "focal": segmentation_focal}

PENALTY_STEP = 0.05  # standard deviation of the noise of `gradient_penalty`


def penalty_noise(keys: Array, images: Array) -> Array:
    """Returns the normal noise [b, h, w, 4] of `gradient_penalty` for images and their maps."""
    shape = (*images.shape[1:3], 4)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def gradient_penalty(
    discriminator_fn: Callable[..., Array],
    pair: tuple[Array, Array],
    logits: Array,
    noise: Array,
) -> Array:
    """Returns the mean squared slope of the discriminator's logits along random directions.

    It estimates R1 (Mescheder et al., arXiv 1801.04406) by a difference instead of a second
    derivative (Lin et al., arXiv 2501.08316): a discriminator that always wins grows without bound,
    and so would its gradients. `logits` are those of the pair; `noise` is normal, [b, h, w, 4].
    """
    images, maps = pair
    moved = images + PENALTY_STEP * noise[..., :3], maps + PENALTY_STEP * noise[..., 3]
    return jnp.mean(jnp.square((discriminator_fn(*moved) - logits) / PENALTY_STEP))


def limit_gradients(gradients: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
    """Limits each example's gradients to the norm that a mean absolute error's would have.

    Takes the gradients by the network's outputs [b, ...] of a loss that is a mean over examples.
    Returns the limited ones, and the mean norm before, in units of the limit.
    """
    limited, norms = [], []
    for gradient in gradients:
        flat = gradient.reshape(len(gradient), -1)
        limit = 1 / (flat.shape[0] * flat.shape[1] ** 0.5)
        norm = jnp.sqrt(jnp.sum(jnp.square(flat), axis=1)) / limit
        factor = 1 / jnp.maximum(norm, 1.0)
        limited.append((flat * factor[:, None]).reshape(gradient.shape))
        norms.append(norm)
    return tuple(limited), jnp.mean(jnp.stack(norms))


class Adversarial(NamedTuple):
    """The adversarial loss; hashable.

    Attributes:
      limited: whether `limit_gradients` limits what the network learns from the discriminator.
      penalized: whether the discriminator's loss has the `gradient_penalty`.
    """

    limited: bool
    penalized: bool


def adversarial(
    discriminator_fn: Callable[..., Array],
    params: Any,
    *,
    form: Adversarial,
    fake: tuple[Array, Array],
    real: tuple[Array, Array],
    noise: Array | None,
    weights: Mapping[str, Array | float],
) -> tuple[Array, Array, dict[str, Array]]:
    """Returns what the network and the discriminator minimise, and the terms by name.

    `discriminator_fn` maps parameters, images [b, h, w, 3] and maps [b, h, w] to logits; `fake` and
    `real` are such pairs of images and maps; `noise` is that of `gradient_penalty`; `weights` has
    its weight, `gradient_penalty`, and `label_smoothing`.
    """
    fixed = jax.lax.stop_gradient(fake)
    network_fn = partial(discriminator_fn, jax.lax.stop_gradient(params))
    loss, gradients = jax.value_and_grad(lambda pair: network_loss(network_fn(*pair)))(fixed)
    limited, norm = limit_gradients(gradients)
    terms = {"loss_adversarial": loss, "gradient_norm_adversarial": norm}
    # A function of the fake pair whose gradients are these.
    chosen = limited if form.limited else gradients
    network_total = sum(
        jnp.sum(jax.lax.stop_gradient(gradient) * x)
        for gradient, x in zip(chosen, fake, strict=True)
    )

    own_fn = partial(discriminator_fn, params)
    fake_logits, real_logits = own_fn(*fixed), own_fn(*real)
    discriminator_total = discriminator_loss(
        real_logits=real_logits, fake_logits=fake_logits, smoothing=weights["label_smoothing"]
    )
    terms["loss_discriminator"] = discriminator_total
    if form.penalized:
        penalty = gradient_penalty(own_fn, fixed, fake_logits, noise)
        penalty += gradient_penalty(own_fn, real, real_logits, noise)
        terms["loss_penalty"] = penalty
        discriminator_total += weights["gradient_penalty"] * penalty
    return network_total, discriminator_total, terms
