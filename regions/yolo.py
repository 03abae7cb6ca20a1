"""Reads the lines that YOLO writes: a class, then a polygon or box in shares of the image."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ..common.json_text import without_mark
from .files import MAX_TEXT_BYTES, ImageSource, check_file
from .region_source import Maker, RegionSource, Source

EXPECTED = (
    "a line of a class, then a polygon (x y, three points or more) or a box (center x y, width,"
    " height), each in [0, 1], and at most a score"
)
MARGIN = 0.01  # by which rounding, or a tracked object, leaves the image


class YoloFile(Source):
    """The regions of one image, a line each; it goes with the image that it is named like."""

    def __init__(self, path: Path, only: bool):
        check_file(path, MAX_TEXT_BYTES, "a YOLO text")
        self.path = path
        self.only = only
        try:
            text = without_mark(path.read_bytes()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"expected YOLO's lines in {path}, got: {error}") from error
        self.lines = [line.split() for line in text.splitlines() if line.strip()]

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterator[Maker]:
        if not (self.only or source.stem == self.path.stem):
            return
        for k, words in enumerate(self.lines, 1):
            origin = f"{self.path.name}#{k}"
            yield origin, partial(self._regions, words, size, origin)

    def _regions(self, words: list[str], size, origin: str) -> list[RegionSource]:
        label, numbers = words[0], _shares(words[1:])
        if not label.isdigit() or len(numbers) < 4:
            raise ValueError(f"expected {EXPECTED}; got {' '.join(words)[:80]!r}")

        # An odd number of them ends in a score.
        score = numbers.pop() if len(numbers) % 2 else None
        if len(numbers) == 4:
            x, y, width, height = numbers
            corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            mask = {"box": _in_pixels(corners, size)}
        else:
            mask = {"polygons": [_in_pixels(numbers, size)]}
        return [RegionSource(mask, origin, label=label, score=score)]


def _shares(words: list[str]) -> list[float]:
    """Reads numbers in [0, 1]; pixels, say, are refused."""
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"expected {EXPECTED}; got: {error}") from error
    wrong = [number for number in numbers if not -MARGIN <= number <= 1 + MARGIN]
    if wrong:
        raise ValueError(f"expected {EXPECTED}; got {wrong[0]:g}, which is no share of an image")
    return numbers


def _in_pixels(shares: list[float], size: tuple[int, int]) -> list[float]:
    """Turns x and y by turns, as shares of (width, height), into pixels."""
    return [share * size[k % 2] for k, share in enumerate(shares)]
