"""The photographs that come with scikit-image, and what is in front on them, drawn by hand."""

from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageDraw
from scipy.ndimage import binary_fill_holes

DATA = Path(skimage.__file__).parent / "data"  # those that its wheel holds: nothing is fetched

# Outlines (x, y) in pixels; four numbers are the box of an ellipse.
FRONT = {
    "astronaut.png": [
        *[(150, 60), (190, 12), (270, 15), (300, 70), (290, 130), (310, 170), (300, 230)],
        *[(350, 280), (350, 330), (290, 380), (280, 511), (30, 511), (40, 330), (110, 240)],
        *[(100, 180), (170, 130)],
    ],
    "camera.png": [
        *[(5, 511), (20, 350), (45, 230), (110, 140), (154, 91), (193, 65), (245, 72)],
        *[(270, 117), (262, 165), (300, 205), (285, 248), (219, 261), (150, 350), (148, 511)],
    ],
    "chelsea.png": [
        *[(30, 299), (20, 180), (40, 80), (110, 20), (130, 0), (330, 0), (360, 60), (375, 150)],
        *[(350, 230), (300, 299)],
    ],
    "coffee.png": (78, 15, 482, 382),
    "coins.png": None,  # what is bright
    "motorcycle_left.png": [
        *[(110, 195), (160, 180), (200, 190), (290, 200), (380, 165), (455, 160), (480, 120)],
        *[(535, 120), (550, 180), (580, 260), (625, 300), (662, 380), (655, 440), (625, 440)],
        *[(540, 340), (510, 280), (480, 360), (430, 385), (370, 390), (280, 385), (200, 405)],
        *[(130, 370), (120, 290), (170, 245), (110, 220)],
    ],
    "retina.jpg": (15, 15, 1395, 1395),
    "rocket.jpg": [(311, 140), (322, 126), (333, 140), (335, 400), (309, 400)],
}


def photograph(name: str) -> Image.Image:
    """Opens a photograph as RGB."""
    return Image.open(DATA / name).convert("RGB")


def front_of(name: str) -> np.ndarray:
    """Returns what is in front on a photograph, bool (H, W)."""
    image, outline = photograph(name), FRONT[name]
    if outline is None:
        return binary_fill_holes(np.asarray(image.convert("L")) > 130)
    mask = Image.new("1", image.size)
    draw = ImageDraw.Draw(mask)
    if isinstance(outline, tuple):
        draw.ellipse(outline, fill=1)
    else:
        draw.polygon(outline, fill=1)
    return np.asarray(mask)
