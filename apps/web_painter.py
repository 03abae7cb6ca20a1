"""The painter: a picture on which regions are painted, boxed or loaded, in the reader's browser.

Everything here is markup and script. The regions live in the browser until they are sent; what is
sent, `web_input.read_payload` reads.
"""

import html
import json

from .drawing import PALETTE, contrasting
from .serving_limits import Limits

MARKUP = """
<div class="pd-painter" tabindex="-1" data-setup="{setup}">
  <div class="pd-stage">
    <canvas aria-label="picture to paint regions on"></canvas>
    <label class="pd-drop">
      <input type="file" class="pd-picture" accept="image/png,image/jpeg,image/webp,image/gif,image/bmp">
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
    <button data-act="clear" class="pd-regional" title="remove all regions">Clear</button>
    <button data-act="close" title="choose another picture">New picture</button>
  </div>
  <div class="pd-chips pd-regional" hidden></div>
  <details class="pd-exact pd-regional" hidden>
    <summary>Boxes as text, mask files</summary>
    <div><textarea rows="2" aria-label="boxes, one a line"
      placeholder="x0, y0, x1, y1 in pixels, a box on each line"></textarea>
    <button data-act="boxes">Add boxes</button></div>
    <div><label class="pd-files">Add masks: PNG of the picture's size, not black inside
      <input type="file" class="pd-masks" accept="image/png,image/webp,image/bmp,image/gif" multiple>
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
.pd-tools, .pd-chips, .pd-group {display: flex; flex-wrap: wrap; gap: .4rem; align-items: center}
.pd-space {flex: 1}
.pd-painter button {padding: .3rem .7rem; border-radius: 8px; font-size: .88rem; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-primary);
  color: var(--body-text-color)}
.pd-painter button:hover {border-color: var(--color-accent)}
.pd-painter button:disabled {opacity: .4; cursor: default}
.pd-painter button[aria-pressed=true] {background: var(--color-accent); color: #fff;
  border-color: var(--color-accent)}
.pd-size {display: flex; align-items: center; gap: .4rem; font-size: .88rem}
.pd-size input {width: 6.5rem; accent-color: var(--color-accent)}
.pd-chips .pd-chip {display: flex; gap: .45rem; align-items: center; padding: .2rem .3rem .2rem .6rem;
  background: var(--own); color: var(--ink); border: 0; font-weight: 650}
.pd-chips .pd-chip[aria-pressed=true] {background: var(--own); color: var(--ink);
  box-shadow: 0 0 0 2px var(--background-fill-primary), 0 0 0 4px var(--own)}
.pd-chips .pd-chip i {font-style: normal; padding: 0 .3rem; border-radius: 5px; opacity: .75}
.pd-chips .pd-chip i:hover {opacity: 1; background: rgba(0, 0, 0, .25)}
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

SCRIPT = r"""
const root = element.querySelector('.pd-painter');
const setup = JSON.parse(root.dataset.setup);
const find = (what) => root.querySelector(what);
const stage = find('.pd-stage'), canvas = find('canvas'), pen = canvas.getContext('2d');
const MASK_SIDE = 768;                 // of the canvases that regions are painted on
const KEPT = 24;                       // changes that can be taken back
let picture = null, source = null;     // the picture, and its file as data URL
let width = 0, height = 0;             // of the picture in pixels
let regions = [], chosen = -1, tool = 'brush', lit = null, past = [], drag = null;

function tell(text) {
  find('.pd-alert').textContent = text;
  find('.pd-alert').hidden = !text;
}

// Pictures.

function asDataUrl(file) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(reader.error);
    reader.readAsDataURL(file);
  });
}

