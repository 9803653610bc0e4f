"""Images of more than 8 bits: the scale of a category, and what is above it."""

import dataclasses
import struct
import zlib

import numpy as np
import pytest
from drawings import photo, save
from PIL import Image

from anoseg_jax.images import decode, layout


def draw(folder, top, dtype=np.uint16, suffix=".tif"):
    """Replaces the photographs by deeper ones from 0 to `top`; returns them by name."""
    deep = {}
    for seed, path in enumerate(sorted(folder.glob("t*/*/*.png"))):
        values = (photo(seed).astype(np.float64) / 255 * top).astype(dtype)
        path.unlink()
        save(values, path.with_suffix(suffix))
        deep[path.with_suffix(suffix).relative_to(folder).as_posix()] = values
    return deep


@pytest.mark.parametrize(
    ("top", "expected"),
    [(255, 8), (256, 10), (1023, 10), (4000, 12), (16383, 14), (16384, 16), (65535, 16)],
)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_auto_is_the_smallest_that_holds_all_training_images(folder, top, expected, dtype):
    deep = draw(folder, top, dtype)
    category = layout.scan(folder)
    assert category.errors == () and category.warnings == ()
    assert category.bit_depth == expected
    assert f"bit_depth={expected}: values from 0 to {2**expected - 1}" in layout.report(category)
    for example in (*category.train, *category.test):
        image = layout.load(example, bit_depth=category.bit_depth)["image"]
        scaled = np.round(deep[example.name] * (255 / (2**expected - 1)))
        np.testing.assert_array_equal(image, scaled[..., None].repeat(3, -1))


def test_float_images_from_0_to_1_are_bit_depth_1(folder):
    deep = draw(folder, 1, np.float32)
    category = layout.scan(folder)
    assert category.errors == () and category.bit_depth == 1
    image = layout.load(category.train[0], bit_depth=1)["image"]
    np.testing.assert_array_equal(image[..., 0], np.round(deep["train/good/000.tif"] * 255))


def test_float_images_on_another_scale_than_the_others_are_an_error(folder):
    draw(folder, 4095)
    save(photo(0).astype(np.float32) / 255, folder / "train/good/000.tif")
    (error,) = layout.scan(folder).errors
    assert "train/good/000.tif: has float values from 0 to 1" in error and "bit_depth=12" in error


def test_8_bit_images_keep_their_values_beside_deeper_ones(folder):
    draw(folder, 4095)
    (folder / "test/good/000.tif").unlink()
    save(photo(10), folder / "test/good/000.png")
    category = layout.scan(folder)
    assert category.errors == () and category.bit_depth == 12
    image = layout.load(category.test[0], bit_depth=12)["image"]
    np.testing.assert_array_equal(image[..., 1], photo(10))


def test_a_test_image_above_it_is_an_error_that_names_it_and_is_never_clipped(folder):
    draw(folder, 4095)
    bright = folder / "test/scratch/001.tif"
    save(photo(1).astype(np.uint16) * 17, bright)  # up to 4335
    category = layout.scan(folder)
    (error,) = category.errors
    assert error.startswith(f"{bright}: has values up to 4335, and bit_depth=12 ")
    assert "--config.bit_depth=14" in error
    with pytest.raises(layout.LayoutError, match=r"001.tif: has values up to 4335, .*=12 .* 4095"):
        layout.load(category.test[3], bit_depth=12)
    assert layout.load(category.test[3], bit_depth=14)["image"].max() == round(4335 * 255 / 16383)


def test_a_bit_depth_that_was_asked_for_is_used(folder):
    draw(folder, 1000)
    asked = layout.scan(folder, layout.ReadOptions(bit_depth="14"))
    assert asked.errors == () and asked.bit_depth == 14
    too_few = layout.scan(folder, layout.ReadOptions(bit_depth=8))
    assert len(too_few.errors) == 7


def test_another_bit_depth_than_there_is_is_refused():
    options = dataclasses.asdict(layout.ReadOptions())
    assert layout.ReadOptions.of(options | {"bit_depth": "12"}).bit_depth == "12"
    with pytest.raises(layout.LayoutError, match="bit_depth='11' must be auto or one of .*12"):
        layout.ReadOptions.of(options | {"bit_depth": "11"})


