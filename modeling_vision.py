"""The vision path: tower, connector, region prompts, image tokens and RoI-align.

    tiles (T, 3, S, S) --> tower, prompts added to patches --> (T, P, C) --> merge, connector -->
    features (T, cells, D) --+--> image tokens, spliced into the sequence
                             +--> RoI-align of each region's box, replayed as RoI tokens

Axis letters: T tiles, P patches of a tile, R region prompts, K regions of the batch, C vision
width, D text width, h w rows and columns of cells.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SiglipVisionConfig
from transformers.activations import ACT2FN
from transformers.models.siglip.modeling_siglip import (
    SiglipEncoder,
    SiglipPreTrainedModel,
    SiglipVisionEmbeddings,
)

from .configuration_perceptiondlm import PerceptionDLMConfig
from .image_tiling import anyres_map_size

ROI_SAMPLES = 2  # bilinear samples a bin and axis


class PerceptionDLMVisionModel(SiglipPreTrainedModel):
    """Runs SigLIP's embeddings and the layers that are used, with region prompts on patches."""

    config: SiglipVisionConfig
    main_input_name = "pixel_values"
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_init()

    def forward(self, pixel_values, patch_prompts=None) -> torch.Tensor:
        """Returns features (T, P, C), without a final norm, of `pixel_values` (T, 3, S, S).

        `patch_prompts` (T, P, C) is added to the patch embeddings.
        """
        hidden = self.embeddings(pixel_values)  # (T, P, C)
        if patch_prompts is not None:
            hidden = hidden + patch_prompts.to(hidden)
        return self.encoder(inputs_embeds=hidden).last_hidden_state


class PerceptionDLMConnector(nn.Module):
    """Brings merged patches to text width: linear, exact GELU, linear."""

    def __init__(self, config: PerceptionDLMConfig):
        super().__init__()
        width = config.vision_config.hidden_size * config.spatial_merge_size**2
        self.linear_1 = nn.Linear(width, config.text_config.hidden_size)
        self.act = ACT2FN["gelu"]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, merged: torch.Tensor) -> torch.Tensor:
        """Returns features (T, cells, D) of merged patches (T, cells, merge^2 C)."""
        return self.linear_2(self.act(self.linear_1(merged)))


class RegionPrompts(nn.Embedding):
    """Holds the learned prompts (R, C), as large as the patch embeddings they are added to."""


def patch_prompts(region_prompts: nn.Module, region_patches: torch.Tensor) -> torch.Tensor:
    """Sums, for each patch, the prompts of the regions that it belongs to.

    `region_prompts` is a `RegionPrompts` or an adapter around it, `region_patches` bool
    (T, R, h, w). Returns (T, P, C).
    """
    T, R, h, w = region_patches.shape
    table = region_prompts(torch.arange(R, device=region_patches.device))  # (R, C)
    return region_patches.flatten(2).transpose(1, 2).to(table) @ table


def merge_patches(features: torch.Tensor, merge: int) -> torch.Tensor:
    """Concatenates each square of merge x merge patches, row by row (pixel unshuffle).

    (T, P, C) to (T, P / merge^2, merge^2 * C), tokens row-major.
    """
    T, P, C = features.shape
    n = int(P**0.5) // merge
    squares = features.view(T, n, merge, n, merge, C).transpose(2, 3)  # (T, n, n, merge, merge, C)
    return squares.reshape(T, n * n, merge * merge * C)


# From features to image tokens.


def tile_counts(features, image_grids: Sequence[tuple[int, int]], image_layout: str) -> list[int]:
    """Counts the tiles of each image, its thumbnail or squeezed tile included.

    Raises ValueError where they do not add up to the tiles of `features` (T, cells, D).
    """
    # A thumbnail follows several tiles; anyres always has the squeezed image first.
    sizes = [columns * rows for columns, rows in image_grids]
    counts = [n + 1 if image_layout == "anyres" or n > 1 else n for n in sizes]
    if sum(counts) != len(features):
        raise ValueError(
            f"expected {sum(counts)} tiles for grids {image_grids}, got {len(features)}"
        )
    return counts


