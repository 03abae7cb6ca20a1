"""The painter's script, second part: drawing what there is, and what hands do to it."""

HANDS_SCRIPT = r"""
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

// What a region looks like at the canvas's size, made again only after it has changed.
function viewOf(region, index) {
  const key = `${index} ${canvas.width} ${canvas.height}`;
  if (region.view?.key !== key) {
    const filled = tinted(region, colourOf(index).fill);
    const dense = window.devicePixelRatio || 1;
    region.view = {key, filled, thin: rim(filled, 1.8 * dense), thick: rim(filled, 3 * dense),
      anchor: anchorOf(region)};
  }
  return region.view;
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
    const look = viewOf(region, i);
    const dim = lit !== null && lit !== i;
    pen.globalAlpha = dim ? 0.12 : lit === i ? 0.62 : 0.42;
    pen.drawImage(look.filled, 0, 0, canvas.width, canvas.height);
    pen.globalAlpha = dim ? 0.3 : 1;
    pen.drawImage(lit === i ? look.thick : look.thin, 0, 0);
  });
  pen.font = `600 ${14 * dense}px system-ui, sans-serif`;
  [pen.textAlign, pen.textBaseline] = ['center', 'middle'];
  regions.forEach((region, i) => {
    const at = viewOf(region, i).anchor;
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

function chipOf(region, i) {
  const chip = document.createElement('span');
  const [number, cross] = ['button', 'button'].map((kind) => document.createElement(kind));
  chip.className = 'pd-chip';
  chip.style.setProperty('--own', colourOf(i).fill);
  chip.style.setProperty('--ink', colourOf(i).ink);
  number.dataset.chip = number.dataset.region = cross.dataset.region = i + 1;
  number.setAttribute('aria-pressed', i === chosen);
  [number.textContent, number.title] = [i + 1, `region ${i + 1}: paint on; Delete removes it`];
  [cross.textContent, cross.title, cross.dataset.drop] = ['×', `remove region ${i + 1}`, i];
  cross.setAttribute('aria-label', cross.title);
  chip.append(number, cross);
  return chip;
}

function refresh() {
  const chips = find('.pd-chips'), held = chips.contains(document.activeElement)
    && [...chips.querySelectorAll('button')].indexOf(document.activeElement);
  const more = document.createElement('button');
  [more.textContent, more.dataset.act] = ['+ region', 'more'];
  more.disabled = regions.length > 0 && isEmpty(regions[regions.length - 1]);
  chips.replaceChildren(...regions.map(chipOf), more);
  if (held !== false) chips.querySelectorAll('button')[held]?.focus();
  for (const button of root.querySelectorAll('[data-tool]'))
    button.setAttribute('aria-pressed', button.dataset.tool === tool);
  find('[data-act=undo]').disabled = !past.length;
  find('[data-act=redo]').disabled = !future.length;
  find('[data-act=clear]').disabled = !regions.length;
  repaint();
}

function drop(index) {
  const hadFocus = find('.pd-chips').contains(document.activeElement);
  remember(null);
  regions = regions.filter((_, i) => i !== index);
  chosen = Math.min(chosen, regions.length - 1);
  refresh();
  if (!hadFocus) return;
  const next = find(`[data-chip="${Math.min(index + 1, regions.length)}"]`);
  (next ?? find('[data-act=more]')).focus();
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
  region.exact = region.box = region.view = null;
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
  redo,
  clear() { remember(null); [regions, chosen] = [[], -1]; refresh(); },
  close,
  more() { remember(null); newRegion(); tool = 'brush'; refresh(); },
  boxes() { addBoxes(find('.pd-exact textarea').value); },
};

root.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button?.dataset.drop) drop(+button.dataset.drop);
  else if (button?.dataset.tool) { tool = button.dataset.tool; refresh(); }
  else if (button?.dataset.chip) { chosen = button.dataset.chip - 1; refresh(); }
  else if (button?.dataset.act) acts[button.dataset.act]();
  else if (button?.dataset.example) {
    const example = setup.examples[button.dataset.example];
    open(example.picture, setup.regions ? example.regions : [], example.question);
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
  if (!picture || event.target.closest?.('input:not([type=range]), textarea')) return;
  const key = event.key.toLowerCase();
  if (event.ctrlKey || event.metaKey) {
    const act = key === 'y' || (key === 'z' && event.shiftKey) ? redo : key === 'z' ? undo : null;
    if (act) { event.preventDefault(); act(); }
  } else if (key === 'delete' || key === 'backspace') {
    const chip = event.target.closest?.('.pd-chips [data-region]');
    const ours = event.target === document.body || root.contains(event.target);
    const index = chip ? chip.dataset.region - 1 : ours && setup.regions ? chosen : -1;
    if (index >= 0) { event.preventDefault(); drop(index); }
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
"""
