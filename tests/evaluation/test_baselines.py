"""Trivial baselines against numbers worked by hand."""

import numpy as np
import pytest

from anoseg_jax.evaluation import baselines


def flat(*values, side=8):
    """Returns an image of one value each, uint8 [n, side, side, 3]."""
    return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, side, side, 3), np.uint8)


def test_smoothing_is_two_pixels_at_128_and_in_proportion():
    for side, sigma in ((128, 2.0), (64, 1.0)):
        point = np.zeros((side, side))
        point[side // 2, side // 2] = 1
        smoothed = baselines.smooth(point).sum(axis=0)
        distance = np.arange(side) - side // 2
        assert smoothed.sum() == pytest.approx(1, abs=1e-5)
        assert np.sum(smoothed * distance**2) == pytest.approx(sigma**2, rel=0.01)


def test_distance_to_the_mean_image_by_hand():
    test = flat(110, 161)
    test[0, 4, 4] = (161, 110, 110)
    maps = baselines.distance_to_mean(flat(100, 120), test)
    # At 8x8 smoothing does nothing: its sigma is an eighth of a pixel.
    assert maps[0, 4, 4] == pytest.approx(0.2**2 / 3)
    assert maps[0].sum() == pytest.approx(0.2**2 / 3)
    np.testing.assert_allclose(maps[1], 0.2**2, rtol=1e-5)


def test_z_score_by_hand_and_its_floor():
    np.testing.assert_allclose(baselines.z_score(flat(100, 120), flat(161)), 5.1, rtol=1e-5)
    np.testing.assert_allclose(baselines.z_score(flat(110, 110), flat(161)), 10, rtol=1e-5)


def test_pca_of_patches_by_hand():
    # Of flat images the one component is the flat patch: a bump of 1 keeps 1/64 of it everywhere.
    test = flat(50, 10)
    test[0, 2, 3] += 64
    maps = baselines.pca_patches(flat(20, 40, 200), test)
    expected = np.full((8, 8), (1 / 255) ** 2)
    expected[2, 3] = (63 / 255) ** 2
    np.testing.assert_allclose(maps[0], expected, rtol=1e-3)
    np.testing.assert_allclose(maps[1], 0, atol=1e-9)
    # Images that are all alike have no component: what is left is the distance to them.
    np.testing.assert_allclose(baselines.pca_patches(flat(20, 20), flat(71)), 0.04, rtol=1e-4)


def test_patches_cover_every_pixel_and_detect_an_outlier():
    rng = np.random.default_rng(0)
    train = rng.integers(90, 110, (4, 37, 21, 3), np.uint8)
    test = rng.integers(90, 110, (1, 37, 21, 3), np.uint8)
    test[0, 36, 20] = 255  # the last pixel of a size that no stride fits
    for baseline in baselines.BASELINES.values():
        maps = baseline(train, test)
        assert maps.shape == (1, 37, 21) and maps.dtype == np.float32
        assert np.unravel_index(maps.argmax(), maps.shape) == (0, 36, 20)
        assert baseline(train[:1], test[:0]).shape == (0, 37, 21)
