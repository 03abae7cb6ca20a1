"""Decodes strangers' images and region masks within a request's limits.

Everything here raises ValueError with what was expected and what came. Sizes are compared in a
file's header, before it is decoded. No string from outside is ever taken for a path.
"""

import io

import numpy as np
from PIL import Image

from ... import image_loading
from ...image_loading import expect_lossless, load_mask, open_encoded, turn_upright
from ...image_masks import expect_size
from ...regions.coco import annotation_mask
from ...regions.files import expect_bounded, readable_formats
from .limits import Limits

MAX_NUMBER = 10**9  # of a coordinate or run length
IMAGE_BYTES, MASK_BYTES = 4, 1  # of a pixel, once decoded
# What people send as an image that is none: first bytes, and what to call it.
NOT_IMAGES = (
    (b"<svg", "SVG"),
    (b"<!doctype html", "HTML"),
    (b"<html", "HTML"),
    (b"<?xml", "XML or SVG"),
    (b"%pdf", "PDF"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"{", "JSON"),
)


class Decoder:
    """Decodes one request's images and masks, all of them within one budget of bytes."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.bytes_left = limits.decoded_bytes
        self.numbers_left = limits.numbers
        self.outline_left = limits.outline

    def image(self, data: bytes, name: str) -> Image.Image:
        """Decodes a file's bytes to an image: upright, not converted, fully read."""
        image = self._open(data, name)
        self.spend(image.width * image.height * IMAGE_BYTES)
        return _loaded(image, name)

    def mask_image(self, data: bytes, size: tuple[int, int] | None) -> Image.Image:
        """Decodes a file's bytes to a region mask.

        Raises ValueError for lossy kinds and for another size (width, height) than the image's. Of
        a copy of the image, in colors and transparent outside the region, the alpha is the mask.
        """
        mask = self._open(data, "the mask")
        expect_lossless(mask, "the mask")
        if size is not None and mask.size not in (size, size[::-1]):  # it may lie on its side
            expect_size(mask.size, size)
        self.spend(mask.width * mask.height * MASK_BYTES)
        mask = _loaded(mask, "the mask").copy()  # which has no format to be asked about again
        return (alpha_mask(mask) if _is_colored(mask) else None) or mask

    def mask(self, item, size: tuple[int, int]) -> Image.Image:
        """Reads a region mask from JSON, as `load_mask` gives it, of a size (width, height).

        It is COCO RLE, `{"box": ...}`, `{"polygons": ...}`, a plain box or polygons, a COCO
        annotation, or a mask image as data URL.
        """
        if isinstance(item, str):
            return load_mask(self.mask_image(self.data_url(item, "the mask"), size), size)
        if not isinstance(item, (dict, list)):
            raise ValueError(f"expected an object, a list or a data URL, got {item!r:.80}")
        mask = annotation_mask(item, "a mask")
        said = mask.get("size") if isinstance(mask, dict) else None
        if isinstance(said, list) and len(said) == 2:
            expect_size(said[::-1], size)

        # What it costs is known before it is filled.
        for part in mask.values() if isinstance(mask, dict) else [mask]:
            self._spend_numbers(part)
        polygons = mask.get("polygons") if isinstance(mask, dict) else mask
        for polygon in polygons if isinstance(polygons, list) else []:
            self._spend_outline(polygon, size)
        self.spend(size[0] * size[1] * MASK_BYTES)
        return load_mask(mask, size)

    def expect_masks(self, count: int, size: tuple[int, int]):
        """Raises ValueError for more masks than a request may have, or than its memory holds."""
        if count > self.limits.masks:
            raise ValueError(
                f"expected at most {self.limits.masks} masks for an image, got {count}"
            )
        if (needed := size[0] * size[1] * count * MASK_BYTES) > self.bytes_left:
            raise self._too_much(needed)

    def spend(self, count: int):
        """Takes so many bytes of the request's budget."""
        if count > self.bytes_left:
            raise self._too_much(count)
        self.bytes_left -= count

    def _too_much(self, count: int) -> ValueError:
        return ValueError(
            f"expected at most {self.limits.decoded_bytes:,} bytes of decoded images and masks in"
            f" a request, {self.bytes_left:,} of them left, got {count:,} more:"
            " send a smaller image or fewer masks"
        )

    def _spend_numbers(self, values, depth: int = 3):
        """Bounds the numbers in a list, or in lists of lists of them.

        Raises ValueError for too many, and for what is no number that an image could need. What is
        no list passes: the mask's own form is checked later.
        """
        if not isinstance(values, list):
            return
        self.numbers_left -= len(values)
        if self.numbers_left < 0:
            raise ValueError(
                f"expected at most {self.limits.numbers:,} numbers in the masks of a request,"
                " got more: send masks as compressed COCO RLE or as images"
            )

        for value in values:
            if isinstance(value, list) and depth:
                self._spend_numbers(value, depth - 1)
            elif not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:
                raise ValueError(f"expected finite numbers, got {str(value)[:40]!r}")

    def _spend_outline(self, polygon, size: tuple[int, int]):
        """Bounds what filling costs: a step for each row or column that an edge crosses."""
        if not isinstance(polygon, list) or len(polygon) % 2:
            return  # no polygon, as will be said
        points = np.array(polygon, dtype=float).reshape(-1, 2)
        edges = np.abs(points - np.roll(points, -1, axis=0))  # (N, 2)
        self.outline_left -= int(np.minimum(edges, size).sum())
        if self.outline_left < 0:
            raise ValueError(
                f"expected polygons of at most {self.limits.outline:,} pixels of outline in a"
                " request, got more: send masks as COCO RLE or as images"
            )

    def data_url(self, url: str, name: str) -> bytes:
        """Decodes a `data:` URL; raises ValueError for more bytes than an image may have."""
        data = image_loading.decode_data_url(url, name)
        if len(data) > self.limits.body_bytes:
            raise ValueError(
                f"expected {name} of at most {self.limits.body_bytes:,} bytes, got more"
            )
        return data

    def _open(self, data: bytes, name: str) -> Image.Image:
        """Opens a file within the limits: its header is read, no pixel decoded."""
        limits = self.limits
        if len(data) > limits.body_bytes:
            limit = limits.body_bytes / (1 << 20)
            raise ValueError(
                f"expected {name} of at most {limit:g} MiB, got {len(data) / (1 << 20):.1f} MiB"
            )

        # Pillow reads the header alone here.
        source = io.BytesIO(data)
        try:
            image = open_encoded(source, readable_formats())
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"expected at most {limits.pixels:,} pixels in {name}, got: {error}"
            ) from error
        except Exception as error:  # decoders fail in many ways on what strangers make up
            kinds = ", ".join(readable_formats())
            raise ValueError(f"expected {name} as {kinds}, got {_kind_of(data)}") from error

        # The header says how much decoding would cost.
        width, height = image.size
        if width * height > limits.pixels:
            raise ValueError(
                f"expected at most {limits.pixels:,} pixels in {name}, got {width}x{height}"
            )
        expect_bounded(image, source, name, side=limits.side, scans=limits.scans)
        return image


def _loaded(image: Image.Image, name: str) -> Image.Image:
    try:
        return turn_upright(image)
    except Exception as error:
        raise ValueError(f"expected {name} as a whole file, got a damaged one: {error}") from error


def _is_colored(mask: Image.Image) -> bool:
    if mask.mode not in ("P", "PA", "RGB", "RGBA"):
        return False
    colors = np.asarray(mask.convert("RGB"))
    return bool((colors != colors[..., :1]).any())


def _kind_of(data: bytes) -> str:
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, kind in NOT_IMAGES:
        if head.startswith(start):
            return kind
    if not data:
        return "nothing"
    return f"something that starts with {data[:12]!r}"


def alpha_mask(image: Image.Image) -> Image.Image | None:
    """Returns the region that is not transparent; None of an image that is nowhere transparent."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return alpha.point([0] + [255] * 255) if alpha.getextrema()[0] == 0 else None
