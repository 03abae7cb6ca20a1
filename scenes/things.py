"""Draws seeded scenes of things: everyday objects on photographs, with exact masks and facts.

    atlases (emoji_sets)      photographs (backgrounds)
           |                          |
      a pose each                  a crop
           |                          |
     thing_layers --> thing_arrangement --> paint --> noise, JPEG --> ThingScene
                              |
                        thing_facts

A scene is a function of its split and seed alone (for one version of the libraries), so a data set
is a range of integers. H, W are rows and columns; points are (x, y), y downwards.
"""

import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .backgrounds import SEEN_PHOTOGRAPHS, UNSEEN_PHOTOGRAPHS, draw_background, open_photographs
from .emoji_sets import SEEN_SETS, SETS, UNSEEN_SETS, Atlas, open_atlas
from .thing_arrangement import MAX_COUNT, SIZES, arrange, facts_of, hidden_share, on_lattice
from .thing_facts import ThingFacts
from .thing_layers import Layer, Pose, Sprite


@dataclass(frozen=True)
class Split:
    """What the scenes of a split may be made of."""

    styles: tuple[str, ...]  # of `emoji_sets.SETS`
    photographs: tuple[str, ...]
    part: str  # of a photograph, as in `backgrounds.crop_area`
    restyled_share: float = 0.0  # of the things have other colors or dark edges


RESTYLED_SHARE = 0.3  # of the things that training draws
MAX_HUE = 40  # degrees that their colors are turned by
SATURATIONS = (0.2, 1.6)  # times their own
LINE_SHARE = 0.6  # of them have dark edges
LINES = (0.3, 1.0)  # how dark

SPLITS = {
    "train": Split(SEEN_SETS, tuple(SEEN_PHOTOGRAPHS), "train", RESTYLED_SHARE),
    "heldout": Split(SEEN_SETS, tuple(SEEN_PHOTOGRAPHS), "heldout"),
    "unseen_style": Split(UNSEEN_SETS, tuple(SEEN_PHOTOGRAPHS), "heldout"),
    "unseen_background": Split(SEEN_SETS, tuple(UNSEEN_PHOTOGRAPHS), "whole"),
}
COUNTS = (2, 8)  # things of a scene whose number is drawn
SHORT_SIDES = (112, 192)  # pixels
ASPECTS = (1.0, 1.25, 1.5, 16 / 9)  # long side : short side
MAX_ANGLE = 25  # degrees
FEW_SMALLEST = 0.19  # of the short side, where things are few
LATTICE_DIAMETER = 0.155  # of the short side, where 24 things lie side by side
# (small, medium-sized, large), for up to so many things
SIZE_SHARES = {
    2: (0.2, 0.4, 0.4),
    4: (0.3, 0.45, 0.25),
    8: (0.5, 0.4, 0.1),
    12: (0.85, 0.15, 0.0),
    MAX_COUNT: (1.0, 0.0, 0.0),
}
SCENE_TRIES = 10  # before things are put side by side
MAX_NOISE = 9.0  # standard deviation, of 255
JPEG_QUALITIES = (45, 95)
JPEG_SHARE = 0.7


@dataclass(frozen=True, eq=False)
class SceneThing:
    """One thing as it is seen, and what is true of it."""

    mask: np.ndarray  # (H, W) bool, its visible pixels
    facts: ThingFacts
    style: str  # the set that draws it
    diameter: float  # pixels: the longer side of the box of its whole mask
    hidden_share: float  # of its pixels on the image, by other things


@dataclass(frozen=True, eq=False)
class ThingScene:
    """An image and its things."""

    image: Image.Image  # RGB
    things: list[SceneThing]  # from back to front


class Sources:
    """What scenes are drawn from."""

    def __init__(self, atlases: Mapping[str, Atlas], photographs: Mapping[str, Image.Image]):
        """Takes atlases by the names of `SETS`, all of the same concepts, and photographs."""
        self.photographs = photographs
        self._atlases = atlases
        self.concepts = tuple(next(iter(atlases.values())).sprites)
        self._sprites: dict[tuple[str, str], Sprite] = {}

    def sprite(self, style: str, concept: str) -> Sprite:
        """Returns the sprite of a concept in a style; it is prepared once."""
        key = style, concept
        if key not in self._sprites:
            self._sprites[key] = Sprite(self._atlases[style].sprites[concept])
        return self._sprites[key]


