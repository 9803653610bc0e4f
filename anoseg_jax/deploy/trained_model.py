"""A trained model on all devices: images of its size to anomaly maps and scores."""

import numpy as np
from etils import epath

from anoseg_jax.method import predict
from anoseg_jax.running import checkpoint
from anoseg_jax.running.checkpoint import Saved


class TrainedDetector:
    """A trained image-level detector on all devices.

    Attributes:
      config: the options it was trained with, as plain dicts.
      record: what training recorded: seconds, parameters, FLOPs per image, thresholds.
      weights_sha256: hash of the detector's averaged weights.
      step: the training step of the checkpoint.
    """

    def __init__(self, saved: Saved, brightness: np.ndarray | None, batch_size: int | None = None):
        """Places the weights of a checkpoint of `detector.fit` on all devices.

        `brightness` is that of the generator's memory bank, if it has one.
        """
        state, self.config, self.record, self.step = saved
        self.weights_sha256 = checkpoint.arrays_sha256(state["ema"])
        params = {
            "detector": state["ema"],
            "discriminator": state["discriminator"],
            "brightness": brightness,
        }
        self._params = predict.replicate(params)
        self._detect = predict.sharded_detect_fn(self.config, batch_size=batch_size)

    def __call__(self, images: np.ndarray, maps: np.ndarray) -> np.ndarray:
        """Returns the scores [b] of images, uint8 [b, h, w, 3], with the generator's maps."""
        return self._detect(self._params, images, maps)


class TrainedModel:
    """A trained generator on all devices; its weights are placed on them once.

    Attributes:
      config: the options it was trained with, as plain dicts.
      record: what training recorded: seconds, parameters, FLOPs per image, thresholds.
      weights_sha256: hash of the averaged weights and the memory bank.
      step: the training step of the checkpoint.
      image_size: height and width of the images that it takes.
      batch_size: the largest number of images that are computed at once.
      detector: the image-level detector, `detector(images, maps) -> scores`, or None.
    """

    def __init__(
        self,
        model: epath.PathLike | Saved,
        *,
        top_fraction: float | None = None,
        batch_size: int | None = None,
        detector: bool | None | Saved = False,
    ):
        """Places the weights of a trained model on all devices.

        Args:
          model: the folder `W/<category>`, whose newest checkpoint is loaded, or the checkpoint
            that `train.fit` returned.
          top_fraction: instead of that of the checkpoint's options (see `predict.predict_fn`); the
            recorded image threshold does not hold for another one.
          batch_size: the largest number of images that are computed at once, by default that of the
            checkpoint's options; one program serves all smaller batches.
          detector: True also loads the image-level detector of the folder; None does if its scores
            are those of the images; or the checkpoint that `detector.fit` returned.

        Raises FileNotFoundError if there is no checkpoint, detector.DetectorError if the detector
        was trained for other weights of the generator.
        """
        folder = None if isinstance(model, Saved) else epath.Path(model)
        saved = model if folder is None else checkpoint.restore_newest(folder / "checkpoints")
        self.config, self.record, self.step = saved.config, dict(saved.record), saved.step
        trained_with = self.config["evaluate"]["top_fraction"]
        if top_fraction not in (None, trained_with) and "thresholds" in self.record:
            how = f"none: made from scores of evaluate.top_fraction={trained_with}"
            no_threshold = {"image": {"threshold": None, "how": how}}
            self.record["thresholds"] = self.record["thresholds"] | no_threshold
        self.image_size = tuple(self.config["image_size"])
        variables = predict.variables_of(saved.state)
        self.weights_sha256 = checkpoint.arrays_sha256(variables)
        self._variables = predict.replicate(variables)
        self.batch_size = batch_size or self.config["evaluate"]["batch_size"]
        self._predict = predict.sharded_predict_fn(
            self.config, batch_size=batch_size, top_fraction=top_fraction
        )
        self.detector = None
        if detector is None:
            detector = self.config["evaluate"]["image_score"] == "detector"
        if detector is True:
            from anoseg_jax.method.detector import check_generator  # imports all of training

            detector = checkpoint.restore_newest(folder / "detector" / "checkpoints")
            check_generator(self.weights_sha256, folder / "detector", detector.record)
        if detector:
            bank = variables["memory_bank"]
            self.detector = TrainedDetector(detector, bank and bank.brightness, batch_size)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns maps [b, h, w] and scores [b] of uint8 images; b may be 0.

        Raises ValueError if the images are not uint8 [b, h, w, 3] of `image_size`.
        """
        expected = (*self.image_size, 3)
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8 [b, {', '.join(map(str, expected))}], the size that the "
                f"model was trained at; got {images.dtype} {list(images.shape)}"
            )
        if not len(images):
            return np.zeros((0, *self.image_size), np.float32), np.zeros(0, np.float32)
        chunks = [
            self._predict(self._variables, images[i : i + self.batch_size], outputs=2)
            for i in range(0, len(images), self.batch_size)
        ]
        maps, scores = (np.concatenate(results) for results in zip(*chunks, strict=True))
        return maps, scores
