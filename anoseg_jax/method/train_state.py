"""The training state of both players: its options, creation, optimizers and updates."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import FrozenDict
from jax import Array
from ml_collections import ConfigDict

from anoseg_jax.method import defects, memory_bank, models
from anoseg_jax.method.memory_bank import MemoryBank, PatchGrid


class StaticOptions(NamedTuple):
    """Options that decide which program is compiled; hashable. All others are arrays.

    Attributes:
      generator: the module.
      discriminator: the module.
      segmentation: kind of the segmentation loss.
      adversarial: kind of the adversarial loss; "" where its weight is zero.
      reconstruction: the weight of the reconstruction loss is not zero.
      defects: the kinds of defects that are compiled in, see `defects.split_options`.
      grid: of the memory bank's patches; None where there is no bank.
      accumulate: the number of parts that a device splits its examples into.
      remat: see `models.apply_fn`.
    """

    generator: nn.Module
    discriminator: nn.Module
    segmentation: str
    adversarial: str
    reconstruction: bool
    defects: FrozenDict
    grid: PatchGrid | None
    accumulate: int
    remat: bool


# Options of the optimizers, the schedule and the average: numbers at the top level of a config.
OPTIMIZER_OPTIONS = (
    "learning_rate num_steps warmup_steps weight_decay clip_norm discriminator_scale ema_decay"
).split()
LOSS_WEIGHTS = ("segmentation_weight", "reconstruction_weight", "adversarial_weight")


def split_options(config: ConfigDict) -> tuple[StaticOptions, dict[str, Any]]:
    """Splits a config into static options and arrays: float32 numpy arrays in nested dicts.

    Categories and seeds that differ in arrays alone share one compiled step.
    """
    generator, discriminator = models.create(config.model, config.loss)
    static_defects, defect_arrays = defects.split_options(config.defects)
    bank, loss = config.memory_bank, config.loss
    static = StaticOptions(
        generator=generator,
        discriminator=discriminator,
        segmentation=loss.segmentation,
        adversarial=loss.adversarial if loss.adversarial_weight else "",
        reconstruction=bool(loss.reconstruction_weight),
        defects=static_defects,
        grid=PatchGrid(bank.patch, bank.stride) if bank.size else None,
        accumulate=config.accumulate,
        remat=config.remat,
    )
    numbers = {
        "augment": dict(config.augment),
        "loss": {name: loss[name] for name in LOSS_WEIGHTS},
        "optimizer": {name: config[name] for name in OPTIMIZER_OPTIONS},
    }
    return static, jax.tree.map(np.float32, numbers) | {"defects": defect_arrays}


@flax.struct.dataclass
class TrainState:
    """Everything that a training step reads and writes; data only, without a device axis.

    `ema` is an exponential moving average of the generator's parameters: the weights that are
    evaluated. `memory_bank` is None where `config.memory_bank.size` is 0; no step changes it.
    """

    step: Array
    generator: Any
    discriminator: Any
    generator_opt: optax.OptState
    discriminator_opt: optax.OptState
    ema: Any
    memory_bank: MemoryBank | None = None


def learning_rate_schedule(step: Array | int, options: Mapping[str, Any]) -> Array:
    """Returns the learning rate after `step` steps: linear warm-up, then half a cosine to zero.

    `options` are `learning_rate`, `num_steps`, `warmup_steps`, numbers or traced arrays: optax's
    schedule needs Python numbers, so that another number of steps would compile again.
    """
    peak, warmup = options["learning_rate"], options["warmup_steps"]
    start = peak / (warmup + 1)
    rising = start + (peak - start) * step / jnp.maximum(warmup, 1)
    decay_steps = jnp.maximum(options["num_steps"] - warmup, 1)
    progress = jnp.clip((step - warmup) / decay_steps, 0, 1)
    return jnp.where(step < warmup, rising, peak * 0.5 * (1 + jnp.cos(jnp.pi * progress)))


def create_optimizers(
    options: Mapping[str, Any], learning_rate: Array | float = 0.0
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Returns the generator's optimizer, AdamW, and the discriminator's, Adam.

    Args:
      options: `weight_decay` of the generator's parameters; `clip_norm`, the largest global norm of
        each player's gradient; `discriminator_scale`, the discriminator's learning rate relative to
        the generator's. Numbers or traced arrays.
      learning_rate: the generator's at this step; the optimizers' states do not depend on it.
    """
    clip = optax.clip_by_global_norm(options["clip_norm"])
    weight_decay = options["weight_decay"]
    # b1 = 0.5 is usual against a moving opponent (Radford et al., arXiv 1511.06434).
    discriminator_rate = options["discriminator_scale"] * learning_rate
    # Flat: one vector instead of 85 arrays is a quarter of the operations of a step to compile.
    return (
        optax.flatten(
            optax.chain(clip, optax.adamw(learning_rate, 0.9, 0.999, weight_decay=weight_decay))
        ),
        optax.flatten(optax.chain(clip, optax.adam(discriminator_rate, 0.5, 0.999))),
    )


