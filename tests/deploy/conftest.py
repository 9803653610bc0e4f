"""One tiny trained model, and photographs of it, for all tests of this folder."""

import numpy as np
import pytest
import tiny_config
from part_images import draw_part
from PIL import Image

from anoseg_jax.method import train


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A run of one category, "bolt", trained for a few steps."""
    root = tmp_path_factory.mktemp("run")
    config = tiny_config.get_config()
    config.num_steps = 4
    train.fit(config, np.stack([draw_part(seed) for seed in range(10)]), root / "bolt")
    return root


@pytest.fixture
def photographs(tmp_path):
    """A folder of five photographs of several formats and sizes, in two folders."""
    root = tmp_path / "photographs"
    for name, size, defect in (
        ("monday/a.png", (40, 60), True),
        ("monday/b.jpg", (33, 31), False),
        ("tuesday/a.png", (64, 64), True),
        ("tuesday/c.bmp", (32, 32), False),
        ("tuesday/d e ü.tif", (50, 20), False),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_part(len(name), size, defect=defect)).save(path)
    return root
