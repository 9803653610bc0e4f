"""Training of the generator and its discriminator: examples, losses, the step, `fit`.

AnoSeg (Song et al., arXiv 2110.03396) has three parts: hard augmentation makes defects with their
masks (`make_examples`), adversarial learning with a masked reconstruction trains the networks
(`loss_fn`), and coordinate channels tell them where a pixel is (models.py).

The two players of the adversarial game are the generator and the discriminator. In detector.py they
are the detector and its discriminator. Each has its own loss, gradients and optimizer.

Arguments of several functions: `batch` has this device's `image` uint8 [b, h, w, 3] and `image_id`
int32 [b]; `options` and `static` are the arrays and the static options of
`train_state.split_options`; `axis_name` is the axis of the surrounding `jax.pmap`, or None.
"""

import functools
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax import Array
from ml_collections import ConfigDict

from anoseg_jax.images import batches
from anoseg_jax.method import (
    augment,
    defects,
    losses,
    memory_bank,
    models,
    predict,
    thresholds,
    train_state,
)
from anoseg_jax.method.train_state import Arrays, Options, StaticOptions, TrainState
from anoseg_jax.running import checkpoint, distributed, loop, progress, train_log

NUM_PANELS = 8  # examples that are drawn for TensorBoard
Axis = str | None
Losses = Callable[..., tuple[tuple[Array, Array], dict[str, Array]]]


def example_keys(key: Array, count: int, axis_name: Axis) -> Array:
    """Returns a PRNG key for each of this device's examples, [count].

    It depends on the example's index in the batch of all devices: the number of devices does not
    change what is drawn.
    """
    offset = jax.lax.axis_index(axis_name) * count if axis_name else 0
    return jax.vmap(partial(jax.random.fold_in, key))(offset + jnp.arange(count))


def previous_images(images: Array, axis_name: Axis) -> Array:
    """Returns the batch of all devices shifted by one image; the last image comes first."""
    last = images[-1:]
    if axis_name:
        devices = jax.lax.psum(1, axis_name)
        last = jax.lax.ppermute(last, axis_name, [(i, (i + 1) % devices) for i in range(devices)])
    return jnp.concatenate([last, images[:-1]])


def make_examples(
    key: Array,
    batch: Arrays,
    options: Options,
    brightness: Array | None,
    *,
    static: StaticOptions,
    axis_name: Axis = None,
) -> dict[str, Array]:
    """Makes training examples from good images: augmentation, then synthetic defects.

    `key` is the step's, `brightness` the memory bank's, if there is one. Returns `good` images [b,
    h, w, 3] in [0, 1]; the same images with defects, `defective`; their `masks` [b, h, w];
    `image_ids` [b]; and, where the discriminator's loss has a gradient penalty, its normal `noise`
    [b, h, w, 4].
    """
    images = memory_bank.to_float(batch["image"], brightness)
    split = partial(jax.random.split, num=3)
    keys = jax.vmap(split)(example_keys(key, len(images), axis_name))  # [b, 3]
    augment_image = partial(augment.augment, **options["augment"])
    good = jax.vmap(augment_image)(keys[:, 0], images)
    others = previous_images(images, axis_name)

    synthesize = partial(defects.synthesize, static=static.defects, arrays=options["defects"])
    defective, masks = jax.vmap(lambda key, image, other: synthesize(key, image, other=other))(
        keys[:, 1], good, others
    )
    # On CPUs XLA would fuse the defects into each operation that reads them, and compute them again
    # there: a sixth of a step. A branch prevents it; its condition is always true.
    always = options["defects"]["normal_fraction"] <= 1
    defective, masks = jax.lax.platform_dependent(
        (defective, masks),
        cpu=lambda x: jax.lax.cond(always, lambda: x, lambda: jax.tree.map(jnp.zeros_like, x)),
        default=lambda x: x,
    )
    image_ids = batch["image_id"]
    examples = {"good": good, "defective": defective, "masks": masks, "image_ids": image_ids}
    if static.adversarial and static.adversarial.penalized:
        examples["noise"] = losses.penalty_noise(keys[:, 2], good)
    return examples


# One program for panels and replay; the training step contains its own copy.
jitted_make_examples = jax.jit(make_examples, static_argnames="static")


