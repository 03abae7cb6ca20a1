"""Keeps a region when what its caption names is found again where its mask is.

A text-promptable segmenter looks for the caption's core category in the whole image. If none of the
masks that it finds is like the region's own, the caption names another thing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..common.option_checks import expect_share
from .records import Record, Stage, drop_all, mask_of, open_images

# `segmenter(image, text=...)` gives a list of what has a bool `mask` (H, W) and a `score`.
Segmenter = Callable[..., list]


@dataclass(frozen=True)
class MaskCheckOptions:
    """Which segmenter predicts, and how like its mask has to be."""

    segmenter: str = ""  # folder or Hub id of a segmenter that reads text, say facebook/sam3
    device: str | None = None  # none: the accelerator, else the CPU
    min_iou: float = 0.5  # of a region's mask with the likest predicted one
    min_score: float = 0.0  # of a predicted mask, to be compared at all

    def __post_init__(self):
        if not self.segmenter:
            raise ValueError("expected mask_check.segmenter, a folder or Hub id, got none")
        expect_share("mask_check.min_iou", self.min_iou)
        expect_share("mask_check.min_score", self.min_score)


class CheckMasks(Stage):
    """Drops the regions whose core category the segmenter does not find where they are.

    Rules: "not found" without any predicted mask, "iou" below the threshold, "no category" for a
    region without one.
    """

    name = "mask_check"

    def __init__(self, options: MaskCheckOptions, segmenter: Segmenter | None = None):
        self.options = options
        self._given = segmenter

    @cached_property
    def segmenter(self) -> Segmenter:
        """Loads the segmenter, unless one was given."""
        if self._given is not None:
            return self._given
        from ..regions.segmenters import load_segmenter

        found = load_segmenter(self.options.segmenter, device=self.options.device)
        if not found.reads_text:
            raise ValueError(
                "expected a segmenter that reads text, say facebook/sam3, as mask_check.segmenter,"
                f" got {self.options.segmenter!r}"
            )
        return found

    def __call__(self, records: list[Record]) -> list[Record]:
        for record in records:
            missing = [region.key for region in record.regions if not region.core]
            reason = "expected a core category, got none"
            record.drop(self.name, "no category", dict.fromkeys(missing, reason))
        opened = open_images(records, self.name)
        segmenter = self.segmenter if opened else None  # one that cannot be loaded ends the run
        for record, image in opened:
            try:
                self._check(record, image, segmenter)
            except ValueError as error:  # a text that the segmenter does not take
                drop_all(record, self.name, "not found", str(error))
        return records

    def _check(self, record: Record, image, segmenter: Segmenter):
        cores = sorted({region.core for region in record.regions})
        found = {core: self._usable(segmenter(image, text=core)) for core in cores}

        not_found, unlike = {}, {}
        for region in record.regions:
            own = mask_of(region)
            ious = [iou(own, mask) for mask in found[region.core]]
            if not ious:
                not_found[region.key] = f"expected {region.core!r} in the image, found none"
                continue
            region.mask_iou = max(ious)
            if region.mask_iou < self.options.min_iou:
                unlike[region.key] = (
                    f"expected an IoU of {self.options.min_iou:g} or more with {region.core!r},"
                    f" got {region.mask_iou:.3f} with the likest of {len(ious)}"
                )
        record.drop(self.name, "not found", not_found)
        record.drop(self.name, "iou", unlike)

    def _usable(self, found: list) -> list[np.ndarray]:
        return [
            np.asarray(each.mask, dtype=bool)
            for each in found
            if each.score is None or each.score >= self.options.min_score
        ]


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the intersection over the union of two masks (H, W); 0 of two empty ones."""
    union = np.count_nonzero(one | other)
    return float(np.count_nonzero(one & other) / union) if union else 0.0
