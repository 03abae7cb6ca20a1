"""What the page shows: the picture with its regions, captions that light up with them, styles."""

import base64
import html
import io
import json
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFont

from .captioner import MASKED, Answers, RegionCaptions, Step
from .drawing import Style, contrasting, draw_regions, place_badges
from .web_regions import PaintedRegion

SHOWN_SIDE = 960  # pixels of the shown picture's long side, at most
TRACED_SIDE = 640  # of the masks whose outlines are drawn
MOST_EDGES = 12_000  # of one outline; a more ragged one is drawn coarser
BADGE = 30  # units of the picture's view, whose long side is 1000

CSS = """
.gradio-container main {max-width: 1360px !important; margin: 0 auto !important}
#pd-head h1 {margin: 0; font-size: 1.7rem; letter-spacing: -.02em}
#pd-head p {margin: .15rem 0 0; color: var(--body-text-color-subdued)}
#pd-editor {min-height: 440px}
.pd-empty {display: grid; place-items: center; min-height: 15rem; padding: 2rem; text-align: center;
  border: 1px dashed var(--border-color-primary); border-radius: 12px;
  color: var(--body-text-color-subdued)}
.pd-view {position: relative; line-height: 0; border-radius: 12px; overflow: hidden;
  background: var(--background-fill-secondary)}
.pd-view img {width: 100%; max-height: 66vh; object-fit: contain}
.pd-view svg {position: absolute; inset: 0; width: 100%; height: 100%}
.pd-view [data-region] {cursor: pointer; transition: opacity .12s, fill-opacity .12s}
.pd-view path {fill-opacity: .38; stroke-width: 3; stroke-linejoin: round}
.pd-view path.pd-on {fill-opacity: .6; stroke-width: 6}
.pd-view:has(.pd-on) [data-region]:not(.pd-on) {opacity: .3}
.pd-view text {font: 600 17px system-ui, sans-serif; text-anchor: middle;
  dominant-baseline: central; pointer-events: none}
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
.pd-bar {height: 5px; border-radius: 3px; margin: .7rem 0 .35rem; overflow: hidden;
  background: var(--border-color-primary)}
.pd-bar i {display: block; height: 100%; background: var(--color-accent)}
.pd-facts {display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .86rem;
  color: var(--body-text-color-subdued)}
.pd-facts b {color: var(--body-text-color); font-variant-numeric: tabular-nums}
.pd-facts a {margin-left: auto}
.pd-answer {padding: .8rem 1rem; border-radius: 12px; border: 1px solid var(--border-color-primary);
  background: var(--background-fill-primary)}
.pd-answer .pd-question {margin: 0 0 .35rem; color: var(--body-text-color-subdued)}
#pd-examples .grid-container {gap: .4rem}
footer {display: none !important}
"""

# A region and its caption light up together; a click keeps them lit until the next one.
SCRIPT = """
() => {
  let kept = null;
  const light = (number) => {
    for (const e of document.querySelectorAll('[data-region]'))
      e.classList.toggle('pd-on', e.dataset.region === number);
  };
  const numberAt = (e) => e.target.closest?.('[data-region]')?.dataset.region ?? null;
  document.addEventListener('mouseover', (e) => light(numberAt(e) ?? kept));
  document.addEventListener('focusin', (e) => light(numberAt(e) ?? kept));
  document.addEventListener('click', (e) => {
    const number = numberAt(e);
    kept = number === kept ? null : number;
    light(kept);
  });
}
"""

EMPTY = """<div class="pd-empty"><div>Choose a picture, paint each region in a colour of its own,
and press <b>Describe regions</b>.<br>The captions will appear here, all at once.</div></div>"""


def picture_view(picture: Image.Image, regions: Sequence[PaintedRegion]) -> str:
    """HTML of the picture under its outlined, numbered regions."""
    shown = picture.copy()
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    scale = 1000 / max(picture.size)
    width, height = (round(side * scale, 1) for side in picture.size)
    small = [_traceable(region.mask) for region in regions]
    large_first = sorted(range(len(regions)), key=lambda i: -sum(small[i].histogram()[1:]))
    paths = []
    for i in large_first:
        units = width / small[i].width, height / small[i].height
        colour = _hex(regions[i].colour)
        paths.append(f'<path data-region="{i + 1}" fill="{colour}" stroke="{colour}"'
                     f' fill-rule="evenodd" d="{outline(np.asarray(small[i]) != 0, units)}"/>')
    badges = _badges(regions, small, (width, height))
    return (
        f'<div class="pd-view"><img alt="the picture" src="{data_url(shown, "WEBP")}">'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="regions">'
        f"{''.join(paths)}{badges}</svg></div>"
    )


