"""Seeded synthetic scenes: pictures of plain objects with exact masks, captions and questions.

A scene is a function of its split and seed alone, so a data set is a range of integers. Objects
are signed distance functions sampled at pixel centres: the mask is exact (distance <= 0) and the
drawn edge is antialiased. H, W are rows and columns; points are (x, y) in pixels, y downwards.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .shape_objects import SHAPES, Layer, Plan, coverage, pattern_tone

SPLITS = ("train", "heldout")
# name: (main tone, tone of its pattern). The second tone keeps the hue, so that it is never
# another colour of the table, and differs enough in lightness to survive down-sampling.
COLOURS = {
    "red": ((222, 28, 32), (255, 178, 172)),
    "green": ((22, 150, 56), (172, 244, 178)),
    "blue": ((32, 64, 226), (164, 196, 255)),
    "yellow": ((252, 228, 28), (128, 112, 0)),
    "purple": ((140, 32, 172), (234, 176, 250)),
    "orange": ((252, 132, 8), (122, 54, 0)),
    "white": ((252, 252, 252), (98, 98, 102)),
    "black": ((10, 10, 12), (98, 98, 102)),
}
SIZES = {"small": (0.29, 0.31), "large": (0.44, 0.48)}  # diameter over the picture's short side
PATTERNS = ("plain", "striped", "dotted")
GRID = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
POSITIONS = tuple(name for row in GRID for name in row)
VOCABULARY = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "pattern": PATTERNS,
    "position": POSITIONS,
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")

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
GRID_MARGIN = 0.05  # of a side, between an object's centre and a line of the grid
CROWDING = 0.6  # sum of squared diameters over the picture's area
PLACE_TRIES = 16  # for one object
COUNT_TRIES = 12  # of an arrangement, before another number of objects is drawn
SCENE_TRIES = 80  # before the arrangement that always fits


@dataclass(frozen=True)
class Question:
    """A question about the whole scene, its short answer, and which kind of question it is."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True, eq=False)
class SceneObject:
    """One object: `mask` (H, W) bool of its visible pixels, `attributes` (the keys of
    `VOCABULARY`) and the `caption` that states them."""

    mask: np.ndarray
    attributes: dict[str, str]
    caption: str


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture (RGB), its objects from back to front, and questions about the whole."""

    image: Image.Image
    objects: list[SceneObject]
    questions: list[Question]


# ---------------------------------------------------------------------------- arrangement


def _plan(rng: np.random.Generator, short: int, large_share: float, cell: tuple[int, int]) -> Plan:
    size = "large" if rng.random() < large_share else "small"
    return Plan(
        shape=SHAPES[rng.integers(len(SHAPES))],
        colour=tuple(COLOURS)[rng.integers(len(COLOURS))],
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
    """A random start of a window along one axis, its centre in the inner part of the cell."""
    low = max((cell / 3 + GRID_MARGIN) * length if cell else 0, side / 2)
    high = min(((cell + 1) / 3 - GRID_MARGIN) * length if cell < 2 else length, length - side / 2)
    return min(max(round(rng.uniform(low, max(low, high)) - side / 2), 0), length - side)


def _too_close(layer: Layer, other: Layer) -> bool:
    """Whether a layer over another would be refused: they may overlap a little, unless they are of
    one colour; then not even their corners may touch."""
    (x, y), (u, v) = layer.centre, other.centre
    distance = math.hypot(x - u, y - v)
    reach = (layer.plan.diameter + other.plan.diameter) / 2
    if layer.plan.colour != other.plan.colour:
        return distance < 0.55 * reach
    if distance < 1.06 * reach + 3:
        return True
    return bool(((layer.distance <= 1.5) & other.visible[layer.window]).any())


def _centre(mask: np.ndarray) -> tuple[float, float]:
    """The centre (x, y) of the mask's box, over the width and the height."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    x, y = columns[0] + columns[-1] + 1, rows[0] + rows[-1] + 1
    return x / (2 * width), y / (2 * height)


