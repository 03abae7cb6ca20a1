"""Turns finished records into lines of ParaCaption's form, which `perceptiondlm train` reads."""

import os
import shutil
from pathlib import Path

from ..common.files import write_bytes
from ..configuration_perceptiondlm import path_inside
from .records import Record, Region, Stage, drop_all, drop_where

IMAGES = "images"  # folder of the linked images


class KeepCaptioned(Stage):
    """Drops what cannot be trained on: regions without a caption, and images that are not there."""

    name = "output"

    def __call__(self, records: list[Record]) -> list[Record]:
        for record in records:
            drop_where(record, self.name, "no caption", _without_caption)
            if isinstance(record.image, str) and not os.path.isfile(record.image):
                reason = f"expected an image at {record.image}, found none"
                drop_all(record, self.name, "image", reason)
        return records


def _without_caption(region: Region) -> str | None:
    if region.caption is not None and region.caption.strip():
        return None
    return f"expected a caption, got {region.caption!r}"


def lines_of(record: Record, max_regions: int, image: str) -> list[dict]:
    """Returns a record's regions as lines of at most so many, of nearly equal size, in order.

    Args:
        record: with a caption for each region.
        max_regions: of a line.
        image: what the lines call the image.
    """
    count = len(record.regions)
    num_lines = -(-count // max_regions)
    ends = [count * k // num_lines for k in range(num_lines + 1)] if count else []
    return [
        _line(record, record.regions[start:end], image)
        for start, end in zip(ends, ends[1:], strict=False)
    ]


def _line(record: Record, regions: list[Region], image: str) -> dict:
    return {
        "image": image,
        "mask_rles": [region.mask for region in regions],
        "captions": [region.caption for region in regions],
        "scores": [region.score for region in regions],
        "categories": [region.category or region.core for region in regions],
        "mask_ious": [region.mask_iou for region in regions],
        "regions": [region.key for region in regions],
        "key": record.key,
        "source": record.source,
    }


def dropped_rows(record: Record) -> list[dict]:
    """Returns a row for each dropped region: where it was, why it went, what it had so far."""
    return [
        {
            "key": record.key,
            "image": record.name,
            "region": entry.region.key,
            "stage": entry.stage,
            "rule": entry.rule,
            "reason": entry.reason,
            "category": entry.region.category,
            "caption": entry.region.caption,
            "core": entry.region.core,
            "source": record.source,
        }
        for entry in record.dropped
    ]


def link_image(record: Record, folder: Path) -> str:
    """Puts a record's image below the output folder; returns its path from there.

    It is a hard link where the file system has them, so it takes no room; else a copy.
    """
    target = path_inside(folder / IMAGES, record.name)
    if isinstance(record.image, bytes):
        write_bytes(target, record.image)
        return target.relative_to(folder).as_posix()

    image = os.path.realpath(record.image)
    if not _is_same(image, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(image, temporary)
        except OSError:  # another file system, or one without links
            shutil.copy2(image, temporary)
        os.replace(temporary, target)
    return target.relative_to(folder).as_posix()


def _is_same(image: str, target: Path) -> bool:
    if not target.exists():
        return False
    one, other = os.stat(image), os.stat(target)
    is_copy = (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)
    return os.path.samestat(one, other) or is_copy
