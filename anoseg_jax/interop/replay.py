"""Writes what another implementation needs to repeat training step by step (docs/pytorch.md)."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils.epath import Path
from jax import Array
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict

from anoseg_jax.images import batches
from anoseg_jax.interop import torch_weights
from anoseg_jax.method import losses, train, train_state
from anoseg_jax.method.train_state import StaticOptions, TrainState
from anoseg_jax.running import files, versions

FORMAT = "anoseg_jax replay 7"

# What each segmentation loss is, for `in_words`.
SEGMENTATION = {
    "l1": "mean absolute difference of sigmoid(logits) and masks",
    "bce": "mean binary cross-entropy of logits and masks",
    "focal": "4 x the mean focal loss of logits and masks, gamma 2, alpha 0.75 where the mask is 1 "
    "and 0.25 elsewhere",
}


def network_outputs(
    state: TrainState, examples: Mapping[str, Array], *, static: StaticOptions
) -> dict[str, Array]:
    """Returns the outputs of the networks for training examples.

    `logits` of the anomaly maps [b, h, w], `reconstructions` [b, h, w, 3], and with an adversarial
    loss the discriminator's logits of generated and of real pairs, `fake_logits`, `real_logits`.
    """
    masks = examples["masks"]
    logits, reconstructions = static.generator.apply(
        {"params": state.generator}, examples["defective"], examples["bank_distances"]
    )
    outputs = {"logits": logits, "reconstructions": reconstructions}
    if static.adversarial:
        discriminator_fn = partial(static.discriminator.apply, {"params": state.discriminator})
        fake_maps = jax.nn.sigmoid(logits) * (1 - masks)
        outputs["fake_logits"] = discriminator_fn(reconstructions, fake_maps)
        outputs["real_logits"] = discriminator_fn(examples["good"], jnp.zeros_like(masks))
    return outputs


def step(
    state: TrainState,
    examples: Mapping[str, Array],
    options: Mapping[str, Any],
    *,
    static: StaticOptions,
) -> tuple[TrainState, dict[str, Array], dict[str, Any], dict[str, Array]]:
    """Runs one training step on examples, `static.accumulate` aside; pure.

    Returns:
      The next state; loss terms and gradient norms; gradients by player, before clipping; and
      `network_outputs`.
    """
    outputs = network_outputs(state, examples, static=static)
    state, metrics, gradients = train.update_players(
        state, examples, options, loss_fn=train.loss_fn, static=static._replace(accumulate=1)
    )
    return state, metrics, dict(zip(state.PLAYERS, gradients, strict=True)), outputs


def by_name(state: TrainState, gradients: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Returns a state and the gradients that led to it, by kind and name.

    Each kind is a state_dict of both players (torch_weights.to_torch): `weights`, with the memory
    bank; `average`, of the generator's weights; `gradients`; and Adam's averages of the gradients
    (`first_moment`) and of their squares (`second_moment`).
    """
    params = {player: getattr(state, player) for player in state.PLAYERS}

    def moments(name: str) -> dict[str, Any]:
        # The optimizers are flat (train_state.create_optimizers): one vector for each player.
        return {
            player: ravel_pytree(params[player])[1](
                optax.tree.get(getattr(state, f"{player}_opt"), name)
            )
            for player in state.PLAYERS
        }

    generator = torch_weights.generator_arrays(state.generator, state.memory_bank)
    kinds = {
        "weights": params | {"generator": generator},
        "average": {"generator": state.ema},
        "gradients": gradients,
        "first_moment": moments("mu"),
        "second_moment": moments("nu"),
    }
    return {kind: torch_weights.to_torch(arrays) for kind, arrays in kinds.items()}


def to_nchw(images: Array) -> np.ndarray:
    """Returns images [b, h, w, c] as [b, c, h, w], and other arrays as they are."""
    images = np.asarray(images)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if images.ndim == 4 else images)


def losses_in_words(loss: ConfigDict) -> dict[str, str]:
    """Returns sentences about the losses of both players and each of their terms, by name."""
    total = f"the generator's: {loss.segmentation_weight:g} x loss_segmentation"
    words = {"loss": total, "loss_segmentation": SEGMENTATION[loss.segmentation]}
    if loss.reconstruction_weight:
        words["loss"] += f" + {loss.reconstruction_weight:g} x loss_reconstruction"
        words["loss_reconstruction"] = (
            "for each image, mean absolute error of reconstruction and good image over the pixels "
            "where the mask is 0; then the mean over the images"
        )
    if not loss.adversarial_weight:
        return words
    words["loss"] += f" + {loss.adversarial_weight:g} x loss_adversarial"
    words["loss"] += "; the discriminator's: loss_discriminator"
    words["pairs"] = (
        "generated: reconstructions, and sigmoid(logits) x (1 - masks), with fake_logits; real: "
        "good images, and maps of zeros, with real_logits"
    )
    words["loss_adversarial"] = "mean softplus(-fake_logits)"
    words["loss_discriminator"] = (
        "mean softplus(-real_logits) + mean softplus(fake_logits) + "
        f"{loss.label_smoothing:g} x (mean real_logits - mean fake_logits)"
    )
    words["gradient_norm_adversarial"] = (
        "take the gradient of loss_adversarial (weight 1) by the reconstructions and by the maps "
        "of the generated pairs, with the discriminator's weights fixed; the limit is 1 / (b x "
        "sqrt(n)) for b images and n numbers of one of them; the norm of each image's gradient by "
        "each of the two, divided by its limit; the mean over images and both"
    )
    if loss.limit_adversarial:
        words["adversarial_gradients"] = (
            "the generator learns from loss_adversarial through these two gradients only, after "
            "those of a norm above the limit are scaled down to it, each image and each of the two "
            "by itself; the value of loss_adversarial is the unlimited one"
        )
    if loss.gradient_penalty:
        words["loss"] += f" + {loss.gradient_penalty:g} x loss_penalty"
        step = losses.PENALTY_STEP
        words["loss_penalty"] = (
            f"mean over all logits of ((logits of the pair + {step:g} x noise) - (logits of the "
            f"pair))^2 / {step:g}^2, of the generated pairs plus that of the real pairs; channels "
            "0 to 2 of noise move the image, channel 3 the map; no gradient goes to the generator"
        )
    return words


