"""Patch memories: patches, distances, which of them are kept and how much their place counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics

from anoseg_jax import memory


def test_patches_are_the_images_own_without_mean_and_contrast():
    image = jax.random.uniform(jax.random.key(0), (1, 32, 48, 3))
    found, coords = memory.describe_patches(image, patch=4, stride=2)
    assert found.shape == (1, 8, 12, 4 * 4 * 3) and coords.shape == (8, 12, 2)
    np.testing.assert_array_equal(coords[[0, -1], [0, -1]], [[-1, -1], [1, 1]])
    half = np.asarray(image).reshape(16, 2, 24, 2, 3).mean((1, 3))
    # The patch of row 2, column 3 starts at half a patch, less one, before pixel (4, 6).
    patch = half[4 - 1 : 4 + 3, 6 - 1 : 6 + 3].ravel()
    expected = (patch - patch.mean()) / (patch.std() + 0.1)
    np.testing.assert_allclose(found[0, 2, 3], expected, atol=1e-5)


def test_distances_are_to_the_nearest_remembered_patch():
    images = jax.random.uniform(jax.random.key(0), (6, 32, 32, 3))
    options = {"components": 5, "patch": 4, "stride": 2}
    known = memory.remember_patches(jax.random.key(1), images, size=40, coords=True, **options)
    centre, spread = known.pop("centre"), known.pop("spread")
    assert known["patches"].shape == (40, 7) and centre > 0 and spread > 0
    x, coords = memory.describe_patches(images[:1], patch=4, stride=2)
    x = np.asarray(x - known["mean"])
    code = x @ known["basis"]
    rest = (x**2).sum(-1) - (code**2).sum(-1)
    place = np.broadcast_to(known["place"] * coords, (*x.shape[:3], 2))
    code = np.concatenate([code, place], -1)
    every = ((code[..., None, :] - known["patches"]) ** 2).sum(-1)
    expected = np.sqrt(every.min(-1) + rest)
    found = memory.patch_distances(known, images[:1], patch=4, stride=2)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_distinct_patches_are_not_drawn_twice_and_no_more_than_there_are():
    images = jax.random.uniform(jax.random.key(0), (3, 32, 48, 3))
    for size, drawn in ((50, 50), (9999, 3 * 8 * 12)):
        known = memory.remember_patches(
            jax.random.key(1), images, size=size, coords=True, distinct=True
        )
        assert len(np.unique(known["patches"], axis=0)) == len(known["patches"]) == drawn


def test_a_memory_that_is_thinned_out_keeps_the_patches_that_are_far_from_each_other():
    patches = jnp.array([[0.0, 0], [0, 1], [0, 1.1], [9, 0], [9, 0.5], [4, 0]])
    kept = memory.thin_out({"patches": patches, "place": jnp.ones(())}, 4)
    assert kept["place"] == 1
    # From the first on: 9.01 away from it, then 4 from both, then 1.1.
    np.testing.assert_array_equal(kept["patches"], patches[jnp.array([0, 4, 5, 2])])


def test_average_precision_is_scikit_learns_and_leaves_out_what_is_not_labelled():
    rng = np.random.default_rng(0)
    scores, labels = rng.random(200), rng.integers(-1, 2, 200)
    counted = labels >= 0
    expected = metrics.average_precision_score(labels[counted], scores[counted])
    assert memory.average_precision(jnp.asarray(scores), jnp.asarray(labels)) == pytest.approx(
        expected, abs=1e-5
    )
    assert memory.average_precision(jnp.asarray(scores), jnp.zeros(200)) == 0


@pytest.mark.parametrize("aligned", [True, False])
def test_the_place_of_a_patch_counts_where_all_parts_lie_alike(aligned):
    """Defects are pieces from elsewhere where parts lie alike, mirrored ones where they do not."""
    rng = np.random.default_rng(0)
    part = ndimage.gaussian_filter(rng.random((32, 32, 3)), (1.5, 1.5, 0), mode="wrap")
    part = (part - part.min()) / (part.max() - part.min())
    shifts = np.zeros((64, 2), int) if aligned else rng.integers(0, 32, (64, 2))
    good = np.stack([np.roll(part, tuple(shift), axis=(0, 1)) for shift in shifts])
    good = np.clip(good + 0.02 * rng.standard_normal(good.shape), 0, 1).astype(np.float32)
    masks = np.zeros((64, 32, 32), np.float32)
    masks[:, 8:20, 2:14] = 1
    elsewhere = np.roll(good, 12, axis=1) if aligned else good[:, :, ::-1]
    defective = np.where(masks[..., None] == 1, elsewhere, good)
    options = {"components": 16, "patch": memory.PATCH, "stride": memory.STRIDE}
    known = memory.remember_patches(
        jax.random.key(0), jnp.asarray(good[:48]), size=600, coords=True, **options
    )
    weight = memory.choose_place(known, good[48:], defective[48:], masks[48:])
    assert (weight >= 1) == aligned
    weighed = memory.calibrate(memory.weigh_place(known, weight), good[48:])
    np.testing.assert_allclose(weighed["place"], weight * known["place"])
    np.testing.assert_allclose(weighed["patches"][:, -2:], weight * known["patches"][:, -2:])
    np.testing.assert_allclose(
        memory.patch_distances(weighed, good[48:]).mean(), weighed["centre"], rtol=1e-4
    )
