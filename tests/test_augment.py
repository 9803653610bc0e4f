"""Augmentation of good parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from anoseg_jax.method import augment

IMAGE = jax.random.uniform(jax.random.key(0), (9, 9, 3))


def test_nothing_is_changed_when_all_is_off():
    np.testing.assert_array_equal(augment.augment(jax.random.key(0), IMAGE), IMAGE)


def test_warp_without_angle_and_offset_is_the_identity():
    same = augment.warp(IMAGE, jnp.zeros(()), jnp.zeros(2))
    np.testing.assert_allclose(same, IMAGE, atol=1e-6)


def test_warp_by_a_quarter_turn_is_rot90():
    turned = augment.warp(IMAGE, jnp.deg2rad(90.0), jnp.zeros(2))
    quarter_turns = [np.rot90(IMAGE, k) for k in (1, 3)]
    assert min(np.max(np.abs(turned - expected)) for expected in quarter_turns) < 1e-4


def test_warp_shifts_down_and_right_and_repeats_the_edge():
    shifted = augment.warp(IMAGE, jnp.zeros(()), jnp.array([2.0, 1.0]))
    np.testing.assert_allclose(shifted[2:, 1:], IMAGE[:-2, :-1], atol=1e-6)
    np.testing.assert_allclose(shifted[0, 1:], IMAGE[0, :-1], atol=1e-6)


def test_flips_give_the_four_mirror_images_and_no_other():
    flip = jax.jit(partial(augment.augment, flip_horizontal=True, flip_vertical=True))
    drawn = {
        np.asarray(flip(key, IMAGE)).tobytes() for key in jax.random.split(jax.random.key(1), 40)
    }
    mirrored = [IMAGE, IMAGE[::-1], IMAGE[:, ::-1], IMAGE[::-1, ::-1]]
    assert drawn == {np.asarray(image).tobytes() for image in mirrored}


def test_brightness_scales_within_its_bounds_and_stays_in_range():
    change = jax.jit(partial(augment.augment, brightness=0.2))
    gains = []
    for key in jax.random.split(jax.random.key(1), 40):
        image = change(key, 0.5 * IMAGE)
        gains.append(float(image[0, 0, 0] / (0.5 * IMAGE[0, 0, 0])))
        assert np.max(image) <= 1
    assert 0.8 <= min(gains) < 0.9 and 1.1 < max(gains) <= 1.2
