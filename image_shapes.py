"""Regions that are given as numbers: COCO run lengths, boxes and polygons, filled as arrays.

Every function here returns or takes bool (H, W) arrays; a size is (width, height) in pixels.
"""

import os

import numpy as np

FARTHEST = 2**20  # pixels from the corner
LARGEST = 2**53  # beyond it floats are no longer exact
MOST_DIGITS = 7  # of a compressed run length, 5 bits each
UPSAMPLING = 5  # COCO walks along a polygon on a grid five times finer than the pixels
CROSSINGS = 1 << 20  # filled at a time, to bound the memory


def decode_rle(rle: dict, size: tuple[int, int]) -> np.ndarray:
    """Fills a COCO run-length encoding: `size` [height, width] and `counts`, str, bytes or list.

    Raises ValueError for another size and for counts that are malformed or do not add up.
    """
    height, width = _integers("COCO RLE size [height, width]", rle["size"], 2)
    expect_size((width, height), size)
    counts = rle["counts"]
    if isinstance(counts, (list, tuple, np.ndarray)):
        runs = np.array(_integers("COCO RLE counts", counts, len(counts)), dtype=np.int64)
    elif isinstance(counts, (str, bytes)):
        runs = _decode_runs(
            counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
        )
    else:
        raise ValueError(f"expected COCO RLE counts as str, bytes or list, got {describe(counts)}")

    total = sum(runs.tolist())  # of Python's integers, which do not overflow
    if total != height * width or (runs < 0).any():
        raise ValueError(
            f"expected COCO RLE counts that add up to {height * width} pixels, got {total}"
        )
    inside = np.arange(len(runs)) % 2 == 1  # runs outside and inside by turns
    return np.repeat(inside, runs).reshape(width, height).T  # column by column


