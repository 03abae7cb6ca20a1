"""Animates captions that appear step by step, as GIF, WebP or APNG."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ...image_processing_perceptiondlm import load_image, load_mask
from .drawing import mark_regions, scale_to
from .panel import BLANK, INK, PALETTE, PAPER, Style, add_panel, answer_texts, one_line
from .results import MASKED, Answers, RegionCaptions

FORMATS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG", ".apng": "PNG"}
MAX_FRAMES = 64
STEP_MS, FIRST_MS, LAST_MS = 140, 600, 3500


def draw_steps(
    image,
    masks: Sequence,
    steps: Sequence[Sequence[str]],
    *,
    font: str | Path | None = None,
    fill: bool = False,
    min_side: int = 640,
    max_side: int = 960,
) -> list[Image.Image]:
    """Draws each step, all alike but for the texts and a bar of the steps done.

    Args:
        image, masks: as for `draw_regions`; without masks the texts are not numbered.
        steps: for each step the text of each region, `MASKED` where a token is to come.
        font, fill, min_side, max_side: as for `draw_regions`.
    """
    if not steps:
        raise ValueError("expected at least one step to draw, got none: ask for return_history")
    image = load_image(image)
    regions = [load_mask(mask, image.size) for mask in masks]
    image, regions = scale_to(image, regions, min_side, max_side)
    style = Style.fitting(max(image.size), font)
    marked = mark_regions(image, regions, style, fill) if regions else image
    texts = [one_line(step) if regions else list(step) for step in steps]
    frames = add_panel(marked, texts, style, numbered=bool(regions))
    return [_with_bar(f, i, len(frames) - 1, style) for i, f in enumerate(frames)]


def draw_history(result: RegionCaptions | Answers, **options) -> list[Image.Image]:
    """Draws the steps of a run with `return_history=True`, from all masked to the final texts."""
    masks, texts = [], result.history
    final = result.captions if isinstance(result, RegionCaptions) else result.answers
    if isinstance(result, RegionCaptions):
        masks = [region.mask for region in result.regions]
    steps = []
    if texts:
        blank = [" ".join([MASKED] * max(1, len(text.split()))) for text in texts[0]]
        steps = [blank, *texts[:-1], list(final)]
    if masks:
        return draw_steps(result.image, masks, _thin(steps), **options)
    steps = [answer_texts(result.questions, step) for step in steps]
    return draw_steps(result.image, [], _thin(steps), **options)


def encode_animation(frames: Sequence[Image.Image], suffix: str) -> bytes:
    """Encodes frames as one animated file of the kind that `suffix` (".gif", ...) names."""
    if suffix.lower() not in FORMATS:
        raise ValueError(f"expected a name ending in {', '.join(FORMATS)}, got {suffix!r}")
    kind = FORMATS[suffix.lower()]
    if kind == "GIF":
        frames = _share_palette(frames)
    durations = [FIRST_MS, *[STEP_MS] * (len(frames) - 2), LAST_MS][-len(frames) :]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, kind, save_all=True, append_images=frames[1:], duration=durations, loop=0
    )
    return buffer.getvalue()


def _share_palette(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """The frames in one palette, or colors would flicker: the last one's 240 colors, and those
    that panels are drawn with, exactly."""
    exact = [PAPER, INK, BLANK, *PALETTE]
    palette = Image.new("P", (1, 1))
    found = frames[-1].quantize(240, method=Image.Quantize.MEDIANCUT).getpalette()[: 3 * 240]
    found += [0] * (3 * 240 - len(found))
    palette.putpalette(found + [value for color in exact for value in color])
    shared, weights = [], np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    for frame in frames:
        indices = np.array(frame.quantize(palette=palette, dither=Image.Dither.NONE))
        codes = np.asarray(frame) @ weights
        for k, color in enumerate(exact):  # Pillow takes the nearest in a coarse grid
            indices[codes == weights @ color] = 240 + k
        shared.append(Image.fromarray(indices))
        shared[-1].putpalette(palette.getpalette())
    return shared


def _thin(steps: list) -> list:
    """At most `MAX_FRAMES` of the steps, evenly spaced, the first and the last among them."""
    if len(steps) <= MAX_FRAMES:
        return steps
    last = len(steps) - 1
    return [steps[round(i * last / (MAX_FRAMES - 1))] for i in range(MAX_FRAMES)]


def _with_bar(frame: Image.Image, done: int, total: int, style: Style) -> Image.Image:
    """Adds a strip below that fills from left to right."""
    height = max(4, style.size // 3)
    taller = Image.new("RGB", (frame.width, frame.height + height), BLANK)
    taller.paste(frame, (0, 0))
    if total and done:
        right = round(frame.width * done / total) - 1
        ImageDraw.Draw(taller).rectangle((0, frame.height, right, taller.height), INK)
    return taller
