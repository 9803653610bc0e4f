"""Losses against numbers worked by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anoseg_jax.method import losses

# Two pixels: logit 0 (map 1/2) under mask 1, logit log 3 (map 3/4) under mask 0.
LOGITS = jnp.array([[[0.0, jnp.log(3.0)]]])
MASKS = jnp.array([[[1.0, 0.0]]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", (1 / 2 + 3 / 4) / 2),
        ("bce", (np.log(2) + np.log(4)) / 2),
        # 4 * mean of (0.75 (1/2)^2 log 2, 0.25 (3/4)^2 log 4)
        ("focal", 4 * (0.75 * np.log(2) / 4 + 0.25 * 9 / 16 * np.log(4)) / 2),
    ],
)
def test_segmentation_losses_by_hand(name, expected):
    loss = losses.SEGMENTATION[name](logits=LOGITS, masks=MASKS)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("name", losses.SEGMENTATION)
def test_a_right_map_costs_less_than_a_wrong_one(name):
    masks = jnp.array([[[1.0, 0.0]]])
    right = losses.SEGMENTATION[name](logits=jnp.array([[[8.0, -8.0]]]), masks=masks)
    wrong = losses.SEGMENTATION[name](logits=jnp.array([[[-8.0, 8.0]]]), masks=masks)
    assert 0 <= right < 0.01 < wrong


def test_reconstruction_is_the_mean_error_of_the_normal_pixels_of_each_image():
    images = jnp.zeros((3, 1, 2, 3))
    reconstructions = images.at[0, 0, 0].set(0.3).at[0, 0, 1].set(0.9).at[1].set(0.2).at[2].set(5.0)
    # Image 0: the second pixel is defective. Image 1: none is. Image 2: both are, and count as 0.
    masks = jnp.array([[[0.0, 1.0]], [[0.0, 0.0]], [[1.0, 1.0]]])
    loss = losses.masked_l1(reconstructions=reconstructions, images=images, masks=masks)
    np.testing.assert_allclose(loss, (0.3 + 0.2 + 0.0) / 3, rtol=1e-6)


def test_gradients_are_limited_to_those_of_a_mean_absolute_error_for_each_example():
    error = lambda x: jnp.mean(jnp.abs(x))  # noqa: E731
    at = jnp.array([[[1.0, -2.0]], [[3.0, 1.0]]])
    gradient = jax.grad(error)(at)
    factors = jnp.array([0.5, 4.0])[:, None, None]
    (limited,), norm = losses.limit_gradients((factors * gradient,))
    np.testing.assert_allclose(limited, gradient * jnp.array([0.5, 1.0])[:, None, None], rtol=1e-6)
    np.testing.assert_allclose(norm, (0.5 + 4.0) / 2, rtol=1e-6)


def test_the_penalty_of_a_linear_discriminator_is_its_squared_slope():
    slope = jnp.array([0.5, -1.0, 2.0, 3.0])
    linear = lambda images, maps: images @ slope[:3] + maps * slope[3]  # noqa: E731
    images = jax.random.uniform(jax.random.key(0), (1, 64, 64, 3))
    noise = jax.random.normal(jax.random.key(1), (1, 64, 64, 4))
    pair = images, images[..., 0]
    penalty = losses.gradient_penalty(linear, pair, linear(*pair), noise)
    np.testing.assert_allclose(penalty, jnp.sum(slope**2), rtol=0.1)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("penalized", [False, True])
def test_each_side_of_the_game_gets_the_gradient_of_its_own_loss(limited, penalized):
    form = losses.Adversarial(limited, penalized)
    fake = jnp.full((2, 2, 2, 3), 0.2), jnp.full((2, 2, 2), 0.7)
    real = jnp.full((2, 2, 2, 3), 0.4), jnp.zeros((2, 2, 2))
    linear = lambda w, images, maps: w[0] * images.mean(-1) + w[1] * maps  # noqa: E731
    options = {"gradient_penalty": 0.5, "label_smoothing": 0.1}
    weights, noise = jnp.array([5.0, -7.0]), jax.random.normal(jax.random.key(0), (2, 2, 2, 4))

    def both(weights, fake):
        return losses.adversarial(
            linear, weights, form=form, fake=fake, real=real, noise=noise, weights=options
        )[:2]

    of_network = jax.grad(lambda *x: both(*x)[0], argnums=(0, 1))(weights, fake)
    of_discriminator = jax.grad(lambda *x: both(*x)[1], argnums=(0, 1))(weights, fake)
    loss = lambda pair: losses.network_loss(linear(weights, *pair))  # noqa: E731
    expected = jax.grad(loss)(fake)
    expected = losses.limit_gradients(expected)[0] if limited else expected
    np.testing.assert_allclose(of_network[1][1], expected[1], rtol=1e-5)
    assert not np.any(of_network[0]) and not np.any(of_discriminator[1][0])

    def discriminator_loss(weights):
        pairs = [partial(linear, weights)(*pair) for pair in (fake, real)]
        value = losses.discriminator_loss(fake_logits=pairs[0], real_logits=pairs[1], smoothing=0.1)
        for pair, logits in zip((fake, real), pairs, strict=True):
            value += (
                penalized
                * 0.5
                * losses.gradient_penalty(partial(linear, weights), pair, logits, noise)
            )
        return value

    np.testing.assert_allclose(
        of_discriminator[0], jax.grad(discriminator_loss)(weights), rtol=1e-5
    )


def test_adversarial_losses_by_hand():
    real, fake = jnp.array([jnp.log(3.0)]), jnp.array([-jnp.log(3.0)])  # D says 3/4 and 1/4
    np.testing.assert_allclose(losses.network_loss(fake), -np.log(1 / 4), rtol=1e-6)
    of_discriminator = partial(losses.discriminator_loss, real_logits=real, fake_logits=fake)
    np.testing.assert_allclose(of_discriminator(smoothing=0.0), -2 * np.log(3 / 4), rtol=1e-6)
    expected = -2 * (0.9 * np.log(3 / 4) + 0.1 * np.log(1 / 4))
    np.testing.assert_allclose(of_discriminator(smoothing=0.1), expected, rtol=1e-6)
