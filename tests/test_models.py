"""Networks: shapes, coordinates, precision, and what they refuse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics

from anoseg_jax.method import models
from configs import test as test_config


@pytest.fixture(scope="module")
def config():
    return test_config.get_config()


def generator_outputs(generator, images):
    variables = jax.jit(generator.init)(jax.random.key(0), images)
    return jax.jit(generator.apply)(variables, images)


def test_coordinates_run_from_minus_one_to_one_by_row_and_column():
    images = models.add_coords(jnp.zeros((2, 3, 5, 1)))
    assert images.shape == (2, 3, 5, 3)
    np.testing.assert_allclose(images[1, :, 0, 1], [-1, 0, 1])
    np.testing.assert_allclose(images[0, 2, :, 2], [-1, -0.5, 0, 0.5, 1], atol=1e-6)


def test_depth_to_space_undoes_space_to_depth_and_keeps_neighbours_together():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    folded = models.space_to_depth(x)
    np.testing.assert_array_equal(models.depth_to_space(folded), x)
    np.testing.assert_array_equal(folded[0, 1, 2], x[0, 2:4, 4:6].reshape(-1))


def test_upsample_repeats_every_pixel():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    np.testing.assert_array_equal(
        models.upsample(x)[0, ..., 0], np.repeat(np.repeat(x[0, ..., 0], 2, axis=0), 2, axis=1)
    )


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_map_and_reconstruction_have_the_size_of_the_image(config, size):
    generator, discriminator = models.create(config.model, config.loss)
    images = jnp.full((2, *size, 3), 0.5)
    logits, reconstructions = generator_outputs(generator, images)
    assert logits.shape == (2, *size) and reconstructions.shape == images.shape
    assert logits.dtype == reconstructions.dtype == jnp.float32
    variables = jax.jit(discriminator.init)(jax.random.key(0), images, logits)
    judged = discriminator.apply(variables, images, logits)
    assert judged.shape == (2, size[0] // 4, size[1] // 4)


def test_an_image_is_judged_alone_whatever_else_is_in_its_batch(config):
    generator, _ = models.create(config.model, config.loss)
    images = jax.random.uniform(jax.random.key(1), (3, 16, 16, 3))
    variables = jax.jit(generator.init)(jax.random.key(0), images)
    together = jax.jit(generator.apply)(variables, images)[0]
    alone = jax.jit(generator.apply)(variables, images[1:2])[0]
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_with_float32_parameters_and_outputs(config):
    other = config.copy_and_resolve_references()
    other.model.dtype = "bfloat16"
    generator, _ = models.create(other.model, other.loss)
    images = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3))
    variables = jax.jit(generator.init)(jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, reconstructions = jax.jit(generator.apply)(variables, images)
    assert logits.dtype == reconstructions.dtype == jnp.float32
    exact = jax.jit(models.create(config.model, config.loss)[0].apply)(variables, images)
    assert not np.array_equal(logits, exact[0])
    np.testing.assert_allclose(logits, exact[0], atol=0.3)


def test_the_map_is_drawn_without_coordinates_and_reconstruction_when_they_are_off(config):
    other = config.copy_and_resolve_references()
    other.model.coords = False
    other.loss.adversarial_weight = other.loss.reconstruction_weight = 0.0
    generator, _ = models.create(other.model, other.loss)
    images = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3))
    variables = jax.jit(generator.init)(jax.random.key(0), images)
    memories = {"PatchMemory_0", "PatchMemory_1"}
    assert set(variables["params"]) == memories | {"MapHead_0"}
    assert variables["params"]["PatchMemory_0"]["memory"]["place"] == 0
    assert variables["params"]["MapHead_0"]["ConvBlock_0"]["Conv_0"]["kernel"].shape[2] == 4 * 3 + 1
    np.testing.assert_array_equal(generator.apply(variables, images)[1], images)


def test_the_reconstruction_learns_nothing_from_the_map(config):
    generator, _ = models.create(config.model, config.loss)
    images = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3))
    params = jax.jit(generator.init)(jax.random.key(0), images)["params"]
    map_sum = lambda p: generator.apply({"params": p}, images)[0].sum()  # noqa: E731
    gradients = jax.jit(jax.grad(map_sum))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["Reconstructor_0"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients["MapHead_0"]))


@pytest.mark.parametrize(
    ("size", "suggestion"), [((30, 64), "32x64"), ((256, 250), "256x256"), ((8, 16), "16x16")]
)
def test_a_size_that_the_depth_does_not_divide_is_refused_with_one_that_fits(size, suggestion):
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]}.*multiples of 16.*{suggestion}"):
        models.check_size(size, depth=4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", 12, "multiples of 8"),
        ("dtype", "float16", "bfloat16"),
        ("name", "Other", "must be one of"),
    ],
)
def test_an_impossible_network_is_refused(config, key, value, message):
    with pytest.raises(ValueError, match=message):
        models.create(config.model.to_dict() | {key: value}, config.loss)


def test_flops_are_those_of_the_convolutions(config):
    generator, _ = models.create(config.model, config.loss)
    small = models.flops_per_image(generator, (16, 16))
    large = models.flops_per_image(generator, (32, 32))
    assert 3.5 < large / small < 4.5  # proportional to the pixels, but for the edges
    # The first convolution of the map head alone: 3x3, 4 x 11 channels in, 8 out, at half size.
    assert small > 2 * 9 * 44 * 8 * 8 * 8


def test_patches_are_the_images_own_without_mean_and_contrast():
    image = jax.random.uniform(jax.random.key(0), (1, 32, 48, 3))
    found, coords = models.describe_patches(image, patch=4, stride=2)
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
    memory = models.remember_patches(
        jax.random.key(1), images, jnp.arange(len(images)), size=40, coords=True, **options
    )
    centre, spread = memory.pop("centre"), memory.pop("spread")
    assert memory["patches"].shape == (40, 7) and centre > 0 and spread > 0
    x, coords = models.describe_patches(images[:1], patch=4, stride=2)
    x = np.asarray(x - memory["mean"])
    code = x @ memory["basis"]
    rest = (x**2).sum(-1) - (code**2).sum(-1)
    place = np.broadcast_to(memory["place"] * coords, (*x.shape[:3], 2))
    code = np.concatenate([code, place], -1)
    every = ((code[..., None, :] - memory["patches"]) ** 2).sum(-1)
    expected = np.sqrt(every.min(-1) + rest)
    found = models.patch_distances(memory, images[:1], patch=4, stride=2)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_distinct_patches_are_not_drawn_twice_and_no_more_than_there_are():
    images = jax.random.uniform(jax.random.key(0), (3, 32, 48, 3))
    for size, drawn in ((50, 50), (9999, 3 * 8 * 12)):
        known = models.remember_patches(
            jax.random.key(1), images, jnp.arange(3), size=size, coords=True, distinct=True
        )
        np.testing.assert_array_equal(np.unique(known["source"]), [0, 1, 2])
        assert len(np.unique(known["patches"], axis=0)) == len(known["patches"]) == drawn


def test_a_memory_that_is_thinned_out_keeps_the_patches_that_are_far_from_each_other():
    patches = jnp.array([[0.0, 0], [0, 1], [0, 1.1], [9, 0], [9, 0.5], [4, 0]])
    memory = {"patches": patches, "source": jnp.arange(6), "place": jnp.ones(())}
    kept = models.thin_out(memory, 4)
    assert kept["place"] == 1
    # From the first on: 9.01 away from it, then 4 from both, then 1.1.
    np.testing.assert_array_equal(kept["source"], [0, 4, 5, 2])
    np.testing.assert_array_equal(kept["patches"], patches[kept["source"]])


def test_with_marks_a_memory_does_not_know_the_image_itself():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (3, 32, 48, 3)), jnp.uint8)
    plain, marks = images / 255, models.image_marks(images)
    memory = models.remember_patches(
        jax.random.key(1), plain, marks, size=9999, coords=True, distinct=True
    )
    of_others = memory["source"] != marks[0]
    others = memory | {name: memory[name][of_others] for name in ("patches", "source")}
    expected = models.patch_distances(others, plain[:1])
    found = models.patch_distances(memory, plain, marks)
    np.testing.assert_allclose(found[:1], expected, rtol=1e-4)
    known = models.patch_distances(memory, plain)
    np.testing.assert_array_less(known, found)
    # Where no other image is remembered, itself is better than nothing.
    alone = memory | {"source": jnp.full_like(memory["source"], marks[0])}
    np.testing.assert_allclose(models.patch_distances(alone, plain, marks), known, atol=1e-5)


def test_images_have_a_mark_of_their_own_that_a_pixel_changes():
    images = np.random.default_rng(0).integers(0, 256, (500, 8, 8, 3), dtype=np.uint8)
    images[1] = images[0]
    images[1, 5, 5, 2] ^= 1
    images[2] = images[0][:, ::-1]
    images[3] = images[0]
    marks = np.asarray(models.image_marks(images))
    assert marks[3] == marks[0]
    assert len(np.unique(marks)) == 499
    assert np.all((marks == np.round(marks)) & (marks >= 0) & (marks < 2**24))


def test_average_precision_is_scikit_learns_and_leaves_out_what_is_not_labelled():
    rng = np.random.default_rng(0)
    scores, labels = rng.random(200), rng.integers(-1, 2, 200)
    counted = labels >= 0
    expected = metrics.average_precision_score(labels[counted], scores[counted])
    assert models.average_precision(jnp.asarray(scores), jnp.asarray(labels)) == pytest.approx(
        expected, abs=1e-5
    )
    assert models.average_precision(jnp.asarray(scores), jnp.zeros(200)) == 0


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
    options = {"components": 16, "patch": models.PATCH, "stride": models.STRIDE}
    memory = models.remember_patches(
        jax.random.key(0), jnp.asarray(good[:48]), jnp.arange(48), size=600, coords=True, **options
    )
    weight = models.choose_place(memory, good[48:], defective[48:], masks[48:])
    assert (weight >= 1) == aligned
    weighed = models.calibrate(models.weigh_place(memory, weight), good[48:])
    np.testing.assert_allclose(weighed["place"], weight * memory["place"])
    np.testing.assert_allclose(weighed["patches"][:, -2:], weight * memory["patches"][:, -2:])
    np.testing.assert_allclose(
        models.patch_distances(weighed, good[48:]).mean(), weighed["centre"], rtol=1e-4
    )


def test_the_memories_know_what_they_were_initialised_with_and_training_does_without(config):
    generator, _ = models.create(config.model, config.loss)
    stripes = jnp.tile(jnp.sin(jnp.arange(32) / 2)[None, :, None, None] / 4 + 0.5, (4, 1, 32, 3))
    params = jax.jit(generator.init)(jax.random.key(0), stripes)["params"]
    marred = stripes.at[:, 12:20, 12:20].set(jax.random.uniform(jax.random.key(1), (4, 8, 8, 3)))
    with_memory, without = (
        jax.jit(partial(generator.apply, recall=recall))({"params": params}, marred)[0]
        for recall in (True, False)
    )
    added = np.asarray(with_memory - without)
    expected = 0.0
    for index, images in enumerate((marred, models.halve(marred))):
        known = {"params": params[f"PatchMemory_{index}"]}
        distances = models.PatchMemory(64).apply(known, images)
        weight = models.RECALL[index]
        expected += weight * jax.image.resize(distances, added.shape, "bilinear")
    np.testing.assert_allclose(added, expected, atol=1e-4)
    assert added[:, 14:18, 14:18].min() > added[:, :4].max() + 0.5
