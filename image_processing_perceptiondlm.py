"""Turns images into tiles, and region masks into patch membership and boxes.

    image  ->  RGB, upright       ->  grid, tiles of uint8   ->  pixel values in [-1, 1]
    masks  ->  regions, by area   ->  tiled as the image is  ->  patch membership; boxes

Axis letters: T tiles, R regions, H W rows and columns of pixels, h w of patches or cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

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
from .processing_sequence import Padding, expect_one_of, expect_positive

OUTSIDE = 255  # value of a region's tiled pixels that lie outside its mask
PADDING_COLOR = (127, 127, 127)  # LLaVA's: the mean, in whole levels

# What a call of either processor may ask, in transformers' terms.

# Arguments that mean nothing here, and what they may be beside None.
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
TEXT_NEUTRAL = {
    "return_tensors": ("pt",),
    "text_pair": (),
    "text_target": (),
    "text_pair_target": (),
    "stride": (0,),
    "is_split_into_words": (False,),
    "return_token_type_ids": (False,),
    "return_attention_mask": (True,),
    "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,),
    "return_offsets_mapping": (False,),
    "return_length": (False,),
    "return_mm_token_type_ids": (False,),
    "return_text_replacement_offsets": (False,),
    "return_metadata": (False,),
    "sanitize_control_tokens": (False,),
}

# Of video and sound, of which there is none here.
WITHOUT_EFFECT = (
    "do_sample_frames",
    "fps",
    "num_frames",
    "video_metadata",
    "sampling_rate",
    "raw_speech",
    "load_audio_backend",
    "verbose",
)

GROUPS = ("common_kwargs", "text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs")


@dataclass(frozen=True)
class CallArguments(Padding):
    """Holds the honored arguments of one call, checked.

    Attributes:
        add_special_tokens: let the tokenizer add its own (templates already hold theirs).
        max_tiles: most tiles of an image (default: the image processor's).
    """

    add_special_tokens: bool = False
    max_tiles: int | None = None

    @classmethod
    def read(cls, arguments: dict, image_processor) -> "CallArguments":
        """Reads a call's arguments, by name or in groups; those by name go first.

        Raises TypeError for an unknown name, ValueError for a value that is not honored.
        """
        flat = {k: v for k, v in arguments.items() if k not in GROUPS}
        merged: dict[str, Any] = {}
        for group in GROUPS:
            own = arguments.get(group) or {}
            if not isinstance(own, dict):
                raise ValueError(f"expected {group} as a dict, got {own!r}")
            twice = sorted(own.keys() & flat.keys())
            if twice and group != "common_kwargs":  # which are defaults, in transformers too
                raise ValueError(f"expected {twice} by name or in {group}, got both")
            merged |= own
        merged |= flat

        # What is not honored has to be neutral, for texts and for pixels.
        names = {field.name for field in fields(cls)}
        rest = {k: v for k, v in merged.items() if k not in {*names, *WITHOUT_EFFECT}}
        pixels = {k: v for k, v in rest.items() if k not in TEXT_NEUTRAL}
        expect_neutral({k: v for k, v in rest.items() if k in TEXT_NEUTRAL}, TEXT_NEUTRAL)
        image_processor.expect_neutral(pixels)
        return cls(**{k: v for k, v in merged.items() if k in names and v is not None})

    def __post_init__(self):
        super().__post_init__()
        expect_one_of("add_special_tokens", self.add_special_tokens, (True, False))
        expect_positive(max_tiles=self.max_tiles)


# What a call is given, brought to one form.


def pair_masks(images, masks) -> tuple[list, list]:
    """Pairs each image with the list of its region masks.

    A single image has a plain list of masks, a list of images a list of such lists; what is paired
    stays as it is. Raises ValueError for another number of lists, and for what is none.
    """
    if images is None:
        raise ValueError("expected an image for the masks, got none")
    if not isinstance(images, (list, tuple)):
        images, masks = [images], [masks]
    if not images or not _is_list(masks) or len(masks) != len(images):
        got = len(masks) if _is_list(masks) else describe(masks)
        raise ValueError(f"expected a list of masks for each of {len(images)} images, got {got}")

    for own in masks:
        if not _is_list(own):
            raise ValueError(f"expected a list of masks for each image, got {describe(own)}")
    return list(images), list(masks)


def _is_list(value) -> bool:
    is_array = isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim > 0
    return is_array or (isinstance(value, Sequence) and not isinstance(value, (str, bytes)))


def pair_images(images, count: int) -> list[list]:
    """Pairs each of `count` prompts with its images.

    A single image belongs to every prompt, a flat list to a single prompt; else there is an image,
    a list of images or None for each prompt. Raises ValueError for another number of them.
    """
    if images is None:
        return [[] for _ in range(count)]
    if not isinstance(images, (list, tuple)):
        return [[images] for _ in range(count)]
    if count == 1 and not any(isinstance(image, (list, tuple)) for image in images):
        return [list(images)]

    if len(images) != count:
        raise ValueError(
            f"expected an image or a list of them for each of {count} prompts, got {len(images)}"
        )
    return [list(i) if isinstance(i, (list, tuple)) else [] if i is None else [i] for i in images]


def flatten_images(images) -> list:
    """Lists the images of nested lists, in order; None is no image."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [one for image in images for one in flatten_images(image)]


# Tiles of an image.


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes (bicubic, aspect not kept) to `size` (width, height) as Pillow 13 does.

    From Pillow 13 on an image that loses much more height than width is resized vertically first,
    before it never was; values differ by several levels, so the order is fixed here.
    """
    lost_width, lost_height = image.width - size[0], image.height - size[1]
    if lost_height > max(0, 2 * lost_width):
        image = image.resize((image.width, size[1]), Image.Resampling.BICUBIC)
    return image.resize(size, Image.Resampling.BICUBIC)


def cut_tiles(image: Image.Image, grid: tuple[int, int], tile: int) -> list[Image.Image]:
    """Resizes an image to its grid and cuts it row by row; where tiles are several, adds it whole.

    The whole image, the thumbnail, comes last.
    """
    columns, rows = grid
    resized = resize(image, (columns * tile, rows * tile))
    tiles = _crop_row_by_row(resized, grid, tile)
    if len(tiles) > 1:
        tiles.append(resize(image, (tile, tile)))
    return tiles


def cut_anyres_tiles(image: Image.Image, grid: tuple[int, int], tile: int) -> list[Image.Image]:
    """Squeezes an image into one tile, and cuts it, centered on a black canvas, into the others.

    Without a canvas there is one tile, the image padded to a square.
    """
    if grid == NO_CANVAS:
        return [resize(pad_to_square(image), (tile, tile))]

    # Fit the image into the canvas and center it.
    canvas_size = (grid[0] * tile, grid[1] * tile)
    fitted = fit_canvas(image.size, canvas_size)
    canvas = Image.new("RGB", canvas_size)
    canvas.paste(resize(image, fitted), center_corner(fitted, canvas_size))
    squeezed = resize(image, (tile, tile))
    return [squeezed, *_crop_row_by_row(canvas, grid, tile)]


def pad_to_square(image: Image.Image) -> Image.Image:
    """Centers an image on a gray square of its longer side."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), PADDING_COLOR)
    square.paste(image, center_corner(image.size, square.size))
    return square


def _crop_row_by_row(image: Image.Image, grid: tuple[int, int], tile: int) -> list[Image.Image]:
    return [image.crop(box) for box in tile_boxes(grid, tile)]


def normalize(tiles: torch.Tensor) -> torch.Tensor:
    """Maps tiles from uint8 to float32 in [-1, 1], as the vision tower reads them."""
    return tiles.to(torch.float32, copy=True).div_(127.5).sub_(1.0)


# Patches and boxes of a region mask.


def area_order(masks: Sequence[Image.Image]) -> list[int]:
    """Returns the indices of region masks by number of non-zero pixels, the largest first.

    Equally large ones stay in the order given.
    """
    areas = [sum(mask.histogram()[1:]) for mask in masks]
    return sorted(range(len(masks)), key=lambda i: -areas[i])


def region_patches(
    mask: Image.Image, number: int, grid: tuple[int, int], tile: int, patch: int
) -> np.ndarray:
    """Tells which patches belong to a region: bool (T, h, w), thumbnail last.

    An 8-bit image that holds `number` under the region mask and 255 elsewhere is tiled as the image
    is; a patch is the region's when its top-left pixel is not 255.
    """
    columns, rows = grid
    h = tile // patch
    region = mask.point([OUTSIDE] + [number] * 255)
    resized = np.asarray(resize(region, (columns * tile, rows * tile)))
    corners = resized[::patch, ::patch] != OUTSIDE  # (rows * h, columns * h)
    tiles = corners.reshape(rows, h, columns, h).swapaxes(1, 2).reshape(-1, h, h)  # (T, h, w)
    if len(tiles) == 1:
        return tiles

    # Several tiles have the whole image behind them.
    thumbnail = np.asarray(resize(region, (tile, tile)))
    return np.concatenate([tiles, thumbnail[None, ::patch, ::patch] != OUTSIDE])


def region_box(mask: Image.Image, inclusive: bool) -> tuple[float, float, float, float]:
    """Measures the normalized box (xmin, ymin, xmax, ymax) of a region mask.

    Its maxima are the last pixel's when `inclusive`, else one beyond it.
    """
    box = mask.getbbox()
    assert box is not None, "a region mask that was loaded is not empty"
    left, top, right, bottom = box
    last = 1 if inclusive else 0
    width, height = mask.size
    return left / width, top / height, (right - last) / width, (bottom - last) / height


class PerceptionDLMImageProcessor(BaseImageProcessor):
    """Turns images and their region masks into tiles, patch membership and boxes.

    Args:
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        spatial_merge_size: side of the square of patches that makes one visual token.
        image_layout: "tiled" or "anyres" (see `PerceptionDLMConfig`).
        max_tiles: most tiles of a tiled image, its thumbnail not counted.
        anyres_max_tiles: tiles' worth of cells beyond which an anyres map is shrunk.
        num_region_prompts: most regions in one region group.
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
        # Tiles.
        self.image_size = image_size
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.image_layout = image_layout
        self.max_tiles = max_tiles
        self.anyres_max_tiles = anyres_max_tiles

        # Regions.
        self.num_region_prompts = num_region_prompts
        self.roi_convention = roi_convention

    @property
    def cells_per_side(self) -> int:
        """Counts the visual tokens along one side of a tile."""
        return self.image_size // self.patch_size // self.spatial_merge_size

    def expect_neutral(self, arguments: dict):
        """Refuses arguments of a call that ask for other pixels than are made."""
        size = {"height": self.image_size, "width": self.image_size}
        expect_neutral(arguments, {**IMAGE_NEUTRAL, "size": (self.image_size, size)})

    def choose_grid(self, size: tuple[int, int], max_tiles: int | None = None) -> tuple[int, int]:
        """Picks the grid (columns, rows) for an image of `size` (width, height).

        An anyres image takes no limit but 1, which gives no canvas, (0, 0): one padded tile.
        """
        if self.image_layout == "anyres":
            if max_tiles not in (None, 1):
                raise ValueError(f"expected max_tiles of None or 1 with anyres, got {max_tiles}")
            return NO_CANVAS if max_tiles == 1 else choose_canvas(size, self.image_size)
        return choose_grid(size, self.image_size, max_tiles or self.max_tiles)

    def num_image_tokens(self, size: tuple[int, int], grid: tuple[int, int]) -> int:
        """Counts the tokens of an image of `size` (width, height) on `grid` (columns, rows)."""
        if self.image_layout == "anyres":
            return num_anyres_tokens(size, grid, self.cells_per_side, self.anyres_max_tiles)
        return num_tiles(grid) * self.cells_per_side**2

    def preprocess(
        self,
        images,
        masks: Sequence[Sequence] | None = None,
        max_tiles: int | Sequence[int | None] | None = None,
        do_normalize: bool | None = True,
        **arguments,
    ) -> BatchFeature:
        """Prepares images and, for each of them, its region masks.

        Args:
            images: one image or a list of them, as for `load_image`.
            masks: for each image the list of its region masks, as for `load_mask`; at most
                `num_region_prompts` each. For a single image, a plain list of masks.
            max_tiles: overrides the processor's for all images or, as a list, for each.
            do_normalize: False leaves the tiles as bytes, a quarter of the memory; `normalize`
                makes of them what the model takes.
            arguments: transformers' own, with the values of `IMAGE_NEUTRAL` or None.

        Returns:
            `pixel_values` float32 (T, 3, S, S) in [-1, 1], or uint8 where not normalized, tiles of
            all images in order; `image_grids` int64 (images, 2), columns and rows; `image_sizes`
            int64 (images, 2), height and width in pixels. With masks also, the regions of each
            image in area order (largest first): `region_patches` bool (T, num_region_prompts, h,
            w), axis 1 the prompt number; `boxes` float32 (regions, 4), normalized xyxy;
            `box_images` int64 (regions,), each box's image; and `region_orders`, for each image the
            indices into the masks given.
        """
        self.expect_neutral(arguments)
        if not (do_normalize is None or isinstance(do_normalize, bool)):
            raise ValueError(f"expected do_normalize True or False, got {do_normalize!r}")
        if masks is not None:
            images, masks = pair_masks(images, masks)
        elif not isinstance(images, (list, tuple)):
            images = [images]

        # An image that is given several times, as for its region groups, is opened once.
        opened = {id(image): load_image(image) for image in images}
        images = [opened[id(image)] for image in images]

        limits = max_tiles if isinstance(max_tiles, (list, tuple)) else [max_tiles] * len(images)
        grids = [self.choose_grid(i.size, n) for i, n in zip(images, limits, strict=True)]
        tiles = self._tiles(images, grids)
        data = {
            "pixel_values": tiles if do_normalize is False else normalize(tiles),
            "image_grids": torch.tensor(grids, dtype=torch.int64).reshape(-1, 2),
            "image_sizes": torch.tensor([(i.height, i.width) for i in images]).reshape(-1, 2),
        }
        if masks is not None:
            data |= self._regions(images, grids, masks)
        return BatchFeature(data)

    def _tiles(self, images: list[Image.Image], grids: list[tuple[int, int]]) -> torch.Tensor:
        """Cuts images into tiles, uint8 (T, 3, S, S)."""
        cut = cut_anyres_tiles if self.image_layout == "anyres" else cut_tiles
        tiles = [
            np.asarray(tile)
            for image, grid in zip(images, grids, strict=True)
            for tile in cut(image, grid, self.image_size)
        ]
        return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).contiguous()

    def _regions(self, images: list[Image.Image], grids, masks) -> dict:
        """Prepares the region masks of each image, the largest first; see `preprocess`."""
        patches, boxes, orders = [], [], []
        inclusive = self.roi_convention == "released"
        for image, grid, given in zip(images, grids, masks, strict=True):
            regions = self._load_regions(given, image.size)
            order = area_order(regions)
            patches.append(self._patches([regions[i] for i in order], grid))
            boxes += [region_box(regions[i], inclusive) for i in order]
            orders.append(order)

        counts = torch.tensor([len(order) for order in orders])
        return {
            "region_patches": torch.from_numpy(np.concatenate(patches)),
            "boxes": torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4).float(),
            "box_images": torch.repeat_interleave(torch.arange(len(orders)), counts),
            "region_orders": orders,
        }

    def _load_regions(self, masks, size: tuple[int, int]) -> list[Image.Image]:
        if not 1 <= len(masks) <= self.num_region_prompts:
            raise ValueError(
                f"expected 1 to {self.num_region_prompts} masks for an image in one region group,"
                f" got {len(masks)}"
            )
        return [load_mask(mask, size) for mask in masks]

    def _patches(self, regions: list[Image.Image], grid: tuple[int, int]) -> np.ndarray:
        """Marks the patches of each region, bool (T, R, h, w)."""
        side = self.image_size // self.patch_size
        shape = (num_tiles(grid), self.num_region_prompts, side, side)
        patches = np.zeros(shape, dtype=bool)
        for number, region in enumerate(regions):
            patches[:, number] = region_patches(
                region, number, grid, self.image_size, self.patch_size
            )
        return patches


PerceptionDLMImageProcessor.register_for_auto_class()

__all__ = ["PerceptionDLMImageProcessor"]
