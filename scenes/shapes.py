"""Draws seeded synthetic scenes: plain objects with exact masks, captions and questions.

A scene is a function of its split and seed alone, so a data set is a range of integers. Objects
are signed distance functions sampled at pixel centers: the mask is exact (distance <= 0) and the
drawn edge is antialiased. H, W are rows and columns; points are (x, y) in pixels, y downwards.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .language import GRID, Question, ask, caption_of
from .shape_objects import COLORS, PATTERNS, SHAPES, SIZES, Layer, Plan, coverage, pattern_tone

SPLITS = ("train", "heldout")
MIN_OBJECTS, MAX_OBJECTS = 2, 8
SHORT_SIDES = (112, 160)  # pixels, inclusive
# long side : short side, and how often; in training more of those that one tile sees squeezed
ASPECTS = ((1, 1), (5, 4), (16, 9), (2, 1))
ASPECT_SHARES = {"train": (0.40, 0.24, 0.14, 0.22), "heldout": (0.52, 0.12, 0.14, 0.22)}
WIDE_SHARES = {"train": 0.4, "heldout": 0.5}  # the others stand upright, with more mistakes
# of an object being drawn large, by their number; in training more small ones, the harder to read
LARGE_SHARES = {
    "train": (0.72, 0.68, 0.63, 0.57, 0.50, 0.42, 0.35),
    "heldout": (0.86, 0.82, 0.76, 0.68, 0.60, 0.50, 0.42),
}
MIN_VISIBLE = 0.88  # of an object's pixels
GRID_MARGIN = 0.05  # of a side, between an object's center and a line of the grid
CROWDING = 0.6  # upper bound for the squared diameters' sum over the image's area
PLACE_TRIES = 16  # for one object
COUNT_TRIES = 12  # of an arrangement, before another number of objects is drawn
SCENE_TRIES = 80  # before the arrangement that always fits


@dataclass(frozen=True, eq=False)
class SceneObject:
    """One object as it is seen, and what is true of it."""

    mask: np.ndarray  # (H, W) bool, its visible pixels
    attributes: dict[str, str]  # by the names of `language.VOCABULARY`
    caption: str  # states them


@dataclass(frozen=True, eq=False)
class Scene:
    """An image, its objects, and questions about the whole."""

    image: Image.Image  # RGB
    objects: list[SceneObject]  # from back to front
    questions: list[Question]


# Arrangement.


def _plan(rng: np.random.Generator, short: int, large_share: float, cell: tuple[int, int]) -> Plan:
    """Draws what an object in a cell of the grid is to be."""
    size = "large" if rng.random() < large_share else "small"
    return Plan(
        shape=SHAPES[rng.integers(len(SHAPES))],
        color=tuple(COLORS)[rng.integers(len(COLORS))],
        size=size,
        pattern=PATTERNS[rng.integers(len(PATTERNS))],
        cell=cell,
        diameter=short * rng.uniform(*SIZES[size]),
        angle=math.radians(rng.uniform(-10, 10)),
        stripe_angle=math.radians(45 * rng.integers(4) + rng.uniform(-8, 8)),
        offset=tuple(rng.uniform(-0.5, 0.5, 2)),
        tint=rng.uniform(-8, 8, 3),
    )


def _corner(rng: np.random.Generator, cell: int, length: int, side: int) -> int:
    """Draws the start of a window along one axis, its center in the inner part of the cell."""
    low = max((cell / 3 + GRID_MARGIN) * length if cell else 0, side / 2)
    high = min(((cell + 1) / 3 - GRID_MARGIN) * length if cell < 2 else length, length - side / 2)
    return min(max(round(rng.uniform(low, max(low, high)) - side / 2), 0), length - side)


def _too_close(layer: Layer, other: Layer) -> bool:
    """Tells whether a layer is too close to one below it.

    They may overlap a little, unless they are of one color: then not even their edges may touch.
    """
    (x, y), (u, v) = layer.center, other.center
    distance = math.hypot(x - u, y - v)
    reach = (layer.plan.diameter + other.plan.diameter) / 2
    if layer.plan.color != other.plan.color:
        return distance < 0.55 * reach
    if distance < 1.06 * reach + 3:
        return True
    return bool(((layer.distance <= 1.5) & other.visible[layer.window]).any())


def _center(mask: np.ndarray) -> tuple[float, float]:
    """Returns the center (x, y) of the mask's box, as shares of width and height."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    x, y = columns[0] + columns[-1] + 1, rows[0] + rows[-1] + 1
    return x / (2 * width), y / (2 * height)


def position_of(mask: np.ndarray) -> str:
    """Names the cell of the 3x3 grid in which the center of a mask's box lies.

    Args:
        mask: (H, W) bool, not empty.
    """
    x, y = _center(mask)
    return GRID[int(3 * y)][int(3 * x)]


def _stands(layer: Layer, visible: np.ndarray) -> bool:
    """Tells whether enough of a layer shows, in its cell and away from the grid's lines."""
    if visible.sum() < MIN_VISIBLE * (layer.distance <= 0).sum():
        return False
    row, column = layer.plan.cell
    clear = all(abs(c - k / 3) >= GRID_MARGIN for c in _center(visible) for k in (1, 2))
    return clear and position_of(visible) == GRID[row][column]


