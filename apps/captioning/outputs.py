"""Writes captions as text, JSON, JSON lines or COCO, in files that are whole or not there.

A record is a dict of what one image gave: its name and size, and its `regions` or `answers`.

Bytes of a file name that are not UTF-8 are escaped in JSON, `\\udcff` for the byte FF, as Python
carries them: `os.fsencode(record["image"])` is the name. As text, a name with such bytes or with
control characters, or one that begins with a quotation mark, stands as a JSON string.
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...common.files import GrowingFile
from ...common.json_text import ascii_json, encode_json
from ...image_masks import encode_rle
from ...regions.region_source import RegionSource
from .results import Answers, RegionCaptions

SUFFIXES = {".txt": "text", ".json": "json", ".jsonl": "jsonl"}
SAVE_SECONDS = 20  # between rewrites of a growing file
UNPRINTABLE = re.compile('^"|[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')


def record_of(
    name: str,
    result: RegionCaptions | Answers,
    sources: Sequence[RegionSource] = (),
    with_masks: bool = False,
) -> dict:
    """Returns one image's results, ready for JSON.

    Each region says where its mask came from, and on request has the mask as COCO RLE.
    """
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
    """Writes for people: the image's name, then its numbered captions or its answers."""
    return "\n".join(f"{_name_line(r['image'])}\n" + "".join(_text_lines(r)) for r in records)


def _name_line(name: str) -> str:
    return json.dumps(name) if UNPRINTABLE.search(name) else name


def _text_lines(record: dict) -> list[str]:
    if "answers" in record:
        return [f"  {a['question']}\n    {a['answer']}\n" for a in record["answers"]]
    width = len(str(len(record["regions"])))
    return [f"  {r['region']:>{width}}  {r['caption']}\n" for r in record["regions"]]


def as_json(records: Sequence[dict]) -> str:
    """Writes one list of records."""
    return json.dumps(list(records), indent=1, ensure_ascii=False) + "\n"


def as_json_lines(records: Sequence[dict]) -> str:
    """Writes one record a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def as_coco(records: Sequence[dict]) -> str:
    """Writes COCO annotations with a `caption` each; keeps the ids of a COCO input."""
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

    A file is replaced whole, and only by a finished run that has something to say; until then what
    there is is saved every `SAVE_SECONDS`, beside the file if there was one already.

    Attributes:
        records: what was taken so far.
        place: the file in which they were saved last, if any.
    """

    def __init__(self, kind: str, path: Path | None):
        self.kind = kind
        self.file = None if path is None else GrowingFile(path)
        self.streams = path is None and kind in STREAMED
        self.place: Path | None = None
        self.records: list[dict] = []
        self.saved = time.monotonic()

    def add(self, name: str, result, sources: Sequence[RegionSource] = ()):
        """Takes one image's results."""
        record = record_of(name, result, sources, with_masks=self.kind == "coco")
        if self.streams:
            self.print([record], before="\n" if self.records and self.kind == "text" else "")
        self.records.append(record)
        if self.file is not None and time.monotonic() - self.saved > SAVE_SECONDS:
            with contextlib.suppress(OSError):  # the last attempt counts
                self.place = self.file.save(self._data())
            self.saved = time.monotonic()

    def close(self, finished: bool = True):
        """Writes what there is; a file that was there stays if the run did not finish."""
        if self.file is None:
            if not self.streams:
                self.print(self.records)
        elif self.records and finished:
            self.file.finish(self._data())
            self.place = self.file.path
        elif self.records:
            self.place = self.file.save(self._data())

    def _data(self) -> bytes:
        return encode_json(self._render(self.records))

    def _render(self, records: Sequence[dict]) -> str:
        return FORMATS[self.kind](records)

    def print(self, records: Sequence[dict], before: str = ""):
        """Prints records on stdout, escaping what its encoding lacks."""
        text = before + self._render(records)
        encoding = sys.stdout.encoding or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            text = ascii_json(text) if self.kind != "text" else text
            text = text.encode(encoding, "backslashreplace").decode(encoding)
        sys.stdout.write(text)
        sys.stdout.flush()


def format_of(path: Path | None, kind: str | None) -> str:
    """Returns the format asked for, or the one that a file's name says, or text.

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
    """Encodes a mask, non-zero inside, as compressed COCO RLE."""
    return encode_rle(np.asarray(mask))


def _coco_region(region: dict) -> dict:
    x0, y0, x1, y1 = region["box"]
    return {
        "caption": region["caption"],
        "segmentation": region["segmentation"],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": region["area"],
        "iscrowd": 0,
        "score": region["score"],
    }


def _keeps_ids(records: Sequence[dict]) -> bool:
    """Whether every region has ids of its own from a COCO file, none of them twice."""
    given = [[r.get("annotation", {}) for r in record["regions"]] for record in records]
    ids = [annotation.get("id") for own in given for annotation in own]
    images = [own[0].get("image_id") for own in given]
    return None not in ids + images and _distinct(ids) and _distinct(images)


def _distinct(values: list) -> bool:
    return len(set(values)) == len(values)
