"""From images to anomaly maps and image-level scores; needs neither TensorFlow nor the data."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from anoseg_jax import UsageError, metrics
from anoseg_jax.method import models
from anoseg_jax.running import checkpoint


class DetectorError(UsageError):
    """A detector that cannot be used; the message is one line that says why."""


def image_scores(maps: Array, top_fraction: float) -> Array:
    """Returns the mean of each map's highest pixels, [b]: `top_fraction` of them, at least one.

    A defect is small: the mean of the whole map would drown it, the single highest pixel is noise.
    """
    pixels = maps.reshape(maps.shape[0], -1)
    count = max(1, round(top_fraction * pixels.shape[1]))
    return jnp.mean(jax.lax.top_k(pixels, count)[0], axis=1)


def peak_heights(logits: Array, top_fraction: float) -> Array:
    """Returns how far each map's highest pixels stand out from its median, in logits, [b].

    What raises all of a map alike, such as the light, is no defect.
    """
    median = jnp.median(logits.reshape(logits.shape[0], -1), axis=1)
    return image_scores(logits, top_fraction) - median


def predict_fn(
    params: dict, images: Array, *, generator: nn.Module, top_fraction: float
) -> tuple[Array, Array, Array]:
    """Returns anomaly maps [b, h, w], image-level scores [b] and reconstructions [b, h, w, 3].

    Args:
      params: the generator's parameters.
      images: uint8 [b, h, w, 3].
      generator: the module.
      top_fraction: of the pixels of a map that its score is the mean of.

    All are float32; maps and reconstructions are in [0, 1], the latter clipped to it, scores
    (`peak_heights`) are at least 0.
    """
    logits, reconstructions = generator.apply({"params": params}, images.astype(jnp.float32) / 255)
    scores = peak_heights(logits, top_fraction)
    return nn.sigmoid(logits), scores, jnp.clip(reconstructions, 0, 1)


def feature_distance(observed: Sequence[Array], reconstructed: Sequence[Array]) -> Array:
    """Returns how far two pairs are apart in the discriminator's features, [b]; 0 if equal.

    Args:
      observed: features of the observed pairs, [b, h, w, c] a level.
      reconstructed: those of the reconstructed pairs.

    Of each level the root mean square difference, then the mean of the levels: a defect is small,
    squares keep it from being drowned in the small errors of everything else.
    """
    differences = [
        a.astype(jnp.float32) - b.astype(jnp.float32)
        for a, b in zip(observed, reconstructed, strict=True)
    ]
    levels = [jnp.sqrt(jnp.mean(jnp.square(x), axis=(1, 2, 3))) for x in differences]
    return jnp.mean(jnp.stack(levels), axis=0)


def detect_fn(
    params: Mapping[str, Any],
    images: Array,
    maps: Array,
    *,
    detector: nn.Module,
    discriminator: nn.Module,
) -> Array:
    """Returns the detector's image-level scores [b], float32, of 0 or more.

    Args:
      params: of the "detector" and of its "discriminator".
      images: uint8 [b, h, w, 3].
      maps: the generator's anomaly maps of them, float [b, h, w] in [0, 1].
      detector: the module.
      discriminator: the module that learnt with it.
    """
    images = images.astype(jnp.float32) / 255
    reconstructed = detector.apply({"params": params["detector"]}, images, maps)
    judge = partial(discriminator.apply, {"params": params["discriminator"]}, features=True)
    return feature_distance(judge(images, maps)[1], judge(*reconstructed)[1])


def divide(function: Callable, batch_size: int | None = None) -> Callable[..., Any]:
    """Returns `function` of parameters and arrays [b, ...], divided over all devices.

    It takes and returns numpy arrays and fills up with copies of the last example: to `batch_size`,
    so that it is compiled once for all batches up to it, or with None to a multiple of the devices.
    Of several processes each must call it with the same, and gets all of the results.
    """
    mesh = Mesh(jax.devices(), ("batch",))
    replicated, divided = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("batch"))
    )
    jitted = jax.jit(function, out_shardings=replicated)

    def put(array: Any, sharding: NamedSharding) -> Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def call(params: Any, *arrays: np.ndarray) -> Any:
        count = len(arrays[0])
        size = max(count, batch_size or 0)
        size += -size % mesh.size
        filled = [np.concatenate([x, np.repeat(x[-1:], size - count, axis=0)]) for x in arrays]
        placed = jax.tree.map(lambda array: put(array, replicated), params)
        results = jitted(placed, *(put(array, divided) for array in filled))
        return jax.tree.map(lambda result: np.asarray(result)[:count], results)

    return call


def create_predict(
    generator: nn.Module, *, top_fraction: float, batch_size: int | None = None
) -> Callable[[Any, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns `predict_fn` as a function of parameters and images; see `divide`."""
    return divide(partial(predict_fn, generator=generator, top_fraction=top_fraction), batch_size)


def create_detect(
    detector: nn.Module, discriminator: nn.Module, *, batch_size: int | None = None
) -> Callable[[Any, np.ndarray, np.ndarray], np.ndarray]:
    """Returns `detect_fn` as a function of parameters, images and maps; see `divide`."""
    return divide(partial(detect_fn, detector=detector, discriminator=discriminator), batch_size)


