"""Networks: shapes, coordinates, precision, and what they refuse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anoseg_jax import memory, models
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
    memories = {"PatchMemory_0", "PatchMemory_1", "PatchMemory_2"}
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
    for index, images in enumerate((marred, memory.halve(marred)), 1):
        known = {"params": params[f"PatchMemory_{index}"]}
        distances = memory.PatchMemory(64).apply(known, images)
        weight = models.RECALL[index - 1]
        expected += weight * jax.image.resize(distances, added.shape, "bilinear")
    np.testing.assert_allclose(added, expected, atol=1e-4)
    assert added[:, 14:18, 14:18].min() > added[:, :4].max() + 0.5