@functools.cache
def default_sources() -> Sources:
    """Opens all sets and photographs; the first time on a machine this takes npm and a minute."""
    return Sources({name: open_atlas(name) for name in SETS}, open_photographs())


# Poses.


def _restyling(rng: np.random.Generator, share: float) -> dict[str, float]:
    """Draws other colors and lines for a share of the things: keywords of `Pose`, none for most."""
    if not share or rng.random() >= share:
        return {}
    has_lines = rng.random() < LINE_SHARE
    return {
        "hue": math.radians(rng.triangular(-MAX_HUE, 0, MAX_HUE)),
        "saturation": float(rng.uniform(*SATURATIONS)),
        "line": float(rng.uniform(*LINES)) if has_lines else 0.0,
    }


def _pose(rng: np.random.Generator, style: str, concept: str, drawn: tuple, share: float) -> Pose:
    """Draws how a thing is to look.

    Args:
        drawn: the name of its size, and its diameter in pixels.
        share: how often it gets other colors or lines than its drawing.
    """
    size, diameter = drawn
    gains = rng.uniform(0.8, 1.1) * rng.uniform(0.93, 1.07, 3)
    shadow = rng.uniform(-0.06, 0.06), rng.uniform(0, 0.08), max(0.0, rng.uniform(-0.2, 0.45))
    return Pose(
        concept=concept,
        style=style,
        size=size,
        diameter=diameter,
        angle=math.radians(rng.triangular(-MAX_ANGLE, 0, MAX_ANGLE)),
        is_mirrored=bool(rng.random() < 0.5),
        gains=tuple(gains),
        shadow=shadow,
        **_restyling(rng, share),
    )


def _sizes(rng: np.random.Generator, count: int, short: int) -> list[tuple[str, float]]:
    """Draws the size and the diameter in pixels of every thing, roughly from the largest down."""
    shares = next(shares for bound, shares in SIZE_SHARES.items() if count <= bound)
    drawn = []
    for k in rng.choice(len(SIZES), size=count, p=shares):
        name = tuple(SIZES)[k]
        low, high = SIZES[name]
        if name == "small":
            few = count <= COUNTS[1]
            low, high = (FEW_SMALLEST, high) if few else (low, 0.5 * (low + high))
        drawn.append((name, short * rng.uniform(low, high)))
    return sorted(drawn, key=lambda size: size[1] * rng.uniform(0.4, 1.0), reverse=True)


def _layers(rng, sources: Sources, split: Split, sizes: Sequence[tuple[str, float]]) -> list[Layer]:
    """Draws different concepts of the sizes, each in a style of the split."""
    layers = []
    for k, drawn in zip(rng.permutation(len(sources.concepts))[: len(sizes)], sizes, strict=True):
        style = split.styles[rng.integers(len(split.styles))]
        pose = _pose(rng, style, sources.concepts[k], drawn, split.restyled_share)
        layers.append(Layer.of(pose, sources.sprite(style, pose.concept)))
    return layers


def _arranged(rng, sources: Sources, split: Split, count: int, size: tuple[int, int]):
    """Draws layers and places them; after too many tries small ones, side by side."""
    for _ in range(SCENE_TRIES):
        layers = arrange(rng, _layers(rng, sources, split, _sizes(rng, count, min(size))), size)
        if layers is not None:
            return layers
    sizes = [("small", LATTICE_DIAMETER * min(size))] * count
    return on_lattice(rng, _layers(rng, sources, split, sizes), size)


# Painting.