async function asImage(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

function refusal(file) {
  if (!/^image\/(png|jpeg|webp|gif|bmp)$/.test(file.type))
    return `${file.name}: a picture is needed (PNG, JPEG, WebP, GIF or BMP).`;
  if (file.size > setup.bytes)
    return `${file.name} is too large: ${(file.size / 2 ** 20).toFixed(1)} MiB, at most ` +
      `${+(setup.bytes / 2 ** 20).toFixed(1)} MiB.`;
  return '';
}

async function choose(file) {
  const problem = refusal(file);
  if (problem) return tell(problem);
  try {
    await open(await asDataUrl(file), []);
  } catch (error) {
    tell(`${file.name}: this file cannot be read as a picture.`);
  }
}

async function open(url, masks) {
  const image = await asImage(url);
  if (image.naturalWidth * image.naturalHeight > setup.pixels)
    return tell(`This picture is too large: ${image.naturalWidth}x${image.naturalHeight} pixels,` +
      ` at most ${setup.pixels / 1e6} megapixels.`);
  tell('');
  [picture, source, width, height] = [image, url, image.naturalWidth, image.naturalHeight];
  [regions, chosen, past] = [[], -1, []];
  for (const mask of masks) await addMask(mask);
  chosen = regions.length ? 0 : -1;
  stage.classList.add('pd-open');
  for (const part of root.querySelectorAll('.pd-tools, .pd-chips, .pd-exact')) part.hidden = false;
  for (const part of root.querySelectorAll('.pd-regional')) part.hidden ||= !setup.regions;
  resize();
}

function close() {
  [picture, source, regions, chosen, past] = [null, null, [], -1, []];
  stage.classList.remove('pd-open');
  for (const part of root.querySelectorAll('.pd-tools, .pd-chips, .pd-exact')) part.hidden = true;
  find('.pd-picture').value = '';
  tell('');
}

// Regions: {canvas, exact, box}; the canvas is shown and painted on, and sent unless the region
// has remained what it was loaded as: an exact mask or box.

function newRegion(extra) {
  if (regions.length >= setup.masks) return tell(`At most ${setup.masks} regions.`), null;
  const own = document.createElement('canvas');
  const scale = MASK_SIDE / Math.max(width, height);
  own.width = Math.max(1, Math.round(width * scale));
  own.height = Math.max(1, Math.round(height * scale));
  const region = {canvas: own, exact: null, box: null, ...extra};
  regions.push(region);
  chosen = regions.length - 1;
  return region;
}

const colourOf = (index) => setup.palette[index % setup.palette.length];

function isEmpty(region) {
  const own = region.canvas;
  const data = own.getContext('2d').getImageData(0, 0, own.width, own.height).data;
  for (let i = 3; i < data.length; i += 4) if (data[i] > 127) return false;
  return true;
}

async function addMask(url) {
  const image = await asImage(url);
  if (image.naturalWidth !== width || image.naturalHeight !== height)
    return tell(`A mask needs the picture's size ${width}x${height}, this one has ` +
      `${image.naturalWidth}x${image.naturalHeight}.`);
  const region = newRegion({exact: url});
  if (!region) return;
  const own = region.canvas.getContext('2d', {willReadFrequently: true});
  own.imageSmoothingEnabled = false;
  own.drawImage(image, 0, 0, region.canvas.width, region.canvas.height);
  const data = own.getImageData(0, 0, region.canvas.width, region.canvas.height);
  for (let i = 0; i < data.data.length; i += 4) {
    const inside = (data.data[i] | data.data[i + 1] | data.data[i + 2]) && data.data[i + 3];
    data.data.set(inside ? [0, 0, 0, 255] : [0, 0, 0, 0], i);
  }
  own.putImageData(data, 0, 0);
}

function addBox(box) {
  const [x0, y0, x1, y1] = box;
  if (!(x0 < x1 && y0 < y1 && x1 > 0 && y1 > 0 && x0 < width && y0 < height))
    return tell(`A box needs x0 < x1 and y0 < y1 inside the ${width}x${height} picture, got ` +
      box.join(', ') + '.');
  const region = newRegion({box});
  if (!region) return;
  const scale = region.canvas.width / width;
  region.canvas.getContext('2d').fillRect(x0 * scale, y0 * scale, (x1 - x0) * scale,
    (y1 - y0) * scale);
}

function addBoxes(text) {
  const boxes = [];
  for (const line of text.split('\n').filter((line) => line.trim())) {
    const box = (line.match(/-?\d*\.?\d+/g) ?? []).map(Number);
    if (box.length !== 4) return tell(`A box is x0, y0, x1, y1: four numbers, got "${line}".`);
    boxes.push(box);
  }
  remember(null);
  tell('');
  boxes.forEach(addBox);
  find('.pd-exact textarea').value = '';
  refresh();
}

// Taking back.

function remember(region) {
  const own = region?.canvas;
  past.push({
    list: [...regions], chosen, region,
    kept: region && {exact: region.exact, box: region.box},
    pixels: own?.getContext('2d').getImageData(0, 0, own.width, own.height),
  });
  if (past.length > KEPT) past.shift();
}

function undo() {
  const last = past.pop();
  if (!last) return;
  [regions, chosen] = [last.list, last.chosen];
  if (last.region) {
    Object.assign(last.region, last.kept);
    last.region.canvas.getContext('2d').putImageData(last.pixels, 0, 0);
  }
  refresh();
}

// Drawing. Coordinates of events are turned into the picture's pixels at once.

function resize() {
  if (!picture) return;
  const room = Math.max(stage.clientWidth - 2, 200);
  const scale = Math.min(room / width, (0.6 * innerHeight) / height);
  const dense = window.devicePixelRatio || 1;
  canvas.style.width = `${width * scale}px`;
  canvas.style.height = `${height * scale}px`;
  canvas.width = Math.max(1, Math.round(width * scale * dense));
  canvas.height = Math.max(1, Math.round(height * scale * dense));
  refresh();
}

function tinted(region, colour) {
  const copy = document.createElement('canvas');
  [copy.width, copy.height] = [region.canvas.width, region.canvas.height];
  const own = copy.getContext('2d');
  own.drawImage(region.canvas, 0, 0);
  own.globalCompositeOperation = 'source-in';
  own.fillStyle = colour;
  own.fillRect(0, 0, copy.width, copy.height);
  return copy;
}

function rim(filled, thickness) {
  const copy = document.createElement('canvas');
  [copy.width, copy.height] = [canvas.width, canvas.height];
  const own = copy.getContext('2d');
  for (let k = 0; k < 12; k++) {
    const angle = (k * Math.PI) / 6;
    own.drawImage(filled, thickness * Math.cos(angle), thickness * Math.sin(angle),
      copy.width, copy.height);
  }
  own.globalCompositeOperation = 'destination-out';
  own.drawImage(filled, 0, 0, copy.width, copy.height);
  return copy;
}

function anchorOf(region) {
  // the middle of the longest run of painted pixels among some rows: always inside
  const own = region.canvas, step = Math.max(1, Math.round(own.height / 48));
  let best = null;
  const data = own.getContext('2d').getImageData(0, 0, own.width, own.height).data;
  for (let y = 0; y < own.height; y += step)
    for (let x = 0, start = -1; x <= own.width; x++) {
      const inside = x < own.width && data[4 * (y * own.width + x) + 3] > 127;
      if (inside && start < 0) start = x;
      if (!inside && start >= 0) {
        if (!best || x - start > best.run) best = {run: x - start, x: (x + start) / 2, y};
        start = -1;
      }
    }
  return best && {x: best.x / own.width, y: best.y / own.height};
}

function paint() {
  if (!picture) return;
  const dense = window.devicePixelRatio || 1;
  pen.globalAlpha = 1;
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  regions.forEach((region, i) => {
    const filled = tinted(region, colourOf(i).fill);
    const dim = lit !== null && lit !== i;
    pen.globalAlpha = dim ? 0.12 : lit === i ? 0.62 : 0.42;
    pen.drawImage(filled, 0, 0, canvas.width, canvas.height);
    pen.globalAlpha = dim ? 0.3 : 1;
    pen.drawImage(rim(filled, (lit === i ? 3 : 1.8) * dense), 0, 0);
  });
  pen.font = `600 ${14 * dense}px system-ui, sans-serif`;
  [pen.textAlign, pen.textBaseline] = ['center', 'middle'];
  regions.forEach((region, i) => {
    const at = anchorOf(region);
    if (!at) return;
    const colour = colourOf(i), high = 22 * dense;
    const wide = Math.max(high, pen.measureText(i + 1).width + 12 * dense);
    const x = Math.min(Math.max(at.x * canvas.width, wide / 2), canvas.width - wide / 2);
    const y = Math.min(Math.max(at.y * canvas.height, high / 2), canvas.height - high / 2);
    pen.globalAlpha = lit !== null && lit !== i ? 0.35 : 1;
    pen.beginPath();
    pen.roundRect(x - wide / 2, y - high / 2, wide, high, 6 * dense);
    [pen.fillStyle, pen.strokeStyle, pen.lineWidth] = [colour.fill, '#fff', 1.5 * dense];
    pen.fill();
    pen.stroke();
    pen.fillStyle = colour.ink;
    pen.fillText(i + 1, x, y + dense / 2);
  });
  pen.globalAlpha = 1;
  if (drag?.tool === 'box') {
    const scale = canvas.width / width;
    [pen.strokeStyle, pen.lineWidth] = [colourOf(regions.length).fill, 2 * dense];
    pen.strokeRect(...boxOf(drag).flatMap((v, i, b) => (i < 2 ? v : v - b[i - 2]) * scale));
  }
}

let due = false;
function repaint() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => { due = false; paint(); });
}

