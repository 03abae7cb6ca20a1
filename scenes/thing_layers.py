"""Draws one thing of a scene from its sprite: scaled, turned and mirrored, on a window of its own.

H, W are rows and columns; points are (x, y) in pixels, y downwards.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from .emoji_sets import ALPHA_THRESHOLD

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in gray
LINE_CONTRAST = 120  # of 255, between neighbors: from there on a line is as dark as it gets


class Sprite:
    """A drawing at several sizes, each half the one before; and its outline."""

    def __init__(self, pixels: np.ndarray):
        """Takes (h, w, 4) uint8 RGBA, cropped to its box."""
        self.size = pixels.shape[1], pixels.shape[0]
        self._levels = [Image.fromarray(np.pad(pixels, ((2, 2), (2, 2), (0, 0)))).convert("RGBa")]
        self._pixels = pixels

    @cached_property
    def outline(self) -> np.ndarray:
        """Returns the first and last pixels of every row that belong to the thing.

        (N, 2) corners of pixels, about the center. Their box, turned by any angle, is that of the
        whole drawing.
        """
        inside = self._pixels[..., 3] >= ALPHA_THRESHOLD
        rows = np.flatnonzero(inside.any(1))
        first = inside[rows].argmax(1)
        last = inside.shape[1] - inside[rows, ::-1].argmax(1)
        corners = [(x, rows + dy) for x in (first, last) for dy in (0, 1)]
        points = np.concatenate([np.stack(corner, 1) for corner in corners])
        return points - np.array(self.size) / 2

    def level(self, scale: float) -> tuple[Image.Image, int]:
        """Returns the smallest version that is not enlarged at a scale, and how often it is halved.

        It has premultiplied alpha and a margin that is transparent.
        """
        number = max(0, math.floor(-math.log2(scale))) if scale < 1 else 0
        while len(self._levels) <= number:
            self._levels.append(self._levels[-1].reduce(2))
        return self._levels[number], number


@dataclass(frozen=True)
class Pose:
    """How a thing is drawn: its concept, set, size on the image, angle, and whether mirrored."""

    concept: str
    style: str
    size: str
    diameter: float  # pixels: the longer side of the box of its whole mask
    angle: float  # radians
    is_mirrored: bool
    gains: tuple[float, float, float]  # of its colors
    shadow: tuple[float, float, float]  # x and y in shares of the diameter, and how dark
    hue: float = 0.0  # radians that its colors are turned by
    saturation: float = 1.0  # 0: gray
    line: float = 0.0  # how dark its edges are drawn, 0 to 1


@dataclass(eq=False)
class Layer:
    """A pose drawn on its window, and where that lies; parts of it may lie outside the image."""

    pose: Pose
    color: np.ndarray  # (h, w, 3) float32, times alpha
    alpha: np.ndarray  # (h, w) float32, 0 to 1
    mask: np.ndarray  # (h, w) bool: alpha of a half or more
    origin: tuple[int, int] = (0, 0)  # (row, column) of the window's corner
    inside: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))  # (H, W)
    visible: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))  # (H, W)
    on: int | None = None

    @classmethod
    def of(cls, pose: Pose, sprite: Sprite) -> "Layer":
        """Draws a pose; it is not placed yet. The window is the box of its mask and a margin."""
        cos, sin = math.cos(pose.angle), math.sin(pose.angle)
        turn = np.array([[cos, -sin], [sin, cos]])
        if pose.is_mirrored:
            turn = turn @ np.diag([-1.0, 1.0])
        points = sprite.outline @ turn.T
        low, high = points.min(0), points.max(0)
        scale = pose.diameter / (high - low).max()

        width, height = (math.ceil(side) + 4 for side in scale * (high - low))
        patch = _warp(sprite, turn, scale, (low + high) / 2, (width, height))
        alpha = patch[..., 3]
        color = _restyled(patch, pose)
        return cls(pose, color / 255, alpha / np.float32(255), alpha >= ALPHA_THRESHOLD)

    def place(self, top: int, left: int, size: tuple[int, int]) -> None:
        """Puts the window's corner at a row and column of an image of (H, W), in place."""
        self.origin = top, left
        self.inside = np.zeros(size, bool)
        rows, columns, part = self.windows(size)
        self.inside[rows, columns] = self.mask[part]
        self.visible = self.inside.copy()

    def windows(self, size: tuple[int, int]) -> tuple[slice, slice, tuple[slice, slice]]:
        """Returns the rows and columns of the image that the window covers, and its own part."""
        spans, parts = [], []
        for start, length, bound in zip(self.origin, self.mask.shape, size, strict=True):
            first, last = max(start, 0), max(min(start + length, bound), max(start, 0))
            spans.append(slice(first, last))
            parts.append(slice(first - start, last - start))
        return spans[0], spans[1], tuple(parts)


def _warp(sprite: Sprite, turn: np.ndarray, scale: float, middle: np.ndarray, size) -> np.ndarray:
    """Draws a sprite turned and scaled; `middle` of the turned drawing comes to the window's.

    Returns:
        (h, w, 4) float32 with premultiplied alpha, 0 to 255.
    """
    image, halvings = sprite.level(scale)
    shrink = 0.5**halvings
    back = turn.T  # the inverse: it turns and mirrors
    center = np.array(size) / 2
    # a point p of the window shows q = back @ ((p - center) / scale + middle) + half of the drawing
    matrix = shrink * back / scale
    shift = back @ (middle - center / scale) + np.array(sprite.size) / 2 + 2
    coefficients = (*matrix[0], shrink * shift[0], *matrix[1], shrink * shift[1])
    warped = image.transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(warped, np.float32)


def _restyled(patch: np.ndarray, pose: Pose) -> np.ndarray:
    """Changes a drawing's hue and saturation, and darkens its edges, as its pose says.

    Takes (h, w, 4) with premultiplied alpha, returns the colors (h, w, 3), 0 to 255.
    """
    color, alpha = patch[..., :3], patch[..., 3:]

    # Turn the hue at the same brightness.
    if pose.hue or pose.saturation != 1:
        gray = np.broadcast_to(LUMA, (3, 3))
        matrix = gray + pose.saturation * (np.eye(3) - gray) @ _turn_hue(pose.hue)
        color = np.clip(color @ matrix.T.astype(np.float32), 0, alpha)

    # Darken pixels by how much they differ from those above and on the left.
    if pose.line:
        steps = [np.diff(patch, axis=axis, prepend=patch.take([0], axis)) for axis in (0, 1)]
        edges = sum(np.abs(step).max(2) for step in steps)
        darkness = pose.line * np.clip(edges / LINE_CONTRAST, 0, 1)
        color = color * (1 - darkness[..., None])
    return color


def _turn_hue(angle: float) -> np.ndarray:
    """Returns the matrix (3, 3) that turns colors about the axis of grays."""
    cos, part = math.cos(angle), math.sin(angle) / math.sqrt(3)
    cross = part * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return cos * np.eye(3) + (1 - cos) / 3 + cross
