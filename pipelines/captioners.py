"""Captions regions: by our own model, by any OpenAI-compatible endpoint, or by transformers.

A captioner is a callable on a list of (image, region masks) that gives a `Caption` for each mask;
anything else that does so can be given to `CaptionRegions` in Python.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from ..common.crops import crop_window, png_data_url
from ..common.loading import default_device, load_model
from ..common.option_checks import expect_positive
from ..generation_options import DiffusionOptions
from .endpoint import Failure, drop_failures, image_part, text_part, visible_text
from .records import Record, Stage, mask_of, open_images, without_loaded

PROMPT = """\
Describe the object inside the mask in one or two sentences: what it is, its parts, colors, \
materials and state. Say only what can be seen. Do not describe what is around it, and do not \
mention the mask, the outline, the crop or the image."""
OUTLINE = (255, 0, 0)
OUTLINE_SHARE = 0.006  # of the image's longer side, on each side of the edge


@dataclass(frozen=True)
class Caption:
    """Holds what a captioner said about a region.

    Attributes:
        text: None where there is none.
        score: how sure it was.
        problem: why there is no text.
        passing: as of a `Failure`.
    """

    text: str | None
    score: float | None = None
    problem: str | None = None
    passing: bool = False


Asked = list[tuple[Image.Image, list[np.ndarray]]]  # images, RGB, with region masks, bool (H, W)


class Captioner(Protocol):
    """Captions the regions of images: for each image a caption for each mask, in order."""

    def __call__(self, asked: Asked) -> list[list[Caption]]: ...


class CaptionRegions(Stage):
    """Writes a caption to each region.

    Rules: "no caption" for one that got none, "call failed" where a later run may get one, "image".
    """

    name = "caption"

    def __init__(self, captioner: Captioner):
        self.captioner = captioner

    def __call__(self, records: list[Record]) -> list[Record]:
        opened = open_images(records, self.name)
        asked = [(image, [mask_of(region) for region in r.regions]) for r, image in opened]
        answers = self.captioner(asked) if asked else []
        for (record, _), captions in zip(opened, answers, strict=True):
            self._fill_in(record, captions)
        return records

    def _fill_in(self, record: Record, captions: list[Caption]):
        problems: dict[str, Failure] = {}
        for region, caption in zip(record.regions, captions, strict=True):
            if caption.text is None:
                problems[region.key] = Failure(caption.problem, caption.passing)
            else:
                region.caption, region.score = caption.text.strip(), caption.score
        drop_failures(record, self.name, "no caption", problems, "expected a caption, got: ")


# Our own model.


@dataclass(frozen=True)
class ModelOptions:
    """Which of our checkpoints captions, and how."""

    checkpoint: str = ""  # folder or Hub id
    subfolder: str | None = None
    device: str | None = None  # none: the accelerator, else the CPU
    dtype: str = "auto"
    quantize: str | None = None  # int8, int4, fp8 or nf4 weights, see docs/quantization.md
    instruction: str | None = None  # none: the checkpoint's own
    decoding: dict[str, Any] = field(default_factory=dict)  # options of `diffusion_generate`

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("expected captioner.checkpoint, a folder or Hub id, got none")


def load_own(options) -> tuple:
    """Loads the model and processor of options with a checkpoint of this package.

    Stages with the same one share it.
    """
    device = options.device or default_device()
    return _load_once(
        options.checkpoint, options.subfolder, options.dtype, device, options.quantize
    )


@lru_cache(maxsize=1)
def _load_once(checkpoint: str, subfolder: str | None, dtype: str, device: str, quantize) -> tuple:
    return load_model(checkpoint, subfolder, dtype, device, quantize=quantize)


class ModelCaptioner:
    """Captions with a checkpoint of this package; all images of a call in one batch."""

    def __init__(self, options: ModelOptions):
        self.options = options

    __getstate__ = without_loaded

    @cached_property
    def _loaded(self) -> tuple:
        model, processor = load_own(self.options)
        DiffusionOptions.build(model.decoding_defaults, self.options.decoding)
        return model, processor

    def __call__(self, asked: Asked) -> list[list[Caption]]:
        """Captions regions; where a batch is refused, each of its images by itself."""
        loaded = self._loaded  # a checkpoint or options that cannot be used end the run
        try:
            return self._caption(asked, *loaded)
        except ValueError as error:
            if len(asked) > 1:
                return [captions for one in asked for captions in self([one])]
            return [[Caption(None, problem=str(error)) for _ in masks] for _, masks in asked]

    def _caption(self, asked: Asked, model, processor) -> list[list[Caption]]:
        instruction = self.options.instruction
        output = model.diffusion_generate(
            [image for image, _ in asked],
            [masks for _, masks in asked],
            None if instruction is None else [instruction] * len(asked),
            processor=processor,
            **self.options.decoding,
        )
        return [
            [Caption(text, score) for text, score in zip(texts, scores, strict=True)]
            for texts, scores in zip(output.texts, output.scores, strict=True)
        ]


# Any model that chats about images.


@dataclass(frozen=True)
class PromptOptions:
    """What a chat model is shown and told of a region."""

    text: str = PROMPT
    # In this order: "outlined", the image with the region outlined; "crop", three times its box;
    # "mask", the region mask of the crop; "image", the image as it is.
    views: list[str] = field(default_factory=lambda: ["crop", "mask"])
    max_side: int = 1024  # pixels of a view's longer side

    def __post_init__(self):
        unknown = [view for view in self.views if view not in VIEWS]
        if unknown or not self.views:
            raise ValueError(f"expected prompt.views among {', '.join(VIEWS)}, got {unknown}")
        if not self.text.strip():
            raise ValueError("expected prompt.text with text in it, got none")
        expect_positive("prompt.max_side", self.max_side)


Chat = Callable[[list[list[dict]]], list[str | Failure]]


class ChatCaptioner:
    """Captions each region by one question to a chat model, with views of the region."""

    def __init__(self, chat: Chat, prompt: PromptOptions | None = None):
        self.chat = chat
        self.prompt = prompt or PromptOptions()

    def __call__(self, asked: Asked) -> list[list[Caption]]:
        """Captions regions, those of all images at once."""
        messages = [region_messages(i, m, self.prompt) for i, masks in asked for m in masks]
        answers = map(visible_text, self.chat(messages))
        return [[_caption_of(next(answers)) for _ in masks] for _, masks in asked]


def _caption_of(answer: str | Failure) -> Caption:
    if isinstance(answer, Failure):
        return Caption(None, problem=answer.reason, passing=answer.passing)
    return Caption(answer)


def region_messages(image: Image.Image, mask: np.ndarray, prompt: PromptOptions) -> list[dict]:
    """Returns the conversation that asks for the caption of a region."""
    parts = []
    for name in prompt.views:
        title, make = VIEWS[name]
        view = make(image, mask)
        view.thumbnail((prompt.max_side, prompt.max_side))
        parts += [text_part(title), image_part(png_data_url(view))]
    return [{"role": "user", "content": [*parts, text_part(prompt.text)]}]


def _crop(image: Image.Image, mask: np.ndarray) -> Image.Image:
    return image.crop(crop_window(mask))


def _mask_crop(image: Image.Image, mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255).crop(crop_window(mask))


def _outlined(image: Image.Image, mask: np.ndarray) -> Image.Image:
    width = 2 * max(1, round(OUTLINE_SHARE * max(image.size))) + 1
    region = Image.fromarray(mask.astype(np.uint8) * 255)
    grown, shrunk = (
        region.filter(f(width)) for f in (ImageFilter.MaxFilter, ImageFilter.MinFilter)
    )
    outlined = image.copy()
    outlined.paste(OUTLINE, mask=ImageChops.subtract(grown, shrunk))
    return outlined


VIEWS = {
    "outlined": ("The image, with the region outlined:", _outlined),
    "crop": ("The image around the object:", _crop),
    "mask": ("The mask of the object in it:", _mask_crop),
    "image": ("The whole image:", lambda image, mask: image.copy()),
}