function refresh() {
  const chips = find('.pd-chips');
  chips.replaceChildren(...regions.map((region, i) => {
    const chip = document.createElement('button');
    chip.className = 'pd-chip';
    chip.dataset.chip = chip.dataset.region = i + 1;
    chip.setAttribute('aria-pressed', i === chosen);
    chip.style.setProperty('--own', colourOf(i).fill);
    chip.style.setProperty('--ink', colourOf(i).ink);
    chip.title = `region ${i + 1}: paint on`;
    chip.append(String(i + 1));
    const cross = document.createElement('i');
    [cross.textContent, cross.title, cross.dataset.drop] = ['×', `remove region ${i + 1}`, i];
    chip.append(cross);
    return chip;
  }));
  const more = document.createElement('button');
  [more.textContent, more.dataset.act] = ['+ region', 'more'];
  more.disabled = regions.length > 0 && isEmpty(regions[regions.length - 1]);
  chips.append(more);
  for (const button of root.querySelectorAll('[data-tool]'))
    button.setAttribute('aria-pressed', button.dataset.tool === tool);
  find('[data-act=undo]').disabled = !past.length;
  find('[data-act=clear]').disabled = !regions.length;
  repaint();
}

// Hands.

function at(event) {
  const box = canvas.getBoundingClientRect();
  return {x: ((event.clientX - box.left) / box.width) * width,
    y: ((event.clientY - box.top) / box.height) * height};
}

