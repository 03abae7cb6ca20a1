"""Writes synthetic data sets in the forms of SA-1B and COCO panoptic, and plays models on them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from perceptiondlm.image_masks import encode_rle
from perceptiondlm.pipelines.captioners import Caption
from perceptiondlm.pipelines.records import Record, Region
from perceptiondlm.scenes.shapes import render_scene
from PIL import Image

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")


def rectangle(size: tuple[int, int], x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """A mask (H, W) of an image of (width, height), true in columns x0..x1-1, rows y0..y1-1."""
    mask = np.zeros(size[::-1], dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def record_of(*masks: np.ndarray, **fields) -> Record:
    """A record of these masks, named a, b, c...; fields give one value for each region."""
    height, width = masks[0].shape
    regions = [
        Region("abcdefgh"[i], encode_rle(mask), **{name: row[i] for name, row in fields.items()})
        for i, mask in enumerate(masks)
    ]
    return Record("image", "image.png", "image.png", [width, height], regions)


def kept(record: Record) -> str:
    return "".join(region.key for region in record.regions)


def rules(record: Record) -> dict[str, str]:
    return {entry.region.key: entry.rule for entry in record.dropped}


def write_sa1b(folder: Path, seeds, *, extra: int = 0) -> dict[str, int]:
    """Writes scenes as SA-1B does, each with its objects and `extra` specks; counts by file."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for seed in seeds:
        scene, name = render_scene(seed), f"sa_{seed}"
        scene.image.save(folder / f"{name}.jpg", quality=95)
        width, height = scene.image.size
        masks = [thing.mask for thing in scene.objects]
        masks += [rectangle((width, height), 2 * i, 0, 2 * i + 1, 2) for i in range(extra)]
        annotations = [
            {
                "id": 100 * seed + i,
                "segmentation": encode_rle(mask),
                "area": int(mask.sum()),
                "stability_score": 0.98,
                "predicted_iou": 0.95,
            }
            for i, mask in enumerate(masks)
        ]
        entry = {"image_id": seed, "width": width, "height": height, "file_name": f"{name}.jpg"}
        content = {"image": entry, "annotations": annotations}
        (folder / f"{name}.json").write_text(json.dumps(content))
        counts[name] = len(masks)
    return counts


def write_panoptic(folder: Path, seeds) -> int:
    """Writes scenes as COCO panoptic does, the shapes as categories; counts the segments."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    images, annotations, count = [], [], 0
    for seed in seeds:
        scene = render_scene(seed)
        width, height = scene.image.size
        scene.image.save(folder / "images" / f"{seed}.png")
        ids, segments = np.zeros((height, width), np.int64), []
        for i, thing in enumerate(scene.objects):
            segment = 70_000 * (i + 1) + 300 + seed  # all three bytes of a color
            ids[thing.mask] = segment
            category = 1 + SHAPES.index(thing.attributes["shape"])
            segments.append({"id": segment, "category_id": category, "iscrowd": 0})
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1)
        Image.fromarray(colors.astype(np.uint8)).save(folder / "masks" / f"{seed}.png")
        size = {"width": width, "height": height}
        images.append({"id": seed, "file_name": f"{seed}.png", **size})
        annotations.append(
            {"image_id": seed, "file_name": f"{seed}.png", "segments_info": segments}
        )
        count += len(segments)
    categories = [{"id": i, "name": n, "isthing": 1} for i, n in enumerate(SHAPES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "panoptic.json").write_text(json.dumps(content))
    return count


@dataclass
class Played:
    """Captions scenes with the truth, except for the regions of some numbers."""

    wrong: dict[int, str | None]
    score: float = -0.5

    def __post_init__(self):
        self.number = 0

    def __call__(self, asked):
        return [[self._caption(image, mask) for mask in masks] for image, masks in asked]

    def _caption(self, image, mask) -> Caption:
        self.number += 1
        text = self.wrong.get(self.number, f"{caption_of(image, mask)} number {self.number}")
        return Caption(text, self.score, None if text else "played")


def caption_of(image: Image.Image, mask: np.ndarray) -> str:
    """The true caption of a scene's object, found by its mask."""
    return _truth(image.size, mask.tobytes())


def _truth(size, mask: bytes, _known={}) -> str:  # noqa: B006  (filled once, for all tests)
    if not _known:
        for seed in range(12):
            scene = render_scene(seed)
            for thing in scene.objects:
                _known[scene.image.size, thing.mask.tobytes()] = thing.caption
    return _known[size, mask]


@dataclass(frozen=True)
class Found:
    """What a played segmenter finds."""

    mask: np.ndarray
    score: float | None = 0.9


class PlayedSegmenter:
    """Gives by name what it was told to find, and notes what it was asked for."""

    def __init__(self, found: dict[str, list[Found]]):
        self.found = found
        self.asked: list[str] = []

    def __call__(self, image, text: str) -> list[Found]:
        self.asked.append(text)
        return [replace(one) for one in self.found.get(text, [])]
