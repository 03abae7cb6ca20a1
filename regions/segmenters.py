"""Finds an image's regions by a segmenter: by points, boxes or text, or all that there are.

regions = load_segmenter()(image, points=[(120, 80)])                    # offline, without weights
regions = load_segmenter("facebook/sam3")(image, text="mug")             # transformers' SAMs
"""

from pathlib import Path
from typing import Protocol

from .region_mask import RegionMask

OFFLINE = "offline"


class Segmenter(Protocol):
    """Finds regions in an image.

    Attributes:
        note: what a user should know about its regions, in a line; None: nothing.
        reads_text: whether it takes text.
    """

    note: str | None
    reads_text: bool

    def __call__(self, image, *, points=None, boxes=None, text=None) -> list[RegionMask]:
        """Finds one region for each point, then for each box, and all that a text fits.

        Args:
            image: as for `load_image`.
            points: (x, y) in pixels, or a list of them.
            boxes: (x0, y0, x1, y1) in pixels, or a list of them.
            text: a name of things, or a list of them.

        Without any of the three, everything in the image is found. Raises ValueError for prompts
        that do not fit the image, or that the segmenter does not take.
        """
        ...


def load_segmenter(name: str | Path | None = None, device=None) -> Segmenter:
    """Loads a segmenter.

    Args:
        name: None or "offline" for the one that needs no weights; else a folder or a Hub id of
            transformers' SAM, SAM 2 or SAM 3. No code of its repository is run.
        device: of the weights (default: the accelerator, else the CPU).

    Raises ValueError for a checkpoint that is no segmenter, FileNotFoundError for a path that is
    not there, and MissingExtra where packages are.
    """
    if name is None or name == OFFLINE:
        from .offline import OfflineSegmenter

        return OfflineSegmenter()
    from .sam import SamSegmenter

    return SamSegmenter.from_pretrained(name, device=device)


def find_regions(
    image,
    segmenter: Segmenter | str | Path | None = None,
    *,
    everything: bool = False,
    points=None,
    boxes=None,
    text=None,
) -> list[RegionMask]:
    """Finds everything in an image, or what prompts ask for; at least one region.

    Args:
        image, points, boxes, text: as for a `Segmenter`.
        segmenter: one, or the name of one (see `load_segmenter`).
        everything: instead of prompts.

    Raises ValueError for both or neither, where nothing is found, and as the segmenter does.
    """
    prompts = {"points": points, "boxes": boxes, "text": text}
    given = [name for name, value in prompts.items() if value is not None]
    if everything and given:
        raise ValueError(f"expected everything or {' and '.join(given)}, got both")
    if not everything and not given:
        raise ValueError("expected everything, points, boxes or text to find regions by, got none")

    if segmenter is None or isinstance(segmenter, (str, Path)):
        segmenter = load_segmenter(segmenter)
    regions = segmenter(image, **prompts)
    if not regions:
        wanted = "something that stands out" if everything else f"{text!r:.80}"
        raise ValueError(
            f"expected {wanted} in the image, found no region: give points, boxes or masks"
        )
    return regions
