"""Holds regions that are still to be opened, and says which of a file's images is meant.

A `Source` names the regions of an image one by one and opens each on demand, so that what is wrong
with one costs no other, and so that their number is known before any is decoded.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from ..image_loading import load_mask
from .files import MAX_PIXELS, ImageSource
from .region_mask import RegionMask

MAX_REGIONS = 1000  # of one image
MAX_MASK_PIXELS = 3_000_000_000  # a byte each, all masks of an image together
MAX_POLYGONS = 10_000  # of one region
MAX_POINTS = 1_000_000  # of one region's polygons

Value = TypeVar("Value")


@dataclass(frozen=True)
class RegionSource:
    """A mask, as `load_mask` takes it, and where it comes from.

    Attributes:
        mask: pixels, COCO RLE, box or polygons.
        origin: the file's entry that it comes from, for messages.
        annotation: the ids that a COCO file gives: `id`, `image_id`, `category_id`, and the
            category's name.
        label: what its source calls it.
        score: how sure its source is.
        size: (width, height) of the image that it was drawn on, where its file says so.
    """

    mask: object
    origin: str
    annotation: dict = field(default_factory=dict)
    label: str | None = None
    score: float | None = None
    size: tuple[int, int] | None = None

    def opened(self, size: tuple[int, int], resize_masks: bool = False) -> RegionMask:
        """Opens the region for an image of (width, height).

        Raises ValueError for a mask that `load_mask` does not take, and for one of another size
        unless it may be resized, which takes the nearest pixel.
        """
        own = self.size or (pixel_size(self.mask) if resize_masks else None) or size
        if own != size and not resize_masks:
            raise ValueError(
                f"expected annotations of an image of {size[0]}x{size[1]} pixels in"
                f" {self.origin.split('#')[0]}, got {own[0]}x{own[1]}"
            )

        _expect_bounded_outline(self.mask)
        mask = load_mask(self.mask, expect_bounded_size(own))
        if own != size:
            mask = mask.resize(size, Image.Resampling.NEAREST)
            if mask.getbbox() is None:
                raise ValueError(f"expected a region that is left at {size[0]}x{size[1]}, got none")
        return RegionMask(np.asarray(mask) > 0, self.label, self.score, self.origin)


Maker = tuple[str, Callable[[], list[RegionSource]]]  # what an entry is called, and what opens it


class Source:
    """Where regions come from.

    Attributes:
        refused: what is wrong with entries that belong to no image in particular.
        resize_masks: whether masks of another size than the image's are taken.
    """

    refused: list[str] = []
    resize_masks = False

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterable[Maker]:
        """Names the regions of an image of (width, height), and opens each on demand."""
        raise NotImplementedError

    def regions(self, source: ImageSource, size: tuple[int, int]) -> list[RegionSource]:
        """Opens all regions of an image; ValueError for the first that cannot be used."""
        return [region for _, make in self.makers(source, size) for region in make()]

    def unused_note(self) -> str | None:
        """Says which masks are of none of the images, if there are any."""
        return None


def expect_count(count: int, size: tuple[int, int], name: str):
    """Refuses more regions of an image than memory should be asked to hold."""
    limit = min(MAX_REGIONS, MAX_MASK_PIXELS // (size[0] * size[1]))
    if count > limit:
        raise ValueError(
            f"expected at most {limit} regions for {size[0]}x{size[1]} pixels in {name},"
            f" got {count}"
        )


def expect_bounded_size(size: tuple[int, int]) -> tuple[int, int]:
    """Returns a size that a file declares; ValueError for none, or one beyond any image's."""
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"expected 1 to {MAX_PIXELS:,} pixels, got {size[0]}x{size[1]}")
    return size


def pixel_size(mask) -> tuple[int, int] | None:
    """Returns (width, height) of a mask that has pixels of its own; None for boxes and polygons."""
    if isinstance(mask, Image.Image):
        return mask.size
    if isinstance(mask, dict) and isinstance(mask.get("size"), (list, tuple)):
        sides = mask["size"]
        is_size = len(sides) == 2 and all(type(side) is int for side in sides)
        return (sides[1], sides[0]) if is_size else None
    if hasattr(mask, "shape") and len(mask.shape) >= 2:
        return int(mask.shape[-1]), int(mask.shape[-2])
    return None


def declared_size(entry: Mapping, width: str = "width", height: str = "height"):
    """Returns the size (width, height) that a file gives for an image; None where it gives none."""
    sides = entry.get(width), entry.get(height)
    return sides if all(type(side) is int for side in sides) else None


def entry_of(entries: Mapping[str, Value], source: ImageSource, name: str) -> Value | None:
    """Finds what a file has for an image, by the longest part of its path that is a name there.

    An image without a name is the file's only one. Raises ValueError for several that it may be.
    """
    if not source.path:
        if len(entries) != 1:
            shown = ", ".join(sorted(entries)[:5]) + (", ..." if len(entries) > 5 else "")
            raise ValueError(
                f"expected the image's name, since {name} has regions of {len(entries)} images"
                f" ({shown}), got none: load_regions(..., name='...')"
            )
        return next(iter(entries.values()))

    parts = Path(source.path).parts
    for k in range(len(parts)):
        if (known := "/".join(parts[k:])) in entries:
            return entries[known]
    matches = [key for key in entries if key.rsplit("/", 1)[-1] == parts[-1]]
    if len(matches) > 1:
        raise ValueError(f"expected one image {parts[-1]!r} in {name}, got {matches}")
    return entries[matches[0]] if matches else None


def _expect_bounded_outline(mask):
    """Refuses more polygons than could be meant."""
    polygons = mask.get("polygons") if isinstance(mask, dict) else mask
    if not isinstance(polygons, (list, tuple)):
        return
    points = sum(len(each) // 2 for each in polygons if isinstance(each, (list, tuple)))
    if len(polygons) > MAX_POLYGONS or points > MAX_POINTS:
        raise ValueError(
            f"expected at most {MAX_POLYGONS:,} polygons and {MAX_POINTS:,} points in a region,"
            f" got {len(polygons):,} and {points:,}: give it as COCO RLE or as an image"
        )
