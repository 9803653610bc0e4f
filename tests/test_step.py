"""The step in less memory: in parts, rematerialised, in bfloat16."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anoseg_jax.method import detector, models, train
from configs import test as test_config

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)


def make_config(**changes):
    config = test_config.get_config("bolt")
    config.defects.preset = "plain"  # compiles in half the time
    config.model.memory = 0
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def initial():
    return jax.device_get(train.create_parts(make_config()).create_state(IMAGES))


def metrics_of(state, **changes):
    """Returns the metrics of two steps on the same images, as dicts of floats."""
    step = jax.jit(partial(train.create_parts(make_config(**changes)).train_step, axis_name=None))
    history = []
    for _ in range(2):
        state, metrics = step(state, IMAGES, jax.random.key(7))
        history.append({name: float(value) for name, value in metrics.items()})
    return history


@pytest.fixture(scope="module")
def at_once(initial):
    return metrics_of(initial)


@pytest.mark.parametrize("changes", [{"accumulate": 8}, {"remat": True}])
def test_eight_parts_of_one_image_or_rematerialised_it_is_the_same(initial, at_once, changes):
    metrics = metrics_of(initial, **changes)
    assert metrics[0] == pytest.approx(at_once[0], rel=1e-5)
    assert metrics[1] == pytest.approx(at_once[1], rel=1e-3)


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_rematerialised_the_same_gradient_comes_from_more_operations(player):
    parts = train.create_parts(make_config())
    module = parts.train_step.keywords[player]
    state = jax.eval_shape(parts.create_state, IMAGES)
    images = jax.ShapeDtypeStruct(IMAGES.shape, jnp.float32)
    maps = jax.ShapeDtypeStruct(IMAGES.shape[:3], jnp.float32)
    inputs = (images,) if player == "generator" else (images, maps)

    def count(remat):
        apply = models.applied(module, remat=remat)
        total = lambda *args: sum(jnp.sum(x) for x in jax.tree.leaves(apply(*args)))  # noqa: E731
        return models.count_flops(jax.value_and_grad(total), getattr(state, player), *inputs)

    assert 1.2 < count(True) / count(False) < 1.5


@pytest.mark.parametrize("of", ["generator", "detector"])
def test_in_bfloat16_what_is_kept_and_summed_is_float32(of, initial):
    """Parameters, optimizers, averages, gradients, losses; the layers are not."""
    config = make_config(**{"model.dtype": "bfloat16", "model.memory": 64})
    parts = train.create_parts(config)
    if of == "detector":
        generator_params = jax.eval_shape(parts.create_state, IMAGES).ema
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), generator_params)
        parts = detector.create_parts(config, zeros)
    state = jax.eval_shape(parts.create_state, IMAGES)
    step = jax.make_jaxpr(partial(parts.train_step, axis_name=None), return_shape=True)
    jaxpr, (after, metrics) = step(state, IMAGES, jax.random.key(0), *parts.frozen)
    kept = jax.tree.leaves((state, after, metrics))
    assert {x.dtype.name for x in kept} == {"float32", "int32"}
    convolutions = [line for line in str(jaxpr).splitlines() if "conv_general_dilated" in line]
    assert any("bf16" in line for line in convolutions)


def test_the_gradient_of_parts_is_that_of_the_whole_to_the_bit_where_nothing_is_rounded():
    examples = (jnp.arange(8.0), jnp.arange(16.0).reshape(8, 2))

    def players_loss(g, d, x, y):
        total, discriminator_total = jnp.mean(g * d * x), jnp.mean(d * y * y)
        return (total, discriminator_total), {"total": total}

    of = partial(train.players_gradients, players_loss, jnp.float32(2), jnp.float32(4), examples)
    expected = (4 * 3.5, np.mean(np.arange(16) ** 2), {"total": 8 * 3.5})
    for accumulate in (1, 2, 8):
        assert of(accumulate) == expected


def test_the_detector_learns_in_parts_too(initial, monkeypatch):
    """Its step is divided where the generator's is, and its loss is a mean that divides."""
    real, seen = train.players_gradients, []
    monkeypatch.setattr(
        train, "players_gradients", lambda *args: (seen.append(args[-1]), real(*args))[1]
    )
    parts = detector.create_parts(make_config(accumulate=4), initial.ema)
    state = parts.create_state(IMAGES)
    step = partial(parts.train_step, axis_name=None)
    jax.eval_shape(step, state, IMAGES, jax.random.key(0), *parts.frozen)
    assert seen == [4]
    keywords = parts.train_step.keywords
    loss_fn = partial(
        detector.loss_fn,
        **{name: keywords[name] for name in ("detector", "discriminator", "loss")},
    )
    images = jax.random.uniform(jax.random.key(0), (2, 4, 32, 32, 3))
    of = jax.jit(lambda x: loss_fn(state.generator, state.discriminator, x, x[..., 0]))
    (halves, whole) = [of(x) for x in images], of(images.reshape(8, 32, 32, 3))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
