"""What callers ask of an engine: regions to caption, conversations to answer; and what they get.

Both kinds of job offer the same few methods, so that the engine need not tell them apart: `check`
before queueing, `passes` and `nbytes` for its limits, `generate` for a whole batch, `result_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ...generation_diffusion import DiffusionOutput
from ...generation_options import DiffusionOptions
from ...image_loading import load_image, load_mask
from ..captioning.captioner import Answers, Region, RegionCaptioner, RegionCaptions
from .limits import each_numbered

if TYPE_CHECKING:
    from .chat import Asked


class TooLong(ValueError):
    """A job that would fit if its response were shorter."""


@dataclass(frozen=True, eq=False)
class RegionJob:
    """Regions of one picture to caption; `build` makes it of anything that can be loaded."""

    image: Image.Image
    masks: tuple[Image.Image, ...]
    instruction: str | None = None

    task = "captions"

    @classmethod
    def build(cls, image, masks: Sequence, instruction: str | None = None) -> RegionJob:
        """Loads the picture and its masks; ValueError where they do not fit."""
        picture = load_image(image)
        if not masks:
            raise ValueError("expected at least one mask, got none")
        regions = each_numbered("mask", masks, lambda mask: load_mask(mask, picture.size))
        return cls(picture, tuple(regions), instruction)

    @property
    def count(self) -> int:
        """Captions to come."""
        return len(self.masks)

    @property
    def nbytes(self) -> int:
        """Memory that picture and masks hold."""
        return self.image.width * self.image.height * (3 + len(self.masks))

    def passes(self, most: int) -> int:
        """Rows of a batch, with at most so many regions a pass."""
        return -(-len(self.masks) // most)

    def check(self, captioner: RegionCaptioner, options: DiffusionOptions) -> int:
        """Prompt tokens of all passes; ValueError for what could not be decoded."""
        model, processor = captioner.model, captioner.processor
        most = model.config.num_region_prompts
        if most == 0:
            raise ValueError("expected a question: this checkpoint describes no regions")
        scope = "region" if model.config.region_layout == "independent" else "image"
        options.region_rule(scope, model.config.eot_token_id)
        sizes = picture_sizes(processor, [self.image])
        tokens = 0
        for first in range(0, len(self.masks), most):
            regions = len(self.masks[first : first + most])
            slots = processor.caption_slots(None, regions, options.caption_length)
            sequence = processor.region_sequence(sizes, 0, slots, self.instruction)
            expect_fitting(sequence, model.config)
            tokens += sequence.prompt_length
        return tokens

    def cost(self, prompt_tokens: int, options: DiffusionOptions) -> int:
        """Positions that are computed, all steps and passes together."""
        length = options.caption_length
        tokens = prompt_tokens + len(self.masks) * (length + 1)  # and what ends each caption
        return tokens * (options.steps or length) * guidance_factor(options)

    @staticmethod
    def generate(captioner: RegionCaptioner, jobs: list[RegionJob], options: dict, callback):
        """One run for all `jobs`."""
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
        """The result as `RegionCaptioner` gives it."""
        pairs = enumerate(zip(texts, self.masks, strict=True), 1)
        regions = [
            Region(k, text, mask.getbbox(), sum(mask.histogram()[1:]), mask)
            for k, (text, mask) in pairs
        ]
        return RegionCaptions(image=self.image, regions=regions, **cost)


@dataclass(frozen=True, eq=False)
class ChatJob:
    """A conversation to answer.

    Attributes:
        messages: for the chat template: dicts of `role` and `content`, a text or a list of
            `{"type": "image"}` and `{"type": "text", "text": ...}`.
        images: its pictures in order.
    """

    messages: list[dict]
    images: tuple[Image.Image, ...] = ()

    count = 1
    task = "answers"

    @classmethod
    def ask(cls, image, question: str) -> ChatJob:
        """One question about one picture."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return cls([{"role": "user", "content": content}], (load_image(image),))

    @property
    def nbytes(self) -> int:
        """Memory that the pictures hold."""
        return 3 * sum(image.width * image.height for image in self.images)

    @property
    def question(self) -> str:
        """The text of the last message."""
        content = self.messages[-1]["content"]
        if isinstance(content, str):
            return content
        return "\n".join(part["text"] for part in content if part["type"] == "text")

    def passes(self, most: int) -> int:
        """Rows of a batch."""
        return 1

    def check(self, captioner: RegionCaptioner, options: DiffusionOptions) -> int:
        """Prompt tokens; ValueError for what could not be decoded."""
        config, processor = captioner.model.config, captioner.processor
        options.answer_rule(options.max_new_tokens, config.eot_token_id)
        sizes = picture_sizes(processor, self.images)
        sequence = processor.chat_sequence(
            self._text(processor), sizes, max_new_tokens=options.max_new_tokens
        )
        expect_fitting(sequence, config)
        return sequence.prompt_length

    def _text(self, processor) -> str:
        return processor.apply_chat_template(self.messages, add_generation_prompt=True)

    def cost(self, prompt_tokens: int, options: DiffusionOptions) -> int:
        """Positions that are computed, all steps together."""
        length = options.max_new_tokens
        return (prompt_tokens + length) * (options.steps or length) * guidance_factor(options)

    @staticmethod
    def generate(captioner: RegionCaptioner, jobs: list[ChatJob], options: dict, callback):
        """One run for all `jobs`."""
        options = dict(options)
        options.pop("batch_size")  # the inputs are one batch already
        processor, defaults = captioner.processor, captioner.model.decoding_defaults
        length = DiffusionOptions.build(defaults, options, "answers").max_new_tokens
        inputs = processor(
            [picture for job in jobs for picture in job.images] or None,
            text=[job._text(processor) for job in jobs],
            max_new_tokens=length,
        )
        return captioner.model.diffusion_generate(
            inputs=inputs, processor=processor, callback=callback, **options
        )

    def result_of(self, texts: list[str], **cost) -> Answers:
        """The result as `RegionCaptioner` gives it."""
        image = self.images[0] if self.images else None
        return Answers(image=image, questions=[self.question], answers=texts, **cost)


