"""Pixels: pictures to normalised tiles, region masks to patch membership and boxes.

Axis letters: T tiles, R regions, H W rows and columns of pixels, h w of patches or cells.
"""

import io
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from transformers import BaseImageProcessor, BatchFeature
from transformers.image_utils import load_image as fetch_image

OUTSIDE = 255  # value of a region image's pixels that lie outside the mask


def load_image(image) -> Image.Image:
    """Opens a picture as RGB, upright.

    Accepts a PIL image, a path, an http(s) URL, encoded bytes, a numpy array (H, W) or (H, W, C),
    or a torch tensor (H, W) or (C, H, W); arrays are uint8, uint16, or floats in [0, 1]; C is 1, 3
    or 4 (alpha is dropped). EXIF orientation is applied; 16-bit grey is scaled to 8.

    Raises ValueError for anything else, FileNotFoundError for a path that is not there.
    """
    try:
        picture = _open(image)
        return _to_rgb(ImageOps.exif_transpose(picture))
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"expected a readable picture, got {_describe(image)}: {error}") from error
    except FileNotFoundError:
        raise
    except OSError as error:  # PIL's word for truncated or damaged files
        raise ValueError(f"expected a readable picture, got {_describe(image)}: {error}") from error


def _open(image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes):
        return Image.open(io.BytesIO(image))
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return fetch_image(image)
    if isinstance(image, (str, os.PathLike)):
        if not os.path.isfile(image):
            raise FileNotFoundError(f"expected an image file, got {os.fspath(image)!r}: no such file")
        return Image.open(image)
    if isinstance(image, torch.Tensor):
        array = image.detach().cpu()
        array = array.float() if array.dtype == torch.bfloat16 else array
        return _from_array((array.permute(1, 2, 0) if array.ndim == 3 else array).numpy(), "(C, H, W)")
    if isinstance(image, np.ndarray):
        return _from_array(image, "(H, W, C)")
    raise ValueError(
        "expected a picture as PIL image, path, URL, bytes, numpy (H, W, C) or torch (C, H, W),"
        f" got {type(image).__name__}"
    )


def _from_array(array: np.ndarray, layout: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"expected a picture array of shape (H, W) or {layout} with C of 1, 3 or 4,"
            f" got {array.ndim} axes and, channels last, shape {array.shape}"
        )
    return Image.fromarray(np.ascontiguousarray(_to_uint8(array).squeeze(2)
                           if array.ndim == 3 and channels == 1 else _to_uint8(array)))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return _from_16_bit(array)
    if array.dtype.kind == "f" and np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1:
        return np.rint(array * 255.0).astype(np.uint8)
    raise ValueError(
        f"expected picture values as uint8, uint16 or floats in [0, 1], got {array.dtype} in"
        f" [{array.min()}, {array.max()}]"
    )


def _from_16_bit(array: np.ndarray) -> np.ndarray:
    return np.rint(array / 257.0).astype(np.uint8)  # 65535 / 257 = 255


def _to_rgb(picture: Image.Image) -> Image.Image:
    if 0 in picture.size:
        raise ValueError(f"expected a picture with at least one pixel, got size {picture.size}")
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I"):  # 16-bit grey, which PIL may open as 32-bit integers
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"expected 16-bit grey values, got [{values.min()}, {values.max()}]")
        picture = Image.fromarray(_from_16_bit(values))
    elif picture.mode == "F":
        picture = Image.fromarray(_to_uint8(np.asarray(picture)))
    return picture.convert("RGB")


def load_mask(mask, size: tuple[int, int]) -> Image.Image:
    """Opens a region mask as an 8-bit PIL image in which non-zero pixels are the region.

    Args:
        mask: a PIL image (RGB: any channel non-zero; with alpha: and not transparent), a bool,
            integer or non-negative float array or tensor (H, W), a path, a COCO RLE dict
            (`size`, `counts`), a box `{"box": [x0, y0, x1, y1]}` or polygons
            `{"polygons": [[x0, y0, x1, y1, ...], ...]}`, both in pixels; a plain list of four
            numbers is a box and a list of lists is polygons.
        size: (width, height) of the picture.

    Raises ValueError for a mask that is empty, of another size, or of no known form.
    """
    region = _open_mask(mask, size)
    if region.size != tuple(size):
        raise ValueError(
            "expected a mask with the picture's size"
            f" {size[0]}x{size[1]} (width x height), got {region.size[0]}x{region.size[1]}"
        )
    if region.getbbox() is None:
        raise ValueError("expected a mask with at least one non-zero pixel, got an empty mask")
    return region


