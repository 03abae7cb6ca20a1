"""Captions opened rows: the stage that holds the model, and runs wherever a scheduler puts it."""

import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..common.fingerprints import weights_fingerprint
from ..common.loading import default_device, load_model
from ..common.region_images import RegionImage, caption_regions, read_regions
from ..image_loading import is_url, load_image, open_encoded
from ..image_masks import encode_rle
from ..regions.files import MAX_PIXELS, open_image
from . import places
from .dataset_sources import MASK, NO_REGIONS, Opened, Problem


@dataclass(frozen=True)
class CaptionOptions:
    """Says which model captions, and how.

    Attributes:
        model, subfolder, revision, device, dtype, quantize: as for `load_model`.
        instruction: instead of the checkpoint's own.
        batch_regions: regions in one call of the model, about.
        decoding: options of `diffusion_generate`.
    """

    model: str
    subfolder: str | None = None
    revision: str | None = None
    device: str | None = None
    dtype: str = "auto"
    quantize: str | None = None
    instruction: str | None = None
    batch_regions: int = 24
    decoding: dict[str, Any] = field(default_factory=dict)


@dataclass
class Decoded:
    """Holds an image and its region masks as the model takes them, and its row."""

    row: dict
    read: RegionImage
    rles: list[dict]


class CaptionImages:
    """Captions rows of `Opened` values; loads the model once.

    Called with rows, it returns as many, in their order: each has `mask_rles`, `captions`, `scores`
    and `labels` of the regions that were captioned, and `problems` of what was not.
    """

    def __init__(self, options: CaptionOptions):
        self.options = options
        device = options.device or default_device()
        self.model, self.processor = load_model(
            options.model,
            options.subfolder,
            options.dtype,
            device,
            revision=options.revision,
            quantize=options.quantize,
        )
        self.weights = weights_fingerprint(self.model)

    def __call__(self, rows: Sequence[dict]) -> list[dict]:
        decoded = []
        for row in rows:
            started = time.perf_counter()
            if (one := self._decode(row)) is not None:
                decoded.append(one)
            row["decode_seconds"] = time.perf_counter() - started
        for batch in pack(decoded, self.options.batch_regions):
            self._caption(batch)
        return [self._finished(row) for row in rows]

    def _decode(self, row: dict) -> Decoded | None:
        """Decodes a row; None, with its problems in the row, where nothing can be captioned."""
        if any(problem["kind"] != MASK for problem in row["problems"]):
            return None
        # A mask that is none was named when its row was opened.
        masks = {n: mask for n, mask in enumerate(row["masks"] or []) if mask is not None}
        found = read_regions(lambda: decode_image(row["location"], row["data"]), masks)
        if found.error is not None:
            _add(row, Problem("image", said(found.error)))
            return None

        row["size"] = list(found.image.size)
        for number, error in found.errors.items():
            _add(row, Problem(MASK, said(error), number))
        labels = [row["labels"][number] for number in found.masks]
        rles = [_compressed(masks[number], filled) for number, filled in found.masks.items()]
        row["labels"] = labels
        if not found.masks:
            had_some = bool(row["problems"])
            kind = "regions" if had_some else NO_REGIONS
            _add(row, Problem(kind, "expected a region that can be used, got none"))
            return None
        return Decoded(row, found, rles)

    def _caption(self, batch: Sequence[Decoded]):
        """Captions a batch; where it fails, each of its images by itself."""
        started = time.perf_counter()
        try:
            output = caption_regions(
                self.model,
                self.processor,
                [one.read for one in batch],
                prompts=self.options.instruction,
                **self.options.decoding,
            )
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    self._caption([one])
            else:
                _add(batch[0].row, Problem("caption", said(error)))
            return

        seconds = (time.perf_counter() - started) / len(batch)
        for one, texts, scores in zip(batch, output.texts, output.scores, strict=True):
            one.row |= {"mask_rles": one.rles, "captions": texts, "scores": scores}
            one.row["caption_seconds"] = seconds

    def _finished(self, row: dict) -> dict:
        empty = {"mask_rles": [], "captions": [], "scores": [], "caption_seconds": 0.0}
        labels = row["labels"] if row.get("captions") else []
        return {**empty, **row, "labels": labels, "weights": self.weights}


class FindRegions:
    """Finds the regions of rows that have no masks, by a segmenter that is loaded once."""

    def __init__(self, name: str, device: str | None = None):
        from ..regions.segmenters import load_segmenter

        self.segmenter = load_segmenter(name, device)

    def __call__(self, rows: Sequence[dict]) -> list[dict]:
        for row in rows:
            if row["masks"] is None and not row["problems"]:
                started = time.perf_counter()
                self._find(row)
                row["read_seconds"] += time.perf_counter() - started
        return list(rows)

    def _find(self, row: dict):
        try:
            found = self.segmenter(decode_image(row["location"], row["data"]))
        except Exception as error:
            _add(row, Problem("segment", said(error)))
            return
        row["masks"] = [encode_rle(region.mask) for region in found]
        row["labels"] = [region.label for region in found]


def pack(decoded: Sequence[Decoded], max_regions: int) -> Iterator[list[Decoded]]:
    """Yields batches of about so many regions, of images with similar numbers of them."""
    batch: list[Decoded] = []
    count = 0
    for one in sorted(decoded, key=lambda one: -len(one.rles)):
        if batch and count + len(one.rles) > max_regions:
            yield batch
            batch, count = [], 0
        batch.append(one)
        count += len(one.rles)
    if batch:
        yield batch


def open_row(source, row: dict, with_bytes: bool) -> dict:
    """Opens a listed row; what is broken in it becomes a problem of the row."""
    started = time.perf_counter()
    try:
        opened = source.open(json.loads(row["entry"]), row["data"])
        if with_bytes and opened.data is None:
            opened.data = places.read_place(opened.location)
        json.dumps(opened.masks)
    except Exception as error:  # files hold anything, and their readers raise anything
        opened = Opened(row["id"], problems=[Problem("read", said(error))])
    problems = [asdict(problem) for problem in opened.problems]
    seconds = time.perf_counter() - started
    return {**vars(opened), "id": row["id"], "problems": problems, "read_seconds": seconds}


def decode_image(location: str | None, data: bytes | None) -> Image.Image:
    """Decodes an image, upright and RGB, from its bytes or from where it lies."""
    if data is None and places.local_of(location) is not None:
        return open_image(str(places.local_of(location)))
    if data is None and is_url(location):
        return open_image(location)
    data = places.read_place(location) if data is None else data
    image = open_encoded(io.BytesIO(data))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"expected {MAX_PIXELS:,} pixels at most, got {image.width}x{image.height}"
        )
    return load_image(image)


def _compressed(mask, filled: Image.Image) -> dict:
    """Returns a mask as run lengths; those that came so stay as they are."""
    if isinstance(mask, dict) and isinstance(mask.get("counts"), str):
        return {"size": list(mask["size"]), "counts": mask["counts"]}
    return encode_rle(np.asarray(filled))


def _add(row: dict, problem: Problem):
    row["problems"] = [*row["problems"], asdict(problem)]


def said(error: Exception) -> str:
    """Returns what an error says, in a line; a missing field by its name."""
    if isinstance(error, KeyError):
        return f"expected a field {error}, got none"
    is_plain = isinstance(error, (ValueError, OSError)) and str(error)
    text = str(error) if is_plain else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500]
