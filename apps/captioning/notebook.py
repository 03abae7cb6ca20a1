"""Shows results in notebooks: the image with its regions, and what was said, as HTML."""

import base64
import html

from PIL import Image

from .drawing import MAX_SIDE, draw_regions, encode_image
from .panel import NO_TEXT, color_of, contrasting

SHOWN_SIDE = MAX_SIDE * 3 // 5  # of the longer side of the image: a notebook keeps what it shows
BADGE = "border-radius:4px;padding:0 6px;margin-right:8px;font-weight:600"


def captions_html(result) -> str:
    """Returns a `RegionCaptions` as HTML."""
    marked = draw_regions(result.image, [r.mask for r in result.regions], max_side=SHOWN_SIDE)
    lines = [
        f'<div style="margin:4px 0"><span style="{BADGE};{_colors(region.number)}">'
        f"{region.number}</span>{_text(region.caption)}</div>"
        for region in result.regions
    ]
    return _page(marked, lines)


def answers_html(result) -> str:
    """Returns an `Answers` as HTML."""
    pairs = zip(result.questions, result.answers, strict=True)
    lines = [
        f'<div style="margin:4px 0"><em>{_text(question)}</em><br>{_text(answer)}</div>'
        for question, answer in pairs
    ]
    return _page(draw_regions(result.image, [], max_side=SHOWN_SIDE), lines)


def _page(drawing: Image.Image, lines: list[str]) -> str:
    content = base64.b64encode(encode_image(drawing, ".jpg")).decode()
    image = f'<img src="data:image/jpeg;base64,{content}" style="max-width:100%">'
    return f"<div>{image}{''.join(lines)}</div>"


def _text(text: str) -> str:
    return html.escape(" ".join(text.split()) or NO_TEXT)


def _colors(number: int) -> str:
    color = color_of(number - 1)
    return f"background:rgb{color};color:rgb{contrasting(color)}"