def _paint(canvas: np.ndarray, layer: Layer) -> None:
    """Blends a layer and its shadow over the canvas (H, W, 3), in place."""
    _shade(canvas, layer)
    rows, columns, part = layer.windows(canvas.shape[:2])
    patch, alpha = canvas[rows, columns], layer.alpha[part][..., None]
    gains = 255 * np.asarray(layer.pose.gains, np.float32)
    patch *= 1 - alpha
    patch += np.minimum(layer.color[part] * gains, 255 * alpha)


def _shade(canvas: np.ndarray, layer: Layer) -> None:
    """Darkens the canvas by a layer's soft shadow, in place."""
    x, y, darkness = layer.pose.shadow
    if not darkness:
        return
    diameter = layer.pose.diameter
    soft = math.ceil(0.05 * diameter) + 1
    alpha = Image.fromarray(np.pad(np.rint(255 * layer.alpha).astype(np.uint8), 2 * soft))
    blurred = np.asarray(alpha.filter(ImageFilter.BoxBlur(soft)), np.float32)

    # the part of the shadow that falls on the image
    top = layer.origin[0] - 2 * soft + round(y * diameter)
    left = layer.origin[1] - 2 * soft + round(x * diameter)
    height, width = canvas.shape[:2]
    first, start = max(top, 0), max(left, 0)
    part = blurred[first - top : max(height - top, 0), start - left : max(width - left, 0)]
    window = canvas[first : first + part.shape[0], start : start + part.shape[1]]
    window *= 1 - part[..., None] * np.float32(darkness / 255)


def _photographed(rng: np.random.Generator, canvas: np.ndarray) -> Image.Image:
    """Adds sensor noise to (H, W, 3) and, most times, what JPEG leaves."""
    strength = np.float32(max(0.0, rng.uniform(-2, MAX_NOISE)))
    canvas = canvas + strength * rng.standard_normal(canvas.shape, dtype=np.float32)
    image = Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
    quality = int(rng.integers(JPEG_QUALITIES[0], JPEG_QUALITIES[1] + 1))
    if rng.random() >= JPEG_SHARE:
        return image

    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _canvas_size(rng: np.random.Generator) -> tuple[int, int]:
    """Draws the image's height and width."""
    short = int(rng.integers(SHORT_SIDES[0], SHORT_SIDES[1] + 1))
    sides = short, round(short * ASPECTS[rng.integers(len(ASPECTS))])
    return sides if rng.random() < 0.55 else sides[::-1]


def render_thing_scene(
    seed: int,
    split: str = "train",
    *,
    count: int | None = None,
    sources: Sources | None = None,
) -> ThingScene:
    """Renders the scene of a seed, the short side 112 to 192 pixels, at most 16:9.

    Args:
        seed: 0 or more.
        split: of `SPLITS`; they draw from separate random streams.
        count: things of the scene, 1 to 24; drawn from 2 to 8 if None.
        sources: what it is drawn from; `default_sources()` if None.

    Raises:
        ValueError: a negative seed, another split, or another count.
    """
    if split not in SPLITS:
        raise ValueError(f"expected a split out of {tuple(SPLITS)}, got {split!r}")
    if seed < 0:
        raise ValueError(f"expected a seed >= 0, got {seed}")
    if count is not None and not 1 <= count <= MAX_COUNT:
        raise ValueError(f"expected a count from 1 to {MAX_COUNT}, got {count}")

    sources = sources or default_sources()
    rng = np.random.default_rng([tuple(SPLITS).index(split), seed, count or 0])
    chosen, size = SPLITS[split], _canvas_size(rng)
    count = count or int(rng.integers(COUNTS[0], COUNTS[1] + 1))
    layers = _arranged(rng, sources, chosen, count, size)

    canvas = draw_background(rng, sources.photographs, chosen.photographs, chosen.part, size)
    for layer in layers:
        _paint(canvas, layer)
    things = [_thing(layers, k) for k in range(count)]
    return ThingScene(_photographed(rng, canvas), things)


def _thing(layers: list[Layer], k: int) -> SceneThing:
    """Returns a placed layer as a thing of a scene."""
    layer = layers[k]
    return SceneThing(
        layer.visible,
        facts_of(layers, k),
        layer.pose.style,
        layer.pose.diameter,
        hidden_share(layer),
    )
