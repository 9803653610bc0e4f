"""Training of the image-level detector: the second stage, for a generator that is trained."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils.epath import Path
from jax import Array
from ml_collections import ConfigDict

from anoseg_jax import UsageError
from anoseg_jax.images import batches
from anoseg_jax.method import (
    augment,
    losses,
    memory_bank,
    models,
    predict,
    thresholds,
    train,
    train_state,
)
from anoseg_jax.method.predict import BankOptions
from anoseg_jax.running import checkpoint, loop, progress


class DetectorError(UsageError):
    """A detector that cannot be used; the message is one line that says why."""


@flax.struct.dataclass
class DetectorState:
    """Everything that a step of the detector reads and writes; data only, without a device axis.

    `ema` is an exponential moving average of the detector's parameters. There is no memory bank:
    the generator's is part of the step's options.
    """

    step: Array
    detector: Any
    discriminator: Any
    detector_opt: optax.OptState
    discriminator_opt: optax.OptState
    ema: Any


class StaticOptions(NamedTuple):
    """Options that decide which program is compiled; hashable. All others are arrays.

    As `train_state.StaticOptions`, for the detector; `bank` is of the generator's memory bank.
    """

    generator: nn.Module
    detector: nn.Module
    discriminator: nn.Module
    adversarial: str
    bank: BankOptions
    accumulate: int
    remat: bool


def detector_options(config: ConfigDict) -> ConfigDict:
    """Returns the options with those of `config.detector` in place of the generator's.

    The detector's checkpoints hold them, and a resumed run must not change them.
    """
    options = config.copy_and_resolve_references()
    options.num_steps = config.detector.num_steps
    options.learning_rate = config.detector.learning_rate
    options.model.width = config.detector.width
    options.model.latent = config.detector.latent
    options.loss.adversarial_weight = config.detector.adversarial_weight
    options.loss.reconstruction_weight = config.detector.reconstruction_weight
    # The detector of another workdir is for the generator of that workdir.
    options.resume = ""
    return options


def split_options(config: ConfigDict) -> tuple[StaticOptions, dict[str, Any]]:
    """Splits a config into the detector's static options and arrays, see train_state."""
    options = detector_options(config)
    generator, _ = models.create(config.model, config.loss)
    detector, discriminator = models.create_detector(config.model, config.detector)
    static = StaticOptions(
        generator=generator,
        detector=detector,
        discriminator=discriminator,
        adversarial=options.loss.adversarial if options.loss.adversarial_weight else "",
        bank=predict.bank_options(config.memory_bank),
        accumulate=config.accumulate,
        remat=config.remat,
    )
    _, arrays = train_state.split_options(options)
    return static, {name: arrays[name] for name in ("augment", "loss", "optimizer")}


def loss_fn(
    detector_params: Any,
    discriminator_params: Any,
    examples: Mapping[str, Array],
    weights: Mapping[str, Array],
    *,
    static: StaticOptions,
) -> tuple[tuple[Array, Array], dict[str, Array]]:
    """Returns the losses of the detector and of its discriminator, and each term by name.

    `examples` are good `images` and the generator's `maps` of them, the real pairs; `weights` those
    of the loss terms.
    """
    images, maps = examples["images"], examples["maps"]
    reconstruct = models.apply_fn(static.detector, remat=static.remat)
    pair = reconstruct(detector_params, images, maps)
    reconstruction = jnp.mean(jnp.abs(pair[0] - images)) + jnp.mean(jnp.abs(pair[1] - maps))
    terms = {"loss_reconstruction": reconstruction}
    total = weights["reconstruction_weight"] * reconstruction
    discriminator_total = jnp.zeros(())
    if static.adversarial:
        detector_side, discriminator_side = losses.ADVERSARIAL[static.adversarial]
        discriminator_fn = models.apply_fn(static.discriminator, remat=static.remat)
        fake_logits = discriminator_fn(discriminator_params, *pair)
        real_logits = discriminator_fn(discriminator_params, images, maps)
        terms["loss_adversarial"] = detector_side(fake_logits=fake_logits)
        total += weights["adversarial_weight"] * terms["loss_adversarial"]
        discriminator_total = discriminator_side(real_logits=real_logits, fake_logits=fake_logits)
        terms["loss_discriminator"] = discriminator_total
    return (total, discriminator_total), terms


def make_examples(
    key: Array,
    batch: Mapping[str, Array],
    options: Mapping[str, Any],
    *,
    static: StaticOptions,
    offset: Array | int = 0,
) -> dict[str, Array]:
    """Makes training examples: augmented good `images` and the generator's `maps` of them.

    The distances to the memory bank are leave-one-out: the images are in the bank, which those that
    are judged later are not. `options` also has the generator's `params` and `memory_bank`.
    """
    images = batch["image"].astype(jnp.float32) / 255
    keys = jax.vmap(partial(jax.random.fold_in, key))(offset + jnp.arange(len(images)))
    images = jax.vmap(partial(augment.augment, **options["augment"]))(keys, images)
    logits, _ = predict.generator_logits(
        options["params"],
        options["memory_bank"],
        images,
        batch["image_id"],
        generator=static.generator,
        options=static.bank,
    )
    return {"images": images, "maps": jax.lax.stop_gradient(nn.sigmoid(logits))}


