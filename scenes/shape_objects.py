"""Draws one object of a synthetic scene: its shape as a signed distance, its pattern, its window.

Distances are sampled at pixel centers and negative inside; points are (x, y), y downwards.
"""

import math
from dataclasses import dataclass, field

import numpy as np


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1.0


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) - 0.86


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # apex (0, -0.87), base from (-1, 0.87) to (1, 0.87): its box is centerd on the origin
    return np.maximum(y - 0.87, (1.74 * abs(x) - (y + 0.87)) / math.hypot(1.74, 1.0))


def _fold_arms(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns coordinates along and across (>= 0) the nearest of five arms; one points upwards."""
    arm = 2 * math.pi / 5
    angle, radius = np.arctan2(x, -y), np.hypot(x, y)
    angle = abs(angle - arm * np.round(angle / arm))
    return radius * np.cos(angle), radius * np.sin(angle)


def _star(x: np.ndarray, y: np.ndarray, outer: float = 1.08, inner: float = 0.52) -> np.ndarray:
    along, across = _fold_arms(x, y)
    # one straight edge from the point (outer, 0) to the notch at 36 degrees
    edge_along = inner * math.cos(math.pi / 5) - outer
    edge_across = inner * math.sin(math.pi / 5)
    cross = (along - outer) * edge_across - across * edge_along
    return cross / math.hypot(edge_along, edge_across)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return abs(np.hypot(x, y) - 0.71) - 0.29


def _cross(x: np.ndarray, y: np.ndarray, arm: float = 0.36) -> np.ndarray:
    x, y = abs(x), abs(y)
    return np.minimum(np.maximum(x - 1.0, y - arm), np.maximum(x - arm, y - 1.0))


# signed distance, in radii, to a shape of radius 1 around the origin (negative inside)
DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
SHAPES = tuple(DISTANCES)
# name: (main tone, tone of its pattern). The second tone keeps the hue, so that it is never
# another color of the table, and differs enough in lightness to survive down-sampling.
COLORS = {
    "red": ((222, 28, 32), (255, 178, 172)),
    "green": ((22, 150, 56), (172, 244, 178)),
    "blue": ((32, 64, 226), (164, 196, 255)),
    "yellow": ((252, 228, 28), (128, 112, 0)),
    "purple": ((140, 32, 172), (234, 176, 250)),
    "orange": ((252, 132, 8), (122, 54, 0)),
    "white": ((252, 252, 252), (98, 98, 102)),
    "black": ((10, 10, 12), (98, 98, 102)),
}
SIZES = {"small": (0.29, 0.31), "large": (0.44, 0.48)}  # diameter over the image's short side
PATTERNS = ("plain", "striped", "dotted")


@dataclass(frozen=True)
class Plan:
    """What an object is, before it has a place; `cell` is (row, column) of the 3x3 grid."""

    shape: str
    color: str
    size: str
    pattern: str
    cell: tuple[int, int]
    diameter: float  # pixels
    angle: float  # radians
    stripe_angle: float  # radians
    offset: tuple[float, float]  # sub-pixel part of the center (x, y)
    tint: np.ndarray  # (3,) jitter of the color

    def local(self, half: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns x and y of a window's pixel centers (2 * half a side), in the object's frame."""
        axis = np.arange(-half, half) + 0.5
        x, y = axis[None, :] - self.offset[0], axis[:, None] - self.offset[1]
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return cos * x + sin * y, cos * y - sin * x


@dataclass
class Layer:
    """A plan rendered on its window; `origin` (row, column) is the window's corner."""

    plan: Plan
    distance: np.ndarray  # (S, S) pixels to the edge, negative inside
    origin: tuple[int, int] = (0, 0)
    visible: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # (H, W)

    @classmethod
    def of(cls, plan: Plan) -> "Layer":
        """Renders a plan; it is not placed yet."""
        radius = plan.diameter / 2
        x, y = plan.local(math.ceil(1.1 * radius) + 2)
        return cls(plan, DISTANCES[plan.shape](x / radius, y / radius) * radius)

    @property
    def window(self) -> tuple[slice, slice]:
        """Returns the rows and columns of the image that the layer covers."""
        (top, left), side = self.origin, len(self.distance)
        return slice(top, top + side), slice(left, left + side)

    @property
    def center(self) -> tuple[float, float]:
        """Returns the center (x, y) of the window, in pixels of the image."""
        half = len(self.distance) / 2
        return self.origin[1] + half, self.origin[0] + half


def coverage(distance: np.ndarray) -> np.ndarray:
    """Returns the share of a pixel inside an edge, by the edge's signed distance in pixels."""
    return np.clip(0.5 - distance, 0.0, 1.0)


def pattern_tone(plan: Plan, half: int) -> np.ndarray | float:
    """Returns where the second tone shows, from 0 to 1: (S, S), or 0 for a plain object.

    Periods follow the diameter, so that a small object still shows three stripes or four dots.
    """
    if plan.pattern == "plain":
        return 0.0

    x, y = plan.local(half)
    small = plan.size == "small"
    if plan.pattern == "striped":
        period = plan.diameter / (3.6 if small else 5.0)
        cos, sin = math.cos(plan.stripe_angle), math.sin(plan.stripe_angle)
        return coverage(abs(_wrap(cos * x + sin * y, period)) - 0.22 * period)

    if plan.shape == "star":  # a square lattice would miss its arms
        radius = plan.diameter / 2
        along, across = _fold_arms(x, y)
        along = np.minimum(along, abs(along - 0.6 * radius))
        return coverage(np.hypot(along, across) - 0.19 * radius)
    period = plan.diameter / (3.2 if small else 4.4)
    return coverage(np.hypot(_wrap(x, period), _wrap(y, period)) - 0.33 * period)


def _wrap(x: np.ndarray, period: float) -> np.ndarray:
    """Returns the distance to the nearest multiple of the period, signed."""
    return x - period * np.round(x / period)
