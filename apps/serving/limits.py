"""Bounds what one request may ask for: sizes, counts and times, all in one place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Attributes:
        body_bytes: of a request's body, or of an uploaded or fetched file.
        pixels: of an image.
        side: pixels of an image's longer side.
        scans: of a progressive JPEG, each of which is a pass over the whole image.
        decoded_bytes: of all images and region masks of a request together, once decoded.
        masks: regions of an image.
        numbers: in all masks of a request that come as numbers.
        outline: pixels that all polygons of a request are long.
        images: of a conversation.
        text: characters of all messages' texts and regions' prompts.
        template: characters of a template, or of what a JSON schema becomes.
        stop_characters: of one stop string.
        caption_length, new_tokens, steps: of decoding.
        header_seconds, body_seconds: to receive a request's head, and its body.
        decode_seconds: to read a request and decode its images.
        request_seconds: from accepted to answered, all of the above included.
        send_seconds: for a client to take what is sent.
    """

    body_bytes: int = 32 << 20
    pixels: int = 40_000_000
    side: int = 65_535
    scans: int = 64
    decoded_bytes: int = 300 << 20
    masks: int = 64
    numbers: int = 500_000
    outline: int = 10_000_000
    images: int = 8
    text: int = 20_000
    template: int = 4_000
    stop_characters: int = 500
    caption_length: int = 256
    new_tokens: int = 1024
    steps: int = 1024
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    decode_seconds: float = 10.0
    request_seconds: float = 300.0
    send_seconds: float = 30.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"expected {name} above 0, got {value!r}")


def expect_at_most(name: str, value: int | None, limit: int):
    """Raises ValueError for an option beyond its limit."""
    if value is not None and value > limit:
        raise ValueError(f"expected {name} of at most {limit}, got {value}")


def each_numbered(kind: str, items: Sequence, load: Callable) -> list:
    """Loads each item; a ValueError gets the number, from 1, of the item that it belongs to."""
    loaded = []
    for k, item in enumerate(items, 1):
        try:
            loaded.append(load(item))
        except ValueError as error:
            raise ValueError(f"{kind} {k}: {error}") from error
    return loaded
