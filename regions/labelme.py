"""Reads LabelMe's JSON files: polygons, rectangles, circles and masks in the image's pixels."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ..image_loading import decode_base64
from ..image_masks import fill_polygons
from .files import ImageSource, is_plain_name, open_mask_bytes
from .region_source import Maker, RegionSource, Source, declared_size, expect_bounded_size

EXPECTED = "a shape of type polygon, rectangle, circle or mask"


class LabelMeFile(Source):
    """The regions of one image; it goes with the image that it names or is named like.

    Shapes of one label and group_id are one object, and so one region.
    """

    def __init__(self, path: Path, content: dict, only: bool):
        self.path = path
        self.only = only
        self.content = content
        if not isinstance(content["shapes"], list):
            raise ValueError(f"expected a list of shapes in {path}, got none")
        self.groups = _groups(content["shapes"])

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterator[Maker]:
        named = self.content.get("imagePath")
        is_named = is_plain_name(named) and Path(named).name == Path(source.path).name
        if not (self.only or is_named or source.stem == self.path.stem):
            return
        for first, shapes in self.groups:
            origin = f"{self.path.name}#{first}"
            yield origin, partial(self._regions, shapes, size, origin)

    def _regions(self, shapes: list, size, origin: str) -> list[RegionSource]:
        declared = declared_size(self.content, "imageWidth", "imageHeight")
        own = expect_bounded_size(declared or size)
        masks = [_shape_mask(shape, own) for shape in shapes]
        label = shapes[0].get("label")
        label = label if isinstance(label, str) else None
        return [RegionSource(np.logical_or.reduce(masks), origin, label=label, size=declared)]


def _groups(shapes: list) -> list[tuple[int, list]]:
    """Returns the shapes of each object, and the number of the first."""
    groups: dict[object, tuple[int, list]] = {}
    for k, shape in enumerate(shapes):
        group = shape.get("group_id") if isinstance(shape, dict) else None
        is_grouped = isinstance(group, (int, str))
        key = (str(shape.get("label")), group) if is_grouped else k
        groups.setdefault(key, (k, []))[1].append(shape)
    return list(groups.values())


def _shape_mask(shape, size: tuple[int, int]) -> np.ndarray:
    """Fills one shape, bool (H, W)."""
    if not isinstance(shape, dict):
        raise ValueError(f"expected {EXPECTED}, got {shape!r:.80}")
    kind, points = shape.get("shape_type", "polygon"), _points(shape.get("points"))
    if kind == "polygon" and len(points) >= 3:
        return fill_polygons([[number for point in points for number in point]], size)
    if kind == "rectangle" and len(points) in (2, 4):
        return _rectangle(points, size)
    if kind == "circle" and len(points) == 2:
        return _circle(*points, size)
    if kind == "mask" and len(points) == 2:
        return _pasted(shape.get("mask"), points, size)
    raise ValueError(f"expected {EXPECTED}, got {kind!r:.40} of {len(points)} points")


def _points(points) -> list[list[float]]:
    """Checks points [x, y] in pixels."""
    is_list = isinstance(points, list) and all(isinstance(p, list) and len(p) == 2 for p in points)
    if not is_list or not all(type(v) in (int, float) and abs(v) < 1e6 for p in points for v in p):
        raise ValueError(f"expected points [[x, y], ...] in pixels, got {points!r:.80}")
    return points


def _rectangle(points, size: tuple[int, int]) -> np.ndarray:
    """Fills a rectangle of two opposite corners, or of all four."""
    columns, rows = zip(*points, strict=True)
    left, top, right, bottom = min(columns), min(rows), max(columns), max(rows)
    return fill_polygons([[left, top, right, top, right, bottom, left, bottom]], size)


def _circle(center, edge, size: tuple[int, int]) -> np.ndarray:
    """Fills a circle about a center, through a point of its edge."""
    rows, columns = np.ogrid[: size[1], : size[0]]
    distances = np.hypot(columns - center[0], rows - center[1])
    return distances <= math.dist(center, edge)


def _pasted(mask, points, size: tuple[int, int]) -> np.ndarray:
    """Puts a mask, a PNG in base64, where its corners say, both of them inside."""
    if not isinstance(mask, str):
        raise ValueError(f"expected a shape's mask in base64, got {type(mask).__name__}")
    pixels = np.asarray(open_mask_bytes(decode_base64(mask, "a mask"), "the mask")) > 0
    (left, top), (right, bottom) = ([round(v) for v in point] for point in points)
    if pixels.shape != (bottom - top + 1, right - left + 1):
        raise ValueError(
            f"expected a mask of {right - left + 1}x{bottom - top + 1} pixels between its corners,"
            f" got {pixels.shape[1]}x{pixels.shape[0]}"
        )

    if left < 0 or top < 0 or right >= size[0] or bottom >= size[1]:
        raise ValueError(f"expected a mask inside {size[0]}x{size[1]} pixels, got {points}")
    whole = np.zeros(size[::-1], dtype=bool)
    whole[top : bottom + 1, left : right + 1] = pixels
    return whole
