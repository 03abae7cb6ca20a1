"""Reads images with their region masks, and captions batches of them: the stage that evaluation and
data sets share. What cannot be read is named, and spoils nothing else."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from ..image_loading import load_mask


@dataclass
class RegionImage:
    """Holds what could be read of an image and its region masks.

    Attributes:
        image: upright and RGB; None where it cannot be read.
        masks: by key, in the caller's order, 255 inside a region.
        errors: of the masks that cannot be read, by key.
        error: of the image.
    """

    image: Image.Image | None = None
    masks: dict[Hashable, Image.Image] = field(default_factory=dict)
    errors: dict[Hashable, Exception] = field(default_factory=dict)
    error: Exception | None = None


def read_regions(open_image: Callable[[], Image.Image], masks: Mapping) -> RegionImage:
    """Reads an image and its region masks, which `load_mask` takes, once each."""
    try:
        found = RegionImage(open_image())
    except Exception as error:  # files hold anything, and their readers raise anything
        return RegionImage(error=error)

    for key, mask in masks.items():
        try:
            found.masks[key] = load_mask(mask, found.image.size)
        except Exception as error:
            found.errors[key] = error
    return found


def caption_regions(model, processor, batch: Sequence[RegionImage], **options):
    """Captions the regions of images in one call; returns what `diffusion_generate` does."""
    return model.diffusion_generate(
        images=[one.image for one in batch],
        masks=[list(one.masks.values()) for one in batch],
        processor=processor,
        **options,
    )
