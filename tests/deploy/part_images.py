"""Images of a part, good and defective, for the tests of this folder."""

import numpy as np


def draw_part(seed, size=(32, 32), *, defect=False):
    """Returns stripes with noise, uint8 [h, w, 3]; with a white square if defective."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 160, (*size, 3), np.uint8)
    image[:, ::4] //= 2
    if defect:
        image[size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = 255
    return image
