"""Finds regions: in the values and colors of arrays, in run lengths, boxes and polygons.

Regions are bool arrays (H, W), labels integers (H, W); a size is (width, height) in pixels. Nothing
is guessed: what could be several regions, or none, raises ValueError.
"""

import os
from typing import Any

import numpy as np

VOID = 255  # "no label" in VOC, Cityscapes and their kind
VOID_COLOR = np.array([224, 224, 192])  # VOC's for it
COLOR_CODE = np.array([1 << 16, 1 << 8, 1])  # times a color: 0xrrggbb

MAX_SHOWN = 8  # values that an error names


# What errors say, and checks of numbers and sizes.

MAX_NUMBER = 2**53  # beyond it floats are no longer exact


def describe(value) -> str:
    """Names the type and, for plain values, shows the beginning of a value, for messages."""
    text = repr(value) if isinstance(value, (str, os.PathLike, dict, list, tuple)) else ""
    return f"{type(value).__name__} {text[:80]}".strip()


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float, np.integer, np.floating))
    return is_real and bool(abs(value) <= MAX_NUMBER)


def is_box(value) -> bool:
    """Tells whether a value is a plain list of four numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(map(_is_number, value))


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


def turned_hint(got: tuple[int, int], size: tuple[int, int]) -> str:
    """Says what is likely wrong with a region mask that lies on its side."""
    if tuple(got) != tuple(size)[::-1]:
        return ""
    return ": an image is turned upright by its EXIF orientation, and its mask has to be, too"


def expect_size(got: tuple[int, int], size: tuple[int, int], name: str = "a region mask"):
    """Refuses a region mask that has not the image's size, both (width, height)."""
    if tuple(got) != tuple(size):
        raise ValueError(
            f"expected {name} with the image's size {size[0]}x{size[1]} (width x height),"
            f" got {got[0]}x{got[1]}{turned_hint(got, size)}"
        )


# Pixels: one region, by values or by color.

HALF = 0.5  # above it a pixel of a float mask belongs to the region
MIN_TOP = 128  # a soft edge leads up to a high value; labels are small ones
MAX_FILLED = 0.5  # share of an edge's pixels that may lie in an area of one value
MIN_MIDDLE = 0.1  # share of an edge's pixels that are neither dark nor bright

ADVICE = (
    "If it is a label map, give each label as a mask of its own (`split_label_map` in Python,"
    " --label-maps on the command line); if it holds probabilities or was compressed with loss,"
    " give the pixels above a threshold, say `mask > 127`"
)


def _several(what: str) -> str:
    return (
        "expected a region mask of one region: zero, black or transparent outside, one value or"
        f" color inside, with soft edges at most; got the {what}. {ADVICE}"
    )


def _listed(values: list) -> str:
    shown = ", ".join(map(str, values[:MAX_SHOWN]))
    return shown if len(values) <= MAX_SHOWN else f"{shown}... ({len(values)} of them)"


def _filled(levels: np.ndarray) -> np.ndarray:
    """Marks the pixels of all 2x2 squares of one value."""
    equal = (levels[1:] == levels[:-1])[:, 1:] & (levels[:, 1:] == levels[:, :-1])[1:]
    equal &= (levels[:, 1:] == levels[:, :-1])[:-1]
    filled = np.zeros(levels.shape, dtype=bool)
    for rows in (slice(None, -1), slice(1, None)):
        for columns in (slice(None, -1), slice(1, None)):
            filled[rows, columns] |= equal
    return filled


def _above_half(values: np.ndarray) -> np.ndarray:
    """Returns the pixels of a float region mask that belong to its region."""
    top = values.max()
    if 1 < top < np.inf and ((values == 0) | (values == top)).all():
        return values > 0  # nothing soft: 0 and 255, say
    if top > 1:
        raise ValueError(
            f"expected a float region mask with values in [0, 1], got a maximum of {top}: give the"
            " pixels above a threshold, say `mask > 127`"
        )
    if not top > HALF and top > 0:
        raise ValueError(
            f"expected a float region mask with values above {HALF}, which are its region, got a"
            f" maximum of {top}: for another threshold give `mask > threshold`"
        )
    return values > HALF


