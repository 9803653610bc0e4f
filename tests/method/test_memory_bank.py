"""The memory bank: its patches, its coreset, leave-one-out distances, and how it is calibrated."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from anoseg_jax.images import batches
from anoseg_jax.interop import torch_weights
from anoseg_jax.method import memory_bank, models, predict
from anoseg_jax.method.memory_bank import PatchBank, PatchGrid

GRID = PatchGrid(patch=8, stride=2)
OPTIONS = {
    "size": 64,
    "patch": GRID.patch,
    "stride": GRID.stride,
    "components": 8,
    "candidates_per_patch": 4,
    "num_bank_images": 8,
    "position_weight": 1.0,
}
distances = jax.jit(memory_bank.distances, static_argnames="grid")


def smooth_images(count, seed=0, size=(32, 32)):
    noise = np.random.default_rng(seed).normal(size=(count, *size, 3))
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2, 0), mode="wrap")
    return np.clip(128 + 300 * smooth + 4 * noise, 0, 255).astype(np.uint8)


IMAGES = smooth_images(9)


def as_float(images):
    return images.astype(np.float32) / 255


def build(images, image_ids=None, *, seed=0, **options):
    image_ids = batches.assign_image_ids(images) if image_ids is None else image_ids
    return memory_bank.build(images, image_ids, seed=seed, options=OPTIONS | options)


@pytest.fixture(scope="module")
def bank():
    return build(IMAGES)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_descriptors_are_the_images_own_pixels_without_mean_and_contrast():
    image = jax.random.uniform(jax.random.key(0), (1, 32, 48, 3))
    descriptors, positions = memory_bank.embed_patches(image, PatchGrid(patch=4, stride=2))
    assert descriptors.shape == (1, 8, 12, 4 * 4 * 3) and positions.shape == (8, 12, 2)
    np.testing.assert_array_equal(positions[[0, -1], [0, -1]], [[-1, -1], [1, 1]])
    half = np.asarray(image).reshape(16, 2, 24, 2, 3).mean((1, 3))
    # The patch of row 2, column 3 starts at half a patch, less one, before pixel (4, 6).
    patch = half[4 - 1 : 4 + 3, 6 - 1 : 6 + 3].ravel()
    expected = (patch - patch.mean()) / (patch.std() + 0.1)
    np.testing.assert_allclose(descriptors[0, 2, 3], expected, atol=1e-5)


def test_patches_of_any_side_cover_the_image_in_steps_of_the_stride():
    image = jnp.zeros((1, 32, 48, 3))
    for patch, stride in ((2, 1), (7, 4), (8, 4)):
        x, positions = memory_bank.embed_patches(image, PatchGrid(patch, stride))
        assert x.shape == (1, 16 // stride, 24 // stride, patch * patch * 3)
        assert positions.shape == (16 // stride, 24 // stride, 2)


def test_distances_are_to_the_nearest_patch_of_the_bank(bank):
    fine, images = bank.fine, as_float(smooth_images(2, seed=5))
    x, positions = memory_bank.embed_patches(images, GRID)
    x = np.asarray(x - fine.mean)
    code = x @ fine.basis
    rest = (x**2).sum(-1) - (code**2).sum(-1)  # what the principal components leave out
    positions = np.broadcast_to(fine.position_scale * positions, (*x.shape[:3], 2))
    code = np.concatenate([code, positions], axis=-1)
    to_each = ((code[..., None, :] - fine.patches) ** 2).sum(-1)
    expected = np.sqrt(to_each.min(-1) + rest)
    np.testing.assert_allclose(distances(fine, images, grid=GRID), expected, rtol=1e-3)


def test_standardized_distances_are_in_standard_deviations_and_clipped(bank):
    images = as_float(IMAGES[:3]) + np.linspace(0, 3, 32)[:, None, None] * np.eye(32)[..., None]
    raw = np.asarray(distances(bank.fine, images, grid=GRID))
    result = memory_bank.standardized_distances(bank.fine, images, grid=GRID)
    expected = (raw - bank.fine.distance_mean) / bank.fine.distance_std
    expected = memory_bank.mean_over_patches(np.clip(expected, *memory_bank.CLIP), GRID)
    np.testing.assert_allclose(result, expected, atol=1e-3)
    narrow = bank.fine.replace(distance_std=np.float32(1e-3))
    result = memory_bank.standardized_distances(narrow, images, grid=GRID)
    assert (result.min(), result.max()) == memory_bank.CLIP


@pytest.mark.parametrize(("patch", "stride"), [(5, 1), (4, 1), (8, 2)])
def test_distances_are_averaged_over_the_patches_that_contain_a_pixel(patch, stride):
    grid = PatchGrid(patch, stride)
    image = np.zeros((1, 64, 64, 3), np.float32)
    image[0, 32:34, 20:22] = 1  # one pixel at half size
    # Which patches see it: their descriptors are not those of a plain image.
    descriptors, _ = memory_bank.embed_patches(image, grid)
    sees = np.abs(descriptors).max(axis=-1)
    result = np.asarray(memory_bank.mean_over_patches((sees > 0).astype(np.float32), grid))
    assert result.max() == pytest.approx(1) and np.isclose(result, 1).sum() == 1
    assert np.argwhere(np.isclose(result[0], 1)).tolist() == [[16 // stride, 10 // stride]]


def test_the_bank_has_the_shapes_of_its_template(bank):
    expected = memory_bank.template(OPTIONS)
    shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shape(bank) == shape(expected)


def test_the_patches_are_those_of_the_image_that_their_id_names(bank):
    plain = memory_bank.to_float(IMAGES, bank.brightness)
    for scale, images in ((bank.fine, plain), (bank.coarse, memory_bank.halve(plain))):
        x, positions = memory_bank.embed_patches(images, GRID)
        code = np.asarray((x - scale.mean) @ scale.basis)
        positions = np.broadcast_to(scale.position_scale * positions, (*x.shape[:3], 2))
        code = np.concatenate([code, positions], axis=-1).reshape(len(IMAGES), -1, 10)
        for patch, image_id in zip(scale.patches, scale.patch_image_ids, strict=True):
            nearest = np.abs(code[image_id] - patch).max(axis=-1).min()
            np.testing.assert_allclose(nearest, 0, atol=1e-3)
        assert len(np.unique(scale.patch_image_ids)) > 1
    assert len(np.unique(bank.fine.patches, axis=0)) == OPTIONS["size"]  # none is in it twice


def test_photographs_of_another_exposure_become_as_bright_as_the_good_images(bank):
    assert bank.brightness == pytest.approx(IMAGES.mean() / 255, rel=1e-6)
    dark = np.full((3, 4, 4, 3), 0.1, np.float32)
    dark[1, :2] = 0.3
    dark[2] = 0.9
    bright = memory_bank.match_brightness(jnp.asarray(dark), 0.4)
    # Means of 0.1, 0.2, 0.9. Factors: 4, limited to 2; 2; 0.44, limited to 0.5.
    np.testing.assert_allclose(bright[0], 0.2, rtol=1e-5)
    np.testing.assert_allclose(bright[1, ::2, 0, 0], [0.6, 0.2], rtol=1e-5)
    np.testing.assert_allclose(bright[2], 0.45, rtol=1e-5)
    clipped = memory_bank.match_brightness(jnp.asarray(dark[1:2]) * 3, 0.9)
    np.testing.assert_allclose(clipped[0, ::2, 0, 0], [1.0, 0.45], rtol=1e-5)  # of 1.35, 0.45
    assert np.isfinite(memory_bank.match_brightness(jnp.zeros((1, 2, 2, 3)), 0.5)).all()
    np.testing.assert_array_equal(memory_bank.to_float(IMAGES, None), as_float(IMAGES))


def test_equal_images_share_the_id_of_the_first():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    images[3] = images[1]
    images[4] = images[1]
    images[4, 2, 2, 0] ^= 1
    images[5] = images[1][:, ::-1]
    ids = batches.assign_image_ids(images)
    assert ids.tolist() == [0, 1, 2, 1, 4, 5] and ids.dtype == np.int32


@given(
    contents=st.lists(st.integers(0, 12), min_size=1, max_size=40),
    num_images=st.integers(4, 30),
    seed=st.integers(0, 1000),
)
def test_no_image_is_in_both_the_bank_and_its_calibration(contents, num_images, seed):
    """The split comes before images are repeated or left out; copies are on the same side."""
    images = np.array(contents, np.uint8)[:, None, None, None]
    ids = batches.assign_image_ids(images)
    split = partial(memory_bank.split_bank_images, ids, num_images=num_images, seed=seed)
    in_bank, in_calibration = split()
    assert len(in_bank) + len(in_calibration) == num_images
    assert len(in_calibration) == num_images // 4
    sides = set(ids[in_bank]), set(ids[in_calibration])
    num_distinct = len(set(contents))
    if num_distinct == 1:
        assert sides[0] == sides[1] == {0}
        return
    assert not sides[0] & sides[1]
    assert len(sides[1]) == min(max(1, num_distinct // 4), num_images // 4)
    if num_distinct <= num_images // 4:  # there is room for all of them
        assert sides[0] | sides[1] == set(ids)
    for rows in (in_bank, in_calibration):
        counts = np.unique(rows, return_counts=True)[1]
        assert counts.max() - counts.min() <= 1
    for one, other in zip(split(), (in_bank, in_calibration), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_split_depends_on_the_seed():
    splits = {
        tuple(memory_bank.split_bank_images(np.arange(40), num_images=40, seed=seed)[1])
        for seed in range(5)
    }
    assert len(splits) == 5


def test_calibration_is_of_images_that_are_not_in_the_bank(bank):
    ids = batches.assign_image_ids(IMAGES)
    in_bank, in_calibration = memory_bank.split_bank_images(
        ids, num_images=OPTIONS["num_bank_images"], seed=0
    )
    plain = memory_bank.to_float(IMAGES[in_calibration], bank.brightness)
    for scale, images in ((bank.fine, plain), (bank.coarse, memory_bank.halve(plain))):
        assert set(scale.patch_image_ids) <= set(ids[in_bank])
        raw = np.asarray(distances(scale, images, grid=GRID))
        np.testing.assert_allclose(scale.distance_mean, raw.mean(), rtol=1e-5)
        np.testing.assert_allclose(scale.distance_std, raw.std(), rtol=1e-5)


@pytest.mark.parametrize("copies", [1, 3])
def test_one_image_alone_is_calibrated_by_its_own_patches_leave_one_out(copies):
    images = np.repeat(IMAGES[:1], copies, axis=0)
    bank = build(images)
    for scale in (bank.fine, bank.coarse):
        patches = np.unique(scale.patches, axis=0)
        to_each = np.linalg.norm(patches[:, None] - patches, axis=-1)
        np.fill_diagonal(to_each, np.inf)
        assert scale.distance_std > 0
        np.testing.assert_allclose(scale.distance_mean, to_each.min(axis=1).mean(), rtol=1e-3)
        np.testing.assert_allclose(scale.distance_std, to_each.min(axis=1).std(), rtol=1e-2)
    result = memory_bank.standardized_distances(
        bank.fine, as_float(IMAGES[:2]), np.zeros(2, np.int32), grid=GRID
    )
    assert np.isfinite(result).all()


def test_an_image_of_one_value_makes_a_finite_bank():
    bank = build(np.full((1, 32, 32, 3), 99, np.uint8))
    images = as_float(IMAGES[:2])
    for scale in (bank.fine, bank.coarse):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(scale))
        result = memory_bank.standardized_distances(scale, images, grid=GRID)
        assert np.isfinite(result).all()


def test_the_bank_is_the_same_however_often_it_is_built(bank):
    assert_equal(build(IMAGES), bank)
    other = build(IMAGES, seed=1)
    assert not np.array_equal(other.fine.patches, bank.fine.patches)


def test_copies_of_images_do_not_change_the_bank(bank):
    assert_equal(build(np.concatenate([IMAGES, IMAGES[2:5], IMAGES[2:3]])), bank)


def test_the_bank_does_not_depend_on_what_else_the_ids_are_of(bank):
    """Ids are positions in a longer list, of which some images are held out."""
    ids = 10 + 2 * np.arange(len(IMAGES), dtype=np.int32)
    other = build(IMAGES, ids)
    np.testing.assert_array_equal(other.fine.patches, bank.fine.patches)
    expected = 10 + 2 * bank.fine.patch_image_ids
    np.testing.assert_array_equal(other.fine.patch_image_ids, expected)


def test_leave_one_out_is_the_distance_to_a_bank_without_that_image(bank):
    fine, images = bank.fine, as_float(IMAGES)
    counts = np.bincount(fine.patch_image_ids, minlength=len(IMAGES))
    image_id = int(np.argmax(counts))
    is_other = fine.patch_image_ids != image_id
    others = fine.replace(
        patches=fine.patches[is_other], patch_image_ids=fine.patch_image_ids[is_other]
    )
    ids = np.arange(len(IMAGES), dtype=np.int32)
    left_out = np.asarray(distances(fine, images, ids, grid=GRID))
    expected = distances(others, images[image_id, None], grid=GRID)
    np.testing.assert_allclose(left_out[image_id, None], expected, rtol=1e-4)
    everything = np.asarray(distances(fine, images, grid=GRID))
    assert np.all(left_out >= everything - 1e-5)
    assert left_out[image_id].mean() > everything[image_id].mean()
    # Images that are not in the bank have the same distances either way.
    for absent in np.flatnonzero(counts == 0):
        np.testing.assert_array_equal(left_out[absent], everything[absent])


def test_nothing_is_left_out_if_all_patches_are_the_images_own(bank):
    alone = bank.fine.replace(patch_image_ids=np.full_like(bank.fine.patch_image_ids, 4))
    images = as_float(IMAGES[:2])
    result = distances(alone, images, np.full(2, 4, np.int32), grid=GRID)
    np.testing.assert_allclose(result, distances(bank.fine, images, grid=GRID), atol=1e-5)


def test_a_bank_without_positions_finds_a_patch_anywhere():
    images = IMAGES[:4]
    bank = build(images, position_weight=0.0, size=4 * 64, candidates_per_patch=1)
    assert bank.fine.position_scale == bank.coarse.position_scale == 0
    np.testing.assert_array_equal(bank.fine.patches[:, -2:], 0)


def greedy(patches, size):
    """The algorithm of PatchCore, step by step."""
    norms = (patches**2).sum(axis=1)
    squared, chosen = np.full(len(patches), np.inf, np.float32), []
    for _ in range(size):
        # From the first patch on, always the farthest from all that are chosen.
        chosen.append(int(np.argmax(squared)))
        to_last = norms + norms[chosen[-1]] - 2 * patches @ patches[chosen[-1]]
        squared = np.minimum(squared, to_last)
    return np.array(chosen)


def clusters(seed, count=600):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(9, 12)) * rng.uniform(0.1, 4, (9, 1))
    spread = rng.uniform(0.01, 1, (9, 1))
    which = rng.integers(0, 9, count)
    return (centers[which] + spread[which] * rng.normal(size=(count, 12))).astype(np.float32)


@pytest.mark.parametrize("block", [1, 7, 64, 599, 2048])
@pytest.mark.parametrize("seed", range(4))
def test_the_coreset_is_exactly_that_of_the_greedy_algorithm(seed, block):
    patches = clusters(seed)
    chosen = memory_bank.k_center_greedy(patches, 150, block=block)
    np.testing.assert_array_equal(chosen, greedy(patches, 150))


@pytest.mark.parametrize("block", [16, 2048])
def test_copies_of_patches_leave_the_covering_radius_as_it_is(block):
    """Which of two equal patches is chosen is not defined."""
    patches = clusters(0)[np.random.default_rng(1).integers(0, 600, 900)]

    def radius(chosen):
        to_each = np.linalg.norm(patches[:, None].astype(float) - patches[chosen], axis=-1)
        return to_each.min(axis=1).max()

    for size in (5, 50, 200):
        chosen = memory_bank.k_center_greedy(patches, size, block=block)
        assert len(np.unique(patches[chosen], axis=0)) == size
        assert radius(chosen) == pytest.approx(radius(greedy(patches, size)), rel=1e-3)


def test_with_too_few_distinct_patches_all_of_them_are_chosen():
    patches = np.repeat(clusters(2, count=20), 5, axis=0)
    chosen = memory_bank.k_center_greedy(patches, 40, block=8)
    assert len(chosen) == 40
    assert len(np.unique(patches[chosen], axis=0)) == 20


def test_the_coreset_by_hand():
    patches = np.array([[0.0, 0], [0, 1], [0, 1.1], [9, 0], [9, 0.5], [4, 0]], np.float32)
    # From the first on: 9.01 away from it, then 4 from both, then 1.1.
    assert memory_bank.k_center_greedy(patches, 4).tolist() == [0, 4, 5, 2]


def test_the_position_counts_by_its_weight(bank):
    """As much as all of a descriptor varies, times the weight."""
    double = build(IMAGES, position_weight=2.0)
    for scale, single in ((double.fine, bank.fine), (double.coarse, bank.coarse)):
        assert scale.position_scale == pytest.approx(2 * single.position_scale)
        # The patches of the bank are weighted as those that they are compared with.
        assert np.abs(scale.patches[:, -2:]).max() == pytest.approx(scale.position_scale)


def test_a_darker_photograph_is_judged_as_the_same_one_in_the_right_light():
    images = np.uint8(np.clip(smooth_images(6), 20, 200))
    images[:, 12:16, 12:16] = 200
    bank = build(images[1:])
    generator = models.Generator(width=8, depth=2, latent=8)
    seen = memory_bank.to_float(images, bank.brightness)
    distances = memory_bank.bank_distances(bank, seen, grid=GRID)
    params = jax.jit(generator.init)(jax.random.key(0), seen, distances)["params"]
    predict_fn = partial(
        predict.predict_fn,
        {"params": params, "memory_bank": bank},
        generator=generator,
        options=predict.BankOptions(GRID, (0.5, 0.25)),
        top_fraction=0.01,
    )
    pair = images // 10 * 8, images // 10 * 10  # the same, but for the exposure
    (dark_maps, dark_scores, _), (maps, scores, _) = map(jax.jit(predict_fn), pair)
    np.testing.assert_allclose(dark_maps, maps, atol=1e-4)
    np.testing.assert_allclose(dark_scores, scores, rtol=1e-3)


def test_prediction_adds_the_distances_of_both_scales_to_the_logits():
    rng = np.random.default_rng(0)
    stripes = 127 + 60 * np.sin(np.arange(32) / 2)[:, None] + rng.normal(size=(6, 32, 32, 3))
    images = stripes.astype(np.uint8)
    bank = build(images)
    marred = as_float(images[:2])
    marred[:, 12:20, 12:20] = rng.random((2, 8, 8, 3))
    generator = models.Generator(width=8, depth=2, latent=8)
    fine = memory_bank.standardized_distances(bank.fine, marred, grid=GRID)
    coarse = memory_bank.standardized_distances(bank.coarse, memory_bank.halve(marred), grid=GRID)
    both = jnp.stack([fine, jax.image.resize(coarse, fine.shape, "bilinear")], axis=-1)
    params = jax.jit(generator.init)(jax.random.key(0), marred, both)["params"]
    options = predict.BankOptions(GRID, (0.5, 0.25))
    logits_fn = jax.jit(partial(predict.generator_logits, generator=generator, options=options))
    logits, reconstructions = logits_fn(params, bank, marred)
    trained_logits, expected = jax.jit(generator.apply)({"params": params}, marred, both)
    np.testing.assert_allclose(reconstructions, expected, atol=1e-5)
    added = np.asarray(logits - trained_logits)
    enlarged = jax.image.resize(both, (*added.shape, 2), "bilinear")
    np.testing.assert_allclose(added, enlarged @ np.array([0.5, 0.25]), atol=1e-4)
    assert added[:, 14:18, 14:18].min() > added[:, :4].max() + 0.5


@pytest.fixture(scope="module")
def recorded():
    """Arrays that were written once, and are not rewritten when the memory bank changes.

    Six smooth random images, patches of four of them, a coreset of 64 of these, its distances.
    """
    with np.load(Path(__file__).parent / "fixtures" / "memory_bank.npz") as arrays:
        return dict(arrays)


def recorded_bank(recorded, patches, image_ids):
    return PatchBank(
        mean=recorded["candidates.mean"],
        basis=recorded["candidates.basis"],
        patches=patches,
        patch_image_ids=image_ids,
        position_scale=recorded["candidates.position_scale"],
        distance_mean=recorded["coreset.distance_mean"],
        distance_std=recorded["coreset.distance_std"],
    )


def test_patches_coreset_and_distances_equal_the_recorded_ones(recorded):
    images = as_float(recorded["images"])
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    descriptors, positions = memory_bank.embed_patches(images[:2], GRID)
    close(descriptors[:, ::3, ::3], recorded["descriptors"])
    close(positions, recorded["positions"])

    candidates, coreset = (torch_weights.group(recorded, x) for x in ("candidates", "coreset"))
    chosen = memory_bank.k_center_greedy(candidates["patches"], len(coreset["patches"]))
    patches, image_ids = candidates["patches"][chosen], candidates["patch_image_ids"][chosen]
    np.testing.assert_array_equal(patches, coreset["patches"])
    np.testing.assert_array_equal(image_ids, coreset["patch_image_ids"])

    bank = recorded_bank(recorded, patches, image_ids)
    close(distances(bank, images, grid=GRID), recorded["distances"])
    ids = np.arange(len(images), dtype=np.int32)
    close(distances(bank, images, ids, grid=GRID), recorded["distances_left_out"])
    calibration = np.asarray(distances(bank, images[4:], grid=GRID))
    close(calibration.mean(), coreset["distance_mean"])
    close(calibration.std(), coreset["distance_std"])