def loss_fn(
    params: tuple[Any, Any], examples: Arrays, weights: Arrays, *, static: StaticOptions
) -> tuple[tuple[Array, Array], dict[str, Array]]:
    """Returns the losses of the generator and of the discriminator, and each term by name.

    `examples` are those of `make_examples`, and their `bank_distances`. `weights` are those of the
    loss terms; a term whose weight is zero is not computed and has no name. The generator's loss
    has the right gradients, not the sum of the terms as its value (losses.adversarial).
    """
    generator_params, discriminator_params = params
    good, defective, masks = (examples[name] for name in ("good", "defective", "masks"))
    generate = models.apply_fn(static.generator, remat=static.remat)
    logits, reconstructions = generate(generator_params, defective, examples["bank_distances"])

    # Pixel-wise segmentation: the anomaly map against the mask of the synthetic defects.
    segmentation = losses.SEGMENTATION[static.segmentation](logits=logits, masks=masks)
    terms = {"loss_segmentation": segmentation}
    total = weights["segmentation_weight"] * segmentation

    # Reconstruction of the good image, outside of the defects alone.
    if static.reconstruction:
        terms["loss_reconstruction"] = losses.masked_l1(
            reconstructions=reconstructions, images=good, masks=masks
        )
        total += weights["reconstruction_weight"] * terms["loss_reconstruction"]

    # Adversarial. Real pairs: a good image and an empty map. Generated pairs: the reconstruction,
    # and the map outside of the defects; inside of them the map should not be empty.
    if not static.adversarial:
        return (total, jnp.zeros(())), terms
    adversarial, discriminator_loss, adversarial_terms = losses.adversarial(
        models.apply_fn(static.discriminator, remat=static.remat),
        discriminator_params,
        form=static.adversarial,
        fake=(reconstructions, jax.nn.sigmoid(logits) * (1 - masks)),
        real=(good, jnp.zeros_like(masks)),
        noise=examples.get("noise"),
        weights=weights,
    )
    total += weights["adversarial_weight"] * adversarial
    return (total, discriminator_loss), terms | adversarial_terms


def players_gradients(
    players_loss: Losses, params: tuple[Any, Any], examples: Any, accumulate: int = 1
) -> tuple[tuple[Any, Any], dict[str, Array]]:
    """Returns the gradient of each player and the loss terms, from one forward pass of both.

    Args:
      players_loss: maps the parameters of both players and the examples to each player's loss, and
        terms by name. All of them are means over the examples.
      params: of both players.
      examples: arrays [b, ...].
      accumulate: the number of chunks that the examples are split into, one after the other in
        memory; it must divide b. It changes nothing but rounding.
    """

    def gradients(chunk: Any) -> tuple[tuple[Any, Any], dict[str, Array]]:
        # Each player has the gradient of its own loss by its own parameters; XLA drops the rest.
        _, vjp_fn, terms = jax.vjp(lambda p: players_loss(p, chunk), params, has_aux=True)
        one, zero = jnp.ones(()), jnp.zeros(())
        ((network_gradients, _),) = vjp_fn((one, zero))
        ((_, discriminator_gradients),) = vjp_fn((zero, one))
        return (network_gradients, discriminator_gradients), terms

    if accumulate == 1:
        return gradients(examples)
    chunks = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), examples)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], chunks))
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    add = lambda total, chunk: (jax.tree.map(jnp.add, total, gradients(chunk)), None)  # noqa: E731
    total, _ = jax.lax.scan(add, zeros, chunks)
    return jax.tree.map(lambda x: x / accumulate, total)


def update_players(
    state: Any,
    examples: Arrays,
    options: Options,
    *,
    loss_fn: Losses,
    static: Any,
    axis_name: Axis = None,
) -> tuple[Any, dict[str, Array], tuple[Any, Any]]:
    """Returns the state after one update of both players, metrics, and gradients before clipping.

    `state` is a TrainState, or the detector's, whose `loss_fn` takes the `examples`.
    """
    players_loss = partial(loss_fn, weights=options["loss"], static=static)
    params = tuple(getattr(state, player) for player in state.PLAYERS)
    gradients, metrics = players_gradients(players_loss, params, examples, static.accumulate)
    if axis_name:  # the mean over devices; the same axis_name as in loop.parallelize
        gradients, metrics = jax.lax.pmean((gradients, metrics), axis_name)
    clipped = []
    for player, gradient in zip(state.PLAYERS, gradients, strict=True):
        # Each network by itself: a spike in one must not shrink the gradients of another.
        networks = {name: gradient[name] for name in models.NETWORKS if name in gradient}
        clipped.append({})
        for name, tree in (networks or {player: gradient}).items():
            norm = metrics[f"gradient_norm_{name}"] = optax.global_norm(tree)
            factor = 1 / jnp.maximum(norm / options["optimizer"]["clip_norm"], 1.0)
            tree = jax.tree.map(lambda x, factor=factor: factor * x, tree)
            clipped[-1].update({name: tree} if networks else tree)
    state = train_state.apply_gradients(state, tuple(clipped), options["optimizer"])
    return state, metrics, gradients


