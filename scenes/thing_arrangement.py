"""Arranges the things of a scene so that all that is said of them is clearly true.

Every fact has a gap between its values that no scene enters: sizes, how much is hidden, what a
border cuts off, whether one thing lies on another, and the cells of the grid. Things are placed
from back to front; a place stands only while all facts of all things are clear.
"""

import math

import numpy as np

from .language import GRID
from .thing_facts import ThingFacts
from .thing_layers import Layer, Pose

MAX_COUNT = 24  # things of a scene
# Diameter of a thing's whole mask over the image's short side, as it is drawn.
SIZES = {"small": (0.15, 0.25), "medium-sized": (0.32, 0.41), "large": (0.52, 0.68)}
# Share of a thing's pixels on the image that other things hide.
HIDDEN = {"whole": (0.0, 0.02), "partly hidden": (0.08, 0.42), "mostly hidden": (0.51, 0.6)}
CLEAR_HIDER = 1.5  # times the pixels that the next thing hides
CUT = (0.12, 0.45)  # share of a thing's pixels outside the image, where a border cuts it off
ON = 0.92  # share of a thing's pixels within another's outline, from which on it lies on it
NOT_ON = 0.6  # up to here it does not
CHILD_SHARE = 0.65  # upper bound for its diameter over that of what it lies on
GRID_MARGIN = 0.03  # of a side, between the center of a visible mask's box and a grid line
MIN_PIXELS = 30  # visible, of any thing

MODES = ("free", "over", "most", "on", "cut")
MODE_SHARES = (0.3, 0.22, 0.1, 0.28, 0.1)
PLACE_TRIES = 24  # for one thing; the second half anywhere


def center_of(layer: Layer) -> tuple[float, float]:
    """Returns the center (x, y) of the visible mask's box, as shares of width and height."""
    height, width = layer.visible.shape
    window = layer.windows((height, width))[:2]
    visible = layer.visible[window]
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    x = 2 * window[1].start + columns[0] + columns[-1] + 1
    y = 2 * window[0].start + rows[0] + rows[-1] + 1
    return float(x / (2 * width)), float(y / (2 * height))


def hidden_class(share: float) -> str | None:
    """Names how much of a thing others hide; None between two classes."""
    for name, (low, high) in HIDDEN.items():
        if low <= share <= high:
            return name
    return None


def hidden_share(layer: Layer) -> float:
    """Returns the share of a layer's pixels on the image that other layers hide."""
    return 1 - np.count_nonzero(layer.visible) / np.count_nonzero(layer.inside)


def outside_share(layer: Layer) -> float:
    """Returns the share of a layer's pixels that lie outside the image."""
    return 1 - np.count_nonzero(layer.inside) / np.count_nonzero(layer.mask)


def cut_border(layer: Layer) -> str | None:
    """Names the border beyond which a layer has pixels; None without one, or with several."""
    rows = np.flatnonzero(layer.mask.any(1)) + layer.origin[0]
    columns = np.flatnonzero(layer.mask.any(0)) + layer.origin[1]
    height, width = layer.inside.shape
    crossed = {
        "left": columns[0] < 0,
        "right": columns[-1] >= width,
        "top": rows[0] < 0,
        "bottom": rows[-1] >= height,
    }
    names = [name for name, is_crossed in crossed.items() if is_crossed]
    return names[0] if len(names) == 1 else None


def _hiders(layers: list[Layer], k: int) -> list[tuple[int, int]]:
    """Returns (pixels of thing k that show another, its index), the largest first."""
    inside = layers[k].inside
    counts = [
        (int(np.count_nonzero(inside & layers[i].visible)), i) for i in range(k + 1, len(layers))
    ]
    return sorted((pair for pair in counts if pair[0]), reverse=True)


def _is_clear(layers: list[Layer], k: int) -> bool:
    """Tells whether how much of a thing is hidden, by what, and where it is leave no doubt."""
    layer = layers[k]
    if np.count_nonzero(layer.visible) < MIN_PIXELS:
        return False
    name = hidden_class(hidden_share(layer))
    if name is None:
        return False
    if any(abs(c - g / 3) < GRID_MARGIN for c in center_of(layer) for g in (1, 2)):
        return False

    hiders = _hiders(layers, k) if name != "whole" else []
    return len(hiders) < 2 or hiders[0][0] >= CLEAR_HIDER * hiders[1][0]


def _fits(layers: list[Layer]) -> bool:
    """Tells whether the uppermost layer leaves every fact clear; hides what is below, in place."""
    top = layers[-1]
    pixels, share = np.count_nonzero(top.inside), outside_share(top)
    if share and not (CUT[0] <= share <= CUT[1] and cut_border(top)):
        return False

    # what lies below it, seen or not: it may hide what hid another
    below, changed = layers[:-1], [len(layers) - 1]
    for i, other in enumerate(below):
        overlap = np.count_nonzero(top.inside & other.inside) / pixels
        if overlap < ON if top.on == i else overlap > NOT_ON:
            return False
        if overlap:
            changed.append(i)

    before = [other.visible for other in below]
    for i in changed[1:]:
        below[i].visible = below[i].visible & ~top.inside
    if all(_is_clear(layers, k) for k in changed):
        return True
    for other, visible in zip(below, before, strict=True):
        other.visible = visible
    return False


# Places.


def _free(rng: np.random.Generator, layer: Layer, size: tuple[int, int]) -> tuple[int, int]:
    """Draws a corner for a window that lies inside the image."""
    return tuple(
        int(rng.integers(0, max(bound - length, 0) + 1))
        for bound, length in zip(size, layer.mask.shape, strict=True)
    )


