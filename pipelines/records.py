"""Holds what goes through the stages: an image with its regions, kept and dropped.

No stage makes or loses a region: it fills in fields, or moves a region from `regions` to `dropped`
with the stage, the rule and the reason. So len(regions) + len(dropped) stays what it was.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..image_loading import load_image
from ..image_masks import decode_rle


@dataclass
class Region:
    """Holds one region of an image.

    Attributes:
        key: its name, of which an image has no two.
        mask: COCO RLE of the region mask, `size` [height, width] and `counts` as text.
        category: what the annotation calls it, None where it says nothing.
        stability: how little the mask depended on its threshold, as SA-1B gives it.
        predicted_iou: how good the segmenter believed its mask to be, as SA-1B gives it.
        caption: what a captioner said.
        score: how sure the captioner was (mean log-probability of the tokens), where it says so.
        core: the core category of the caption.
        mask_iou: of the mask with the one that a segmenter predicted from the core category.
    """

    key: str
    mask: dict = field(repr=False)
    category: str | None = None
    stability: float | None = None
    predicted_iou: float | None = None
    caption: str | None = None
    score: float | None = None
    core: str | None = None
    mask_iou: float | None = None


@dataclass
class Dropped:
    """Holds a region that was dropped, and why.

    Attributes:
        region: as it was then; its mask is None where it could not be read.
        stage, rule: which stage dropped it, and by which of its rules.
        reason: what was expected and what came.
    """

    region: Region
    stage: str
    rule: str
    reason: str


@dataclass
class Record:
    """Holds an image and its regions.

    Attributes:
        key: its name, of which a run has no two.
        image: path of the image file, or the file's bytes.
        name: path of the image below the source's folder, for the output.
        size: [width, height] in pixels.
        regions: those that are kept so far, in the order of the source.
        dropped: the others.
        source: where it comes from: file, entry, license, whatever the source says.
    """

    key: str
    image: str | bytes
    name: str
    size: list[int]
    regions: list[Region] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    source: dict = field(default_factory=dict)

    def drop(self, stage: str, rule: str, reasons: dict[str, str]):
        """Moves regions, by their keys, to those that were dropped, each with its reason."""
        gone = [region for region in self.regions if region.key in reasons]
        self.regions = [region for region in self.regions if region.key not in reasons]
        self.dropped += [Dropped(region, stage, rule, reasons[region.key]) for region in gone]

    def to_dict(self) -> dict:
        """Returns plain values, for a scheduler's rows."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Record":
        """Reads what `to_dict` returned; TypeError for fields that there are none of."""
        regions = [Region(**region) for region in values["regions"]]
        dropped = [
            Dropped(**{**entry, "region": Region(**entry["region"])}) for entry in values["dropped"]
        ]
        return cls(**{**values, "regions": regions, "dropped": dropped})


class Stage:
    """Changes a batch of records in place, and returns them.

    A stage is pickled with its options alone: what it loads at first use (a `cached_property`)
    stays where it is, and is loaded again where the copy runs.
    """

    name: str

    def __call__(self, records: list[Record]) -> list[Record]:
        raise NotImplementedError

    def __getstate__(self) -> dict:
        return without_loaded(self)


def without_loaded(stage) -> dict:
    """Returns an object's attributes but for what a `cached_property` has computed."""
    cached = {
        name
        for cls in type(stage).__mro__
        for name, value in vars(cls).items()
        if isinstance(value, cached_property)
    }
    return {name: value for name, value in vars(stage).items() if name not in cached}


Opened = tuple[Record, object]  # and its image (PIL, RGB)


def open_images(records: Iterable[Record], stage: str) -> list[Opened]:
    """Opens the images of the records that have regions left.

    Where an image cannot be read, or has another size than its annotations say, all its regions are
    dropped by the rule "image".
    """
    opened = []
    for record in records:
        if not record.regions:
            continue
        try:
            image = load_image(record.image)
            if list(image.size) != list(record.size):
                expected, got = ("x".join(map(str, size)) for size in (record.size, image.size))
                raise ValueError(f"expected an image of {expected} pixels as annotated, got {got}")
        except (ValueError, OSError) as error:
            drop_all(record, stage, "image", str(error))
        else:
            opened.append((record, image))
    return opened


def drop_all(record: Record, stage: str, rule: str, reason: str):
    """Drops all regions of a record for one reason."""
    record.drop(stage, rule, {region.key: reason for region in record.regions})


def mask_of(region: Region) -> np.ndarray:
    """Returns a region's mask, bool (H, W)."""
    height, width = region.mask["size"]
    return decode_rle(region.mask, (width, height))


def drop_where(
    record: Record, stage: str, rule: str, reason_of: Callable[[Region], str | None]
) -> None:
    """Drops the regions for which `reason_of` gives a reason."""
    reasons = {region.key: reason_of(region) for region in record.regions}
    record.drop(stage, rule, {key: reason for key, reason in reasons.items() if reason is not None})