def _open_mask(mask, size: tuple[int, int]) -> Image.Image:
    if isinstance(mask, (str, os.PathLike)):
        mask = _open(mask)
    if isinstance(mask, Image.Image):
        return _mask_from_image(mask)
    if isinstance(mask, torch.Tensor):
        mask = mask.detach().cpu()
        mask = mask.float() if mask.dtype == torch.bfloat16 else mask
        return _mask_from_array(mask.numpy())
    if isinstance(mask, np.ndarray):
        return _mask_from_array(mask)
    if isinstance(mask, dict) and {"size", "counts"} <= set(mask):
        return _mask_from_rle(mask)
    if isinstance(mask, dict) and set(mask) == {"box"}:
        return _mask_from_box(mask["box"], size)
    if isinstance(mask, dict) and set(mask) == {"polygons"}:
        return _mask_from_polygons(mask["polygons"], size)
    if isinstance(mask, (list, tuple)) and len(mask) == 4 and all(map(_is_number, mask)):
        return _mask_from_box(mask, size)
    if isinstance(mask, (list, tuple)) and mask and all(isinstance(p, (list, tuple)) for p in mask):
        return _mask_from_polygons(mask, size)
    raise ValueError(
        "expected a mask as PIL image, path, array or tensor (H, W), COCO RLE dict, box or polygons,"
        f" got {_describe(mask)}"
    )


def _mask_from_image(mask: Image.Image) -> Image.Image:
    if mask.mode == "L":
        return mask
    values = np.asarray(mask)
    if mask.mode in ("LA", "RGBA", "PA"):
        values = values[..., :-1].any(-1) & (values[..., -1] > 0)
    elif values.ndim == 3:
        values = values.any(-1)
    return _mask_from_array(values)


def _mask_from_array(mask: np.ndarray) -> Image.Image:
    values = mask.squeeze() if mask.ndim == 3 and 1 in (mask.shape[0], mask.shape[2]) else mask
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"expected a mask array of shape (H, W), got {mask.shape}")
    if values.dtype.kind not in "buif":
        raise ValueError(f"expected a bool, integer or float mask, got {values.dtype}")
    if values.dtype.kind in "if" and not values.min() >= 0:  # NaN fails this too
        raise ValueError(f"expected mask values of 0 or more, got a minimum of {values.min()}")
    if values.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(values))
    return Image.fromarray((values != 0).astype(np.uint8))


def _mask_from_rle(rle: dict) -> Image.Image:
    from pycocotools import mask as coco

    height, width = _numbers("COCO RLE size", rle["size"], 2)
    counts = rle["counts"]
    if min(height, width) < 1 or height * width > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"expected a COCO RLE size of 1 pixel or more, got {rle['size']}")
    if isinstance(counts, (list, tuple)):
        if not all(_is_number(c) and c >= 0 for c in counts) or sum(counts) != height * width:
            raise ValueError(f"expected COCO RLE counts that add up to {height}x{width} pixels")
        encoded = coco.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)
    else:
        if not isinstance(counts, (str, bytes)):
            raise ValueError(f"expected COCO RLE counts as str, bytes or list, got {_describe(counts)}")
        encoded = {"size": [height, width], "counts": counts}
        _check_compressed_counts(counts, height * width)
    return Image.fromarray(coco.decode(encoded))


def _check_compressed_counts(counts: str | bytes, pixels: int):
    """COCO's decoder trusts its input, so the run lengths (LEB128-like, 5 bits a character, each
    from the third on relative to the one two before) are added up here first."""
    data = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    runs, value, shift = [], 0, 0
    for byte in data:
        chunk = byte - 48
        if not 0 <= chunk < 64:
            raise ValueError(f"expected COCO RLE counts, got the character {chr(byte)!r} in them")
        value |= (chunk & 31) << shift
        shift += 5
        if chunk & 32:
            continue
        if chunk & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift or any(run < 0 for run in runs) or sum(runs) != pixels:
        raise ValueError(f"expected COCO RLE counts that add up to {pixels} pixels, got {sum(runs)}")