def position_of(mask: np.ndarray) -> str:
    """The name of the cell of the 3x3 grid in which the centre of a mask's box lies.

    Args:
        mask: (H, W) bool, not empty.
    """
    x, y = _centre(mask)
    return GRID[int(3 * y)][int(3 * x)]


def _stands(layer: Layer, visible: np.ndarray) -> bool:
    """Whether enough of a layer shows, in its cell and away from the lines of the grid."""
    if visible.sum() < MIN_VISIBLE * (layer.distance <= 0).sum():
        return False
    row, column = layer.plan.cell
    clear = all(abs(c - k / 3) >= GRID_MARGIN for c in _centre(visible) for k in (1, 2))
    return clear and position_of(visible) == GRID[row][column]


def _place(rng: np.random.Generator, layer: Layer, below: list[Layer], size: tuple) -> bool:
    """Put a layer on top of the others, in place; False when no try leaves all of them standing."""
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
    """Layers from back to front, each with its visible mask and in a cell of its own; the larger
    an object the further back, where smaller ones hide less of it."""
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
        layers: list[Layer] = []
        for layer in map(Layer.of, plans):
            if not _place(rng, layer, layers, (height, width)):
                break
            layers.append(layer)
        if len(layers) == count:
            return layers
    return _fallback(rng, height, width)


def _fallback(rng: np.random.Generator, height: int, width: int) -> list[Layer]:
    """Two small objects in the middle of two opposite corner cells: these always fit."""
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


# ---------------------------------------------------------------------------- painting


def _canvas_size(rng: np.random.Generator, split: str) -> tuple[int, int]:
    """(height, width)."""
    short = int(rng.integers(SHORT_SIDES[0], SHORT_SIDES[1] + 1))
    a, b = ASPECTS[rng.choice(len(ASPECTS), p=ASPECT_SHARES[split])]
    sides = short, round(short * a / b)
    return sides if rng.random() < WIDE_SHARES[split] else sides[::-1]


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float32: a muted tint of middle lightness with a cloudy, grainy texture."""
    hue = rng.uniform(0, 2 * math.pi) + np.array([0, 2, 4]) * math.pi / 3
    tint = rng.uniform(138, 184) * (1 + rng.uniform(0.03, 0.16) * np.cos(hue))
    texture = np.zeros((height, width), np.float32)
    for cells, strength in ((3, 9.0), (9, 5.0)):
        noise = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        texture += strength * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
    texture += rng.uniform(-5, 5, (height, width)).astype(np.float32)
    return tint.astype(np.float32) + texture[:, :, None]


def _paint(canvas: np.ndarray, layer: Layer) -> None:
    """Blend a layer over the canvas (H, W, 3), in place."""
    plan = layer.plan
    main, second = (np.add(tone, plan.tint) for tone in COLOURS[plan.colour])
    tone = np.asarray(pattern_tone(plan, len(layer.distance) // 2))[..., None]
    alpha = coverage(layer.distance)[..., None]  # (S, S, 1)
    patch = canvas[layer.window]
    patch += alpha * (main + tone * (second - main) - patch)


def _describe(layer: Layer) -> SceneObject:
    attributes = {name: getattr(layer.plan, name) for name in VOCABULARY if name != "position"}
    attributes["position"] = position_of(layer.visible)
    return SceneObject(layer.visible, attributes, caption_of(attributes))


def render_scene(seed: int, split: str = "train") -> Scene:
    """The scene of a seed: 112 to 160 pixels on the short side, 1:2 to 2:1, 2 to 8 objects.

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
    canvas = _background(rng, height, width)
    for layer in layers:
        _paint(canvas, layer)
    image = Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
    objects = [_describe(layer) for layer in layers]
    return Scene(image, objects, ask(rng, [thing.attributes for thing in objects]))