def seed_keys(seed: int) -> tuple[Array, Array]:
    """Returns the PRNG keys of a seed: of the initial state, and of the training steps."""
    key = jax.random.key(seed)
    return key, jax.random.fold_in(key, 1)


@functools.cache
def jit_once(function: Callable, *static_argnames: str) -> Callable:
    """Returns `jax.jit(function)` for a program that runs once a training.

    On a CPU it is compiled with little optimisation: the initial state, which is many small draws
    of random numbers, compiles in a third of the time.
    """
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, static_argnames=static_argnames, compiler_options=quick)


def create_state(
    key: Array,
    options: Mapping[str, Any],
    *,
    static: StaticOptions,
    image_size: tuple[int, int],
) -> TrainState:
    """Returns the state before the first step, drawn from the seed's key, without its memory bank.

    Compile it with `jit_once`.

    `options` are the arrays of `split_options`.
    """
    generator_key, discriminator_key = jax.random.split(key)
    # One dummy image: the parameters do not depend on its content.
    images, maps = jnp.zeros((1, *image_size, 3)), jnp.zeros((1, *image_size))
    bank_distances = maps if static.grid else None
    generator = static.generator.init(generator_key, images, bank_distances)["params"]
    discriminator = static.discriminator.init(discriminator_key, images, maps)["params"]
    optimizer, discriminator_optimizer = create_optimizers(options["optimizer"])
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        generator=generator,
        discriminator=discriminator,
        generator_opt=optimizer.init(generator),
        discriminator_opt=discriminator_optimizer.init(discriminator),
        # A copy: the step donates its state, and no buffer may be in it twice.
        ema=jax.tree.map(jnp.copy, generator),
    )


def template(config: ConfigDict) -> TrainState:
    """Returns the shapes and dtypes of a config's state; nothing is computed."""
    static, options = split_options(config)
    create = jit_once(create_state, "static", "image_size")  # its trace serves the creation, too
    size = tuple(config.image_size)
    lowered = create.lower(jax.random.key(0), options, static=static, image_size=size)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info)
    bank = memory_bank.template(config.memory_bank) if static.grid else None
    return state.replace(memory_bank=bank)


def update_average(ema: Any, params: Any, step: Array, decay: Array | float) -> Any:
    """Returns the exponential moving average of parameters after the step that led to `params`.

    Its time constant is shorter at first, or the average would still hold the initial weights.
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)


def update_players(
    players: tuple[Any, Any],
    gradients: tuple[Any, Any],
    opt_states: tuple[optax.OptState, optax.OptState],
    step: Array,
    options: Mapping[str, Any],
) -> tuple[tuple[Any, Any], tuple[optax.OptState, optax.OptState]]:
    """Returns parameters and optimizer states of both players after one optimizer step.

    The second player is the discriminator. `step` is the number of steps done before; `options` are
    those of `learning_rate_schedule` and `create_optimizers`.
    """
    optimizers = create_optimizers(options, learning_rate_schedule(step, options))
    updated = [
        optimizer.update(gradient, opt_state, params)
        for optimizer, gradient, opt_state, params in zip(
            optimizers, gradients, opt_states, players, strict=True
        )
    ]
    updates, opt_states = zip(*updated, strict=True)
    return tuple(map(optax.apply_updates, players, updates)), opt_states


def apply_gradients(
    state: TrainState,
    generator_gradients: Any,
    discriminator_gradients: Any,
    options: Mapping[str, Any],
) -> TrainState:
    """Returns the state after one optimizer step of both players.

    `options` are those of `update_players`, and `ema_decay`.
    """
    (generator, discriminator), (generator_opt, discriminator_opt) = update_players(
        (state.generator, state.discriminator),
        (generator_gradients, discriminator_gradients),
        (state.generator_opt, state.discriminator_opt),
        state.step,
        options,
    )
    return state.replace(
        step=state.step + 1,
        generator=generator,
        discriminator=discriminator,
        generator_opt=generator_opt,
        discriminator_opt=discriminator_opt,
        ema=update_average(state.ema, generator, state.step, options["ema_decay"]),
    )
