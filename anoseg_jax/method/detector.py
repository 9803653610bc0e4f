"""Training of the image-level detector, with the loop of the generator, whose weights stay."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jax import Array
from ml_collections import ConfigDict

from anoseg_jax.method import augment, losses, models, predict, train, train_state
from anoseg_jax.method.train_state import Optimizers, TrainState
from anoseg_jax.running import checkpoint


def without_defect(key: Array, image: Array, other: Array) -> tuple[Array, Array]:
    """Stands in for a `defect_fn` (see train.draw_examples): the image as it is, an empty mask."""
    del key, other
    return image, jnp.zeros(image.shape[:2])


def loss_fn(
    detector_params: Any,
    discriminator_params: Any,
    images: Array,
    maps: Array,
    *,
    detector: nn.Module,
    discriminator: nn.Module,
    loss: Mapping[str, Any],
    remat: bool = False,
) -> tuple[tuple[Array, Array], dict[str, Array]]:
    """Returns the losses of the detector and of its discriminator, and each term by name.

    `loss` is `config.loss`, with the weights of the detector; `remat`: see `models.applied`. Real
    pairs are the observed ones: a good image and what the generator says of it.
    """
    pair = models.applied(detector, remat=remat)(detector_params, images, maps)
    reconstruction = jnp.mean(jnp.abs(pair[0] - images)) + jnp.mean(jnp.abs(pair[1] - maps))
    terms = {"loss_reconstruction": reconstruction}
    total = loss["reconstruction_weight"] * reconstruction
    discriminator_total = jnp.zeros(())
    if loss["adversarial_weight"]:
        detector_side, discriminator_side = losses.ADVERSARIAL[loss["adversarial"]]
        judge = partial(models.applied(discriminator, remat=remat), discriminator_params)
        fake_logits = judge(*pair)
        terms["loss_adversarial"] = detector_side(fake_logits=fake_logits)
        total += loss["adversarial_weight"] * terms["loss_adversarial"]
        discriminator_total = discriminator_side(
            real_logits=judge(images, maps), fake_logits=fake_logits
        )
        terms["loss_discriminator"] = discriminator_total
    return (total, discriminator_total), terms


def train_step(
    state: TrainState,
    images: Array,
    key: Array,
    generator_params: Any,
    *,
    generator: nn.Module,
    detector: nn.Module,
    discriminator: nn.Module,
    optimizers: Optimizers,
    augment_fn: Callable,
    loss: Mapping[str, Any],
    ema_decay: float,
    accumulate: int = 1,
    remat: bool = False,
    axis_name: str | None = "batch",
) -> tuple[TrainState, dict[str, Array]]:
    """One step of the detector and its discriminator on good images; pure.

    As train.train_step, with the detector in the generator's place; `generator_params` stay.
    """
    first = jax.lax.axis_index(axis_name) * len(images) if axis_name else 0
    good, *_ = train.draw_examples(
        jax.random.fold_in(key, state.step),
        images,
        first,
        augment_fn=augment_fn,
        defect_fn=without_defect,
    )
    logits, _ = generator.apply({"params": generator_params}, good)
    return train.update_players(
        state,
        partial(loss_fn, detector=detector, discriminator=discriminator, loss=loss, remat=remat),
        (good, jax.lax.stop_gradient(nn.sigmoid(logits))),
        optimizers=optimizers,
        ema_decay=ema_decay,
        accumulate=accumulate,
        axis_name=axis_name,
    )


def own_options(config: ConfigDict) -> ConfigDict:
    """Returns the options with those of `config.detector` in the place of the generator's.

    They are what its checkpoints hold, and what a resumed run must not change.
    """
    own = config.copy_and_resolve_references()
    own.num_steps = config.detector.num_steps
    own.learning_rate = config.detector.learning_rate
    own.model.width = config.detector.width
    own.model.latent = config.detector.latent
    own.loss.adversarial_weight = config.detector.adversarial_weight
    own.loss.reconstruction_weight = config.detector.reconstruction_weight
    # The detector of another workdir was trained for the generator there.
    own.resume = ""
    return own


def create_parts(config: ConfigDict, generator_params: Any) -> train.Parts:
    """As train.create_parts, of the detector for a generator with these parameters."""
    own = own_options(config)
    generator, _ = models.create(config.model, config.loss)
    detector, discriminator = models.create_detector(config.model, config.detector)
    schedule, optimizers = train.create_optimizers(own)
    augment_fn = partial(augment.augment, **config.augment)
    # Another stream than the generator's.
    seed_key = jax.random.fold_in(jax.random.key(config.seed), 2)
    size = tuple(config.image_size)
    return train.Parts(
        generator=detector,
        schedule=schedule,
        draw_examples=partial(train.draw_examples, augment_fn=augment_fn, defect_fn=without_defect),
        train_step=partial(
            train_step,
            generator=generator,
            detector=detector,
            discriminator=discriminator,
            optimizers=optimizers,
            augment_fn=augment_fn,
            loss=own.loss,
            ema_decay=config.ema_decay,
            accumulate=config.accumulate,
            remat=config.remat,
        ),
        create_state=jax.jit(
            lambda images: train_state.create_state(
                seed_key,
                jnp.zeros((1, *images.shape[1:])),
                generator=detector,
                discriminator=discriminator,
                optimizers=optimizers,
                with_maps=True,
            )
        ),
        count_flops=partial(count_flops, detector, discriminator, size),
        draw_key=jax.random.fold_in(seed_key, 1),
        frozen=(generator_params,),
        about={"generator_sha256": checkpoint.params_sha256(generator_params)},
    )


def count_flops(
    detector: nn.Module, discriminator: nn.Module, image_size: tuple[int, int]
) -> float:
    """Returns the floating-point operations of one image's score, beside those of its map."""
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    maps = jax.ShapeDtypeStruct((1, *image_size), jnp.float32)
    params = {
        name: jax.eval_shape(network.init, jax.random.key(0), images, maps)["params"]
        for name, network in (("detector", detector), ("discriminator", discriminator))
    }
    score = partial(predict.detect_fn, detector=detector, discriminator=discriminator)
    return models.count_flops(score, params, images, maps)


