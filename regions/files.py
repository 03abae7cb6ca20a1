"""Reads images, masks and annotations from files that nobody vouches for.

Every reader here checks sizes before it decodes and raises ValueError (or FileNotFoundError) with
one line that names the file. An image's path is only ever one that the user gave: names inside
annotation files are compared with it, never opened.
"""

import functools
import io
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image

from ..common.json_text import parse_json
from ..image_loading import (
    expect_lossless,
    fetch_image,
    is_url,
    load_image,
    open_encoded,
    turn_upright,
)

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
READ_SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .avif".split()
)
HEIF_SUFFIXES = frozenset(".heic .heif .hif".split())  # read where pillow-heif is installed
OTHER_SUFFIXES = frozenset(  # images, but of no kind that is read: named as such, not passed over
    ".jxl .jp2 .j2k .svg .psd .ico .tga .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .avifs".split()
)
IMAGE_SUFFIXES = READ_SUFFIXES | HEIF_SUFFIXES | OTHER_SUFFIXES
MASK_SUFFIXES = frozenset(".png .webp .gif .bmp .tif .tiff .pgm".split())

MAX_PIXELS = 80_000_000
MAX_SIDE = 200_000
MAX_SCANS = 256  # of a JPEG; photographs have about ten
MAX_IMAGE_BYTES = 256 << 20
MAX_JSON_BYTES = 512 << 20
MAX_TEXT_BYTES = 128 << 20  # of XML, or YOLO's lines
MAX_ARRAY_BYTES = 4 << 30  # of .npy and .npz, unpacked
DOWNLOAD_SECONDS = 30
JPEG_FORMATS = ("JPEG", "MPO")  # the second is several in one file, as cameras write it
JPEG_SCAN = b"\xff\xda"  # a marker that no scan has inside


@dataclass(frozen=True)
class ImageSource:
    """An image to open; `named` when the user wrote its very name, not a folder or pattern."""

    path: str
    named: bool

    @property
    def stem(self) -> str:
        """The file's name without its suffix."""
        return PurePosixPath(self.path).stem if is_url(self.path) else Path(self.path).stem


# Reading one file, checked before it is decoded.


def open_image(path: str) -> Image.Image:
    """Opens an image from a file or URL, as upright RGB."""
    if is_url(path):
        source = io.BytesIO(fetch_image(path, MAX_IMAGE_BYTES, DOWNLOAD_SECONDS))
    else:
        check_file(Path(path), MAX_IMAGE_BYTES, "an image")
        source = path
    with _decoding("image", path):
        return load_image(_open_checked(source, path))


@contextmanager
def _decoding(kind: str, name: str):
    """What a damaged file makes a decoder raise, which may be anything, as a ValueError."""
    try:
        yield
    except (ValueError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"expected a readable {kind} in {name}, got: {what}") from error


def open_mask_file(path: Path) -> Image.Image:
    """Opens a mask or label map, upright, not yet converted."""
    check_file(path, MAX_IMAGE_BYTES, "a mask")
    with _decoding("mask", str(path)):
        mask = _open_checked(path, str(path))
        expect_lossless(mask, f"the mask {path}")
        return turn_upright(mask)


def open_mask_bytes(data: bytes, name: str) -> Image.Image:
    """Opens the bytes of a mask that stands in another file, as `open_mask_file` does."""
    with _decoding("mask", name):
        mask = _open_checked(io.BytesIO(data), name)
        expect_lossless(mask, name)
        return turn_upright(mask)


@functools.cache
def readable_formats() -> list[str]:
    """Those of `IMAGE_FORMATS` that can be opened: AVIF is not in every Pillow, HEIF in none."""
    Image.init()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    return [kind for kind in IMAGE_FORMATS if kind in Image.OPEN]


def _open_checked(source, name: str) -> Image.Image:
    readable = readable_formats()
    try:
        image = open_encoded(source, readable)
    except Image.DecompressionBombError as error:
        raise ValueError(f"expected {MAX_PIXELS:,} pixels at most in {name}: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        if Path(name).suffix.lower() in HEIF_SUFFIXES and "HEIF" not in readable:
            raise ValueError(
                f"expected pillow-heif, which reads {name}, got none: pip install pillow-heif"
            ) from error
        kinds = ", ".join(readable)
        raise ValueError(f"expected an image ({kinds}) in {name}, got something else") from error

    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"expected {MAX_PIXELS:,} pixels at most in {name}, got {image.width}x{image.height}"
        )
    expect_bounded(image, source, name, side=MAX_SIDE, scans=MAX_SCANS)
    return image


def expect_bounded(image: Image.Image, source, name: str, *, side: int, scans: int):
    """Refuses an image, opened from a path or BytesIO and not yet decoded, of too long a side; and
    a JPEG of too many scans, each of which is a pass over the whole image."""
    if max(image.size) > side:
        got = f"{image.width}x{image.height}"
        raise ValueError(f"expected at most {side:,} pixels along a side of {name}, got {got}")
    if image.format in JPEG_FORMATS or image.info.get("compression") == "jpeg":  # the latter: TIFF
        data = source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
        if (found := data.count(JPEG_SCAN)) > scans:
            raise ValueError(f"expected at most {scans} scans in the JPEG of {name}, got {found}")


def check_file(path: Path, most: int, kind: str):
    if not path.is_file():  # nor a device or pipe
        raise FileNotFoundError(f"expected {kind} file at {path}, found none")
    if (size := path.stat().st_size) > most:
        raise ValueError(
            f"expected {kind} of at most {most >> 20} MiB in {path}, got {size >> 20} MiB"
        )


def read_annotations(path: Path):
    """Reads the content of a JSON file."""
    check_file(path, MAX_JSON_BYTES, "a JSON")
    return parse_json(path.read_bytes(), path)


def is_plain_name(name) -> bool:
    """Says whether a name from an annotation file stays below the folder it is looked up in."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        return False
    return ".." not in PurePosixPath(name).parts
