"""Finds regions by transformers' SAM, SAM 2 and SAM 3: by points, boxes, or text where they can.

Checkpoints are loaded into transformers' own classes; no code of theirs is run. Images and prompts
are scaled here, by the checkpoint's own settings: transformers' image processors of SAM 2 and 3,
and its mask generation, would need torchvision.
"""

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

from ..common.loading import default_device, local_path, usable_device
from ..image_loading import load_image
from .filters import MIN_STABILITY, has_area, stability_of, without_overlaps
from .prompts import Prompts, name_numbers, no_text_error
from .region_mask import RegionMask

# Transformers' class by the checkpoint's model_type: for points and boxes, and for text.
PROMPTED = {
    "sam": "SamModel",
    "sam_hq": "SamHQModel",
    "sam2": "Sam2Model",
    "sam2_video": "Sam2Model",
    "sam3_tracker": "Sam3TrackerModel",
    "sam3_video": "Sam3TrackerModel",
}
BY_TEXT = {"sam3": "Sam3Model", "sam3_video": "Sam3Model"}
KEYS = {
    r"^tracker_model\.(.+)": r"\1"
}  # transformers 5.24 leaves out this one of its own for SAM 3
KINDS = "SAM, SAM 2 or SAM 3"
NAMES = {"points": "point", "boxes": "box"}  # of prompts, in a region's origin
GRID = 32  # points a side, for everything
BATCH = 64  # points at a time
MIN_SCORE = 0.8  # of everything: the intersection over union that a model expects of its mask
MIN_TEXT_SCORE = 0.5  # of what a text may mean
TEXT_TOKENS = 32


