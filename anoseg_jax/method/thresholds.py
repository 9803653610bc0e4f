"""Thresholds of anomaly maps and image-level scores from good images alone."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict


def first_allowed(counts: np.ndarray, false_positive_rate: float) -> int:
    """Returns the first index from which on at most this share of `counts` lies, or len(counts)."""
    share = np.cumsum(counts[::-1])[::-1] / counts.sum()
    return int(np.count_nonzero(share > false_positive_rate))


def check_rate(false_positive_rate: float) -> None:
    """Raises ValueError unless the rate is in [0, 1]."""
    if not 0 <= false_positive_rate <= 1:
        raise ValueError(f"false_positive_rate must be in [0, 1], got {false_positive_rate}")


def threshold_from_good(scores: np.ndarray, false_positive_rate: float) -> float | None:
    """Returns the lowest score that at most a given share of the scores reaches.

    Args:
      scores: array of any shape, float or integer: scores of good images, or of their pixels.
      false_positive_rate: the share in [0, 1] of `scores` that may be at or above the threshold. If
        it allows no score (ties at the highest score, or a rate of 0): the next float above it.

    Returns:
      The threshold, for `score >= threshold`; None without scores or when one is not finite.

    Raises ValueError if false_positive_rate is not in [0, 1].
    """
    check_rate(false_positive_rate)
    scores = np.asarray(scores)
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    if not scores.size or not np.isfinite(scores).all():
        return None
    values, counts = np.unique(scores, return_counts=True)
    values = np.append(values, np.nextafter(values[-1], np.array(np.inf, values.dtype)))
    return float(values[first_allowed(counts, false_positive_rate)])


def highest_rate(reached: int, count: int, confidence: float = 0.95) -> float:
    """Returns the upper confidence bound of a rate that was `reached` of `count` times.

    Clopper and Pearson's exact bound, one-sided.
    """
    from scipy.stats import beta  # slow to import, and prediction does without

    return float(beta.ppf(confidence, reached + 1, count - reached)) if reached < count else 1.0


def thresholds_from_good(
    maps: np.ndarray, scores: np.ndarray, *, pixel_rate: float, image_rate: float, what: str
) -> dict[str, dict[str, Any]]:
    """Returns thresholds from good images; no defect is needed.

    Args:
      maps: anomaly maps of good images, float [n, h, w]; n may be 0.
      scores: their image-level scores, float [n].
      pixel_rate: share of good pixels that may be at or above the pixel threshold.
      image_rate: share of good images that may be at or above the image threshold.
      what: which images they are, in words.

    Returns:
      For "pixel" and "image": `threshold` (`score >= threshold` is defective; None without images),
      `rate` (the share that was asked for), `images` and, in words, `how`.
    """
    thresholds = {}
    for name, values, rate in (("pixel", maps, pixel_rate), ("image", scores, image_rate)):
        count = len(values)
        share = f"{100 * rate:.4g}%"
        of_these = f"{count} {what}"
        how = f"at most {share} of {'the pixels of ' if name == 'pixel' else ''}{of_these}"
        if not count:
            how = "none: too few good images"
        threshold = threshold_from_good(values, rate)
        if name == "image" and threshold is not None:
            if count * rate < 1:
                how = f"above all {of_these}, too few to allow {share}"
            reached = int(np.count_nonzero(np.asarray(values) >= threshold))
            how += f"; of other good images up to {highest_rate(reached, count):.0%} may reach it"
        thresholds[name] = {
            "threshold": threshold,
            "rate": rate,
            "images": count,
            "how": how,
        }
    return thresholds


def good_images(
    config: ConfigDict, arrays: Mapping[str, np.ndarray], held_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns the good images that thresholds are made from, their ids, and words for them.

    The held-out images, then as many of those that are trained on, evenly spaced, as make
    `config.evaluate.threshold_images` together. Few images are held out, and by a few alone a
    threshold is luck. By their ids, images that are trained on are compared with the patches of
    other images (leave-one-out); held-out images have -1. Without a memory bank nothing makes up
    for a head that has seen them: only held-out images are taken. Fewer than four images make no
    threshold.

    `arrays` and `held_out` are those of `train.split_images`.
    """
    images, image_ids = arrays["image"], arrays["image_id"]
    count = min(len(images), max(config.evaluate.threshold_images - len(held_out), 0))
    if not config.memory_bank.size or len(images) + len(held_out) < 4:
        count = 0
    rows = np.linspace(0, len(images) - 1, count).round().astype(int)
    what = "good images that were held out"
    if count:
        what = f"good images (held out: {len(held_out)}; trained on, by leave-one-out: {count})"
    none = np.full(len(held_out), -1, np.int32)
    images = np.concatenate([held_out, images[rows]])
    return images, np.concatenate([none, image_ids[rows]]), what


def calibrate(
    predict: Callable[..., tuple[np.ndarray, np.ndarray]],
    *arrays: np.ndarray,
    config: Mapping[str, Any],
    what: str = "good images",
) -> dict[str, dict[str, Any]]:
    """Returns the thresholds of a model, see `thresholds_from_good`.

    `predict` maps batches of `arrays`, the first of them uint8 images [b, h, w, 3], to anomaly maps
    and scores. `config` has `image_size` and `evaluate`.
    """
    maps, scores = [np.zeros((0, *config["image_size"]))], [np.zeros(0)]
    options = config["evaluate"]
    for start in range(0, len(arrays[0]), options["batch_size"]):
        batch = (array[start : start + options["batch_size"]] for array in arrays)
        batch_maps, batch_scores = predict(*batch)
        maps.append(batch_maps)
        scores.append(batch_scores)
    return thresholds_from_good(
        np.concatenate(maps),
        np.concatenate(scores),
        pixel_rate=options["pixel_false_positive_rate"],
        image_rate=options["image_false_positive_rate"],
        what=what,
    )
