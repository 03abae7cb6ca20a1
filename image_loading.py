"""Opening what users give: pictures in any form, and region masks in any form."""

import io
import os
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageOps
from transformers.image_utils import load_image as fetch_image

FARTHEST = 2**20  # pixels from the corner; PIL draws with 32-bit integers
LARGEST = 2**53  # beyond it floats are no longer exact


def load_image(image) -> Image.Image:
    """Opens a picture as RGB, upright.

    Accepts a PIL image, a path, an http(s) URL, encoded bytes, a numpy array (H, W) or (H, W, C),
    or a torch tensor (H, W) or (C, H, W); arrays are uint8, uint16, or floats in [0, 1]; C is 1, 3
    or 4 (alpha is dropped). EXIF orientation is applied; 16-bit grey is scaled to 8.

    Raises ValueError for anything else, FileNotFoundError for a path that is not there.
    """
    with _damage_as_value_error("picture", image):
        return _to_rgb(_upright(_open(image)))


@contextmanager
def _damage_as_value_error(name: str, given):
    """What PIL raises for files that it cannot read, in the terms of this module."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"expected a readable {name}, got {describe(given)}: {error}") from error


def _open(image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes):
        return Image.open(io.BytesIO(image))
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return _fetch(image)
    if isinstance(image, (str, os.PathLike)):
        if not os.path.isfile(image):
            raise FileNotFoundError(
                f"expected an image file, got {os.fspath(image)!r}: no such file"
            )
        return Image.open(image)
    if isinstance(image, torch.Tensor):
        array = image.detach().cpu()
        array = array.float() if array.dtype == torch.bfloat16 else array
        return _from_array(
            (array.permute(1, 2, 0) if array.ndim == 3 else array).numpy(), "(C, H, W)"
        )
    if isinstance(image, np.ndarray):
        return _from_array(image, "(H, W, C)")
    raise ValueError(
        "expected a picture as PIL image, path, URL, bytes, numpy (H, W, C) or torch (C, H, W),"
        f" got {type(image).__name__}"
    )


def _fetch(url: str) -> Image.Image:
    import httpx  # what huggingface_hub, and so transformers, fetches with

    try:
        return fetch_image(url)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"expected a picture at {url}, got: {error}") from error


def _from_array(array: np.ndarray, layout: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"expected a picture array of shape (H, W) or {layout} with C of 1, 3 or 4,"
            f" got {array.ndim} axes and, channels last, shape {array.shape}"
        )
    return Image.fromarray(
        np.ascontiguousarray(
            _to_uint8(array).squeeze(2) if array.ndim == 3 and channels == 1 else _to_uint8(array)
        )
    )


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return _from_16_bit(array)
    if (
        array.dtype.kind == "f"
        and np.isfinite(array).all()
        and array.min() >= 0
        and array.max() <= 1
    ):
        return np.rint(array * 255.0).astype(np.uint8)
    extent = f" in [{array.min()}, {array.max()}]" if array.dtype.kind in "iuf" else ""
    raise ValueError(
        f"expected picture values as uint8, uint16 or floats in [0, 1], got {array.dtype}{extent}"
    )


def _from_16_bit(array: np.ndarray) -> np.ndarray:
    return np.rint(array / 257.0).astype(np.uint8)  # 65535 / 257 = 255


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF says; itself, not a copy, where nothing is to turn."""
    picture.load()
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(picture) if turned else picture


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
    with _damage_as_value_error("mask", mask):
        region = _open_mask(mask, size)
    _expect_size(region.size, size)
    if region.getbbox() is None:
        raise ValueError("expected a mask with at least one non-zero pixel, got an empty mask")
    return region


