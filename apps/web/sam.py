"""Makes region masks of clicks, by SAM where its weights are on this machine: none are fetched."""

import threading

import numpy as np
import torch
from PIL import Image

from ...common.loading import local_path

DEFAULT = "facebook/sam-vit-base"


class ClickMasks:
    """A SAM model that outlines what lies under a point."""

    def __init__(self, model, processor):
        self.model = model
        self.processor = processor
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, image: Image.Image, x: int, y: int) -> Image.Image:
        """Returns the likeliest mask (8-bit, 255 inside) at a point in pixels; it may be empty."""
        inputs = self.processor(image, input_points=[[[x, y]]], return_tensors="pt")
        with self._lock:
            output = self.model(**inputs.to(self.model.device))
        masks = self.processor.image_processor.post_process_masks(
            output.pred_masks.cpu(),
            inputs["original_sizes"].cpu(),
            inputs["reshaped_input_sizes"].cpu(),
        )[0][0]  # (candidates, H, W)
        best = int(output.iou_scores[0, 0].argmax())
        return Image.fromarray(masks[best].numpy().astype(np.uint8) * 255)


def find_sam(name: str | None = None) -> ClickMasks | None:
    """Loads SAM from a folder or the local cache; None where the default is not there.

    Raises OSError where a `name` was given and is not there.
    """
    from transformers import SamModel, SamProcessor

    if name is not None:
        local_path(name)  # a path that is not there is refused

    try:
        model = SamModel.from_pretrained(name or DEFAULT, local_files_only=True).eval()
        processor = SamProcessor.from_pretrained(name or DEFAULT, local_files_only=True)
    except Exception as error:  # a folder holds anything, and its readers raise anything
        if name is not None:
            raise OSError(f"expected a SAM checkpoint in {name}, got: {error}") from error
        return None
    return ClickMasks(model, processor)