def in_words(config: ConfigDict) -> dict[str, str]:
    """Returns sentences that say what a step computes, for an implementation in another library."""
    bank, warmup = config.memory_bank, config.warmup_steps
    decay = max(config.num_steps, warmup + 1)
    rate = f"{config.learning_rate:g}"
    words = {
        "batch": f"{config.batch_size} images of {config.image_size[0]}x{config.image_size[1]}",
        **losses_in_words(config.loss),
        "gradients": "of each player's own loss by its own weights, both from one forward pass; "
        "those of the reconstructor, of the anomaly head and of the discriminator are scaled down, "
        f"each by itself, to a global norm of {config.clip_norm:g} if it is larger",
        "learning_rate": f"from {rate} / {warmup + 1} at the first step linearly to {rate} after "
        f"{warmup} steps, then half a cosine, 0 after {decay}; step n (from 1) has that of n - 1",
        "generator": "AdamW, beta1 0.9, beta2 0.999, epsilon 1e-8 (added to the corrected root), "
        f"decoupled weight decay {config.weight_decay:g} x learning rate of all parameters",
        "discriminator": "Adam, beta1 0.5, else the same, without weight decay, at "
        f"{config.discriminator_scale:g} x the learning rate",
        "average": "average += (1 - d) x (weights - average) after each step, with d = min("
        f"{config.ema_decay:g}, n / (n + 9)) at step n (from 1)",
        "group_norm": "8 groups, epsilon 1e-6",
        "leaky_relu": "slope 0.1 in all blocks, 0.2 after the discriminator's first convolution",
    }
    if bank.size:
        words["memory_bank"] = (
            f"{bank.size} patches at each of two scales (generator.memory and .coarse_memory); no "
            "step changes it. Each good image was scaled to the mean generator.brightness, by a "
            "factor from 0.5 to 2, and clipped to [0, 1], before augmentation; prediction does "
            "the same with the images that it gets. The batches have the standardized distances "
            "to both scales as bank_distances, averaged over all patches that contain a pixel, "
            "those to the coarse scale enlarged, leave-one-out by image_ids. The anomaly head's "
            f"input has the first {config.model.distance_scales} of them. Prediction adds them to "
            f"the logits, times {bank.distance_weights[0]:g} and {bank.distance_weights[1]:g}"
        )
    return words


def export(config: ConfigDict, images: np.ndarray, folder: Path) -> None:
    """Trains for `config.num_steps` steps as `train.fit` does, on one device, and writes each step.

    `config` and `images` are those of `train.fit`. Files in `folder` are replaced.
    """
    static, options = train_state.split_options(config)
    _, step_key = train_state.seed_keys(config.seed)
    arrays, _ = train.split_images(config, images)
    state, _ = train.starting_point(config, arrays, train.images_sha256(images), saved=None)
    metadata = {"config": json.loads(config.to_json())}
    torch_weights.save(folder / "initial.safetensors", by_name(state, {})["weights"], metadata)

    brightness = state.memory_bank and state.memory_bank.brightness
    run_step = jax.jit(partial(step, static=static))
    bank_distances = jax.jit(partial(train.bank_distances, static=static))
    train_batches = batches.train_batches(arrays, 0, batch_size=config.batch_size, seed=config.seed)
    steps = []
    for number, batch in zip(range(1, config.num_steps + 1), train_batches, strict=False):
        # As in train.train_step, but the examples are fetched before the step runs on them.
        key = jax.random.fold_in(step_key, number - 1)
        examples = train.jitted_make_examples(key, batch, options, brightness, static=static)
        examples["bank_distances"] = bank_distances(
            state, examples["defective"], examples["image_ids"]
        )
        state, metrics, gradients, outputs = run_step(state, examples, options)
        written = {name: to_nchw(x) for name, x in examples.items() if x is not None}
        torch_weights.save(folder / f"batch_{number:05}.safetensors", written, {})
        rate = train_state.learning_rate_schedule(number - 1, options["optimizer"])
        line = {"step": number, "learning_rate": float(rate)}
        steps.append(line | {name: float(value) for name, value in metrics.items()})
        if number == 1:
            arrays_of_step = {f"outputs.{name}": to_nchw(x) for name, x in outputs.items()}
            for name, x in torch_weights.to_torch(gradients).items():
                arrays_of_step[f"gradients.{name}"] = x
            torch_weights.save(folder / "first_step.safetensors", arrays_of_step, {})

    kinds = by_name(state, gradients)
    final = {f"{kind}.{name}": x for kind, named in kinds.items() for name, x in named.items()}
    torch_weights.save(folder / "final.safetensors", final, metadata)
    replay = {
        "format": FORMAT,
        "in_words": in_words(config),
        "steps": steps,
        "config": metadata["config"],
        "versions": versions.versions(),
        "device": jax.local_devices()[0].device_kind,
    }
    files.write_text(folder / "replay.json", json.dumps(replay, indent=2) + "\n")
