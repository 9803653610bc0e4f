"""Training of the image-level detector: the second stage, for a generator that is trained.

The detector reconstructs pairs of a good image and the generator's map of it; an image is anomalous
if its pair is reconstructed badly (`predict.detect_fn`). Arguments are those of train.py.
"""

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
from anoseg_jax.method.train import Axis
from anoseg_jax.method.train_state import Arrays, Options
from anoseg_jax.running import checkpoint, loop, progress


class DetectorError(UsageError):
    """A detector that cannot be used; the message is one line that says why."""


@flax.struct.dataclass
class DetectorState:
    """Everything that a step of the detector reads and writes; data only, without a device axis.

    `ema` is an exponential moving average of the detector's parameters. There is no memory bank:
    the generator's is one of the step's options.
    """

    PLAYERS = ("detector", "discriminator")

    step: Array
    detector: Any
    discriminator: Any
    detector_opt: optax.OptState
    discriminator_opt: optax.OptState
    ema: Any


class StaticOptions(NamedTuple):
    """Options that decide which program is compiled; hashable. See `train_state.StaticOptions`.

    `bank` is of the generator's memory bank.
    """

    generator: nn.Module
    detector: nn.Module
    discriminator: nn.Module
    adversarial: losses.Adversarial | None
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
    options.resume = ""  # the detector of another workdir belongs to that workdir's generator
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
        adversarial=train_state.adversarial_form(options.loss, options.loss.adversarial_weight),
        bank=predict.bank_options(config.memory_bank),
        accumulate=config.accumulate,
        remat=config.remat,
    )
    _, arrays = train_state.split_options(options)
    return static, {name: arrays[name] for name in ("augment", "loss", "optimizer")}


def make_examples(
    key: Array, batch: Arrays, options: Options, *, static: StaticOptions, axis_name: Axis = None
) -> dict[str, Array]:
    """Makes training examples: augmented good `images`, and the generator's `maps` of them.

    The distances to the memory bank are leave-one-out: the training images are in the bank, the
    images to be scored later are not. `options` also has the generator's `params` and
    `memory_bank`.
    """
    bank = options["memory_bank"]
    images = memory_bank.to_float(batch["image"], bank and bank.brightness)
    keys = train.example_keys(key, len(images), axis_name)
    augment_keys, noise_keys = jax.vmap(jax.random.split)(keys).swapaxes(0, 1)
    images = jax.vmap(partial(augment.augment, **options["augment"]))(augment_keys, images)
    logits, _ = predict.generator_logits(
        options["params"],
        bank,
        images,
        batch["image_id"],
        generator=static.generator,
        options=static.bank,
    )
    examples = {"images": images, "maps": jax.lax.stop_gradient(nn.sigmoid(logits))}
    if static.adversarial and static.adversarial.penalized:
        examples["noise"] = losses.penalty_noise(noise_keys, images)
    return examples


def loss_fn(
    params: tuple[Any, Any], examples: Arrays, weights: Arrays, *, static: StaticOptions
) -> tuple[tuple[Array, Array], dict[str, Array]]:
    """Returns the losses of the detector and of its discriminator, and each term by name.

    The pairs of `make_examples` are the real ones, their reconstructions the fake ones.
    """
    detector_params, discriminator_params = params
    images, maps = real = examples["images"], examples["maps"]
    fake = models.apply_fn(static.detector, remat=static.remat)(detector_params, images, maps)
    reconstruction = jnp.mean(jnp.abs(fake[0] - images)) + jnp.mean(jnp.abs(fake[1] - maps))
    terms = {"loss_reconstruction": reconstruction}
    total = weights["reconstruction_weight"] * reconstruction
    if not static.adversarial:
        return (total, jnp.zeros(())), terms
    discriminator_fn = models.apply_fn(static.discriminator, remat=static.remat)
    adversarial, discriminator_loss, adversarial_terms = losses.adversarial(
        discriminator_fn,
        discriminator_params,
        form=static.adversarial,
        fake=fake,
        real=real,
        noise=examples.get("noise"),
        weights=weights,
    )
    total += weights["adversarial_weight"] * adversarial
    return (total, discriminator_loss), terms | adversarial_terms


def train_step(
    state: DetectorState,
    batch: Arrays,
    key: Array,
    options: Options,
    *,
    axis_name: Axis = "batch",
    static: StaticOptions,
) -> tuple[DetectorState, dict[str, Array]]:
    """Returns the state after one step of detector and discriminator, and its metrics; pure.

    See `train.train_step`; `options` are those of `make_examples`.
    """
    step_key = jax.random.fold_in(key, state.step)
    examples = make_examples(step_key, batch, options, static=static, axis_name=axis_name)
    return train.update_players(
        state, examples, options, loss_fn=loss_fn, static=static, axis_name=axis_name
    )[:2]


def create_state(
    key: Array, options: Options, *, static: StaticOptions, image_size: tuple[int, int]
) -> DetectorState:
    """Returns the state before the first step; see `train_state.create_state`."""
    inputs = jnp.zeros((1, *image_size, 3)), jnp.zeros((1, *image_size))
    fields = train_state.create_players(
        key, static, dict.fromkeys(DetectorState.PLAYERS, inputs), options
    )
    return DetectorState(**fields)


def template(config: ConfigDict) -> DetectorState:
    """Returns the shapes and dtypes of a config's state."""
    static, options = split_options(config)
    return train_state.shapes_of(create_state, options, static=static, image_size=config.image_size)


