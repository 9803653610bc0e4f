"""Training of the generator and its discriminator: examples, losses, the step, `fit`."""

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
from anoseg_jax.method.train_state import StaticOptions, TrainState
from anoseg_jax.running import checkpoint, distributed, loop, progress, train_log

NUM_PANELS = 8  # examples that are drawn for TensorBoard
Losses = Callable[..., tuple[tuple[Array, Array], dict[str, Array]]]


def previous_images(images: Array, axis_name: str | None) -> Array:
    """Returns the batch of all devices shifted by one image; the last image comes first.

    `axis_name` is that of the `jax.pmap` this runs in; None outside of one.
    """
    last = images[-1:]
    if axis_name:
        devices = jax.lax.psum(1, axis_name)
        last = jax.lax.ppermute(last, axis_name, [(i, (i + 1) % devices) for i in range(devices)])
    return jnp.concatenate([last, images[:-1]])


def make_examples(
    key: Array,
    batch: Mapping[str, Array],
    options: Mapping[str, Any],
    *,
    static: StaticOptions,
    offset: Array | int = 0,
    axis_name: str | None = None,
) -> dict[str, Array]:
    """Makes training examples of good images: augmentation, then synthetic defects.

    Args:
      key: the step's PRNG key.
      batch: `image` uint8 [b, h, w, 3] and `image_id` int32 [b], this device's part.
      options: the arrays of `split_options`.
      static: the static options.
      offset: index of the first image in the batch of all devices: each example has its own key by
        its index, so that the number of devices does not change what is drawn.
      axis_name: of the `jax.pmap` this runs in; None outside of one.

    Returns:
      `good` images [b, h, w, 3] in [0, 1]; the same with defects, `defective`; their `masks`
      [b, h, w]; `image_ids` [b].
    """

    images = batch["image"].astype(jnp.float32) / 255
    index = offset + jnp.arange(len(images))
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(index)  # [b, 2]
    augment_image = partial(augment.augment, **options["augment"])
    good = jax.vmap(augment_image)(keys[:, 0], images)
    others = previous_images(images, axis_name)

    synthesize = partial(defects.synthesize, static=static.defects, arrays=options["defects"])
    defective, masks = jax.vmap(lambda key, image, other: synthesize(key, image, other=other))(
        keys[:, 1], good, others
    )
    # On CPUs XLA would fuse the defects into each operation that reads them and compute them again
    # there: a sixth of a step. A branch prevents it; its condition is always true.
    always = options["defects"]["normal_fraction"] <= 1
    defective, masks = jax.lax.platform_dependent(
        (defective, masks),
        cpu=lambda x: jax.lax.cond(always, lambda: x, lambda: jax.tree.map(jnp.zeros_like, x)),
        default=lambda x: x,
    )
    image_ids = batch["image_id"]
    return {"good": good, "defective": defective, "masks": masks, "image_ids": image_ids}


# For the memory bank, the panels and replay; the training step has it compiled in.
jitted_make_examples = jax.jit(make_examples, static_argnames="static")


def loss_fn(
    generator_params: Any,
    discriminator_params: Any,
    examples: Mapping[str, Array],
    weights: Mapping[str, Array],
    *,
    static: StaticOptions,
) -> tuple[tuple[Array, Array], dict[str, Array]]:
    """Returns the losses of the generator and of the discriminator, and each term by name.

    `examples` are those of `make_examples` and their `bank_distances`; `weights` those of the loss
    terms. Terms whose weight is zero are not computed and have no name.
    """
    good, defective, masks = (examples[name] for name in ("good", "defective", "masks"))
    generate = models.apply_fn(static.generator, remat=static.remat)
    logits, reconstructions = generate(generator_params, defective, examples["bank_distances"])

    # Pixel-wise: the map against the mask of the synthetic defects.
    segmentation = losses.SEGMENTATION[static.segmentation](logits=logits, masks=masks)
    terms = {"loss_segmentation": segmentation}
    total = weights["segmentation_weight"] * segmentation

    # Masked reconstruction: of the good image, where no defect covers it.
    if static.reconstruction:
        terms["loss_reconstruction"] = losses.masked_reconstruction(
            reconstructions=reconstructions, images=good, masks=masks
        )
        total += weights["reconstruction_weight"] * terms["loss_reconstruction"]

    # Adversarial. Real pairs: a good image and an empty map. Generated pairs: the reconstruction,
    # and the map where the image is good; where it is defective the map should not be empty.
    discriminator_total = jnp.zeros(())
    if static.adversarial:
        generator_side, discriminator_side = losses.ADVERSARIAL[static.adversarial]
        discriminator_fn = models.apply_fn(static.discriminator, remat=static.remat)
        fake_maps = jax.nn.sigmoid(logits) * (1 - masks)
        fake_logits = discriminator_fn(discriminator_params, reconstructions, fake_maps)
        real_logits = discriminator_fn(discriminator_params, good, jnp.zeros_like(masks))
        terms["loss_adversarial"] = generator_side(fake_logits=fake_logits)
        total += weights["adversarial_weight"] * terms["loss_adversarial"]
        discriminator_total = discriminator_side(real_logits=real_logits, fake_logits=fake_logits)
        terms["loss_discriminator"] = discriminator_total
    return (total, discriminator_total), terms