function boxOf({from, to}) {
  const clip = (v, most) => Math.min(Math.max(Math.round(v), 0), most);
  return [clip(Math.min(from.x, to.x), width), clip(Math.min(from.y, to.y), height),
    clip(Math.max(from.x, to.x), width), clip(Math.max(from.y, to.y), height)];
}

function stroke(from, to) {
  const region = regions[chosen], own = region.canvas.getContext('2d');
  const scale = region.canvas.width / width;
  const onScreen = canvas.getBoundingClientRect().width / region.canvas.width;
  own.globalCompositeOperation = tool === 'erase' ? 'destination-out' : 'source-over';
  [own.lineCap, own.lineJoin] = ['round', 'round'];
  own.lineWidth = find('.pd-size input').value / onScreen;
  own.beginPath();
  own.moveTo(from.x * scale, from.y * scale);
  own.lineTo(to.x * scale + 0.01, to.y * scale);
  own.stroke();
  own.globalCompositeOperation = 'source-over';
  region.exact = region.box = null;
  repaint();
}

function regionAt(point) {
  for (let i = regions.length - 1; i >= 0; i--) {
    const own = regions[i].canvas;
    const x = Math.floor((point.x / width) * own.width);
    const y = Math.floor((point.y / height) * own.height);
    if (own.getContext('2d').getImageData(x, y, 1, 1).data[3] > 127) return i;
  }
  return null;
}

canvas.addEventListener('pointerdown', async (event) => {
  if (event.button || !setup.regions) return;
  canvas.setPointerCapture(event.pointerId);
  const point = at(event);
  if (tool === 'box') {
    drag = {tool, from: point, to: point};
    return;
  }
  if (tool === 'click') return outline(point);
  if (chosen < 0) {
    if (tool === 'erase') return;
    remember(null);
    if (!newRegion()) return;
    refresh();
  } else remember(regions[chosen]);
  drag = {tool, to: point};
  stroke(point, point);
});

canvas.addEventListener('pointermove', (event) => {
  const point = at(event);
  if (!drag) return light(setup.regions ? regionAt(point) : null);
  if (drag.tool !== 'box') stroke(drag.to, point);
  drag.to = point;
  repaint();
});

canvas.addEventListener('pointerup', () => {
  const done = drag;
  drag = null;
  if (done?.tool === 'box') {
    const box = boxOf(done);
    if (box[2] - box[0] > 1 && box[3] - box[1] > 1) {
      remember(null);
      tell('');
      addBox(box);
    }
  }
  if (done) refresh();
});
canvas.addEventListener('pointercancel', () => { drag = null; repaint(); });
canvas.addEventListener('pointerleave', () => { if (!drag) light(null); });