def train_step(
    state: DetectorState,
    batch: Mapping[str, Array],
    key: Array,
    options: Mapping[str, Any],
    *,
    static: StaticOptions,
    axis_name: str | None = "batch",
) -> tuple[DetectorState, dict[str, Array]]:
    """Returns the state after one step of detector and discriminator, and its metrics; pure.

    The arguments are those of `train.train_step`; `options` also has the generator's `params` and
    `memory_bank`, which do not change.
    """
    step_key = jax.random.fold_in(key, state.step)
    offset = jax.lax.axis_index(axis_name) * len(batch["image"]) if axis_name else 0
    examples = make_examples(step_key, batch, options, static=static, offset=offset)
    players_loss = partial(loss_fn, weights=options["loss"], static=static)
    detector_gradients, discriminator_gradients, metrics = train.players_gradients(
        players_loss, state.detector, state.discriminator, examples, static.accumulate
    )
    if axis_name:  # the mean over devices; the same axis_name as in loop.parallelize
        detector_gradients, discriminator_gradients, metrics = jax.lax.pmean(
            (detector_gradients, discriminator_gradients, metrics), axis_name
        )
    metrics["gradient_norm_detector"] = optax.global_norm(detector_gradients)
    metrics["gradient_norm_discriminator"] = optax.global_norm(discriminator_gradients)

    numbers = options["optimizer"]
    (params, discriminator), (detector_opt, discriminator_opt) = train_state.update_players(
        (state.detector, state.discriminator),
        (detector_gradients, discriminator_gradients),
        (state.detector_opt, state.discriminator_opt),
        state.step,
        numbers,
    )
    return DetectorState(
        step=state.step + 1,
        detector=params,
        discriminator=discriminator,
        detector_opt=detector_opt,
        discriminator_opt=discriminator_opt,
        ema=train_state.update_average(state.ema, params, state.step, numbers["ema_decay"]),
    ), metrics


@functools.cache
def parallel_train_step(static: StaticOptions) -> Callable:
    """Returns the step on all local devices: one program for each set of static options."""
    return loop.parallelize(partial(train_step, static=static))


def create_state(
    key: Array,
    options: Mapping[str, Any],
    *,
    static: StaticOptions,
    image_size: tuple[int, int],
) -> DetectorState:
    """Returns the state before the first step; see `train_state.create_state`."""
    detector_key, discriminator_key = jax.random.split(key)
    images, maps = jnp.zeros((1, *image_size, 3)), jnp.zeros((1, *image_size))
    params = static.detector.init(detector_key, images, maps)["params"]
    discriminator = static.discriminator.init(discriminator_key, images, maps)["params"]
    optimizer, discriminator_optimizer = train_state.create_optimizers(options["optimizer"])
    return DetectorState(
        step=jnp.zeros((), jnp.int32),
        detector=params,
        discriminator=discriminator,
        detector_opt=optimizer.init(params),
        discriminator_opt=discriminator_optimizer.init(discriminator),
        ema=jax.tree.map(jnp.copy, params),
    )


def template(config: ConfigDict) -> DetectorState:
    """Returns the shapes and dtypes of a config's state, as `jax.eval_shape` does."""
    static, options = split_options(config)
    create = partial(create_state, static=static, image_size=tuple(config.image_size))
    return jax.eval_shape(create, jax.random.key(0), options)


def seed_keys(seed: int) -> tuple[Array, Array]:
    """Returns the PRNG keys of a seed, see train_state; other streams than the generator's."""
    key = jax.random.fold_in(jax.random.key(seed), 2)
    return key, jax.random.fold_in(key, 1)


def flops_per_image(static: StaticOptions, template: DetectorState, size: tuple) -> float:
    """Returns the floating-point operations of one image's score, without those of its map."""
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    maps = jax.ShapeDtypeStruct((1, *size), jnp.float32)
    params = {"detector": template.detector, "discriminator": template.discriminator}
    score = partial(predict.detect_fn, detector=static.detector, discriminator=static.discriminator)
    return models.count_flops(score, params, images, maps)


def check_generator(record: Mapping[str, Any], generator_sha256: str, folder: Path) -> None:
    """Raises DetectorError unless the detector of `folder` was trained for these weights."""
    trained_for = record["generator_sha256"]
    if trained_for != generator_sha256:
        raise DetectorError(
            f"{folder}: this detector was trained for generator weights {trained_for[:12]}, but "
            f"the newest checkpoint beside it has {generator_sha256[:12]}: remove that folder and "
            "train again, or set detector.enabled=False"
        )


