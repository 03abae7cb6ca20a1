"""From what a person paints, writes or uploads to region masks; and examples to start from."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..image_processing_perceptiondlm import load_mask
from .drawing import PALETTE, colour_of
from .serving_limits import Limits, decode_mask, expect_masks, read_mask

PAINT = 0.7  # opacity of the brush: what lies below is still seen
CLOSE = 40  # largest difference of a channel from the brush's colour; beyond are blended edges
OPAQUE = 96  # least alpha of a painted pixel
SPECK = 0.02  # of a region's largest sibling: smaller leftovers of a colour are no region
EXAMPLE_SEEDS = (7, 11, 23, 42)
NUMBER = re.compile(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, eq=False)
class PaintedRegion:
    """A mask, non-zero inside, and the colour that a person knows it by."""

    mask: Image.Image
    colour: tuple[int, int, int]


def painted_regions(layers: Sequence[Image.Image | None]) -> list[PaintedRegion]:
    """A region for each brush colour on each layer (RGBA)."""
    regions = []
    for layer in layers:
        if layer is not None and layer.getchannel("A").getbbox() is not None:
            regions += _regions_of_layer(np.asarray(layer))
    return regions


def _regions_of_layer(pixels: np.ndarray) -> list[PaintedRegion]:
    opaque = pixels[..., 3] >= OPAQUE
    found = []
    for colour in PALETTE:
        away = np.abs(pixels[..., :3].astype(np.int16) - np.array(colour, np.int16)).max(-1)
        found.append(opaque & (away <= CLOSE))
    largest = max(int(mask.sum()) for mask in found)
    return [
        PaintedRegion(Image.fromarray(mask.astype(np.uint8) * 255), colour)
        for mask, colour in zip(found, PALETTE, strict=True)
        if mask.sum() > SPECK * largest
    ]


def written_masks(text: str, size: tuple[int, int], limits: Limits) -> list[Image.Image]:
    """Masks from boxes, four numbers a line, or from JSON: a list of what `load_mask` takes."""
    text = text.strip()
    if not text:
        return []
    items = _json_masks(text) if text[0] in "[{" else [_box(line) for line in _lines(text)]
    expect_masks(len(items), size, limits)
    return [
        _numbered(k, lambda item=item, k=k: read_mask(item, size, f"region {k}", limits), size)
        for k, item in enumerate(items, 1)
    ]


def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line]


def _box(line: str) -> list[float]:
    numbers = [float(number) for number in NUMBER.findall(line)]
    if len(numbers) != 4:
        raise ValueError(f"expected a box as x0, y0, x1, y1, got {line[:60]!r}")
    return numbers


def _json_masks(text: str) -> list:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected boxes, one a line, or JSON, got: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("masks"), list):
        return content["masks"]
    if isinstance(content, dict):
        return [content]
    if content and all(isinstance(value, (int, float)) for value in content):
        return [content]  # one box
    return content


def uploaded_masks(
    paths: Sequence[str | Path], size: tuple[int, int], limits: Limits
) -> list[Image.Image]:
    """Masks from picture files, in the order of the files."""
    expect_masks(len(paths), size, limits)
    masks = []
    for path in map(Path, paths):
        if path.stat().st_size > limits.body_bytes:
            raise ValueError(f"expected {path.name} of at most {limits.body_bytes >> 20} MiB")
        name = f"the mask {path.name[:60]}"
        mask = decode_mask(path.read_bytes(), name, limits)
        masks.append(_numbered(name, lambda mask=mask: mask, size))
    return masks


def _numbered(name, read, size: tuple[int, int]) -> Image.Image:
    try:
        return load_mask(read(), size)
    except ValueError as error:
        prefix = name if isinstance(name, str) else f"region {name}"
        raise ValueError(f"{prefix}: {error}") from error


def with_colours(
    painted: Sequence[PaintedRegion], others: Sequence[Image.Image]
) -> list[PaintedRegion]:
    """All regions, painted ones first; each with a colour of its own while there are enough."""
    regions, used = [], set()
    for mask, own in [(r.mask, r.colour) for r in painted] + [(mask, None) for mask in others]:
        colour = own if own not in used else None
        if colour is None:
            free = [c for c in PALETTE if c not in used and c not in {r.colour for r in painted}]
            colour = free[0] if free else colour_of(len(regions))
        used.add(colour)
        regions.append(PaintedRegion(mask, colour))
    return regions


@dataclass(frozen=True, eq=False)
class Example:
    """A picture, its regions as masks, and a question."""

    image: Image.Image
    masks: list[Image.Image]
    question: str

    def layers(self) -> list[Image.Image]:
        """The regions as painted by hand, all on one layer."""
        layer = Image.new("RGBA", self.image.size)
        for k, mask in enumerate(self.masks):
            colour = (*colour_of(k), round(255 * PAINT))
            layer.paste(colour, (0, 0), mask.point([0] + [255] * 255))
        return [layer]


def examples() -> list[Example]:
    """Synthetic scenes; none where the training code is not installed."""
    try:
        from ..training.scenes import render_scene
    except ImportError:
        return []
    made = []
    for seed in EXAMPLE_SEEDS:
        scene = render_scene(seed, "heldout")
        things = scene.objects[: len(PALETTE)]
        masks = [Image.fromarray(thing.mask.astype(np.uint8) * 255) for thing in things]
        question = scene.questions[0].question if scene.questions else ""
        made.append(Example(scene.image, masks, question))
    return made