def _mask_from_box(box, size: tuple[int, int]) -> Image.Image:
    left, top, right, bottom = _numbers("box [x0, y0, x1, y1]", box, 4)
    if not (left < right and top < bottom):
        raise ValueError(f"expected a box with x0 < x1 and y0 < y1, got {list(box)}")
    mask = Image.new("L", size)
    inside = (max(0, round(left)), max(0, round(top)), min(size[0], max(round(right), round(left) + 1)),
              min(size[1], max(round(bottom), round(top) + 1)))
    if inside[0] >= size[0] or inside[1] >= size[1] or inside[2] <= 0 or inside[3] <= 0:
        raise ValueError(f"expected a box inside the {size[0]}x{size[1]} picture, got {list(box)}")
    mask.paste(1, inside)
    return mask


def _mask_from_polygons(polygons, size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for polygon in polygons:
        if not isinstance(polygon, (list, tuple)) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                "expected a polygon as [x0, y0, x1, y1, x2, y2, ...], three points or more,"
                f" got {_describe(polygon)}"
            )
        draw.polygon(_numbers("polygon", polygon, len(polygon)), fill=1)
    return mask


def _numbers(name: str, values, count: int) -> list:
    if not isinstance(values, (list, tuple, np.ndarray)) or len(values) != count \
            or not all(map(_is_number, values)):
        raise ValueError(f"expected {name} of {count} finite numbers, got {_describe(values)}")
    return list(values)


def _is_number(value) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)


def _describe(value) -> str:
    text = repr(value) if isinstance(value, (str, os.PathLike, dict, list, tuple)) else ""
    return f"{type(value).__name__} {text[:80]}".strip()


