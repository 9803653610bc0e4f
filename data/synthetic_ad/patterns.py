"""Regular patterns whose defects break the pattern alone: a perforated sheet, a blister pack.

The colours, edges and shapes of these defects are those of good parts, in the wrong place. Position
and light vary from part to part. So the mean image, the deviation of single pixels and the
principal components of patches see little of them; what has learned the pattern sees them.

As in drawing.py, a part is `rng -> (image, geometry)` and a defect `(rng, image, geometry) ->
image`. The geometry of a pattern has a function that draws it again with other pieces.
"""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from data.synthetic_ad.pieces import SIZE, X, Y, blend, edge, lighting, smooth_noise

PITCH = 26.0  # of the sheet's holes in a row
MARGIN = 20  # defects of the sheet lie so far within the image
HOLE_RADIUS, CAPSULE_RADIUS = 7.2, 6.5
IVORY, RED = (0.93, 0.91, 0.84), (0.86, 0.36, 0.26)


def _turn(x, y, angle: float):
    """Returns coordinates turned by an angle in radians."""
    return x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)


def sheet(rng: np.random.Generator):
    """Draws brushed steel with staggered rows of round holes; the rows begin anywhere."""
    steps = np.arange(-3, 9) * PITCH
    x, y = np.meshgrid(steps, 0.9 * steps)
    x = x + np.where(np.arange(len(steps)) % 2, PITCH / 2, 0)[:, None]
    x, y = _turn(x, y, rng.uniform(-0.06, 0.06))
    start = rng.uniform(0, PITCH, 2)
    holes = np.stack([y.ravel(), x.ravel()], axis=1) + start
    holes = holes + 0.25 * rng.standard_normal(holes.shape)
    holes = holes[((holes > -10) & (holes < SIZE + 10)).all(axis=1)]

    brushed = 1 + 0.05 * smooth_noise(rng, (0.6, 12)) + 0.05 * smooth_noise(rng, 18)
    steel = np.array((0.62, 0.65, 0.68)) * brushed[..., None]
    behind = np.array((0.14, 0.15, 0.18)) * (1 + 0.25 * smooth_noise(rng, 5))[..., None]
    light = lighting(rng, 0.12)

    def punch(holes: np.ndarray) -> np.ndarray:
        image = steel
        for y, x in holes:
            distance = np.hypot(Y - y, X - x) - HOLE_RADIUS
            lit = edge(np.abs(distance - 1) - 0.5, 1.5) * (Y - y + X - x > 0)
            image = blend(image, 1.22 * steel, 0.8 * lit)
            image = blend(image, np.clip(behind, 0, 1), edge(distance, 1.5))
        return ndimage.gaussian_filter(image, (0.5, 0.5, 0)) * light

    return punch(holes), {"holes": holes, "punch": punch}


def _choose_hole(rng, holes: np.ndarray) -> int:
    return rng.choice(np.flatnonzero(((holes > MARGIN) & (holes < SIZE - MARGIN)).all(axis=1)))


def missing_hole(rng, image, geometry):
    """Leaves out one hole."""
    holes = geometry["holes"]
    return geometry["punch"](np.delete(holes, _choose_hole(rng, holes), axis=0))


def moved_hole(rng, image, geometry):
    """Punches one hole a third of the pitch away from where it belongs."""
    holes, angle = geometry["holes"].copy(), rng.uniform(0, 2 * np.pi)
    offset = np.array([np.sin(angle), np.cos(angle)])
    holes[_choose_hole(rng, holes)] += rng.uniform(8, 10) * offset
    return geometry["punch"](holes)


def extra_hole(rng, image, geometry):
    """Punches one hole more, halfway between two neighbours."""
    holes = geometry["holes"]
    hole = holes[_choose_hole(rng, holes)]
    neighbours = np.argsort(np.hypot(*(holes - hole).T))[1:7]
    return geometry["punch"](np.vstack([holes, (hole + holes[rng.choice(neighbours)]) / 2]))


