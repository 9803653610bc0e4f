"""What check says about the size that images are resized to."""

import numpy as np
import pytest
from drawings import photo, save, save_mask

from anoseg_jax.images import layout


def draw(root, size, defects):
    """A category of images of a size, with defects (top, left, height, width) in one mask."""
    mask = np.zeros(size, bool)
    for top, left, height, width in defects:
        mask[top : top + height, left : left + width] = True
    for name in ("train/good/0.png", "test/good/0.png", "test/dot/0.png"):
        save(photo(0, size), root / name)
    save_mask(mask, root / "ground_truth/dot/0_mask.png")
    return layout.scan(root)


def test_squeezed_images_are_told_with_the_size_to_set(tmp_path):
    category = draw(tmp_path / "web", (64, 4096), [(8, 100, 40, 400)])
    (warning,) = layout.size_warnings(category, (128, 128))
    assert "128x128 (width x height) squeezes 3 images, such as 4096x64" in warning
    assert "32:1 in width and 0.5:1 in height" in warning
    assert '--config.image_size="(32, 2048)"' in warning
    assert warning in layout.report(category, (128, 128))
    assert layout.size_warnings(category, (32, 2048)) == []


def test_the_size_that_is_set_has_the_shape_of_the_images(tmp_path):
    category = draw(tmp_path / "web", (900, 300), [(8, 100, 400, 100)])
    (warning,) = layout.size_warnings(category, (256, 256))
    assert '--config.image_size="(480, 160)"' in warning


@pytest.mark.parametrize("size", [(256, 256), (192, 256)])
def test_images_of_about_the_right_shape_are_no_warning(folder, size):
    assert layout.size_warnings(layout.scan(folder), size) == []


def test_defects_that_become_too_small_are_told_with_the_size_to_set(tmp_path):
    # 16x16 and 8x8 pixels of 512x512: at 64x64, 4 pixels and 1.
    category = draw(tmp_path / "part", (512, 512), [(100, 100, 16, 16), (300, 300, 8, 8)])
    assert layout.size_warnings(category, (128, 128)) == []
    (warning,) = layout.size_warnings(category, (64, 64))
    assert "the smallest defect of 1 of 1 masks fewer than 4 pixels" in warning
    assert "has 1 (64 in its file)" in warning
    assert '--config.image_size="(128, 128)"' in warning


def test_a_defect_that_its_file_has_no_more_pixels_of_is_told_so(tmp_path):
    category = draw(tmp_path / "part", (512, 512), [(100, 100, 1, 2)])
    (warning,) = layout.size_warnings(category, (512, 512))
    assert "has 2 (2 in its file): its file has no more" in warning


def test_regions_that_touch_are_one_defect(tmp_path):
    steps = [(100 + i, 100 + i, 1, 1) for i in range(30)]
    category = draw(tmp_path / "part", (256, 256), steps)
    assert layout.size_warnings(category, (128, 128)) == []


def test_without_a_size_the_report_says_nothing_of_it(tmp_path):
    category = draw(tmp_path / "web", (16, 512), [(2, 2, 1, 1)])
    assert category.warnings == () and "image_size" not in layout.report(category)
