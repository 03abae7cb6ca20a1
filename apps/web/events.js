// The painter, part 3 of 3: what pointer, buttons, files and keys do.

const CLICK = 4; // CSS pixels: a shorter drag is a click

// Painting. Places are in pixels of the image.

function placeOf(event) {
  const box = canvas.getBoundingClientRect();
  return {
    x: ((event.clientX - box.left) / box.width) * width,
    y: ((event.clientY - box.top) / box.height) * height,
  };
}

// The box between the two ends of a drag, [x0, y0, x1, y1], in whole pixels of the image.
function boxOf({ from, to }) {
  const column = (x) => between(Math.round(x), 0, width);
  const row = (y) => between(Math.round(y), 0, height);
  return [
    column(Math.min(from.x, to.x)),
    row(Math.min(from.y, to.y)),
    column(Math.max(from.x, to.x)),
    row(Math.max(from.y, to.y)),
  ];
}

// Paints or erases a line on the chosen region.
function stroke(from, to) {
  const region = regions[chosen];
  const context = region.canvas.getContext('2d');
  const scale = region.canvas.width / width;
  const onScreen = canvas.getBoundingClientRect().width / region.canvas.width;

  context.globalCompositeOperation = tool === 'erase' ? 'destination-out' : 'source-over';
  context.lineCap = 'round';
  context.lineJoin = 'round';
  context.lineWidth = find('.pd-size input').value / onScreen;
  context.beginPath();
  context.moveTo(from.x * scale, from.y * scale);
  context.lineTo(to.x * scale + 0.01, to.y * scale); // a line of no length would not be drawn
  context.stroke();
  context.globalCompositeOperation = 'source-over';

  region.exact = null;
  region.box = null;
  region.view = null;
  repaint();
}

// Index of the region that is uppermost at a place; null: none.
function regionAt(place) {
  for (let index = regions.length - 1; index >= 0; index--) {
    const own = regions[index].canvas;
    const x = Math.floor((place.x / width) * own.width);
    const y = Math.floor((place.y / height) * own.height);
    if (own.getContext('2d').getImageData(x, y, 1, 1).data[3] > INSIDE) return index;
  }
  return null;
}

// Begins a stroke, on a region of its own where none is chosen.
function beginStroke(place) {
  if (chosen < 0) {
    if (tool === 'erase') return;
    remember(null);
    if (!newRegion()) return;
    refresh();
  } else {
    remember(regions[chosen]);
  }
  drag = { tool, from: place, to: place };
  stroke(place, place);
}

function finishBox(box) {
  const [x0, y0, x1, y1] = box;
  if (x1 - x0 <= 1 || y1 - y0 <= 1) return; // a click, not a drag
  remember(null);
  tell('');
  addBox(box);
}

// Whether a tool is used on an area between two places.
function isArea(name) {
  return name === 'box' || name === 'outline';
}

// Asks for the outline of what was clicked on, or of what a dragged box holds.
function finishOutline(done) {
  const shown = canvas.getBoundingClientRect();
  const moved = Math.hypot(done.to.x - done.from.x, done.to.y - done.from.y);
  if ((moved * shown.width) / width < CLICK) return outline([[done.from.x, done.from.y]], null);
  return outline(null, [boxOf(done)]);
}

// Adds the regions that the server finds at points or in boxes, or with neither everywhere.
async function outline(points, boxes) {
  tell('Outlining ...');
  const asked = imageUrl;
  try {
    const found = await server.outline({ image: asked, points, boxes });
    if (imageUrl !== asked) return; // another image is shown by now
    if (!found.urls) {
      tell(found.problem);
      return;
    }
    remember(null);
    tell('');
    for (const url of found.urls) await addMask(url);
    refresh();
  } catch (error) {
    tell('Outlining did not work.');
  }
}

canvas.addEventListener('pointerdown', (event) => {
  if (event.button || !setup.regions) return;
  canvas.setPointerCapture(event.pointerId);
  const place = placeOf(event);
  if (isArea(tool)) drag = { tool, from: place, to: place };
  else beginStroke(place);
});

canvas.addEventListener('pointermove', (event) => {
  const place = placeOf(event);
  if (!drag) {
    light(setup.regions ? regionAt(place) : null);
    return;
  }
  if (!isArea(drag.tool)) stroke(drag.to, place);
  drag.to = place;
  repaint();
});

canvas.addEventListener('pointerup', () => {
  if (!drag) return;
  const done = drag;
  drag = null;
  if (done.tool === 'box') finishBox(boxOf(done));
  if (done.tool === 'outline') finishOutline(done);
  refresh();
});