def bank_distances(
    state: TrainState, images: Array, image_ids: Array, *, static: StaticOptions
) -> Array | None:
    """Returns the leave-one-out distances to the memory bank; None without a bank."""
    if static.grid is None:
        return None
    return memory_bank.bank_distances(state.memory_bank, images, image_ids, grid=static.grid)


def train_step(
    state: TrainState,
    batch: Arrays,
    key: Array,
    options: Options,
    *,
    static: StaticOptions,
    axis_name: Axis = "batch",
) -> tuple[TrainState, dict[str, Array]]:
    """Returns the state after one training step of both players, and its metrics; pure.

    `key` is the seed's, the same at every step. The metrics are the loss terms and gradient norms
    of this step, float32 scalars.
    """
    step_key = jax.random.fold_in(key, state.step)
    # All examples of this device at once: `accumulate` does not change what is drawn.
    brightness = state.memory_bank and state.memory_bank.brightness
    examples = make_examples(
        step_key, batch, options, brightness, static=static, axis_name=axis_name
    )
    # Once, outside of gradient and remat: no parameter is in the distances.
    examples["bank_distances"] = bank_distances(
        state, examples["defective"], examples["image_ids"], static=static
    )
    state, metrics, _ = update_players(
        state, examples, options, loss_fn=loss_fn, static=static, axis_name=axis_name
    )
    return state, metrics


