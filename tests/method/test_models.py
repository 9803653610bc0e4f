"""Networks: shapes, coordinates, precision, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from anoseg_jax.method import models


@pytest.fixture(scope="module")
def config():
    return tiny_config.get_config()


def init(module, *inputs):
    return jax.jit(module.init)(jax.random.key(0), *inputs)


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
    variables = init(generator, images)
    logits, reconstructions = jax.jit(generator.apply)(variables, images)
    assert logits.shape == (2, *size) and reconstructions.shape == images.shape
    assert logits.dtype == reconstructions.dtype == jnp.float32
    variables = init(discriminator, images, logits)
    patch_logits, features = discriminator.apply(variables, images, logits, features=True)
    assert patch_logits.shape == (2, size[0] // 4, size[1] // 4)
    assert not np.any(patch_logits)  # undecided before training
    assert [x.shape[1:3] for x in features] == [(size[0] // n, size[1] // n) for n in (2, 4)]


def test_an_images_result_does_not_depend_on_the_rest_of_its_batch(config):
    generator, _ = models.create(config.model, config.loss)
    images = jax.random.uniform(jax.random.key(1), (3, 16, 16, 3))
    variables = init(generator, images)
    together = jax.jit(generator.apply)(variables, images)[0]
    alone = jax.jit(generator.apply)(variables, images[1:2])[0]
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_with_float32_parameters_and_outputs(config):
    other = config.copy_and_resolve_references()
    other.model.dtype = "bfloat16"
    generator, _ = models.create(other.model, other.loss)
    images = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3))
    variables = init(generator, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, reconstructions = jax.jit(generator.apply)(variables, images)
    assert logits.dtype == reconstructions.dtype == jnp.float32
    exact = jax.jit(models.create(config.model, config.loss)[0].apply)(variables, images)
    assert not np.array_equal(logits, exact[0])
    np.testing.assert_allclose(logits, exact[0], atol=0.3)


@pytest.mark.parametrize("scales", [0, 1, 2])
def test_the_inputs_of_the_head_are_those_that_are_on(config, scales):
    """Image, coordinates, reconstruction, its error; distances to the bank at half the size."""
    images = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3))
    distances = jnp.zeros((1, 8, 8, 2)) if scales else None

    def head_inputs(**parts):
        generator = models.Generator(width=8, depth=2, latent=8, distance_scales=scales, **parts)
        params = init(generator, images, distances)["params"]
        assert ("reconstructor" in params) == parts["reconstruct"]
        kernel, *_ = (x for x in jax.tree.leaves(params["anomaly_head"]) if x.ndim == 4)
        _, reconstructions = generator.apply({"params": params}, images, distances)
        assert np.array_equal(reconstructions, images) == (not parts["reconstruct"])
        return kernel.shape[2]

    assert head_inputs(coords=False, reconstruct=False) == 4 * 3 + scales
    assert head_inputs(coords=True, reconstruct=True) == 4 * (3 + 2 + 3 + 3) + scales


def test_losses_of_weight_zero_switch_the_reconstruction_off(config):
    other = config.copy_and_resolve_references()
    for adversarial, reconstruction, expected in ((0, 0, False), (0.1, 0, True), (0, 1, True)):
        other.loss.adversarial_weight = float(adversarial)
        other.loss.reconstruction_weight = float(reconstruction)
        assert models.create(other.model, other.loss)[0].reconstruct == expected


def test_distances_change_the_map_there_and_not_the_reconstruction(config):
    generator, _ = models.create(config.model.to_dict() | {"distance_scales": 1}, config.loss)
    images = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3))
    apply = jax.jit(generator.apply)
    low = jnp.zeros((1, 8, 8, 2))
    variables = init(generator, images, low)
    high = low.at[:, :2, :, 0].set(5.0)
    one, other = apply(variables, images, low), apply(variables, images, high)
    difference = np.abs(one[0] - other[0])[0].mean(axis=1)
    assert difference[:4].mean() > 2 * difference[-4:].mean()
    np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize("scales", [1, 2])
def test_the_coarser_distances_change_the_map_only_if_the_head_sees_both(config, scales):
    generator, _ = models.create(config.model.to_dict() | {"distance_scales": scales}, config.loss)
    images = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3))
    low = jnp.zeros((1, 8, 8, 2))
    variables = init(generator, images, low)
    one, other = (
        generator.apply(variables, images, x)[0] for x in (low, low.at[:, :2, :, 1].set(5.0))
    )
    assert np.array_equal(one, other) == (scales == 1)


def test_the_reconstruction_learns_nothing_from_the_map(config):
    generator, _ = models.create(config.model, config.loss)
    images = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3))
    params = init(generator, images)["params"]
    map_sum = lambda p: generator.apply({"params": p}, images)[0].sum()  # noqa: E731
    gradients = jax.jit(jax.grad(map_sum))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["reconstructor"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients["anomaly_head"]))


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
        ("discriminator_width", 4, "multiples of 8"),
        ("distance_scales", 3, "1 or 2"),
    ],
)
def test_an_impossible_network_is_refused(config, key, value, message):
    with pytest.raises(ValueError, match=message):
        models.create(config.model.to_dict() | {key: value}, config.loss)


def test_flops_are_those_of_the_convolutions(config):
    generator, _ = models.create(config.model, config.loss)

    def count(side):
        images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        params = jax.eval_shape(generator.init, jax.random.key(0), images)["params"]
        return models.count_flops(models.apply_fn(generator), params, images)

    assert 3.5 < count(32) / count(16) < 4.5  # proportional to the pixels, but for the edges
    # The first convolution of the anomaly head alone: 3x3, 4 x 11 channels in, 8 out, at half size.
    assert count(16) > 2 * 9 * 44 * 8 * 8 * 8
