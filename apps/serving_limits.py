"""What a stranger may send: sizes, counts and kinds, checked before anything large is made of it.

Everything here raises ValueError with what was expected and what came. No string from outside is
ever taken for a path.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .. import image_sources
from ..image_loading import expect_lossless, load_mask, open_encoded, turn_upright
from .inputs import annotation_mask, readable_formats

# What people send as a picture that is none: first bytes, and what to call it.
NOT_PICTURES = (
    (b"<svg", "SVG"),
    (b"<!doctype html", "HTML"),
    (b"<html", "HTML"),
    (b"<?xml", "XML or SVG"),
    (b"%pdf", "PDF"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"{", "JSON"),
)


@dataclass(frozen=True)
class Limits:
    """Most that one request may ask for.

    Attributes:
        body_bytes: of a request's body, or of an uploaded or fetched file.
        pixels: of a picture.
        masks: regions of a picture.
        mask_pixels: of all masks of a picture together, a byte of memory each.
        images: pictures of a conversation.
        text: characters of all messages' texts.
        stop_characters: of one stop string.
        caption_length, new_tokens, steps: of decoding.
        header_seconds, body_seconds: to receive a request's head, and its body.
        request_seconds: from received to answered.
        send_seconds: for a client to take what is sent.
    """

    body_bytes: int = 32 << 20
    pixels: int = 40_000_000
    masks: int = 64
    mask_pixels: int = 400_000_000
    images: int = 8
    text: int = 20_000
    stop_characters: int = 500
    caption_length: int = 256
    new_tokens: int = 1024
    steps: int = 1024
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    request_seconds: float = 300.0
    send_seconds: float = 30.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"expected {name} above 0, got {value!r}")


def expect_at_most(name: str, value: int | None, most: int):
    """Refuses an option beyond its limit."""
    if value is not None and value > most:
        raise ValueError(f"expected {name} of at most {most}, got {value}")


def decode_picture(data: bytes, name: str, limits: Limits) -> Image.Image:
    """A picture from an encoded file's bytes: upright, not converted, fully read."""
    return _loaded(_open(data, name, limits), name)


def decode_mask(data: bytes, name: str, limits: Limits) -> Image.Image:
    """A mask from an encoded file's bytes; lossy kinds are refused.

    Of a copy of the picture, in colors and transparent outside the region, the alpha is the mask.
    """
    mask = _open(data, name, limits)
    expect_lossless(mask, name)
    mask = _loaded(mask, name).copy()  # which has no format to be asked about again
    return (alpha_mask(mask) if _is_colored(mask) else None) or mask


def _open(data: bytes, name: str, limits: Limits) -> Image.Image:
    if len(data) > limits.body_bytes:
        most = limits.body_bytes / (1 << 20)
        raise ValueError(
            f"expected {name} of at most {most:g} MiB, got {len(data) / (1 << 20):.1f} MiB"
        )
    try:
        picture = open_encoded(io.BytesIO(data), readable_formats())
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"expected at most {limits.pixels:,} pixels in {name}, got: {error}"
        ) from error
    except Exception as error:  # decoders fail in many ways on what strangers make up
        kinds = ", ".join(readable_formats())
        raise ValueError(f"expected {name} as {kinds}, got {_kind_of(data)}") from error
    if picture.width * picture.height > limits.pixels:
        raise ValueError(
            f"expected at most {limits.pixels:,} pixels in {name},"
            f" got {picture.width}x{picture.height}"
        )
    return picture


def _loaded(picture: Image.Image, name: str) -> Image.Image:
    try:
        return turn_upright(picture)
    except Exception as error:
        raise ValueError(f"expected {name} as a whole file, got a damaged one: {error}") from error


def _is_colored(mask: Image.Image) -> bool:
    if mask.mode not in ("P", "PA", "RGB", "RGBA"):
        return False
    colors = np.asarray(mask.convert("RGB"))
    return bool((colors != colors[..., :1]).any())


def _kind_of(data: bytes) -> str:
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, kind in NOT_PICTURES:
        if head.startswith(start):
            return kind
    if not data:
        return "nothing"
    return f"something that starts with {data[:12]!r}"


def decode_data_url(url: str, name: str, limits: Limits) -> bytes:
    """The bytes of a `data:` URL, no more of them than a picture may have."""
    data = image_sources.decode_data_url(url, name)
    if len(data) > limits.body_bytes:
        raise ValueError(f"expected {name} of at most {limits.body_bytes:,} bytes, got more")
    return data


def alpha_mask(picture: Image.Image) -> Image.Image | None:
    """The region that a picture's alpha channel shows: not transparent, where some of it is."""
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return None
    alpha = picture.convert("RGBA").getchannel("A")
    return alpha.point([0] + [255] * 255) if alpha.getextrema()[0] == 0 else None


def each_numbered(kind: str, items: Sequence, load: Callable) -> list:
    """Loads each item; a ValueError says the number, from 1, of the item that it belongs to."""
    loaded = []
    for k, item in enumerate(items, 1):
        try:
            loaded.append(load(item))
        except ValueError as error:
            raise ValueError(f"{kind} {k}: {error}") from error
    return loaded


def read_mask(item, size: tuple[int, int], limits: Limits) -> Image.Image:
    """A region mask from JSON: COCO RLE, `{"box": ...}`, `{"polygons": ...}`, a plain box or
    polygons, a COCO annotation, or a mask image as data URL; as `load_mask` gives it."""
    if isinstance(item, str):
        return load_mask(
            decode_mask(decode_data_url(item, "a mask", limits), "a mask", limits), size
        )
    if not isinstance(item, (dict, list)):
        raise ValueError(f"expected an object, a list or a data URL, got {item!r:.80}")
    return load_mask(annotation_mask(item, "a mask"), size)


def expect_masks(count: int, size: tuple[int, int], limits: Limits):
    """Refuses more masks than a request may have, or more memory than they may take."""
    if count > limits.masks:
        raise ValueError(f"expected at most {limits.masks} masks for a picture, got {count}")
    pixels = size[0] * size[1] * count
    if pixels > limits.mask_pixels:
        raise ValueError(
            f"expected at most {limits.mask_pixels:,} pixels in all masks together,"
            f" got {pixels:,}: send a smaller picture or fewer masks"
        )
