"""Opens what users give: images in any form, and region masks in any form.

path, URL, base64, bytes, array, tensor  ->  PIL image, upright  ->  RGB
                                                                 ->  region mask of 0 and 255
run lengths, box, polygons               ->  bool array          ->
"""

import base64
import binascii
import io
import os
import re
import urllib.request
from contextlib import contextmanager
from http.client import HTTPException
from urllib.parse import quote, unquote_to_bytes, urlsplit

import numpy as np
import torch
from PIL import ExifTags, Image

from .image_masks import (
    VOID,
    VOID_COLOR,
    decode_rle,
    describe,
    expect_size,
    fill_box,
    fill_polygons,
    is_box,
    labels_of_colors,
    labels_of_values,
    levels_of_colors,
    region_of_values,
)

# URLs, `data:` URLs and base64: bytes of a file that is elsewhere, or in the text itself.

MAX_BYTES = 256 << 20  # of a download
TIMEOUT = 30.0  # seconds without a byte
NO_PIXELS = ("image/svg+xml", "text/html")  # media types that browsers show and Pillow cannot read
SAFE_IN_URLS = "%/:?#[]@!$&'()*+,;=-._~"


def is_url(text: str) -> bool:
    """Tells whether a text is an http(s) URL."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def is_data_url(text: str) -> bool:
    """Tells whether a text is a `data:` URL."""
    return text.lstrip()[:5].lower() == "data:"


def _ascii(url: str) -> str:
    """Encodes the host (IDNA) and whatever else is not allowed in a URL, as browsers do."""
    parts = urlsplit(url)
    if not parts.netloc.isascii():
        parts = parts._replace(netloc=parts.netloc.encode("idna").decode())
    return quote(parts._replace(fragment="").geturl(), safe=SAFE_IN_URLS)


def fetch_image(url: str, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT) -> bytes:
    """Downloads the bytes behind an http(s) URL, following redirects.

    The standard library is enough for this, so no HTTP package is required, and
    `HF_HUB_OFFLINE`, which is about the Hub, does not stand in the way of other hosts.

    Raises ValueError when there is no such host, no answer within `timeout` seconds, another
    status than 200, or more than `max_bytes`.
    """
    try:
        request = urllib.request.Request(_ascii(url), headers={"User-Agent": "perceptiondlm"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            data = response.read(max_bytes + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"expected an image at {url[:200]}, got: {error}") from error
    if len(data) > max_bytes:
        raise ValueError(
            f"expected an image of at most {max_bytes >> 20} MiB at {url[:200]}, got more"
        )
    return data


def decode_base64(text: str | bytes, name: str = "an image") -> bytes:
    """Decodes base64, also line-wrapped, URL-safe, or without its padding.

    Raises ValueError for any other character, for a mixture of the two alphabets, and for a text
    that is cut off.
    """
    try:
        digits = text.encode("ascii") if isinstance(text, str) else text
        digits = digits.translate(None, b" \t\r\n\f")

        # The URL-safe alphabet, as the usual one.
        if re.search(rb"[-_]", digits):
            if re.search(rb"[+/]", digits):
                raise ValueError("both of its alphabets at once")
            digits = digits.translate(bytes.maketrans(b"-_", b"+/"))

        # Padding may be left out, but not be wrong.
        bare = digits.rstrip(b"=")
        if len(digits) > len(bare) and len(digits) % 4:
            raise ValueError("the wrong padding")
        return base64.b64decode(bare + b"=" * (-len(bare) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"expected {name} in base64, got: {error}") from error


def decode_data_url(url: str, name: str = "an image") -> bytes:
    """Decodes a `data:` URL: any parameters, base64 (see `decode_base64`) or percent-encoding.

    `name` says in errors (ValueError) what was expected.
    """
    head, comma, body = url.strip().partition(",")
    if not comma or not is_data_url(head):
        raise ValueError(f"expected {name} as data:image/...;base64,..., got {url[:60]!r}")

    kind, *parameters = (part.strip().lower() for part in head[5:].split(";"))
    if kind in NO_PIXELS:
        raise ValueError(f"expected {name} as an image of pixels, got {kind}")

    if parameters and parameters[-1] == "base64":
        return decode_base64(unquote_to_bytes(body) if "%" in body else body, name)
    if "%" not in body:  # no format of images has printable bytes alone
        raise ValueError(f"expected {name} in base64 or percent-encoded, got {url[:60]!r}")
    return unquote_to_bytes(body)


# Encoded files, as Pillow opens them, and two cases that it does not.

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
PNG_START = b"\x89PNG\r\n\x1a\n"


def _read_all(source) -> bytes:
    if hasattr(source, "seek"):
        source.seek(0)
        return source.read()
    with open(source, "rb") as file:
        return file.read()


def _without_exif(data: bytes) -> bytes:
    """Drops a PNG's EXIF chunks."""
    kept, start = [PNG_START], len(PNG_START)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")  # length, name, checksum
        if data[start + 4 : start + 8] != b"eXIf":
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _register_heif():
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ValueError(
            "expected pillow-heif for HEIC, got none: pip install pillow-heif"
        ) from None
    register_heif_opener()


