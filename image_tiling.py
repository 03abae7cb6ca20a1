"""Geometry of images cut into tiles: grids, canvases and the maps that are made of their cells.

    tiled     image -> grid of tiles (+ thumbnail)           -> cells of every tile, tile by tile
    anyres    image -> squeezed tile + canvas cut into tiles -> its cells + the cropped map

Integers in, integers out: no pixels and no network, so both count in the same way. A size is
(width, height) in pixels unless it says otherwise, a grid (columns, rows), a tile its side.
"""

import math

NO_CANVAS = (0, 0)  # grid of an anyres image that is one padded tile
MAX_CANVAS_SIDE = 6  # tiles; LLaVA's canvases are 1x1 to 6x6
SHRINK_FROM = 1.1  # LLaVA leaves maps alone that are less than this factor too large


# Tiled images: the grid that fits best.


def choose_grid(size: tuple[int, int], tile: int, max_tiles: int) -> tuple[int, int]:
    """Picks the grid (columns, rows) of at most `max_tiles` tiles closest to an image's aspect.

    Among equally close grids a larger one wins when the image's area exceeds half of that grid's
    (InternVL's dynamic tiling).
    """
    width, height = size
    grids = [(w, h) for w in range(1, max_tiles + 1) for h in range(1, max_tiles // w + 1)]
    best, best_distance = (1, 1), math.inf
    for w, h in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - w / h)
        tie_won = distance == best_distance and width * height > 0.5 * tile * tile * w * h
        if distance < best_distance or tie_won:
            best, best_distance = (w, h), distance
    return best


def num_tiles(grid: tuple[int, int]) -> int:
    """Counts the tiles of a tiled image: its grid's and, where these are several, a thumbnail."""
    tiles = grid[0] * grid[1]
    return tiles + 1 if tiles > 1 else 1


def tile_boxes(grid: tuple[int, int], tile: int) -> list[tuple[int, int, int, int]]:
    """Lists the half-open boxes (left, top, right, bottom) of a grid's tiles, row by row."""
    columns, rows = grid
    corners = [(c * tile, r * tile) for r in range(rows) for c in range(columns)]
    return [(x, y, x + tile, y + tile) for x, y in corners]


# Anyres images: a canvas that holds the whole image, and the map without the canvas's margins.


def choose_canvas(
    size: tuple[int, int], tile: int, max_side: int = MAX_CANVAS_SIDE
) -> tuple[int, int]:
    """Picks the canvas (columns, rows) with the most effective pixels, then the least waste.

    Effective pixels are the fitted image's, but no more than it has itself (LLaVA).
    """
    width, height = size

    def rank(grid):
        canvas_w, canvas_h = grid[0] * tile, grid[1] * tile
        scale = min(canvas_w / width, canvas_h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas_w * canvas_h

    sides = range(1, max_side + 1)
    return max(((i, j) for i in sides for j in sides), key=rank)  # max keeps the first of equals


def fit_canvas(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Scales a size, its aspect kept, to the largest that a canvas (width, height) holds."""
    width, height = size
    canvas_w, canvas_h = canvas
    if canvas_w / width < canvas_h / height:
        return canvas_w, min(math.ceil(height * (canvas_w / width)), canvas_h)
    return min(math.ceil(width * (canvas_h / height)), canvas_w), canvas_h


def center_corner(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Finds the upper left corner (x, y) at which something stands in a canvas's middle."""
    return (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2


def anyres_map_size(
    size: tuple[int, int], grid: tuple[int, int], unit: int, max_tiles: int
) -> tuple[int, int, int, int]:
    """Counts the rows and columns to crop from each side of an anyres map, and its final (h, w).

    `size` is the image's (height, width), `unit` a tile's cells a side; a map of more than
    `max_tiles` tiles' worth of cells is shrunk to that. Source: LLaVA-NeXT's unpadding and
    `anyres_max` shrinking.
    """
    height, width = size
    cells_h, cells_w = grid[1] * unit, grid[0] * unit

    # What the image does not cover of its canvas lies above and below it, or left and right.
    crop_h = crop_w = 0
    if width / height > cells_w / cells_h:
        crop_h = (cells_h - int(height * (cells_w / width))) // 2
    else:
        crop_w = (cells_w - int(width * (cells_h / height))) // 2
    h, w = cells_h - 2 * crop_h, cells_w - 2 * crop_w

    times = math.sqrt(h * w / (max_tiles * unit**2))
    if times > SHRINK_FROM:
        h, w = int(h // times), int(w // times)
    return crop_h, crop_w, h, w


def num_anyres_tokens(
    size: tuple[int, int], grid: tuple[int, int], unit: int, max_tiles: int
) -> int:
    """Counts the visual tokens of an anyres image: the squeezed tile's and the map's.

    Each row of the map ends with a newline, and so does a single padded tile. `unit` and
    `max_tiles` are those of `anyres_map_size`.
    """
    if grid == NO_CANVAS:
        return unit**2 + 1
    *_, h, w = anyres_map_size(size[::-1], grid, unit, max_tiles)
    return unit**2 + h * (w + 1)
