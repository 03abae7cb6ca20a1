"""Draws backgrounds of scenes: crops of photographs, or textures, blurred and of other colors.

The photographs are those that scikit-image and scikit-learn ship; none is downloaded. Most have a
part to train on and another to hold out; a few are held out altogether. Nobody's face is in them.
"""

import io
import math
from collections.abc import Mapping, Sequence
from importlib import resources

import numpy as np
from PIL import Image, ImageFilter

from ..common.extras import extra

SEEN_PHOTOGRAPHS = {  # name -> package whose data holds it
    "brick.png": "skimage.data",
    "cell.png": "skimage.data",
    "china.jpg": "sklearn.datasets.images",
    "coffee.png": "skimage.data",
    "grass.png": "skimage.data",
    "ihc.png": "skimage.data",
    "moon.png": "skimage.data",
    "motorcycle_left.png": "skimage.data",
    "retina.jpg": "skimage.data",
    "rocket.jpg": "skimage.data",
}
UNSEEN_PHOTOGRAPHS = {
    "flower.jpg": "sklearn.datasets.images",
    "gravel.png": "skimage.data",
    "hubble_deep_field.jpg": "skimage.data",
}
HELD_OUT_FROM = 0.65  # of a seen photograph's width; what is right of it is never trained on
PHOTOGRAPH_SHARE = 0.75  # of scenes; the others have textures
CROP_SCALES = (0.35, 1.0)  # of the largest crop of the scene's shape
MAX_BLUR = 2.5  # pixels
LONG_SIDE = 720  # pixels of a photograph as it is kept


def open_photographs() -> dict[str, Image.Image]:
    """Opens all photographs, RGB, at most `LONG_SIDE` pixels long."""
    opened = {}
    for name, package in (SEEN_PHOTOGRAPHS | UNSEEN_PHOTOGRAPHS).items():
        with extra("scenes"):
            content = resources.files(package).joinpath(name).read_bytes()
        image = Image.open(io.BytesIO(content)).convert("RGB")
        image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
        opened[name] = image
    return opened


def crop_area(width: int, part: str) -> tuple[float, float]:
    """Returns the first and last column that crops may take.

    Args:
        width: of the photograph.
        part: "train", "heldout" or "whole".
    """
    return {
        "train": (0.0, HELD_OUT_FROM * width),
        "heldout": (HELD_OUT_FROM * width, float(width)),
        "whole": (0.0, float(width)),
    }[part]


def _photograph(
    rng: np.random.Generator, image: Image.Image, part: str, height: int, width: int
) -> Image.Image:
    """Draws a crop of a photograph, of the scene's shape and size, half of them mirrored."""
    left, right = crop_area(image.width, part)
    scale = rng.uniform(*CROP_SCALES) * min((right - left) / width, image.height / height)
    x = rng.uniform(left, right - scale * width)
    y = rng.uniform(0, image.height - scale * height)
    box = (x, y, min(x + scale * width, right), min(y + scale * height, image.height))
    crop = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def _texture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Draws clouds, stripes or checks between two colors."""
    kind = rng.integers(3)
    if kind == 0:
        tone = _clouds(rng, height, width)
    else:
        period, angle = rng.uniform(8, 50), rng.uniform(0, math.pi)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        u = x * math.cos(angle) + y * math.sin(angle)
        v = y * math.cos(angle) - x * math.sin(angle)
        waves = np.sin(2 * math.pi * u / period + rng.uniform(0, 6))
        if kind == 2:
            waves = waves * np.sin(2 * math.pi * v / period)
        tone = np.clip(rng.uniform(0.6, 4) * waves, -1, 1) + 0.3 * _clouds(rng, height, width)

    first, second = rng.uniform(20, 235, (2, 3))
    share = np.clip(0.5 + 0.5 * tone, 0, 1)[..., None]  # (H, W, 1)
    return Image.fromarray((first + share * (second - first)).astype(np.uint8))


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draws smooth noise around 0, (H, W) float32."""
    noise = np.zeros((height, width), np.float32)
    for cells, strength in ((3, 0.7), (8, 0.5), (24, 0.3)):
        coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        fine = coarse.resize((width, height), Image.Resampling.BILINEAR)
        noise += strength * np.asarray(fine)
    return noise


def draw_background(
    rng: np.random.Generator,
    photographs: Mapping[str, Image.Image],
    names: Sequence[str],
    part: str,
    size: tuple[int, int],
) -> np.ndarray:
    """Draws the background of a scene.

    Args:
        photographs: by name, RGB.
        names: of those that may be used.
        part: of a photograph that may be used, as in `crop_area`.
        size: (H, W).

    Returns:
        (H, W, 3) float32, from 0 to 255.
    """
    if rng.random() < PHOTOGRAPH_SHARE:
        image = _photograph(rng, photographs[names[rng.integers(len(names))]], part, *size)
    else:
        image = _texture(rng, *size)
    blur = rng.uniform(0, MAX_BLUR)
    if blur > 0.5:
        image = image.filter(ImageFilter.BoxBlur(blur))
    return _recolored(rng, np.asarray(image, np.float32))


def _recolored(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Shifts colors, contrast and lightness; sometimes takes the color away first."""
    if rng.random() < 0.15:
        pixels = np.repeat(pixels.mean(2, keepdims=True), 3, axis=2)
    gains = rng.uniform(0.8, 1.15) * rng.uniform(0.82, 1.18, 3)
    lift = rng.uniform(-15, 25)
    return np.clip(pixels * gains.astype(np.float32) + np.float32(lift), 0, 255)