def _expect_size(got: tuple[int, int], size: tuple[int, int]):
    if tuple(got) != tuple(size):
        raise ValueError(
            "expected a mask with the picture's size"
            f" {size[0]}x{size[1]} (width x height), got {got[0]}x{got[1]}"
        )


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
        return _mask_from_rle(mask, size)
    if isinstance(mask, dict) and set(mask) == {"box"}:
        return _mask_from_box(mask["box"], size)
    if isinstance(mask, dict) and set(mask) == {"polygons"}:
        return _mask_from_polygons(mask["polygons"], size)
    if isinstance(mask, (list, tuple)) and len(mask) == 4 and all(map(_is_number, mask)):
        return _mask_from_box(mask, size)
    if isinstance(mask, (list, tuple)) and mask and all(isinstance(p, (list, tuple)) for p in mask):
        return _mask_from_polygons(mask, size)
    raise ValueError(
        "expected a mask as PIL image, path, (H, W) array or tensor, COCO RLE, box or polygons,"
        f" got {describe(mask)}"
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
    if values.dtype in (np.uint8, np.bool_):
        return Image.fromarray(np.ascontiguousarray(values).view(np.uint8))
    return Image.fromarray((values != 0).astype(np.uint8))


def _mask_from_rle(rle: dict, size: tuple[int, int]) -> Image.Image:
    from pycocotools import mask as coco

    height, width = _integers("COCO RLE size [height, width]", rle["size"], 2)
    _expect_size((width, height), size)
    counts = rle["counts"]
    if isinstance(counts, (list, tuple)):
        runs = _integers("COCO RLE counts", counts, len(counts))
        _expect_runs(runs, height * width)
        encoded = coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    elif isinstance(counts, (str, bytes)):
        data = counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
        _expect_runs(_compressed_runs(data), height * width)
        encoded = {"size": [height, width], "counts": data}
    else:
        raise ValueError(f"expected COCO RLE counts as str, bytes or list, got {describe(counts)}")
    return Image.fromarray(coco.decode(encoded))


def _expect_runs(runs: list[int], pixels: int):
    """COCO's decoder trusts its input, so run lengths are checked first."""
    if any(run < 0 for run in runs) or sum(runs) != pixels:
        raise ValueError(
            f"expected COCO RLE counts that add up to {pixels} pixels, got {sum(runs)}"
        )


def _compressed_runs(data: bytes) -> list[int]:
    """Run lengths of compressed counts: 5 bits a character, lowest first, in two's complement,
    each from the third on relative to the one two before."""
    runs, value, shift = [], 0, 0
    for byte in data:
        chunk = byte - 48
        if not 0 <= chunk < 64 or shift > 30:
            raise ValueError(
                f"expected COCO RLE counts, got {chr(byte)!r} in them after {runs[-3:]}"
            )
        value |= (chunk & 31) << shift
        shift += 5
        if chunk & 32:
            continue
        if chunk & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError(f"expected COCO RLE counts, got them cut off after {runs[-3:]}")
    return runs


def _mask_from_box(box, size: tuple[int, int]) -> Image.Image:
    left, top, right, bottom = _numbers("box [x0, y0, x1, y1]", box, 4)
    if not (left < right and top < bottom):
        raise ValueError(f"expected a box with x0 < x1 and y0 < y1, got {list(box)}")
    mask = Image.new("L", size)
    inside = (
        max(0, round(left)),
        max(0, round(top)),
        min(size[0], max(round(right), round(left) + 1)),
        min(size[1], max(round(bottom), round(top) + 1)),
    )
    if inside[0] >= size[0] or inside[1] >= size[1] or inside[2] <= 0 or inside[3] <= 0:
        raise ValueError(f"expected a box inside the {size[0]}x{size[1]} picture, got {list(box)}")
    mask.paste(1, inside)
    return mask


def _mask_from_polygons(polygons, size: tuple[int, int]) -> Image.Image:
    if not isinstance(polygons, (list, tuple)):
        raise ValueError(f"expected a list of polygons, got {describe(polygons)}")
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for polygon in polygons:
        if not isinstance(polygon, (list, tuple)) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                "expected a polygon as [x0, y0, x1, y1, x2, y2, ...], three points or more,"
                f" got {describe(polygon)}"
            )
        points = _numbers("polygon", polygon, len(polygon))
        if max(map(abs, points)) > FARTHEST:
            raise ValueError(f"expected polygon points near the picture, got {describe(polygon)}")
        draw.polygon(points, fill=1)
    return mask


def _numbers(name: str, values, count: int) -> list:
    if (
        not isinstance(values, (list, tuple, np.ndarray))
        or len(values) != count
        or not all(map(_is_number, values))
    ):
        raise ValueError(f"expected {name} of {count} finite numbers, got {describe(values)}")
    return list(values)


def _integers(name: str, values, count: int) -> list[int]:
    numbers = _numbers(name, values, count)
    if any(number != int(number) for number in numbers):
        raise ValueError(f"expected {name} of whole numbers, got {describe(values)}")
    return [int(number) for number in numbers]


def _is_number(value) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and abs(value) <= LARGEST


def describe(value) -> str:
    """Type and, for plain values, beginning of a value, for messages."""
    text = repr(value) if isinstance(value, (str, os.PathLike, dict, list, tuple)) else ""
    return f"{type(value).__name__} {text[:80]}".strip()
