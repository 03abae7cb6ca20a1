// The painter, part 2 of 3: draws the image, its regions and their chips.

const TURNS = 12; // directions in which a region's shape is moved to make its rim
const THIN = 1.8; // width of a rim, in CSS pixels
const THICK = 3; // of the one that is lit up
const ANCHOR_ROWS = 48; // rows in which a place for a region's number is looked for

// Canvas pixels of a CSS pixel.
function density() {
  return window.devicePixelRatio || 1;
}

// Fits the canvas into the room that the page has for it.
function resize() {
  if (!image) return;
  const room = Math.max(stage.clientWidth - 2, 200);
  const scale = Math.min(room / width, (0.6 * innerHeight) / height);
  canvas.style.width = `${width * scale}px`;
  canvas.style.height = `${height * scale}px`;
  canvas.width = Math.max(1, Math.round(width * scale * density()));
  canvas.height = Math.max(1, Math.round(height * scale * density()));
  refresh();
}

// Looks of a region.

// A copy of a region's canvas in one color.
function tinted(region, color) {
  const copy = document.createElement('canvas');
  copy.width = region.canvas.width;
  copy.height = region.canvas.height;
  const context = copy.getContext('2d');
  context.drawImage(region.canvas, 0, 0);
  context.globalCompositeOperation = 'source-in';
  context.fillStyle = color;
  context.fillRect(0, 0, copy.width, copy.height);
  return copy;
}

// A line around a filled shape, at the size of the shown canvas: the shape moved in every
// direction, without the shape itself.
function rimOf(filled, thickness) {
  const rim = document.createElement('canvas');
  rim.width = canvas.width;
  rim.height = canvas.height;
  const context = rim.getContext('2d');
  for (let turn = 0; turn < TURNS; turn++) {
    const angle = (2 * Math.PI * turn) / TURNS;
    const x = thickness * Math.cos(angle);
    const y = thickness * Math.sin(angle);
    context.drawImage(filled, x, y, rim.width, rim.height);
  }
  context.globalCompositeOperation = 'destination-out';
  context.drawImage(filled, 0, 0, rim.width, rim.height);
  return rim;
}

// How a region looks at the canvas's size: made again only after one of the two has changed.
function viewOf(region, index) {
  const key = `${index} ${canvas.width} ${canvas.height}`;
  if (region.view?.key !== key) {
    const filled = tinted(region, colorOf(index).fill);
    region.view = {
      key,
      filled,
      thin: rimOf(filled, THIN * density()),
      thick: rimOf(filled, THICK * density()),
      anchor: anchorOf(region),
    };
  }
  return region.view;
}

// Where a region's number stands, as shares of width and height: the middle of the longest run of
// painted pixels among some rows, which is always inside. Null of an empty region.
function anchorOf(region) {
  const own = region.canvas;
  const { data } = pixelsOf(region);
  const step = Math.max(1, Math.round(own.height / ANCHOR_ROWS));
  let best = null;
  for (let y = 0; y < own.height; y += step) {
    let start = -1; // of the run that x is in; -1: in none
    for (let x = 0; x <= own.width; x++) {
      const inside = x < own.width && data[4 * (y * own.width + x) + 3] > INSIDE;
      if (inside && start < 0) start = x;
      if (inside || start < 0) continue;
      if (!best || x - start > best.run) best = { run: x - start, x: (x + start) / 2, y };
      start = -1;
    }
  }
  return best && { x: best.x / own.width, y: best.y / own.height };
}

// The canvas.

function paint() {
  if (!image) return;
  pen.globalAlpha = 1;
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  regions.forEach(paintRegion);

  pen.font = `600 ${14 * density()}px system-ui, sans-serif`;
  pen.textAlign = 'center';
  pen.textBaseline = 'middle';
  regions.forEach(paintNumber); // above all regions
  pen.globalAlpha = 1;
  if (drag && isArea(drag.tool)) paintDraggedBox();
}

// Whether another region is lit up.
function isDimmed(index) {
  return lit !== null && lit !== index;
}

