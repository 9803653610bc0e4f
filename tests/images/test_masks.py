"""Masks with several values, smoothed and compressed masks, 16 bits, and their warnings."""

import io

import numpy as np
import pytest
from drawings import disc, photo, save, save_mask
from PIL import Image, ImageFilter

from anoseg_jax.images import decode, layout

SIZE = (64, 80)


def blob(top, left, height=14, width=20, size=SIZE):
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def large_disc(size=SIZE):
    y, x = np.mgrid[: size[0], : size[1]]
    return (y - 20) ** 2 + (x - 24) ** 2 < 150


def read(picture, path, **options):
    save(picture, path, **options)
    return decode.decode_mask(path)


TWO_CLASSES = large_disc() | blob(44, 8, 6, 7)


@pytest.mark.parametrize(
    ("first", "second"), [(50, 10), (255, 120), (255, 60), (255, 5), (255, 1), (200, 99), (40, 33)]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_no_class_of_defects_is_lost(tmp_path, first, second, dtype):
    values = dtype(first) * large_disc() + dtype(second) * blob(44, 8, 6, 7)
    mask, how = read(values.astype(dtype), tmp_path / "x.tif")
    np.testing.assert_array_equal(mask, TWO_CLASSES)
    assert how.startswith("several values")


@pytest.mark.parametrize("second", [(44, 8, 6, 7), (30, 30, 2, 9), (12, 60, 1, 15)])
def test_a_second_class_is_kept_whether_far_near_or_touching(tmp_path, second):
    values = np.uint8(255) * blob(10, 30, 20, 20)
    values[blob(*second)] = 120
    mask, _ = read(values, tmp_path / "x.png")
    np.testing.assert_array_equal(mask, blob(10, 30, 20, 20) | blob(*second))


def test_colours_are_classes_too(tmp_path):
    colours = np.zeros((*SIZE, 3), np.uint8)
    colours[large_disc()] = 255, 0, 0
    colours[blob(44, 8, 6, 7)] = 0, 90, 20
    mask, _ = read(colours, tmp_path / "x.png")
    np.testing.assert_array_equal(mask, TWO_CLASSES)


def test_16_bit_class_numbers_are_not_rounded_away(tmp_path):
    values = np.uint16(1) * large_disc() + np.uint16(3) * blob(44, 8, 6, 7)
    np.testing.assert_array_equal(read(values, tmp_path / "x.png")[0], TWO_CLASSES)


def jpeg(quality, mode="L"):
    def draw(mask):
        data = io.BytesIO()
        Image.fromarray(np.uint8(255) * mask).convert(mode).save(data, "JPEG", quality=quality)
        return Image.open(data)

    return draw


def antialiased(mask):
    large = Image.fromarray(np.uint8(255) * np.kron(mask, np.ones((4, 4), bool)))
    moved = large.transform(large.size, Image.Transform.AFFINE, (1, 0, 2, 0, 1, 1))
    return moved.resize(mask.shape[::-1], Image.Resampling.BOX)


@pytest.mark.parametrize(
    ("draw", "wrong"),
    [
        (jpeg(50), 2),
        (jpeg(75), 0),
        (jpeg(95), 0),
        (jpeg(75, "RGB"), 0),
        (lambda mask: Image.fromarray(np.uint8(255) * mask).filter(ImageFilter.BoxBlur(1)), 8),
        (antialiased, 40),  # moved by a half pixel
    ],
)
def test_a_smoothed_or_compressed_mask_is_cut_at_half(tmp_path, draw, wrong):
    mask, how = read(draw(large_disc()), tmp_path / "x.png")
    assert how == decode.GREY_EDGES
    assert (mask != large_disc()).sum() <= wrong


@pytest.mark.parametrize("value", [5, 60, 120])
@pytest.mark.parametrize("place", [(44, 8, 6, 7), (18, 37, 5, 6)])  # far from the disc, touching it
@pytest.mark.parametrize("smooth", [antialiased, jpeg(95)])
def test_a_class_beside_a_smoothed_one_is_kept(tmp_path, smooth, value, place):
    values = np.array(smooth(large_disc()))
    assert read(values, tmp_path / "x.png")[1] == decode.GREY_EDGES
    values[blob(*place) & ~large_disc()] = value
    mask, how = read(values, tmp_path / "x.png")
    assert mask[blob(*place)].all() and how != decode.GREY_EDGES


def test_classes_compressed_with_loss_keep_their_place(tmp_path):
    values = np.uint8(255) * large_disc() + np.uint8(120) * blob(44, 8, 6, 7)
    mask, how = read(values, tmp_path / "x.jpg", quality=90)
    assert how == decode.MANY_GREYS
    assert mask[TWO_CLASSES].all() and (mask & ~TWO_CLASSES).sum() < 10


# Warnings of a category.


def only(lines):
    assert len(lines) == 1 and "\n" not in lines[0], lines
    return lines[0]


def test_the_report_says_how_masks_were_read(folder):
    values = np.uint8(255) * disc(0)
    values[9:11, 2:5] = 100
    save(values, folder / "ground_truth/scratch/000_mask.png")
    category = layout.scan(folder)
    assert category.warnings == ()
    np.testing.assert_array_equal(layout.load(category.test[2])["mask"], values > 0)
    text = layout.report(category)
    assert "1 with several values (all but 0 is defective)" in text
    assert "1 with two values" in text


def test_masks_cut_at_half_are_a_warning_that_names_them(folder):
    grey = np.uint8(255) * disc(0)
    grey[1:8, 4] = [20, 70, 110, 120, 110, 70, 20]
    save(grey, folder / "ground_truth/scratch/000_mask.png")
    warning = only(layout.scan(folder).warnings)
    assert "ground_truth/scratch/000_mask.png: was read as grey edges (cut at half" in warning


@pytest.mark.parametrize("rows", [4, 7])
def test_inverted_masks_are_told_by_the_shares_of_all_of_them(folder, rows):
    # 81 % and 67 %: no mask of these would stand out by itself.
    for i in range(2):
        normal = np.zeros_like(disc(i))
        normal[2 : 2 + rows, 3:12] = True
        save_mask(~normal, folder / f"ground_truth/scratch/{i:03}_mask.png")
    category = layout.scan(folder)
    assert category.errors == ()
    warning = only(category.warnings)
    assert warning.startswith(f"{folder / 'ground_truth/scratch'}: ") and "inverted" in warning


def test_one_large_defect_among_small_ones_is_no_inverted_mask(folder):
    large = np.zeros_like(disc(0))
    large[:, :10] = True
    save(photo(22), folder / "test/scratch/002.png")
    save_mask(large, folder / "ground_truth/scratch/002_mask.png")
    assert layout.scan(folder).warnings == ()
