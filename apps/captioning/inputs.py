"""Reads images, masks and annotations from files that nobody vouches for.

Every reader here checks sizes before it decodes and raises ValueError (or FileNotFoundError) with
one line that names the file. An image's path is only ever one that the user gave: names inside
annotation files are compared with it, never opened.
"""

import functools
import glob
import io
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image

from ...common.json_text import parse_json
from ...image_loading import (
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
DOWNLOAD_SECONDS = 30
JPEG_FORMATS = ("JPEG", "MPO")  # the second is several in one file, as cameras write it
JPEG_SCAN = b"\xff\xda"  # a marker that no scan has inside


@dataclass(frozen=True)
class RegionSource:
    """A mask, as `load_mask` takes it, and where it comes from.

    `annotation` holds the ids that a COCO file gives: `id`, `image_id`, `category_id`, and the
    category's name.
    """

    mask: object
    origin: str
    annotation: dict = field(default_factory=dict)


@dataclass(frozen=True)
class ImageSource:
    """An image to open; `named` when the user wrote its very name, not a folder or pattern."""

    path: str
    named: bool

    @property
    def stem(self) -> str:
        """The file's name without its suffix."""
        return PurePosixPath(self.path).stem if is_url(self.path) else Path(self.path).stem


def find_images(arguments: Sequence[str], recursive: bool = False) -> list[ImageSource]:
    """Finds the images of files, folders, patterns and URLs, each once, in order.

    Raises FileNotFoundError for an argument that names nothing.
    """
    found: dict[str, ImageSource] = {}
    for argument in arguments:
        for image in _expand(argument, recursive):
            found.setdefault(image.path, image)
    return list(found.values())


def _expand(argument: str, recursive: bool) -> list[ImageSource]:
    path = Path(argument)
    if is_url(argument) or path.is_file():
        return [ImageSource(argument, named=True)]
    if path.is_dir():
        files = path.rglob("*") if recursive else path.iterdir()
        origin = "folder"
    else:
        files = map(Path, glob.glob(argument, recursive=True))
        origin = "pattern" if glob.has_magic(argument) else "file or folder"
    images = sorted(f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not images:
        what = "expected images in the" if origin == "folder" else "expected images for the"
        raise FileNotFoundError(f"{what} {origin} {argument!r}, found none")
    return [ImageSource(str(f), named=False) for f in images]


# Reading one file, checked before it is decoded.


def open_image(path: str) -> Image.Image:
    """Opens an image from a file or URL, as upright RGB."""
    if is_url(path):
        source = io.BytesIO(fetch_image(path, MAX_IMAGE_BYTES, DOWNLOAD_SECONDS))
    else:
        _check_file(Path(path), MAX_IMAGE_BYTES, "an image")
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
    _check_file(path, MAX_IMAGE_BYTES, "a mask")
    with _decoding("mask", str(path)):
        mask = _open_checked(path, str(path))
        expect_lossless(mask, f"the mask {path}")
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


def _check_file(path: Path, most: int, kind: str):
    if not path.is_file():  # nor a device or pipe
        raise FileNotFoundError(f"expected {kind} file at {path}, found none")
    if (size := path.stat().st_size) > most:
        raise ValueError(
            f"expected {kind} of at most {most >> 20} MiB in {path}, got {size >> 20} MiB"
        )


def read_annotations(path: Path):
    """Reads the content of a JSON file."""
    _check_file(path, MAX_JSON_BYTES, "a JSON")
    return parse_json(path.read_bytes(), path)


def annotation_mask(annotation, name: str):
    """Returns the mask, as `load_mask` takes it, of a COCO or SAM annotation or a plain mask."""
    if isinstance(annotation, list):
        return annotation  # a box or polygons
    if not isinstance(annotation, dict):  # least of all a path
        raise ValueError(f"expected annotations or masks in {name}, got {str(annotation)[:80]!r}")
    if {"size", "counts"} <= set(annotation) or set(annotation) in ({"box"}, {"polygons"}):
        return annotation

    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return segmentation
    if isinstance(segmentation, list) and segmentation:
        return {"polygons": segmentation}
    box = annotation.get("bbox")
    if isinstance(box, list) and len(box) == 4 and all(_is_number(v) for v in box):
        x, y, width, height = box
        return {"box": [x, y, x + width, y + height]}
    raise ValueError(
        f"expected a segmentation or bbox in each annotation of {name}, got {str(annotation)[:80]}"
    )


def is_plain_name(name) -> bool:
    """Says whether a name from an annotation file stays below the folder it is looked up in."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        return False
    return ".." not in PurePosixPath(name).parts


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
