"""A trained model for photographs of any size and format: files, folders or arrays."""

import collections
import concurrent.futures
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from PIL import Image

from anoseg_jax import UsageError
from anoseg_jax.deploy import model_folder
from anoseg_jax.deploy.photographs import Photographs
from anoseg_jax.deploy.prediction import Prediction, Thresholds, Unreadable
from anoseg_jax.deploy.trained_model import TrainedModel
from anoseg_jax.images.decode import (
    MAX_MEGAPIXELS,
    LayoutError,
    Picture,
    open_image,
    resize_image,
    to_rgb,
)
from anoseg_jax.method import thresholds as good_thresholds
from anoseg_jax.running import progress

CACHE = "~/.cache/anoseg_jax"
# Images that are computed at once, for each device. Larger batches are not faster on a CPU, and
# one photograph takes as long as a batch: all batches are filled up to this size.
BATCH_CPU, BATCH_ACCELERATOR = 4, 16
# A file, the content of a file, or a decoded image.
Photograph = str | os.PathLike | bytes | np.ndarray | Image.Image


class Loaded(NamedTuple):
    """A photograph at the model's size, uint8 [h, w, 3]; its own size; the seconds it took."""

    image: np.ndarray
    size: tuple[int, int]
    seconds: float


class _Content(bytes):
    """The content of an image file, read like a file."""

    def read_bytes(self) -> bytes:
        return bytes(self)

    def __str__(self) -> str:
        return "the image"


def to_picture(image: np.ndarray | Image.Image) -> Picture:
    """Returns a decoded photograph as `images.decode` has them.

    Raises ValueError unless it is uint8 or uint16 [h, w], [h, w, 1], [h, w, 3] or [h, w, 4].
    """
    path = epath.Path("the image")  # what messages call it
    if isinstance(image, Image.Image):
        is_wide = image.mode == "F" or image.mode.startswith("I")
        return Picture(path, image, np.asarray(image) if is_wide else None, has_frames=False)
    channels = image.shape[2] if image.ndim == 3 else 1
    is_number = image.dtype in (np.uint8, np.uint16)
    if not is_number or image.ndim not in (2, 3) or channels not in (1, 3, 4) or not image.size:
        raise ValueError(
            "a photograph must be uint8 or uint16 [h, w], [h, w, 1], [h, w, 3] or [h, w, 4], and "
            f"have pixels; got {image.dtype} {list(image.shape)}"
        )
    image = image.reshape(*image.shape[:2], channels)
    rgb = np.repeat(image, 3, axis=2) if channels == 1 else image[..., :3]
    if image.dtype == np.uint16:
        return Picture(path, Image.new("RGB", (1, 1)), rgb, has_frames=False)
    return Picture(path, Image.fromarray(np.ascontiguousarray(rgb)), None, has_frames=False)


class Reading(NamedTuple):
    """How photographs are read: as those that a model was trained on.

    Attributes:
      size: height and width that they are resized to.
      bit_depth: see `decode.read_image`; None: the smallest that holds the file.
      max_megapixels: of a photograph.
    """

    size: tuple[int, int]
    bit_depth: int | None = None
    max_megapixels: float = MAX_MEGAPIXELS

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Reading":
        """Returns it for the options that a model was trained with."""
        bit_depth = config.get("bit_depth", "auto")  # "auto": the model was trained on arrays
        bit_depth = None if bit_depth == "auto" else int(bit_depth)
        limit = config.get("max_megapixels", MAX_MEGAPIXELS)
        return cls(tuple(config["image_size"]), bit_depth, limit)


def decode(photograph: Photograph, how: Reading) -> np.ndarray:
    """Returns a photograph at its own size, upright, uint8 RGB [h, w, 3], as training reads it.

    Raises LayoutError if a file cannot be read or has values above the bit depth, ValueError if an
    array is no photograph.
    """
    if isinstance(photograph, str | os.PathLike | bytes):
        is_content = isinstance(photograph, bytes)
        file = _Content(photograph) if is_content else epath.Path(photograph)
        picture = open_image(file, max_megapixels=how.max_megapixels)
    else:
        picture = to_picture(photograph)
    return to_rgb(picture, how.bit_depth)


