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
from anoseg_jax.method.losses import Adversarial
from anoseg_jax.method.memory_bank import MemoryBank, PatchGrid

Arrays = Mapping[str, Array]
Options = Mapping[str, Any]  # nested dicts of arrays


class StaticOptions(NamedTuple):
    """Options that decide which program is compiled; hashable. All others are arrays.

    Attributes:
      generator: the module.
      discriminator: the module.
      segmentation: kind of the segmentation loss.
      reconstruction: whether the weight of the reconstruction loss is above zero.
      adversarial: form of the adversarial loss; None if its weight is zero.
      defects: the kinds of defects that are compiled, see `defects.split_options`.
      grid: of the memory bank's patches; None without a bank.
      accumulate: the number of chunks that each device splits its examples into.
      remat: see `models.apply_fn`.
    """

    generator: nn.Module
    discriminator: nn.Module
    segmentation: str
    reconstruction: bool
    adversarial: Adversarial | None
    defects: FrozenDict
    grid: PatchGrid | None
    accumulate: int
    remat: bool


# Options of the optimizers, the schedule and the average: numbers at the top level of a config.
OPTIMIZER_OPTIONS = (
    "learning_rate num_steps warmup_steps weight_decay clip_norm discriminator_scale ema_decay"
).split()
LOSS_WEIGHTS = (
    "segmentation_weight reconstruction_weight adversarial_weight label_smoothing gradient_penalty"
).split()


def adversarial_form(loss: Mapping[str, Any], weight: float) -> Adversarial | None:
    """Returns the form of the adversarial loss of `config.loss`; None if its weight is zero."""
    form = Adversarial(bool(loss["limit_adversarial"]), bool(loss["gradient_penalty"]))
    return form if weight else None


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
        reconstruction=bool(loss.reconstruction_weight),
        adversarial=adversarial_form(loss, loss.adversarial_weight),
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
    evaluated. `memory_bank` is None if `config.memory_bank.size` is 0; no step changes it.
    """

    PLAYERS = ("generator", "discriminator")

    step: Array
    generator: Any
    discriminator: Any
    generator_opt: optax.OptState
    discriminator_opt: optax.OptState
    ema: Any
    memory_bank: MemoryBank | None = None


def learning_rate_schedule(step: Array | int, options: Options) -> Array:
    """Returns the learning rate after `step` steps: linear warm-up, then half a cosine to zero.

    `options` are `learning_rate`, `num_steps`, `warmup_steps`: numbers or traced arrays. (optax's
    schedule needs Python numbers; then another number of steps would compile again.)
    """
    peak, warmup = options["learning_rate"], options["warmup_steps"]
    start = peak / (warmup + 1)
    rising = start + (peak - start) * step / jnp.maximum(warmup, 1)
    decay_steps = jnp.maximum(options["num_steps"] - warmup, 1)
    progress = jnp.clip((step - warmup) / decay_steps, 0, 1)
    return jnp.where(step < warmup, rising, peak * 0.5 * (1 + jnp.cos(jnp.pi * progress)))


def create_optimizers(
    options: Options, learning_rate: Array | float = 0.0
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Returns AdamW for the trained network, and Adam for its discriminator.

    `options` are `weight_decay` and `discriminator_scale` of configs/default.py: numbers or traced
    arrays. The optimizers' states do not depend on the learning rate.
    """
    weight_decay = options["weight_decay"]
    # b1 = 0.5 is usual against a moving opponent (DCGAN, Radford et al., arXiv 1511.06434).
    discriminator_rate = options["discriminator_scale"] * learning_rate
    # Flat: with one vector instead of 85 arrays the step has a quarter of the operations.
    return (
        optax.flatten(optax.adamw(learning_rate, 0.9, 0.999, weight_decay=weight_decay)),
        optax.flatten(optax.adam(discriminator_rate, 0.5, 0.999)),
    )


