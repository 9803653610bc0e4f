"""images/decode.py: every kind of image and mask file, bit depth, resizing."""

import numpy as np
import pytest
from drawings import HEIGHT, WIDTH, disc, photo, save
from PIL import Image

from anoseg_jax.images import decode, layout

# Kinds of images.


def as_rgba(grey):
    image = Image.fromarray(grey).convert("RGBA")
    image.putalpha(128)
    return image


IMAGE_KINDS = {
    "grey.png": Image.fromarray,
    "upper.PNG": Image.fromarray,
    "grey.bmp": Image.fromarray,
    "grey.tif": Image.fromarray,
    "grey.pgm": Image.fromarray,
    "rgb.png": lambda grey: Image.fromarray(grey).convert("RGB"),
    "rgba.png": as_rgba,
    "grey_alpha.png": lambda grey: as_rgba(grey).convert("LA"),
    "palette.png": lambda grey: Image.fromarray(grey).convert("P"),
    "cmyk.tif": lambda grey: Image.fromarray(grey).convert("RGB").convert("CMYK"),
    "16_bit.png": lambda grey: Image.fromarray(grey.astype(np.uint16) * 257),
    "16_bit.tif": lambda grey: Image.fromarray(grey.astype(np.uint16) * 257),
    "32_bit.tif": lambda grey: Image.fromarray(grey.astype(np.int32) * 257),
    "float.tif": lambda grey: Image.fromarray(grey.astype(np.float32) / 255),
}


@pytest.mark.parametrize("name", IMAGE_KINDS)
def test_every_kind_of_image_gives_the_same_8_bit_rgb(tmp_path, name):
    grey = photo(0)
    save(IMAGE_KINDS[name](grey), tmp_path / name)
    image = decode.read_image(tmp_path / name)
    assert image.dtype == np.uint8 and image.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=-1))


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_lossy_images_are_read_up_to_their_loss(tmp_path, suffix):
    smooth = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
    save(Image.fromarray(smooth), tmp_path / f"x{suffix}", quality=95)
    image = decode.read_image(tmp_path / f"x{suffix}")
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(image.astype(int) - smooth[..., None]).max() < 16


def test_one_bit_images_are_black_and_white(tmp_path):
    save(Image.fromarray(disc(0)), tmp_path / "x.png")
    image = decode.read_image(tmp_path / "x.png")
    np.testing.assert_array_equal(image[..., 1], np.uint8(255) * disc(0))


def test_colours_keep_their_order(tmp_path):
    colour = np.zeros((2, 3, 3), np.uint8)
    colour[:] = 200, 100, 50
    save(Image.fromarray(colour).quantize(4), tmp_path / "x.png")
    np.testing.assert_array_equal(decode.read_image(tmp_path / "x.png"), colour)


def test_16_bit_is_scaled_not_clipped(tmp_path):
    save(np.array([[0, 128, 256, 257, 32768, 65407, 65535]], np.uint16), tmp_path / "x.png")
    image = decode.read_image(tmp_path / "x.png")
    np.testing.assert_array_equal(image[0, :, 0], [0, 0, 1, 1, 128, 255, 255])


@pytest.mark.parametrize(
    "values",
    [
        np.array([[-0.1, 1.0]], np.float32),
        np.array([[np.nan, 1.0]], np.float32),
        np.array([[0, 65536]], np.int32),
    ],
)
def test_numbers_of_unknown_scale_are_refused(tmp_path, values):
    save(values, tmp_path / "x.tif")
    with pytest.raises(layout.LayoutError, match="x.tif: has values from"):
        decode.read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_whatever_the_camera_held(tmp_path, orientation):
    upright = np.repeat(photo(0)[..., None], 3, axis=-1)
    # How each orientation's stored pixels follow from the upright picture (EXIF 2.3, tag 274).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    save(np.ascontiguousarray(stored), tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(decode.read_image(tmp_path / "x.png"), upright)


# Kinds of masks.


def palette_mask(mask, colours):
    image = Image.fromarray(mask.astype(np.uint8), "L")
    image = image.copy()
    image.putpalette(colours)
    return image


def with_alpha(mask, alpha):
    rgba = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    rgba[..., :3] = np.uint8(255) * mask[..., None]
    rgba[..., 3] = alpha
    return Image.fromarray(rgba)


def drawn_in_alpha(mask):
    rgba = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    rgba[..., 3] = np.uint8(255) * mask
    return Image.fromarray(rgba)


def hidden_under_alpha(mask):
    """White also in a corner, but transparent there."""
    corner = np.zeros((HEIGHT, WIDTH), bool)
    corner[-3:, -3:] = True
    return with_alpha(mask | corner, np.uint8(255) * ~corner)


def red(mask):
    return Image.fromarray(mask[..., None] * np.array([200, 30, 30], np.uint8))


MASK_KINDS = {
    "8_bit": lambda mask: Image.fromarray(np.uint8(255) * mask),
    "1_bit": Image.fromarray,
    "16_bit": lambda mask: Image.fromarray(np.uint16(65535) * mask),
    "zeros_and_ones": lambda mask: Image.fromarray(mask.astype(np.uint8)),
    "class_numbers": lambda mask: Image.fromarray(
        mask * (1 + np.indices(mask.shape)[1] % 3).astype(np.uint8)
    ),
    "type_id_253": lambda mask: Image.fromarray(np.uint8(253) * mask),
    "type_ids_253_to_255": lambda mask: Image.fromarray(
        mask * (253 + np.indices(mask.shape)[1] % 3).astype(np.uint8)
    ),
    "rgb": lambda mask: Image.fromarray(np.uint8(255) * mask).convert("RGB"),
    "red": red,
    "rgba_opaque": lambda mask: with_alpha(mask, 255),
    "rgba_clear": lambda mask: with_alpha(mask, 0),
    "drawn_in_alpha": drawn_in_alpha,
    "hidden_under_alpha": hidden_under_alpha,
    "palette_red_on_black": lambda mask: palette_mask(mask, [0, 0, 0, 200, 30, 30]),
    "palette_dim_blue_on_black": lambda mask: palette_mask(mask, [0, 0, 0, 0, 0, 64]),
    "palette_red_on_white": lambda mask: palette_mask(mask, [255, 255, 255, 200, 30, 30]),
    "palette_black_second": lambda mask: palette_mask(~mask, [200, 30, 30, 0, 0, 0]),
    "palette_grey": lambda mask: palette_mask(mask, [0, 0, 0, 255, 255, 255]),
    "palette_grey_white_first": lambda mask: palette_mask(~mask, [255, 255, 255, 0, 0, 0]),
}


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_every_kind_of_mask_gives_the_same_bool_mask(tmp_path, kind):
    save(MASK_KINDS[kind](disc(0)), tmp_path / "x.png")
    mask = decode.read_mask(tmp_path / "x.png")
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, disc(0))


def test_grey_edges_are_cut_at_half(tmp_path):
    save(np.array([[0, 60, 127, 128, 200, 255]], np.uint8), tmp_path / "x.png")
    mask = decode.read_mask(tmp_path / "x.png")
    np.testing.assert_array_equal(mask[0], [False, False, False, True, True, True])


@pytest.mark.parametrize("kind", ["8_bit", "1_bit", "rgb", "rgba_opaque", "16_bit", "palette_grey"])
def test_an_empty_mask_stays_empty(tmp_path, kind):
    save(MASK_KINDS[kind](np.zeros((HEIGHT, WIDTH), bool)), tmp_path / "x.png")
    assert not decode.read_mask(tmp_path / "x.png").any()