def _traceable(mask: Image.Image) -> Image.Image:
    """A copy small enough to trace in which thin regions survive."""
    mask = mask.point([0] + [255] * 255)
    side = TRACED_SIDE
    while True:
        scale = min(1.0, side / max(mask.size))
        size = tuple(max(1, round(length * scale)) for length in mask.size)
        small = mask.resize(size, Image.Resampling.BOX).point([0] * 100 + [255] * 156)
        if small.getbbox() is None:
            small = mask.resize(size, Image.Resampling.BOX).point([0] + [255] * 255)
        inside = np.asarray(small) != 0
        ragged = np.diff(inside, axis=0).sum() + np.diff(inside, axis=1).sum()
        if ragged <= MOST_EDGES or side < 64:
            return small
        side //= 2


def outline(inside: np.ndarray, units: tuple[float, float]) -> str:
    """The path data of the boundaries of a bool (h, w) map; `units` are a cell's (x, y) size."""
    following = _boundary_edges(inside)
    parts = []
    while following:
        start = next(iter(following))
        corners, here, direction = [], start, None
        while True:
            ends = following[here]
            there = ends.pop()
            if not ends:
                del following[here]
            heading = (there[0] > here[0]) - (there[0] < here[0]), there[1] - here[1]
            if heading != direction:
                corners.append(here)
            here, direction = there, heading
            if here == start:
                break
        points = (f"{x * units[0]:.1f} {y * units[1]:.1f}" for x, y in corners)
        parts.append(f"M{'L'.join(points)}Z")
    return "".join(parts)


def _boundary_edges(inside: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """From each corner of a boundary to the next ones, the inside on the right."""
    padded = np.pad(inside, 1)
    core = padded[1:-1, 1:-1]
    sides = (  # outside neighbour, from and to as offsets (x, y) of the pixel's corners
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (1, 1)),
        (padded[2:, 1:-1], (1, 1), (0, 1)),
        (padded[1:-1, :-2], (0, 1), (0, 0)),
    )
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for neighbour, (x0, y0), (x1, y1) in sides:
        for y, x in zip(*(axis.tolist() for axis in np.nonzero(core & ~neighbour)), strict=True):
            following.setdefault((x + x0, y + y0), []).append((x + x1, y + y1))
    return following


def _badges(regions, small: list[Image.Image], size: tuple[float, float]) -> str:
    """Numbers on their regions, as SVG."""
    units = size[0] / small[0].width if small else 1.0
    style = Style(ImageFont.load_default(12), max(6, round(BADGE / 1.45 / units)))
    same = [mask.resize(small[0].size) for mask in small]
    parts = []
    for i, (box, _) in enumerate(place_badges(same, style, small[0].size) if small else []):
        x, y = (box[0] + box[2]) / 2 * units, (box[1] + box[3]) / 2 * units
        wide = BADGE + 10 * (i >= 9)
        colour = regions[i].colour
        parts.append(
            f'<g data-region="{i + 1}"><rect x="{x - wide / 2:.1f}" y="{y - BADGE / 2:.1f}"'
            f' width="{wide}" height="{BADGE}" rx="9" fill="{_hex(colour)}" stroke="#fff"'
            f' stroke-width="2.5"/><text x="{x:.1f}" y="{y:.1f}"'
            f' fill="{_hex(contrasting(colour))}">{i + 1}</text></g>'
        )
    return "".join(parts)


def captions_view(texts: Sequence[str], regions: Sequence[PaintedRegion]) -> str:
    """HTML list of captions, finished or not, each in its region's colour."""
    items = []
    for i, (text, region) in enumerate(zip(texts, regions, strict=True), 1):
        style = f"--own: {_hex(region.colour)}; --ink: {_hex(contrasting(region.colour))}"
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
    return (f'<div class="pd-answer"><p class="pd-question">{html.escape(question)}</p>'
            f'<p class="pd-text">{text_view(text)}</p></div>')


def waiting_view(waiting: int) -> str:
    """While the model is busy with others."""
    ahead = f", {waiting} waiting" if waiting > 1 else ""
    facts = f'<div class="pd-facts"><span>in the queue{ahead} …</span></div>'
    return f'<div class="pd-bar"></div>{facts}'


def progress_view(step: Step, steps: int, seconds: float) -> str:
    """A bar and where denoising is."""
    share = min(100, round(100 * step.number / max(1, steps)))
    return (f'<div class="pd-bar"><i style="width: {share}%"></i></div><div class="pd-facts">'
            f"<span>step <b>{step.number}</b> of {steps}</span><span><b>{seconds:.1f}</b> s</span>"
            "</div>")


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
    return ('<div class="pd-bar"><i style="width: 100%"></i></div>'
            f'<div class="pd-facts">{spans}{link}</div>')


def drawing_link(result: RegionCaptions) -> str:
    """A link that saves the picture with its captions; the picture is in the link itself."""
    drawing = draw_regions(result.image, [r.mask for r in result.regions], result.captions)
    return f'<a download="captions.webp" href="{data_url(drawing, "WEBP")}">save as picture</a>'


def as_json(result: RegionCaptions | Answers) -> str:
    """The result as it would be in a file."""
    return json.dumps(result.to_dict(), indent=1, ensure_ascii=False)


def data_url(picture: Image.Image, kind: str) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=88)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{content}"


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
