"""Reads records from what data sets are published as: SA-1B and COCO panoptic.

Both say more of a region than `caption-dataset` needs (its id, its scores, whether it is a crowd);
all other sources are read through those of `caption-dataset`, in `row_sources`.

A source lists its items, small and picklable, without reading them; `read` turns one into a record.
An entry that is broken is a region dropped by the stage "read"; a broken file is a record of one
such region, so that nothing goes missing unseen.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from ..common.json_text import read_json
from ..configuration_perceptiondlm import path_inside
from ..image_masks import decode_rle, encode_rle
from ..regions.coco import segment_ids
from ..regions.files import open_mask_file
from .captioning_stage import said
from .records import Dropped, Record, Region, without_loaded

READ = "read"  # the name of the first stage
FIELD_TYPES = {
    "category": (str,),
    "caption": (str,),
    "score": (float, int),
    "stability": (float, int),
    "predicted_iou": (float, int),
}


class Source(Protocol):
    """Where records come from."""

    def items(self) -> Iterator:
        """Yields what `read` takes, a plain value for each record, always in the same order."""

    def read(self, item) -> Record:
        """Reads the record of an item; what is broken in it is dropped, never raised."""


def broken(key: str, reason: str, source: dict, rule: str = "broken record") -> Record:
    """Returns the record of an item that could not be read at all."""
    gone = Dropped(Region(key="*", mask=None), READ, rule, reason)
    return Record(key, image="", name="", size=[0, 0], dropped=[gone], source=source)


def add_region(record: Record, region: Region):
    """Adds a region to a record; one that is broken, or empty, to those that are dropped.

    Masks of other RLE forms become compressed ones with text as counts.
    """
    try:
        if any(region.key == other.key for other in record.regions):
            raise ValueError(f"expected each region's id once, got {region.key} again")
        for name, types in FIELD_TYPES.items():
            value = getattr(region, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, types)):
                raise ValueError(f"expected {name} as {types[0].__name__}, got {value!r:.80}")
        (region.caption or "").encode()  # a lone surrogate is no text: a ValueError, too
        region.mask = plain_rle(region.mask, record.size)
    except ValueError as error:
        gone = Region(region.key, mask=None)
        record.dropped.append(Dropped(gone, READ, "broken region", str(error)))
        return
    record.regions.append(region)


def plain_rle(rle, size: list[int]) -> dict:
    """Returns a checked RLE of an image of [width, height] as `encode_rle` would write it.

    Raises ValueError for what is none, is of another size, or has no pixel inside.
    """
    if not isinstance(rle, dict) or not {"size", "counts"} <= set(rle):
        raise ValueError(f"expected a COCO RLE with size and counts, got {rle!r:.80}")
    mask = decode_rle(rle, tuple(size))
    if not mask.any():
        raise ValueError("expected a region mask with a pixel inside, got an empty one")
    counts = rle["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    return {"size": size[::-1], "counts": counts} if isinstance(counts, str) else encode_rle(mask)


def _side(value, name: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"expected {name} as a number of pixels, got {value!r:.80}")
    return value


# SA-1B: `sa_1.jpg` beside `sa_1.json`.


@dataclass(frozen=True)
class Sa1bSource:
    """A folder, and those in it, of SA-1B's pairs of images and annotations.

    Attributes:
        path: the folder.
        pattern: of the annotation files' names.
    """

    path: str = ""
    pattern: str = "sa_*.json"

    def __post_init__(self):
        _expect_folder("source.path", self.path)

    @property
    def image_root(self) -> Path:
        return Path(self.path)

    def items(self) -> Iterator[str]:
        """Yields the annotation files' paths below the folder, sorted."""
        found = sorted(path.relative_to(self.path) for path in Path(self.path).rglob(self.pattern))
        if not found:
            raise ValueError(f"expected {self.pattern} files in {self.path}, found none")
        yield from map(str, found)

    def read(self, item: str) -> Record:
        """Reads the record of an annotation file."""
        path, key = Path(self.path, item), str(Path(item).with_suffix(""))
        try:
            record, annotations = self._open(path, key)
        except (ValueError, KeyError, TypeError, OSError) as error:
            return broken(key, f"{path}: {said(error)}", {"file": item})
        for i, annotation in enumerate(annotations):
            values = annotation if isinstance(annotation, dict) else {}
            region = Region(str(values.get("id", f"#{i}")), values.get("segmentation"))
            scores = (values.get(name) for name in ("stability_score", "predicted_iou"))
            region.stability, region.predicted_iou = scores
            add_region(record, region)
        return record

    def _open(self, path: Path, key: str) -> tuple[Record, list]:
        content = read_json(path)
        image, annotations = content["image"], content["annotations"]
        if not isinstance(annotations, list):
            raise ValueError(f"expected a list of annotations, got {type(annotations).__name__}")
        size = [_side(image.get(name), name) for name in ("width", "height")]
        file = path_inside(path.parent, image["file_name"], links=True)
        source = {"file": path.name, "image_id": image.get("image_id")}
        name = str(file.relative_to(self.path))
        return Record(key, str(file), name, size, source=source), annotations