def seed_keys(seed: int) -> tuple[Array, Array]:
    """Returns the PRNG keys of a seed: of the initial state, and of the training steps."""
    key = jax.random.key(seed)
    return key, jax.random.fold_in(key, 1)


def create_players(
    key: Array,
    static: Any,
    inputs: Mapping[str, tuple[Array | None, ...]],
    options: Options,
) -> dict[str, Any]:
    """Returns the fields of a state before the first step, by name.

    `static` has each player's module under the player's name. `inputs` are dummy arrays to call
    them with, by player; the discriminator is the last one.
    """
    network, _ = inputs
    fields = {"step": jnp.zeros((), jnp.int32)}
    optimizers = create_optimizers(options["optimizer"])
    for player, player_key, optimizer in zip(
        inputs, jax.random.split(key), optimizers, strict=True
    ):
        params = getattr(static, player).init(player_key, *inputs[player])["params"]
        fields |= {player: params, f"{player}_opt": optimizer.init(params)}
    # A copy: the step donates its state, and no buffer may be in it twice.
    return fields | {"ema": jax.tree.map(jnp.copy, fields[network])}


def create_state(
    key: Array, options: Options, *, static: StaticOptions, image_size: tuple[int, int]
) -> TrainState:
    """Returns the state before the first step, without its memory bank; see `jit_create`."""
    # One dummy image: the parameters do not depend on its content.
    images, maps = jnp.zeros((1, *image_size, 3)), jnp.zeros((1, *image_size))
    distances = jnp.zeros((*maps.shape, 2)) if static.grid else None
    inputs = {"generator": (images, distances), "discriminator": (images, maps)}
    return TrainState(**create_players(key, static, inputs, options))


@functools.cache
def jit_create(create: Callable) -> Callable:
    """Returns `create_state`, or the detector's, compiled for one call.

    On a CPU with little optimisation: a state is many small draws of random numbers, which then
    compile in a third of the time.
    """
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(create, static_argnames=("static", "image_size"), compiler_options=quick)


def shapes_of(create: Callable, options: Any, *, static: Any, image_size: Any) -> Any:
    """Returns the shapes and dtypes of what `create` (see `jit_create`) returns; computes nothing.

    The trace also serves the creation.
    """
    lowered = jit_create(create).lower(
        jax.random.key(0), options, static=static, image_size=tuple(image_size)
    )
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info)


def template(config: ConfigDict) -> TrainState:
    """Returns the shapes and dtypes of a config's state, with its memory bank."""
    static, options = split_options(config)
    state = shapes_of(create_state, options, static=static, image_size=config.image_size)
    bank = memory_bank.template(config.memory_bank) if static.grid else None
    return state.replace(memory_bank=bank)


def update_average(ema: Any, params: Any, step: Array, decay: Array | float) -> Any:
    """Returns the exponential moving average of parameters after the step that led to `params`.

    Its time constant is shorter at first, or the average would still hold the initial weights.
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)


def apply_gradients(state: Any, gradients: tuple[Any, Any], options: Options) -> Any:
    """Returns the state after one optimizer step of both players.

    Args:
      state: a TrainState, or the detector's.
      gradients: of `state.PLAYERS`, clipped.
      options: those of `learning_rate_schedule` and `create_optimizers`, and `ema_decay`.
    """
    optimizers = create_optimizers(options, learning_rate_schedule(state.step, options))
    fields = {}
    for player, gradient, optimizer in zip(state.PLAYERS, gradients, optimizers, strict=True):
        params, opt_state = getattr(state, player), getattr(state, f"{player}_opt")
        updates, fields[f"{player}_opt"] = optimizer.update(gradient, opt_state, params)
        fields[player] = optax.apply_updates(params, updates)
    network = fields[state.PLAYERS[0]]
    ema = update_average(state.ema, network, state.step, options["ema_decay"])
    return state.replace(step=state.step + 1, ema=ema, **fields)
