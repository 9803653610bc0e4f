"""Metrics of resampled test images, and their intervals (stratified bootstrap).

Images are drawn with replacement, good and defective ones apart. Pixel metrics come from histograms
of the 8-bit maps. All metrics are better when higher.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from anoseg_jax.evaluation import metrics, pixel_tables
from anoseg_jax.report.runs import LEVELS, CompareError, Images, Run, not_paired, read_images

CONFIDENCE = 0.95
_KEYS = pixel_tables.keys_from_scores(np.arange(LEVELS, dtype=np.float32) / 255)


def resample_weights(strata: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Returns how often each image occurs, [1 + resamples, n]; the first row: once each.

    Drawn with replacement among the images of the same stratum (an integer each, [n]), so that a
    resample has as many good and as many defective images as there are.
    """
    weights = np.ones((1 + resamples, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        shares = np.full(len(members), 1 / len(members))
        weights[1:, members] = rng.multinomial(len(members), shares, size=resamples)
    return weights


def image_auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the image AUROC [b] under each row of weights [b, n].

    The share of pairs (defective, good) in which the defective image scores higher; ties are half.
    """
    defective, good = scores[labels, None], scores[None, ~labels]
    higher = (defective > good) + 0.5 * (defective == good)  # [defective, good]
    of_defective, of_good = weights[:, labels], weights[:, ~labels]
    pairs = of_defective.sum(axis=1) * of_good.sum(axis=1)
    wins = np.sum((of_defective @ higher) * of_good, axis=1)
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def histogram_metrics(counts: np.ndarray) -> tuple[dict[str, float], dict[str, float]] | None:
    """Returns the pixel metrics of one histogram [3, 256] (see `histograms`), and their bounds.

    A bound limits how far rounding to 8 bits can have moved the metric, because it makes ties.
    Returns None without defect pixels or without defect-free pixels.
    """
    normal, defect = np.flatnonzero(counts[0]), np.flatnonzero(counts[1])
    if not len(normal) or not len(defect):
        return None
    group = pixel_tables.TypeTables(
        at_threshold={},
        normal=pixel_tables.ScoreTable(_KEYS[normal], counts[:1, normal]),
        defect=pixel_tables.ScoreTable(_KEYS[defect], counts[1:, defect]),
    )
    return pixel_tables.pixel_metrics(pixel_tables.count_at_thresholds([group]), shift=0)


def resample(images: Images, weights: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Returns each metric [b] under each row of weights, nan where there is none, and the bounds.

    The bounds (see `histogram_metrics`) are those of the first row.
    """
    values = {name: np.full(len(weights), np.nan) for name in metrics.PIXEL_METRICS}
    values["image_auroc"] = image_auroc(images.scores, images.labels, weights)
    bounds: dict[str, float] = {"image_auroc": 0.0}
    sums = np.tensordot(weights, images.histograms, 1)  # [b, 3, 256]
    for index, counts in enumerate(sums):
        pixel_metrics = histogram_metrics(counts)
        if pixel_metrics is None:
            continue
        for name, value in pixel_metrics[0].items():
            values[name][index] = value
        if index == 0:
            bounds |= pixel_metrics[1]
    return values, bounds


@dataclass(frozen=True)
class Draws:
    """A run's resampled metrics in one category, or the reason why there are none."""

    images: Images | None = None
    values: tuple[dict[str, np.ndarray], ...] = ()  # one per seed, see `resample`
    bounds: tuple[dict[str, float], ...] = ()
    reason: str | None = None


def draw(run: Run, category: str, resamples: int, seed: int) -> Draws:
    """Resamples a run's test images: the same ones in every seed and in every paired run."""
    try:
        images_by_seed = [read_images(folder / category) for folder in run.folders]
    except CompareError as error:
        return Draws(reason=str(error))
    for name, images in zip(run.seeds, images_by_seed, strict=True):
        reason = not_paired(images_by_seed[0], images)
        if reason is not None:
            return Draws(reason=f"seeds {run.seeds[0]} and {name}: {reason}")
    # The same images get the same weights in every run. Categories differ.
    rng = np.random.default_rng([seed, zlib.crc32(category.encode())])
    weights = resample_weights(
        2 * images_by_seed[0].labels + images_by_seed[0].has_mask, resamples, rng
    )
    values, bounds = zip(*(resample(images, weights) for images in images_by_seed), strict=True)
    return Draws(images_by_seed[0], values, bounds)


def interval_of(draws: np.ndarray, *, low: float = -1.0, high: float = 1.0) -> list[float]:
    """Returns the percentile interval of resampled values, clipped to [low, high]."""
    tail = (1 - CONFIDENCE) / 2
    return np.clip(np.quantile(draws, [tail, 1 - tail]), low, high).tolist()
