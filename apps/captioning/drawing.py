"""Images to look at: regions outlined in color, numbered, with their captions beside or below.

Everything is Pillow's, its bundled font included (Latin letters; pass `font` for other scripts).
Boxes are (x0, y0, x1, y1) in pixels of the drawing, half-open.
"""

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from ...image_processing_perceptiondlm import load_image, load_mask
from .panel import (
    PALETTE,
    PAPER,
    Box,
    Style,
    add_panel,
    answer_texts,
    badge_width,
    color_of,
    contrasting,
    draw_badge,
    one_line,
)
from .results import mask_area

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MIN_SIDE, MAX_SIDE = 720, 1600  # of the image's long side in the drawing
SPIRAL = [(r, k * math.pi / 8) for r in range(1, 40) for k in range(16)]


def draw_regions(
    image,
    masks: Sequence,
    captions: Sequence[str] | None = None,
    *,
    font: str | Path | None = None,
    fill: bool = False,
    min_side: int = MIN_SIDE,
    max_side: int = MAX_SIDE,
) -> Image.Image:
    """Draws an image with each region outlined and numbered, and the captions laid out in full.

    Args:
        image: as for `load_image`; masks: as for `load_mask`, one for each region.
        captions: one for each mask; None draws the regions alone.
        font: a TrueType file, for scripts that the bundled font lacks.
        fill: also tint the regions, which changes the colors that the model saw.
        min_side, max_side: the image is scaled so that its long side lies between them.

    Captions stand beside a tall image and below a wide one; nothing is cut off or overlaps.
    Raises ValueError when there is not a caption for each mask.
    """
    image = load_image(image)
    regions = [load_mask(mask, image.size) for mask in masks]
    if captions is not None and len(captions) != len(regions):
        raise ValueError(
            f"expected a caption for each of {len(regions)} masks, got {len(captions)}"
        )
    image, regions = scale_to(image, regions, min_side, max_side)
    style = Style.fitting(max(image.size), font)
    marked = mark_regions(image, regions, style, fill)
    if captions is None:
        return marked
    return add_panel(marked, [one_line(captions)], style, numbered=True)[0]


def draw_answers(
    image,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    font: str | Path | None = None,
    min_side: int = MIN_SIDE,
    max_side: int = MAX_SIDE,
) -> Image.Image:
    """Draws an image with questions and answers about it; options as for `draw_regions`."""
    image, _ = scale_to(load_image(image), [], min_side, max_side)
    style = Style.fitting(max(image.size), font)
    return add_panel(image, [answer_texts(questions, answers)], style, numbered=False)[0]


def encode_image(image: Image.Image, suffix: str) -> bytes:
    """Encodes a drawing as a file of the kind that `suffix` (".png", ...) names."""
    if suffix.lower() not in SUFFIXES:
        raise ValueError(f"expected a name ending in {', '.join(SUFFIXES)}, got {suffix!r}")
    buffer = io.BytesIO()
    image.save(buffer, SUFFIXES[suffix.lower()], quality=92)
    return buffer.getvalue()


def scale_to(image: Image.Image, regions: list[Image.Image], least: int, most: int):
    """Scales image and masks alike until the long side is within bounds."""
    long_side = max(image.size)
    scale = min(max(long_side, least), most) / long_side
    size = tuple(max(1, round(side * scale)) for side in image.size)
    masks = [region.point([0] + [255] * 255) for region in regions]
    if size == image.size:
        return image, masks
    # a box filter keeps thin regions visible; half of a pixel inside is inside
    kind = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    least_inside = 1 if scale < 1 else 128
    table = [0] * least_inside + [255] * (256 - least_inside)
    masks = [mask.resize(size, kind).point(table) for mask in masks]
    return image.resize(size, Image.Resampling.LANCZOS), masks


def mark_regions(
    image: Image.Image, masks: list[Image.Image], style: Style, fill: bool = False
) -> Image.Image:
    """Outlines and numbers the regions, on request tints them; small ones lie above large ones."""
    marked = image.copy()
    if not masks:
        return marked
    width = max(1, round(style.size / 9))
    areas = [mask_area(mask) for mask in masks]
    large_first = sorted(range(len(masks)), key=lambda i: -areas[i])

    for i in large_first if fill else ():
        tint = Image.new("RGB", image.size, color_of(i))
        marked = Image.composite(Image.blend(marked, tint, 0.36), marked, masks[i])
    for i in large_first:
        _outline(marked, masks[i], color_of(i), width)

    # Numbers come last, so that no region covers one; a line leads to a region far from its own.
    draw = ImageDraw.Draw(marked)
    boxes = place_badges(masks, style, image.size)
    for i, (box, anchor) in enumerate(boxes):
        if not _contains(box, anchor):
            center = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)
            draw.line([center, anchor], fill=PAPER, width=3 * width)
            draw.line([center, anchor], fill=color_of(i), width=width)
    for i, (box, _) in enumerate(boxes):
        draw_badge(draw, box, i + 1, style)
    return marked


