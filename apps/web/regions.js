// The painter, part 1 of 3: the image and its regions, loaded, kept, taken back and sent.
//
// Gradio runs the three parts as the body of one function, in the order of `SCRIPTS` in assets.py,
// so they share their names. It gives them `element`, the component's own, and `server`, the Python
// functions that the page may call. Images stay in the browser until they are sent. Regions are
// painted on canvases at a scale of their own, or are what they were loaded as.

const root = element.querySelector('.pd-painter');
const find = (selector) => root.querySelector(selector);
const setup = JSON.parse(root.dataset.setup); // limits, palette and examples, from painter.py

const stage = find('.pd-stage');
const canvas = find('canvas');
const pen = canvas.getContext('2d');

const MASK_SIDE = 768; // pixels of the longer side of a region's own canvas
const MAX_UNDO = 24; // changes that can be taken back
const INSIDE = 127; // alpha above which a painted pixel belongs to its region

let image = null; // the image that is shown
let imageUrl = null; // its file as a data URL, which is what is sent
let width = 0; // of the image, in pixels
let height = 0;

let regions = []; // see `newRegion`
let chosen = -1; // index of the region that is painted on; -1: none
let lit = null; // index of the region that is lit up; null: none
let tool = 'brush'; // 'brush', 'box', 'erase' or 'outline'
let drag = null; // what the pointer is doing: {tool, from, to}

let past = []; // snapshots to go back to
let future = []; // snapshots to go forth to again

let hint = ''; // the example's question
let suggested = ''; // the hint that was put into the question's field

// Shows a message above the tools, or with '' hides it.
function tell(text) {
  const alert = find('.pd-alert');
  alert.textContent = text;
  alert.hidden = !text;
}

// Images.

function readAsDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function decodeImage(url) {
  const decoded = new Image();
  decoded.src = url;
  await decoded.decode();
  return decoded;
}

// Says why a file cannot be used, or ''.
function refusal(file) {
  if (!/^image\/(png|jpeg|webp|gif|bmp)$/.test(file.type)) {
    return `${file.name}: an image is needed (PNG, JPEG, WebP, GIF or BMP).`;
  }
  if (file.size > setup.bytes) {
    const got = (file.size / 2 ** 20).toFixed(1);
    const allowed = +(setup.bytes / 2 ** 20).toFixed(1);
    return `${file.name} is too large: ${got} MiB, at most ${allowed} MiB.`;
  }
  return '';
}

// Opens an image file that a person chose, dropped or pasted.
async function chooseFile(file) {
  const problem = refusal(file);
  if (problem) {
    tell(problem);
    return;
  }
  try {
    await openImage(await readAsDataUrl(file), []);
  } catch (error) {
    tell(`${file.name}: this file cannot be read as an image.`);
  }
}

// Shows an image with the regions of its masks (data URLs), in place of what there was.
async function openImage(url, masks, question = '') {
  const opened = await decodeImage(url);
  if (opened.naturalWidth * opened.naturalHeight > setup.pixels) {
    tell(
      `This image is too large: ${opened.naturalWidth}x${opened.naturalHeight} pixels,` +
        ` at most ${setup.pixels / 1e6} megapixels.`,
    );
    return;
  }
  tell('');
  image = opened;
  imageUrl = url;
  width = opened.naturalWidth;
  height = opened.naturalHeight;
  hint = question;
  dropRegions();
  forget('captions', 'answer');

  for (const mask of masks) await addMask(mask);
  chosen = regions.length ? 0 : -1;

  stage.classList.add('pd-open');
  showTools(true);
  resize();
}

function closeImage() {
  image = null;
  imageUrl = null;
  dropRegions();
  forget('captions', 'answer');

  stage.classList.remove('pd-open');
  showTools(false);
  find('.pd-image').value = '';
  tell('');
}

function dropRegions() {
  regions = [];
  chosen = -1;
  past = [];
  future = [];
}

// Shows or hides the tools; a model that describes no regions never gets those for regions.
function showTools(shown) {
  for (const part of root.querySelectorAll('.pd-tools, .pd-chips, .pd-exact')) part.hidden = !shown;
  if (setup.regions) return;
  for (const part of root.querySelectorAll('.pd-regional')) part.hidden = true;
}

// Regions.

// Adds a region and chooses it; null where there may be no more.
//
// A region has
//   canvas: what is shown and painted on, and sent unless one of the next two is there;
//   exact: the data URL of the mask that it was loaded from; box: [x0, y0, x1, y1] in pixels of
//     the image that it was made of: both null as soon as it is painted on;
//   view: how it is drawn, made again after a change (see drawing.js).
function newRegion(extra) {
  if (regions.length >= setup.masks) {
    tell(`At most ${setup.masks} regions.`);
    return null;
  }
  const own = document.createElement('canvas');
  const scale = MASK_SIDE / Math.max(width, height);
  own.width = Math.max(1, Math.round(width * scale));
  own.height = Math.max(1, Math.round(height * scale));

  const region = { canvas: own, exact: null, box: null, view: null, ...extra };
  regions.push(region);
  chosen = regions.length - 1;
  return region;
}

