"""The result for one photograph: score, verdict, anomaly map, defective regions."""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from anoseg_jax.images.decode import resize_image

MAX_REGIONS = 20  # in a row of predictions.csv and in an answer of the server
DEFECTIVE, GOOD, UNREADABLE = "defective", "good", "unreadable"


class Region(NamedTuple):
    """A connected region of defective pixels, in pixels of the photograph.

    Attributes:
      area: number of pixels.
      x: left edge of its bounding box.
      y: upper edge.
      width: of the box.
      height: of the box.
    """

    area: int
    x: int
    y: int
    width: int
    height: int


class Thresholds(NamedTuple):
    """At or above `image` a score is defective, at or above `pixel` a pixel; None: no verdict."""

    image: float | None
    pixel: float | None


def find_regions(mask: np.ndarray) -> list[Region]:
    """Returns the connected regions of a mask, bool [h, w], the largest first.

    Pixels that touch at a corner are connected.
    """
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    regions = [
        Region(int(area), x.start, y.start, x.stop - x.start, y.stop - y.start)
        for area, (y, x) in zip(areas, ndimage.find_objects(labels), strict=True)
    ]
    return sorted(regions, key=lambda region: (-region.area, region.y, region.x))


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The result for one photograph.

    Attributes:
      name: the path of its file; "" for an array.
      score: at least 0; higher is more anomalous.
      thresholds: those that `verdict` and `mask` are made with.
      size: height and width of the photograph.
      seconds: for reading it, and its share of the time for its batch.
      image: the photograph at the model's size, uint8 [h, w, 3].
      model_map: the anomaly map at the model's size, float32 [h, w] in [0, 1].
    """

    name: str
    score: float
    thresholds: Thresholds
    size: tuple[int, int]
    seconds: float
    image: np.ndarray = dataclasses.field(repr=False)
    model_map: np.ndarray = dataclasses.field(repr=False)

    @property
    def normalized_score(self) -> float | None:
        """score / (score + threshold), from 0 to 1; None without an image threshold above 0."""
        threshold = self.thresholds.image
        return self.score / (self.score + threshold) if (threshold or 0) > 0 else None

    @property
    def is_defective(self) -> bool | None:
        """Whether the score is at or above the image threshold; None without one."""
        return None if self.thresholds.image is None else self.score >= self.thresholds.image

    @property
    def verdict(self) -> str:
        """`DEFECTIVE` or `GOOD`; "" without an image threshold."""
        return {True: DEFECTIVE, False: GOOD, None: ""}[self.is_defective]

    @property
    def anomaly_map(self) -> np.ndarray:
        """The anomaly map at the photograph's size, float32 [h, w] in [0, 1]; made at each use."""
        return resize_image(self.model_map, self.size)

    @property
    def mask(self) -> np.ndarray | None:
        """Defective pixels at the photograph's size, bool [h, w]; None without a threshold."""
        if self.thresholds.pixel is None:
            return None
        if self.model_map.max() < self.thresholds.pixel:  # resizing makes no pixel brighter
            return np.zeros(self.size, bool)
        return self.anomaly_map >= self.thresholds.pixel

    @functools.cached_property
    def regions(self) -> list[Region]:
        """The connected regions of `mask`, the largest first; none without a pixel threshold."""
        mask = self.mask
        return [] if mask is None or not mask.any() else find_regions(mask)

    @property
    def largest_regions(self) -> list[dict[str, Any]]:
        """The largest MAX_REGIONS regions as JSON can hold them: area, and box [x, y, w, h]."""
        return [{"area": r.area, "box": list(r[1:])} for r in self.regions[:MAX_REGIONS]]

    def plot(self) -> Any:
        """Returns a matplotlib figure: photograph, anomaly map, and the edges of the mask."""
        from matplotlib.figure import Figure  # matplotlib is needed for this alone

        height, width = self.model_map.shape
        figure = Figure(figsize=(9, 3 * height / width + 0.6), layout="constrained")
        photograph, heat, overlay = figure.subplots(1, 3)
        photograph.imshow(self.image)
        heat.imshow(self.model_map, vmin=0, vmax=1, cmap="inferno")
        overlay.imshow(self.image)
        mask = None
        if self.thresholds.pixel is not None:
            mask = self.model_map >= self.thresholds.pixel
        if mask is not None and mask.any() and not mask.all():
            overlay.contour(mask, [0.5], colors="red", linewidths=1)
        for axes, title in ((photograph, "photograph"), (heat, "anomaly map"), (overlay, "found")):
            axes.set_title(title)
            axes.axis("off")
        figure.suptitle(" ".join(filter(None, (self.name, f"{self.score:.3f}", self.verdict))))
        return figure


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A file that gave no prediction, and the reason in one line."""

    name: str
    reason: str
