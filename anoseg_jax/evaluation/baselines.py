"""Trivial baselines for anomaly maps: distance to the mean image, z-score and PCA of patches.

A trained model should be better than these. Each function takes good images, uint8 [n, h, w, 3],
and test images of the same size, uint8 [m, h, w, 3]. It returns smoothed anomaly maps, float32
[m, h, w], higher = more anomalous. n is at least 1; m may be 0. The images are processed one by
one, in at most a few hundred MB of memory in addition to the maps.
"""

import numpy as np
from scipy import ndimage

# Standard deviation, in pixels, of the Gaussian that smooths the maps at 128x128. Scales with the
# image size.
SIGMA_AT_128 = 2.0
# Lower limit of a pixel's standard deviation, for values from 0 to 1. Without it, camera noise
# would be an anomaly where the few good images agree by chance.
STD_FLOOR = 0.02
PATCH = 8  # side of a patch, in pixels
# Strides between the patches of training and test images. Halving one adds little accuracy and
# takes 4 times as long.
FIT_STRIDE, STRIDE = 4, 2
# Share of the patches' variance that the kept components explain.
VARIANCE = 0.995


def smooth(image_map: np.ndarray) -> np.ndarray:
    """Smooths a map [h, w] with a Gaussian, sigma 2 pixels at 128x128, scaled with the size."""
    h, w = image_map.shape
    sigma = SIGMA_AT_128 * np.sqrt(h * w) / 128
    return ndimage.gaussian_filter(image_map.astype(np.float32), sigma)


def distance_to_mean(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Returns the squared distance of each pixel to the mean image, from 0 to 1."""
    mean, _ = _mean_and_std(train)
    maps = np.empty(test.shape[:3], np.float32)
    for index, image in enumerate(test):
        maps[index] = smooth(np.mean((image / 255 - mean) ** 2, axis=-1))
    return maps


def z_score(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Returns each pixel's distance to the mean image in standard deviations of that pixel.

    The distance is averaged over the channels. A standard deviation is at least STD_FLOOR.
    """
    mean, std = _mean_and_std(train)
    std = np.maximum(std, STD_FLOOR)
    maps = np.empty(test.shape[:3], np.float32)
    for index, image in enumerate(test):
        maps[index] = smooth(np.mean(np.abs(image / 255 - mean) / std, axis=-1))
    return maps


def pca_patches(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Returns the squared reconstruction error of patches projected on their principal components.

    The components are computed from the 8x8 patches of all positions and explain the share VARIANCE
    of their variance. A pixel's error is the mean over the patches that contain it.
    """
    mean, components = _fit_components(train)
    maps = np.empty(test.shape[:3], np.float32)
    for index, image in enumerate(test):
        patches, rows, columns = _patches(image, STRIDE)
        patches -= mean
        patches -= (patches @ components) @ components.T
        errors = np.square(patches, out=patches).reshape(len(rows), len(columns), *_sides(image), 3)
        errors = errors.mean(axis=-1)
        total, count = np.zeros(image.shape[:2]), np.zeros(image.shape[:2])
        for y, x in np.ndindex(errors.shape[2:]):
            pixels = np.ix_(rows + y, columns + x)
            total[pixels] += errors[:, :, y, x]
            count[pixels] += 1
        maps[index] = smooth(total / count)
    return maps


# The keys are the names in the result files.
BASELINES = {"distance_to_mean": distance_to_mean, "z_score": z_score, "pca_patches": pca_patches}


def _mean_and_std(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and standard deviation of each pixel and channel, for values from 0 to 1."""
    total = np.zeros(images.shape[1:], np.int64)  # exact: no cancellation in the variance
    squares = np.zeros(images.shape[1:], np.int64)
    for image in images:
        values = image.astype(np.int64)
        total += values
        squares += values**2
    count = len(images)
    variance = (count * squares - total**2) / count**2
    return total / count / 255, np.sqrt(variance) / 255


def _sides(image: np.ndarray) -> tuple[int, int]:
    return min(PATCH, image.shape[0]), min(PATCH, image.shape[1])


def _patches(image: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns an image's patches, float32 [rows * columns, d] in [0, 1], and their positions.

    The last row and column of patches end at the image border, so that patches cover every pixel.
    """
    (h, w), (ph, pw) = image.shape[:2], _sides(image)
    rows = np.unique(np.append(np.arange(0, h - ph + 1, stride), h - ph))
    columns = np.unique(np.append(np.arange(0, w - pw + 1, stride), w - pw))
    windows = np.lib.stride_tricks.sliding_window_view(image, (ph, pw), axis=(0, 1))
    chosen = windows[np.ix_(rows, columns)].transpose(0, 1, 3, 4, 2)  # [rows, columns, ph, pw, 3]
    return chosen.reshape(len(rows) * len(columns), -1) / np.float32(255), rows, columns


def _fit_components(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean [d] and the principal components [d, k] of the patches, float32."""
    sides = _sides(images[0])
    size = sides[0] * sides[1] * 3
    total, products, count = np.zeros(size), np.zeros((size, size)), 0
    for image in images:
        patches, _, _ = _patches(image, FIT_STRIDE)
        total += patches.sum(axis=0, dtype=np.float64)
        products += patches.T @ patches
        count += len(patches)
    mean = total / count
    variances, components = np.linalg.eigh(products / count - np.outer(mean, mean))
    variances, components = np.maximum(variances[::-1], 0), components[:, ::-1]
    explained = np.cumsum(variances)
    total_variance = explained[-1]
    # Identical patches have no components: their variance is only rounding error.
    has_variance = total_variance > 1e-6 * size
    number = int(np.searchsorted(explained, VARIANCE * total_variance)) + 1 if has_variance else 0
    return mean.astype(np.float32), components[:, :number].astype(np.float32)
