"""Reads CVAT's XML, "CVAT for images 1.1": polygons, boxes, ellipses and masks in pixels."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from .files import MAX_TEXT_BYTES, ImageSource, check_file, is_plain_name
from .outlines import corners, ellipse, turned
from .region_source import Maker, RegionSource, Source, entry_of, expect_bounded_size

MAX_DEPTH = 32
MAX_ELEMENTS = 2_000_000
SHAPES = ("polygon", "box", "ellipse", "mask")
NO_SHAPES = ("tag",)  # about an image as a whole


class CvatFile(Source):
    """Images and their regions, by the image's name, which is compared and never opened."""

    def __init__(self, path: Path):
        self.name = path.name
        root = _parse(path)
        if root.tag != "annotations" or root.find("track") is not None:
            what = "tracks of a video" if root.tag == "annotations" else f"<{root.tag}>"
            raise ValueError(f"expected <annotations> of 'CVAT for images 1.1' in {path}: {what}")

        self.refused = []
        self.images: dict[str, ElementTree.Element] = {}
        for image in root.iter("image"):
            name = image.get("name")
            if not is_plain_name(name) or name in self.images:
                expected = "images with a name of their own inside the images' folder"
                self.refused.append(f"{self.name}: expected {expected}, got {name!r:.120}")
            else:
                self.images[name] = image
        if not self.images:
            raise ValueError(self.refused[0] if self.refused else f"expected images in {path}")

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterator[Maker]:
        image = entry_of(self.images, source, self.name)
        if image is None:
            return
        shapes = [shape for shape in image if shape.tag not in NO_SHAPES]
        for k, shape in enumerate(shapes):
            origin = f"{self.name}#{k}"
            yield origin, partial(self._regions, shape, image, size, origin)

    def _regions(self, shape, image, size, origin: str) -> list[RegionSource]:
        sides = image.get("width", ""), image.get("height", "")
        declared = tuple(map(int, sides)) if all(s.isdecimal() for s in sides) else None
        mask = _mask(shape, expect_bounded_size(declared or size))
        return [RegionSource(mask, origin, label=shape.get("label"), size=declared)]


class _Builder(ElementTree.TreeBuilder):
    """Builds a tree of bounded size; whatever declares entities is refused before they expand."""

    def __init__(self):
        super().__init__()
        self.depth = self.count = 0

    def doctype(self, name, public, system):
        raise ValueError("expected XML without a DOCTYPE, got one")

    def start(self, tag, attributes):
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.depth > MAX_DEPTH or self.count > MAX_ELEMENTS:
            raise ValueError(
                f"expected at most {MAX_DEPTH} levels and {MAX_ELEMENTS:,} elements, got more"
            )
        return super().start(tag, attributes)

    def end(self, tag):
        self.depth -= 1
        return super().end(tag)


def _parse(path: Path) -> ElementTree.Element:
    check_file(path, MAX_TEXT_BYTES, "an XML")
    try:
        return ElementTree.fromstring(
            path.read_bytes(), parser=ElementTree.XMLParser(target=_Builder())
        )
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last: its encoding
        raise ValueError(f"expected readable XML in {path}, got: {error}") from error


def _mask(shape: ElementTree.Element, size: tuple[int, int]):
    """Returns a shape's mask, in the pixels of an image of (width, height)."""
    if shape.tag == "polygon":
        points = shape.get("points", "").replace(";", ",").split(",")
        return {"polygons": [[_number(value, "points") for value in points]]}

    # What is turned becomes a polygon.
    if shape.tag == "box":
        left, top, right, bottom = _numbers(shape, "xtl", "ytl", "xbr", "ybr")
        if not (angle := _number(shape.get("rotation", "0"), "rotation")):
            return {"box": [left, top, right, bottom]}
        center = (left + right) / 2, (top + bottom) / 2
        return {"polygons": [turned(corners(left, top, right, bottom), center, angle)]}
    if shape.tag == "ellipse":
        x, y, *radii = _numbers(shape, "cx", "cy", "rx", "ry")
        angle = _number(shape.get("rotation", "0"), "rotation")
        return {"polygons": [turned(ellipse(x, y, *radii), (x, y), angle)]}

    if shape.tag == "mask":
        return _run_lengths(shape, size)
    raise ValueError(f"expected a shape ({', '.join(SHAPES)}), got <{shape.tag[:40]}>")


def _run_lengths(shape: ElementTree.Element, size: tuple[int, int]) -> np.ndarray:
    """Fills run lengths, outside and inside by turns, row by row of the mask's own box."""
    left, top, width, height = map(int, _numbers(shape, "left", "top", "width", "height"))
    if min(left, top) < 0 or min(width, height) < 1 or left + width > size[0]:
        raise ValueError(f"expected a mask inside {size[0]}x{size[1]} pixels, got {shape.attrib}")
    if top + height > size[1]:
        raise ValueError(f"expected a mask inside {size[0]}x{size[1]} pixels, got {shape.attrib}")

    runs = [int(_number(run, "rle")) for run in shape.get("rle", "").split(",")]
    if min(runs) < 0 or sum(runs) != width * height:
        raise ValueError(f"expected rle of {width}x{height} pixels, got {sum(runs)}")
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    mask = np.zeros(size[::-1], dtype=bool)
    mask[top : top + height, left : left + width] = inside.reshape(height, width)
    return mask


def _numbers(shape: ElementTree.Element, *names: str) -> list[float]:
    return [_number(shape.get(name, ""), name) for name in names]


def _number(text: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise ValueError(f"expected numbers in {name}, got {text[:40]!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"expected finite numbers in {name}, got {text[:40]!r}")
    return number
