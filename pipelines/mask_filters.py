"""Drops region masks that make poor captions: tiny, unstable, cut off, parts, occluded.

SA-1B has masks for everything at every scale: a wheel, its rim and its bolts beside the car. The
rules run in the order of `RULES`, each on what the ones before it have left; so a mask that was
dropped as unstable makes no other one its part.

| rule | drops a region when | option |
|---|---|---|
| tiny | its area is less than a share of the image, or a number of pixels | `min_area_share`, `min_pixels` |
| large | its area is more than a share of the image: background | `max_area_share` |
| unstable | SA-1B's stability score or predicted IoU is less | `min_stability`, `min_predicted_iou` |
| border | more than a share of its outline runs along the image's border | `max_border_share` |
| duplicate | its IoU with a region of better stability (then of larger area) is at least | `min_duplicate_iou` |
| part | a share of it lies inside a region, of whose area it is at most a share | `min_part_inside`, `max_part_area` |
| fragments | its largest connected piece is less than a share of it: something lies across | `min_main_piece` |
| occluded | more than a share of its convex hull is filled by regions beside it | `max_hull_covered` |
"""  # noqa: E501  (rows of a table)

from dataclasses import dataclass

import numpy as np

from ..common.extras import extra
from ..common.option_checks import expect_share
from .records import Record, Region, Stage, drop_where, mask_of

HULL_SIDE = 192  # pixels of a region's longer side, in which its hull is computed at most
BESIDE = 0.5  # a region that is less than so much inside another one is no part of it


@dataclass(frozen=True)
class MaskOptions:
    """Which region masks are dropped."""

    min_area_share: float = 0.001  # of the image's pixels
    min_pixels: int = 256
    max_area_share: float = 0.9  # of the image's pixels
    min_stability: float = 0.95  # SA-1B's own threshold; regions without a score pass
    min_predicted_iou: float = 0.88  # SA-1B's own threshold; regions without a score pass
    max_border_share: float = 0.25  # of the outline's pixels, on the image's first or last row...
    min_duplicate_iou: float = 0.9
    min_part_inside: float = 0.9  # share of the smaller region inside the larger one
    # The smaller area over the larger one: above it, two views of one thing and no part.
    max_part_area: float = 0.8
    min_main_piece: float = 0.8  # share of the region, of the largest of its connected pieces
    max_hull_covered: float = 0.15  # share of the convex hull that other regions fill

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "min_pixels":
                expect_share(f"masks.{name}", value)
        if self.min_pixels < 0:
            raise ValueError(f"expected masks.min_pixels of 0 or more, got {self.min_pixels}")
        if self.min_area_share > self.max_area_share:
            raise ValueError(
                "expected masks.min_area_share of at most masks.max_area_share, got"
                f" {self.min_area_share} and {self.max_area_share}"
            )


class MaskFilters(Stage):
    """Applies all rules to each record."""

    name = "masks"

    def __init__(self, options: MaskOptions | None = None):
        self.options = options or MaskOptions()

    def __call__(self, records: list[Record]) -> list[Record]:
        for record in records:
            for rule, filter_record in RULES.items():
                if record.regions:
                    filter_record(record, rule, self.options)
        return records


# One region by itself.


def _drop_tiny(record: Record, rule: str, options: MaskOptions):
    pixels = record.size[0] * record.size[1]
    least = max(options.min_pixels, options.min_area_share * pixels)
    _drop_areas(record, rule, lambda area: area < least, f"an area of {least:.0f} pixels or more")


def _drop_large(record: Record, rule: str, options: MaskOptions):
    most = options.max_area_share * record.size[0] * record.size[1]
    _drop_areas(record, rule, lambda area: area > most, f"an area of {most:.0f} pixels or less")


def _drop_areas(record: Record, rule: str, is_wrong, expected: str):
    areas = dict(zip((r.key for r in record.regions), areas_of(record.regions), strict=True))
    reasons = {k: f"expected {expected}, got {a}" for k, a in areas.items() if is_wrong(a)}
    record.drop(MaskFilters.name, rule, reasons)


def _drop_unstable(record: Record, rule: str, options: MaskOptions):
    least = {"stability": options.min_stability, "predicted_iou": options.min_predicted_iou}

    def reason_of(region: Region) -> str | None:
        for name, threshold in least.items():
            value = getattr(region, name)
            if value is not None and value < threshold:
                return f"expected {name} of {threshold:g} or more, got {value:.3f}"
        return None

    drop_where(record, MaskFilters.name, rule, reason_of)


def _drop_at_border(record: Record, rule: str, options: MaskOptions):
    most = options.max_border_share

    def reason_of(region: Region) -> str | None:
        share = border_share(mask_of(region))
        return (
            f"expected {most:g} of its outline at the border or less, got {share:.3f}"
            if (share > most)
            else None
        )

    drop_where(record, MaskFilters.name, rule, reason_of)


