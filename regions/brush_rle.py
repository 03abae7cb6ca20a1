"""Decodes the run lengths in which Label Studio keeps what its brush has painted.

A stream of bits: 32 of the number of values, 5 of a value's bits less one, four times 4 of a
length's bits less one. Then runs: a bit (1: one value repeated, 0: values one by one), 2 bits that
choose among the four sizes, the length less one, and the value or values. They are the bytes of an
RGBA image, row by row, and its alpha is the mask.
"""

import numpy as np

MAX_BYTES = 8 << 20  # of the stream: a few million runs
CHANNELS = 4
HEADER_BITS = 32 + 5 + 4 * 4


def decode_brush(rle, size: tuple[int, int]) -> np.ndarray:
    """Returns what is not transparent, bool (H, W), of an image of (width, height).

    Raises ValueError for what is no such stream, or one of another number of pixels.
    """
    bits = _bits(rle)
    count = _number(bits[:32])
    if count != size[0] * size[1] * CHANNELS:
        raise ValueError(
            f"expected brush RLE of {size[0]}x{size[1]} pixels, {size[0] * size[1] * CHANNELS}"
            f" values, got {count}"
        )

    word = _number(bits[32:37]) + 1
    if word != 8:
        raise ValueError(f"expected brush RLE of 8 bits a value, got {word}")
    lengths = [_number(bits[at : at + 4]) + 1 for at in range(37, HEADER_BITS, 4)]
    values = _values(bits, count, lengths)
    return values.reshape(size[1], size[0], CHANNELS)[..., 3] > 0


def _values(bits: np.ndarray, count: int, lengths: list[int]) -> np.ndarray:
    """Reads the runs, uint8 (count)."""
    text = (bits + ord("0")).tobytes()  # of which Python reads numbers
    values, done, at = np.zeros(count, np.uint8), 0, HEADER_BITS
    while done < count:
        is_run = text[at : at + 1] == b"1"
        bits_of_length = lengths[int(text[at + 1 : at + 3] or b"0", 2)]
        start = at + 3 + bits_of_length
        run = int(text[at + 3 : start] or b"0", 2) + 1
        at = start + 8 * (1 if is_run else run)
        if at > len(text) or done + run > count:
            raise ValueError(f"expected {count} values in brush RLE, got it cut off after {done}")
        values[done : done + run] = np.packbits(bits[start:at])
        done += run
    return values


def _bits(rle) -> np.ndarray:
    """Returns the stream's bits, uint8, of a list of bytes."""
    if not isinstance(rle, list) or not len(rle) <= MAX_BYTES:
        got = f"{len(rle):,}" if isinstance(rle, list) else type(rle).__name__
        raise ValueError(f"expected brush RLE as a list of at most {MAX_BYTES:,} bytes, got {got}")
    if not all(type(byte) is int and 0 <= byte <= 255 for byte in rle):
        raise ValueError("expected brush RLE as bytes, whole numbers from 0 to 255")
    if 8 * len(rle) < HEADER_BITS:
        raise ValueError(f"expected brush RLE of {HEADER_BITS} bits or more, got {8 * len(rle)}")
    return np.unpackbits(np.array(rle, np.uint8))


def _number(bits: np.ndarray) -> int:
    return int((bits + ord("0")).tobytes(), 2)
