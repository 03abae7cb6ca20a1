"""The painter: a picture on which regions are painted, boxed or loaded, in the reader's browser.

Its script is in `script.py` and `hands.py`. The regions live in the browser until they are
sent; what is sent, `input.read_payload` reads.
"""

import html
import json

from ..captioning.drawing import PALETTE, contrasting
from ..serving.limits import Limits

MARKUP = """
<div class="pd-painter" tabindex="-1" data-setup="{setup}">
  <div class="pd-stage">
    <canvas aria-label="picture to paint regions on"></canvas>
    <label class="pd-drop">
      <input type="file" class="pd-picture"
        accept="image/png,image/jpeg,image/webp,image/gif,image/bmp">
      <b>Drop a picture here</b><span>or click to choose one, or paste it</span>
    </label>
  </div>
  <p class="pd-alert" role="alert" hidden></p>
  <div class="pd-tools" role="toolbar" aria-label="painting" hidden>
    <span class="pd-group pd-regional">
      <button data-tool="brush" title="paint the chosen region">Brush</button>
      <button data-tool="box" title="drag a box: a region of its own">Box</button>
      <button data-tool="erase" title="erase from the chosen region">Eraser</button>
      <button data-tool="click" title="click on an object to outline it" {sam}>Outline</button>
    </span>
    <label class="pd-regional pd-size">size
      <input type="range" min="2" max="120" value="36" aria-label="brush size"></label>
    <span class="pd-space"></span>
    <button data-act="undo" class="pd-regional" title="take the last change back">Undo</button>
    <button data-act="redo" class="pd-regional" title="do it again (Ctrl+Y)">Redo</button>
    <button data-act="clear" class="pd-regional" title="remove all regions">Clear</button>
    <button data-act="close" title="choose another picture">New</button>
  </div>
  <div class="pd-chips pd-regional" hidden></div>
  <details class="pd-exact pd-regional" hidden>
    <summary>Boxes as text, mask files</summary>
    <div><textarea rows="2" aria-label="boxes, one a line"
      placeholder="x0, y0, x1, y1 in pixels, a box on each line"></textarea>
    <button data-act="boxes">Add boxes</button></div>
    <div><label class="pd-files">Add masks: PNG of the picture's size, not black inside
      <input type="file" class="pd-masks" multiple
        accept="image/png,image/webp,image/bmp,image/gif">
    </label></div>
  </details>
  <div class="pd-examples" {examples_hidden}><span>Examples</span></div>
</div>
"""

STYLE = """
.pd-painter {display: grid; gap: .6rem; outline: none}
.pd-painter [hidden] {display: none !important}
.pd-stage {position: relative; display: grid; place-items: center; min-height: 12rem;
  border-radius: 12px; overflow: hidden; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary)}
.pd-stage canvas {display: none; max-width: 100%; touch-action: none; cursor: crosshair}
.pd-stage.pd-open canvas {display: block}
.pd-stage.pd-open .pd-drop {display: none}
.pd-drop {display: grid; place-content: center; justify-items: center; gap: .25rem; width: 100%;
  height: 22rem; cursor: pointer; color: var(--body-text-color-subdued)}
.pd-drop b {font-size: 1.1rem; color: var(--body-text-color)}
.pd-drop input {position: absolute; width: 1px; height: 1px; opacity: 0}
.pd-stage:has(input:focus-visible), .pd-stage.pd-over {outline: 2px solid var(--color-accent)}
.pd-alert {margin: 0; padding: .5rem .75rem; border-radius: 8px; color: #7a1c1c;
  background: #fde8e8; border: 1px solid #f5b5b5}
.pd-tools, .pd-chips, .pd-group {display: flex; flex-wrap: wrap; gap: .25rem; align-items: center}
.pd-space {flex: 1}
.pd-painter button {margin: 0 !important; padding: .22rem .5rem; border-radius: 8px;
  font-size: .84rem; cursor: pointer; border: 1px solid var(--border-color-primary);
  background: var(--background-fill-primary);
  color: var(--body-text-color)}
.pd-painter button:hover {border-color: var(--color-accent)}
.pd-painter button:disabled {opacity: .4; cursor: default}
.pd-painter button[aria-pressed=true] {background: var(--color-accent); color: #fff;
  border-color: var(--color-accent)}
.pd-size {display: flex; align-items: center; gap: .4rem; font-size: .88rem}
.pd-size input {width: 3rem; accent-color: var(--color-accent)}
.pd-chips .pd-chip {display: flex; background: var(--own); color: var(--ink); border-radius: 8px;
  font-weight: 650}
.pd-chips .pd-chip:has([aria-pressed=true]) {
  box-shadow: 0 0 0 2px var(--background-fill-primary), 0 0 0 4px var(--own)}
.pd-chips .pd-chip button {padding: .2rem .35rem .2rem .6rem; border: 0; color: inherit;
  background: none}
.pd-chips .pd-chip [data-drop] {padding: .2rem .55rem .2rem .35rem; opacity: .75}
.pd-chips .pd-chip [data-drop]:is(:hover, :focus-visible) {opacity: 1;
  background: rgba(0, 0, 0, .25)}
.pd-painter button:focus-visible {outline: 2px solid var(--body-text-color); outline-offset: 1px}
.pd-exact summary {cursor: pointer; font-size: .88rem; color: var(--body-text-color-subdued)}
.pd-exact div {display: flex; gap: .5rem; align-items: start; margin-top: .4rem}
.pd-exact textarea {flex: 1; font: .85rem ui-monospace, monospace; padding: .4rem;
  border-radius: 8px; border: 1px solid var(--border-color-primary);
  background: var(--background-fill-primary); color: var(--body-text-color)}
.pd-files {display: grid; gap: .3rem; font-size: .88rem}
.pd-examples {display: flex; gap: .5rem; align-items: center; font-size: .88rem;
  color: var(--body-text-color-subdued)}
.pd-painter .pd-examples button {padding: 0; line-height: 0; overflow: hidden}
.pd-examples img {height: 4.6rem; width: auto; margin: 0}
"""


def markup(limits: Limits, examples: list[dict], *, regions: bool, sam: bool) -> str:
    """The painter's HTML.

    Args:
        limits: what the browser refuses before it sends anything.
        examples: as `Example.to_dict` gives them.
        regions: whether the model describes regions; else the picture is only shown.
        sam: whether a click can be outlined.
    """
    setup = {
        "bytes": limits.body_bytes,
        "pixels": limits.pixels,
        "masks": limits.masks,
        "regions": regions,
        "palette": [{"fill": _hex(c), "ink": _hex(contrasting(c))} for c in PALETTE],
        "examples": examples,
    }
    return MARKUP.format(
        setup=html.escape(json.dumps(setup)),
        sam="" if sam else "hidden",
        examples_hidden="" if examples else "hidden",
    )


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
