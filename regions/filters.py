"""Filters region candidates: by area, by stability and by overlap, for every segmenter."""

import numpy as np

AREAS = 0.001, 0.95  # shares of the image, of what "everything" may give
MIN_STABILITY = 0.9  # intersection over union of a mask with stricter and laxer thresholds
MAX_OVERLAP = 0.7  # intersection over union of two regions that are kept


def has_area(areas: np.ndarray, total: int, shares: tuple[float, float] = AREAS) -> np.ndarray:
    """Marks areas in pixels that are neither specks nor all of an image of `total` pixels."""
    return (areas >= shares[0] * total) & (areas <= shares[1] * total)


def stability_of(logits: np.ndarray, offset: float = 1.0) -> np.ndarray:
    """Measures how little masks (N, H, W) of logits depend on their threshold.

    Returns (N,) intersections over unions of the masks at `offset` and at minus `offset`, which
    lie within each other; 0 for one that is empty. As SAM's automatic mask generator does.
    """
    inner = (logits > offset).sum((1, 2))
    outer = (logits > -offset).sum((1, 2))
    return inner / np.maximum(outer, 1)


def without_overlaps(
    masks: np.ndarray, scores: np.ndarray, max_overlap: float = MAX_OVERLAP
) -> list[int]:
    """Suppresses the lower-scored of two masks (N, H, W) whose overlap is larger.

    Returns indices, the highest score first; equal scores keep their order.
    """
    if not len(masks):
        return []
    flat = masks.reshape(len(masks), -1).astype(np.float32)
    shared = flat @ flat.T
    areas = shared.diagonal()
    overlaps = shared / np.maximum(areas[:, None] + areas[None, :] - shared, 1)

    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable").tolist():
        if not kept or overlaps[i, kept].max() <= max_overlap:
            kept.append(i)
    return kept
