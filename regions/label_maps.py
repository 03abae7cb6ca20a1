"""Reads images of which each color, value or index is a region, and tells them from masks."""

import numpy as np
from PIL import Image

from ..image_loading import load_mask, read_labels
from .region_source import RegionSource, expect_count

MAX_SHOWN = 8  # colors that an error names


def map_or_mask(image: Image.Image, name: str, label_map: bool | None = None) -> list[RegionSource]:
    """Returns the regions of an image that is a mask, or a label map.

    Args:
        image: opened without loss, upright, not converted.
        name: what to call it in messages.
        label_map: whether it is a label map. Where it is None, an image with a palette is one if
            its colors are no mask, as VOC's are; every other image is a mask.

    Raises ValueError for a palette whose colors leave open what is outside.
    """
    if label_map:
        return split_labels(image, name)
    if label_map is None and image.mode == "P" and not _is_mask(image):
        _expect_outside(image, name)
        return split_labels(image, name)
    return [RegionSource(image, name)]


def split_labels(labels, name: str) -> list[RegionSource]:
    """Returns a region for each label of a label map, see `split_label_map`.

    They come by index, value or color (red before green before blue), lowest first.
    """
    try:
        codes, names = read_labels(labels)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    expect_count(len(names), codes.shape[::-1], name)  # smooth edges, say, make thousands of labels
    return [
        RegionSource(codes == code, f"{name} label {label}", label=label)
        for code, label in names.items()
    ]


def _is_mask(image: Image.Image) -> bool:
    """Tells whether an image is one region by its colors."""
    try:
        load_mask(image, image.size)
    except ValueError:
        return False
    return True


def _expect_outside(image: Image.Image, name: str):
    """Refuses an image in which no pixel is black or transparent, so any color may be outside."""
    pixels = np.asarray(image.convert("RGBA"))
    if (~pixels[..., :3].any(-1) | (pixels[..., 3] == 0)).any():
        return
    colors = np.unique(pixels[..., :3].reshape(-1, 3), axis=0)[:MAX_SHOWN].tolist()
    shown = ", ".join("#{:02x}{:02x}{:02x}".format(*color) for color in colors)
    raise ValueError(
        f"expected black or transparent pixels outside the regions of {name}, got the colors"
        f" {shown}: which of them are regions cannot be told. Give the pixels of each, say"
        " `np.asarray(image) == 1`; or, if index 0 is outside, read it as a label map"
        " (label_map=True in Python, --label-maps on the command line)"
    )
