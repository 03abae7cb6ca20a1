"""Cuts out what a model is shown of a region, and encodes images for endpoints."""

import base64
import io

import numpy as np
from PIL import Image

MIN_BOX_SIDE = 56  # pixels


def crop_window(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Returns the window shown for a region: three times its box, cut at the image's borders.

    A side of the box below 56 pixels is widened to 56 about the box's center first; as in the
    published code the corner is then rounded towards zero.

    Args:
        mask: region mask (H, W), non-zero inside.

    Returns (x0, y0, x1, y1), half-open, in pixels. Raises ValueError for an empty region mask.
    """
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise ValueError(
            "expected a region mask with at least one non-zero pixel, got an empty region mask"
        )
    height, width = mask.shape
    x0, x1 = _widened(int(columns.min()), int(columns.max()) + 1, width)
    y0, y1 = _widened(int(rows.min()), int(rows.max()) + 1, height)
    return x0, y0, x1, y1


def _widened(start: int, end: int, limit: int) -> tuple[int, int]:
    """Widens one axis of a box, [start, end), to that of three boxes within [0, limit)."""
    side = max(end - start, MIN_BOX_SIDE)
    corner = int((start + end) / 2 - side / 2)
    return max(corner - side, 0), min(corner + 2 * side, limit)


def png_data_url(image: Image.Image) -> str:
    """Encodes an image as a `data:` URL that holds a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