def _one_region(levels: np.ndarray) -> np.ndarray:
    """Returns the non-zero pixels, where those below the highest value are a soft edge.

    An edge leads from 0 to a high value by way of the middle, and no value of it fills an area.
    Labels fill areas, a sigmoid is never 0, and what a lossy format adds lies close to 0 and to
    the highest value.
    """
    region, top = levels > 0, int(levels.max())

    # Everything between the outside and the highest value has to look like an edge.
    edge = region & (levels < top)
    count = np.count_nonzero(edge)
    if count:
        middle = (levels >= top / 8) & (levels <= top * 7 / 8)
        if (
            region.all()
            or top < MIN_TOP
            or np.count_nonzero(edge & _filled(levels)) > MAX_FILLED * count
            or np.count_nonzero(middle) < MIN_MIDDLE * count
        ):
            raise ValueError(_several(f"values {_listed(np.unique(levels[region]).tolist())}"))
    return region


def region_of_values(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the region, bool (H, W), of an array of bools, integers or floats in [0, 1].

    The array is (H, W), or has one channel, first or last. Of floats the region is where they
    exceed 0.5 (0 and one other value, whatever it is, from 1 on), of others where they are not
    zero.
    """
    # One channel, first or last, is none.
    height, width = size[::-1]
    if values.shape in ((1, height, width), (height, width, 1)):
        values = values.reshape(height, width)
    elif values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"expected a region mask array of shape (H, W), got {values.shape}")

    # Only numbers from 0 on can be told from what is outside.
    if values.dtype.kind not in "buif":
        raise ValueError(f"expected a bool, integer or float region mask, got {values.dtype}")
    if values.dtype.kind == "b":
        return values
    if not values.min() >= 0:  # NaN fails this too
        raise ValueError(
            f"expected region mask values of 0 or more, got a minimum of {values.min()}: for"
            " logits give `logits > 0`"
        )

    return _above_half(values) if values.dtype.kind == "f" else _one_region(values)


def levels_of_colors(colors: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """Returns how much of a region mask's one color each pixel has, integers (H, W), 0 outside.

    Args:
        colors: uint8 (H, W, 3); black is outside, and the rest has one hue.
        alpha: uint8 (H, W), 0 outside, or None. Where it hides what is around a photograph's
            object, so that no color fills an area, it is the mask alone.

    Raises ValueError for several colors.
    """
    levels = colors.max(-1)
    if alpha is not None:
        levels = -(-levels.astype(np.int32) * alpha // 255)  # not 0 where neither is

    # Gray is its own measure.
    red, green, blue = np.moveaxis(colors, -1, 0)
    if ((red == green) & (green == blue)).all():
        return levels

    # One hue: every color is a share of the brightest.
    inside = colors[levels > 0].astype(np.int32)
    brightest = inside[inside.max(-1).argmax()]
    expected = inside.max(-1, keepdims=True) * brightest / brightest.max()
    if np.abs(inside - expected).max() <= 2:  # rounded, twice
        return levels

    # A photograph cut out by its alpha: the colors say nothing.
    codes = colors @ COLOR_CODE
    opaque = np.ones(levels.shape, bool) if alpha is None else alpha > 0
    if not opaque.all() and np.count_nonzero(_filled(codes) & opaque) <= MAX_FILLED * opaque.sum():
        return opaque.astype(np.uint8)

    found = np.unique(codes[levels > 0]).tolist()
    raise ValueError(_several(f"colors {_listed([f'#{code:06x}' for code in found])}"))


# Label maps: several regions, by values or by color.


def labels_of_values(values: np.ndarray, void: int | None) -> tuple[np.ndarray, dict[int, str]]:
    """Returns the labels of (H, W) bools or integers, and their names.

    Labels are integers (H, W), 0 outside; `void` is none where it is the highest of several values.
    """
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise ValueError(
            f"expected a label map of integers (H, W), got {values.dtype} {values.shape}"
        )
    if values.size and values.min() < 0:
        raise ValueError(f"expected labels of 0 or more, got {values.min()}")

    found = [label for label in np.unique(values).tolist() if label]
    if len(found) > 1 and found[-1] == void:
        values, found = np.where(values == void, 0, values), found[:-1]
    return values, {int(label): str(int(label)) for label in found}


def labels_of_colors(
    colors: np.ndarray, outside: np.ndarray, void: int | None
) -> tuple[np.ndarray, dict[int, str]]:
    """Returns labels as `labels_of_values` does, but of (H, W, 3) colors.

    Each color but black, and but VOC's void unless `void` is None, is a label; `outside` marks the
    pixels that have none.
    """
    codes = np.where(outside, 0, colors @ COLOR_CODE)
    found = [code for code in np.unique(codes).tolist() if code]
    void_code = int(VOID_COLOR @ COLOR_CODE)
    if void is not None and len(found) > 1 and void_code in found:
        codes = np.where(codes == void_code, 0, codes)
        found.remove(void_code)
    return codes, {code: f"#{code:06x}" for code in found}


# COCO's run lengths: runs outside and inside by turns, column by column.

MAX_DIGITS = 7  # of a compressed run length, 5 bits each


def _decode_runs(data: bytes) -> np.ndarray:
    """Reads compressed counts: 5 bits a character, lowest first, in two's complement.

    From the fourth run on a value is the difference from the run two positions earlier.
    """
    if not data:
        return np.zeros(0, np.int64)

    # A number's digits are all marked but the last.
    digits = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    last = (digits & 32) == 0  # of its number
    ends = np.flatnonzero(last)
    starts = np.append(0, ends + 1)
    places = np.arange(len(digits)) - np.repeat(starts, np.diff(starts, append=len(digits)))

    wrong = (digits < 0) | (digits > 63) | (places >= MAX_DIGITS)
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"expected COCO RLE counts, got {chr(data[at])!r} at {at} in them")
    if not last[-1]:
        raise ValueError(f"expected COCO RLE counts, got them cut off after {len(data)} characters")

    # Add the digits up, extend the sign, and undo the differences.
    runs = np.add.reduceat((digits & 31) << (5 * places), starts[:-1])
    negative = (digits[ends] & 16) > 0
    runs -= negative.astype(np.int64) << (5 * (places[ends] + 1))
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


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


def encode_rle(mask: np.ndarray) -> dict:
    """Encodes an array (H, W), non-zero inside, as COCO's compressed run lengths, for JSON."""
    flat = np.asarray(mask).astype(bool).flatten(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    runs = np.diff(changes, prepend=0, append=flat.size)

    # From the fourth run on, the difference from the run two positions earlier.
    numbers = runs.copy()
    numbers[3:] -= runs[1:-2]

    # Digits of all numbers at once, the lowest first.
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


# Boxes and polygons.

MAX_DISTANCE = 2**20  # pixels from the corner
UPSAMPLING = 5  # COCO walks along a polygon on a grid five times finer than the pixels
MAX_CROSSINGS = 1 << 20  # filled at a time, to bound the memory


def fill_box(box, size: tuple[int, int]) -> np.ndarray:
    """Fills a box [x0, y0, x1, y1], half-open and rounded to pixels, a pixel at least.

    Raises ValueError for a box without an area or outside the image.
    """
    left, top, right, bottom = _numbers("box [x0, y0, x1, y1]", box, 4)
    if not (left < right and top < bottom):
        raise ValueError(f"expected a box with x0 < x1 and y0 < y1, got {list(box)}")
    if max(right, bottom) <= 1 and any(side != int(side) for side in (left, top, right, bottom)):
        raise ValueError(f"expected a box in pixels, got shares of the sides: {list(box)}")

    mask = np.zeros(size[::-1], dtype=bool)
    rows = slice(max(0, round(top)), max(0, round(bottom), round(top) + 1))
    columns = slice(max(0, round(left)), max(0, round(right), round(left) + 1))
    mask[rows, columns] = True
    if not mask.any():
        raise ValueError(f"expected a box inside the {size[0]}x{size[1]} image, got {list(box)}")
    return mask


def _points(polygon) -> np.ndarray:
    """Checks a polygon and returns its points, (N, 2)."""
    if not isinstance(polygon, (list, tuple)) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(
            "expected a polygon as [x0, y0, x1, y1, x2, y2, ...], three points or more,"
            f" got {describe(polygon)}"
        )
    points = np.array(_numbers("polygon", polygon, len(polygon)), dtype=np.float64).reshape(-1, 2)
    if np.abs(points).max() > MAX_DISTANCE:
        raise ValueError(f"expected polygon points near the image, got {describe(polygon)}")
    return points


def _groups(counts: np.ndarray) -> list[np.ndarray]:
    """Divides the edges with crossings into groups of about `MAX_CROSSINGS` crossings."""
    edges = np.flatnonzero(counts)
    group = np.cumsum(counts[edges]) // MAX_CROSSINGS
    return np.split(edges, np.flatnonzero(np.diff(group)) + 1) if len(edges) else []


def _flat_rows(x, y, dx, dy, column) -> np.ndarray:
    """Finds the upper of the rows before and after the step between two columns."""
    slope, step = dy / dx, column - x
    return np.minimum(np.trunc(y + slope * step + 0.5), np.trunc(y + slope * (step + 1) + 0.5))


def _steep_rows(x, y, dx, dy, column) -> np.ndarray:
    """Finds the row before the first step t that is beyond the middle between the columns.

    The estimate of t may be one off where the rounding is close, so its neighbors are tried.
    """
    slope = dx / dy
    estimate = np.floor((column + 0.5 - x) / slope)
    first = estimate
    for t in (estimate + 2, estimate + 1, estimate, estimate - 1):  # the smallest last
        right = np.trunc(x + slope * t + 0.5) > column
        first = np.where(right == (slope > 0), t, first)
    return y + first - 1


def _crossing_rows(start: np.ndarray, end: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Finds the fine row, the upper of two, where an edge steps from `column` to the next one.

    `start` and `end` are (N, 2) in fine pixels. Along its longer axis an edge goes in whole
    steps from its smaller end; the other coordinate is rounded half up, both as in COCO.
    """
    width, height = np.abs(end - start).T
    flat = width >= height

    # Walk from the smaller end.
    swapped = np.where(flat, start[:, 0] > end[:, 0], start[:, 1] > end[:, 1])[:, None]
    x, y = np.where(swapped, end, start).T
    dx, dy = np.where(swapped, start - end, end - start).T

    rows = np.empty(len(column))
    rows[flat] = _flat_rows(*(values[flat] for values in (x, y, dx, dy, column)))
    rows[~flat] = _steep_rows(*(values[~flat] for values in (x, y, dx, dy, column)))
    return rows


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
    min_y, max_y = points[:, 1].min(), points[:, 1].max()
    top, bottom = (int(np.clip(y, 0, height)) for y in (min_y - 2, max_y + 3))
    left, right = first[counts > 0].min(), last[counts > 0].max() + 1

    # Each crossing turns what is below it from outside to inside, or back.
    toggles = np.zeros((right - left) * (bottom - top) + 1, dtype=bool)
    for edges in _groups(counts):
        numbers = counts[edges]
        each = np.repeat(edges, numbers)
        before = np.cumsum(numbers) - numbers  # crossings of the edges before each
        column = first[each] + np.arange(len(each)) - np.repeat(before, numbers)
        row = _crossing_rows(starts[each], ends[each], UPSAMPLING * column + 2)
        row = np.ceil(np.clip((row + 0.5) / UPSAMPLING - 0.5, 0, height)).astype(np.int64)
        places = (column - left) * (bottom - top) + row - top
        toggles ^= np.bincount(places, minlength=len(toggles)) % 2 == 1

    inside = np.logical_xor.accumulate(toggles)[:-1]
    mask[top:bottom, left:right] |= inside.reshape(right - left, bottom - top).T


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
