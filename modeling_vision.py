"""Visual features: patches merged to tokens, tiles laid out as maps, RoI-align, picture layouts.

Axis letters: T tiles, P patches of a tile, K regions, C vision width, D text width, h w rows and
columns of cells.
"""

import torch
import torch.nn.functional as F

from .image_processing_perceptiondlm import anyres_map_size

ROI_SAMPLES = 2  # bilinear samples a bin and axis


def roi_align(
    features: torch.Tensor,
    first_tiles: torch.Tensor,
    grids: torch.Tensor,
    boxes: torch.Tensor,
    size: tuple[int, int],
) -> torch.Tensor:
    """Averages bilinear samples of each box's bins (torchvision's `aligned` RoI-align), on the maps
    of all pictures at once, which are not laid out for it.

    Args:
        features: (T, n * n, D), the cells of all pictures' tiles.
        first_tiles: int (K,), where the tiles of each box's map begin.
        grids: int (K, 2), their (columns, rows).
        boxes: (K, 4), xyxy in cells of the map; half a cell is subtracted. Two samples a bin and
            axis.
        size: bins (rows, columns).

    Returns (K, rows, columns, D). A sample more than a cell outside the map counts as zero.
    """
    n = int(features.shape[1] ** 0.5)
    first, columns = first_tiles[:, None, None], grids[:, 0, None, None]
    cells = features.flatten(0, 1)
    corners = boxes.float() - 0.5
    ys = _sample_points(corners[:, 1], corners[:, 3], size[0])  # (K, rows * samples)
    xs = _sample_points(corners[:, 0], corners[:, 2], size[1])  # (K, columns * samples)
    y0, y1, wy, y_inside = _neighbours(ys, grids[:, 1:] * n)
    x0, x1, wx, x_inside = _neighbours(xs, grids[:, :1] * n)

    def corner(y, x):
        y, x = y[:, :, None], x[:, None, :]
        tile = first + y // n * columns + x // n
        return cells[(tile * n + y % n) * n + x % n]  # (K, ys, xs, D)

    wy, wx = wy[:, :, None, None].to(cells.dtype), wx[:, None, :, None].to(cells.dtype)
    top = corner(y0, x0) * (1 - wx) + corner(y0, x1) * wx
    bottom = corner(y1, x0) * (1 - wx) + corner(y1, x1) * wx
    inside = (y_inside[:, :, None] & x_inside[:, None, :])[..., None]
    samples = (top * (1 - wy) + bottom * wy) * inside
    bins = samples.view(-1, size[0], ROI_SAMPLES, size[1], ROI_SAMPLES, cells.shape[-1])
    return bins.mean(dim=(2, 4))


def _sample_points(start, end, bins: int):
    offsets = torch.arange(bins * ROI_SAMPLES, device=start.device) + 0.5
    return start[:, None] + offsets * ((end - start) / (bins * ROI_SAMPLES))[:, None]


def _neighbours(points, lengths):
    """Lower and upper cell, weight of the upper, and whether the point counts at all."""
    inside = (points >= -1.0) & (points <= lengths)
    points = torch.minimum(points.clamp(min=0), (lengths - 1).to(points.dtype))
    low = points.floor().long()
    return low, torch.minimum(low + 1, lengths - 1), points - low, inside


def tile_map(features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Lays the tiles (tiles, n * n, D) of a grid (columns, rows) out as one map (h, w, D)."""
    columns, rows = grid
    n = int(features.shape[1] ** 0.5)
    tiles = features.view(rows, columns, n, n, -1).transpose(1, 2)  # (rows, n, columns, n, D)
    return tiles.reshape(rows * n, columns * n, -1)


def merge_patches(features: torch.Tensor, merge: int) -> torch.Tensor:
    """Concatenates each square of merge x merge patches, row by row (pixel unshuffle).

    (T, P, C) to (T, P / merge^2, merge^2 * C), tokens row-major.
    """
    T, P, C = features.shape
    n = int(P**0.5) // merge
    squares = features.view(T, n, merge, n, merge, C).transpose(2, 3)  # (T, n, n, merge, merge, C)
    return squares.reshape(T, n * n, merge * merge * C)


def tiled_tokens(features: torch.Tensor, grid, image_size, newline, config) -> torch.Tensor:
    """Visual tokens (tokens, D) of a tiled picture: its tiles in order."""
    return features.flatten(0, 1)


def anyres_tokens(features: torch.Tensor, grid, image_size, newline, config) -> torch.Tensor:
    """Visual tokens of an anyres picture: the squeezed tile, then the cropped map, a newline after
    each row; of one padded tile, its tokens and one newline."""
    squeezed, tiles = features[0], features[1:]
    if not len(tiles):
        return torch.cat([squeezed, newline[None]])
    crop_h, crop_w, h, w = anyres_map_size(
        image_size, grid, config.cells_per_side, config.anyres_max_tiles
    )
    cells = tile_map(tiles, grid)
    cells = cells[crop_h : cells.shape[0] - crop_h, crop_w : cells.shape[1] - crop_w]
    if cells.shape[:2] != (h, w):
        channels_first = cells.permute(2, 0, 1)[None]
        cells = F.interpolate(channels_first, (h, w), mode="bilinear")[0].permute(1, 2, 0)
    rows = torch.cat([cells, newline.expand(h, 1, -1)], dim=1)  # (h, w + 1, D)
    return torch.cat([squeezed, rows.flatten(0, 1)])


PICTURE_TOKENS = {"tiled": tiled_tokens, "anyres": anyres_tokens}