def tile_map(features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Lays the tiles (tiles, n * n, D) of a grid (columns, rows) out as one map (h, w, D)."""
    columns, rows = grid
    n = int(features.shape[1] ** 0.5)
    tiles = features.view(rows, columns, n, n, -1).transpose(1, 2)  # (rows, n, columns, n, D)
    return tiles.reshape(rows * n, columns * n, -1)


def tiled_tokens(features: torch.Tensor, grid, image_size, newline, config) -> torch.Tensor:
    """Returns the tokens (tokens, D) of a tiled image: its tiles in order."""
    return features.flatten(0, 1)


def anyres_tokens(features: torch.Tensor, grid, image_size, newline, config) -> torch.Tensor:
    """Returns the tokens (tokens, D) of an anyres image.

    These are the squeezed tile's, then those of the cropped map, a newline after each row; of one
    padded tile, its tokens and one newline.
    """
    squeezed, tiles = features[0], features[1:]
    # An image of one padded tile has no map.
    if not len(tiles):
        return torch.cat([squeezed, newline[None]])

    # Crop the padding off the map, and shrink what is left to the size that is allowed.
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


IMAGE_TOKENS = {"tiled": tiled_tokens, "anyres": anyres_tokens}


# From features to RoI tokens.


def replay_regions(
    features: torch.Tensor,
    image_grids: Sequence[tuple[int, int]],
    boxes: torch.Tensor,
    box_images: torch.Tensor,
    config: PerceptionDLMConfig,
) -> torch.Tensor:
    """Returns the RoI tokens (K, roi_output_size^2, D) of the boxes.

    Args:
        features: (T, cells, D), of all images' tiles.
        image_grids: (columns, rows) of each image.
        boxes: (K, 4), normalized xyxy; box_images: int (K,), each box's image.
    """
    size = config.roi_output_size
    if not len(boxes):
        return features.new_zeros(0, size**2, features.shape[-1])
    counts = tile_counts(features, image_grids, config.image_layout)
    boxes, box_images = boxes.to(features.device), box_images.to(features.device)

    # Each box in cells of its image's map, and where the tiles of that map begin.
    starts = torch.tensor([0, *counts[:-1]], device=boxes.device).cumsum(0)
    grids = torch.tensor(image_grids, device=boxes.device)  # (images, 2)
    first_tiles, grids = starts[box_images], grids[box_images]
    boxes = boxes * (grids * config.cells_per_side).repeat(1, 2)
    if config.roi_convention == "released":  # from the second tile on, and scaled twice
        first_tiles = first_tiles + (grids.prod(1) > 1)
        boxes = boxes / config.roi_stride
    return roi_align(features, first_tiles, grids, boxes, (size, size)).flatten(1, 2)


def roi_align(
    features: torch.Tensor,
    first_tiles: torch.Tensor,
    grids: torch.Tensor,
    boxes: torch.Tensor,
    size: tuple[int, int],
) -> torch.Tensor:
    """Averages bilinear samples of each box's bins (torchvision's `aligned` RoI-align).

    It reads the maps of all images at once, which are not laid out for it.

    Args:
        features: (T, n * n, D), the cells of all images' tiles.
        first_tiles: int (K,), where the tiles of each box's map begin.
        grids: int (K, 2), their (columns, rows).
        boxes: (K, 4), xyxy in cells of the map; half a cell is subtracted. Two samples a bin and
            axis.
        size: bins (rows, columns).

    Returns (K, rows, columns, D). A sample more than a cell outside the map counts as zero.
    """
    T, cells_per_tile, D = features.shape
    n = int(cells_per_tile**0.5)
    first, columns = first_tiles[:, None, None], grids[:, 0, None, None]
    cells = features.flatten(0, 1)

    # Where the samples lie, and which cells are around them.
    corners = boxes.float() - 0.5
    ys = _sample_points(corners[:, 1], corners[:, 3], size[0])  # (K, rows * samples)
    xs = _sample_points(corners[:, 0], corners[:, 2], size[1])  # (K, columns * samples)
    y0, y1, wy, y_inside = _neighbors(ys, grids[:, 1:] * n)
    x0, x1, wx, x_inside = _neighbors(xs, grids[:, :1] * n)

    def corner(y, x):
        y, x = y[:, :, None], x[:, None, :]
        tile = first + y // n * columns + x // n
        return cells[(tile * n + y % n) * n + x % n]  # (K, ys, xs, D)

    # Interpolate each sample, and average those of a bin.
    wy, wx = wy[:, :, None, None].to(cells.dtype), wx[:, None, :, None].to(cells.dtype)
    top = corner(y0, x0) * (1 - wx) + corner(y0, x1) * wx
    bottom = corner(y1, x0) * (1 - wx) + corner(y1, x1) * wx
    inside = (y_inside[:, :, None] & x_inside[:, None, :])[..., None]
    samples = (top * (1 - wy) + bottom * wy) * inside
    bins = samples.view(-1, size[0], ROI_SAMPLES, size[1], ROI_SAMPLES, D)
    return bins.mean(dim=(2, 4))


def _sample_points(start, end, bins: int):
    """Places the samples of each bin evenly between start and end (K,), (K, bins * samples)."""
    offsets = torch.arange(bins * ROI_SAMPLES, device=start.device) + 0.5
    return start[:, None] + offsets * ((end - start) / (bins * ROI_SAMPLES))[:, None]


def _neighbors(points, lengths):
    """Finds the lower and upper cell, the weight of the upper, and whether a point counts."""
    inside = (points >= -1.0) & (points <= lengths)
    points = torch.minimum(points.clamp(min=0), (lengths - 1).to(points.dtype))
    low = points.floor().long()
    return low, torch.minimum(low + 1, lengths - 1), points - low, inside