def border_share(mask: np.ndarray) -> float:
    """Returns how much of a mask's outline, in pixels, lies on the image's first or last lines.

    The outline is what has a pixel outside of the mask, or of the image, among its four neighbors.
    """
    rows, columns = box_of(mask)
    crop = mask[rows, columns]
    padded = np.pad(crop, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    outline = crop & ~inner

    at_border = np.zeros_like(crop)
    at_border[:1] |= rows.start == 0
    at_border[-1:] |= rows.stop == mask.shape[0]
    at_border[:, :1] |= columns.start == 0
    at_border[:, -1:] |= columns.stop == mask.shape[1]
    return float((outline & at_border).sum() / max(outline.sum(), 1))


def _drop_fragments(record: Record, rule: str, options: MaskOptions):
    least = options.min_main_piece

    def reason_of(region: Region) -> str | None:
        share = main_piece(mask_of(region))
        if share >= least:
            return None
        return f"expected a largest piece of {least:g} of the region or more, got {share:.3f}"

    drop_where(record, MaskFilters.name, rule, reason_of)


def main_piece(mask: np.ndarray) -> float:
    """Returns the share of a mask that its largest connected piece has; corners connect."""
    with extra("engine"):
        from skimage.measure import label

    pieces = label(mask[box_of(mask)], connectivity=2)
    return float(np.bincount(pieces.ravel())[1:].max(initial=0) / max(mask.sum(), 1))


# Regions against each other.


def areas_of(regions: list[Region]) -> list[int]:
    """Returns the regions' areas in pixels."""
    with extra("engine"):
        from pycocotools import mask as coco

    return [int(area) for area in coco.area([_bytes_rle(region) for region in regions])]


def insides(regions: list[Region]) -> np.ndarray:
    """Returns (N, N): which share of region i lies inside region j."""
    with extra("engine"):
        from pycocotools import mask as coco

    rles = [_bytes_rle(region) for region in regions]
    # against a "crowd" COCO divides the intersection by the first area alone
    return np.asarray(coco.iou(rles, rles, [1] * len(rles)))


def _bytes_rle(region: Region) -> dict:
    return {**region.mask, "counts": region.mask["counts"].encode("ascii")}


def _drop_duplicates(record: Record, rule: str, options: MaskOptions):
    areas, inside = np.asarray(areas_of(record.regions)), insides(record.regions)
    shared = inside * areas[:, None]
    ious = shared / np.maximum(areas[:, None] + areas[None, :] - shared, 1)

    # the best first: each is kept unless it is too much like one that was
    stability = [-1.0 if r.stability is None else r.stability for r in record.regions]
    kept, reasons = [], {}
    for i in sorted(range(len(areas)), key=lambda i: (-stability[i], -areas[i], i)):
        if kept and (iou := ious[i, kept].max()) >= options.min_duplicate_iou:
            other = record.regions[kept[int(ious[i, kept].argmax())]].key
            reasons[record.regions[i].key] = (
                f"expected an IoU with {other} of less than {options.min_duplicate_iou:g},"
                f" got {iou:.3f}"
            )
        else:
            kept.append(i)
    record.drop(MaskFilters.name, rule, reasons)


def _drop_parts(record: Record, rule: str, options: MaskOptions):
    areas, inside = np.asarray(areas_of(record.regions)), insides(record.regions)
    is_smaller = areas[:, None] <= options.max_part_area * areas[None, :]
    is_part = (inside >= options.min_part_inside) & is_smaller

    reasons = {}
    for i in np.flatnonzero(is_part.any(1)).tolist():
        whole = int(np.where(is_part[i], inside[i], -1).argmax())
        reasons[record.regions[i].key] = (
            f"expected less than {options.min_part_inside:g} of it inside a larger region,"
            f" got {inside[i, whole]:.3f} inside {record.regions[whole].key}"
        )
    record.drop(MaskFilters.name, rule, reasons)


def _drop_occluded(record: Record, rule: str, options: MaskOptions):
    masks, inside = [mask_of(region) for region in record.regions], insides(record.regions)
    boxes = [box_of(mask) for mask in masks]
    beside = (inside < BESIDE) & (inside.T < BESIDE)

    reasons = {}
    for i, region in enumerate(record.regions):
        near = [j for j in np.flatnonzero(beside[i]) if _meet(boxes[i], boxes[j])]
        window = thinned(boxes[i])
        share = hull_covered(masks[i][window], [masks[j][window] for j in near]) if near else 0.0
        if share > options.max_hull_covered:
            reasons[region.key] = (
                f"expected {options.max_hull_covered:g} of its convex hull in other regions or"
                f" less, got {share:.3f}"
            )
    record.drop(MaskFilters.name, rule, reasons)


def thinned(box: tuple[slice, slice]) -> tuple[slice, slice]:
    """Returns a box of which every so many pixels are taken: hulls cost their area."""
    longest = max(side.stop - side.start for side in box)
    step = -(-longest // HULL_SIDE)
    return tuple(slice(side.start, side.stop, step) for side in box)


def hull_covered(mask: np.ndarray, others: list[np.ndarray]) -> float:
    """Returns the share of a mask's convex hull that lies in other masks and not in its own."""
    with extra("engine"):
        from skimage.morphology import convex_hull_image

    if not mask.any():
        return 0.0
    hull = convex_hull_image(mask) | mask
    covered = hull & ~mask & np.logical_or.reduce(others)
    return float(covered.sum() / max(hull.sum(), 1))


def box_of(mask: np.ndarray) -> tuple[slice, slice]:
    """Returns the rows and columns of a mask's bounding box; none of an empty one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _meet(one: tuple[slice, slice], other: tuple[slice, slice]) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


RULES = {
    "tiny": _drop_tiny,
    "large": _drop_large,
    "unstable": _drop_unstable,
    "border": _drop_at_border,
    "duplicate": _drop_duplicates,
    "part": _drop_parts,
    "fragments": _drop_fragments,
    "occluded": _drop_occluded,
}
