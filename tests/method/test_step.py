"""The training step: its numbers, and in less memory (in chunks, rematerialised, in bfloat16).

On several devices: test_train.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_config

from anoseg_jax.method import detector, models, train, train_state

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
BATCH = {"image": IMAGES, "image_id": np.arange(8, dtype=np.int32)}
BATCH_SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BATCH)
KEY = jax.random.key(7)


def make_config(**changes):
    config = tiny_config.get_config("bolt")
    config.defects.preset = "plain"  # compiles in half the time
    config.memory_bank.size = 0
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def initial():
    static, options = train_state.split_options(make_config())
    create = train_state.jit_create(train_state.create_state)
    return create(KEY, options, static=static, image_size=(32, 32))


def two_steps(state, **changes):
    """Returns the metrics of two steps on the same images, as dicts of floats."""
    static, options = train_state.split_options(make_config(**changes))
    step = jax.jit(partial(train.train_step, static=static, axis_name=None))
    history = []
    for _ in range(2):
        state, metrics = step(state, BATCH, KEY, options)
        history.append({name: float(value) for name, value in metrics.items()})
    return history


@pytest.fixture(scope="module")
def at_once(initial):
    return two_steps(initial)


@pytest.mark.parametrize("changes", [{"accumulate": 8}, {"remat": True}])
def test_in_chunks_or_rematerialised_the_step_is_the_same(initial, at_once, changes):
    metrics = two_steps(initial, **changes)
    assert metrics[0] == pytest.approx(at_once[0], rel=1e-5)
    assert metrics[1] == pytest.approx(at_once[1], rel=1e-3)


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_rematerialised_the_same_gradient_comes_from_more_operations(player):
    config = make_config()
    module = getattr(train_state.split_options(config)[0], player)
    state = train_state.template(config)
    images = jax.ShapeDtypeStruct(IMAGES.shape, jnp.float32)
    maps = jax.ShapeDtypeStruct(IMAGES.shape[:3], jnp.float32)
    inputs = (images,) if player == "generator" else (images, maps)

    def count(remat):
        apply = models.apply_fn(module, remat=remat)
        total = lambda *args: sum(jnp.sum(x) for x in jax.tree.leaves(apply(*args)))  # noqa: E731
        return models.count_flops(jax.value_and_grad(total), getattr(state, player), *inputs)

    assert 1.2 < count(True) / count(False) < 1.5


@pytest.mark.parametrize("network", ["generator", "detector"])
def test_in_bfloat16_parameters_optimizers_averages_and_metrics_are_float32(network):
    """That the layers compute in bfloat16: test_models.py."""
    config = make_config(**{"model.dtype": "bfloat16", "memory_bank.size": 64})
    static, options = train_state.split_options(config)
    state, train_step = train_state.template(config), train.train_step
    if network == "detector":
        variables = {"params": state.ema, "memory_bank": state.memory_bank}
        static, options = detector.split_options(config)
        state, train_step = detector.template(config), detector.train_step
        options |= variables
    step = partial(train_step, static=static, axis_name=None)
    after, metrics = jax.eval_shape(step, state, BATCH_SHAPES, KEY, options)
    assert {x.dtype.name for x in jax.tree.leaves((state, after, metrics))} == {"float32", "int32"}


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ({}, {"segmentation", "reconstruction", "adversarial", "discriminator", "penalty"}),
        (
            {"gradient_penalty": 0.0},
            {"segmentation", "reconstruction", "adversarial", "discriminator"},
        ),
        ({"adversarial_weight": 0.0}, {"segmentation", "reconstruction"}),
        ({"adversarial_weight": 0.0, "reconstruction_weight": 0.0}, {"segmentation"}),
    ],
)
def test_a_loss_of_weight_zero_is_not_computed(weights, names):
    config = make_config(**{f"loss.{name}": value for name, value in weights.items()})
    static, options = train_state.split_options(config)
    step = partial(train.train_step, static=static, axis_name=None)
    _, metrics = jax.eval_shape(step, train_state.template(config), BATCH_SHAPES, KEY, options)
    assert {k.removeprefix("loss_") for k in metrics if k.startswith("loss_")} == names


def test_the_gradient_of_chunks_is_that_of_the_whole_to_the_bit_where_nothing_is_rounded():
    examples = {"x": jnp.arange(8.0), "y": jnp.arange(16.0).reshape(8, 2)}

    def players_loss(params, examples):
        g, d = params
        total, discriminator_total = (
            jnp.mean(g * d * examples["x"]),
            jnp.mean(d * examples["y"] ** 2),
        )
        return (total, discriminator_total), {"total": total}

    params = jnp.float32(2), jnp.float32(4)
    expected = ((4 * 3.5, np.mean(np.arange(16) ** 2)), {"total": 8 * 3.5})
    for accumulate in (1, 2, 8):
        assert train.players_gradients(players_loss, params, examples, accumulate) == expected


def test_each_player_follows_its_own_loss_alone(initial):
    """The two gradients of the step are those of two separate losses."""
    static, options = train_state.split_options(make_config())

    @jax.jit
    def gradients(g, d):
        examples = train.make_examples(KEY, BATCH, options, None, static=static)
        examples["bank_distances"] = None
        loss_fn = partial(train.loss_fn, weights=options["loss"], static=static)
        shared, _ = train.players_gradients(loss_fn, (g, d), examples)
        separate = (
            jax.grad(lambda p: loss_fn((p, d), examples)[0][0])(g),
            jax.grad(lambda p: loss_fn((g, p), examples)[0][1])(d),
        )
        return shared, separate

    # Its last layer starts with zeros, and then nothing before it has a gradient.
    discriminator = jax.tree.map(lambda x: x + 0.01, initial.discriminator)
    shared, separate = map(jax.tree.leaves, gradients(initial.generator, discriminator))
    for a, b in zip(shared, separate, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert np.any(b) or b.size < 64


def test_the_learning_rate_warms_up_and_falls_to_zero():
    options = {"learning_rate": 1.0, "num_steps": 100, "warmup_steps": 10}
    schedule = partial(train_state.learning_rate_schedule, options=options)
    optax_schedule = optax.warmup_cosine_decay_schedule(1 / 11, 1.0, 10, 100)
    for step in range(101):
        np.testing.assert_allclose(schedule(step), optax_schedule(step), atol=1e-6)
    assert schedule(1000) == 0


@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(5, 0), (5, 5), (3, 9)])
def test_the_learning_rate_is_finite_whatever_the_warm_up(num_steps, warmup_steps):
    options = {"learning_rate": 1.0, "num_steps": num_steps, "warmup_steps": warmup_steps}
    rates = [train_state.learning_rate_schedule(step, options) for step in range(num_steps)]
    assert np.isfinite(rates).all() and min(rates) > 0 and max(rates) <= 1
