"""Renders as HTML what the page shows beside the image: texts as they appear, what they took."""

import html
import json
from collections.abc import Sequence

from ..captioning.drawing import color_of, contrasting, draw_regions
from ..captioning.results import MASKED, Answers, RegionCaptions, Step
from .input import data_url

EMPTY = """<div class="pd-empty"><div>Choose an image, paint its regions, and press
<b>Describe regions</b>.<br>The captions will appear here, all at once.</div></div>"""


def captions_view(texts: Sequence[str]) -> str:
    """Returns a list of captions, finished or not, each in its region's color."""
    items = []
    for i, text in enumerate(texts, 1):
        color = color_of(i - 1)
        style = f"--own: {css_color(color)}; --ink: {css_color(contrasting(color))}"
        items.append(
            f'<li data-region="{i}" tabindex="0" style="{style}">'
            f'<span class="pd-badge">{i}</span><p class="pd-text">{text_view(text)}</p></li>'
        )
    return f'<ol class="pd-captions">{"".join(items)}</ol>'


def text_view(text: str) -> str:
    """Returns a text with a block for each token that is still to come.

    Whatever else the text holds is escaped, so that no markup of a model's takes effect.
    """
    if not text.strip():
        return '<span class="pd-none">(nothing)</span>'
    blocks = '<span class="pd-mask"></span>'
    return html.escape(text).replace(MASKED, blocks)


def answer_view(question: str, text: str) -> str:
    """Returns a question and what there is of its answer."""
    return (
        f'<div class="pd-answer"><p class="pd-question">{html.escape(question)}</p>'
        f'<p class="pd-text">{text_view(text)}</p></div>'
    )


def waiting_view(waiting: int) -> str:
    """Returns what is shown while the model is busy with `waiting` other jobs."""
    ahead = f", {waiting} waiting" if waiting > 1 else ""
    facts = f'<div class="pd-facts"><span>in the queue{ahead} …</span></div>'
    return f'<div class="pd-bar"></div>{facts}'


def progress_view(step: Step, steps: int, seconds: float) -> str:
    """Returns a bar that shows how far denoising is, after `seconds`."""
    share = min(100, round(100 * step.number / max(1, steps)))
    return (
        f'<div class="pd-bar"><i style="width: {share}%"></i></div><div class="pd-facts">'
        f"<span>step <b>{step.number}</b> of {steps}</span><span><b>{seconds:.1f}</b> s</span>"
        "</div>"
    )


def facts_view(result: RegionCaptions | Answers, link: str = "") -> str:
    """Returns what a result took: time, forward passes, tokens; `link` stands at the end."""
    facts = [
        f"<b>{result.seconds:.2f}</b> s",
        f"<b>{result.num_forwards}</b> forward passes",
        f"<b>{result.tokens_per_forward:.1f}</b> tokens each",
    ]
    if isinstance(result, RegionCaptions):
        facts.insert(0, f"<b>{len(result.regions)}</b> region{'s' * (len(result.regions) != 1)}")
    spans = "".join(f"<span>{fact}</span>" for fact in facts)
    return (
        '<div class="pd-bar"><i style="width: 100%"></i></div>'
        f'<div class="pd-facts">{spans}{link}</div>'
    )


def drawing_link(result: RegionCaptions) -> str:
    """Returns a link that saves the image with its captions; the link itself holds the drawing."""
    drawing = draw_regions(result.image, [r.mask for r in result.regions], result.captions)
    return f'<a download="captions.webp" href="{data_url(drawing, "WEBP")}">save as image</a>'


def as_json(result: RegionCaptions | Answers) -> str:
    """Returns the result as `perceptiondlm caption --format json` would write it."""
    return json.dumps(result.to_dict(), indent=1, ensure_ascii=False)


def css_color(color: tuple[int, int, int]) -> str:
    """Returns an RGB color as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*color)
