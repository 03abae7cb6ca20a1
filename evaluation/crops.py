"""What an image judge is shown of a region: the picture and the mask around it."""

import base64
import io

import numpy as np
from PIL import Image

from ..image_processing_perceptiondlm import load_image, load_mask
from .benchmarks import RegionSample

MIN_BOX_SIDE = 56  # pixels


def crop_window(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The window shown for a mask: three times its box, cut at the picture's borders.

    A side of the box below 56 pixels is widened to 56 about the box's centre first; as in the
    published code the corner is then rounded towards zero.

    Args:
        mask: (H, W), non-zero inside the region.

    Returns (x0, y0, x1, y1), half-open, in pixels. Raises ValueError for an empty mask.
    """
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise ValueError("expected a mask with at least one non-zero pixel, got an empty mask")
    height, width = mask.shape
    x0, x1 = _widened(int(columns.min()), int(columns.max()) + 1, width)
    y0, y1 = _widened(int(rows.min()), int(rows.max()) + 1, height)
    return x0, y0, x1, y1


def _widened(start: int, end: int, limit: int) -> tuple[int, int]:
    """One axis of the window: the box's [start, end) to three boxes, within [0, limit)."""
    side = max(end - start, MIN_BOX_SIDE)
    corner = int((start + end) / 2 - side / 2)
    return max(corner - side, 0), min(corner + 2 * side, limit)


def region_crops(sample: RegionSample) -> tuple[Image.Image, Image.Image]:
    """The crops of a region's picture (RGB) and mask (8-bit, 255 inside)."""
    picture = load_image(sample.image_path)
    if picture.size != sample.size[::-1]:
        raise ValueError(
            f"{sample.image_path}: expected the annotated {sample.size[1]}x{sample.size[0]} pixels"
            f" (width x height), got {picture.size[0]}x{picture.size[1]}"
        )
    mask = np.asarray(load_mask(sample.mask, picture.size)) > 0
    window = crop_window(mask)
    return picture.crop(window), Image.fromarray(mask.astype(np.uint8) * 255).crop(window)


def png_data_url(image: Image.Image) -> str:
    """A picture as a `data:` URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
