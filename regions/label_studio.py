"""Reads Label Studio's JSON export: polygons, rectangles, ellipses and brushes, in percent."""

import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from .brush_rle import decode_brush
from .coco import score_of
from .files import ImageSource, is_plain_name
from .outlines import corners, ellipse, turned
from .region_source import (
    Maker,
    RegionSource,
    Source,
    declared_size,
    entry_of,
    expect_bounded_size,
)

UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")  # what the server puts before an uploaded file's name
LABELS = ("polygonlabels", "rectanglelabels", "ellipselabels", "brushlabels", "labels")
EXPECTED = "a polygon, rectangle, ellipse or brush of Label Studio"


def is_label_studio(content) -> bool:
    """Tells whether JSON is a task, or a list of tasks, of Label Studio."""
    tasks = content if isinstance(content, list) else [content]
    first = tasks[0] if tasks else None
    return (
        isinstance(first, dict)
        and isinstance(first.get("data"), dict)
        and bool({"annotations", "predictions"} & set(first))
    )


class LabelStudioFile(Source):
    """Tasks, each with an image and its regions: those annotated, or else those predicted."""

    def __init__(self, path: Path, content):
        self.name = path.name
        self.refused = []
        self.tasks: dict[str, list[dict]] = {}  # by the image's name
        for task in content if isinstance(content, list) else [content]:
            self._add(task)

    def _add(self, task):
        """Files a task under its image's name, without what the server has put before it."""
        name = _image_name(task) if isinstance(task, dict) else None
        if not is_plain_name(name):
            got = f"{task!r:.120}"
            self.refused.append(f"{self.name}: expected tasks with an image, got {got}")
            return
        self.tasks.setdefault(UPLOADED.sub("", name, count=1), []).append(task)

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterator[Maker]:
        if source.path:  # the user's file may have the server's name, or its own
            path = Path(source.path)
            plain = path.with_name(UPLOADED.sub("", path.name, count=1))
            source = ImageSource(str(plain), source.named)
        tasks = entry_of(self.tasks, source, self.name) or []
        if len(tasks) > 1:
            raise ValueError(f"expected one task of the image in {self.name}, got {len(tasks)}")
        for task in tasks:
            for k, results in enumerate(_results(task, self.name)):
                origin = f"{self.name}#{task.get('id', '')!s:.40}-{k}"
                yield origin, partial(self._regions, results, size, origin)

    def _regions(self, results: list[dict], size, origin: str) -> list[RegionSource]:
        shape = next(result for result in results if _has_shape(result))
        own = expect_bounded_size(declared_size(shape, "original_width", "original_height") or size)
        if shape.get("image_rotation") not in (None, 0):
            turn = shape["image_rotation"]
            raise ValueError(f"expected an image that is not turned, got image_rotation {turn}")

        scores = [score for score in map(score_of, results) if score is not None]
        score = scores[0] if scores else None
        mask = _mask(shape["value"], own)
        return [RegionSource(mask, origin, {}, _label(results), score, own)]


def _image_name(task: dict) -> str | None:
    """Returns the name of a task's image: of the uploaded file, or the end of its address."""
    data = task.get("data")
    texts = [value for value in data.values() if isinstance(value, str)] if data else []
    address = data.get("image", texts[0] if len(texts) == 1 else None) if data else None
    if not isinstance(address, str):
        return None
    parts = urlsplit(address)
    local = re.search(r"(?:^|&)d=([^&]+)", parts.query)  # /data/local-files/?d=folder/cat.jpg
    return PurePosixPath(unquote(local[1] if local else parts.path)).name


def _results(task: dict, name: str) -> list[list[dict]]:
    """Returns the results of each region: its shape, and what else was said about it."""
    given = task.get("annotations") or task.get("predictions") or []
    given = given if isinstance(given, list) else [given]
    given = [one for one in given if isinstance(one, dict) and not one.get("was_cancelled")]
    if len(given) > 1:
        raise ValueError(
            f"expected one annotation of each task in {name}, got {len(given)} of task"
            f" {task.get('id')!r:.40}: keep one, whose regions are meant"
        )

    regions: dict[object, list[dict]] = {}
    results = given[0].get("result") if given else []
    if not isinstance(results, list):
        raise ValueError(f"expected a list of results in {name}, got {results!r:.80}")
    for k, result in enumerate(results):
        if isinstance(result, dict) and isinstance(result.get("value"), dict):
            own = result.get("id")
            regions.setdefault(own if isinstance(own, str) else k, []).append(result)
    return [each for each in regions.values() if any(map(_has_shape, each))]


def _has_shape(result: dict) -> bool:
    """Tells whether a result draws anything; others choose or write."""
    return bool({"points", "x", "rle"} & set(result["value"]))


def _label(results: list[dict]) -> str | None:
    for result in results:
        for name in LABELS:
            labels = result["value"].get(name)
            if isinstance(labels, list) and labels:
                return ", ".join(map(str, labels))
    return None


def _mask(value: dict, size: tuple[int, int]):
    """Returns a region's mask, in the pixels of an image of (width, height)."""
    if "rle" in value:
        return decode_brush(value["rle"], size)
    if "points" in value:
        points = value["points"]
        pairs = points if isinstance(points, list) else []
        if not pairs or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
            raise ValueError(f"expected points [[x, y], ...] in percent, got {points!r:.80}")
        return {"polygons": [_in_pixels([v for point in pairs for v in point], size)]}

    if {"x", "y", "radiusX", "radiusY"} <= set(value):
        x, y, *radii = _in_pixels([value[k] for k in ("x", "y", "radiusX", "radiusY")], size)
        return {"polygons": [turned(ellipse(x, y, *radii), (x, y), _degrees(value))]}
    if {"x", "y", "width", "height"} <= set(value) and "text" not in value:
        x, y, *sides = _in_pixels([value[k] for k in ("x", "y", "width", "height")], size)
        rectangle = corners(x, y, x + sides[0], y + sides[1])
        if not _degrees(value):
            return {"box": [x, y, x + sides[0], y + sides[1]]}
        return {"polygons": [turned(rectangle, (x, y), _degrees(value))]}  # about that corner
    raise ValueError(f"expected {EXPECTED}, got {sorted(value)!s:.80}")


def _degrees(value: dict) -> float:
    return _finite(value.get("rotation") or 0)


def _in_pixels(percents: list, size: tuple[int, int]) -> list[float]:
    """Turns x and y by turns, in percent of (width, height), into pixels."""
    return [_finite(percent) * size[k % 2] / 100 for k, percent in enumerate(percents)]


def _finite(value) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"expected numbers in percent, got {value!r:.40}")
    return float(value)
