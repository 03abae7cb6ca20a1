"""What the page shows beside the picture: captions as they appear, what they took, styles."""

import html
import json
from collections.abc import Sequence

from ..captioning.captioner import MASKED, Answers, RegionCaptions, Step
from ..captioning.drawing import colour_of, contrasting, draw_regions
from .input import data_url

CSS = """
.gradio-container main {width: 100%; max-width: 1360px !important; margin: 0 auto !important}
#pd-head h1 {margin: 0; font-size: 1.7rem; letter-spacing: -.02em}
#pd-head p {margin: .15rem 0 0; color: var(--body-text-color-subdued)}
.pd-empty {display: grid; place-items: center; min-height: 15rem; padding: 2rem; text-align: center;
  border: 1px dashed var(--border-color-primary); border-radius: 12px;
  color: var(--body-text-color-subdued)}
.pd-captions {list-style: none; margin: 0; padding: 0; display: grid; gap: .45rem}
.pd-captions li {display: flex; gap: .7rem; align-items: flex-start; padding: .6rem .75rem;
  margin: 0; border: 1px solid var(--border-color-primary); border-left: 5px solid var(--own);
  border-radius: 10px; background: var(--background-fill-primary); cursor: pointer;
  transition: background .12s, box-shadow .12s}
.pd-captions li.pd-on {background: color-mix(in srgb, var(--own) 16%, transparent);
  box-shadow: 0 0 0 1.5px var(--own)}
.pd-captions li:focus-visible {outline: 2px solid var(--own); outline-offset: 2px}
.pd-badge {flex: none; min-width: 1.6rem; height: 1.6rem; padding: 0 .35rem; border-radius: 7px;
  display: grid; place-items: center; font-weight: 650; font-size: .85rem;
  background: var(--own); color: var(--ink)}
.pd-text {margin: 0; line-height: 1.6rem; overflow-wrap: anywhere}
.pd-mask {display: inline-block; width: .72em; height: .72em; margin: 0 .09em;
  border-radius: .2em; background: var(--border-color-primary)}
.pd-none {color: var(--body-text-color-subdued); font-style: italic}
.pd-bar {height: 5px; border-radius: 3px; margin: .2rem 0 .35rem; overflow: hidden;
  background: var(--border-color-primary)}
.pd-bar i {display: block; height: 100%; background: var(--color-accent)}
.pd-facts {display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .86rem;
  margin-bottom: .8rem; color: var(--body-text-color-subdued)}
.pd-facts b {color: var(--body-text-color); font-variant-numeric: tabular-nums}
.pd-facts a {margin-left: auto}
.pd-answer {padding: .8rem 1rem; border-radius: 12px; border: 1px solid var(--border-color-primary);
  background: var(--background-fill-primary)}
.pd-answer .pd-question {margin: 0 0 .35rem; color: var(--body-text-color-subdued)}
footer {display: none !important}
"""

EMPTY = """<div class="pd-empty"><div>Choose a picture, paint its regions, and press
<b>Describe regions</b>.<br>The captions will appear here, all at once.</div></div>"""


def captions_view(texts: Sequence[str]) -> str:
    """HTML list of captions, finished or not, each in its region's colour."""
    items = []
    for i, text in enumerate(texts, 1):
        colour = colour_of(i - 1)
        style = f"--own: {_hex(colour)}; --ink: {_hex(contrasting(colour))}"
        items.append(
            f'<li data-region="{i}" tabindex="0" style="{style}">'
            f'<span class="pd-badge">{i}</span><p class="pd-text">{text_view(text)}</p></li>'
        )
    return f'<ol class="pd-captions">{"".join(items)}</ol>'


def text_view(text: str) -> str:
    """A text with blocks for tokens that are still to come; whatever it holds is shown as text."""
    if not text.strip():
        return '<span class="pd-none">(nothing)</span>'
    blocks = '<span class="pd-mask"></span>'
    return html.escape(text).replace(MASKED, blocks)


def answer_view(question: str, text: str) -> str:
    """HTML of a question and what there is of its answer."""
    return (
        f'<div class="pd-answer"><p class="pd-question">{html.escape(question)}</p>'
        f'<p class="pd-text">{text_view(text)}</p></div>'
    )


def waiting_view(waiting: int) -> str:
    """While the model is busy with others."""
    ahead = f", {waiting} waiting" if waiting > 1 else ""
    facts = f'<div class="pd-facts"><span>in the queue{ahead} …</span></div>'
    return f'<div class="pd-bar"></div>{facts}'


def progress_view(step: Step, steps: int, seconds: float) -> str:
    """A bar and where denoising is."""
    share = min(100, round(100 * step.number / max(1, steps)))
    return (
        f'<div class="pd-bar"><i style="width: {share}%"></i></div><div class="pd-facts">'
        f"<span>step <b>{step.number}</b> of {steps}</span><span><b>{seconds:.1f}</b> s</span>"
        "</div>"
    )


def facts_view(result: RegionCaptions | Answers, link: str = "") -> str:
    """What it took."""
    facts = [
        f"<b>{result.seconds:.2f}</b> s",
        f"<b>{result.num_forwards}</b> forward passes",
        f"<b>{result.tokens_per_forward:.1f}</b> tokens a pass",
    ]
    if isinstance(result, RegionCaptions):
        facts.insert(0, f"<b>{len(result.regions)}</b> region{'s' * (len(result.regions) != 1)}")
    spans = "".join(f"<span>{fact}</span>" for fact in facts)
    return (
        '<div class="pd-bar"><i style="width: 100%"></i></div>'
        f'<div class="pd-facts">{spans}{link}</div>'
    )


def drawing_link(result: RegionCaptions) -> str:
    """A link that saves the picture with its captions; the picture is in the link itself."""
    drawing = draw_regions(result.image, [r.mask for r in result.regions], result.captions)
    return f'<a download="captions.webp" href="{data_url(drawing, "WEBP")}">save as picture</a>'


def as_json(result: RegionCaptions | Answers) -> str:
    """The result as it would be in a file."""
    return json.dumps(result.to_dict(), indent=1, ensure_ascii=False)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
