"""Draws rectangles and ellipses, turned or not, as polygons in pixels."""

import math
from collections.abc import Iterable

ELLIPSE_POINTS = 128  # of the polygon that stands for an ellipse


def turned(
    points: Iterable[tuple[float, float]], center: tuple[float, float], degrees: float
) -> list[float]:
    """Turns points clockwise about a center; returns [x0, y0, x1, y1, ...]."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    outline = []
    for x, y in points:
        dx, dy = x - center[0], y - center[1]
        outline += [center[0] + dx * cosine - dy * sine, center[1] + dx * sine + dy * cosine]
    return outline


def corners(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    """Returns the four corners of a rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def ellipse(x: float, y: float, radius_x: float, radius_y: float) -> list[tuple[float, float]]:
    """Returns points along an ellipse."""
    angles = [2 * math.pi * k / ELLIPSE_POINTS for k in range(ELLIPSE_POINTS)]
    return [(x + radius_x * math.cos(a), y + radius_y * math.sin(a)) for a in angles]
