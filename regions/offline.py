"""Finds regions without weights or network: classical segmentation by color, edges and size.

It sees no objects, only areas that look alike inside and unlike their surroundings. Everything is
computed on a smaller copy of the image; masks come back at the image's own size.
"""

import numpy as np
from PIL import Image

from ..common.extras import extra
from ..image_loading import load_image
from .filters import has_area
from .prompts import Box, Point, Prompts, floor_point, name_numbers, no_text_error
from .region_mask import RegionMask
from .region_tree import RegionTree

WORK_SIDE = 448  # pixels of the longer side of the copy that is worked on
PIECE_SCALE, PIECE_SIGMA, PIECE_SHARE = 40.0, 0.6, 1 / 2500  # Felzenszwalb's; the least area
MAX_REGIONS = 40  # of everything
SHARES = 0.002, 0.5  # of the image, the smallest and the largest region of everything
MIN_SCORE = 0.18  # of everything: of its level, how much longer a region lives than its parts
SIZE_WORTH = 0.7  # area to this power, times life, is what a region is worth
POINT_WORTH = 0.3  # of a region around a point: small things are clicked on, too
BOX_MARGIN = 0.35  # of its sides, that GrabCut sees around a box
BOX_SIDE = 320  # pixels of the longer side of that, for GrabCut is slow
GRABCUT_STEPS = 5
LEAST_PIXELS = 16  # inside and outside of a box, that GrabCut can do anything with
LEAST_FOUND = 0.05  # share of a box, below which nothing in it stands out
SOFTNESS = 0.7  # pixels of the copy, over which a mask's edge is smoothed: lines of one stay
MAIN_PART = 0.1  # share of the largest part, of what belongs to a region in several parts


class OfflineSegmenter:
    """Segments images with OpenCV and scikit-image alone."""

    reads_text = False
    note = (
        "the offline segmenter finds regions by color and edges alone; for masks that follow"
        " objects name a model as segmenter, say facebook/sam2.1-hiera-small"
    )

    def __init__(self):
        with extra("regions"):
            import cv2  # noqa: F401
            import skimage.segmentation  # noqa: F401

    def __call__(self, image, *, points=None, boxes=None, text=None) -> list[RegionMask]:
        """Finds the regions of points and boxes, one for each, in order; else everything.

        Args, errors: as of `Segmenter`. Regions of everything do not overlap; the most conspicuous
        comes first.
        """
        image = load_image(image)
        prompts = Prompts.read(image.size, points, boxes, text)
        if prompts.texts:
            raise no_text_error(prompts.texts[0])
        pixels = np.asarray(image)
        if prompts.everything:
            return _everything(pixels)

        tree = _grow_tree(_shrink(pixels, WORK_SIDE)) if prompts.points else None
        found = [_around_point(pixels, tree, point) for point in prompts.points]
        return found + [_in_box(pixels, box) for box in prompts.boxes]


# Everything, and points: nodes of the tree of merges.


def _everything(pixels: np.ndarray) -> list[RegionMask]:
    tree = _grow_tree(_shrink(pixels, WORK_SIDE))
    life = tree.life(MAX_REGIONS)
    usable = has_area(tree.area, tree.pieces.size, SHARES) & (_score(life) >= MIN_SCORE)
    worth = np.where(usable, (tree.area / tree.pieces.size) ** SIZE_WORTH * life, 0)

    chosen = sorted(tree.best_cut(worth), key=lambda node: -worth[node])
    return [
        _region(tree, node, pixels, life[node], f"region {k}") for k, node in enumerate(chosen, 1)
    ]


def _around_point(pixels: np.ndarray, tree: RegionTree, point: Point) -> RegionMask:
    height, width = tree.pieces.shape
    column, row = floor_point(
        (point[0] * width / pixels.shape[1], point[1] * height / pixels.shape[0])
    )
    path = tree.path(column, row)
    life, share = tree.life(MAX_REGIONS)[path], tree.area[path] / tree.pieces.size
    worth = np.where(share <= SHARES[1], share**POINT_WORTH * life, 0)

    best = int(worth.argmax())
    return _region(tree, path[best], pixels, life[best], name_numbers("point", point))


def _region(tree: RegionTree, node: int, pixels: np.ndarray, life, origin: str) -> RegionMask:
    score = float(_score(life))
    return RegionMask(_enlarge(tree.mask(node), pixels), score=score, origin=origin)


def _score(life: np.ndarray) -> np.ndarray:
    """Returns how long regions live as shares in [0, 1): 1 - birth / death."""
    return np.round(1 - np.exp(-life), 4)


