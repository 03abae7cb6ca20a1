"""Reads records through the sources of `perceptiondlm caption-dataset`, whatever they read.

JSON lines, Parquet, WebDataset, `datasets` on disk, COCO's annotations, folders of images and
masks. What a row says beside its masks (captions, scores, categories) goes along.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..image_loading import load_image, load_mask
from ..image_masks import encode_rle
from . import dataset_sources, places
from .captioning_stage import said
from .dataset_sources import ImageFolder, Opened, PanopticAnnotations, Sa1bFolder
from .endpoint import FAILED
from .open_sources import open_source
from .records import Dropped, Record, Region, without_loaded
from .sources import READ, add_region, broken
from .stream_sources import LABEL_FIELDS, TEXT_FIELDS, FileRows, JsonLines

PART_ROWS = 256


class Unreachable(Exception):
    """An image that is elsewhere and could not be fetched; a later run may be luckier."""


class ReadsRows:
    """Makes records of the rows of a source of `caption-dataset`, which `rows` opens."""

    __getstate__ = without_loaded

    @cached_property
    def rows(self) -> dataset_sources.Source:
        raise NotImplementedError

    @property
    def image_root(self) -> Path:
        """Returns the folder that the records' names start from; ValueError if it is not local."""
        root = places.local_of(self._root)
        if root is None:
            raise ValueError(f"expected images of this machine, got those below {self._root}")
        return root

    @property
    def _root(self) -> str:
        rows = self.rows
        return (rows.image_root if isinstance(rows, FileRows) else None) or rows.root

    def items(self) -> Iterator[dict]:
        """Yields id, entry and, where files hold images, data of each row."""
        for part in self.rows.parts(PART_ROWS):
            yield from self.rows.rows(part)

    def read(self, item: dict) -> Record:
        """Reads the record of a row."""
        key, entry = item["id"], item["entry"]
        source: dict[str, Any] = {"row": key}
        try:
            opened = self.rows.open(entry, item["data"])
            record = self._record(key, opened, source)
            count = len(opened.masks or [])
            columns = {name: _column(entry, name, count) for name in (*TEXT_FIELDS, *LABEL_FIELDS)}
        except Unreachable as error:
            return broken(key, str(error), source, FAILED)
        except Exception as error:  # files hold anything, and their readers raise anything
            return broken(key, f"{self.rows.place}, {key}: {said(error)}", source)
        _fill(record, opened, columns, _crowds(entry))
        return record

    def _record(self, key: str, opened: Opened, source: dict) -> Record:
        image: str | bytes
        local = None if opened.data is not None else places.local_of(opened.location)
        if local is not None:
            image, name = str(local), local.relative_to(self.image_root).as_posix()
        else:
            image = opened.data if opened.data is not None else _fetched(opened.location)
            name = content_name(image)
            source["image"] = opened.image
        return Record(key, image, name, _size(opened, image), source=source)


@dataclass(frozen=True)
class LinesSource(ReadsRows):
    """JSON lines with `image`, `mask_rles` and, where there are any, `captions` and `categories`.

    Attributes:
        path: the file.
        images: folder that the lines' image paths start from; none: that of the file.
    """

    path: str = ""
    images: str | None = None

    def __post_init__(self):
        if not Path(self.path).is_file():
            raise FileNotFoundError(
                f"expected a file of JSON lines as source.path, got {self.path!r}"
            )
        if self.images is not None and not Path(self.images).is_dir():
            raise FileNotFoundError(f"expected a folder as source.images, got {self.images!r}")

    @cached_property
    def rows(self) -> JsonLines:
        """Opens the file."""
        place = places.absolute(self.path)
        images = None if self.images is None else places.absolute(self.images)
        return JsonLines(place, [place], place.rpartition("/")[0], images)


