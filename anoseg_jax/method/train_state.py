"""What training carries from step to step, and how it is made and placed on the devices."""

from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes; data only, without a device axis.

    `ema` is an exponential moving average of the generator's parameters: the weights that are
    evaluated.
    """

    step: Array
    generator: Any
    discriminator: Any
    generator_opt: optax.OptState
    discriminator_opt: optax.OptState
    ema: Any


class Optimizers(NamedTuple):
    """One optimizer for each player."""

    generator: optax.GradientTransformation
    discriminator: optax.GradientTransformation


def learning_rate_schedule(learning_rate: float, num_steps: int, warmup: int) -> optax.Schedule:
    """Linear warm-up over `warmup` steps, then half a cosine down to zero at `num_steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / (warmup + 1),
        peak_value=learning_rate,
        warmup_steps=warmup,
        decay_steps=max(num_steps, warmup + 1),
    )


def is_learned(params: Any) -> Any:
    """Returns, for each parameter, whether training changes it: patch memories stay as they are."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any("PatchMemory" in str(part) for part in path), params
    )


def create_optimizers(
    schedule: optax.Schedule, *, weight_decay: float, clip_norm: float, discriminator_scale: float
) -> Optimizers:
    """Adam with decoupled weight decay for the generator, Adam for the discriminator.

    Args:
      schedule: the generator's learning rate as a function of the step.
      weight_decay: of the generator's parameters.
      clip_norm: largest global norm of each player's gradient.
      discriminator_scale: the discriminator's learning rate relative to the generator's.
    """
    # b1 = 0.5, as is usual against a moving opponent (Radford et al., arXiv 1511.06434).
    return Optimizers(
        generator=optax.chain(
            optax.clip_by_global_norm(clip_norm),
            optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=weight_decay, mask=is_learned),
        ),
        discriminator=optax.chain(
            optax.clip_by_global_norm(clip_norm),
            optax.adam(lambda step: discriminator_scale * schedule(step), b1=0.5, b2=0.999),
        ),
    )


def create_state(
    key: Array,
    images: Array,
    *,
    generator: nn.Module,
    discriminator: nn.Module,
    optimizers: Optimizers,
    with_maps: bool = False,
) -> TrainState:
    """Returns the state before the first step, drawn from `key`; jit-able.

    Args:
      key: a PRNG key.
      images: good images [n, h, w, 3] in [0, 1]: the generator's memories are of them.
      generator: the generator's module.
      discriminator: the discriminator's module.
      optimizers: one for each player.
      with_maps: the generator takes images and maps, as the image-level detector does.
    """
    generator_key, discriminator_key = jax.random.split(key)
    maps = jnp.zeros(images.shape[:3])
    inputs = (images, maps) if with_maps else (images,)
    generator_params = generator.init(generator_key, *inputs)["params"]
    discriminator_params = discriminator.init(discriminator_key, images, maps)["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        generator=generator_params,
        discriminator=discriminator_params,
        generator_opt=optimizers.generator.init(generator_params),
        discriminator_opt=optimizers.discriminator.init(discriminator_params),
        # A copy: the step donates its state, and a buffer that stands twice in it would be freed
        # twice.
        ema=jax.tree.map(jnp.copy, generator_params),
    )


def place(state: TrainState) -> TrainState:
    """Replicates the state over the local devices, as `jax.pmap` returns it.

    Without it the first two steps would each compile: for the placement that they are given and
    for the one that they return.
    """
    mesh = Mesh(jax.local_devices(), ("batch",))
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