def players_gradients(
    players_loss: Losses,
    generator_params: Any,
    discriminator_params: Any,
    examples: Any,
    accumulate: int = 1,
) -> tuple[Any, Any, dict[str, Array]]:
    """Returns the gradient of each player and the loss terms, from one forward pass of both.

    Args:
      players_loss: of the parameters of both players and the examples; returns the loss of each and
        terms, all of them means over the examples.
      generator_params: see `train_state.TrainState`.
      discriminator_params: likewise.
      examples: arrays [b, ...].
      accumulate: the number of parts that the examples are split into, one after the other in
        memory; b must be a multiple of it. It changes nothing but rounding.
    """

    def gradients(chunk: Any) -> tuple[Any, Any, dict[str, Array]]:
        # Each player has the gradient of its own loss by its own parameters; XLA drops the rest.
        _, vjp_fn, terms = jax.vjp(
            lambda g, d: players_loss(g, d, chunk),
            generator_params,
            discriminator_params,
            has_aux=True,
        )
        one, zero = jnp.ones(()), jnp.zeros(())
        generator_gradients, _ = vjp_fn((one, zero))
        _, discriminator_gradients = vjp_fn((zero, one))
        return generator_gradients, discriminator_gradients, terms

    if accumulate == 1:
        return gradients(examples)
    parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), examples)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    add = lambda total, chunk: (jax.tree.map(jnp.add, total, gradients(chunk)), None)  # noqa: E731
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / accumulate, total)


def train_step(
    state: TrainState,
    batch: Mapping[str, Array],
    key: Array,
    options: Mapping[str, Any],
    *,
    static: StaticOptions,
    axis_name: str | None = "batch",
) -> tuple[TrainState, dict[str, Array]]:
    """Returns the state after one training step of both players, and its metrics; pure.

    Args:
      state: without a device axis.
      batch: `image` uint8 [b, h, w, 3] and `image_id` int32 [b], this device's part.
      key: the seed's PRNG key, the same at every step.
      options: the arrays of `split_options`.
      static: the static options.
      axis_name: of the `jax.pmap` this runs in; None outside of one.

    Returns:
      The next state, and the loss terms and gradient norms of this step (float32 scalars).
    """
    step_key = jax.random.fold_in(key, state.step)
    # All examples of this device at once, whatever `accumulate` is: the same are drawn.
    offset = jax.lax.axis_index(axis_name) * len(batch["image"]) if axis_name else 0
    examples = make_examples(
        step_key, batch, options, static=static, offset=offset, axis_name=axis_name
    )
    # Once, outside of gradient and remat: nothing about the bank is learned.
    examples["bank_distances"] = bank_distances(
        state, examples["defective"], examples["image_ids"], static=static
    )

    players_loss = partial(loss_fn, weights=options["loss"], static=static)
    generator_gradients, discriminator_gradients, metrics = players_gradients(
        players_loss, state.generator, state.discriminator, examples, static.accumulate
    )
    if axis_name:  # the mean over devices; the same axis_name as in loop.parallelize
        generator_gradients, discriminator_gradients, metrics = jax.lax.pmean(
            (generator_gradients, discriminator_gradients, metrics), axis_name
        )
    metrics["gradient_norm_generator"] = optax.global_norm(generator_gradients)
    metrics["gradient_norm_discriminator"] = optax.global_norm(discriminator_gradients)
    state = train_state.apply_gradients(
        state, generator_gradients, discriminator_gradients, options["optimizer"]
    )
    return state, metrics


