"""Pixels: pictures to normalised tiles, region masks to patch membership and boxes.

Axis letters: T tiles, R regions, H W rows and columns of pixels, h w of patches or cells.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

from .generation_options import expect_neutral
from .image_loading import describe, load_image, load_mask, split_label_map
from .image_tiling import (
    NO_CANVAS,
    center_corner,
    choose_canvas,
    choose_grid,
    fit_canvas,
    num_anyres_tokens,
    num_tiles,
    tile_boxes,
)

OUTSIDE = 255  # value of a region image's pixels that lie outside the mask
PADDING_COLOUR = (127, 127, 127)  # LLaVA's: the mean, in whole levels

# Arguments of transformers' image processors that mean nothing here, and what they may be but None.
IMAGE_NEUTRAL = {
    "do_convert_rgb": (True,),
    "do_resize": (True,),
    "default_to_square": (True,),
    "resample": (Image.Resampling.BICUBIC,),
    "do_rescale": (True,),
    "rescale_factor": (1 / 255,),
    "do_normalize": (True,),
    "image_mean": (0.5, [0.5] * 3),
    "image_std": (0.5, [0.5] * 3),
    "do_pad": (False,),
    "pad_size": (),
    "do_center_crop": (False,),
    "crop_size": (),
    "data_format": ("channels_first",),
    "input_data_format": (),
    "device": ("cpu",),
    "disable_grouping": (False, True),
    "image_seq_length": (),
    "return_tensors": ("pt",),
}


def resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes (bicubic, aspect not kept) to `size` (width, height) as Pillow 13 does.

    From Pillow 13 on a picture that loses much more height than width is resized vertically first,
    before it never was; values differ by several levels, so the order is fixed here.
    """
    lost_width, lost_height = picture.width - size[0], picture.height - size[1]
    if lost_height > max(0, 2 * lost_width):
        picture = picture.resize((picture.width, size[1]), Image.Resampling.BICUBIC)
    return picture.resize(size, Image.Resampling.BICUBIC)


def cut_tiles(picture: Image.Image, grid: tuple[int, int], tile: int) -> list[Image.Image]:
    """Resizes to the grid and cuts row by row; thumbnail last."""
    columns, rows = grid
    resized = resize(picture, (columns * tile, rows * tile))
    tiles = _crop_row_by_row(resized, grid, tile)
    if len(tiles) > 1:
        tiles.append(resize(picture, (tile, tile)))
    return tiles


def cut_anyres_tiles(picture: Image.Image, grid: tuple[int, int], tile: int) -> list[Image.Image]:
    """Squeezed picture first, then the picture fitted and centred on a black canvas, cut; on no
    canvas only the picture, padded to a square."""
    if grid == NO_CANVAS:
        return [resize(pad_to_square(picture), (tile, tile))]

    # Fit the image into the canvas and center it.
    canvas_size = (grid[0] * tile, grid[1] * tile)
    fitted = fit_canvas(picture.size, canvas_size)
    canvas = Image.new("RGB", canvas_size)
    canvas.paste(resize(picture, fitted), center_corner(fitted, canvas_size))
    squeezed = resize(picture, (tile, tile))
    return [squeezed, *_crop_row_by_row(canvas, grid, tile)]