async function outline(point) {
  tell('Outlining ...');
  try {
    const mask = await server.outline(source, point.x, point.y);
    if (!mask.url) return tell(mask.problem);
    remember(null);
    tell('');
    await addMask(mask.url);
    refresh();
  } catch (error) { tell('Outlining did not work.'); }
}

// A region and what is said of it light up together; a click keeps them lit.

let kept = null;
function light(index) {
  index ??= kept;
  if (index === lit) return;
  lit = index;
  for (const item of document.querySelectorAll('[data-region]'))
    item.classList.toggle('pd-on', +item.dataset.region === index + 1 && index !== null);
  repaint();
}
const named = (event) => {
  const item = event.target.closest?.('[data-region]');
  return item ? item.dataset.region - 1 : null;
};
document.addEventListener('mouseover', (event) => {
  if (event.target !== canvas) light(named(event));
});
document.addEventListener('focusin', (event) => light(named(event)));
document.addEventListener('click', (event) => {
  const index = named(event);
  if (index === null || event.target.closest('.pd-painter')) return;
  kept = kept === index ? null : index;
  lit = undefined;
  light(index);
});

// Buttons, files, keys.

const acts = {
  undo,
  clear() { remember(null); [regions, chosen] = [[], -1]; refresh(); },
  close,
  more() { remember(null); newRegion(); tool = 'brush'; refresh(); },
  boxes() { addBoxes(find('.pd-exact textarea').value); },
};

root.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (event.target.dataset.drop !== undefined) {
    remember(null);
    const index = +event.target.dataset.drop;
    regions = regions.filter((_, i) => i !== index);
    chosen = Math.min(chosen, regions.length - 1);
    refresh();
  } else if (button?.dataset.tool) { tool = button.dataset.tool; refresh(); }
  else if (button?.dataset.chip) { chosen = button.dataset.chip - 1; refresh(); }
  else if (button?.dataset.act) acts[button.dataset.act]();
  else if (button?.dataset.example) {
    const example = setup.examples[button.dataset.example];
    open(example.picture, setup.regions ? example.regions : []);
    const box = document.querySelector('#pd-question textarea');
    if (box && example.question) {
      box.value = example.question;
      box.dispatchEvent(new Event('input', {bubbles: true}));
    }
  }
});
find('.pd-picture').addEventListener('change', (event) => {
  if (event.target.files[0]) choose(event.target.files[0]);
});
find('.pd-masks').addEventListener('change', async (event) => {
  remember(null);
  tell('');
  for (const file of event.target.files) {
    const problem = refusal(file);
    if (problem) { tell(problem); continue; }
    try { await addMask(await asDataUrl(file)); }
    catch (error) { tell(`${file.name}: this file cannot be read as a mask.`); }
  }
  event.target.value = '';
  refresh();
});
stage.addEventListener('dragover', (event) => {
  event.preventDefault();
  stage.classList.add('pd-over');
});
stage.addEventListener('dragleave', () => stage.classList.remove('pd-over'));
stage.addEventListener('drop', (event) => {
  event.preventDefault();
  stage.classList.remove('pd-over');
  if (event.dataTransfer.files[0]) choose(event.dataTransfer.files[0]);
});
document.addEventListener('paste', (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((f) => f.type.startsWith('image/'));
  if (file) choose(file);
});
document.addEventListener('keydown', (event) => {
  const typing = event.target.closest?.('input:not([type=range]), textarea');
  if ((event.ctrlKey || event.metaKey) && event.key === 'z' && picture && !typing) {
    event.preventDefault();
    undo();
  }
});
setup.examples.forEach((example, i) => {
  const button = document.createElement('button'), image = document.createElement('img');
  [image.src, image.alt] = [example.picture, `example ${i + 1}`];
  button.dataset.example = i;
  button.append(image);
  find('.pd-examples').append(button);
});
new ResizeObserver(resize).observe(stage);

window.pdPainter = {
  payload: () => JSON.stringify({
    picture: source,
    regions: regions.filter((region) => !isEmpty(region)).map(
      ({canvas, exact, box}) => box ? {box} : exact ? {exact}
        : {painted: canvas.toDataURL('image/png')}
    ),
  }),
};
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