def split_images(
    config: ConfigDict, images: np.ndarray, validation: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns `image` and `image_id` (int32) of the images to train on, and the held-out images.

    With `validation`, other good images, these are held out and all `images` are trained on.
    """
    image_ids = batches.assign_image_ids(images)
    if validation is not None:
        return {"image": images, "image_id": image_ids}, validation
    kept, held_out = batches.hold_out(image_ids, fraction=config.held_out, seed=config.seed)
    return {"image": images[kept], "image_id": image_ids[kept]}, images[held_out]


def images_sha256(images: np.ndarray, validation: np.ndarray | None = None) -> str:
    """Returns the hash by which a resumed run recognizes its images."""
    digest = hashlib.sha256(np.ascontiguousarray(images))
    if validation is not None:
        digest.update(np.ascontiguousarray(validation))
    return digest.hexdigest()


def make_checkpoint_fn(
    config: ConfigDict,
    template: TrainState,
    arrays: Arrays,
    held_out: np.ndarray,
    *,
    panels: bool,
) -> Callable[[TrainState, int], tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Returns `on_checkpoint` of loop.Training: thresholds, FLOPs, `panels` for TensorBoard.

    `arrays` and `held_out` are those of `split_images`. `template` has the shapes of the state.
    """
    static, options = train_state.split_options(config)
    _, step_key = train_state.seed_keys(config.seed)
    predict_fn = predict.sharded_predict_fn(config)
    good, image_ids, what = thresholds.good_images(config, arrays, held_out)
    shapes = {"params": template.ema, "memory_bank": template.memory_bank}
    # Counted at the first checkpoint: nobody waits for it before the first step.
    flops_per_image = functools.cache(partial(predict.flops_per_image, shapes, config))

    def on_checkpoint(state: TrainState, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        variables = predict.replicate({"params": state.ema, "memory_bank": state.memory_bank})
        predict_good = partial(predict_fn, variables, outputs=2)
        calibrated = thresholds.calibrate(predict_good, good, image_ids, config=config, what=what)
        additions = {"thresholds": calibrated, "flops_per_image": flops_per_image()}
        if not panels or not len(held_out):
            return additions, {}
        # The distances of predict_fn are not leave-one-out: held-out images are not in the bank.
        rows = np.arange(config.batch_size) % len(held_out)
        batch = {"image": held_out[rows], "image_id": rows.astype(np.int32)}
        key = jax.random.fold_in(step_key, step)
        brightness = jax.device_get(state.memory_bank and state.memory_bank.brightness)
        examples = jitted_make_examples(key, batch, options, brightness, static=static)
        examples = jax.device_get(examples)
        examples = {name: x[:NUM_PANELS] for name, x in examples.items()}
        defective = np.round(255 * examples["defective"]).astype(np.uint8)
        maps, _, reconstructions = predict_fn(variables, defective)
        return additions, train_log.draw_panels(examples, maps, reconstructions)

    return on_checkpoint


def check_images(sha256: str, folder: epath.PathLike, record: Mapping[str, Any]) -> None:
    """Raises TrainingError if the record of a checkpoint in `folder` is of other images."""
    recorded = record["images_sha256"]
    if recorded != sha256:
        raise loop.TrainingError(
            f"the checkpoint was trained with another images_sha256: {recorded[:12]}, now "
            f"{sha256[:12]}. Restore the images, or train in a new --workdir; "
            f"--config.resume={folder} starts from these weights there"
        )


def starting_point(
    config: ConfigDict,
    arrays: Mapping[str, np.ndarray],
    sha256: str,
    saved: checkpoint.Saved | None,
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the first state, with its memory bank, and the record of the run so far.

    `arrays` are those of `split_images`. `saved` is the checkpoint to resume from: its memory bank
    is kept if images, seed and `held_out` are the same; with `config.resume` they may differ, and
    with other images it is at step 0.
    """
    static, options = train_state.split_options(config)
    if saved is None:
        init_key, _ = train_state.seed_keys(config.seed)
        size = tuple(config.image_size)
        with progress.waiting("creating the networks", "usually a few seconds"):
            create = train_state.jit_create(train_state.create_state)
            state = create(init_key, options, static=static, image_size=size)
        record, has_bank = {"train_seconds": 0.0}, False
    else:
        state, record = saved.state, saved.record
        has_bank = (sha256, config.seed, config.held_out) == data_of(saved)
        if record["images_sha256"] != sha256:
            print(
                f"the images are not those of config.resume={config.resume}: a new schedule of "
                f"{config.num_steps} steps starts from its weights, and the memory bank is built "
                f"anew from {len(arrays['image'])} images"
            )
        elif not has_bank:
            print(
                "warning: the run of config.resume was trained on images that are held out now: "
                "thresholds may be too low",
                file=sys.stderr,
            )
    if static.grid and not has_bank:
        with progress.waiting("building the memory bank of good patches", "usually under a minute"):
            bank = memory_bank.build(
                arrays["image"], arrays["image_id"], seed=config.seed, options=config.memory_bank
            )
        # The last bits of a product differ between types of CPUs: all take one process's bank.
        state = state.replace(memory_bank=distributed.broadcast(bank))
    parameters = sum(x.size for x in jax.tree.leaves(state.generator))
    return state, record | {"images_sha256": sha256, "parameters": parameters}


def data_of(saved: checkpoint.Saved) -> tuple[str, int, float]:
    """Returns what decides which images are in a checkpoint's memory bank, and under which ids."""
    return saved.record["images_sha256"], saved.config["seed"], saved.config["held_out"]


def fit(
    config: ConfigDict,
    images: np.ndarray,
    folder: epath.PathLike,
    *,
    validation: np.ndarray | None = None,
    make_batches: Callable[..., Iterator[dict[str, np.ndarray]]] = batches.train_batches,
    writer: Any = None,
) -> checkpoint.Saved:
    """Trains the generator until `config.num_steps`, or resumes; returns the newest checkpoint.

    Args:
      config: the options of configs/default.py.
      images: all good images, sorted, uint8 [n, h, w, 3]. A share of them, `config.held_out`, is
        not trained on. For the thresholds, which each checkpoint records, see
        `thresholds.good_images`.
      folder: for checkpoints/, train_log.jsonl, config.json, parameters.txt.
      validation: the held-out good images, uint8 [n, h, w, 3]: none of `images` are held out.
      make_batches: `images.batches.train_batches`, or the same as a tf.data pipeline.
      writer: of clu.metric_writers, for TensorBoard; None writes nothing.

    Returns:
      What `checkpoint.restore_newest` reads afterwards; `Predictor` takes it.

    Raises:
      loop.TrainingError: a loss or a gradient is not finite (the last good checkpoint is kept), or
        options or images differ from those of the checkpoint.
      checkpoint.CheckpointError: there are checkpoints, and none can be read.
      OSError: something cannot be written.
      distributed.Stopped: a signal has asked for it; a checkpoint is saved.
    """
    static, options = train_state.split_options(config)
    arrays, held_out = split_images(config, images, validation)
    sha256, template = images_sha256(images, validation), train_state.template(config)
    # TensorBoard's panels: of several processes all predict, and one writes.
    panels = writer is not None or jax.process_count() > 1
    training = loop.Training(
        network="generator",
        template=template,
        step=loop.parallelize(train_step, static),
        key=train_state.seed_keys(config.seed)[1],
        options=options,
        arrays=arrays,
        learning_rate=partial(train_state.learning_rate_schedule, options=options["optimizer"]),
        check_record=partial(check_images, sha256, folder),
        start=partial(starting_point, config, arrays, sha256),
        on_checkpoint=make_checkpoint_fn(config, template, arrays, held_out, panels=panels),
        has_data_of=lambda record: record["images_sha256"] == sha256,
    )
    return loop.run(config, folder, training, make_batches=make_batches, writer=writer)
