"""Test images of finished runs, their resampled metrics, and intervals (stratified bootstrap).

Images are drawn with replacement, good and defective ones apart. Pixel metrics come from the
histograms of their 8-bit maps. All metrics are better when higher.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from etils.epath import Path

from anoseg_jax.evaluation import metrics, pixel_tables
from anoseg_jax.evaluation.results import ResultsError, read_images, seed_folder

CONFIDENCE = 0.95
SEED = 0  # of the resampling
LEVELS = 256  # values of 8-bit maps
_KEYS = pixel_tables.keys_from_scores(np.arange(LEVELS, dtype=np.float32) / 255)


@dataclass(frozen=True)
class Images:
    """The test images of a category with the scores of one run, sorted by name.

    Images without a mask count in image metrics only. For `mask_crc32` [n], `size` and
    `histograms` [n, 3, 256] see results.write_evaluation.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    has_mask: np.ndarray
    scores: np.ndarray
    size: tuple[int, int]
    mask_crc32: np.ndarray
    histograms: np.ndarray

    @property
    def counts(self) -> dict[str, int]:
        """The number of good and of defective images."""
        defective = int(self.labels.sum())
        return {"good": len(self.labels) - defective, "defective": defective}


def load_images(folder: Path) -> Images:
    """Reads the test images of `W/<category>`; ResultsError if a file is missing or damaged."""
    rows, arrays, problem = read_images(folder, "histograms.npz")
    if problem:
        raise ResultsError(f"{folder}: {problem}")
    order = sorted(range(len(rows)), key=lambda index: rows[index]["name"])
    rows = [rows[index] for index in order]
    return Images(
        names=tuple(row["name"] for row in rows),
        labels=np.array([row["label"] != 0 for row in rows], bool),
        has_mask=np.array([row["has_mask"] for row in rows], bool),
        scores=np.array([row["score"] for row in rows], np.float64),
        size=tuple(arrays["size"]),
        mask_crc32=arrays["mask_crc32"][order],
        histograms=arrays["histograms"][order],
    )


def not_paired(a: Images | None, b: Images | None) -> str | None:
    """Returns why two runs cannot be paired (other images or other masks), or None.

    Also None where the images of one are not known.
    """
    if a is None or b is None:
        return None
    only_a, only_b = len(set(a.names) - set(b.names)), len(set(b.names) - set(a.names))
    if only_a or only_b:
        return f"not the same images: {only_a} only in the one, {only_b} only in the other"
    if a.names != b.names:
        return "not the same images: some names occur more than once"
    differ = np.count_nonzero((a.labels != b.labels) | (a.has_mask != b.has_mask))
    if differ:
        return f"not the same truth: {differ} images have another label, or a mask in one run only"
    if a.size == b.size and (a.mask_crc32 != b.mask_crc32).any():
        return "not the same truth: the masks differ"
    return None


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
    """Returns the pixel metrics of a histogram [3, 256] of the maps, and their bounds.

    A bound limits how far rounding to 8 bits can have moved the metric, because it makes ties.
    Returns None without defect pixels or without defect-free pixels.
    """
    normal, defect = np.flatnonzero(counts[0]), np.flatnonzero(counts[1])
    if not len(normal) or not len(defect):
        return None
    group = pixel_tables.TypeTables(
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


def draw(workdir: Path, seeds: Iterable[str], category: str, resamples: int) -> Draws:
    """Resamples a run's test images: the same ones in every seed and in every paired run."""
    try:
        by_seed = {seed: load_images(seed_folder(workdir, seed) / category) for seed in seeds}
    except ResultsError as error:
        return Draws(reason=str(error))
    (first_seed, images), *others = by_seed.items()
    for name, of_seed in others:
        reason = not_paired(images, of_seed)
        if reason is not None:
            return Draws(reason=f"seeds {first_seed} and {name}: {reason}")
    # The same images get the same weights in every run. Categories differ.
    rng = np.random.default_rng([SEED, zlib.crc32(category.encode())])
    weights = resample_weights(2 * images.labels + images.has_mask, resamples, rng)
    values, bounds = zip(*(resample(of_seed, weights) for of_seed in by_seed.values()), strict=True)
    return Draws(images, values, bounds)


def interval_of(draws: np.ndarray, *, low: float = -1.0) -> list[float]:
    """Returns the percentile interval of resampled values, clipped to [low, 1]."""
    tail = (1 - CONFIDENCE) / 2
    return np.clip(np.quantile(draws, [tail, 1 - tail]), low, 1.0).tolist()