@dataclass(frozen=True)
class RowsSource(ReadsRows):
    """Whatever `perceptiondlm caption-dataset` reads, recognized by its files.

    Attributes:
        path: folder, pattern, file, or a URL of one.
        masks: region masks of a folder's images.
        images: folder that images' paths start from, for files that name images.
        recursive: look into subfolders, too.
    """

    path: str = ""
    masks: list[str] = field(default_factory=list)
    images: str | None = None
    recursive: bool = False

    def __post_init__(self):
        if not self.path:
            raise ValueError("expected source.path, got none")
        rows = self.rows
        if isinstance(rows, ImageFolder) and rows.sources is None:
            raise ValueError(f"expected source.masks with the images of {self.path}, got none")
        # Which say more of a region than a row does.
        for cls, kind in ((Sa1bFolder, "sa1b"), (PanopticAnnotations, "panoptic")):
            if isinstance(rows, cls):
                raise ValueError(f"expected source.kind {kind} for {self.path}, got rows")

    @cached_property
    def rows(self) -> dataset_sources.Source:
        """Recognizes the source."""
        options = {"masks": self.masks, "image_root": self.images, "recursive": self.recursive}
        return open_source(self.path, **options)


def content_name(data: bytes) -> str:
    """Names an image without a path of its own: two names are equal where the bytes are."""
    with Image.open(io.BytesIO(data)) as image:
        suffix = {"JPEG": "jpg", "MPO": "jpg"}.get(image.format, image.format.lower())
    return f"{hashlib.sha256(data).hexdigest()[:24]}.{suffix}"


def _fetched(location: str) -> bytes:
    try:
        return places.read_place(location)
    except FileNotFoundError:
        raise
    except Exception as error:  # of any file system's own package
        raise Unreachable(f"expected an image at {location}, got {said(error)}") from error


def _size(opened: Opened, image: str | bytes) -> list[int]:
    """Returns [width, height] as the run lengths have it, or else as the image does."""
    for mask in opened.masks or []:
        sides = mask.get("size") if isinstance(mask, dict) else None
        if isinstance(sides, list) and [type(side) for side in sides] == [int, int]:
            return sides[::-1]
    return list(load_image(image).size)


# What a row says of its regions.


def _column(entry: dict, name: str, count: int) -> list:
    """Returns one value for each mask: None where a row does not have the field."""
    column = entry.get(name)
    if column is None:
        return [None] * count
    if not isinstance(column, list) or len(column) != count:
        got = len(column) if isinstance(column, list) else type(column).__name__
        raise ValueError(f"expected {name} for each of {count} masks, got {got}")
    return column


def _crowds(entry: dict) -> set[int]:
    """Returns the numbers of COCO's annotations that are of many things at once."""
    found = enumerate(entry.get("annotations") or [])
    return {i for i, each in found if isinstance(each, dict) and each.get("iscrowd")}


def _fill(record: Record, opened: Opened, columns: dict[str, list], crowds: set[int]):
    """Adds the regions of a row, broken ones to those that are dropped."""

    def drop(key: str, rule: str, reason: str, category: str | None = None):
        region = Region(key, mask=None, category=category)
        record.dropped.append(Dropped(region, READ, rule, reason))

    named = {problem.region: problem.reason for problem in opened.problems}
    for i, mask in enumerate(opened.masks or []):
        label = opened.labels[i]
        if i in crowds:
            drop(str(i), "crowd", "expected one object, got a segment of many (iscrowd)", label)
            continue
        region = Region(str(i), _run_lengths(mask, record.size), category=label)
        region.caption, region.score = columns["captions"][i], columns["scores"][i]
        if mask is None:
            drop(str(i), "broken region", named[i], label)
        else:
            add_region(record, region)

    for number, problem in enumerate(p for p in opened.problems if p.region is None):
        drop(f"#{number}", "broken region", problem.reason)
    if not record.regions and not record.dropped:
        drop("*", "no regions", "expected a region in the image, got none")


def _run_lengths(mask, size: list[int]):
    """Turns boxes and polygons into run lengths; leaves all else to `add_region`."""
    if mask is None or (isinstance(mask, dict) and "counts" in mask):
        return mask
    try:
        return encode_rle(np.asarray(load_mask(mask, tuple(size))) > 0)
    except ValueError:
        return mask  # which is refused with its reason there