def pad_to_square(picture: Image.Image) -> Image.Image:
    """Centres a picture on a grey square of its longer side."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), PADDING_COLOUR)
    square.paste(picture, center_corner(picture.size, square.size))
    return square


def _crop_row_by_row(picture: Image.Image, grid: tuple[int, int], tile: int) -> list[Image.Image]:
    return [picture.crop(box) for box in tile_boxes(grid, tile)]


def area_order(masks: Sequence[Image.Image]) -> list[int]:
    """Indices of the masks by number of non-zero pixels, largest first, equals as given."""
    areas = [sum(mask.histogram()[1:]) for mask in masks]
    return sorted(range(len(masks)), key=lambda i: -areas[i])


def region_patches(
    mask: Image.Image, number: int, grid: tuple[int, int], tile: int, patch: int
) -> np.ndarray:
    """Which patches belong to a region: bool (T, h, w), thumbnail last.

    The region's 8-bit image holds `number` under the mask and 255 elsewhere and is tiled as the
    picture is; a patch is the region's when its top-left pixel is not 255.
    """
    columns, rows = grid
    h = tile // patch
    region = mask.point([OUTSIDE] + [number] * 255)
    resized = np.asarray(resize(region, (columns * tile, rows * tile)))
    corners = resized[::patch, ::patch] != OUTSIDE  # (rows * h, columns * h)
    tiles = corners.reshape(rows, h, columns, h).swapaxes(1, 2).reshape(-1, h, h)  # (T, h, w)
    if len(tiles) == 1:
        return tiles
    thumbnail = np.asarray(resize(region, (tile, tile)))
    return np.concatenate([tiles, thumbnail[None, ::patch, ::patch] != OUTSIDE])


def region_box(mask: Image.Image, inclusive: bool) -> tuple[float, float, float, float]:
    """Normalised (xmin, ymin, xmax, ymax) of a mask; maxima are the last pixel's when `inclusive`,
    else one beyond it."""
    left, top, right, bottom = mask.getbbox()
    last = 1 if inclusive else 0
    width, height = mask.size
    return left / width, top / height, (right - last) / width, (bottom - last) / height


class PerceptionDLMImageProcessor(BaseImageProcessor):
    """Turns pictures and their region masks into tiles, patch membership and boxes.

    Args:
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        spatial_merge_size: side of the square of patches that makes one visual token.
        image_layout: "tiled" or "anyres" (see `PerceptionDLMConfig`).
        max_tiles: most tiles of a tiled picture, its thumbnail not counted.
        anyres_max_tiles: tiles' worth of cells beyond which an anyres map is shrunk.
        num_region_prompts: most regions in one pass.
        roi_convention: "released" (inclusive box maxima) or "aligned" (half-open boxes).
    """

    split_label_map = staticmethod(split_label_map)
    model_input_names = [
        "pixel_values",
        "image_grids",
        "image_sizes",
        "region_patches",
        "boxes",
        "box_images",
    ]

    def __init__(
        self,
        image_size: int = 512,
        patch_size: int = 16,
        spatial_merge_size: int = 2,
        image_layout: str = "tiled",
        max_tiles: int = 6,
        anyres_max_tiles: int = 4,
        num_region_prompts: int = 6,
        roi_convention: str = "released",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.image_size = image_size
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.image_layout = image_layout
        self.max_tiles = max_tiles
        self.anyres_max_tiles = anyres_max_tiles
        self.num_region_prompts = num_region_prompts
        self.roi_convention = roi_convention

    @property
    def cells_per_side(self) -> int:
        """Visual tokens along one side of a tile."""
        return self.image_size // self.patch_size // self.spatial_merge_size

    def expect_neutral(self, arguments: dict):
        """Refuses arguments of a call that ask for other pixels than are made."""
        size = {"height": self.image_size, "width": self.image_size}
        expect_neutral(arguments, {**IMAGE_NEUTRAL, "size": (self.image_size, size)})

    def choose_grid(self, size: tuple[int, int], max_tiles: int | None = None) -> tuple[int, int]:
        """The grid (columns, rows) for a picture of `size` (width, height).

        An anyres picture takes no limit but 1, which gives no canvas, (0, 0): one padded tile.
        """
        if self.image_layout == "anyres":
            if max_tiles not in (None, 1):
                raise ValueError(f"expected max_tiles of None or 1 with anyres, got {max_tiles}")
            return NO_CANVAS if max_tiles == 1 else choose_canvas(size, self.image_size)
        return choose_grid(size, self.image_size, max_tiles or self.max_tiles)

    def num_image_tokens(self, size: tuple[int, int], grid: tuple[int, int]) -> int:
        """Visual tokens of a picture of `size` (width, height) on `grid` (columns, rows)."""
        if self.image_layout == "anyres":
            return num_anyres_tokens(size, grid, self.cells_per_side, self.anyres_max_tiles)
        return num_tiles(grid) * self.cells_per_side**2

    def preprocess(
        self,
        images,
        masks: Sequence[Sequence] | None = None,
        max_tiles: int | Sequence[int | None] | None = None,
        **arguments,
    ) -> BatchFeature:
        """Prepares pictures and, for each of them, its region masks.

        Args:
            images: one picture or a list of them, as for `load_image`.
            masks: for each picture the list of its masks, as for `load_mask`; at most
                `num_region_prompts` each. For a single picture, a plain list of masks.
            max_tiles: overrides the processor's for all pictures or, as a list, for each.
            arguments: transformers' own, with the values of `IMAGE_NEUTRAL` or None.

        Returns:
            `pixel_values` float32 (T, 3, S, S) in [-1, 1], tiles of all pictures in order;
            `image_grids` int64 (images, 2), columns and rows; `image_sizes` int64 (images, 2),
            height and width in pixels. With masks also, the regions of each picture in area
            order (largest first): `region_patches` bool (T, num_region_prompts, h, w), axis 1 the
            prompt number; `boxes` float32 (regions, 4), normalised xyxy; `box_images` int64
            (regions,), each box's picture; and `region_orders`, for each picture the indices
            into the masks given.
        """
        self.expect_neutral(arguments)
        if not isinstance(images, (list, tuple)):
            images, masks = [images], None if masks is None else [masks]
        if masks is not None and len(masks) != len(images):
            raise ValueError(
                f"expected a list of masks a picture: {len(images)} pictures, "
                f"got {len(masks)} lists"
            )
        loaded = {id(image): load_image(image) for image in images}
        pictures = [loaded[id(image)] for image in images]
        limits = max_tiles if isinstance(max_tiles, (list, tuple)) else [max_tiles] * len(images)
        grids = [self.choose_grid(p.size, n) for p, n in zip(pictures, limits, strict=True)]
        data = {
            "pixel_values": self._pixels(pictures, grids),
            "image_grids": torch.tensor(grids, dtype=torch.int64).reshape(-1, 2),
            "image_sizes": torch.tensor([(p.height, p.width) for p in pictures]).reshape(-1, 2),
        }
        if masks is not None:
            data |= self._regions(pictures, grids, masks)
        return BatchFeature(data)

    def _pixels(self, pictures, grids) -> torch.Tensor:
        cut = cut_anyres_tiles if self.image_layout == "anyres" else cut_tiles
        tiles = [
            np.asarray(tile)
            for picture, grid in zip(pictures, grids, strict=True)
            for tile in cut(picture, grid, self.image_size)
        ]
        values = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)  # (T, 3, S, S)
        return values.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)

    def _regions(self, pictures, grids, masks) -> dict:
        patches, boxes, orders = [], [], []
        for picture, grid, given in zip(pictures, grids, masks, strict=True):
            regions = self._load_regions(given, picture.size)
            order = area_order(regions)
            patches.append(self._patches([regions[i] for i in order], grid))
            inclusive = self.roi_convention == "released"
            boxes += [region_box(regions[i], inclusive) for i in order]
            orders.append(order)
        return {
            "region_patches": torch.from_numpy(np.concatenate(patches)),
            "boxes": torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4).float(),
            "box_images": torch.repeat_interleave(
                torch.arange(len(orders)), torch.tensor([len(order) for order in orders])
            ),
            "region_orders": orders,
        }

    def _load_regions(self, masks, size: tuple[int, int]) -> list[Image.Image]:
        if not isinstance(masks, (list, tuple, np.ndarray, torch.Tensor)):
            raise ValueError(f"expected a list of masks for a picture, got {describe(masks)}")
        if not 1 <= len(masks) <= self.num_region_prompts:
            raise ValueError(
                f"expected 1 to {self.num_region_prompts} masks for a picture in one pass,"
                f" got {len(masks)}"
            )
        return [load_mask(mask, size) for mask in masks]

    def _patches(self, regions: list[Image.Image], grid: tuple[int, int]) -> np.ndarray:
        side = self.image_size // self.patch_size
        shape = (num_tiles(grid), self.num_region_prompts, side, side)
        patches = np.zeros(shape, dtype=bool)  # (T, R, h, w)
        for number, region in enumerate(regions):
            patches[:, number] = region_patches(
                region, number, grid, self.image_size, self.patch_size
            )
        return patches


PerceptionDLMImageProcessor.register_for_auto_class()

__all__ = ["PerceptionDLMImageProcessor"]