def thresholds_from_good(
    maps: np.ndarray, scores: np.ndarray, *, pixel_rate: float, image_rate: float
) -> dict[str, dict[str, Any]]:
    """Makes thresholds from good images that were held out: no defect is needed.

    Args:
      maps: anomaly maps of the held-out images, float [n, h, w]; n may be 0.
      scores: their image-level scores, float [n].
      pixel_rate: share of good pixels that may be at or above the pixel threshold.
      image_rate: share of good images that may be at or above the image threshold.

    Returns:
      For "pixel" and "image": `threshold` (`score >= threshold` is defective; None where there are
      no images), `held_out_rate` (what was asked for), `images` and, in words, `how`.
    """
    made = {}
    for name, values, rate in (("pixel", maps, pixel_rate), ("image", scores, image_rate)):
        count = len(values)
        how = f"at most {rate:.2%} of the {name}s of {count} good images that were held out"
        if not count:
            how = "none: too few good images to hold any out (held_out)"
        elif name == "image" and count * rate < 1:
            how += f": above all of them, as {count} images cannot tell a rate of {rate:.2%}"
        made[name] = {
            "threshold": metrics.threshold_from_good(values, rate),
            "held_out_rate": rate,
            "images": count,
            "how": how,
        }
    return made


def check_generator(record: Mapping[str, Any], params_sha256: str, folder: Path) -> None:
    """Raises DetectorError unless the detector of `folder` was trained for these weights."""
    trained_for = record["generator_sha256"]
    if trained_for != params_sha256:
        raise DetectorError(
            f"{folder}: this detector was trained for generator weights {trained_for[:12]}, but "
            f"the newest checkpoint beside it holds {params_sha256[:12]}: remove that folder and "
            "train again, or set detector.enabled=False"
        )


class DetectorPredictor:
    """A trained image-level detector on all devices.

    Attributes:
      params: the averaged weights of the "detector", and those of its "discriminator".
      config: the options it was trained with, as plain dicts.
      record: what training recorded: seconds, parameters, FLOPs an image, thresholds.
      params_sha256: of the detector's weights.
    """

    def __init__(
        self, category_dir: str | Path, generator_sha256: str, *, batch_size: int | None = None
    ):
        """Loads the newest checkpoint of `W/<category>/detector`.

        Raises FileNotFoundError if there is none, DetectorError if it was trained for a generator
        whose weights have another hash than `generator_sha256`.
        """
        folder = Path(category_dir) / "detector"
        state, self.config, self.record, self.step = checkpoint.restore_newest(
            folder / "checkpoints"
        )
        check_generator(self.record, generator_sha256, folder)
        self.params = {"detector": state["ema"], "discriminator": state["discriminator"]}
        self.params_sha256 = checkpoint.params_sha256(self.params["detector"])
        detector, discriminator = models.create_detector(
            self.config["model"], self.config["detector"]
        )
        self._detect = create_detect(detector, discriminator, batch_size=batch_size)

    def __call__(self, images: np.ndarray, maps: np.ndarray) -> np.ndarray:
        """Returns the scores [b] of images, uint8 [b, h, w, 3], with the generator's maps."""
        return self._detect(self.params, images, maps)


class Predictor:
    """A trained generator on all devices.

    Attributes:
      params: the averaged weights of the generator.
      config: the options it was trained with, as plain dicts.
      record: what training recorded: seconds, parameters, FLOPs an image.
      image_size: height and width of the images that it takes.
      detector: the image-level detector, `detector(images, maps) -> scores`; None if not asked for.
    """

    def __init__(
        self,
        category_dir: str | Path,
        *,
        top_fraction: float | None = None,
        batch_size: int | None = None,
        detector: bool = False,
    ):
        """Loads the newest checkpoint of `W/<category>`; FileNotFoundError if there is none.

        With `detector` also that of the image-level detector (see `DetectorPredictor`).

        `top_fraction` (see `predict_fn`) stands in for the one of the checkpoint's options, whose
        image threshold is of no use then. `batch_size`: see `create_predict`.
        """
        self.params, self.config, self.record, self.step = checkpoint.restore_variables(
            Path(category_dir) / "checkpoints"
        )
        trained_with = self.config["evaluate"]["top_fraction"]
        if top_fraction not in (None, trained_with) and "thresholds" in self.record:
            how = f"none: made from scores of evaluate.top_fraction={trained_with}"
            self.record["thresholds"]["image"] = {"threshold": None, "how": how}
        self.image_size = tuple(self.config["image_size"])
        generator, _ = models.create(self.config["model"], self.config["loss"])
        self._predict = create_predict(
            generator,
            top_fraction=trained_with if top_fraction is None else top_fraction,
            batch_size=batch_size,
        )
        self.detector = None
        if detector:
            sha256 = checkpoint.params_sha256(self.params)
            self.detector = DetectorPredictor(category_dir, sha256, batch_size=batch_size)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns maps [b, h, w], scores [b] and reconstructions [b, h, w, 3] of uint8 images.

        Raises ValueError if the images are not uint8 [b, h, w, 3] of `image_size`.
        """
        expected = (*self.image_size, 3)
        if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8 [b, {', '.join(map(str, expected))}], the size that the "
                f"model was trained at; got {images.dtype} {list(images.shape)}"
            )
        return self._predict(self.params, images)