def blister(rng: np.random.Generator):
    """Draws a blister pack on a table: twelve capsules, their red ends all on the same side."""
    angle, centre = rng.uniform(-0.08, 0.08), SIZE / 2 + rng.uniform(-10, 10, 2)
    x, y = _turn(X - centre[1], Y - centre[0], -angle)  # the pack's own axes
    outside = np.hypot(np.maximum(np.abs(x) - 42, 0), np.maximum(np.abs(y) - 40, 0)) - 9
    table = np.array((0.25, 0.31, 0.36)) * (1 + 0.03 * smooth_noise(rng, 10))[..., None]
    table = blend(table, (0.10, 0.12, 0.14), 0.6 * edge(np.roll(outside, (3, 2), (0, 1)), 6))
    wrinkles = 1 + 0.04 * smooth_noise(rng, (0.7, 3)) + 0.05 * smooth_noise(rng, 14)
    foil = blend(table, np.array((0.70, 0.72, 0.74)) * wrinkles[..., None], edge(outside))
    light = lighting(rng, 0.12)
    middles = np.stack(np.meshgrid((-32, 0, 32), (-34.5, -11.5, 11.5, 34.5)), axis=-1)
    middles = middles.reshape(-1, 2) + 0.5 * rng.standard_normal((12, 2))
    places = [(x - middle_x, y - middle_y) for middle_x, middle_y in middles]
    distances = [np.hypot(np.maximum(np.abs(x) - 6, 0), y) for x, y in places]  # to the axes

    def fill(sides: np.ndarray, capsules: list[np.ndarray]) -> np.ndarray:
        """Draws the pack; `sides` [12] is 1, or -1 for red ends on the wrong side."""
        image = foil
        for (x, y), distance, side, capsule in zip(places, distances, sides, capsules, strict=True):
            rim = edge(np.abs(distance - CAPSULE_RADIUS - 2.3) - 0.6, 1.6)
            image = blend(image, 0.72 * image, rim * np.clip(0.55 + 0.06 * (y + x), 0, 1))
            image = blend(image, 0.86 * image, edge(distance - CAPSULE_RADIUS - 2, 2))
            image = blend(image, 0.5 * image, 0.6 * np.roll(capsule, (1, 1), (0, 1)))  # shadow
            colour = blend(np.full((SIZE, SIZE, 3), IVORY), RED, edge(side * x, 1.5))
            shade = 1.05 - 0.3 * np.clip(distance / CAPSULE_RADIUS, 0, 1) ** 3 - 0.015 * y
            image = blend(image, np.clip(colour * shade[..., None], 0, 1), capsule)
            shine = edge(np.hypot(np.maximum(np.abs(x) - 5, 0), y + 3) - 0.8, 2)
            image = blend(image, (1.0, 1.0, 1.0), 0.4 * shine)
        return ndimage.gaussian_filter(image, (0.5, 0.5, 0)) * light

    capsules = [edge(distance - CAPSULE_RADIUS, 1.3) for distance in distances]
    sides = np.ones(len(capsules))
    geometry = {"places": places, "sides": sides, "capsules": capsules, "fill": fill}
    return fill(sides, capsules), geometry


def turned_capsule(rng, image, geometry):
    """Fills one capsule in the wrong way round."""
    sides = geometry["sides"].copy()
    sides[rng.integers(len(sides))] = -1
    return geometry["fill"](sides, geometry["capsules"])


def missing_capsule(rng, image, geometry):
    """Leaves one pocket empty."""
    capsules = list(geometry["capsules"])
    capsules[rng.integers(len(capsules))] = np.zeros((SIZE, SIZE))
    return geometry["fill"](geometry["sides"], capsules)


def broken_capsule(rng, image, geometry):
    """Breaks about half of one capsule off."""
    capsules = list(geometry["capsules"])
    index, side = rng.integers(len(capsules)), rng.choice((-1, 1))
    x, y = geometry["places"][index]
    across = side * x + rng.uniform(-0.5, 0.5) * y - rng.uniform(-2, 2)
    capsules[index] = capsules[index] * edge(across + 0.8 * smooth_noise(rng, 1.5), 1.3)
    return geometry["fill"](geometry["sides"], capsules)


CATEGORIES: dict[str, tuple[Callable, dict[str, Callable]]] = {
    "sheet": (
        sheet,
        {"extra_hole": extra_hole, "missing_hole": missing_hole, "moved_hole": moved_hole},
    ),
    "blister": (
        blister,
        {
            "broken_capsule": broken_capsule,
            "missing_capsule": missing_capsule,
            "turned_capsule": turned_capsule,
        },
    ),
}
