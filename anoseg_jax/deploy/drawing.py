"""Draws anomaly maps and the regions that were found; needs no matplotlib."""

import base64
import io

import numpy as np
from PIL import Image
from scipy import ndimage

FOUND = (255, 60, 60)  # colour of the regions' edges
# matplotlib's "inferno" at 17 equal steps, linear between them (to 7 of 255).
_INFERNO = (
    *((0, 0, 4), (11, 7, 36), (33, 12, 74), (61, 9, 101), (87, 16, 110), (113, 25, 110)),
    *((138, 34, 106), (163, 44, 97), (188, 55, 84), (210, 70, 68), (228, 90, 49)),
    *((241, 115, 29), (249, 142, 9), (252, 172, 17), (249, 203, 53), (242, 234, 105)),
    (252, 255, 164),
)
COLOURS = np.stack(
    [
        np.interp(np.linspace(0, 16, 256), np.arange(17), channel)
        for channel in np.array(_INFERNO).T
    ],
    axis=-1,
).astype(np.uint8)


def draw_heat_map(anomaly_map: np.ndarray) -> Image.Image:
    """Colours a map, float [h, w] in [0, 1]: the same colours for the same values everywhere."""
    return Image.fromarray(COLOURS[np.round(255 * anomaly_map).astype(np.uint8)])


def draw_overlay(image: np.ndarray, mask: np.ndarray | None) -> Image.Image:
    """Draws the edges of the defective pixels, bool [h, w], into an image, uint8 [h, w, 3]."""
    if mask is None or not mask.any():
        return Image.fromarray(image)
    width = max(2, max(mask.shape) // 400)
    grown = ndimage.maximum_filter(mask, 2 * width + 1)
    pixels = image.copy()
    pixels[grown & ~mask] = FOUND
    return Image.fromarray(pixels)


def encode_map(anomaly_map: np.ndarray) -> bytes:
    """Returns a map, float [h, w] in [0, 1], as a 16-bit grey PNG: 65535 is 1."""
    buffer = io.BytesIO()
    values = np.round(65535 * anomaly_map).astype(np.uint16)
    Image.fromarray(values).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode_jpeg(image: Image.Image, quality: int = 85) -> bytes:
    """Returns a picture as JPEG, without chroma subsampling: thin edges stay sharp."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def data_uri(image: Image.Image) -> str:
    """Returns a picture as the data: URI of a JPEG."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(image, 80)).decode()


def colour_scale() -> str:
    """Returns the colours of maps from 0 to 1, left to right, as the data: URI of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(COLOURS[None], 8, axis=0)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
