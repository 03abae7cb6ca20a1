"""Reads the prompts of a segmenter: points, boxes and texts that say which regions are meant."""

import math
from dataclasses import dataclass

import numpy as np

MAX_PROMPTS = 1000  # of one image

Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Prompts:
    """Holds checked prompts; without any, everything in the image is meant.

    Attributes:
        points: (x, y) in pixels, each inside the image and for a region of its own.
        boxes: (x0, y0, x1, y1) in pixels, x0 < x1 and y0 < y1, within the image, each for a region.
        texts: names of things; each is for all regions that it fits.
    """

    points: tuple[Point, ...] = ()
    boxes: tuple[Box, ...] = ()
    texts: tuple[str, ...] = ()

    @classmethod
    def read(cls, size: tuple[int, int], points=None, boxes=None, text=None) -> "Prompts":
        """Checks prompts for an image of a size (width, height).

        Args:
            size: of the image.
            points: (x, y), or a list or array (N, 2) of them.
            boxes: (x0, y0, x1, y1), or a list or array (N, 4) of them; parts outside of the image
                are cut off.
            text: a text, or a list of them.

        Raises ValueError for other shapes, an empty list, values that are not finite, a point
        outside of the image, and a box that is empty or wholly outside of it.
        """
        checked = cls(
            tuple(_point(row, size) for row in _rows("points", "x, y", points, 2)),
            tuple(_box(row, size) for row in _rows("boxes", "x0, y0, x1, y1", boxes, 4)),
            _texts(text),
        )
        count = len(checked.points) + len(checked.boxes) + len(checked.texts)
        if count > MAX_PROMPTS:
            raise ValueError(f"expected at most {MAX_PROMPTS} prompts for one image, got {count}")
        return checked

    @property
    def everything(self) -> bool:
        """Tells that nothing in particular is asked for."""
        return not (self.points or self.boxes or self.texts)


def no_text_error(text: str) -> ValueError:
    """Returns the error of a segmenter that does not read text."""
    return ValueError(
        "expected points, boxes or everything, or a segmenter that reads text, say facebook/sam3,"
        f" got text {text!r:.80} for one that does not"
    )


def name_numbers(kind: str, numbers) -> str:
    """Names a prompt of numbers, for a region's origin and for messages: "point 10,20.5"."""
    return f"{kind} {','.join(f'{number:g}' for number in numbers)}"


def _rows(name: str, form: str, values, width: int) -> list[list[float]]:
    if values is None:
        return []
    wanted = f"expected {name} as ({form}) in pixels, or a list of such"
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of several lengths
        raise ValueError(f"{wanted}, got {values!r:.80}") from error
    if array.dtype.kind not in "iuf" or array.size == 0:
        raise ValueError(f"{wanted}, got {values!r:.80}")

    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[1] != width:
        raise ValueError(f"{wanted}, got shape {np.shape(values)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{wanted}, got values that are not finite: {values!r:.80}")
    return array.astype(float).tolist()


def _point(point: list[float], size: tuple[int, int]) -> Point:
    x, y = point
    if not (0 <= x < size[0] and 0 <= y < size[1]):
        raise ValueError(
            f"expected a point inside the image of {size[0]}x{size[1]} pixels, got {x:g},{y:g}"
        )
    return x, y


def _box(box: list[float], size: tuple[int, int]) -> Box:
    x0, y0, x1, y1 = box
    cut = max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1])
    if not (x0 < x1 and y0 < y1 and cut[0] < cut[2] and cut[1] < cut[3]):
        raise ValueError(
            f"expected a box x0,y0,x1,y1 with x0 < x1 and y0 < y1 that meets the image of"
            f" {size[0]}x{size[1]} pixels, got {','.join(f'{side:g}' for side in box)}"
        )
    return cut


def _texts(text) -> tuple[str, ...]:
    if text is None:
        return ()
    texts = [text] if isinstance(text, str) else text
    is_list = isinstance(texts, (list, tuple)) and len(texts) > 0
    if not is_list or not all(isinstance(each, str) and each.strip() for each in texts):
        raise ValueError(f"expected text that names things, or a list of such, got {text!r:.80}")
    return tuple(each.strip() for each in texts)


def floor_point(point: Point) -> tuple[int, int]:
    """Returns the column and row of the pixel in which a point lies."""
    return math.floor(point[0]), math.floor(point[1])