def guidance_factor(options: DiffusionOptions) -> int:
    """Forward passes of a step: with guidance, one without the prompt as well."""
    return 2 if options.cfg_scale else 1


def job_of(asked: Asked) -> RegionJob | ChatJob:
    """The job that a request asks for."""
    if asked.masks:
        return RegionJob(asked.images[0], asked.masks, asked.instruction)
    return ChatJob(asked.messages, asked.images)


@dataclass(frozen=True)
class Completion:
    """What became of a job.

    Attributes:
        result: captions or answers.
        prompt_tokens: of all its passes, visual tokens included.
        completion_tokens: of its texts, up to their ends of turn.
        ended: whether every text ended by itself, not at its length.
        batch_size: jobs that ran together.
        queued_seconds: time before it ran.
    """

    result: RegionCaptions | Answers
    prompt_tokens: int
    completion_tokens: int
    ended: bool
    batch_size: int
    queued_seconds: float


class ForwardCounter:
    """Counts, while a batch runs, after how many steps each job's texts last changed."""

    def __init__(self, passes: list[int]):
        self.passes = passes
        self.steps = 0
        self._last: list[list] = [[] for _ in passes]
        self._changed = [0] * len(passes)

    def add(self, token_ids: list) -> int:
        """Takes the ids after a step; returns the step's number from 1."""
        self.steps += 1
        for i, rows in enumerate(token_ids):
            if rows != self._last[i]:
                self._last[i], self._changed[i] = rows, self.steps
        return self.steps

    def forwards(self, index: int, total: int) -> int:
        """Forward passes of a job, given those of the whole batch."""
        if len(self.passes) == 1:
            return total
        if total == self.steps * sum(self.passes):  # nobody finished early
            return self.steps * self.passes[index]
        return self._changed[index] * self.passes[index]


def completions(
    captioner: RegionCaptioner,
    tickets: list,
    output: DiffusionOutput,
    counter: ForwardCounter,
    seconds: float,
) -> list[Completion]:
    """Splits a batch's output into what each ticket's job gets."""
    done = []
    for i, ticket in enumerate(tickets):
        ids = output.token_ids[i]
        kept = [answer_length(captioner.processor, row) for row in ids]
        forwards = counter.forwards(i, output.num_forwards)
        result = ticket.job.result_of(
            output.texts[i],
            num_forwards=forwards,
            tokens_per_forward=sum(map(len, ids)) / forwards,
            seconds=seconds,
        )
        done.append(
            Completion(
                result,
                ticket.prompt_tokens,
                sum(kept),
                all(n < len(row) for n, row in zip(kept, ids, strict=True)),
                len(tickets),
                ticket.started - ticket.submitted,
            )
        )
    return done


def answer_length(processor, ids: Sequence[int]) -> int:
    """Tokens of an answer before its end of turn or text."""
    stops = {processor.eot_token_id, processor.tokenizer.eos_token_id}
    return next((i for i, token in enumerate(ids) if token in stops), len(ids))


def picture_sizes(processor, pictures: Sequence[Image.Image]) -> dict:
    """As much of the image processor's features as decides a sequence's length."""
    if not pictures:
        return {}
    most = 1 if len(pictures) > 1 else None
    grids = [processor.image_processor.choose_grid(p.size, most) for p in pictures]
    return {
        "image_sizes": torch.tensor([(p.height, p.width) for p in pictures]),
        "image_grids": torch.tensor(grids),
    }


def expect_fitting(sequence, config):
    """Refuses a sequence longer than the model's positions."""
    most = config.text_config.max_position_embeddings
    length = max(sequence.positions) + 1
    if length > most:
        raise TooLong(
            f"expected at most {most} tokens of picture, text and answer, got {length}:"
            " shorten the text or the answer"
        )