def _decode_runs(data: bytes) -> np.ndarray:
    """Reads compressed counts: 5 bits a character, lowest first, in two's complement.

    From the fourth run on a value is the difference from the run two positions earlier.
    """
    if not data:
        return np.zeros(0, np.int64)
    digits = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    last = (digits & 32) == 0  # of its number
    ends = np.flatnonzero(last)
    starts = np.append(0, ends + 1)
    places = np.arange(len(digits)) - np.repeat(starts, np.diff(starts, append=len(digits)))
    wrong = (digits < 0) | (digits > 63) | (places >= MOST_DIGITS)
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"expected COCO RLE counts, got {chr(data[at])!r} at {at} in them")
    if not last[-1]:
        raise ValueError(f"expected COCO RLE counts, got them cut off after {len(data)} characters")

    runs = np.add.reduceat((digits & 31) << (5 * places), starts[:-1])
    negative = (digits[ends] & 16) > 0
    runs -= negative.astype(np.int64) << (5 * (places[ends] + 1))
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def encode_rle(mask: np.ndarray) -> dict:
    """Encodes an array (H, W), non-zero inside, as COCO's compressed run lengths, for JSON."""
    flat = np.asarray(mask).astype(bool).flatten(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    runs = np.diff(changes, prepend=0, append=flat.size)
    numbers = runs.copy()
    numbers[3:] -= runs[1:-2]

    digits = []  # one array for each place, -1 where a number has ended before it
    going = np.ones(len(numbers), dtype=bool)
    while going.any():
        digit = numbers & 31
        numbers = numbers >> 5
        more = numbers != np.where(digit & 16, -1, 0)
        digits.append(np.where(going, digit + 32 * more + 48, -1))
        going = going & more
    characters = np.stack(digits, 1).ravel() if digits else np.zeros(0, int)
    counts = characters[characters >= 0].astype(np.uint8).tobytes().decode("ascii")
    return {"size": list(np.asarray(mask).shape), "counts": counts}


def fill_box(box, size: tuple[int, int]) -> np.ndarray:
    """Fills a box [x0, y0, x1, y1], half-open and rounded to pixels, a pixel at least.

    Raises ValueError for a box without an area or outside the image.
    """
    left, top, right, bottom = _numbers("box [x0, y0, x1, y1]", box, 4)
    if not (left < right and top < bottom):
        raise ValueError(f"expected a box with x0 < x1 and y0 < y1, got {list(box)}")
    mask = np.zeros(size[::-1], dtype=bool)
    rows = slice(max(0, round(top)), max(0, round(bottom), round(top) + 1))
    columns = slice(max(0, round(left)), max(0, round(right), round(left) + 1))
    mask[rows, columns] = True
    if not mask.any():
        raise ValueError(f"expected a box inside the {size[0]}x{size[1]} picture, got {list(box)}")
    return mask


def fill_polygons(polygons, size: tuple[int, int]) -> np.ndarray:
    """Fills the union of polygons [x0, y0, x1, y1, x2, y2, ...] as COCO's own code does.

    Data sets are annotated in COCO's terms, so their areas come out as published. A polygon that
    crosses itself is filled where an odd number of its edges lies above.
    """
    if not isinstance(polygons, (list, tuple)):
        raise ValueError(f"expected a list of polygons, got {describe(polygons)}")
    mask = np.zeros(size[::-1], dtype=bool)
    for polygon in polygons:
        _fill_polygon(_points(polygon), mask)
    return mask


def _points(polygon) -> np.ndarray:
    """Checks a polygon and returns its points, (N, 2)."""
    if not isinstance(polygon, (list, tuple)) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(
            "expected a polygon as [x0, y0, x1, y1, x2, y2, ...], three points or more,"
            f" got {describe(polygon)}"
        )
    points = np.array(_numbers("polygon", polygon, len(polygon)), dtype=np.float64).reshape(-1, 2)
    if np.abs(points).max() > FARTHEST:
        raise ValueError(f"expected polygon points near the picture, got {describe(polygon)}")
    return points


def _fill_polygon(points: np.ndarray, mask: np.ndarray):
    """Adds a polygon to a mask: the pixels above which an odd number of crossings lies.

    COCO walks along the edges on a grid five times finer than the pixels and notes the row
    wherever the walk passes the middle of a column of pixels. Those crossings are computed here
    from each edge's ends, without the steps between them.
    """
    height, width = mask.shape
    starts = np.trunc(UPSAMPLING * points + 0.5).astype(np.int64)
    ends = np.roll(starts, -1, axis=0)

    # A column's middle lies between the fine columns 5 x + 2 and 5 x + 3.
    first = np.maximum(-((2 - np.minimum(starts, ends)[:, 0]) // UPSAMPLING), 0)
    last = np.minimum((np.maximum(starts, ends)[:, 0] - 3) // UPSAMPLING, width - 1)
    counts = np.maximum(last - first + 1, 0)
    if not counts.any():
        return

    # Only the polygon's own box is worked on: an image may have thousands of small ones.
    lowest, highest = points[:, 1].min(), points[:, 1].max()
    top, bottom = (int(np.clip(y, 0, height)) for y in (lowest - 2, highest + 3))
    left, right = first[counts > 0].min(), last[counts > 0].max() + 1
    toggles = np.zeros((right - left) * (bottom - top) + 1, dtype=bool)
    for edges in _groups(counts):
        numbers = counts[edges]
        each = np.repeat(edges, numbers)
        column = (
            first[each] + np.arange(len(each)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        )
        row = _crossing_rows(starts[each], ends[each], UPSAMPLING * column + 2)
        row = np.ceil(np.clip((row + 0.5) / UPSAMPLING - 0.5, 0, height)).astype(np.int64)
        places = (column - left) * (bottom - top) + row - top
        toggles ^= np.bincount(places, minlength=len(toggles)) % 2 == 1

    inside = np.logical_xor.accumulate(toggles)[:-1]
    mask[top:bottom, left:right] |= inside.reshape(right - left, bottom - top).T


def _groups(counts: np.ndarray) -> list[np.ndarray]:
    """Divides the edges with crossings into groups of about `CROSSINGS` crossings."""
    edges = np.flatnonzero(counts)
    group = np.cumsum(counts[edges]) // CROSSINGS
    return np.split(edges, np.flatnonzero(np.diff(group)) + 1) if len(edges) else []


def _crossing_rows(start: np.ndarray, end: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Finds the fine row, the upper of two, where an edge steps from `column` to the next one.

    `start` and `end` are (N, 2) in fine pixels. Along its longer axis an edge goes in whole
    steps from its smaller end; the other coordinate is rounded half up, both as in COCO.
    """
    width, height = np.abs(end - start).T
    flat = width >= height
    swapped = np.where(flat, start[:, 0] > end[:, 0], start[:, 1] > end[:, 1])[:, None]
    x, y = np.where(swapped, end, start).T
    dx, dy = np.where(swapped, start - end, end - start).T

    rows = np.empty(len(column))
    rows[flat] = _flat_rows(*(values[flat] for values in (x, y, dx, dy, column)))
    rows[~flat] = _steep_rows(*(values[~flat] for values in (x, y, dx, dy, column)))
    return rows


def _flat_rows(x, y, dx, dy, column) -> np.ndarray:
    slope, step = dy / dx, column - x
    return np.minimum(np.trunc(y + slope * step + 0.5), np.trunc(y + slope * (step + 1) + 0.5))


def _steep_rows(x, y, dx, dy, column) -> np.ndarray:
    """The row before the first step t that is beyond the middle between the two columns.

    The estimate of t may be one off where the rounding is close, so its neighbors are tried.
    """
    slope = dx / dy
    estimate = np.floor((column + 0.5 - x) / slope)
    first = estimate
    for t in (estimate + 2, estimate + 1, estimate, estimate - 1):  # the smallest last
        right = np.trunc(x + slope * t + 0.5) > column
        first = np.where(right == (slope > 0), t, first)
    return y + first - 1


def expect_size(got: tuple[int, int], size: tuple[int, int], name: str = "a mask"):
    """Refuses a mask that has not the image's size, both (width, height)."""
    if tuple(got) != tuple(size):
        raise ValueError(
            f"expected {name} with the picture's size {size[0]}x{size[1]} (width x height),"
            f" got {got[0]}x{got[1]}{turned_hint(got, size)}"
        )


def turned_hint(got: tuple[int, int], size: tuple[int, int]) -> str:
    """Says what is likely wrong with a mask that lies on its side."""
    if tuple(got) != tuple(size)[::-1]:
        return ""
    return ": an image is turned upright by its EXIF orientation, and its mask has to be, too"


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


def is_box(value) -> bool:
    """Tells whether a value is a plain list of four numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(map(_is_number, value))


def describe(value) -> str:
    """Type and, for plain values, beginning of a value, for messages."""
    text = repr(value) if isinstance(value, (str, os.PathLike, dict, list, tuple)) else ""
    return f"{type(value).__name__} {text[:80]}".strip()