class SamSegmenter:
    """Segments images by SAM weights.

    Args:
        prompted: a model that takes points and boxes, or None.
        by_text: a model that takes text, or None; `tokenizer` is its own.
        frame: how images are scaled for both.
        grid: points on each side of the grid that everything is looked for with.
        min_score, min_stability: of what everything gives.
        min_text_score: of what a text gives.
    """

    note = None

    def __init__(
        self,
        prompted,
        by_text,
        tokenizer,
        frame: "Frame",
        *,
        grid: int = GRID,
        min_score: float = MIN_SCORE,
        min_stability: float = MIN_STABILITY,
        min_text_score: float = MIN_TEXT_SCORE,
    ):
        self.prompted = prompted
        self.by_text = by_text
        self.tokenizer = tokenizer
        self.frame = frame
        self.grid = grid
        self.min_score = min_score
        self.min_stability = min_stability
        self.min_text_score = min_text_score
        self.reads_text = by_text is not None
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(cls, name: str | Path, device=None, **options) -> "SamSegmenter":
        """Loads the weights that a folder or Hub id holds; `options` as for the class.

        Raises ValueError for a checkpoint of another kind or a damaged one, FileNotFoundError for a
        path that is not there.
        """
        local_path(name)  # a path that is not there is refused
        device = default_device() if device is None else usable_device(device)
        try:
            prompted, by_text = _load_models(name, device)
            frame = Frame.from_pretrained(name)
            tokenizer = _load_tokenizer(name) if by_text is not None else None
        except Exception as error:  # a folder holds anything, and its readers raise anything
            raise ValueError(f"expected a checkpoint of {KINDS} in {name}, got: {error}") from error
        return cls(prompted, by_text, tokenizer, frame, **options)

    @torch.no_grad()
    def __call__(self, image, *, points=None, boxes=None, text=None) -> list[RegionMask]:
        """Finds the regions of prompts, else everything. Args, errors: as of `Segmenter`."""
        image = load_image(image)
        prompts = Prompts.read(image.size, points, boxes, text)
        self._check(prompts)
        view = self.frame.view(image)
        with self._lock:
            if prompts.everything:
                return self._everything(view)
            found = self._prompted(view, prompts) if prompts.points or prompts.boxes else []
            return found + [each for name in prompts.texts for each in self._named(view, name)]

    def _check(self, prompts: Prompts):
        if prompts.texts and not self.reads_text:
            raise no_text_error(prompts.texts[0])
        if self.prompted is None and (prompts.everything or prompts.points or prompts.boxes):
            raise ValueError(
                "expected text for these weights, which know no points or boxes and do not look for"
                f" everything (model_type {self.by_text.config.model_type}), got none"
            )

    # Points and boxes: a mask each, of a few the likeliest.

    def _prompted(self, view: "View", prompts: Prompts) -> list[RegionMask]:
        embeddings = self._embed(view)
        found = []
        for kind, numbers in (("points", prompts.points), ("boxes", prompts.boxes)):
            for k in range(0, len(numbers), BATCH):
                batch = numbers[k : k + BATCH]
                masks, scores = self._predict(view, embeddings, **{kind: batch})
                best = scores.argmax(1)
                for i, prompt in enumerate(batch):
                    logits, score = masks[i, best[i]], float(scores[i, best[i]])
                    found.append(_region(view, logits, score, name_numbers(NAMES[kind], prompt)))
        return found

    def _embed(self, view: "View") -> dict:
        """Returns what the vision tower says about an image, to be used with every prompt."""
        found = self.prompted.get_image_embeddings(self._on_device(view.pixels))
        if isinstance(found, tuple):  # SAM-HQ
            return {"image_embeddings": found[0], "intermediate_embeddings": found[1]}
        return {"image_embeddings": found}

    def _predict(self, view: "View", embeddings: dict, points=None, boxes=None):
        """Returns logits (N, candidates, h, w) of N prompts and their scores (N, candidates)."""
        inputs = dict(embeddings)
        if points is not None:
            places = view.scaled(points)[None, :, None]  # image, prompt, point of it, x y
            inputs["input_points"] = self._on_device(places)
            inputs["input_labels"] = torch.ones(
                places.shape[:3], device=self.prompted.device
            ).long()
        else:
            inputs["input_boxes"] = self._on_device(view.scaled(boxes)[None])

        # A box leaves no doubt about the scale of what is meant: one candidate is enough.
        output = self.prompted(**inputs, multimask_output=points is not None)
        masks, scores = output.pred_masks[0], output.iou_scores[0]
        return masks.float().cpu(), scores.float().cpu().numpy()

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.prompted.device, self.prompted.dtype)

    # Everything: a grid of points, and filters.

    def _everything(self, view: "View") -> list[RegionMask]:
        embeddings = self._embed(view)
        logits, scores = [], []
        for k in range(0, self.grid**2, BATCH):
            batch = _grid_points(self.grid, view.size)[k : k + BATCH]
            masks, expected = self._predict(view, embeddings, points=batch)
            masks, expected = masks.flatten(0, 1), expected.ravel()
            kept = self._usable(view.cropped(masks.numpy()), expected)
            logits.append(masks[kept])
            scores.append(expected[kept])

        logits, scores = torch.cat(logits), np.concatenate(scores)
        kept = without_overlaps(view.cropped(logits > 0).numpy(), scores)
        numbered = enumerate(kept, 1)
        return [_region(view, logits[i], float(scores[i]), f"region {k}") for k, i in numbered]

    def _usable(self, masks: np.ndarray, scores: np.ndarray) -> np.ndarray:
        has_size = has_area((masks > 0).sum((1, 2)), masks[0].size)
        is_stable = stability_of(masks) >= self.min_stability
        return has_size & is_stable & (scores >= self.min_score)

    # Text: all that it fits.

    def _named(self, view: "View", name: str) -> list[RegionMask]:
        device, dtype = self.by_text.device, self.by_text.dtype
        words = self.tokenizer(
            name, return_tensors="pt", padding="max_length", max_length=TEXT_TOKENS
        )
        if (count := words["input_ids"].shape[1]) > TEXT_TOKENS:
            raise ValueError(
                f"expected text of at most {TEXT_TOKENS} tokens, got {count}: {name!r:.80}"
            )

        output = self.by_text(
            pixel_values=view.pixels.to(device, dtype),
            input_ids=words["input_ids"].to(device),
            attention_mask=words["attention_mask"].to(device),
        )
        # The probability that a query fits, times that of the name being in the image at all.
        scores = (
            (output.pred_logits[0].sigmoid() * output.presence_logits[0].sigmoid()).float().cpu()
        )

        found = []
        for i in scores.argsort(descending=True).tolist():
            if scores[i] > self.min_text_score:
                logits = output.pred_masks[0, i].float().cpu()
                region = _region(view, logits, float(scores[i]), f"text {name!r}", label=name)
                found += [region] if region.mask.any() else []
        return found


def _region(view: "View", logits: torch.Tensor, score: float, origin: str, label=None):
    return RegionMask(view.mask(logits), label=label, score=round(score, 4), origin=origin)