# ---------------------------------------------------------------------------- language


def caption_of(attributes: dict[str, str]) -> str:
    """The one caption of an object with these attributes."""
    return "a {size} {pattern} {colour} {shape} at the {position}".format(**attributes)


def normalise(text: str) -> str:
    """Lower case, with every run of other characters than letters and digits as one space."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


# longest first, so that "top left" is not read as "top"
_WORDS = {
    name: re.compile(rf"\b(?:{'|'.join(sorted(values, key=len, reverse=True))})\b")
    for name, values in VOCABULARY.items()
}


def named_values(text: str) -> dict[str, set[str]]:
    """Every value of each attribute that a text names, whatever its case, punctuation, order."""
    text = normalise(text)
    return {name: set(words.findall(text)) for name, words in _WORDS.items()}


def parse_caption(text: str) -> dict[str, str | None]:
    """The attributes that a text states.

    An attribute is None when no value of it occurs, and also when several different ones do: a
    text that says both "red" and "blue" does not say which colour the object has.
    """
    named = named_values(text)
    return {name: min(values) if len(values) == 1 else None for name, values in named.items()}


def answer_matches(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one, up to case, spaces and punctuation."""
    return normalise(answer) == normalise(expected)


def ask(rng: np.random.Generator, objects: list[dict[str, str]]) -> list[Question]:
    """Questions about a scene, at most one of each kind, for objects given by their attributes.

    Kinds: `count`, `count_colour`, `exists` always; `shape_of_colour`, and `colour_at` and
    `shape_at`, when some colour or position is there once.
    """
    questions = [
        Question("How many objects are there?", NUMBERS[len(objects)], "count"),
        _ask_count_colour(rng, objects),
        _ask_exists(rng, objects),
    ]
    for key, text, answer, kind in (
        ("colour", "What shape is the {colour} object?", "{shape}", "shape_of_colour"),
        ("position", "What colour is the object at the {position}?", "{colour}", "colour_at"),
        ("position", "What shape is the object at the {position}?", "{shape}", "shape_at"),
    ):
        counts = Counter(thing[key] for thing in objects)
        alone = [thing for thing in objects if counts[thing[key]] == 1]
        if alone:
            thing = alone[rng.integers(len(alone))]
            questions.append(Question(text.format(**thing), answer.format(**thing), kind))
    return questions


def _ask_count_colour(rng: np.random.Generator, objects: list[dict[str, str]]) -> Question:
    """A colour that is there in three cases of four, otherwise any of the others."""
    counts = Counter(thing["colour"] for thing in objects)
    colour = _choose_colour(rng, counts, 0.75)
    return Question(
        f"How many {colour} objects are there?", NUMBERS[counts[colour]], "count_colour"
    )


def _ask_exists(rng: np.random.Generator, objects: list[dict[str, str]]) -> Question:
    """Yes or no with even odds."""
    counts = Counter(thing["colour"] for thing in objects)
    colour = _choose_colour(rng, counts, 0.5)
    article = "an" if colour[0] in "aeiou" else "a"
    answer = "yes" if colour in counts else "no"
    return Question(f"Is there {article} {colour} object?", answer, "exists")


def _choose_colour(rng: np.random.Generator, counts: Counter, present_share: float) -> str:
    """A colour that is there in a share of the cases, otherwise one that is not."""
    present = rng.random() < present_share or len(counts) == len(COLOURS)
    choices = [colour for colour in COLOURS if (colour in counts) == present]
    return choices[rng.integers(len(choices))]


def iter_corpus(count: int, *, split: str = "train", start: int = 0) -> Iterator[str]:
    """Every caption, question and answer of `count` scenes, as text to train a tokenizer on."""
    for seed in range(start, start + count):
        scene = render_scene(seed, split)
        yield from (thing.caption for thing in scene.objects)
        for question in scene.questions:
            yield question.question
            yield question.answer