def check_images(
    saved: checkpoint.Saved, images: np.ndarray, config: ConfigDict, folder: str | Path
) -> None:
    """Raises DetectorError unless a generator's checkpoint is of these images, seed, `held_out`.

    With others, image ids would name other images, and held-out images could be in the bank.
    """
    images_sha256 = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
    now = (images_sha256, config.seed, config.held_out)
    then = (saved.record.get("images_sha256"), saved.config["seed"], saved.config["held_out"])
    if now != then:
        raise DetectorError(
            f"{folder}: the generator was trained on other images, or with another seed or held_out"
        )


def generator_sha256(params: Any, bank: Any) -> str:
    """Returns the hash of the generator that a detector is trained for: averaged weights, bank."""
    return checkpoint.arrays_sha256((params, bank))


def make_checkpoint_fn(
    config: ConfigDict, generator_variables: Mapping[str, Any], held_out: np.ndarray
) -> Callable[[DetectorState, int], tuple[dict[str, Any], dict]]:
    """Returns a function of state and step: what a checkpoint's record gets, the image threshold.

    `generator_variables` are its `params` and `memory_bank`; `held_out` are good images that are
    not trained on, uint8 [n, h, w, 3].
    """
    static, _ = split_options(config)
    predict_fn = predict.sharded_predict_fn(static.generator, config)
    detect_fn = predict.sharded_detect_fn(
        static.detector, static.discriminator, config.evaluate.batch_size
    )
    variables = predict.replicate(generator_variables)

    def on_checkpoint(state: DetectorState, step: int) -> tuple[dict[str, Any], dict]:
        del step
        params = predict.replicate({"detector": state.ema, "discriminator": state.discriminator})

        def maps_and_scores(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            maps, _ = predict_fn(variables, images, outputs=2)
            return maps, detect_fn(params, images, maps)

        calibrated = thresholds.calibrate(maps_and_scores, held_out, config)
        return {"thresholds": {"image": calibrated["image"]}}, {}

    return on_checkpoint


def fit(
    config: ConfigDict,
    images: np.ndarray,
    category_dir: str | Path,
    *,
    make_batches: Callable[..., Iterator[dict[str, np.ndarray]]] = batches.train_batches,
    writer: Any = None,
) -> DetectorState:
    """Trains the detector for the generator in `category_dir`, or resumes; returns the last state.

    Args:
      config: the options of configs/default.py.
      images: all good images, see train.fit.
      category_dir: the generator's folder; detector/ in it gets the same files.
      make_batches: see train.fit.
      writer: of clu.metric_writers, for TensorBoard.

    Raises:
      FileNotFoundError: there is no generator.
      DetectorError: the detector there was trained for other weights of the generator.
      loop.TrainingError: see train.fit.
    """
    detector_config, size = detector_options(config), tuple(config.image_size)
    static, options = split_options(config)
    init_key, step_key = seed_keys(config.seed)
    image_ids = batches.assign_image_ids(images)
    kept, held_out = batches.hold_out(image_ids, fraction=config.held_out, seed=config.seed)
    arrays = {"image": images[kept], "image_id": image_ids[kept]}

    saved = checkpoint.restore_newest(Path(category_dir) / "checkpoints")
    check_images(saved, images, config, category_dir)
    generator = saved.state
    bank = memory_bank.from_dicts(generator["memory_bank"])
    sha256 = generator_sha256(generator["ema"], bank)
    variables = {"params": generator["ema"], "memory_bank": bank}
    folder = Path(category_dir) / "detector"
    folder.mkdir(exist_ok=True)
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        shapes = template(config)
        saved = loop.restore(
            manager,
            detector_config,
            shapes,
            check_record=lambda record: check_generator(record, sha256, folder),
        )
        if saved is not None and saved.step >= detector_config.num_steps:
            return saved.state
        step_fn = loop.compile_ahead(
            parallel_train_step(static),
            shapes,
            arrays,
            config.batch_size,
            step_key,
            options | variables,
        )
        if saved is None:
            with progress.waiting("creating the detector", "usually a few seconds"):
                create = train_state.jit_once(create_state, "static", "image_size")
                state = create(init_key, options, static=static, image_size=size)
            record = {"train_seconds": 0.0}
        else:
            state, record = saved.state, saved.record
        record |= {"generator_sha256": sha256}
        record["parameters"] = sum(x.size for x in jax.tree.leaves(state.detector))
        record["flops_per_image"] = flops_per_image(static, shapes, size)
        loop.begin(detector_config, folder, state, "detector")
        return loop.run_steps(
            detector_config,
            manager,
            state,
            record,
            step_fn=step_fn,
            arrays=arrays,
            make_batches=make_batches,
            key=step_key,
            options=options | variables,
            learning_rate=partial(train_state.learning_rate_schedule, options=options["optimizer"]),
            on_checkpoint=make_checkpoint_fn(config, variables, images[held_out]),
            writer=writer,
        )