def open_encoded(source, formats: list[str] | tuple[str, ...] | None = None) -> Image.Image:
    """Opens an encoded image, a path or binary file, as PIL does: lazily, not converted.

    A PNG whose EXIF has a wrong checksum, which PIL refuses, is opened without it; HEIC with
    pillow-heif, where any format may be opened. Raises ValueError for HEIC without it.
    """
    try:
        return Image.open(source, formats=formats)
    except (OSError, SyntaxError):
        # What has failed as a whole may be one of the two cases.
        data = _read_all(source)
        if formats is None and data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
            _register_heif()
            return Image.open(io.BytesIO(data))
        if not data.startswith(PNG_START):
            raise
        return Image.open(io.BytesIO(_without_exif(data)), formats=formats)


# Arrays and tensors, as 8-bit images.


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _from_16_bit(array: np.ndarray) -> np.ndarray:
    """Scales 16-bit gray to 8; values that all fit 8 bits would turn black, and are refused."""
    low, high = array.min(), array.max()
    if low < 0 or high > 65535 or 0 < high < 256:
        raise ValueError(
            f"expected 16-bit gray values, got [{low}, {high}]: give 8-bit values as uint8"
        )
    return np.rint(array / 257.0).astype(np.uint8)  # 65535 / 257 = 255


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """Scales pixel values of any known type to bytes; ValueError for others."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return _from_16_bit(array)

    # Floats are shares of full brightness; integers beyond a byte could mean anything.
    is_float = array.dtype.kind == "f"
    if is_float and np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1:
        return np.rint(array * 255.0).astype(np.uint8)

    extent = f" in [{array.min()}, {array.max()}]" if array.dtype.kind in "iuf" else ""
    raise ValueError(
        f"expected image values as uint8, uint16 or floats in [0, 1], got {array.dtype}{extent}"
    )


def _from_array(array: np.ndarray, layout: str) -> Image.Image:
    """Makes an image of an array, channels last; `layout` says in errors how it was given."""
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"expected an image array of shape (H, W) or {layout} with C of 1, 3 or 4,"
            f" got {array.ndim} axes and, channels last, shape {array.shape}"
        )
    values = _to_uint8(array)
    if array.ndim == 3 and channels == 1:  # gray, which PIL knows without an axis of channels
        values = values.squeeze(2)
    return Image.fromarray(np.ascontiguousarray(values))


# Images in any form, upright and in RGB.

MAX_PATH = 4096  # characters; a longer text is no path but base64
EXIF_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # PIL's
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _open_path(path: str | os.PathLike) -> Image.Image:
    """Opens a file or, as transformers does where there is none, base64 text."""
    if os.path.isfile(path):
        return open_encoded(path)
    if isinstance(path, str):
        try:
            return Image.open(io.BytesIO(decode_base64(path)))
        except (ValueError, OSError, SyntaxError):
            if len(path) > MAX_PATH:
                raise ValueError(
                    f"expected an image as path, URL or base64, got {describe(path)}..."
                ) from None
    raise FileNotFoundError(f"expected an image file, got {os.fspath(path)!r}: no such file")


def _open(image) -> Image.Image:
    """Opens an image in any form, as PIL does: not converted, not turned."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (bytes, bytearray)):
        return open_encoded(io.BytesIO(image))

    # Texts and paths.
    if isinstance(image, str) and is_url(image):
        return _open(fetch_image(image))
    if isinstance(image, str) and is_data_url(image):
        return _open(decode_data_url(image))
    if isinstance(image, (str, os.PathLike)):
        return _open_path(image)

    # Pixels.
    if isinstance(image, torch.Tensor):
        array = _to_numpy(image)
        return _from_array(array.transpose(1, 2, 0) if array.ndim == 3 else array, "(C, H, W)")
    if isinstance(image, np.ndarray):
        return _from_array(image, "(H, W, C)")

    raise ValueError(
        "expected an image as PIL image, path, URL, bytes, numpy (H, W, C) or torch (C, H, W),"
        f" got {type(image).__name__}"
    )


