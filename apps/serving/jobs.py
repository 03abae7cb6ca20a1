"""Describes what callers ask of an engine: regions to caption, conversations to answer.

Both kinds of job offer the same few methods, so that the engine need not tell them apart: `check`
before queueing, `num_groups`, `cost` and `nbytes` for its limits, `generate` for a whole batch,
`result_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ...generation_options import DiffusionOptions
from ...image_loading import load_image, load_mask
from ..captioning.captioner import RegionCaptioner
from ..captioning.results import Answers, Region, RegionCaptions
from .limits import each_numbered

if TYPE_CHECKING:
    from .chat import Asked


class TooLong(ValueError):
    """A job that would fit if its response were shorter."""


@dataclass(frozen=True, eq=False)
class RegionJob:
    """Regions of one image to caption; `build` makes it of anything that can be loaded."""

    image: Image.Image
    masks: tuple[Image.Image, ...]
    instruction: str | None = None

    task = "captions"

    @classmethod
    def build(cls, image, masks: Sequence, instruction: str | None = None) -> RegionJob:
        """Loads an image and its region masks; raises ValueError where they do not fit."""
        image = load_image(image)
        if not masks:
            raise ValueError("expected at least one mask, got none")
        regions = each_numbered("mask", masks, lambda mask: load_mask(mask, image.size))
        return cls(image, tuple(regions), instruction)

    @property
    def count(self) -> int:
        """Counts the captions that will be made."""
        return len(self.masks)

    @property
    def nbytes(self) -> int:
        """Counts the bytes of memory that image and region masks hold."""
        return self.image.width * self.image.height * (3 + len(self.masks))

    def num_groups(self, max_regions: int) -> int:
        """Returns how many rows of a batch it takes, each with so many regions at most."""
        return -(-len(self.masks) // max_regions)

    def check(self, captioner: RegionCaptioner, options: DiffusionOptions) -> int:
        """Returns the prompt tokens of all region groups.

        Raises ValueError for what could not be decoded.
        """
        model, processor = captioner.model, captioner.processor
        max_regions = model.config.num_region_prompts
        if max_regions == 0:
            raise ValueError("expected a question: this checkpoint describes no regions")
        scope = "region" if model.config.region_layout == "independent" else "image"
        options.region_rule(scope, model.config.eot_token_id)

        # The sequence of each region group, without any pixels.
        sizes = image_sizes(processor, [self.image])
        tokens = 0
        for first in range(0, len(self.masks), max_regions):
            regions = len(self.masks[first : first + max_regions])
            slots = processor.caption_slots(None, regions, options.caption_length)
            sequence = processor.region_sequence(sizes, 0, slots, self.instruction)
            expect_fitting(sequence, model.config)
            tokens += sequence.prompt_length
        return tokens

    def cost(self, prompt_tokens: int, options: DiffusionOptions) -> int:
        """Returns how many positions are computed, all steps and region groups together."""
        length = options.caption_length
        tokens = prompt_tokens + len(self.masks) * (length + 1)  # and what ends each caption
        return tokens * (options.steps or length) * guidance_factor(options)

    @staticmethod
    def generate(captioner: RegionCaptioner, jobs: list[RegionJob], options: dict, callback):
        """Runs all `jobs` at once."""
        default = captioner.processor.region_instruction
        return captioner.model.diffusion_generate(
            images=[job.image for job in jobs],
            masks=[list(job.masks) for job in jobs],
            prompts=[job.instruction or default for job in jobs],
            processor=captioner.processor,
            callback=callback,
            **options,
        )

    def result_of(self, texts: list[str], **cost) -> RegionCaptions:
        """Returns the result as `RegionCaptioner` gives it."""
        return RegionCaptions(image=self.image, regions=Region.each(texts, self.masks), **cost)


@dataclass(frozen=True, eq=False)
class ChatJob:
    """A conversation to answer.

    Attributes:
        messages: for the chat template: dicts of `role` and `content`, a text or a list of
            `{"type": "image"}` and `{"type": "text", "text": ...}`.
        images: in the order of their parts.
    """

    messages: list[dict]
    images: tuple[Image.Image, ...] = ()

    count = 1
    task = "answers"

    @classmethod
    def ask(cls, image, question: str) -> ChatJob:
        """Asks one question about one image."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return cls([{"role": "user", "content": content}], (load_image(image),))

    @property
    def nbytes(self) -> int:
        """Counts the bytes of memory that the images hold."""
        return 3 * sum(image.width * image.height for image in self.images)

    @property
    def question(self) -> str:
        """Returns the text of the last message."""
        content = self.messages[-1]["content"]
        if isinstance(content, str):
            return content
        return "\n".join(part["text"] for part in content if part["type"] == "text")

    def num_groups(self, max_regions: int) -> int:
        """Returns how many rows of a batch it takes."""
        return 1

    def check(self, captioner: RegionCaptioner, options: DiffusionOptions) -> int:
        """Returns the prompt tokens; raises ValueError for what could not be decoded."""
        config, processor = captioner.model.config, captioner.processor
        options.answer_rule(options.max_new_tokens, config.eot_token_id)
        sizes = image_sizes(processor, self.images)
        sequence = processor.chat_sequence(
            self._text(processor), sizes, max_new_tokens=options.max_new_tokens
        )
        expect_fitting(sequence, config)
        return sequence.prompt_length

    def _text(self, processor) -> str:
        return processor.apply_chat_template(self.messages, add_generation_prompt=True)

    def cost(self, prompt_tokens: int, options: DiffusionOptions) -> int:
        """Returns how many positions are computed, all steps together."""
        length = options.max_new_tokens
        return (prompt_tokens + length) * (options.steps or length) * guidance_factor(options)

    @staticmethod
    def generate(captioner: RegionCaptioner, jobs: list[ChatJob], options: dict, callback):
        """Runs all `jobs` at once."""
        options = dict(options)
        options.pop("batch_size")  # the inputs are one batch already
        processor, defaults = captioner.processor, captioner.model.decoding_defaults
        length = DiffusionOptions.build(defaults, options, "answers").max_new_tokens
        inputs = processor(
            [image for job in jobs for image in job.images] or None,
            text=[job._text(processor) for job in jobs],
            max_new_tokens=length,
        )
        return captioner.model.diffusion_generate(
            inputs=inputs, processor=processor, callback=callback, **options
        )

    def result_of(self, texts: list[str], **cost) -> Answers:
        """Returns the result as `RegionCaptioner` gives it."""
        image = self.images[0] if self.images else None
        return Answers(image=image, questions=[self.question], answers=texts, **cost)


def guidance_factor(options: DiffusionOptions) -> int:
    """Returns the forward passes of a step: with guidance, one without the prompt as well."""
    return 2 if options.cfg_scale else 1


def job_of(asked: Asked) -> RegionJob | ChatJob:
    """Returns the job that a request asks for."""
    if asked.masks:
        return RegionJob(asked.images[0], asked.masks, asked.instruction)
    return ChatJob(asked.messages, asked.images)


def image_sizes(processor, images: Sequence[Image.Image]) -> dict:
    """Returns as much of the image processor's features as decides a sequence's length."""
    if not images:
        return {}
    max_tiles = 1 if len(images) > 1 else None
    grids = [processor.image_processor.choose_grid(image.size, max_tiles) for image in images]
    return {
        "image_sizes": torch.tensor([(image.height, image.width) for image in images]),
        "image_grids": torch.tensor(grids),
    }


def expect_fitting(sequence, config):
    """Refuses a sequence longer than the model's positions."""
    max_length = config.text_config.max_position_embeddings
    length = max(sequence.positions) + 1
    if length > max_length:
        raise TooLong(
            f"expected at most {max_length} tokens of image, text and answer, got {length}:"
            " shorten the text or the answer"
        )
