"""Small pictures and folders that tests of reading draw."""

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 12, 16


def photo(seed, size=(HEIGHT, WIDTH)):
    """A grey uint8 picture that uses the whole range."""
    picture = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    picture[0, :2] = 0, 255
    return picture


def disc(seed):
    """A bool mask, not symmetric, away from the border."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (y - 4) ** 2 + (x - 6 - seed) ** 2 < 8


def save(picture, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(path, **options)


def save_mask(mask, path):
    save(np.uint8(255) * mask, path)


def draw_category(root):
    """Draws a flawless category: 3 good to train on, 2 good and 2 scratched to test on."""
    for i in range(3):
        save(photo(i), root / f"train/good/{i:03}.png")
    for i in range(2):
        save(photo(10 + i), root / f"test/good/{i:03}.png")
        save(photo(20 + i), root / f"test/scratch/{i:03}.png")
        save_mask(disc(i), root / f"ground_truth/scratch/{i:03}_mask.png")
    return root


def draw_squares(rng, masks, side):
    """Draws two rectangles with sides below `side` into each of the masks, bool [n, h, w]."""
    _, height, width = masks.shape
    for mask in masks:
        for _ in range(2):
            y, x = rng.integers(0, height - side), rng.integers(0, width - side)
            mask[y : y + rng.integers(1, side), x : x + rng.integers(1, side)] = True