def _grid_points(count: int, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Returns the middles of count x count cells of an image (width, height)."""
    middles = (np.arange(count) + 0.5) / count
    return [(x * size[0], y * size[1]) for y in middles for x in middles]


# Loading.


def _load_models(name: str | Path, device: torch.device) -> tuple:
    """Returns the models for points and boxes, and for text; None for what the weights lack."""
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    if kind not in PROMPTED and kind not in BY_TEXT:
        raise ValueError(f"model_type {kind!r}")
    classes = PROMPTED.get(kind), BY_TEXT.get(kind)
    return tuple(each and _load_model(each, name).to(device).eval() for each in classes)


def _load_model(class_name: str, name: str | Path):
    """Loads weights into one of transformers' classes; ValueError where some are not there."""
    import transformers

    found = getattr(transformers, class_name, None)
    if found is None:
        raise ValueError(f"weights for {class_name}, which this transformers does not have")
    model, report = found.from_pretrained(name, key_mapping=KEYS, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):  # they would be random
        raise ValueError(f"{len(missing)} weights missing of {class_name}, such as {missing[0]}")
    return model


def _load_tokenizer(name: str | Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


# Frames: the size and values of pixels that weights expect.


@dataclass(frozen=True)
class Frame:
    """Scales images for a model.

    Attributes:
        size: (width, height) that every image is scaled to; or, with `keeps_shape`, that it is
            scaled to fit in and padded to at the right and bottom, as the first SAM wants it.
        mean, std: of the channels, of values in [0, 1].
        keeps_shape: whether images keep their shape.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    keeps_shape: bool = False

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "Frame":
        """Reads a frame from the settings of a checkpoint's image processor."""
        from transformers.image_processing_utils import BaseImageProcessor

        settings, _ = BaseImageProcessor.get_image_processor_dict(name)
        size, colors = settings["size"], (settings["image_mean"], settings["image_std"])
        if "longest_edge" in size:
            return cls((size["longest_edge"],) * 2, *map(tuple, colors), keeps_shape=True)
        return cls((size["width"], size["height"]), *map(tuple, colors))

    def view(self, image: Image.Image) -> "View":
        """Scales an RGB image."""
        shown = self.size
        if self.keeps_shape:
            scale = max(self.size) / max(image.size)
            shown = tuple(max(1, int(side * scale + 0.5)) for side in image.size)
        resized = np.asarray(image.resize(shown, Image.Resampling.BILINEAR), dtype=np.float32)
        values = (torch.from_numpy(resized) / 255 - torch.tensor(self.mean)) / torch.tensor(
            self.std
        )

        pixels = values.permute(2, 0, 1)[None]  # (1, 3, H, W)
        padding = (0, self.size[0] - shown[0], 0, self.size[1] - shown[1])
        return View(image.size, shown, self.size, pad(pixels, padding))


@dataclass(frozen=True)
class View:
    """An image in a model's frame.

    Attributes:
        size: (width, height) of the image.
        shown: of the part of the frame that it takes up, at the left and top.
        frame: of the frame.
        pixels: float (1, 3, H, W), what the model gets.
    """

    size: tuple[int, int]
    shown: tuple[int, int]
    frame: tuple[int, int]
    pixels: torch.Tensor

    def scaled(self, places) -> torch.Tensor:
        """Brings points (N, 2) or boxes (N, 4) from the image's pixels to the frame's."""
        scale = [self.shown[0] / self.size[0], self.shown[1] / self.size[1]]
        places = torch.tensor(places, dtype=torch.float32)
        return places * torch.tensor(scale * (places.shape[1] // 2))

    def cropped(self, values):
        """Returns the part of logits (..., h, w) that shows the image, to a pixel of theirs."""
        height, width = values.shape[-2:]
        rows = max(1, round(height * self.shown[1] / self.frame[1]))
        columns = max(1, round(width * self.shown[0] / self.frame[0]))
        return values[..., :rows, :columns]

    def mask(self, logits: torch.Tensor) -> np.ndarray:
        """Returns where logits (h, w) of the frame are positive, bool (H, W) of the image."""
        logits = logits[None, None]
        if self.shown != self.frame:  # the image ends between two of the logits
            logits = interpolate(logits, self.frame[::-1], mode="bilinear")
            logits = logits[..., : self.shown[1], : self.shown[0]]
        return (interpolate(logits, self.size[::-1], mode="bilinear")[0, 0] > 0).numpy()
