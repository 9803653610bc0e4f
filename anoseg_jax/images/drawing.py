"""Draws anomaly maps and the regions that were found; needs no matplotlib."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

FOUND = (255, 60, 60)  # colour of the regions' edges
# matplotlib's "inferno": red, green and blue of 256 colours.
_INFERNO = (
    "AAADAAAEAAAGAQAHAQEJAQELAgEOAgIQAwISBAMUBAMWBQQYBgQbBwUdCAYfCQYhCgcjCwcmDQgoDggqDwktEAkvEgoy"
    "Ewo0FAs2Fgs5Fws7GQs+GgtAHAxDHQxFHwxHIAxKIgtMJAtOJgtQJwtSKQtUKwpWLQpYLgpaMApcMgldNAlfNQlgNwlh"
    "OQliOwlkPAllPglmQAlmQQlnQwpoRQppRgppSAtqSgtqSwxrTQxrTw1sUA1sUg5sUw5tVQ9tVw9tWBBtWhFtWxFuXRJu"
    "XxJuYBNuYhRuYxRuZRVuZhVuaBZuahduaxdubRhubhhucBluchltcxptdRttdhtteBxtehxtex1sfR1sfh5sgB9rgR9r"
    "gyBrhSBqhiFqiCFqiSJpiyJpjSNpjiRokCRokSVnkyVnlSZmliZmmCdlmShkmyhknCljniljoCpioSthoythpCxgpixf"
    "py1fqS5eqy5drC9crjBbrzFbsTFasjJZtDNYtTNXtzRWuDVWujZVuzdUvTdTvjhSvzlRwTpQwjtPxDxOxT1Nxz5MyD5L"
    "yT9Ky0BJzEFIzUJHz0RG0EVE0UZD0kdC1EhB1UlA1ko/10s+2U092k4720863FA53VI43lM331Q24FY04lcz41gy5Fox"
    "5Vsw5lwu5l4t518s6GEr6WIq6mQo62Un7Gcm7Wgl7Woj7mwi720h8G8f8HAe8XId8nQc8nUa83cZ83kY9HoW9XwV9X4U"
    "9oAS9oER94MQ94UO+IcN+IgM+IoL+YwJ+Y4I+ZAI+pEH+pMG+pUG+pcG+5kG+5sG+50G+54H+6AH+6II+6QK+6YL+6gN"
    "+6oO+6wQ+64S+7AU+7EW+7MY+7Ua+7cc+7ke+rsh+r0j+r8l+sEo+cMq+cUs+ccv+Mkx+Ms0+M03988699E89tM/9tVC"
    "9ddF9dlI9NtL9NxP895S8+BW8+JZ8uRd8uZg8ehk8elo8ets8e1w8e508fB58fJ98vOB8vSF8/aJ9PeN9fiR9vqV9/uZ"
    "+fyd+v2g/P6k"
)
COLOURS = np.frombuffer(base64.b64decode(_INFERNO), np.uint8).reshape(256, 3)


def draw_heat_map(anomaly_map: np.ndarray) -> Image.Image:
    """Colours a map, float [h, w] in [0, 1]: the same colours for the same values everywhere."""
    return Image.fromarray(COLOURS[np.round(255 * anomaly_map).astype(np.uint8)])


def outline(
    image: Image.Image, region: np.ndarray | None, colour: tuple[int, int, int] = FOUND
) -> Image.Image:
    """Draws the outer edge of a region of an image, bool [h, w]; without a region, no edge."""
    if region is None or not region.any():
        return image
    width = max(2, max(region.shape) // 400)
    pixels = np.array(image)
    pixels[ndimage.maximum_filter(region, 2 * width + 1) & ~region] = colour
    return Image.fromarray(pixels)


def encode_map(anomaly_map: np.ndarray) -> bytes:
    """Returns a map, float [h, w] in [0, 1], as a 16-bit grey PNG: 65535 is 1."""
    buffer = io.BytesIO()
    values = np.round(65535 * anomaly_map).astype(np.uint16)
    Image.fromarray(values).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode_jpeg(image: Image.Image, **options: Any) -> bytes:
    """Returns a picture as JPEG, without chroma subsampling: thin edges stay sharp."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", subsampling=0, **options)
    return buffer.getvalue()


def as_panels(pictures: Mapping[str, Image.Image]) -> list[dict[str, Any]]:
    """Returns pictures of a page, by caption: caption, width, height, data: URI of the JPEG."""
    panels = []
    for caption, picture in pictures.items():
        jpeg = base64.b64encode(encode_jpeg(picture, quality=82, optimize=True)).decode()
        size = {"width": picture.width, "height": picture.height}
        panels.append({"caption": caption, "uri": f"data:image/jpeg;base64,{jpeg}", **size})
    return panels


def colour_scale() -> str:
    """Returns the colours of maps from 0 to 1, left to right, as the data: URI of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(COLOURS[None], 8, axis=0)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
