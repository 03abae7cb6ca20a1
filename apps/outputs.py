"""Captions as text, JSON, JSON lines or COCO, in files that are written whole or not at all.

A record is a dict of what one picture gave: its name and size, and its `regions` or `answers`.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..evaluation.files import write_bytes
from .captioner import Answers, RegionCaptions
from .inputs import RegionSource

SUFFIXES = {".txt": "text", ".json": "json", ".jsonl": "jsonl"}
SAVE_SECONDS = 20  # between rewrites of a growing file


def record_of(
    name: str,
    result: RegionCaptions | Answers,
    sources: Sequence[RegionSource] = (),
    with_masks: bool = False,
) -> dict:
    """One picture's results, ready for JSON; each region with where its mask came from, and, on
    request, the mask as COCO RLE."""
    record = {"image": name, **result.to_dict()}
    if isinstance(result, RegionCaptions):
        for entry, region, source in zip(record["regions"], result.regions, sources, strict=True):
            entry["mask"] = source.origin
            if source.annotation:
                entry["annotation"] = source.annotation
            if with_masks:
                entry["segmentation"] = encode_mask(region.mask)
    return record


def as_text(records: Sequence[dict]) -> str:
    """For people: the picture's name, then its numbered captions or its answers."""
    return "\n".join(f"{r['image']}\n" + "".join(_text_lines(r)) for r in records)


def _text_lines(record: dict) -> list[str]:
    if "answers" in record:
        return [f"  {a['question']}\n    {a['answer']}\n" for a in record["answers"]]
    width = len(str(len(record["regions"])))
    return [f"  {r['region']:>{width}}  {r['caption']}\n" for r in record["regions"]]


def as_json(records: Sequence[dict]) -> str:
    """One list of records."""
    return json.dumps(list(records), indent=1, ensure_ascii=False) + "\n"


def as_json_lines(records: Sequence[dict]) -> str:
    """One record a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def as_coco(records: Sequence[dict]) -> str:
    """COCO annotations with a `caption` each; the ids of a COCO input are kept."""
    keep = _keeps_ids(records)
    images, annotations, categories = [], [], {}
    for number, record in enumerate(records, 1):
        given = record["regions"][0].get("annotation", {})
        image_id = given["image_id"] if keep else number
        name = {"id": image_id, "file_name": Path(record["image"]).name}
        images.append(name | {"width": record["width"], "height": record["height"]})
        for region in record["regions"]:
            given = region.get("annotation", {})
            category = given.get("category_id", 1)
            categories[category] = given.get("category", "region")
            own = given["id"] if keep else len(annotations) + 1
            ids = {"id": own, "image_id": image_id, "category_id": category}
            annotations.append(ids | _coco_region(region))
    kinds = [{"id": i, "name": name} for i, name in categories.items()]
    content = {"images": images, "annotations": annotations, "categories": kinds}
    return json.dumps(content, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[dict]], str]] = {
    "text": as_text,
    "json": as_json,
    "jsonl": as_json_lines,
    "coco": as_coco,
}
STREAMED = ("text", "jsonl")  # formats in which the whole is its records one after another


class CaptionWriter:
    """Sends records to a file, or to stdout, as they come.

    A file is replaced whole, at most every `SAVE_SECONDS` and at the end, so that a reader never
    sees half of one and an interrupted run keeps what was done.
    """

    def __init__(self, kind: str, path: Path | None):
        self.render = FORMATS[kind]
        self.with_masks = kind == "coco"
        self.streams = path is None and kind in STREAMED
        self.path = path
        self.records: list[dict] = []
        self.saved = time.monotonic()

    def add(self, name: str, result, sources: Sequence[RegionSource] = ()):
        """Takes one picture's results."""
        record = record_of(name, result, sources, self.with_masks)
        if self.streams:
            separator = "\n" if self.records and self.render is as_text else ""
            sys.stdout.write(separator + self.render([record]))
            sys.stdout.flush()
        self.records.append(record)
        if self.path is not None and time.monotonic() - self.saved > SAVE_SECONDS:
            self.close()

    def close(self):
        """Writes what there is."""
        if self.path is not None:
            write_bytes(self.path, self.render(self.records).encode())
        elif not self.streams:
            sys.stdout.write(self.render(self.records))
        self.saved = time.monotonic()


def format_of(path: Path | None, kind: str | None) -> str:
    """The format asked for, or the one that a file's name says, or text.

    Raises ValueError for a name that says nothing.
    """
    if kind is not None:
        return kind
    if path is None:
        return "text"
    if path.name.lower().endswith(".coco.json"):
        return "coco"
    if path.suffix.lower() not in SUFFIXES:
        names = ", ".join([*SUFFIXES, ".coco.json"])
        raise ValueError(f"expected a caption file ending in {names}, or --format, got {path}")
    return SUFFIXES[path.suffix.lower()]


def encode_mask(mask) -> dict:
    """A mask, non-zero inside, as compressed COCO RLE."""
    from pycocotools import mask as coco

    array = np.asfortranarray(np.asarray(mask) != 0, dtype=np.uint8)
    rle = coco.encode(array)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def _coco_region(region: dict) -> dict:
    x0, y0, x1, y1 = region["box"]
    return {
        "caption": region["caption"],
        "segmentation": region["segmentation"],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": region["area"],
        "iscrowd": 0,
    }


def _keeps_ids(records: Sequence[dict]) -> bool:
    """Whether every region has ids of its own from a COCO file, none of them twice."""
    given = [[r.get("annotation", {}) for r in record["regions"]] for record in records]
    ids = [annotation.get("id") for own in given for annotation in own]
    images = [own[0].get("image_id") for own in given]
    return None not in ids + images and _distinct(ids) and _distinct(images)


def _distinct(values: list) -> bool:
    return len(set(values)) == len(values)
