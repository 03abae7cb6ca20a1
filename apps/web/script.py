"""The painter's script, first part: the picture and its regions, loaded, kept and sent.

The page runs `REGIONS_SCRIPT + HANDS_SCRIPT` when the painter is there. `element` is its element
and `server` its functions, given by Gradio. Pictures stay in the browser until they are sent; masks
are canvases at a scale of their own, or what they were loaded as.
"""

REGIONS_SCRIPT = r"""
const root = element.querySelector('.pd-painter');
const setup = JSON.parse(root.dataset.setup);
const find = (what) => root.querySelector(what);
const stage = find('.pd-stage'), canvas = find('canvas'), pen = canvas.getContext('2d');
const MASK_SIDE = 768;                 // of the canvases that regions are painted on
const KEPT = 24;                       // changes that can be taken back
let picture = null, source = null;     // the picture, and its file as data URL
let width = 0, height = 0;             // of the picture in pixels
let hint = '', suggested = '';         // the example's question, and the one that was put in
let regions = [], chosen = -1, tool = 'brush', lit = null, drag = null;
let past = [], future = [];            // states to go back to, and forth again

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

async function open(url, masks, question = '') {
  const image = await asImage(url);
  if (image.naturalWidth * image.naturalHeight > setup.pixels)
    return tell(`This picture is too large: ${image.naturalWidth}x${image.naturalHeight} pixels,` +
      ` at most ${setup.pixels / 1e6} megapixels.`);
  tell('');
  [picture, source, width, height] = [image, url, image.naturalWidth, image.naturalHeight];
  [regions, chosen, past, future, hint] = [[], -1, [], [], question];
  forget('captions', 'answer');
  for (const mask of masks) await addMask(mask);
  chosen = regions.length ? 0 : -1;
  stage.classList.add('pd-open');
  for (const part of root.querySelectorAll('.pd-tools, .pd-chips, .pd-exact')) part.hidden = false;
  for (const part of root.querySelectorAll('.pd-regional')) part.hidden ||= !setup.regions;
  resize();
}

function close() {
  [picture, source, regions, chosen, past, future] = [null, null, [], -1, [], []];
  forget('captions', 'answer');
  stage.classList.remove('pd-open');
  for (const part of root.querySelectorAll('.pd-tools, .pd-chips, .pd-exact')) part.hidden = true;
  find('.pd-picture').value = '';
  tell('');
}

// Regions: {canvas, exact, box, view}; the canvas is shown and painted on, and sent unless the
// region has remained what it was loaded as: an exact mask or box.

function newRegion(extra) {
  if (regions.length >= setup.masks) return tell(`At most ${setup.masks} regions.`), null;
  const own = document.createElement('canvas');
  const scale = MASK_SIDE / Math.max(width, height);
  own.width = Math.max(1, Math.round(width * scale));
  own.height = Math.max(1, Math.round(height * scale));
  const region = {canvas: own, exact: null, box: null, view: null, ...extra};
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

// Taking back, and doing again.

function snapshot(region) {
  const own = region?.canvas;
  return {
    list: [...regions], chosen, region,
    kept: region && {exact: region.exact, box: region.box},
    pixels: own?.getContext('2d').getImageData(0, 0, own.width, own.height),
  };
}

function remember(region) {
  past.push(snapshot(region));
  if (past.length > KEPT) past.shift();
  future = [];
  forget('captions');
}

function goBack(from, to) {
  const last = from.pop();
  if (!last) return;
  to.push(snapshot(last.region));
  [regions, chosen] = [last.list, last.chosen];
  if (last.region) {
    Object.assign(last.region, last.kept, {view: null});
    last.region.canvas.getContext('2d').putImageData(last.pixels, 0, 0);
  }
  forget('captions');
  refresh();
}
const undo = () => goBack(past, future), redo = () => goBack(future, past);

// What was said of what has changed since: hidden buttons of the page take it away.
function forget(...kinds) {
  for (const kind of kinds) document.querySelector(`#pd-forget-${kind}`)?.click();
}

window.pdPainter = {
  payload: () => JSON.stringify({
    picture: source,
    regions: regions.filter((region) => !isEmpty(region)).map(
      ({canvas, exact, box}) => box ? {box} : exact ? {exact}
        : {painted: canvas.toDataURL('image/png')}
    ),
  }),
  question(typed) {
    if (typed && typed !== suggested) return typed;
    return suggested = hint;
  },
};
"""