def _cut(rng: np.random.Generator, layer: Layer, size: tuple[int, int]) -> tuple[int, int]:
    """Draws a corner for a window of which a part lies beyond one border."""
    corner = list(_free(rng, layer, size))
    axis = int(rng.integers(2))
    out = round(rng.uniform(0.15, 0.5) * layer.mask.shape[axis])
    near = -out, size[axis] - layer.mask.shape[axis] + out
    corner[axis] = near[rng.integers(2)]
    return tuple(corner)


def _over(rng: np.random.Generator, layer: Layer, below: list[Layer]) -> tuple[int, int]:
    """Draws a corner such that a window hides a part of another."""
    return _beside(rng, layer, below[rng.integers(len(below))], (0.2, 0.45))


def _most(rng: np.random.Generator, layer: Layer, below: list[Layer]) -> tuple[int, int] | None:
    """Draws a corner such that a window hides most of another that is not larger, if any is."""
    others = [other for other in below if other.pose.diameter <= 1.1 * layer.pose.diameter]
    return _beside(rng, layer, others[rng.integers(len(others))], (0.12, 0.3)) if others else None


def _beside(rng, layer: Layer, other: Layer, reaches: tuple[float, float]) -> tuple[int, int]:
    """Draws a corner at a distance from another's middle, in shares of both diameters."""
    angle = rng.uniform(0, 2 * math.pi)
    reach = rng.uniform(*reaches) * (other.pose.diameter + layer.pose.diameter)
    middle = _middle(other)
    rows, columns = layer.mask.shape
    top = middle[0] + reach * math.sin(angle) - rows / 2
    return round(top), round(middle[1] + reach * math.cos(angle) - columns / 2)


def _middle(layer: Layer) -> tuple[float, float]:
    """Returns the middle (row, column) of a placed layer's window."""
    (top, left), (rows, columns) = layer.origin, layer.mask.shape
    return top + rows / 2, left + columns / 2


def _on(rng: np.random.Generator, layer: Layer, below: list[Layer]) -> tuple[int, int] | None:
    """Draws a corner such that a window lies on a larger thing, and notes that; None without."""
    bound = layer.pose.diameter / CHILD_SHARE
    parents = [i for i, b in enumerate(below) if b.on is None and b.pose.diameter >= bound]
    if not parents:
        return None

    layer.on = parents[rng.integers(len(parents))]
    parent = below[layer.on]
    pixels = np.flatnonzero(parent.visible)
    row, column = divmod(int(pixels[rng.integers(len(pixels))]), parent.visible.shape[1])
    # part of the way to the middle: at the edge a window would hang over
    share = rng.uniform(0.2, 0.8)
    middle = _middle(parent)
    height, width = layer.mask.shape
    top = row + share * (middle[0] - row) - height / 2
    return round(top), round(column + share * (middle[1] - column) - width / 2)


def _corner(rng, mode: str, layer: Layer, below: list[Layer], size) -> tuple[int, int] | None:
    """Draws a corner for a window; None where the mode asks for what is not there."""
    layer.on = None
    if mode == "free":
        return _free(rng, layer, size)
    if mode == "cut":
        return _cut(rng, layer, size)
    if not below:
        return None
    return {"on": _on, "most": _most, "over": _over}[mode](rng, layer, below)


def arrange(
    rng: np.random.Generator, layers: list[Layer], size: tuple[int, int]
) -> list[Layer] | None:
    """Places layers from back to front, in place; None when one of them finds none.

    Args:
        layers: in their order, unplaced.
        size: (H, W) of the image.
    """
    placed: list[Layer] = []
    for layer in layers:
        chosen = MODES[rng.choice(len(MODES), p=MODE_SHARES)]

        for attempt in range(PLACE_TRIES):
            mode = chosen if attempt < PLACE_TRIES // 2 else "free"
            corner = _corner(rng, mode, layer, placed, size)
            if corner is None:
                chosen = "free"
                continue

            layer.place(*corner, size)
            if layer.inside.any() and _fits([*placed, layer]):
                placed.append(layer)
                break
        else:
            return None
    return placed


def on_lattice(rng: np.random.Generator, layers: list[Layer], size: tuple[int, int]) -> list[Layer]:
    """Places up to 24 small layers side by side, none of which hides another, in place."""
    long_axis = int(size[1] > size[0])
    cells = [(i, j) for i in range(4) for j in range(6)]
    for layer, k in zip(layers, rng.permutation(24), strict=False):
        i, j = cells[k]
        middle = [(2 * i + 1) / 8, (2 * i + 1) / 8]
        middle[long_axis] = (2 * j + 1) / 12
        corner = (
            round(m * bound - length / 2)
            for m, bound, length in zip(middle, size, layer.mask.shape, strict=True)
        )
        layer.on = None
        layer.place(*corner, size)
    return layers


# Facts.


def facts_of(layers: list[Layer], k: int) -> ThingFacts:
    """States what is true of one of the placed layers."""
    layer = layers[k]
    pose: Pose = layer.pose
    x, y = center_of(layer)
    hidden = hidden_class(hidden_share(layer))
    assert hidden is not None

    return ThingFacts(
        concept=pose.concept,
        size=pose.size,
        position=GRID[int(3 * y)][int(3 * x)],
        hidden=hidden,
        hidden_by=_hiders(layers, k)[0][1] if hidden != "whole" else None,
        on=layer.on,
        cut=cut_border(layer),
        center=(x, y),
        area=float(np.count_nonzero(layer.visible) / layer.visible.size),
    )
