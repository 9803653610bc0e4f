"""What parts and defects are drawn with: edges, colours, noise, shapes, light.

Images are float `[h, w, 3]` RGB in [0, 1], and so are colours.
"""

import numpy as np
from scipy import ndimage

SIZE = 128  # height and width of every drawing
Y, X = np.mgrid[:SIZE, :SIZE].astype(np.float64)


def edge(distance: np.ndarray, width: float = 1.0) -> np.ndarray:
    """Returns 1 inside (distance < 0), 0 outside, with a soft edge of `width` pixels."""
    return np.clip(0.5 - distance / width, 0.0, 1.0)


def blend(image: np.ndarray, colour, amount: np.ndarray) -> np.ndarray:
    """Lays `colour`, one or `[h, w, 3]`, over the image; `amount` `[h, w]` is its opacity."""
    return image + (np.asarray(colour) - image) * amount[..., None]


def smooth_noise(rng: np.random.Generator, sigma) -> np.ndarray:
    """Returns `[h, w]` noise of unit deviation, smoothed by `sigma` pixels (one, or (y, x))."""
    noise = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), sigma, mode="wrap")
    return noise / noise.std()


def blotch(rng: np.random.Generator, centre, radius: float, softness: float) -> np.ndarray:
    """Returns the opacity `[h, w]` of an irregular round shape at `centre` (y, x)."""
    y, x = Y - centre[0], X - centre[1]
    angle = np.arctan2(y, x)
    reach = np.ones_like(angle)
    for k in (2, 3, 5):
        reach += rng.uniform(0.05, 0.4 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    return edge(np.hypot(y, x) - radius * reach, softness)


def curve(rng: np.random.Generator, centre, length: float, angle: float, bend: float, jag=0.0):
    """Returns for each pixel the distance to a line, and the position along it in [-1, 1].

    The line is a wave with an amplitude of `bend` pixels about a straight line. Its 12 corners are
    shifted at random, with a standard deviation of `jag` pixels.
    """
    y, x = Y - centre[0], X - centre[1]
    along = (x * np.cos(angle) + y * np.sin(angle)) / (length / 2)
    across = -x * np.sin(angle) + y * np.cos(angle)
    phase = rng.uniform(0, 2 * np.pi)
    wave = bend * (np.sin(2.2 * along + phase) - np.sin(phase))
    corners = jag * rng.standard_normal(12)
    distance = np.abs(across - wave - np.interp(along, np.linspace(-1, 1, 12), corners))
    # Beyond the ends the distance grows with the way past them.
    return np.hypot(distance, np.maximum(np.abs(along) - 1, 0) * length / 2), np.clip(along, -1, 1)


def pick(rng: np.random.Generator, where: np.ndarray) -> np.ndarray:
    """Returns (y, x) of a random pixel of the bool mask `where`."""
    places = np.argwhere(where)
    return places[rng.integers(len(places))].astype(np.float64)


def lighting(rng: np.random.Generator, strength: float = 0.08) -> np.ndarray:
    """Returns `[h, w, 1]` factors about 1: overall brightness and a slope across the image."""
    slope_y, slope_x = rng.uniform(-strength, strength, 2)
    plane = slope_y * (Y / SIZE - 0.5) + slope_x * (X / SIZE - 0.5)
    return (rng.uniform(1 - strength, 1 + strength) + 2 * plane)[..., None]