def fit(
    config: ConfigDict,
    train_batches: Callable[[int], Iterator[np.ndarray]],
    category_dir: str | Path,
    *,
    held_out: np.ndarray | None = None,
    writer: Any = None,
) -> TrainState:
    """Trains the detector for the generator in `category_dir`; there, in detector/, it goes on.

    Args:
      config: the options of configs/default.py.
      train_batches: see train.fit.
      category_dir: the generator's; detector/ in it gets the same files as the generator has.
      held_out: good images that are not trained on, uint8 [n, h, w, 3], for the image threshold.
      writer: of clu.metric_writers, for TensorBoard; None writes none.

    Raises:
      FileNotFoundError: there is no generator.
      predict.DetectorError: the detector there was trained for other weights of the generator.
      TrainingError: see train.fit.
    """
    predictor = predict.Predictor(category_dir, batch_size=config.evaluate.batch_size)
    parts = create_parts(config, predictor.params)
    folder = Path(category_dir) / "detector"
    folder.mkdir(exist_ok=True)
    saved = checkpoint.read_record(folder / "checkpoints")
    if saved is not None:
        predict.check_generator(saved, parts.about["generator_sha256"], folder)
    detect = predict.create_detect(
        parts.train_step.keywords["detector"],
        parts.train_step.keywords["discriminator"],
        batch_size=config.evaluate.batch_size,
    )

    def predict_fn(params: Any, images: np.ndarray) -> tuple:
        maps, _, reconstructions = predictor(images)
        return maps, detect(params, images, maps), reconstructions

    def thresholds(state: TrainState) -> dict[str, Any]:
        params = {"detector": state.ema, "discriminator": state.discriminator}
        return {"image": train.calibrate(predict_fn, params, held_out, config)["image"]}

    return train.run_steps(
        own_options(config),
        parts,
        train_batches,
        folder,
        calibrate_fn=thresholds,
        first_fn=lambda: np.zeros((1, *config.image_size, 3), np.uint8),  # it has no memory
        writer=writer,
    )
