"""Cuts out what an image judge is shown of a region: the image and the mask around it."""

import numpy as np
from PIL import Image

from ..common.crops import crop_window
from ..image_processing_perceptiondlm import load_image, load_mask
from .benchmarks import RegionSample


def region_crops(sample: RegionSample) -> tuple[Image.Image, Image.Image]:
    """Crops a region's image (RGB) and its mask (8-bit, 255 inside) to its `crop_window`.

    Raises ValueError for an image of another size than the annotations say.
    """
    image = load_image(sample.image_path)
    if image.size != sample.size[::-1]:
        raise ValueError(
            f"{sample.image_path}: expected the annotated {sample.size[1]}x{sample.size[0]} pixels"
            f" (width x height), got {image.size[0]}x{image.size[1]}"
        )
    mask = np.asarray(load_mask(sample.mask, image.size)) > 0
    window = crop_window(mask)
    return image.crop(window), Image.fromarray(mask.astype(np.uint8) * 255).crop(window)