canvas.addEventListener('pointercancel', () => {
  drag = null;
  repaint();
});

canvas.addEventListener('pointerleave', () => {
  if (!drag) light(null);
});

// A region and what is said of it light up together; a click keeps them lit.

let keptLit = null; // index of the region that a click has lit

function light(index) {
  index ??= keptLit;
  if (index === lit) return;
  lit = index;
  for (const item of document.querySelectorAll('[data-region]')) {
    item.classList.toggle('pd-on', index !== null && +item.dataset.region === index + 1);
  }
  repaint();
}

// Index of the region that the element under an event stands for; null: none.
function regionOf(event) {
  const item = event.target.closest?.('[data-region]');
  return item ? item.dataset.region - 1 : null;
}

document.addEventListener('mouseover', (event) => {
  if (event.target !== canvas) light(regionOf(event));
});

document.addEventListener('focusin', (event) => light(regionOf(event)));

document.addEventListener('click', (event) => {
  const index = regionOf(event);
  if (index === null || event.target.closest('.pd-painter')) return;
  keptLit = keptLit === index ? null : index;
  lit = undefined; // so that `light` sets every element anew
  light(index);
});

// Buttons.

// By the `data-act` of the button.
const acts = {
  undo,
  redo,
  close: closeImage,
  clear() {
    remember(null);
    regions = [];
    chosen = -1;
    refresh();
  },
  more() {
    remember(null);
    newRegion();
    tool = 'brush';
    refresh();
  },
  everything() {
    outline(null, null);
  },
  boxes() {
    addBoxes(find('.pd-exact textarea').value);
  },
};

function openExample(index) {
  const example = setup.examples[index];
  openImage(example.image, setup.regions ? example.regions : [], example.question);
}

root.addEventListener('click', (event) => {
  const data = event.target.closest('button')?.dataset;
  if (!data) return;
  if (data.drop) {
    dropRegion(+data.drop);
  } else if (data.tool) {
    tool = data.tool;
    refresh();
  } else if (data.chip) {
    chosen = data.chip - 1;
    refresh();
  } else if (data.act) {
    acts[data.act]();
  } else if (data.example) {
    openExample(data.example);
  }
});

setup.examples.forEach((example, index) => {
  const thumbnail = document.createElement('img');
  thumbnail.src = example.image;
  thumbnail.alt = `example ${index + 1}`;
  const button = document.createElement('button');
  button.dataset.example = index;
  button.append(thumbnail);
  find('.pd-examples').append(button);
});

// Files: chosen, dropped or pasted.

find('.pd-image').addEventListener('change', (event) => {
  if (event.target.files[0]) chooseFile(event.target.files[0]);
});

find('.pd-masks').addEventListener('change', async (event) => {
  remember(null);
  tell('');
  for (const file of event.target.files) {
    const problem = refusal(file);
    if (problem) {
      tell(problem);
      continue;
    }
    try {
      await addMask(await readAsDataUrl(file));
    } catch (error) {
      tell(`${file.name}: this file cannot be read as a mask.`);
    }
  }
  event.target.value = ''; // so that the same files can be chosen again
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
  if (event.dataTransfer.files[0]) chooseFile(event.dataTransfer.files[0]);
});

document.addEventListener('paste', (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  const file = files.find((each) => each.type.startsWith('image/'));
  if (file) chooseFile(file);
});

// Keys: Ctrl+Z, Ctrl+Y or Ctrl+Shift+Z, Delete and Backspace; not for who types a text.

// What a key with Ctrl or Cmd does; undefined: nothing of ours.
function shortcutOf(key, isShifted) {
  if (key === 'y' || (key === 'z' && isShifted)) return redo;
  if (key === 'z') return undo;
  return undefined;
}

// Index of the region that Delete is meant for: the focused chip's, or the chosen one unless the
// focus is outside of the painter; -1: none.
function regionToDrop(target) {
  const chip = target.closest?.('.pd-chips [data-region]');
  if (chip) return chip.dataset.region - 1;
  const isOurs = target === document.body || root.contains(target);
  return isOurs && setup.regions ? chosen : -1;
}

document.addEventListener('keydown', (event) => {
  if (!image || event.target.closest?.('input:not([type=range]), textarea')) return;
  const key = event.key.toLowerCase();
  if (event.ctrlKey || event.metaKey) {
    const act = shortcutOf(key, event.shiftKey);
    if (!act) return;
    event.preventDefault();
    act();
  } else if (key === 'delete' || key === 'backspace') {
    const index = regionToDrop(event.target);
    if (index < 0) return;
    event.preventDefault();
    dropRegion(index);
  }
});

new ResizeObserver(resize).observe(stage);