def _place(rng: np.random.Generator, layer: Layer, below: list[Layer], size: tuple) -> bool:
    """Puts a layer over the others, in place; False when no try leaves enough of each to see."""
    height, width = size
    side = len(layer.distance)
    for _ in range(PLACE_TRIES):
        row, column = layer.plan.cell
        layer.origin = _corner(rng, row, height, side), _corner(rng, column, width, side)
        if any(_too_close(layer, other) for other in below):
            continue

        layer.visible = np.zeros(size, bool)
        layer.visible[layer.window] = layer.distance <= 0
        left = [other.visible & ~layer.visible for other in below]
        if all(map(_stands, [*below, layer], [*left, layer.visible])):
            for other, visible in zip(below, left, strict=True):
                other.visible = visible
            return True
    return False


def _arrange(rng: np.random.Generator, height: int, width: int, split: str) -> list[Layer]:
    """Arranges layers from back to front, each with its visible mask and in a cell of its own.

    The larger an object, the further back it lies, where smaller ones hide less of it.
    """
    short = min(height, width)
    for attempt in range(SCENE_TRIES):
        if attempt % COUNT_TRIES == 0:
            count = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
        large_share = LARGE_SHARES[split][count - MIN_OBJECTS]
        cells = [divmod(int(cell), 3) for cell in rng.permutation(9)[:count]]
        plans = [_plan(rng, short, large_share, cell) for cell in cells]
        plans.sort(key=lambda plan: plan.diameter, reverse=True)
        if sum(plan.diameter**2 for plan in plans) > CROWDING * height * width:
            continue

        # from the largest up, each where the ones below it stay visible; else all anew
        layers: list[Layer] = []
        for layer in map(Layer.of, plans):
            if not _place(rng, layer, layers, (height, width)):
                break
            layers.append(layer)
        if len(layers) == count:
            return layers
    return _fallback(rng, height, width)


def _fallback(rng: np.random.Generator, height: int, width: int) -> list[Layer]:
    """Arranges two small objects in the middle of two opposite corner cells: these always fit."""
    layers = [Layer.of(_plan(rng, min(height, width), 0.0, (cell, cell))) for cell in (0, 2)]
    for layer in layers:
        side = len(layer.distance)
        layer.origin = tuple(
            min(max(round((2 * cell + 1) / 6 * length - side / 2), 0), length - side)
            for cell, length in zip(layer.plan.cell, (height, width), strict=True)
        )
        layer.visible = np.zeros((height, width), bool)
        layer.visible[layer.window] = layer.distance <= 0
    return layers


# Painting.


def _canvas_size(rng: np.random.Generator, split: str) -> tuple[int, int]:
    """Draws the image's height and width."""
    short = int(rng.integers(SHORT_SIDES[0], SHORT_SIDES[1] + 1))
    a, b = ASPECTS[rng.choice(len(ASPECTS), p=ASPECT_SHARES[split])]
    sides = short, round(short * a / b)
    return sides if rng.random() < WIDE_SHARES[split] else sides[::-1]


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draws (H, W, 3) float32: a muted tint of middle lightness, cloudy and grainy."""
    hue = rng.uniform(0, 2 * math.pi) + np.array([0, 2, 4]) * math.pi / 3
    tint = rng.uniform(138, 184) * (1 + rng.uniform(0.03, 0.16) * np.cos(hue))
    texture = np.zeros((height, width), np.float32)
    for cells, strength in ((3, 9.0), (9, 5.0)):
        noise = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        texture += strength * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
    texture += rng.uniform(-5, 5, (height, width)).astype(np.float32)
    return tint.astype(np.float32) + texture[:, :, None]


def _paint(canvas: np.ndarray, layer: Layer) -> None:
    """Blends a layer over the canvas (H, W, 3), in place."""
    plan = layer.plan
    main, second = (np.add(tone, plan.tint) for tone in COLORS[plan.color])
    tone = np.asarray(pattern_tone(plan, len(layer.distance) // 2))[..., None]
    alpha = coverage(layer.distance)[..., None]  # (S, S, 1)
    patch = canvas[layer.window]
    patch += alpha * (main + tone * (second - main) - patch)


def _describe(layer: Layer) -> SceneObject:
    """Returns a placed layer as an object, with the words that are true of it."""
    plan = layer.plan
    attributes = {
        "shape": plan.shape,
        "colour": plan.color,
        "size": plan.size,
        "pattern": plan.pattern,
        "position": position_of(layer.visible),
    }
    return SceneObject(layer.visible, attributes, caption_of(attributes))


def render_scene(seed: int, split: str = "train") -> Scene:
    """Renders the scene of a seed: 2 to 8 objects, the short side 112 to 160 pixels, at most 2:1.

    The same seed and split give the same bits (for one version of numpy); the splits draw from
    separate random streams, and in training more of what is hard (`ASPECT_SHARES`,
    `WIDE_SHARES`, `LARGE_SHARES`).

    Raises:
        ValueError: a negative seed, or a split that is not in `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"expected a split out of {SPLITS}, got {split!r}")
    if seed < 0:
        raise ValueError(f"expected a seed >= 0, got {seed}")

    rng = np.random.default_rng([SPLITS.index(split), seed])
    height, width = _canvas_size(rng, split)
    layers = _arrange(rng, height, width, split)

    canvas = _background(rng, height, width)  # (H, W, 3)
    for layer in layers:
        _paint(canvas, layer)
    image = Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))

    objects = [_describe(layer) for layer in layers]
    return Scene(image, objects, ask(rng, [thing.attributes for thing in objects]))


def iter_corpus(count: int, *, split: str = "train", start: int = 0) -> Iterator[str]:
    """Yields every caption, question and answer of `count` scenes, to train a tokenizer on."""
    for seed in range(start, start + count):
        scene = render_scene(seed, split)
        yield from (thing.caption for thing in scene.objects)
        for question in scene.questions:
            yield question.question
            yield question.answer