def _grow_tree(pixels: np.ndarray) -> RegionTree:
    import cv2
    from skimage.segmentation import felzenszwalb

    smooth = cv2.bilateralFilter(pixels, 7, 30, 5)
    least = max(20, round(PIECE_SHARE * pixels[..., 0].size))
    pieces = felzenszwalb(smooth, PIECE_SCALE, PIECE_SIGMA, least)
    lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)
    return RegionTree(pieces, lab, _edge_strength(lab.astype(np.float32)))


def _edge_strength(lab: np.ndarray) -> np.ndarray:
    """Returns the largest gradient of the channels, 1 where it is that of a strong edge."""
    import cv2

    soft = cv2.GaussianBlur(lab, (0, 0), 1.2)
    across, down = cv2.Sobel(soft, cv2.CV_32F, 1, 0), cv2.Sobel(soft, cv2.CV_32F, 0, 1)
    strength = (np.hypot(across, down) * [1.0, 1.6, 1.6]).max(-1)
    return strength / (np.percentile(strength, 97) + 1e-6)


# Boxes: GrabCut, on the box and what is around it.


def _in_box(pixels: np.ndarray, box: Box) -> RegionMask:
    height, width = pixels.shape[:2]
    left, top, right, bottom = _window(box, width, height)
    window = _shrink(pixels[top:bottom, left:right], BOX_SIDE)
    scale = window.shape[1] / (right - left), window.shape[0] / (bottom - top)
    mask = _grab(window, _inside(box, (left, top), scale))

    whole = np.zeros((height, width), bool)
    whole[top:bottom, left:right] = _enlarge(mask, pixels[top:bottom, left:right])
    return RegionMask(whole, origin=name_numbers("box", box))


def _window(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Returns the box with a margin of what is around it, in whole pixels inside the image."""
    x0, y0, x1, y1 = box
    across, down = BOX_MARGIN * (x1 - x0) + 2, BOX_MARGIN * (y1 - y0) + 2
    left, top = max(0, int(x0 - across)), max(0, int(y0 - down))
    return left, top, min(width, int(x1 + across) + 1), min(height, int(y1 + down) + 1)


def _inside(box: Box, corner: tuple[int, int], scale: tuple[float, float]) -> tuple[slice, slice]:
    """Returns the rows and columns of a box in a window, at least one of each."""
    x0, x1 = (round((side - corner[0]) * scale[0]) for side in box[::2])
    y0, y1 = (round((side - corner[1]) * scale[1]) for side in box[1::2])
    return slice(y0, max(y1, y0 + 1)), slice(x0, max(x1, x0 + 1))


def _grab(window: np.ndarray, inside: tuple[slice, slice]) -> np.ndarray:
    """Returns what differs from the outside of a box, bool (H, W); all of it if nothing does."""
    import cv2

    labels = np.full(window.shape[:2], cv2.GC_BGD, np.uint8)
    labels[inside] = cv2.GC_PR_FGD
    boxed = labels == cv2.GC_PR_FGD
    if (~boxed).sum() < LEAST_PIXELS:  # the box is the image: its rim has to be the outside
        labels[[0, -1]] = labels[:, [0, -1]] = cv2.GC_BGD
    inner = labels == cv2.GC_PR_FGD
    if min(inner.sum(), (~inner).sum()) < LEAST_PIXELS:
        return boxed

    cv2.setRNGSeed(0)  # its clusters begin at random
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(window, labels, None, *models, GRABCUT_STEPS, cv2.GC_INIT_WITH_MASK)
    found = _main_parts(labels == cv2.GC_PR_FGD)
    return found if found.sum() >= LEAST_FOUND * boxed.sum() else boxed


def _main_parts(mask: np.ndarray) -> np.ndarray:
    """Drops the parts that are specks beside the largest one."""
    import cv2

    _, parts, facts, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    areas = facts[:, cv2.CC_STAT_AREA]
    areas[0] = 0  # the outside
    return np.isin(parts, np.flatnonzero(areas >= max(1, MAIN_PART * areas.max())))


# Sizes.


def _shrink(pixels: np.ndarray, longest: int) -> np.ndarray:
    """Scales an image (H, W, 3) until no side has more than `longest` pixels."""
    height, width = pixels.shape[:2]
    scale = min(1, longest / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX, reducing_gap=2))


def _enlarge(mask: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Scales a mask to the size of pixels (H, W, 3), its edge smooth."""
    import cv2

    height, width = pixels.shape[:2]
    if mask.shape == (height, width):
        return mask
    soft = cv2.GaussianBlur(mask.astype(np.uint8) * 255, (0, 0), SOFTNESS)
    large = cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR) > 127
    if large.any():
        return large
    hard = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return hard > 0  # too thin to stay