function colorOf(index) {
  return setup.palette[index % setup.palette.length];
}

// The pixels of a region's canvas, as ImageData.
function pixelsOf(region) {
  const own = region.canvas;
  return own.getContext('2d').getImageData(0, 0, own.width, own.height);
}

function isEmpty(region) {
  const bytes = pixelsOf(region).data;
  for (let i = 3; i < bytes.length; i += 4) {
    if (bytes[i] > INSIDE) return false;
  }
  return true;
}

// Adds a region of a mask of the image's size: what is neither black nor transparent is inside.
async function addMask(url) {
  const mask = await decodeImage(url);
  if (mask.naturalWidth !== width || mask.naturalHeight !== height) {
    tell(
      `A mask needs the image's size ${width}x${height}, this one has ` +
        `${mask.naturalWidth}x${mask.naturalHeight}.`,
    );
    return;
  }
  const region = newRegion({ exact: url });
  if (!region) return;

  const context = region.canvas.getContext('2d', { willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  context.drawImage(mask, 0, 0, region.canvas.width, region.canvas.height);
  const pixels = pixelsOf(region);
  const bytes = pixels.data; // red, green, blue, alpha of each pixel
  for (let i = 0; i < bytes.length; i += 4) {
    const isInside = (bytes[i] | bytes[i + 1] | bytes[i + 2]) && bytes[i + 3];
    bytes.set(isInside ? [0, 0, 0, 255] : [0, 0, 0, 0], i);
  }
  context.putImageData(pixels, 0, 0);
}

function addBox(box) {
  const [x0, y0, x1, y1] = box;
  const meetsImage = x1 > 0 && y1 > 0 && x0 < width && y0 < height;
  if (!(x0 < x1 && y0 < y1 && meetsImage)) {
    tell(
      `A box needs x0 < x1 and y0 < y1 inside the ${width}x${height} image, got ` +
        `${box.join(', ')}.`,
    );
    return;
  }
  const region = newRegion({ box });
  if (!region) return;

  const scale = region.canvas.width / width;
  const context = region.canvas.getContext('2d');
  context.fillRect(x0 * scale, y0 * scale, (x1 - x0) * scale, (y1 - y0) * scale);
}

// Adds the boxes of a text, one on each line; none of them if a line is no box.
function addBoxes(text) {
  const boxes = [];
  for (const line of text.split('\n').filter((each) => each.trim())) {
    const box = (line.match(/-?\d*\.?\d+/g) ?? []).map(Number);
    if (box.length !== 4) {
      tell(`A box is x0, y0, x1, y1: four numbers, got "${line}".`);
      return;
    }
    boxes.push(box);
  }
  remember(null);
  tell('');
  boxes.forEach(addBox);
  find('.pd-exact textarea').value = '';
  refresh();
}

// Taking back, and doing again.

// The list of regions as it is, and the pixels of one that is about to change (null: of none).
function snapshot(region) {
  return {
    list: [...regions],
    chosen,
    region,
    loaded: region && { exact: region.exact, box: region.box },
    pixels: region && pixelsOf(region),
  };
}

// To be called before a change: of a region's pixels, or with null of the list.
function remember(region) {
  past.push(snapshot(region));
  if (past.length > MAX_UNDO) past.shift();
  future = [];
  forget('captions');
}

// Takes the last snapshot of `from`, and puts one of the present on `to`.
function goBack(from, to) {
  const last = from.pop();
  if (!last) return;
  to.push(snapshot(last.region));
  regions = last.list;
  chosen = last.chosen;
  if (last.region) {
    Object.assign(last.region, last.loaded, { view: null });
    last.region.canvas.getContext('2d').putImageData(last.pixels, 0, 0);
  }
  forget('captions');
  refresh();
}

function undo() {
  goBack(past, future);
}

function redo() {
  goBack(future, past);
}

// Takes away what was said of something that has changed since: hidden buttons of the page do it.
function forget(...kinds) {
  for (const kind of kinds) document.querySelector(`#pd-forget-${kind}`)?.click();
}

// What the page's buttons ask for, see `HAND_OVER` and `SUGGEST` in page.py.

function describe(region) {
  if (region.box) return { box: region.box };
  if (region.exact) return { exact: region.exact };
  return { painted: region.canvas.toDataURL('image/png') };
}

window.pdPainter = {
  // What is sent, as JSON; `read_payload` of input.py reads it.
  payload() {
    const filled = regions.filter((region) => !isEmpty(region));
    return JSON.stringify({ image: imageUrl, regions: filled.map(describe) });
  },

  // The question that a person typed, or else the example's.
  question(typed) {
    if (typed && typed !== suggested) return typed;
    suggested = hint;
    return suggested;
  },
};