def turn_upright(image: Image.Image) -> Image.Image:
    """Turns an image as its EXIF says; itself, not a copy, where nothing is to turn.

    EXIF that cannot be read says nothing: the pixels do not depend on it.
    """
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # PIL's parser fails in many ways on damaged EXIF
        turn = None
    if turn is None:
        return image

    turned = image.transpose(turn)
    for key in EXIF_KEYS:  # else it would be turned again when it is opened again
        turned.info.pop(key, None)
    return turned


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB; alpha is dropped."""
    if 0 in image.size:
        raise ValueError(f"expected an image with at least one pixel, got size {image.size}")
    if image.mode == "RGB":
        return image

    # Modes that PIL would clip, or not convert.
    if image.mode.startswith("I"):  # 16-bit gray, which PIL may open as 32-bit integers
        values = np.asarray(image)
        image = Image.fromarray(_from_16_bit(values))
    elif image.mode == "F":
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    return image.convert("RGB")


@contextmanager
def _damage_as_value_error(name: str, given):
    """Raises ValueError for what PIL raises in many ways: a file that it cannot read."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"expected a readable {name}, got {describe(given)}: {error}") from error


def load_image(image) -> Image.Image:
    """Opens an image as RGB, upright.

    Accepts a PIL image, a path, an http(s) URL, a `data:` URL, base64 text, encoded bytes, a numpy
    array (H, W) or (H, W, C), or a torch tensor (H, W) or (C, H, W); arrays are uint8, uint16, or
    floats in [0, 1]; C is 1, 3 or 4 (alpha is dropped). EXIF orientation is applied; 16-bit gray is
    scaled to 8.

    Raises ValueError for anything else, FileNotFoundError for a path that is not there.
    """
    with _damage_as_value_error("image", image):
        return _to_rgb(turn_upright(_open(image)))


# Formats that lose: a region mask is no mask any more when its pixels have changed.

# How formats that change pixels, or may, call themselves. WebP is both, see `_webp_lossless`.
LOSSY_FORMATS = frozenset(["JPEG", "MPO", "JPEG2000", "AVIF", "HEIF"])
LOSSY_COMPRESSION = frozenset(["jpeg", "tiff_jpeg", "webp"])  # in TIFF


def _webp_data(image: Image.Image) -> bytes:
    """Reads the encoded file, or nothing where it was in memory and is decoded by now."""
    for source in (getattr(image, "fp", None), getattr(image, "filename", None)):
        if hasattr(source, "seek") or (source and os.path.isfile(source)):
            data = _read_all(source)
            if data.startswith(b"RIFF"):
                return data
    return b""