def _outline(marked: Image.Image, mask: Image.Image, color, width: int):
    """Draws a colored line inside the region's edge and a white one outside it."""
    left, top, right, bottom = mask.getbbox()
    pad = 2 * width
    window = (left - pad, top - pad, right + pad, bottom + pad)
    hard = mask.crop(window)
    # What a moving mean leaves full, or not empty, is the region eroded, or grown: much faster than
    # filters of the least and the largest value. All are soft, so not jagged.
    eroded = hard.filter(ImageFilter.BoxBlur(width)).point([0] * 255 + [255])
    grown = hard.filter(ImageFilter.BoxBlur(max(1, width // 2))).point([0] + [255] * 255)
    inside, eroded, grown = (m.filter(ImageFilter.GaussianBlur(0.8)) for m in (hard, eroded, grown))
    marked.paste(PAPER, window, ImageChops.subtract(grown, inside))
    marked.paste(color, window, ImageChops.subtract(inside, eroded))


def place_badges(
    masks: list[Image.Image], style: Style, size: tuple[int, int]
) -> list[tuple[Box, tuple[int, int]]]:
    """Places a badge for each region, none over another while the image (width, height) has room.

    Returns for each its box, and the point of the region that it stands for.
    """
    placed: dict[int, Box] = {}
    areas = [mask_area(mask) for mask in masks]
    small_first = sorted(range(len(masks)), key=lambda i: areas[i])  # they have less choice
    anchors = _anchors(masks, small_first)
    for i in small_first:
        width = badge_width(i + 1, style)
        candidates = (_centered(p, width, style.badge, size) for p in _around(anchors[i], style))
        free = (c for c in candidates if not any(_overlap(c, other) for other in placed.values()))
        placed[i] = next(free, None) or _centered(anchors[i], width, style.badge, size)
    return [(placed[i], anchors[i]) for i in range(len(masks))]


def _anchors(masks: list[Image.Image], small_first: list[int]) -> dict[int, tuple[int, int]]:
    """A point for each region, where possible outside the smaller ones that lie above it."""
    above = Image.new("L", masks[0].size)
    anchors = {}
    for i in small_first:
        visible = ImageChops.subtract(masks[i], above)
        anchors[i] = _deepest_point(visible if visible.getbbox() else masks[i])
        above = ImageChops.lighter(above, masks[i])
    return anchors


def _around(point: tuple[int, int], style: Style) -> Iterator[tuple[int, int]]:
    yield point
    for radius, angle in SPIRAL:
        distance = radius * style.badge / 2
        yield (
            round(point[0] + distance * math.cos(angle)),
            round(point[1] + distance * math.sin(angle)),
        )


def _centered(point: tuple[int, int], width: int, height: int, size: tuple[int, int]) -> Box:
    """A box around a point, moved into the image."""
    left = min(max(0, point[0] - width // 2), max(0, size[0] - width))
    top = min(max(0, point[1] - height // 2), max(0, size[1] - height))
    return left, top, left + width, top + height


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _contains(box: Box, point: tuple[int, int]) -> bool:
    return box[0] <= point[0] < box[2] and box[1] <= point[1] < box[3]


def _deepest_point(mask: Image.Image) -> tuple[int, int]:
    """A point far inside the region: what erosion leaves last of a small copy of it."""
    left, top, right, bottom = mask.getbbox()
    width, height = right - left, bottom - top
    scale = min(1.0, 96 / max(width, height))
    small = mask.crop((left, top, right, bottom)).resize(
        (max(1, round(width * scale)), max(1, round(height * scale)))
    )
    small = small.point([0] * 96 + [255] * 160)

    # Framed, so that erosion also begins at the edges of the box.
    framed = Image.new("L", (small.width + 2, small.height + 2))
    framed.paste(small, (1, 1))
    kept = framed if framed.getbbox() else framed.point([255] * 256)
    while (eroded := kept.filter(ImageFilter.MinFilter(3))).getbbox():
        kept = eroded

    # Of what is left, the point nearest to its middle, at the image's scale.
    points = [(i % kept.width, i // kept.width) for i, v in enumerate(kept.tobytes()) if v]
    center = [sum(p[axis] for p in points) / len(points) for axis in (0, 1)]
    x, y = min(points, key=lambda p: math.dist(p, center))
    return (
        min(max(left, round(left + (x - 0.5) / scale)), right - 1),
        min(max(top, round(top + (y - 0.5) / scale)), bottom - 1),
    )


__all__ = [
    "PALETTE",
    "Style",
    "color_of",
    "contrasting",
    "draw_answers",
    "draw_regions",
    "encode_image",
    "mark_regions",
    "place_badges",
    "scale_to",
]