# COCO panoptic, COCONut: one JSON file, a PNG of segment ids for each image.


@dataclass(frozen=True)
class PanopticSource:
    """A panoptic data set: COCO's own, and COCONut.

    Attributes:
        annotations: the JSON file.
        masks: folder of the PNG files.
        images: folder of the images.
        stuff: take segments of categories that are no things (sky, grass), too.
    """

    annotations: str = ""
    masks: str = ""
    images: str = ""
    stuff: bool = True

    def __post_init__(self):
        for name in ("masks", "images"):
            _expect_folder(f"source.{name}", getattr(self, name))
        if not Path(self.annotations).is_file():
            raise FileNotFoundError(
                f"expected a panoptic JSON file as source.annotations, got {self.annotations!r}"
            )

    __getstate__ = without_loaded

    @property
    def image_root(self) -> Path:
        return Path(self.images)

    @cached_property
    def _content(self) -> dict:
        content = read_json(self.annotations)
        lists = ("images", "annotations", "categories")
        if not isinstance(content, dict) or not all(
            isinstance(content.get(name), list)
            and all(isinstance(entry, dict) for entry in content[name])
            for name in lists
        ):
            raise ValueError(f"expected lists of {', '.join(lists)} in {self.annotations}")
        return content

    @cached_property
    def _categories(self) -> dict:
        return {entry.get("id"): entry for entry in self._content["categories"]}

    def items(self) -> Iterator[dict]:
        """Yields each annotation with its image's entry and the names of its categories."""
        images = {entry.get("id"): entry for entry in self._content["images"]}
        for i, annotation in enumerate(self._content["annotations"]):
            image = images.get(annotation.get("image_id"))
            segments = annotation.get("segments_info")
            ids = {s.get("category_id") for s in segments or [] if isinstance(s, dict)}
            named = [self._categories[found] for found in ids if found in self._categories]
            yield {"number": i, "annotation": annotation, "image": image, "categories": named}

    def read(self, item: dict) -> Record:
        """Reads the record of an annotation."""
        key = f"{Path(self.annotations).stem}:{item['number']}"
        source = {"file": Path(self.annotations).name, "annotation": item["number"]}
        try:
            record, labels = self._open(item, key, source)
            for segment in item["annotation"]["segments_info"]:
                self._add(record, segment, labels, item["categories"])
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            return broken(key, f"{self.annotations}: {said(error)}", source)
        return record

    def _open(self, item: dict, key: str, source: dict) -> tuple[Record, np.ndarray]:
        image, annotation = item["image"], item["annotation"]
        if image is None:
            raise ValueError(
                f"expected the image of an annotation, got {annotation.get('image_id')!r}"
            )
        size = [_side(image.get(name), name) for name in ("width", "height")]
        file = path_inside(self.images, image["file_name"], links=True)

        labels = path_inside(self.masks, annotation["file_name"], links=True)
        labels = segment_ids(open_mask_file(labels), labels.name)
        if list(labels.shape) != size[::-1]:
            got = f"{labels.shape[1]}x{labels.shape[0]}"
            raise ValueError(f"expected segments of {size[0]}x{size[1]} pixels, got {got}")
        source = {**source, "image_id": image.get("id")}
        name = str(file.relative_to(self.images))
        return Record(key, str(file), name, size, source=source), labels

    def _add(self, record: Record, segment: dict, labels: np.ndarray, categories: list[dict]):
        known = {category["id"]: category for category in categories}
        category = known.get(segment.get("category_id"), {})
        mask = labels == segment["id"]
        region = Region(str(segment["id"]), encode_rle(mask), category=category.get("name"))
        if segment.get("iscrowd"):
            reason = "expected one object, got a segment of many (iscrowd)"
            record.dropped.append(Dropped(region, READ, "crowd", reason))
        elif not self.stuff and not category.get("isthing", 1):
            reason = f"expected a thing, got {region.category!r}"
            record.dropped.append(Dropped(region, READ, "stuff", reason))
        else:
            add_region(record, region)


def _expect_folder(name: str, path: str):
    if not path or not os.path.isdir(path):
        raise FileNotFoundError(f"expected a folder as {name}, got {path!r}")
