"""Measures time and memory of the pixel metrics; prints markdown tables.

    python benchmarks/metrics.py [--runs 5]

Time: 110 maps of 256x256 (7.2 million pixels), all of `segmentation_metrics` against scikit-learn's
AUROC and AP and an exact AU-PRO that is written plainly, and with adeval's AU-PRO where it is
installed; the contestants take turns in one process. Memory: the peak of a process of its own that
adds maps of 512x512 to an accumulator, less its peak before.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from anoseg_jax.evaluation import metrics

BOUNDED = ("pixel_auroc", "pixel_ap", "au_pro", "iou")


def make_maps(number: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns sigmoid maps float32 and masks bool [n, h, w]: two thirds have two defects each."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((number, side, side), dtype=bool)
    for mask in masks[number // 3 :]:
        for y, x in rng.integers(0, side - 40, (2, 2)):
            mask[y : y + rng.integers(5, 40), x : x + rng.integers(5, 40)] = True
    noise = ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, 2, 2)) * 10
    return (1 / (1 + np.exp(4 - noise - 4 * masks))).astype(np.float32), masks


def exact_au_pro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """Sorts all pixels once and sums what each adds to the false positives and to the overlap."""
    overlap, regions = np.zeros(maps.shape), 0
    for share, mask in zip(overlap, masks, strict=True):
        labels, number = ndimage.label(mask, np.ones((3, 3)))
        share[mask] = (1 / np.maximum(np.bincount(labels.ravel()), 1))[labels[mask]]
        regions += number
    order = np.argsort(-maps, axis=None)
    scores = maps.ravel()[order]
    last = np.append(scores[1:] != scores[:-1], True)  # of the pixels that share a score
    fpr = np.cumsum(~masks.ravel()[order], dtype=np.float64)[last] / np.count_nonzero(~masks)
    pro = np.cumsum(overlap.ravel()[order])[last] / regions
    fpr, pro = np.append(0, fpr), np.append(0, pro)
    end = np.searchsorted(fpr, limit, side="right")
    x = np.append(fpr[:end], limit)
    y = np.append(pro[:end], np.interp(limit, fpr[end - 1 : end + 1], pro[end - 1 : end + 1]))
    return float(np.trapezoid(y, x) / limit)


def accumulate(maps: np.ndarray, masks: np.ndarray) -> dict:
    """Adds the maps in batches of 8."""
    accumulator = metrics.SegmentationAccumulator()
    for i in range(0, len(maps), 8):
        accumulator.add(maps[i : i + 8], masks[i : i + 8])
    return accumulator.result()


def scikit_learn(maps: np.ndarray, masks: np.ndarray) -> tuple[float, float]:
    """Returns AUROC and AP of all pixels."""
    truth, scores = masks.ravel(), maps.ravel()
    return float(roc_auc_score(truth, scores)), float(average_precision_score(truth, scores))


def contestants() -> dict[str, Callable[[np.ndarray, np.ndarray], object]]:
    """Returns what is timed; adeval only where it can be imported."""
    found: dict[str, Callable[[np.ndarray, np.ndarray], object]] = {
        "segmentation_metrics": metrics.segmentation_metrics,
        "accumulator, batches of 8": accumulate,
        "scikit-learn AUROC + AP": scikit_learn,
        "plain exact AU-PRO": exact_au_pro,
    }
    try:
        import adeval
        import cv2  # noqa: F401  adeval needs it and imports it late
    except ImportError:
        return found
    if not hasattr(np, "trapz"):  # adeval 1.1.0 calls it; gone from numpy 2.4
        np.trapz = np.trapezoid
    found["adeval AUROC + AP + AU-PRO (1,000 bins)"] = lambda maps, masks: adeval.auroc_aupr_aupro(
        maps, masks.astype(np.uint8)
    )
    return found


def time_table(runs: int) -> None:
    """Prints the median time of each contestant."""
    maps, masks = make_maps(110, 256, seed=0)
    entries = contestants()
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    answers = {}
    for _ in range(runs):
        for name, function in entries.items():
            start = time.perf_counter()
            answers[name] = function(maps, masks)
            seconds[name].append(time.perf_counter() - start)
    ours = answers["segmentation_metrics"]
    auroc, ap = answers["scikit-learn AUROC + AP"]
    for a, b in ((ours["pixel_auroc"], auroc), (ours["pixel_ap"], ap)):
        assert abs(a - b) < 1e-9, (a, b)
    assert abs(ours["au_pro"] - answers["plain exact AU-PRO"]) < 1e-9
    assert answers["accumulator, batches of 8"]["exact"]

    median = {name: statistics.median(values) for name, values in seconds.items()}
    plain = median["scikit-learn AUROC + AP"] + median["plain exact AU-PRO"]
    print(f"{len(maps)} maps of 256x256, {len(np.unique(maps)):,} distinct scores, {runs} runs\n")
    print("| | median, s | lowest to highest, s |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {median[name]:.2f} | {min(values):.2f} to {max(values):.2f} |")
    print("\n| scikit-learn + plain exact AU-PRO, over | times faster |\n|---|---|")
    for name in ("segmentation_metrics", "accumulator, batches of 8"):
        print(f"| {name} | {plain / median[name]:.1f} |")


def peak_megabytes() -> float:
    """Returns the peak resident memory of this process."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure_memory(number: int) -> None:
    """Adds `number` maps of 512x512 with new noise each and prints the megabytes this took."""
    rng = np.random.default_rng(0)
    _, masks = make_maps(10, 512, seed=0)

    def batch() -> np.ndarray:
        noise = rng.standard_normal(masks.shape, dtype=np.float32) * 2
        return 1 / (1 + np.exp(4 - noise - 4 * masks))

    batch()
    before = peak_megabytes()
    accumulator = metrics.SegmentationAccumulator()
    seconds = 0.0
    for _ in range(number // len(masks)):
        maps = batch()
        start = time.perf_counter()
        accumulator.add(maps, masks)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    result = accumulator.result()
    seconds += time.perf_counter() - start
    cells = [f"{number}", f"{peak_megabytes() - before:.0f}", f"{seconds:.1f}"]
    cells.append(f"{result['score_bits_dropped']}")
    cells += [f"{result['error_bounds'][name]:.0e}" for name in BOUNDED]
    print("|", " | ".join(cells), "|")


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory", type=int, help="only measure the memory for as many maps")
    flags = parser.parse_args()
    if flags.memory is not None:
        measure_memory(flags.memory)
        return
    # Memory first: on Linux a process starts with the peak of the one that started it.
    print("Accumulator, maps of 512x512 with random scores\n")
    print("| maps | peak, MB more | s | bits dropped | AUROC within | AP | AU-PRO | IoU |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for number in (100, 1000):
        subprocess.run([sys.executable, __file__, "--memory", str(number)], check=True)
    print()
    time_table(flags.runs)


if __name__ == "__main__":
    main()