def load(photograph: Photograph, how: Reading) -> Loaded:
    """Reads a photograph and resizes it, as training does; raises what `decode` raises."""
    began = time.monotonic()
    image = decode(photograph, how)
    return Loaded(resize_image(image, how.size), image.shape[:2], time.monotonic() - began)


def list_photographs(photographs: Any) -> list[Photograph] | None:
    """Returns several photographs (a folder, a list, an array) as a list; None for a single one.

    Raises LayoutError if a folder has no images.
    """
    if isinstance(photographs, str | os.PathLike):
        if not os.path.isdir(photographs):
            return None
        paths = Photographs([os.fspath(photographs)]).list()
        if not paths:
            raise LayoutError(f"{photographs}: no images in it")
        return paths
    if isinstance(photographs, np.ndarray):
        return list(photographs) if photographs.ndim == 4 else None
    return None if isinstance(photographs, bytes | Image.Image) else list(photographs)


class Predictor:
    """A trained model for photographs of any size and format; the weights are loaded once.

    `Predictor("W/bolt")("photo.jpg").score`

    Attributes:
      folder: the category folder with the checkpoints.
      model: the trained networks, a `TrainedModel`.
      reading: how photographs are read and resized.
      thresholds: for verdicts and masks, see `prediction.Thresholds`.
      threshold_sources: for "image" and "pixel", a sentence that says where the threshold is from.
      batch_size: the number of images that are computed at once.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        category: str | None = None,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        batch_size: int | None = None,
    ):
        """Loads the newest checkpoint.

        Args:
          workdir: the folder of a trained category, or a whole run's.
          category: which of the run's categories; needed if there are several.
          image_threshold: instead of the model's; of scores, which may be above 1.
          pixel_threshold: instead of the model's; from 0 to 1.
          batch_size: images that are computed at once; 1 gives the shortest time for one image.

        Raises:
          ModelError: there is no model, or more than one.
          UsageError: a threshold is out of range.
        """
        if pixel_threshold is not None and not 0 <= pixel_threshold <= 1:
            raise UsageError(f"pixel_threshold={pixel_threshold} must be from 0 to 1")
        self.folder = model_folder.find_model(workdir, category)
        if not jax.config.jax_compilation_cache_dir:
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser(CACHE))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        if batch_size is None:
            on_cpu = jax.default_backend() == "cpu"
            batch_size = (BATCH_CPU if on_cpu else BATCH_ACCELERATOR) * jax.device_count()
        self.batch_size = batch_size
        self.model = TrainedModel(self.folder, batch_size=batch_size, detector=None)
        self.reading = Reading.of(self.model.config)
        self._set_thresholds(image_threshold, pixel_threshold)

    def _set_thresholds(self, image: float | None, pixel: float | None) -> None:
        chosen = model_folder.read_thresholds(self.folder, self.model.weights_sha256)
        if chosen is None:
            chosen = dict(self.model.record["thresholds"])
            if self.model.detector:
                chosen["image"] = self.model.detector.record["thresholds"]["image"]
        values = {name: chosen[name]["threshold"] for name in ("image", "pixel")}
        self.threshold_sources = {name: chosen[name]["how"] for name in ("image", "pixel")}
        for name, value in (("image", image), ("pixel", pixel)):
            if value is not None:
                values[name] = float(value)
                self.threshold_sources[name] = f"set by the user ({name}_threshold)"
        self.thresholds = Thresholds(**values)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that photographs are resized to."""
        return self.model.image_size

    def compute(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns maps [b, h, w] and scores [b] of uint8 images [b, h, w, 3] of `image_size`."""
        maps, scores = self.model(images)
        if self.model.detector:
            scores = self.model.detector(images, maps)
        return maps, scores

    def warm_up(self) -> None:
        """Compiles the model, if that has not been done, and says so if it takes long."""
        with progress.waiting("compiling the model", "usually under half a minute, once"):
            self.compute(np.zeros((1, *self.image_size, 3), np.uint8))

    def load(self, photograph: Photograph) -> Loaded:
        """Reads and resizes a photograph as training does; LayoutError names what is unreadable."""
        return load(photograph, self.reading)

    def __call__(self, photographs: Any) -> Prediction | list[Prediction]:
        """Returns the prediction for one photograph, or a list of them for several.

        Args:
          photographs: one file, content of a file (bytes), array or PIL image; or several: a
            folder, a list, an array. Arrays are uint8: [h, w, 3] or [h, w], [b, h, w, 3] for
            several.

        Raises:
          LayoutError: a file cannot be read.
          ValueError: an array is not a photograph.
        """
        listed = list_photographs(photographs)
        several = [photographs] if listed is None else listed
        predictions = []
        for prediction in self.stream(several):
            if isinstance(prediction, Unreadable):
                raise LayoutError(prediction.reason)
            predictions.append(prediction)
        return predictions[0] if listed is None else predictions

    def stream(
        self, photographs: Iterable[Photograph | None]
    ) -> Iterator[Prediction | Unreadable | None]:
        """Yields the prediction for each photograph, in order, in bounded memory.

        Threads read the next photographs while a batch is computed. None among the photographs says
        that no more come for now: those before it are computed at once, then None is yielded.
        """
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            reading: collections.deque = collections.deque()
            for photograph in photographs:
                if photograph is not None:
                    reading.append((_name_of(photograph), pool.submit(self.load, photograph)))
                while reading and (photograph is None or len(reading) >= 3 * self.batch_size):
                    yield from self._predict_next(reading)
                if photograph is None:
                    yield None
            while reading:
                yield from self._predict_next(reading)

    def _predict_next(self, reading: collections.deque) -> Iterator[Prediction | Unreadable]:
        """Predicts the next batch; an unreadable photograph takes no place in it."""
        batch: list[tuple[str, Loaded | Unreadable]] = []
        images: list[np.ndarray] = []
        while reading and len(images) < self.batch_size:
            name, future = reading.popleft()
            try:
                loaded = future.result()
                images.append(loaded.image)
            except LayoutError as error:
                loaded = Unreadable(name, str(error))
            batch.append((name, loaded))
        began = time.monotonic()
        results = iter(zip(*self.compute(np.stack(images)), strict=True) if images else ())
        share = (time.monotonic() - began) / max(1, len(images))
        for name, loaded in batch:
            if isinstance(loaded, Unreadable):
                yield loaded
            else:
                image_map, score = next(results)
                yield Prediction(
                    name,
                    float(score),
                    self.thresholds,
                    loaded.size,
                    loaded.seconds + share,
                    loaded.image,
                    image_map,
                )

    def recalibrate(self, good_photographs: Any) -> Thresholds:
        """Makes both thresholds anew from photographs of good parts, and stores them.

        They are written to thresholds.json beside the model and replace the model's own from then
        on; no weight changes. Take photographs that the model was not trained on.

        Args:
          good_photographs: several of them, as for a call.

        Raises:
          LayoutError: a file cannot be read.
          ValueError: there are none.
        """
        photographs = list_photographs(good_photographs)
        if not photographs:
            raise ValueError("recalibrate needs a list or a folder of photographs of good parts")
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            images = np.stack([loaded.image for loaded in pool.map(self.load, photographs)])
        made = good_thresholds.calibrate(self.compute, images, config=self.model.config)
        for threshold in made.values():
            threshold["how"] = f"recalibrated: {threshold['how']}"
        model_folder.write_thresholds(self.folder, self.model.weights_sha256, made)
        self._set_thresholds(None, None)
        return self.thresholds


def _name_of(photograph: Photograph) -> str:
    return os.fspath(photograph) if isinstance(photograph, str | os.PathLike) else ""
