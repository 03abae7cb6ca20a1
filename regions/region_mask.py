"""Holds one region of an image, as segmenters and `load_regions` give it."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class RegionMask:
    """Names one region of an image.

    It stands wherever a region mask may stand: NumPy and `load_mask` read it as its mask.

    Attributes:
        mask: bool (H, W), true inside the region.
        label: what its source calls it, None where it says nothing.
        score: how sure its source is, usually in [0, 1]; None where it says nothing.
        origin: where it comes from, for messages: a file's entry, or a segmenter's prompt.
    """

    mask: np.ndarray = field(repr=False)
    label: str | None = None
    score: float | None = None
    origin: str | None = None

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Returns the mask, for `numpy.asarray`."""
        return np.array(self.mask, dtype=dtype, copy=True if copy is None else copy)

    @property
    def area(self) -> int:
        """Counts the region's pixels."""
        return int(np.count_nonzero(self.mask))

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Returns the region's bounding box (x0, y0, x1, y1) in pixels, half-open."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
