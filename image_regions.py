"""What the pixels of a mask mean: one region, or the labels of a label map. Arrays alone.

A mask is its non-zero pixels, soft edges included, which only holds where there is one region and
the soft pixels are an edge. Whatever else has several values is refused, for it has to be told
which of them are meant.
"""

import numpy as np

HALF = 0.5  # above it a pixel of a float mask belongs to the region
VOID = 255  # "no label" in VOC, Cityscapes and their kind
COLOR_CODE = np.array([1 << 16, 1 << 8, 1])  # times a color: 0xrrggbb
VOID_COLOR = np.array([224, 224, 192])  # VOC's for it
MIN_TOP = 128  # a soft edge leads up to a high value; labels are small ones
MAX_FILLED = 0.5  # share of an edge's pixels that may lie in an area of one value
MIN_MIDDLE = 0.1  # share of an edge's pixels that are neither dark nor bright
SHOWN = 8  # values that an error names

ADVICE = (
    "If it is a label map, give each label as a mask of its own (`split_label_map` in Python,"
    " --label-maps on the command line); if it holds probabilities or was compressed with loss,"
    " give the pixels above a threshold, say `mask > 127`"
)


def region_of_values(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the region, bool (H, W), of an array of bools, integers or floats in [0, 1].

    The array is (H, W), or has one channel, first or last. Of floats the region is where they
    exceed 0.5 (0 and one other value, whatever it is, from 1 on), of others where they are not
    zero.
    """
    height, width = size[::-1]
    if values.shape in ((1, height, width), (height, width, 1)):
        values = values.reshape(height, width)
    elif values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"expected a mask array of shape (H, W), got {values.shape}")
    if values.dtype.kind not in "buif":
        raise ValueError(f"expected a bool, integer or float mask, got {values.dtype}")
    if values.dtype.kind == "b":
        return values
    if not values.min() >= 0:  # NaN fails this too
        raise ValueError(
            f"expected mask values of 0 or more, got a minimum of {values.min()}: for logits give"
            " `logits > 0`"
        )
    return _above_half(values) if values.dtype.kind == "f" else _one_region(values)


def _above_half(values: np.ndarray) -> np.ndarray:
    top = values.max()
    if 1 < top < np.inf and ((values == 0) | (values == top)).all():
        return values > 0  # nothing soft: 0 and 255, say
    if top > 1:
        raise ValueError(
            f"expected a float mask with values in [0, 1], got a maximum of {top}: give the pixels"
            " above a threshold, say `mask > 127`"
        )
    if not top > HALF and top > 0:
        raise ValueError(
            f"expected a float mask with values above {HALF}, which are its region, got a maximum"
            f" of {top}: for another threshold give `mask > threshold`"
        )
    return values > HALF


def _one_region(levels: np.ndarray) -> np.ndarray:
    """The non-zero pixels, where those below the highest value are a soft edge.

    An edge leads from 0 to a high value by way of the middle, and no value of it fills an area.
    Labels fill areas, a sigmoid is never 0, and what a lossy format adds lies close to 0 and to
    the highest value.
    """
    region, top = levels > 0, int(levels.max())
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


def _filled(levels: np.ndarray) -> np.ndarray:
    """Marks the pixels of all 2x2 squares of one value."""
    equal = (levels[1:] == levels[:-1])[:, 1:] & (levels[:, 1:] == levels[:, :-1])[1:]
    equal &= (levels[:, 1:] == levels[:, :-1])[:-1]
    filled = np.zeros(levels.shape, dtype=bool)
    for rows in (slice(None, -1), slice(1, None)):
        for columns in (slice(None, -1), slice(1, None)):
            filled[rows, columns] |= equal
    return filled


def _several(what: str) -> str:
    return (
        "expected a mask of one region: zero, black or transparent outside, one value or color"
        f" inside, with soft edges at most; got the {what}. {ADVICE}"
    )


def _listed(values: list) -> str:
    shown = ", ".join(map(str, values[:SHOWN]))
    return shown if len(values) <= SHOWN else f"{shown}... ({len(values)} of them)"


def levels_of_colors(colors: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """Returns how much of a mask's one color each pixel has, integers (H, W), 0 outside.

    Args:
        colors: uint8 (H, W, 3); black is outside, and the rest has one hue.
        alpha: uint8 (H, W), 0 outside, or None. Where it hides what is around a photograph's
            object, so that no color fills an area, it is the mask alone.

    Raises ValueError for several colors.
    """
    levels = colors.max(-1)
    if alpha is not None:
        levels = -(-levels.astype(np.int32) * alpha // 255)  # not 0 where neither is
    red, green, blue = np.moveaxis(colors, -1, 0)
    if ((red == green) & (green == blue)).all():
        return levels

    inside = colors[levels > 0].astype(np.int32)
    brightest = inside[inside.max(-1).argmax()]
    expected = inside.max(-1, keepdims=True) * brightest / brightest.max()
    if np.abs(inside - expected).max() <= 2:  # rounded, twice
        return levels

    codes = colors @ COLOR_CODE
    opaque = np.ones(levels.shape, bool) if alpha is None else alpha > 0
    if not opaque.all() and np.count_nonzero(_filled(codes) & opaque) <= MAX_FILLED * opaque.sum():
        return opaque.astype(np.uint8)
    found = np.unique(codes[levels > 0]).tolist()
    raise ValueError(_several(f"colors {_listed([f'#{code:06x}' for code in found])}"))


def labels_of_values(values: np.ndarray, void: int | None) -> tuple[np.ndarray, dict[int, str]]:
    """Returns integers (H, W), 0 outside, and the labels' names: of (H, W) bools or integers.

    `void` is no label where it is the highest value of several.
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
    """The same of (H, W, 3) colors: each but black, and but VOC's void, is a label."""
    codes = np.where(outside, 0, colors @ COLOR_CODE)
    found = [code for code in np.unique(codes).tolist() if code]
    void_code = int(VOID_COLOR @ COLOR_CODE)
    if void is not None and len(found) > 1 and void_code in found:
        codes = np.where(codes == void_code, 0, codes)
        found.remove(void_code)
    return codes, {code: f"#{code:06x}" for code in found}