def bank_distances(
    state: TrainState, images: Array, image_ids: Array, *, static: StaticOptions
) -> Array | None:
    """Returns the leave-one-out distances to the memory bank's fine scale; None without a bank."""
    if static.grid is None:
        return None
    return memory_bank.standardized_distances(
        state.memory_bank.fine, images, image_ids, grid=static.grid
    )


@functools.cache
def parallel_train_step(static: StaticOptions) -> Callable:
    """Returns the step on all local devices: one compiled program for each set of static options.

    It takes state, batch, key and options.
    """
    return loop.parallelize(partial(train_step, static=static))


def build_memory_bank(
    config: ConfigDict, images: np.ndarray, image_ids: np.ndarray
) -> memory_bank.MemoryBank:
    """Returns the memory bank of images that are trained on, uint8 [n, h, w, 3], with their ids."""
    static, options = train_state.split_options(config)
    key = jax.random.fold_in(train_state.seed_keys(config.seed)[0], 3)

    def examples_of(images: np.ndarray, image_ids: np.ndarray) -> dict[str, np.ndarray]:
        # In batches of the size that panels and replay have: one compiled program serves all.
        size, chunks = config.batch_size, []
        for start in range(0, len(images), size):
            rows = np.arange(start, start + size) % len(images)
            batch = {"image": images[rows], "image_id": image_ids[rows]}
            chunk_key = jax.random.fold_in(key, start)
            chunks.append(
                jax.device_get(jitted_make_examples(chunk_key, batch, options, static=static))
            )
        return {
            name: np.concatenate([x[name] for x in chunks])[: len(images)] for name in chunks[0]
        }

    return memory_bank.build(
        images,
        image_ids,
        seed=config.seed,
        options=config.memory_bank,
        coords=config.model.coords,
        make_examples=examples_of,
    )


