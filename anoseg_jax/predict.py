"""From images to anomaly maps and image-level scores; needs neither TensorFlow nor the data."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from anoseg_jax import checkpoint, metrics, models


def image_scores(maps: Array, top_fraction: float) -> Array:
    """Returns the mean of each map's highest pixels, [b]: `top_fraction` of them, at least one.

    A defect is small: the mean of the whole map would drown it, the single highest pixel is noise.
    """
    pixels = maps.reshape(maps.shape[0], -1)
    count = max(1, round(top_fraction * pixels.shape[1]))
    return jnp.mean(jax.lax.top_k(pixels, count)[0], axis=1)


def predict_fn(
    params: dict, images: Array, *, generator: nn.Module, top_fraction: float
) -> tuple[Array, Array, Array]:
    """Returns anomaly maps [b, h, w], image-level scores [b] and reconstructions [b, h, w, 3].

    Args:
      params: the generator's parameters.
      images: uint8 [b, h, w, 3].
      generator: the module.
      top_fraction: of the pixels of a map that its score is the mean of.

    All results are float32 in [0, 1]; reconstructions are clipped to it.
    """
    logits, reconstructions = generator.apply({"params": params}, images.astype(jnp.float32) / 255)
    maps = nn.sigmoid(logits)
    return maps, image_scores(maps, top_fraction), jnp.clip(reconstructions, 0, 1)


def create_predict(
    generator: nn.Module, *, top_fraction: float, batch_size: int | None = None
) -> Callable[[Any, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns `predict_fn` as a function of parameters and images, divided over all local devices.

    It takes uint8 [b, h, w, 3] and fills up with copies of the last image: to `batch_size`, so that
    it is compiled once for all batches up to it, or with None to a multiple of the devices.
    """
    mesh = Mesh(jax.local_devices(), ("batch",))
    replicated, divided = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("batch"))
    )
    jitted = jax.jit(partial(predict_fn, generator=generator, top_fraction=top_fraction))

    def predict(params: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        count = len(images)
        size = max(count, batch_size or 0)
        size += -size % mesh.size
        filled = np.concatenate([images, np.repeat(images[-1:], size - count, axis=0)])
        results = jitted(jax.device_put(params, replicated), jax.device_put(filled, divided))
        return tuple(np.asarray(result)[:count] for result in results)

    return predict


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


class Predictor:
    """A trained generator on all local devices.

    Attributes:
      params: the averaged weights of the generator.
      config: the options it was trained with, as plain dicts.
      record: what training recorded: seconds, parameters, FLOPs an image.
      image_size: height and width of the images that it takes.
    """

    def __init__(
        self,
        category_dir: str | Path,
        *,
        top_fraction: float | None = None,
        batch_size: int | None = None,
    ):
        """Loads the newest checkpoint of `W/<category>`; FileNotFoundError if there is none.

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