def choose_grid(size: tuple[int, int], tile: int, max_tiles: int) -> tuple[int, int]:
    """Picks the grid (columns, rows) of at most `max_tiles` tiles closest to the picture's aspect.

    Among equally close grids a larger one wins when the picture's area exceeds half of that
    grid's (InternVL's dynamic tiling). `size` is (width, height) in pixels.
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


def cut_tiles(picture: Image.Image, grid: tuple[int, int], tile: int) -> list[Image.Image]:
    """Resizes (bicubic, aspect not kept) to the grid and cuts row by row; thumbnail last."""
    columns, rows = grid
    resized = picture.resize((columns * tile, rows * tile), Image.Resampling.BICUBIC)
    tiles = _crop_row_by_row(resized, grid, tile)
    if len(tiles) > 1:
        tiles.append(picture.resize((tile, tile), Image.Resampling.BICUBIC))
    return tiles


def choose_canvas(size: tuple[int, int], tile: int, max_side: int = 6) -> tuple[int, int]:
    """Picks the anyres canvas (columns, rows): most effective pixels, then least waste (LLaVA)."""
    width, height = size

    def rank(grid):
        canvas_w, canvas_h = grid[0] * tile, grid[1] * tile
        scale = min(canvas_w / width, canvas_h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas_w * canvas_h

    sides = range(1, max_side + 1)
    return max(((i, j) for i in sides for j in sides), key=rank)  # max keeps the first of equals


def cut_anyres_tiles(picture: Image.Image, grid: tuple[int, int], tile: int) -> list[Image.Image]:
    """Squeezed picture first, then the picture fitted and centred on a black canvas, cut."""
    canvas_w, canvas_h = grid[0] * tile, grid[1] * tile
    width, height = picture.size
    if canvas_w / width < canvas_h / height:
        fitted = (canvas_w, min(math.ceil(height * (canvas_w / width)), canvas_h))
    else:
        fitted = (min(math.ceil(width * (canvas_h / height)), canvas_w), canvas_h)
    canvas = Image.new("RGB", (canvas_w, canvas_h))
    corner = ((canvas_w - fitted[0]) // 2, (canvas_h - fitted[1]) // 2)
    canvas.paste(picture.resize(fitted, Image.Resampling.BICUBIC), corner)
    squeezed = picture.resize((tile, tile), Image.Resampling.BICUBIC)
    return [squeezed, *_crop_row_by_row(canvas, grid, tile)]


def anyres_map_size(
    size: tuple[int, int], grid: tuple[int, int], unit: int, max_tiles: int
) -> tuple[int, int, int, int]:
    """Rows and columns to crop from each side of the anyres feature map, then its final (h, w).

    `size` is the picture's (height, width), `unit` a tile's cells a side. Source: LLaVA-NeXT's
    unpadding and `anyres_max` shrinking.
    """
    height, width = size
    cells_h, cells_w = grid[1] * unit, grid[0] * unit
    crop_h = crop_w = 0
    if width / height > cells_w / cells_h:
        crop_h = (cells_h - int(height * (cells_w / width))) // 2
    else:
        crop_w = (cells_w - int(width * (cells_h / height))) // 2
    h, w = cells_h - 2 * crop_h, cells_w - 2 * crop_w
    times = math.sqrt(h * w / (max_tiles * unit**2))
    if times > 1.1:
        h, w = int(h // times), int(w // times)
    return crop_h, crop_w, h, w


def _crop_row_by_row(picture: Image.Image, grid: tuple[int, int], tile: int) -> list[Image.Image]:
    columns, rows = grid
    corners = [(c * tile, r * tile) for r in range(rows) for c in range(columns)]
    return [picture.crop((x, y, x + tile, y + tile)) for x, y in corners]


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
    resized = np.asarray(region.resize((columns * tile, rows * tile), Image.Resampling.BICUBIC))
    corners = resized[::patch, ::patch] != OUTSIDE  # (rows * h, columns * h)
    tiles = corners.reshape(rows, h, columns, h).swapaxes(1, 2).reshape(-1, h, h)  # (T, h, w)
    if len(tiles) == 1:
        return tiles
    thumbnail = np.asarray(region.resize((tile, tile), Image.Resampling.BICUBIC))
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

    def choose_grid(self, size: tuple[int, int], max_tiles: int | None = None) -> tuple[int, int]:
        """The grid (columns, rows) for a picture of `size` (width, height)."""
        if self.image_layout == "anyres":
            return choose_canvas(size, self.image_size)
        return choose_grid(size, self.image_size, max_tiles or self.max_tiles)

    def num_image_tokens(self, size: tuple[int, int], grid: tuple[int, int]) -> int:
        """Visual tokens of a picture of `size` (width, height) on `grid` (columns, rows)."""
        cells = self.cells_per_side**2
        if self.image_layout == "anyres":
            unit = self.cells_per_side
            *_, h, w = anyres_map_size(size[::-1], grid, unit, self.anyres_max_tiles)
            return cells + h * (w + 1)
        tiles = grid[0] * grid[1]
        return cells * (tiles + 1 if tiles > 1 else 1)

    def preprocess(
        self,
        images,
        masks: Sequence[Sequence] | None = None,
        max_tiles: int | Sequence[int | None] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepares pictures and, for each of them, its region masks.

        Args:
            images: one picture or a list of them, as for `load_image`.
            masks: for each picture the list of its masks, as for `load_mask`; at most
                `num_region_prompts` each. For a single picture, a plain list of masks.
            max_tiles: overrides the processor's for all pictures or, as a list, for each.

        Returns:
            `pixel_values` float32 (T, 3, S, S) in [-1, 1], tiles of all pictures in order;
            `image_grids` int64 (images, 2), columns and rows; `image_sizes` int64 (images, 2),
            height and width in pixels. With masks also, the regions of each picture in area
            order (largest first): `region_patches` bool (T, num_region_prompts, h, w), axis 1 the
            prompt number; `boxes` float32 (regions, 4), normalised xyxy; `box_images` int64
            (regions,), each box's picture; and `region_orders`, for each picture the indices
            into the masks given.
        """
        if not isinstance(images, (list, tuple)):
            images, masks = [images], None if masks is None else [masks]
        if return_tensors != "pt":
            raise ValueError(f"expected return_tensors 'pt', got {return_tensors!r}")
        if masks is not None and len(masks) != len(images):
            raise ValueError(f"expected a list of masks a picture: {len(images)} pictures, "
                             f"got {len(masks)} lists")
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
            raise ValueError(f"expected a list of masks for a picture, got {_describe(masks)}")
        if not 1 <= len(masks) <= self.num_region_prompts:
            raise ValueError(
                f"expected 1 to {self.num_region_prompts} masks for a picture in one pass,"
                f" got {len(masks)}"
            )
        return [load_mask(mask, size) for mask in masks]

    def _patches(self, regions: list[Image.Image], grid: tuple[int, int]) -> np.ndarray:
        side = self.image_size // self.patch_size
        tiles = grid[0] * grid[1]
        shape = (tiles + (tiles > 1), self.num_region_prompts, side, side)
        patches = np.zeros(shape, dtype=bool)  # (T, R, h, w)
        for number, region in enumerate(regions):
            patches[:, number] = region_patches(
                region, number, grid, self.image_size, self.patch_size
            )
        return patches


PerceptionDLMImageProcessor.register_for_auto_class()

__all__ = ["PerceptionDLMImageProcessor"]
