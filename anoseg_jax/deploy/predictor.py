"""A trained model for scripts: images to anomaly maps and scores; needs no TensorFlow."""

import numpy as np
from etils import epath

from anoseg_jax.method import detector, memory_bank, models, predict
from anoseg_jax.running import checkpoint


class DetectorPredictor:
    """A trained image-level detector on all devices.

    Attributes:
      config: the options it was trained with, as plain dicts.
      record: what training recorded: seconds, parameters, FLOPs an image, thresholds.
      weights_sha256: hash of the detector's averaged weights.
      step: the training step of the checkpoint.
    """

    def __init__(
        self, category_dir: epath.PathLike, generator_sha256: str, *, batch_size: int | None = None
    ):
        """Loads the newest checkpoint of `W/<category>/detector`.

        Raises FileNotFoundError if there is none, detector.DetectorError if it was trained for a
        generator whose weights have another hash than `generator_sha256`.
        """
        folder = epath.Path(category_dir) / "detector"
        state, self.config, self.record, self.step = checkpoint.restore_newest(
            folder / "checkpoints"
        )
        detector.check_generator(self.record, generator_sha256, folder)
        self.weights_sha256 = checkpoint.arrays_sha256(state["ema"])
        params = {"detector": state["ema"], "discriminator": state["discriminator"]}
        self._params = predict.replicate(params)
        self._detect = predict.sharded_detect_fn(
            *models.create_detector(self.config["model"], self.config["detector"]),
            batch_size or self.config["evaluate"]["batch_size"],
        )

    def __call__(self, images: np.ndarray, maps: np.ndarray) -> np.ndarray:
        """Returns the scores [b] of images, uint8 [b, h, w, 3], with the generator's maps."""
        return self._detect(self._params, images, maps)


class Predictor:
    """A trained generator on all devices; its weights are placed on them once.

    Attributes:
      config: the options it was trained with, as plain dicts.
      record: what training recorded: seconds, parameters, FLOPs an image, thresholds.
      weights_sha256: hash of the averaged weights and the memory bank.
      step: the training step of the checkpoint.
      image_size: height and width of the images that it takes.
      batch_size: the largest number of images that are computed at once.
      detector: the image-level detector, `detector(images, maps) -> scores`; None if not asked for.
    """

    def __init__(
        self,
        category_dir: epath.PathLike,
        *,
        top_fraction: float | None = None,
        batch_size: int | None = None,
        detector: bool = False,
    ):
        """Loads the newest checkpoint of `W/<category>`; FileNotFoundError if there is none.

        Args:
          category_dir: the folder of a trained category.
          top_fraction: in place of that of the checkpoint's options (see `predict.predict_fn`); the
            recorded image threshold does not hold for another one.
          batch_size: the largest number of images that are computed at once, by default that of the
            checkpoint's options; one program serves all smaller batches.
          detector: also loads the image-level detector.
        """
        folder = epath.Path(category_dir)
        state, self.config, self.record, self.step = checkpoint.restore_newest(
            folder / "checkpoints"
        )
        trained_with = self.config["evaluate"]["top_fraction"]
        if top_fraction not in (None, trained_with) and "thresholds" in self.record:
            how = f"none: made from scores of evaluate.top_fraction={trained_with}"
            self.record["thresholds"]["image"] = {"threshold": None, "how": how}
        self.image_size = tuple(self.config["image_size"])
        bank = memory_bank.from_dicts(state["memory_bank"])
        self.weights_sha256 = checkpoint.arrays_sha256((state["ema"], bank))
        self._variables = predict.replicate({"params": state["ema"], "memory_bank": bank})
        self.batch_size = batch_size or self.config["evaluate"]["batch_size"]
        generator, _ = models.create(self.config["model"], self.config["loss"])
        self._predict = predict.sharded_predict_fn(
            generator, self.config, batch_size=batch_size, top_fraction=top_fraction
        )
        self.detector = None
        if detector:
            self.detector = DetectorPredictor(folder, self.weights_sha256, batch_size=batch_size)

    def __call__(
        self, images: np.ndarray, *, reconstructions: bool = False
    ) -> tuple[np.ndarray, ...]:
        """Returns maps [b, h, w] and scores [b] of uint8 images, and reconstructions if asked for.

        Reconstructions are [b, h, w, 3] in [0, 1]. Raises ValueError if the images are not uint8
        [b, h, w, 3] of `image_size`.
        """
        expected = (*self.image_size, 3)
        if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8 [b, {', '.join(map(str, expected))}], the size that the "
                f"model was trained at; got {images.dtype} {list(images.shape)}"
            )
        outputs = 3 if reconstructions else 2
        starts = range(0, max(1, len(images)), self.batch_size)
        chunks = [
            self._predict(self._variables, images[i : i + self.batch_size], outputs=outputs)
            for i in starts
        ]
        return tuple(np.concatenate(results) for results in zip(*chunks, strict=True))