def test_dark_photographs_of_12_bits_are_not_almost_black(folder):
    draw(folder, 4095)
    assert layout.scan(folder).warnings == ()
    save(photo(0) // 16, folder / "train/good/000.png")
    (folder / "train/good/000.tif").unlink()
    (warning,) = layout.scan(folder).warnings
    assert "train/good/000.png: is almost black" in warning


# Colour images of 16 bits, of which Pillow has no mode.


def png(values, orientation=1):
    """A PNG of 16 bits: grey and alpha, colour, or colour and alpha."""
    height, width, channels = values.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, body):
        crc = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    exif = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 274, 3, 1, orientation, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"eXIf", exif) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def tiff(values, order, orientation=1):
    """An uncompressed colour TIFF of 16 bits, of either order of bytes."""
    height, width, _ = values.shape
    pixels = values.astype(order + "u2").tobytes()
    bits = 8 + 2 + 10 * 12 + 4
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, bits), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 2), (273, 4, 1, bits + 6), (274, 3, 1, orientation), (277, 3, 1, 3)]
    tags += [(278, 3, 1, height), (279, 4, 1, len(pixels))]
    data = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    for tag, kind, count, value in tags:
        short = kind == 3 and count == 1
        data += struct.pack(order + "HHI", tag, kind, count)
        data += struct.pack(order + "HH", value, 0) if short else struct.pack(order + "I", value)
    return data + struct.pack(order + "IHHH", 0, 16, 16, 16) + pixels


def deep_colour(channels=3, top=4096):
    return np.random.default_rng(0).integers(0, top, (5, 7, channels), np.uint16)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colour_png_of_12_bits_in_16_keeps_its_levels(tmp_path, channels):
    values = deep_colour(channels)
    (tmp_path / "x.png").write_bytes(png(values, orientation=6))
    image = decode.read_image(tmp_path / "x.png", bit_depth=12)
    expected = values[..., :3] if channels > 2 else values[..., :1].repeat(3, -1)
    np.testing.assert_array_equal(image, np.rot90(np.round(expected * (255 / 4095)), -1))


@pytest.mark.parametrize("order", ["<", ">"])
def test_colour_tiff_of_12_bits_in_16_keeps_its_levels_upright(tmp_path, order):
    values = deep_colour()
    (tmp_path / "x.tif").write_bytes(tiff(values, order, orientation=6))
    image = decode.read_image(tmp_path / "x.tif", bit_depth=12)
    np.testing.assert_array_equal(image, np.rot90(np.round(values * (255 / 4095)), -1))


def test_a_mask_of_16_bit_colours_with_small_values_is_not_empty(tmp_path):
    mask = np.zeros((5, 7, 3), np.uint16)
    mask[1:3, 2:5, 0] = 2
    (tmp_path / "x.png").write_bytes(png(mask))
    np.testing.assert_array_equal(decode.read_mask(tmp_path / "x.png"), mask.any(axis=-1))


# Pages and frames, and the limit of pixels.


@pytest.mark.parametrize("suffix", [".tif", ".webp", ".gif", ".png"])
def test_further_pages_and_frames_are_a_warning(folder, suffix):
    frames = [Image.fromarray(photo(i)) for i in (0, 30)]
    (folder / "train/good/000.png").unlink()
    name = folder / f"train/good/000{suffix}"
    frames[0].save(name, save_all=True, append_images=frames[1:])
    category = layout.scan(folder)
    (warning,) = category.warnings
    assert warning.startswith(f"{name}: has several pages or frames")
    assert category.errors == ()


def test_the_second_picture_of_a_phone_is_none(folder):
    (folder / "train/good/000.png").unlink()
    photos = [Image.fromarray(photo(i)).convert("RGB") for i in (0, 30)]
    photos[0].save(folder / "train/good/000.mpo", save_all=True, append_images=photos[1:])
    category = layout.scan(folder)
    assert category.errors == () and category.warnings == () and len(category.train) == 3


def test_the_limit_of_pixels_is_an_option(folder):
    limited = layout.scan(folder, layout.ReadOptions(max_megapixels=0.0001))
    assert len(limited.errors) == 9 and all("0.0001 megapixels" in e for e in limited.errors)
    assert all("--config.max_megapixels" in error for error in limited.errors)
    with pytest.raises(layout.LayoutError, match="megapixels"):
        layout.load(limited.train[0], max_megapixels=0.0001)
