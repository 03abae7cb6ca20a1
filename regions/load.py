"""Loads regions from whatever tools and data sets give: the one door for Python."""

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..image_loading import is_data_url, is_url, load_image
from .files import ImageSource
from .objects import regions_of_object
from .region_mask import RegionMask
from .region_source import RegionSource
from .sources import gather_regions, open_sources

MAX_PATH = 4096  # characters; a longer text is no path but an image in base64


def load_regions(
    source,
    image,
    *,
    resize_masks: bool = False,
    threshold: float = 0.5,
    label_map: bool | None = None,
    name: str | None = None,
) -> list[RegionMask]:
    """Loads the regions of an image from a file, a folder, or what a segmenter returned.

    Args:
        source: a path (mask or label map, COCO, panoptic, SAM, LabelMe, Label Studio, CVAT, YOLO,
            .npy, .npz, or a folder of them), masks (N, H, W), boxes (N, 4), a polygon (N, 2), what
            SAM, transformers, supervision or ultralytics returned, or a list of masks; see
            docs/regions.md.
        image: (width, height), or the image as `load_image` takes it.
        resize_masks: whether masks of another size than the image's are taken, by nearest pixel.
        threshold: above which pixels of float masks are inside.
        label_map: whether an image or array (H, W) has a region for each value. Where it is None,
            palettes of several colors and arrays of wide integers do.
        name: the image's name in files of several images; by default that of its path.

    Raises ValueError, which names the entry, for what cannot be read or fits no image, and
    FileNotFoundError for a path that is not there.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"expected a threshold from 0 to below 1, got {threshold}")
    size = _size_of(image)
    if _is_path(source):
        options = {"resize_masks": resize_masks, "threshold": threshold, "label_map": label_map}
        found = _from_file(source, size, name or image_name(image), **options)
    else:
        found = regions_of_object(source, size, threshold, label_map)
    return [_opened(region, size, resize_masks) for region in found]


def image_name(image) -> str:
    """Returns the path or address of an image, empty for one that has none."""
    if isinstance(image, Image.Image):
        return str(getattr(image, "filename", "") or "")
    is_short = isinstance(image, (str, os.PathLike)) and len(str(image)) <= MAX_PATH
    return str(image) if is_short and not is_data_url(str(image)) else ""


def _size_of(image) -> tuple[int, int]:
    """Returns (width, height) of an image, or of the size itself."""
    is_size = isinstance(image, Sequence) and not isinstance(image, (str, bytes, bytearray))
    if not is_size:
        return load_image(image).size
    if len(image) != 2 or not all(type(side) is int and side > 0 for side in image):
        raise ValueError(f"expected a size (width, height) in pixels, got {image!r:.80}")
    return tuple(image)


def _is_path(source) -> bool:
    """Tells whether a source is a file or folder, not an address or an image in base64."""
    if isinstance(source, os.PathLike):
        return True
    is_text = isinstance(source, str) and len(source) <= MAX_PATH
    return is_text and not is_url(source) and not is_data_url(source)


def _from_file(path, size: tuple[int, int], name: str, **options) -> list[RegionSource]:
    image = ImageSource(name, named=True)
    sources = open_sources([str(Path(path))], [image], **options)
    refused = [line for each in sources for line in each.refused]
    found = gather_regions(sources, image, size, resize_masks=options["resize_masks"])
    if not found:
        whose = f" of {name}" if name else ""
        raise ValueError(f"expected regions{whose} in {path}, found none{_first(refused)}")
    return found


def _first(refused: list[str]) -> str:
    return f"; {refused[0]}" if refused else ""


def _opened(region: RegionSource, size: tuple[int, int], resize_masks: bool) -> RegionMask:
    """Opens a region, and names it in what is wrong with it."""
    try:
        return region.opened(size, resize_masks)
    except ValueError as error:
        raise ValueError(f"{region.origin}: {error}") from error
