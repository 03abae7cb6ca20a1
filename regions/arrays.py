"""Reads regions from arrays: stacks of masks with scores, boxes, a polygon, a map of labels.

Nothing is guessed: an array that could be two of them, or whose values are no mask's, raises
ValueError with what to give instead.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .label_maps import split_labels
from .region_source import RegionSource, expect_count


def is_array(value) -> bool:
    """Tells whether a value is an array or tensor."""
    return isinstance(value, (np.ndarray, torch.Tensor))


def to_array(value) -> np.ndarray:
    """Returns an array or tensor, on any device and of any type, as NumPy's."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    return np.asarray(value)


def regions_of_array(
    value,
    size: tuple[int, int],
    *,
    threshold: float = 0.5,
    label_map: bool | None = None,
    scores=None,
    labels: Sequence[str | None] | None = None,
    name: str = "array",
) -> list[RegionSource]:
    """Returns the regions of an array.

    It is (N, H, W) or (N, 1, H, W): a mask for each region; (H, W): one mask, or, of integers
    beyond bytes of several values, a label map; (N, 4): boxes x0, y0, x1, y1 in pixels; (N, 2): one
    polygon in pixels. Bools are masks whatever their shape.

    Args:
        value: the array or tensor.
        size: (width, height) of the image.
        threshold: above which a pixel of a float mask is inside.
        label_map: whether (H, W) are labels; None leaves it to the values' type.
        scores, labels: one for each region, or None.
        name: what to call it in messages.

    Raises ValueError for other shapes, floats that are no probabilities, and what could be two of
    these.
    """
    array = to_array(value)
    if array.dtype.kind not in "buif":
        raise ValueError(f"expected bools, integers or floats in {name}, got {array.dtype}")
    if array.ndim == 2 and _is_label_map(array, label_map):
        found = split_labels(array, name)
    else:
        masks = _masks(array, size, threshold, name)
        found = [RegionSource(mask, f"{name} {k}") for k, mask in enumerate(masks)]
    return _described(found, scores, labels, name)


def _masks(array: np.ndarray, size: tuple[int, int], threshold: float, name: str) -> list:
    """Returns one mask, as `load_mask` takes it, for each region."""
    width, height = size
    is_mask_of_image = array.shape == (height, width)
    if array.ndim == 2 and array.dtype.kind != "b" and array.shape[1] in (2, 4):
        if is_mask_of_image:
            raise ValueError(
                f"expected either a mask or boxes or a polygon as {name}, got {array.shape}, which"
                f" for an image of {width}x{height} may be each: give a mask as bools, boxes as"
                ' [{"box": [x0, y0, x1, y1]}], a polygon as [{"polygons": [[x0, y0, ...]]}]'
            )
        expect_count(len(array) if array.shape[1] == 4 else 1, size, name)
        if array.shape[1] == 4:
            return [{"box": box} for box in array.tolist()]
        return [{"polygons": [array.ravel().tolist()]}]

    stack = _stack(array, size, name)
    expect_count(len(stack), size, name)
    return list(_above(stack, threshold, name) if stack.dtype.kind == "f" else stack)


def _stack(array: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """Returns masks (N, H, W)."""
    width, height = size

    # Drop an axis that holds one thing.
    if array.ndim == 2:
        return array[None]
    if array.shape == (height, width, 1):
        return array[None, ..., 0]
    if array.ndim == 4 and array.shape[1] == 1:
        return array[:, 0]

    # A shape that can also be masks along the last axis gets a hint instead.
    hint = ""
    if array.ndim == 3:
        if array.shape[:2] != (height, width) or array.shape[1:] == (height, width):
            return array
        hint = ": for masks along the last axis give `np.moveaxis(masks, -1, 0)`"
    if array.ndim == 4:
        hint = ": of several masks for each prompt, as SAM gives them, take one, say `masks[:, 0]`"

    raise ValueError(
        f"expected {name} as masks (N, H, W) of {width}x{height} pixels (N, {height}, {width}), a"
        f" mask (H, W), boxes (N, 4) or a polygon (N, 2), got {array.shape}{hint}"
    )


def _above(masks: np.ndarray, threshold: float, name: str) -> np.ndarray:
    """Returns the pixels of float masks that are above the threshold."""
    if not masks.size:
        return masks > threshold
    low, high = masks.min(), masks.max()
    if 1 < high < np.inf and ((masks == 0) | (masks == high)).all():
        return masks > 0  # nothing soft: 0 and 255, say
    if not (low >= 0 and high <= 1):  # NaN fails this too
        raise ValueError(
            f"expected float masks in [0, 1] as {name}, got values from {low:g} to {high:g}: for"
            " logits give `masks > 0` or their sigmoid"
        )
    return masks > threshold


def _is_label_map(array: np.ndarray, label_map: bool | None) -> bool:
    """Tells whether (H, W) are labels: bytes may be a mask's soft edges, wider integers are not."""
    if label_map is not None:
        return label_map
    if array.dtype.kind not in "ui" or array.itemsize == 1 or array.shape[1] in (2, 4):
        return False
    return len(np.unique(array)) > 2


def _described(found: list[RegionSource], scores, labels, name: str) -> list[RegionSource]:
    """Gives each region its score and label."""
    scores = _each(scores, len(found), "scores", name)
    labels = _each(labels, len(found), "labels", name)
    return [
        RegionSource(
            region.mask,
            region.origin,
            label=region.label if label is None else str(label),
            score=None if score is None else float(score),
        )
        for region, score, label in zip(found, scores, labels, strict=True)
    ]


def _each(values, count: int, what: str, name: str) -> list:
    """Returns one value for each region, Nones where none are given."""
    if values is None:
        return [None] * count
    listed = to_array(values).ravel().tolist() if is_array(values) else list(values)
    if len(listed) != count:
        raise ValueError(
            f"expected {what} for each of {count} regions of {name}, got {len(listed)}"
        )
    return listed