def make_checkpoint_fn(
    config: ConfigDict,
    template: TrainState,
    held_out: np.ndarray,
    *,
    panels: bool,
) -> Callable[[TrainState, int], tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Returns a function of state and step: what a checkpoint's record and TensorBoard get.

    Args:
      config: the options of configs/default.py.
      template: shapes of the state.
      held_out: good images that are not trained on, uint8 [n, h, w, 3].
      panels: draws examples that are made of them beside their maps.
    """
    static, options = train_state.split_options(config)
    _, step_key = train_state.seed_keys(config.seed)
    predict_fn = predict.sharded_predict_fn(static.generator, config)
    shapes = {"params": template.ema, "memory_bank": template.memory_bank}
    count_flops = partial(predict.flops_per_image, shapes, static.generator, config)
    flops_per_image = functools.cache(count_flops)  # after the first step: nobody waits for it

    def on_checkpoint(state: TrainState, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        variables = predict.replicate({"params": state.ema, "memory_bank": state.memory_bank})
        calibrated = thresholds.calibrate(
            partial(predict_fn, variables, outputs=2), held_out, config
        )
        additions = {"thresholds": calibrated, "flops_per_image": flops_per_image()}
        if not panels or not len(held_out):
            return additions, {}
        # Of images that are not in the memory bank: distances there are not leave-one-out.
        rows = np.arange(config.batch_size) % len(held_out)
        batch = {"image": held_out[rows], "image_id": rows.astype(np.int32)}
        key = jax.random.fold_in(step_key, step)
        examples = jax.device_get(jitted_make_examples(key, batch, options, static=static))
        examples = {name: x[:NUM_PANELS] for name, x in examples.items()}
        defective = np.round(255 * examples["defective"]).astype(np.uint8)
        maps, _, reconstructions = predict_fn(variables, defective)
        return additions, train_log.draw_panels(examples, maps, reconstructions)

    return on_checkpoint


def check_images(images_sha256: str, record: Mapping[str, Any]) -> None:
    """Raises TrainingError if a checkpoint's record is of other images than these."""
    old = str(record.get("images_sha256"))
    if old != images_sha256:
        raise loop.TrainingError(
            f"the checkpoint was trained with another images_sha256: {old[:12]}, now "
            f"{images_sha256[:12]}. Restore the images, or train in a new --workdir"
        )


def starting_point(
    config: ConfigDict,
    saved: checkpoint.Saved | None,
    arrays: Mapping[str, np.ndarray],
    images_sha256: str,
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state to start from, with its memory bank, and the record of the run so far.

    `saved` is the checkpoint to resume from. Its memory bank is kept if it is of the same images,
    seed and `held_out`; `config.resume` allows others.
    """
    static, options = train_state.split_options(config)
    if saved is None:
        init_key, _ = train_state.seed_keys(config.seed)
        size = tuple(config.image_size)
        with progress.waiting("creating the networks", "usually a few seconds"):
            create = train_state.jit_once(train_state.create_state, "static", "image_size")
            state = create(init_key, options, static=static, image_size=size)
        record, has_bank = {"train_seconds": 0.0}, False
    else:
        state, record = saved.state, saved.record
        then = (record.get("images_sha256"), saved.config["seed"], saved.config["held_out"])
        has_bank = then == (images_sha256, config.seed, config.held_out)
        if then[0] == images_sha256 and not has_bank:
            print(
                "warning: the run of config.resume was trained on images that are held out now: "
                "thresholds may be too low",
                file=sys.stderr,
            )
    if static.grid and not has_bank:
        with progress.waiting("building the memory bank of good patches", "usually under a minute"):
            bank = build_memory_bank(config, arrays["image"], arrays["image_id"])
        # The last bits of a product differ between types of CPUs: all take one process's bank.
        state = state.replace(memory_bank=distributed.broadcast(bank))
    parameters = sum(x.size for x in jax.tree.leaves(state.generator))
    return state, record | {"images_sha256": images_sha256, "parameters": parameters}


def fit(
    config: ConfigDict,
    images: np.ndarray,
    folder: epath.PathLike,
    *,
    make_batches: Callable[..., Iterator[dict[str, np.ndarray]]] = batches.train_batches,
    writer: Any = None,
) -> TrainState:
    """Trains the generator until `config.num_steps`, or resumes; returns the last state.

    Args:
      config: the options of configs/default.py.
      images: all good images, sorted, uint8 [n, h, w, 3]; `config.held_out` of them are not trained
        on: each checkpoint records thresholds that are made from these.
      folder: where checkpoints/, train_log.jsonl, config.json, parameters.txt are written.
      make_batches: `images.batches.train_batches`, or the same as a tf.data pipeline.
      writer: of clu.metric_writers, for TensorBoard; None writes none.

    Raises:
      loop.TrainingError: a loss or a gradient is not finite (the last good checkpoint is kept), or
        options or images differ from those of the checkpoint.
      checkpoint.CheckpointError: there are checkpoints, and none can be read.
      OSError: something cannot be written.
      distributed.Stopped: a signal has asked for it; a checkpoint is saved.
    """
    static, options = train_state.split_options(config)
    _, step_key = train_state.seed_keys(config.seed)
    images_sha256 = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
    image_ids = batches.assign_image_ids(images)
    kept, held_out = batches.hold_out(image_ids, fraction=config.held_out, seed=config.seed)
    arrays = {"image": images[kept], "image_id": image_ids[kept]}

    with checkpoint.open_manager(epath.Path(folder) / "checkpoints") as manager:
        template = train_state.template(config)
        saved = loop.restore(manager, config, template, partial(check_images, images_sha256))
        if saved is not None and saved.step >= config.num_steps:
            return saved.state
        step_fn = loop.compile_ahead(
            parallel_train_step(static), template, arrays, config.batch_size, step_key, options
        )
        state, record = starting_point(config, saved, arrays, images_sha256)
        loop.begin(config, folder, state, "generator")
        return loop.run_steps(
            config,
            manager,
            state,
            record,
            step_fn=step_fn,
            arrays=arrays,
            make_batches=make_batches,
            key=step_key,
            options=options,
            learning_rate=partial(train_state.learning_rate_schedule, options=options["optimizer"]),
            on_checkpoint=make_checkpoint_fn(
                config,
                template,
                images[held_out],
                # Of several processes all predict, and one writes.
                panels=writer is not None or jax.process_count() > 1,
            ),
            writer=writer,
        )
