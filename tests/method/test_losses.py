"""Losses against numbers worked by hand."""

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
    loss = losses.masked_reconstruction(reconstructions=reconstructions, images=images, masks=masks)
    np.testing.assert_allclose(loss, (0.3 + 0.2 + 0.0) / 3, rtol=1e-6)


def test_adversarial_losses_by_hand():
    real, fake = jnp.array([jnp.log(3.0)]), jnp.array([-jnp.log(3.0)])  # D says 3/4 and 1/4
    for name, generator, discriminator in (
        ("bce", -np.log(1 / 4), -2 * np.log(3 / 4)),
        ("hinge", np.log(3), 0.0),
    ):
        of_generator, of_discriminator = losses.ADVERSARIAL[name]
        np.testing.assert_allclose(of_generator(fake_logits=fake), generator, rtol=1e-6)
        np.testing.assert_allclose(
            of_discriminator(real_logits=real, fake_logits=fake), discriminator, atol=1e-6
        )
    wrong = losses.discriminator_hinge(real_logits=jnp.array([0.5]), fake_logits=jnp.array([0.5]))
    np.testing.assert_allclose(wrong, 0.5 + 1.5)
