"""Training: one step of the three losses, and the loop around it."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from etils import epath
from jax import Array
from ml_collections import ConfigDict
from tqdm import tqdm

from anoseg_jax.method import augment, defects, losses, models, predict, train_state
from anoseg_jax.method.train_state import Optimizers, TrainState
from anoseg_jax.running import checkpoint, distributed, train_log

# A resumed run may have other values of these and still be the same run.
MAY_CHANGE = (
    "num_steps log_every checkpoint_every accumulate remat resume dataset data_dir tfds_dir "
    "categories category_options shard variants evaluate detector maps_dir compilation_cache"
).split()


PANEL_ROWS = 8  # examples that are shown in TensorBoard
REMEMBERED = 256  # good images that the generator's memories are of


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line that says why."""


def predecessors(images: Array, axis_name: str | None) -> Array:
    """Returns for each image the one before it in the batch of all devices; the first has the last.

    `axis_name` is that of the `jax.pmap` this runs in; None outside one.
    """
    last = images[-1:]
    if axis_name:
        devices = jax.lax.psum(1, axis_name)
        last = jax.lax.ppermute(last, axis_name, [(i, (i + 1) % devices) for i in range(devices)])
    return jnp.concatenate([last, images[:-1]])


def draw_examples(
    key: Array,
    images: Array,
    first: Array | int,
    *,
    augment_fn: Callable,
    defect_fn: Callable,
    axis_name: str | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Makes training examples of good images.

    Args:
      key: the step's PRNG key.
      images: uint8 [b, h, w, 3], this device's part of the batch.
      first: index of the first of them in the batch of all devices: each example has a key of its
        own by that index, so that the number of devices does not change what is drawn.
      augment_fn: `(key, image) -> image`, one good image to another.
      defect_fn: `(key, image, other=) -> (image, mask)`; `other` is another good image.
      axis_name: of the `jax.pmap` this runs in; None outside one.

    Returns:
      Good images [b, h, w, 3] in [0, 1], the same with defects, the defect masks [b, h, w], and
      what tells the images that they are made of from others [b] (`models.image_marks`).
    """

    def draw(index: Array, image: Array, other: Array) -> tuple[Array, Array, Array]:
        augment_key, defect_key = jax.random.split(jax.random.fold_in(key, index))
        good = augment_fn(augment_key, image)
        return good, *defect_fn(defect_key, good, other=other)

    marks = models.image_marks(images)
    images = images.astype(jnp.float32) / 255
    others = predecessors(images, axis_name)
    return *jax.vmap(draw)(first + jnp.arange(len(images)), images, others), marks


def loss_fn(
    generator_params: Any,
    discriminator_params: Any,
    good: Array,
    defective: Array,
    masks: Array,
    marks: Array,
    *,
    generator: nn.Module,
    discriminator: nn.Module,
    loss: Mapping[str, Any],
    remat: bool = False,
) -> tuple[tuple[Array, Array], dict[str, Array]]:
    """Returns the losses of the generator and of the discriminator, and each term by name.

    The examples are those of `draw_examples`; `loss` is `config.loss`; `remat`: see
    `models.applied`. Terms whose weight is zero are not computed and have no name.
    """
    generate = models.applied(generator, remat=remat, recall=False)
    logits, reconstructions = generate(generator_params, defective, marks)
    terms = {
        "loss_segmentation": losses.SEGMENTATION[loss["segmentation"]](logits=logits, masks=masks)
    }
    total = loss["segmentation_weight"] * terms["loss_segmentation"]
    discriminator_total = jnp.zeros(())
    if loss["reconstruction_weight"]:
        terms["loss_reconstruction"] = losses.masked_reconstruction(
            reconstructions=reconstructions, images=good, masks=masks
        )
        total += loss["reconstruction_weight"] * terms["loss_reconstruction"]
    if loss["adversarial_weight"]:
        generator_side, discriminator_side = losses.ADVERSARIAL[loss["adversarial"]]
        judge = partial(models.applied(discriminator, remat=remat), discriminator_params)
        # Real pairs: a good image and an empty map. Generated pairs: the reconstruction, and the
        # map where the image is good; where it is defective the map is right not to be empty.
        fake_logits = judge(reconstructions, jax.nn.sigmoid(logits) * (1 - masks))
        real_logits = judge(good, jnp.zeros_like(masks))
        terms["loss_adversarial"] = generator_side(fake_logits=fake_logits)
        total += loss["adversarial_weight"] * terms["loss_adversarial"]
        discriminator_total = discriminator_side(real_logits=real_logits, fake_logits=fake_logits)
        terms["loss_discriminator"] = discriminator_total
    return (total, discriminator_total), terms


def players_gradients(
    players_loss: Callable[..., tuple[tuple[Array, Array], dict[str, Array]]],
    generator_params: Any,
    discriminator_params: Any,
    examples: tuple[Array, ...],
    accumulate: int = 1,
) -> tuple[Any, Any, dict[str, Array]]:
    """Returns the gradient of each player and the metrics, from one forward pass of both.

    Args:
      players_loss: of the parameters of both players and the examples, returns the loss of each and
        metrics: all of them means over the examples.
      generator_params: see `train_state.TrainState`.
      discriminator_params: likewise.
      examples: arrays [b, ...].
      accumulate: into how many parts the examples are divided, one after the other in memory; b
        must be a multiple of it. The result is the same, to rounding.
    """

    def of(part: tuple[Array, ...]) -> tuple[Any, Any, dict[str, Array]]:
        # Each player takes the gradient of its own loss by its own parameters; XLA drops the other
        # halves.
        _, gradients_of, metrics = jax.vjp(
            lambda g, d: players_loss(g, d, *part),
            generator_params,
            discriminator_params,
            has_aux=True,
        )
        generator_gradients, _ = gradients_of((jnp.ones(()), jnp.zeros(())))
        _, discriminator_gradients = gradients_of((jnp.zeros(()), jnp.ones(())))
        return generator_gradients, discriminator_gradients, metrics

    if accumulate == 1:
        return of(examples)
    parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), examples)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts)))
    add = lambda total, part: (jax.tree.map(jnp.add, total, of(part)), None)  # noqa: E731
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / accumulate, total)


def update_players(
    state: TrainState,
    players_loss: Callable[..., tuple[tuple[Array, Array], dict[str, Array]]],
    examples: tuple[Array, ...],
    *,
    optimizers: Optimizers,
    ema_decay: float,
    accumulate: int,
    axis_name: str | None,
) -> tuple[TrainState, dict[str, Array]]:
    """Updates both players from one forward pass.

    Args:
      state: without a device axis.
      players_loss: see `players_gradients`.
      examples: likewise.
      optimizers: one for each player.
      ema_decay: of the averaged weights, from 0 (no memory) to 1.
      accumulate: see `players_gradients`.
      axis_name: of the `jax.pmap` this runs in; None outside one.

    Returns:
      The next state, and the metrics with the gradient norms added.
    """
    generator_gradients, discriminator_gradients, metrics = players_gradients(
        players_loss, state.generator, state.discriminator, examples, accumulate
    )
    if axis_name:
        generator_gradients, discriminator_gradients, metrics = jax.lax.pmean(
            (generator_gradients, discriminator_gradients, metrics), axis_name
        )
    metrics["gradient_norm_generator"] = optax.global_norm(generator_gradients)
    metrics["gradient_norm_discriminator"] = optax.global_norm(discriminator_gradients)

    generator_updates, generator_opt = optimizers.generator.update(
        generator_gradients, state.generator_opt, state.generator
    )
    discriminator_updates, discriminator_opt = optimizers.discriminator.update(
        discriminator_gradients, state.discriminator_opt, state.discriminator
    )
    generator_params = optax.apply_updates(state.generator, generator_updates)
    # A shorter memory at first, or the average would still hold the initial weights.
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    return TrainState(
        step=state.step + 1,
        generator=generator_params,
        discriminator=optax.apply_updates(state.discriminator, discriminator_updates),
        generator_opt=generator_opt,
        discriminator_opt=discriminator_opt,
        # Written so that what does not change stays the same to the bit.
        ema=jax.tree.map(
            lambda old, new: old + (1 - decay) * (new - old), state.ema, generator_params
        ),
    ), metrics


def train_step(
    state: TrainState,
    images: Array,
    key: Array,
    *,
    generator: nn.Module,
    discriminator: nn.Module,
    optimizers: Optimizers,
    augment_fn: Callable,
    defect_fn: Callable,
    loss: Mapping[str, Any],
    ema_decay: float,
    accumulate: int = 1,
    remat: bool = False,
    axis_name: str | None = "batch",
) -> tuple[TrainState, dict[str, Array]]:
    """One step of both players; pure.

    Args:
      state: without a device axis.
      images: uint8 [b, h, w, 3], this device's part of the batch.
      key: the seed's PRNG key, the same at every step.
      generator: the generator's module.
      discriminator: the discriminator's module.
      optimizers: one for each player.
      augment_fn: see `draw_examples`.
      defect_fn: see `draw_examples`.
      loss: `config.loss`.
      ema_decay: of the averaged weights, from 0 (no memory) to 1.
      accumulate: see `players_gradients`.
      remat: see `models.applied`.
      axis_name: of the `jax.pmap` this runs in; None outside one.

    Returns:
      The next state, and the losses and gradient norms of this step (float32 scalars).
    """
    first = jax.lax.axis_index(axis_name) * len(images) if axis_name else 0
    # All of this device's at once, however many parts they are learnt from in: the same are drawn.
    examples = draw_examples(
        jax.random.fold_in(key, state.step),
        images,
        first,
        augment_fn=augment_fn,
        defect_fn=defect_fn,
        axis_name=axis_name,
    )
    return update_players(
        state,
        partial(loss_fn, generator=generator, discriminator=discriminator, loss=loss, remat=remat),
        examples,
        optimizers=optimizers,
        ema_decay=ema_decay,
        accumulate=accumulate,
        axis_name=axis_name,
    )


def draw_panel(
    good: np.ndarray,
    defective: np.ndarray,
    masks: np.ndarray,
    maps: np.ndarray,
    reconstructions: np.ndarray,
) -> np.ndarray:
    """Returns rows of (good, defective, mask, map, reconstruction): [b, h, 5 w, 3] in [0, 1]."""
    in_colour = lambda x: np.repeat(x[..., None], 3, axis=-1)  # noqa: E731
    columns = [good, defective, in_colour(masks), in_colour(maps), reconstructions]
    return np.concatenate(columns, axis=2)


def calibrate(
    predict_fn: Callable, params: Any, held_out: np.ndarray | None, config: ConfigDict
) -> dict[str, dict[str, Any]]:
    """Returns the thresholds (predict.thresholds_from_good) of these weights."""
    maps, scores = [np.zeros((0, *config.image_size))], [np.zeros(0)]
    size, images = config.evaluate.batch_size, [] if held_out is None else held_out
    for start in range(0, len(images), size):
        batch_maps, batch_scores, _ = predict_fn(params, images[start : start + size])
        maps.append(batch_maps)
        scores.append(batch_scores)
    return predict.thresholds_from_good(
        np.concatenate(maps),
        np.concatenate(scores),
        pixel_rate=config.evaluate.pixel_false_positive_rate,
        image_rate=config.evaluate.image_false_positive_rate,
    )


def check_finite(metrics: Mapping[str, np.ndarray], last_step: int) -> None:
    """Raises TrainingError naming the first step and the metrics that are not finite.

    `metrics` hold one value a step, [steps], the last of them at `last_step`.
    """
    bad = {name: ~np.isfinite(values) for name, values in metrics.items()}
    steps = np.flatnonzero(np.any(list(bad.values()), axis=0))
    if len(steps):
        names = ", ".join(name for name in metrics if bad[name][steps[0]])
        step = last_step - len(next(iter(bad.values()))) + 1 + steps[0]
        raise TrainingError(
            f"not finite at step {step}: {names}; the last good checkpoint is kept. Try a smaller "
            f"learning_rate or clip_norm, or model.dtype=float32"
        )


def check_same_run(saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises TrainingError naming every option that a resumed run must not change but does."""
    different = [
        f"{key} was {saved.get(key)}, is {config.get(key)}"
        for key in sorted({*saved, *config} - set(MAY_CHANGE))
        if saved.get(key) != config.get(key)
    ]
    if different:
        raise TrainingError(
            f"the checkpoint was trained with other options: {'; '.join(different)}; set them "
            "back, or start in a new --workdir"
        )


def restore_or_create(
    manager: checkpoint.Manager,
    config: ConfigDict,
    parts: "Parts",
    first_fn: Callable[[], np.ndarray],
) -> tuple[TrainState, dict]:
    """Returns the state to start from and what was recorded up to there.

    1. The newest whole checkpoint of this workdir; 2. that of `config.resume`; 3. a fresh state,
    which `parts.create_state` makes of the good images that `first_fn` returns.
    """

    def check(saved: dict, record: dict) -> None:
        check_same_run(saved, json.loads(config.to_json()))
        for name, value in parts.about.items():
            was = str(record.get(name))
            if was != value:
                raise TrainingError(
                    f"the checkpoint was trained with other {name}: {was[:12]}, now {value[:12]}; "
                    "put back what it was trained with, or start in a new --workdir"
                )

    template = jax.eval_shape(
        parts.create_state, jax.ShapeDtypeStruct((4, *config.image_size, 3), np.uint8)
    )
    saved = checkpoint.restore(manager, template=template, check=check)
    if saved is not None:
        checkpoint.set_aside(manager, saved.step)
    elif config.resume:
        directory = epath.Path(config.resume) / "checkpoints"
        with checkpoint.open_manager(directory, create=False) as other:
            saved = checkpoint.restore(other, template=template, check=check)
        if saved is None:
            raise TrainingError(f"config.resume={config.resume}: no checkpoint there")
    if saved is None:
        return parts.create_state(first_fn()), {"train_seconds": 0.0}
    return saved.state, saved.record


class Parts(NamedTuple):
    """What a config describes, as functions: see `draw_examples`, `train_step`, `create_state`.

    `frozen` are arrays that the step takes after the others and that training leaves as they are;
    `about` are hexadecimal hashes of what it is trained with: each checkpoint's record says them,
    and a run goes on only with the same.
    """

    generator: nn.Module
    schedule: optax.Schedule
    draw_examples: Callable  # (key, images, first)
    train_step: Callable  # (state, images, key, *frozen)
    create_state: Callable  # compiled; (images), good ones, uint8 [n, h, w, 3]
    count_flops: Callable  # (), of one image
    draw_key: Array
    frozen: tuple = ()
    about: Mapping[str, str] = {}


def create_optimizers(config: ConfigDict) -> tuple[optax.Schedule, Optimizers]:
    """Returns the generator's learning rate by step, and the optimizers of both players."""
    schedule = train_state.learning_rate_schedule(
        config.learning_rate, config.num_steps, config.warmup_steps
    )
    return schedule, train_state.create_optimizers(
        schedule,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        discriminator_scale=config.discriminator_scale,
    )


def create_parts(config: ConfigDict) -> Parts:
    """Binds the options of a config to the functions that training is made of."""
    generator, discriminator = models.create(config.model, config.loss)
    schedule, optimizers = create_optimizers(config)
    players = {
        "generator": generator,
        "discriminator": discriminator,
        "optimizers": optimizers,
    }
    draw = {
        "augment_fn": partial(augment.augment, **config.augment),
        "defect_fn": partial(
            defects.synthesize,
            preset=config.defects.preset,
            normal_fraction=config.defects.normal_fraction,
            on_object=config.defects.on_object,
            options={kind: config.defects[kind] for kind in defects.DEFECTS},
        ),
    }
    seed_key = jax.random.key(config.seed)

    # Given the key, not closed over it: else XLA would draw and sort the random numbers of the
    # memories while it compiles, for minutes.
    @jax.jit
    def create_state(key: Array, images: Array) -> TrainState:
        examples = draw_examples(jax.random.fold_in(key, 3), images, 0, **draw)
        kept = -(-3 * len(images) // 4)
        state = train_state.create_state(key, examples[0][:kept], **players)
        size = config.model.memory
        if not size:
            return state
        weight = 0.0
        if config.model.coords:
            # By a first memory, of some images as they are in training; the others weigh it.
            first = state.generator["PatchMemory_0"]["memory"]
            good, defective, masks, _ = (array[kept:] for array in examples)
            weight = models.choose_place(first, good, defective, masks)
        # Those that stay are of images as they are: a small rotation alone makes them softer than
        # those to be judged.
        plain, marks = images.astype(jnp.float32) / 255, examples[-1]
        memories = {}
        for index, scaled in enumerate((plain, models.halve(plain))):
            memory = models.remember_patches(
                jax.random.fold_in(key, 4 + index),
                scaled[:kept],
                marks[:kept],
                size=models.CANDIDATES * size,
                coords=config.model.coords,
                distinct=True,
            )
            memory = models.thin_out(models.weigh_place(memory, weight), size)
            memory = models.calibrate(memory, scaled[kept:])
            memories[f"PatchMemory_{index}"] = {"memory": memory}
        generator_params = state.generator | memories
        return state.replace(
            generator=generator_params, ema=jax.tree.map(jnp.copy, generator_params)
        )

    return Parts(
        generator=generator,
        schedule=schedule,
        draw_examples=partial(draw_examples, **draw),
        train_step=partial(
            train_step,
            loss=config.loss,
            ema_decay=config.ema_decay,
            accumulate=config.accumulate,
            remat=config.remat,
            **players,
            **draw,
        ),
        create_state=partial(create_state, seed_key),
        count_flops=partial(models.flops_per_image, generator, tuple(config.image_size)),
        draw_key=jax.random.fold_in(seed_key, 1),
    )


def run_steps(
    config: ConfigDict,
    parts: Parts,
    train_batches: Callable[[int], Iterator[np.ndarray]],
    folder: epath.Path,
    *,
    calibrate_fn: Callable[[TrainState], dict[str, Any]],
    first_fn: Callable[[], np.ndarray],
    panel_fn: Callable[[TrainState, int], dict[str, np.ndarray]] | None = None,
    writer: Any = None,
) -> TrainState:
    """Runs the steps of `parts` until `config.num_steps`, from where the last run stopped.

    Args:
      config: the options that the run is known by: a checkpoint of others is refused.
      parts: what is trained.
      train_batches: see `fit`.
      folder: where checkpoints/, train_log.jsonl, config.json, parameters.txt are written.
      calibrate_fn: returns the thresholds that a checkpoint of this state records.
      first_fn: returns the good images that a fresh state is made of, uint8 [n, h, w, 3].
      panel_fn: given state and step, returns pictures for TensorBoard; None draws none.
      writer: see `fit`.

    Raises distributed.Stopped once everything is saved, if a signal has asked for it.
    """
    devices, first = jax.local_device_count(), distributed.is_main_process()
    p_train_step = jax.pmap(
        parts.train_step,
        axis_name="batch",
        in_axes=(None, 0, None, *(None for _ in parts.frozen)),
        out_axes=(None, 0),
        donate_argnums=0,
    )
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        state, record = restore_or_create(manager, config, parts, first_fn)
        distributed.check_equal(
            dict(parts.about)
            | {
                "options": hashlib.sha256(config.to_json().encode()).hexdigest(),
                "weights to start from": checkpoint.state_sha256(state),
            }
        )
        start = int(state.step)
        if start >= config.num_steps:
            return state
        record["parameters"] = sum(x.size for x in jax.tree.leaves(state.generator))
        record["flops_per_image"] = parts.count_flops()
        record |= parts.about
        print(
            f"{type(parts.generator).__name__.lower()}: {record['parameters']:,} parameters, "
            f"{record['flops_per_image'] / 1e9:.2f} GFLOP an image; {jax.device_count()} x "
            f"{jax.local_devices()[0].device_kind}"
            + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")
            + (f"; resumed at step {start}" if start else "")
        )
        log_path = folder / "train_log.jsonl"
        if first:
            overview = parameter_overview.get_parameter_overview(state.generator)
            (folder / "parameters.txt").write_text(overview + "\n")
            (folder / "config.json").write_text(config.to_json(indent=2) + "\n")
            train_log.keep_until(log_path, start)
        state, frozen = train_state.place(state), train_state.place(parts.frozen)
        earlier_seconds, began = record["train_seconds"], time.monotonic()
        pending: list[dict[str, Array]] = []  # each step's metrics since the last line of the log
        timed_step, timed_at = start + 1, None
        stop = False
        quiet = None if first else True  # None: where there is no terminal
        bar = tqdm(initial=start, total=config.num_steps, disable=quiet, unit="step", leave=False)
        steps = range(start + 1, config.num_steps + 1)
        for step, images in zip(steps, train_batches(start), strict=False):
            batch = images.reshape(devices, -1, *images.shape[1:])  # [devices, b, h, w, 3]
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = p_train_step(state, batch, parts.draw_key, *frozen)
            pending.append(metrics)
            bar.update()
            if timed_at is None:  # The first step compiles: its time is not a speed.
                jax.block_until_ready(metrics)
                timed_at = time.monotonic()

            stop = distributed.must_stop()
            save = stop or step % config.checkpoint_every == 0 or step == config.num_steps
            if save or step % config.log_every == 0:
                stacked = {
                    name: np.array([float(m[name][0]) for m in jax.device_get(pending)])
                    for name in pending[0]
                }
                check_finite(stacked, step)
                pending = []
                now = time.monotonic()
                line = {"step": step} | {name: values.mean() for name, values in stacked.items()}
                line["learning_rate"] = float(parts.schedule(step - 1))
                if step > timed_step:
                    images_done = (step - timed_step) * config.batch_size
                    line["images_per_second"] = images_done / (now - timed_at)
                timed_step, timed_at = step, now
                if first:
                    train_log.write_line(log_path, line, bar, config.num_steps)
                if writer is not None:
                    writer.write_scalars(step, {k: v for k, v in line.items() if k != "step"})
            if save:
                record["train_seconds"] = earlier_seconds + time.monotonic() - began
                record["thresholds"] = calibrate_fn(state)
                checkpoint.save(
                    manager, state, step, config=json.loads(config.to_json()), record=record
                )
                panels = {} if panel_fn is None else panel_fn(state, step)
                if writer is not None:
                    writer.write_images(step, panels)
                    writer.flush()
                timed_at = time.monotonic()
            if stop:
                break
        bar.close()
        done = int(state.step)
        if done < config.num_steps and not stop:
            raise TrainingError(f"the training images ended at step {done}")
    if done < config.num_steps:
        raise distributed.Stopped(f"stopped at step {done} of {config.num_steps}")
    return state


def fit(
    config: ConfigDict,
    train_batches: Callable[[int], Iterator[np.ndarray]],
    category_dir: epath.PathLike,
    *,
    held_out: np.ndarray | None = None,
    remembered: np.ndarray | None = None,
    images_sha256: str | None = None,
    writer: Any = None,
) -> TrainState:
    """Trains the generator until `config.num_steps`, from where the last run there stopped.

    Args:
      config: the options of configs/default.py.
      train_batches: given the number of steps done, returns the batches that follow: good images,
        uint8 [config.batch_size, h, w, 3], of several processes each its `distributed.rows`. Must
        depend on that number alone.
      category_dir: where checkpoints/, train_log.jsonl, config.json, parameters.txt are written.
      held_out: good images that are not trained on, uint8 [n, h, w, 3]: the thresholds that each
        checkpoint records are made from them.
      remembered: good images that the generator's memories are of, uint8 [n, h, w, 3]; None takes
        those of the first batch; of several processes each must be given the same.
      images_sha256: hash of the images it is trained on: with others a run does not go on; None
        does not ask.
      writer: of clu.metric_writers, for TensorBoard; None writes none.

    Raises:
      TrainingError: a loss or a gradient is not finite (the last good checkpoint stays), options
        or images differ from those of the checkpoint, or the batches end early.
      checkpoint.CheckpointError: there are checkpoints, and none can be read.
      OSError: something cannot be written.
      distributed.Stopped: a signal has asked for it; everything is saved.
    """
    parts = create_parts(config)
    if images_sha256:
        parts = parts._replace(about={"images_sha256": images_sha256})
    # The program that evaluation runs later: compiled once for both.
    predict_fn = predict.create_predict(
        parts.generator,
        top_fraction=config.evaluate.top_fraction,
        batch_size=config.evaluate.batch_size,
    )
    draw = jax.jit(parts.draw_examples)

    def draw_panels(state: TrainState, step: int) -> dict[str, np.ndarray]:
        images = first_images()[:PANEL_ROWS]
        examples = jax.device_get(draw(jax.random.fold_in(parts.draw_key, step), images, 0))
        seen = np.round(255 * examples[1]).astype(np.uint8)
        maps, _, reconstructions = predict_fn(state.ema, seen)
        rows = draw_panel(*examples[:3], maps, reconstructions)
        return {"good|defective|mask|map|reconstruction": rows}

    def first_images() -> np.ndarray:
        if remembered is None:
            return next(iter(train_batches(0)))
        # Always as many: the program that makes the state is compiled once for all categories.
        return remembered[np.arange(REMEMBERED) * len(remembered) // REMEMBERED]

    return run_steps(
        config,
        parts,
        train_batches,
        epath.Path(category_dir),
        first_fn=first_images,
        calibrate_fn=lambda state: calibrate(predict_fn, state.ema, held_out, config),
        # Of several processes all must predict, though one of them writes.
        panel_fn=draw_panels if writer is not None or jax.process_count() > 1 else None,
        writer=writer,
    )
