"""Writes what another implementation needs to repeat training step by step (docs/pytorch.md)."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils.epath import Path
from jax import Array
from ml_collections import ConfigDict

from anoseg_jax import evaluate
from anoseg_jax.interop import torch_weights
from anoseg_jax.method import train
from anoseg_jax.method.train_state import Optimizers, TrainState
from anoseg_jax.running import files


def keep_gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimizer with the gradients it was last given as the first part of its state."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradients, *_: (gradients,) * 2
    )
    return optax.chain(keep, optimizer)


def start(state: TrainState, optimizers: Optimizers) -> TrainState:
    """Returns a fresh state for optimizers that keep their gradients."""
    return state.replace(
        generator_opt=optimizers.generator.init(state.generator),
        discriminator_opt=optimizers.discriminator.init(state.discriminator),
    )


def step(
    state: TrainState,
    good: Array,
    defective: Array,
    masks: Array,
    marks: Array,
    *,
    generator: nn.Module,
    discriminator: nn.Module,
    optimizers: Optimizers,
    loss: Mapping[str, Any],
    ema_decay: float,
) -> tuple[TrainState, dict[str, Array], dict[str, Array]]:
    """One training step on examples that are already drawn; pure.

    Args:
      state: of `start`.
      good: images [b, h, w, 3] in [0, 1].
      defective: the same with defects.
      masks: of these, [b, h, w].
      marks: of the images that they are made of, [b].
      generator: the generator's module.
      discriminator: the discriminator's module.
      optimizers: that keep their gradients.
      loss: `config.loss`.
      ema_decay: of the averaged weights.

    Returns:
      The next state, losses and gradient norms, and what the networks put out on the way:
      `logits` of the map, `reconstructions`, and the discriminator's logits of real and fake pairs.
    """

    def players_loss(
        generator_params: Any,
        discriminator_params: Any,
        good: Array,
        defective: Array,
        masks: Array,
        marks: Array,
    ) -> tuple:
        totals, terms = train.loss_fn(
            generator_params,
            discriminator_params,
            good,
            defective,
            masks,
            marks,
            generator=generator,
            discriminator=discriminator,
            loss=loss,
        )
        # The compiler finds that these are the same as the loss's.
        logits, reconstructions = generator.apply(
            {"params": generator_params}, defective, marks, recall=False
        )
        judge = partial(discriminator.apply, {"params": discriminator_params})
        outputs = {
            "logits": logits,
            "reconstructions": reconstructions,
            "fake_logits": judge(reconstructions, jax.nn.sigmoid(logits) * (1 - masks)),
            "real_logits": judge(good, jnp.zeros_like(masks)),
        }
        return totals, terms | {"outputs": outputs}

    state, metrics = train.update_players(
        state,
        players_loss,
        (good, defective, masks, marks),
        optimizers=optimizers,
        ema_decay=ema_decay,
        accumulate=1,
        axis_name=None,
    )
    return state, metrics, metrics.pop("outputs")


EXAMPLES = ("good", "defective", "masks", "marks")
MEMORIES = ("generator.memory.", "generator.coarse_memory.")


def by_name(state: TrainState) -> dict[str, dict[str, np.ndarray]]:
    """Returns a state by kind, each a state_dict over both players (see torch_weights.to_torch).

    `weights`, the `average` of the generator's, `gradients` (before clipping) of the step that led
    here, and Adam's averages of them (`first_moment`) and of their squares (`second_moment`). What
    is not learned, the patch memories, is among the weights alone.
    """
    optimizers = {"generator": state.generator_opt, "discriminator": state.discriminator_opt}
    kinds = {
        "weights": {"generator": state.generator, "discriminator": state.discriminator},
        "average": {"generator": state.ema},
        "gradients": {name: opt[0] for name, opt in optimizers.items()},
        "first_moment": {name: optax.tree.get(o, "mu") for name, o in optimizers.items()},
        "second_moment": {name: optax.tree.get(o, "nu") for name, o in optimizers.items()},
    }
    return {
        kind: {
            name: array
            for name, array in torch_weights.to_torch(trees).items()
            if kind == "weights" or not name.startswith(MEMORIES)
        }
        for kind, trees in kinds.items()
    }


def in_nchw(images: Array) -> np.ndarray:
    """Returns images [b, h, w, c] as [b, c, h, w]; maps [b, h, w] as they are."""
    images = np.asarray(images)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if images.ndim == 4 else images)


def in_words(config: ConfigDict) -> dict[str, str]:
    """Returns what a step does with which numbers, for whoever writes it in another library."""
    loss, warmup = config.loss, config.warmup_steps
    decay = max(config.num_steps, warmup + 1)
    rate = f"{config.learning_rate:g}"
    return {
        "batch": f"{config.batch_size} images of {config.image_size[0]}x{config.image_size[1]}",
        "loss": f"{loss.segmentation_weight:g} x segmentation ({loss.segmentation}) + "
        f"{loss.reconstruction_weight:g} x reconstruction + "
        f"{loss.adversarial_weight:g} x adversarial ({loss.adversarial}); the discriminator's is "
        "its own side of the adversarial loss; a term of weight 0 is not computed",
        "gradients": "each player's, of its own loss by its own weights, from one forward pass; "
        f"scaled down to a global norm of {config.clip_norm:g} where it is larger",
        "learning_rate": f"from {rate} / {warmup + 1} at the first step linearly to {rate} after "
        f"{warmup} steps, then half a cosine, 0 after {decay}; step n (from 1) has that of n - 1",
        "generator": "AdamW, beta1 0.9, beta2 0.999, epsilon 1e-8 (added to the corrected root), "
        f"decoupled weight decay {config.weight_decay:g} x learning rate of all but the patch "
        "memories, which stay as they are",
        "discriminator": "Adam, beta1 0.5, else the same, without weight decay, at "
        f"{config.discriminator_scale:g} x the learning rate",
        "average": "average += (1 - d) x (weights - average) after each step, with d = min("
        f"{config.ema_decay:g}, n / (n + 9)) at step n (from 1)",
        "group_norm": "8 groups, epsilon 1e-6",
        "leaky_relu": "slope 0.1 in all blocks, 0.2 after the discriminator's first convolution",
    }


def export(
    config: ConfigDict, images: np.ndarray, batches: Iterator[np.ndarray], folder: Path
) -> None:
    """Trains for `config.num_steps` steps and writes all that a repetition needs into `folder`.

    Args:
      config: the options of one category.
      images: good images that the generator's memories are of, uint8 [n, h, w, 3].
      batches: good images, uint8 [config.batch_size, h, w, 3].
      folder: where replay.json and the safetensors files are written; one that is there is
        written anew.
    """
    parts = train.create_parts(config)
    keywords = parts.train_step.keywords
    optimizers = Optimizers(*map(keep_gradients, keywords["optimizers"]))
    names = ("generator", "discriminator", "loss", "ema_decay")
    run_step = jax.jit(
        partial(step, optimizers=optimizers, **{name: keywords[name] for name in names})
    )
    draw = jax.jit(parts.draw_examples)
    remembered = images[np.arange(train.REMEMBERED) * len(images) // train.REMEMBERED]
    state = start(parts.create_state(remembered), optimizers)
    about = {"config": json.loads(config.to_json())}
    torch_weights.save(folder / "initial.safetensors", by_name(state)["weights"], about)
    steps = []
    for number, batch in zip(range(1, config.num_steps + 1), batches, strict=False):
        examples = draw(jax.random.fold_in(parts.draw_key, number - 1), batch, 0)
        state, metrics, outputs = run_step(state, *examples)
        named = dict(zip(EXAMPLES, map(in_nchw, examples), strict=True))
        torch_weights.save(folder / f"batch_{number:05}.safetensors", named, {})
        line = {"step": number, "learning_rate": float(parts.schedule(number - 1))}
        steps.append(line | {name: float(value) for name, value in metrics.items()})
        if number == 1:
            first = {f"outputs.{name}": in_nchw(value) for name, value in outputs.items()}
            first |= {f"gradients.{k}": v for k, v in by_name(state)["gradients"].items()}
            torch_weights.save(folder / "first_step.safetensors", first, {})
    final = by_name(state)
    arrays = {f"{kind}.{k}": v for kind, of in final.items() for k, v in of.items()}
    torch_weights.save(folder / "final.safetensors", arrays, about)
    written = {
        "format": "anoseg_jax replay 1",
        "in_words": in_words(config),
        "steps": steps,
        "config": about["config"],
        "versions": evaluate.versions(),
        "device": jax.local_devices()[0].device_kind,
    }
    files.write_text(folder / "replay.json", json.dumps(written, indent=2) + "\n")