function paintRegion(region, index) {
  const view = viewOf(region, index);
  // The image is seen as the model sees it: only what is being painted is filled.
  if (drag && !isArea(drag.tool) && index === chosen) {
    pen.globalAlpha = 0.42;
    pen.drawImage(view.filled, 0, 0, canvas.width, canvas.height);
  }
  pen.globalAlpha = isDimmed(index) ? 0.3 : 1;
  pen.drawImage(lit === index ? view.thick : view.thin, 0, 0);
}

function paintNumber(region, index) {
  const { anchor } = viewOf(region, index);
  if (!anchor) return;
  const number = index + 1;
  const dense = density();
  const high = 22 * dense;
  const wide = Math.max(high, pen.measureText(number).width + 12 * dense);
  const x = between(anchor.x * canvas.width, wide / 2, canvas.width - wide / 2);
  const y = between(anchor.y * canvas.height, high / 2, canvas.height - high / 2);

  pen.globalAlpha = isDimmed(index) ? 0.35 : 1;
  pen.beginPath();
  pen.roundRect(x - wide / 2, y - high / 2, wide, high, 6 * dense);
  pen.fillStyle = colorOf(index).fill;
  pen.strokeStyle = '#fff';
  pen.lineWidth = 1.5 * dense;
  pen.fill();
  pen.stroke();
  pen.fillStyle = colorOf(index).ink;
  pen.fillText(number, x, y + dense / 2);
}

function paintDraggedBox() {
  const scale = canvas.width / width;
  const [x0, y0, x1, y1] = boxOf(drag).map((side) => side * scale);
  pen.strokeStyle = colorOf(regions.length).fill;
  pen.lineWidth = 2 * density();
  pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
}

function between(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

// Paints before the next frame, once however often it is asked for.
let isDue = false;
function repaint() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    paint();
  });
}

// Chips: one for each region, to choose or remove it.

function chipOf(region, index) {
  const number = document.createElement('button');
  number.dataset.chip = index + 1;
  number.dataset.region = index + 1;
  number.textContent = index + 1;
  number.title = `region ${index + 1}: paint on; Delete removes it`;
  number.setAttribute('aria-pressed', index === chosen);

  const cross = document.createElement('button');
  cross.dataset.drop = index;
  cross.dataset.region = index + 1;
  cross.textContent = '×';
  cross.title = `remove region ${index + 1}`;
  cross.setAttribute('aria-label', cross.title);

  const chip = document.createElement('span');
  chip.className = 'pd-chip';
  chip.style.setProperty('--own', colorOf(index).fill);
  chip.style.setProperty('--ink', colorOf(index).ink);
  chip.append(number, cross);
  return chip;
}

// The chip-like button that begins a region of its own.
function moreButton() {
  const more = document.createElement('button');
  more.textContent = '+ region';
  more.dataset.act = 'more';
  more.disabled = regions.length > 0 && isEmpty(regions[regions.length - 1]);
  return more;
}

// Brings chips and buttons up to date, the focus kept, and paints.
function refresh() {
  const chips = find('.pd-chips');
  const buttons = () => [...chips.querySelectorAll('button')];
  const focused = buttons().indexOf(document.activeElement); // -1: it is elsewhere
  chips.replaceChildren(...regions.map(chipOf), moreButton());
  if (focused >= 0) buttons()[focused]?.focus();

  for (const button of root.querySelectorAll('[data-tool]')) {
    button.setAttribute('aria-pressed', button.dataset.tool === tool);
  }
  find('[data-act=undo]').disabled = !past.length;
  find('[data-act=redo]').disabled = !future.length;
  find('[data-act=clear]').disabled = !regions.length;
  repaint();
}

// Removes a region; a focus on its chip goes to the next one, or to '+ region'.
function dropRegion(index) {
  const hadFocus = find('.pd-chips').contains(document.activeElement);
  remember(null);
  regions = regions.filter((_, each) => each !== index);
  chosen = Math.min(chosen, regions.length - 1);
  refresh();
  if (!hadFocus) return;
  const next = find(`[data-chip="${Math.min(index + 1, regions.length)}"]`);
  (next ?? find('[data-act=more]')).focus();
}