def _webp_lossless(data: bytes) -> bool:
    """Tells whether the first frame is a lossless one."""
    start = 12  # behind the file's header
    while start + 8 <= len(data):
        kind = data[start : start + 4]
        length = int.from_bytes(data[start + 4 : start + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8L"
        start += 24 if kind == b"ANMF" else 8 + length + length % 2  # a frame holds chunks
    return False


def _loss_of(image: Image.Image) -> str | None:
    """Names what has changed, or may have changed, the pixels of an image that was encoded."""
    if image.format in LOSSY_FORMATS:
        return image.format
    if image.format == "TIFF" and image.info.get("compression") in LOSSY_COMPRESSION:
        return f"TIFF with {image.info['compression']} compression"
    if image.format == "WEBP" and not _webp_lossless(_webp_data(image)):
        two_colors = image.convert("RGBA").getcolors(2) is not None  # nothing has changed
        return None if two_colors else "WebP that is not known to be lossless"
    return None


def expect_lossless(image: Image.Image, name: str):
    """Refuses a region mask of a lossy format: near an edge its pixels are no longer zero.

    What is to be asked has to be as opened: of WebP, decoding leaves no trace of the format.
    """
    if (kind := _loss_of(image)) is not None:
        raise ValueError(
            f"expected {name} without loss, say as PNG, got {kind}, which changes the pixels near"
            " an edge"
        )


def _open_lossless(image, name: str = "a region mask") -> Image.Image:
    """Opens a region mask or label map upright, not converted."""
    image = _open(image)
    expect_lossless(image, name)
    return turn_upright(image)


# Region masks.


def _gray_values(image: Image.Image) -> np.ndarray:
    """Reads the values of a mode of one channel, 0 where a PNG says that one is transparent."""
    values, hidden = np.asarray(image), image.info.get("transparency")
    if not isinstance(hidden, int):
        return values
    return np.where(values == (bool(hidden) if image.mode == "1" else hidden), 0, values)


def _colors(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads the colors (H, W, 3) and alpha (H, W), or None, of any other mode."""
    if "transparency" not in image.info and image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return np.asarray(image.convert("RGB")), None
    image = image.convert("LA") if image.mode == "La" else image
    rgba = np.asarray(image.convert("RGBA"))
    return rgba[..., :3], rgba[..., 3]


def _levels(image: Image.Image) -> np.ndarray:
    """Reads the values of a region mask (H, W), 0 where it is transparent or black."""
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return _gray_values(image)
    return levels_of_colors(*_colors(image))


def _open_mask(mask, size: tuple[int, int]) -> np.ndarray:
    """Opens a region mask in any form, bool (H, W)."""
    # Pixels.
    if isinstance(mask, (str, os.PathLike, bytes, bytearray, Image.Image)):
        return region_of_values(_levels(_open_lossless(mask)), size)
    if isinstance(mask, torch.Tensor):
        return region_of_values(_to_numpy(mask), size)
    if isinstance(mask, np.ndarray) or hasattr(mask, "__array__"):
        return region_of_values(np.asarray(mask), size)

    # Numbers that say what they are.
    if isinstance(mask, dict) and {"size", "counts"} <= set(mask):
        return decode_rle(mask, size)
    if isinstance(mask, dict) and set(mask) == {"box"}:
        return fill_box(mask["box"], size)
    if isinstance(mask, dict) and set(mask) == {"polygons"}:
        return fill_polygons(mask["polygons"], size)

    # Plain lists.
    if is_box(mask):
        return fill_box(mask, size)
    if isinstance(mask, (list, tuple)) and mask and all(isinstance(p, (list, tuple)) for p in mask):
        return fill_polygons(mask, size)

    raise ValueError(
        "expected a region mask as PIL image, path, (H, W) array or tensor, COCO RLE, box or"
        f" polygons, got {describe(mask)}"
    )


def load_mask(mask, size: tuple[int, int]) -> Image.Image:
    """Opens a region mask as an 8-bit PIL image: 255 inside the region, 0 outside.

    Of pixels the region is what is neither zero, black nor transparent, by color whatever the
    mode, soft edges included; of floats, in [0, 1], what exceeds 0.5. EXIF orientation is applied.

    Args:
        mask: pixels, as a PIL image, a bool, integer or float array or tensor (H, W), a path, an
            http(s) URL, a `data:` URL, base64 text or encoded bytes, in no lossy format; or a COCO
            RLE dict (`size`, `counts`), a box `{"box": [x0, y0, x1, y1]}` or polygons
            `{"polygons": [[x0, y0, x1, y1, ...], ...]}`, both in pixels; a plain list of four
            numbers is a box and a list of lists is polygons.
        size: (width, height) of the image.

    Raises ValueError for a mask that is empty, of another size, of several regions (see
    `split_label_map`), or of no known form.
    """
    with _damage_as_value_error("region mask", mask):
        region = _open_mask(mask, size)
    expect_size(region.shape[::-1], size)
    if not region.any():
        raise ValueError(
            "expected a region mask with at least one non-zero pixel, got an empty region mask"
        )
    return Image.fromarray(region.astype(np.uint8) * 255)


# Label maps: many regions in one image, each with a value or color of its own.


def _palette_labels(image: Image.Image, void: int | None) -> tuple[np.ndarray, dict[int, str]]:
    """Reads the labels of a palette image: its indices, but what is no label goes by its color."""
    indices = np.asarray(image).astype(np.int32)
    colors, alpha = _colors(image)

    # Without black in the palette its first color is outside.
    outside = ~colors.any(-1)
    if not outside.any():
        outside = indices == 0
    if alpha is not None:
        outside |= alpha == 0
    if void is not None and (~outside & (indices != void)).any():
        outside |= (indices == void) | (colors == VOID_COLOR).all(-1)
    # Index 0 may be a label, so all are counted from 1.
    found = np.unique(indices[~outside]).tolist()
    return np.where(outside, 0, indices + 1), {index + 1: str(index) for index in found}


def read_labels(labels, void: int | None = VOID) -> tuple[np.ndarray, dict[int, str]]:
    """Reads a label map as integers (H, W), 0 without a label, and the names of the others."""
    if isinstance(labels, torch.Tensor):
        labels = _to_numpy(labels)
    if isinstance(labels, np.ndarray):
        return labels_of_values(labels, void)

    # An image's labels are its indices, its values or its colors.
    image = _open_lossless(labels, "a label map")
    if image.mode == "P":
        return _palette_labels(image, void)
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return labels_of_values(_gray_values(image), void)
    colors, alpha = _colors(image)
    outside = np.zeros(colors.shape[:2], bool) if alpha is None else alpha == 0
    return labels_of_colors(colors, outside, void)


def split_label_map(labels, void: int | None = VOID) -> dict[str, Image.Image]:
    """Splits a label map into the region masks of its labels, as `load_mask` takes them.

    Args:
        labels: as the pixels of a mask, but bools or integers, or colors. Zero, black and
            transparent pixels have no label; in a palette image without black, index 0 has none.
        void: the value that says "no label" where it is the highest of several, as in VOC and
            Cityscapes; where it is not None, VOC's color for it is no label either.

    Returns 8-bit masks by label: a value, an index of the palette, or a color `#rrggbb`, in the
    order of the values. Raises ValueError for a lossy format and for a map without labels.
    """
    with _damage_as_value_error("label map", labels):
        codes, names = read_labels(labels, void)
    if not names:
        raise ValueError("expected a label map with at least one label, got none")
    return {
        name: Image.fromarray((codes == code).astype(np.uint8) * 255)
        for code, name in names.items()
    }