def seed_keys(seed: int) -> tuple[Array, Array]:
    """Returns the PRNG keys of a seed, see train_state; other streams than the generator's."""
    key = jax.random.fold_in(jax.random.key(seed), 2)
    return key, jax.random.fold_in(key, 1)


def flops_per_image(static: StaticOptions, state: DetectorState, size: tuple[int, int]) -> float:
    """Returns the floating-point operations of one image's score, without those of its map."""
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    maps = jax.ShapeDtypeStruct((1, *size), jnp.float32)
    params = {
        "detector": state.detector,
        "discriminator": state.discriminator,
        "brightness": None,
    }
    score = partial(predict.detect_fn, detector=static.detector, discriminator=static.discriminator)
    return models.count_flops(score, params, images, maps)


def check_generator(generator_sha256: str, folder: Path, record: Mapping[str, Any]) -> None:
    """Raises DetectorError unless the detector in `folder` was trained for these weights."""
    trained_for = record["generator_sha256"]
    if trained_for != generator_sha256:
        raise DetectorError(
            f"{folder}: this detector was trained for generator weights {trained_for[:12]}, but "
            f"the newest checkpoint beside it has {generator_sha256[:12]}: remove that folder and "
            "train again, or set detector.enabled=False"
        )


def starting_point(
    config: ConfigDict, generator_sha256: str, saved: checkpoint.Saved | None
) -> tuple[DetectorState, dict[str, Any]]:
    """Returns the first state and the record of the run so far; `saved` is to be resumed."""
    static, options = split_options(config)
    size = tuple(config.image_size)
    if saved is None:
        with progress.waiting("creating the detector", "usually a few seconds"):
            create = train_state.jit_create(create_state)
            state = create(seed_keys(config.seed)[0], options, static=static, image_size=size)
        record = {"train_seconds": 0.0}
    else:
        state, record = saved.state, saved.record
    return state, record | {
        "generator_sha256": generator_sha256,
        "parameters": sum(x.size for x in jax.tree.leaves(state.detector)),
        "flops_per_image": flops_per_image(static, state, size),
    }


def make_checkpoint_fn(
    config: ConfigDict, variables: Mapping[str, Any], held_out: np.ndarray
) -> Callable[[DetectorState, int], tuple[dict[str, Any], dict]]:
    """Returns `on_checkpoint` of loop.Training: the image threshold, from held-out good images.

    `variables` are the generator's, see `predict.predict_fn`.
    """
    bank = variables["memory_bank"]
    predict_fn = predict.sharded_predict_fn(config)
    detect_fn = predict.sharded_detect_fn(config)

    def on_checkpoint(state: DetectorState, _: int) -> tuple[dict[str, Any], dict]:
        generator = predict.replicate(variables)
        params = {
            "detector": state.ema,
            "discriminator": state.discriminator,
            "brightness": bank and bank.brightness,
        }
        params = predict.replicate(params)

        def maps_and_scores(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            maps, _ = predict_fn(generator, images, outputs=2)
            return maps, detect_fn(params, images, maps)

        calibrated = thresholds.calibrate(
            maps_and_scores, held_out, config=config, what="good images that were held out"
        )
        return {"thresholds": {"image": calibrated["image"]}}, {}

    return on_checkpoint


def fit(
    config: ConfigDict,
    images: np.ndarray,
    category_dir: str | Path,
    *,
    generator: checkpoint.Saved | None = None,
    validation: np.ndarray | None = None,
    make_batches: Callable[..., Iterator[dict[str, np.ndarray]]] = batches.train_batches,
    writer: Any = None,
) -> checkpoint.Saved:
    """Trains the detector for a generator, or resumes; returns the newest checkpoint.

    Args:
      config: the options of configs/default.py.
      images: all good images, see train.fit.
      category_dir: the generator's folder; detector/ in it gets the same files.
      generator: what `train.fit` returned; None restores the newest checkpoint of `category_dir`.
      validation: see train.fit.
      make_batches: see train.fit.
      writer: see train.fit.

    Raises:
      FileNotFoundError: there is no generator.
      DetectorError: the generator was trained on other images, or the detector that is there was
        trained for other weights of the generator.
      loop.TrainingError: see train.fit.
    """
    generator = generator or checkpoint.restore_newest(Path(category_dir) / "checkpoints")
    # With others, image ids would name other images, and held-out images could be in the bank.
    sha256 = train.images_sha256(images, validation)
    if train.data_of(generator) != (sha256, config.seed, config.held_out):
        raise DetectorError(
            f"{category_dir}: the generator was trained on other images, or with another seed or "
            "held_out"
        )
    variables = predict.variables_of(generator.state)
    sha256 = checkpoint.arrays_sha256(variables)
    folder = Path(category_dir) / "detector"
    folder.mkdir(exist_ok=True)

    static, options = split_options(config)
    arrays, held_out = train.split_images(config, images, validation)
    training = loop.Training(
        network="detector",
        template=template(config),
        step=loop.parallelize(train_step, static),
        key=seed_keys(config.seed)[1],
        options=options | variables,
        arrays=arrays,
        learning_rate=partial(train_state.learning_rate_schedule, options=options["optimizer"]),
        check_record=partial(check_generator, sha256, folder),
        start=partial(starting_point, config, sha256),
        on_checkpoint=make_checkpoint_fn(config, variables, held_out),
    )
    options = detector_options(config)
    return loop.run(options, folder, training, make_batches=make_batches, writer=writer)
