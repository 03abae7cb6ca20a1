"""Describes what callers ask of an engine: regions to caption, conversations to answer.

Both kinds of job offer the same few methods, so that the engine need not tell them apart: `check`
before queueing, `num_rows`, `cost` and `nbytes` for its limits, `steps` for a whole batch,
`result_of`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ...generation_diffusion import Steps
from ...generation_options import DiffusionOptions
from ...generation_scoring import ROWS_AT_ONCE
from ...generation_seen import RegionGroup, Seen, group_by_instruction, plan_groups
from ...generation_templates import Template, TemplateEncoder
from ...image_loading import load_image, load_mask
from ...processing_perceptiondlm import REGION_REFERENCE, pair_prompts
from ..captioning.captioner import RegionCaptioner
from ..captioning.results import Answers, Region, RegionCaptions
from .limits import each_numbered
from .seen_cache import SeenCache, digest_of

if TYPE_CHECKING:
    from .chat import Asked
    from .completions import Found


class TooLong(ValueError):
    """A job that would fit if its response were shorter."""


@dataclass(frozen=True, eq=False)
class RegionJob:
    """Regions of one image to caption; `build` makes it of anything that can be loaded.

    Attributes:
        instruction: for all regions; None: the checkpoint's own.
        prompts: for each region, None for the instruction; None where there are none.
        template: of every caption.
    """

    image: Image.Image
    masks: tuple[Image.Image, ...]
    instruction: str | None = None
    prompts: tuple[str | None, ...] | None = None
    template: Template | None = None

    task = "captions"

    @classmethod
    def build(
        cls,
        image,
        masks: Sequence,
        instruction: str | None = None,
        prompts: Sequence[str | None] | None = None,
        template=None,
    ) -> RegionJob:
        """Loads an image and its region masks; raises ValueError where they do not fit."""
        image = load_image(image)
        if not masks:
            raise ValueError("expected at least one mask, got none")
        regions = each_numbered("mask", masks, lambda mask: load_mask(mask, image.size))
        if prompts is not None:
            pair_prompts([list(prompts)], [len(regions)])  # refuses another number of them
            prompts = tuple(prompts)
        parsed = None if template is None else Template.parse(template)
        return cls(image, tuple(regions), instruction, prompts, parsed)

    @property
    def count(self) -> int:
        """Counts the captions that will be made."""
        return len(self.masks)

    @property
    def nbytes(self) -> int:
        """Counts the bytes of memory that image and region masks hold."""
        return self.image.width * self.image.height * (3 + len(self.masks))

    @functools.cached_property
    def digest(self) -> bytes:
        """Tells what is seen for this job from what is seen for others."""
        return digest_of([self.image], self.masks)

    def asked(self, default: str) -> str | list[str]:
        """Returns the instruction for all regions, or the list of each region's."""
        instruction = self.instruction or default
        if self.prompts is None:
            return instruction
        return [text or instruction for text in self.prompts]

    def groups(self, config, default: str) -> list[RegionGroup]:
        """Plans the region groups, each of which is a row of a batch."""
        counts, asked = [len(self.masks)], [self.asked(default)]
        if config.region_layout == "independent":
            return plan_groups(counts, config.num_region_prompts, asked)
        return group_by_instruction(counts, config.num_region_prompts, asked, default)

    def num_groups(self, max_regions: int) -> int:
        """Returns how many region groups, each with so many regions at most, all masks make."""
        return -(-len(self.masks) // max_regions)

    def num_rows(self, captioner: RegionCaptioner) -> int:
        """Returns how many rows of a batch it takes, at most."""
        default = captioner.processor.region_instruction
        count = len(self.groups(captioner.model.config, default))
        return count * (self.template.num_lengths if self.template is not None else 1)

    def check(self, captioner: RegionCaptioner, options: DiffusionOptions) -> int:
        """Returns the prompt tokens of all region groups.

        Raises ValueError for what could not be decoded.
        """
        config, processor = captioner.model.config, captioner.processor
        if config.num_region_prompts == 0:
            raise ValueError("expected a question: this checkpoint describes no regions")
        scope = "region" if config.region_layout == "independent" else "image"
        options.region_rule(scope, config.eot_token_id)
        self._expect_no_names(config)

        # The sequence of each region group, without any pixels.
        sizes = image_sizes(processor, [self.image])
        tokens = 0
        for group in self.groups(config, processor.region_instruction):
            asked = group.instruction
            if isinstance(asked, list):
                asked = dict(zip(group.masks, asked, strict=True))
            slots = processor.caption_slots(None, len(group.masks), options.caption_length)
            features = sizes | {"region_orders": [group.masks]}
            sequence = processor.region_sequence(features, 0, slots, asked)
            expect_fitting(sequence, config)
            tokens += sequence.prompt_length
        return tokens

    def _expect_no_names(self, config):
        """Refuses prompts that name regions where no branch could see those."""
        if config.region_layout == "independent":
            return
        for text in filter(None, self.prompts or ()):
            if named := REGION_REFERENCE.search(text):
                raise ValueError(
                    "expected a checkpoint with region_layout 'independent' for a prompt that"
                    f" names regions, got {named[0][:20]} and {config.region_layout!r}"
                )

    def cost(self, prompt_tokens: int, options: DiffusionOptions) -> int:
        """Returns how many positions are computed, all steps, rows and region groups together."""
        length, count = options.caption_length, len(self.masks)
        tokens = prompt_tokens + count * (length + 1)  # and what ends each caption
        return tokens * num_passes(self.template, length, options, count)

    def _may_be_seen(self, captioner: RegionCaptioner, max_rows: int) -> bool:
        """Tells whether one call sees all regions, as groups of the masks in their order."""
        config = captioner.model.config
        groups = self.groups(config, captioner.processor.region_instruction)
        usual = plan_groups([len(self.masks)], config.num_region_prompts)
        are_usual = [g.masks for g in groups] == [g.masks for g in usual]
        return are_usual and len(groups) <= max_rows

    @staticmethod
    def steps(
        captioner: RegionCaptioner,
        jobs: list[RegionJob],
        options: dict,
        callback,
        cache: SeenCache | None = None,
    ) -> Steps:
        """Runs all `jobs` at once, step by step as `diffusion_steps` does.

        What `cache` has of their images is not encoded again.
        """
        model, processor = captioner.model, captioner.processor
        images, masks = [job.image for job in jobs], [list(job.masks) for job in jobs]
        call = {"processor": processor, "callback": callback, **options}
        prompts = [job.asked(processor.region_instruction) for job in jobs]
        if jobs[0].template is not None:
            call["template"] = [[job.template] * job.count for job in jobs]
        if cache is None or not all(
            job._may_be_seen(captioner, options["batch_size"]) for job in jobs
        ):
            return (yield from model.diffusion_steps(images, masks, prompts, **call))

        def see(places: list[int]) -> Seen:
            return model.see(
                [images[i] for i in places], [masks[i] for i in places], processor=processor
            )

        with cache.seen([job.digest for job in jobs], see) as seen:
            # The text of a single image is for all its regions, however many there are.
            asked = prompts[0] if len(jobs) == 1 and isinstance(prompts[0], str) else prompts
            return (yield from model.diffusion_steps(seen, prompts=asked, **call))

    def result_of(self, found: Found, **cost) -> RegionCaptions:
        """Returns the result as `RegionCaptioner` gives it."""
        regions = Region.each(found.texts, self.masks, found.scores, found.fields)
        return RegionCaptions(image=self.image, regions=regions, **cost)


@dataclass(frozen=True, eq=False)
class ChatJob:
    """A conversation to answer.

    Attributes:
        messages: for the chat template: dicts of `role` and `content`, a text or a list of
            `{"type": "image"}` and `{"type": "text", "text": ...}`.
        images: in the order of their parts.
        template: of the answer.
    """

    messages: list[dict]
    images: tuple[Image.Image, ...] = ()
    template: Template | None = None

    count = 1
    task = "answers"

    @classmethod
    def ask(cls, image, question: str, template=None) -> ChatJob:
        """Asks one question about one image."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        parsed = None if template is None else Template.parse(template)
        return cls([{"role": "user", "content": content}], (load_image(image),), parsed)

    @property
    def nbytes(self) -> int:
        """Counts the bytes of memory that the images hold."""
        return 3 * sum(image.width * image.height for image in self.images)

    @functools.cached_property
    def digest(self) -> bytes:
        """Tells what is seen for this job from what is seen for others."""
        return digest_of(self.images)

    @property
    def question(self) -> str:
        """Returns the text of the last message."""
        content = self.messages[-1]["content"]
        if isinstance(content, str):
            return content
        return "\n".join(part["text"] for part in content if part["type"] == "text")

    def num_rows(self, captioner: RegionCaptioner) -> int:
        """Returns how many rows of a batch it takes."""
        return self.template.num_lengths if self.template is not None else 1

    def check(self, captioner: RegionCaptioner, options: DiffusionOptions) -> int:
        """Returns the prompt tokens; raises ValueError for what could not be decoded."""
        config, processor = captioner.model.config, captioner.processor
        options.answer_rule(options.max_new_tokens, config.eot_token_id)
        sizes = image_sizes(processor, self.images)
        text = processor.apply_chat_template(self.messages, add_generation_prompt=True)
        sequence = processor.chat_sequence(text, sizes, max_new_tokens=options.max_new_tokens)
        expect_fitting(sequence, config)
        return sequence.prompt_length

    def cost(self, prompt_tokens: int, options: DiffusionOptions) -> int:
        """Returns how many positions are computed, all steps and rows together."""
        length = options.max_new_tokens
        return (prompt_tokens + length) * num_passes(self.template, length, options)

    @staticmethod
    def steps(
        captioner: RegionCaptioner,
        jobs: list[ChatJob],
        options: dict,
        callback,
        cache: SeenCache | None = None,
    ) -> Steps:
        """Runs all `jobs` at once, step by step as `diffusion_steps` does.

        What `cache` has of their images is not encoded again. All have images, or none has.
        """
        model, processor = captioner.model, captioner.processor
        images = [list(job.images) for job in jobs]
        call = {
            "prompts": [job.messages for job in jobs],
            "processor": processor,
            "callback": callback,
            **options,
        }
        if jobs[0].template is not None:
            call["template"] = [job.template for job in jobs]
        if cache is None or not jobs[0].images:
            return (yield from model.diffusion_steps(images, **call))

        def see(places: list[int]) -> Seen:
            return model.see([images[i] for i in places], processor=processor)

        with cache.seen([job.digest for job in jobs], see) as seen:
            return (yield from model.diffusion_steps(seen, **call))

    def result_of(self, found: Found, **cost) -> Answers:
        """Returns the result as `RegionCaptioner` gives it."""
        image = self.images[0] if self.images else None
        return Answers(
            image=image,
            questions=[self.question],
            answers=found.texts,
            scores=found.scores,
            fields=found.fields,
            **cost,
        )


def num_passes(
    template: Template | None, length: int, options: DiffusionOptions, count: int = 1
) -> int:
    """Returns how often a row with `count` responses is computed, at most.

    With a template there is a row for each combination of its fields' lengths, and for each
    response one more pass for each of the texts that its fields may be.
    """
    passes = num_steps(template, length, options) * guidance_factor(options)
    passes *= options.num_return_sequences
    if template is None:
        return passes
    choices = sum(len(own.choices) for own in template.fields)
    return template.num_lengths * passes + count * choices


def num_steps(template: Template | None, length: int, options: DiffusionOptions) -> int:
    """Returns how many denoising steps a response takes, at most."""
    if template is None:
        return options.steps or length
    return options.steps or sum(own.max_length for own in template.fields if not own.choices)


def num_choosing(template: Template | None, count: int) -> int:
    """Returns the forward passes that choose the texts of a template's fields in each response."""
    fields = template.fields if template is not None else ()
    return count * sum(-(-len(own.choices) // ROWS_AT_ONCE) for own in fields)


def template_length(template: Template, processor) -> int:
    """Counts the tokens of a response with a template, its fields at their longest."""
    encoder = TemplateEncoder(processor.tokenizer, processor.mask_token_id, processor.eot_token_id)
    shortest = [0] * len(template.fields)
    length = len(encoder.slot(template, shortest).ids)
    for k, own in enumerate(template.fields):
        choices = [len(encoder.choice_ids(template, k, choice)) for choice in own.choices]
        length += max(choices) if choices else own.max_length
    return length


def guidance_factor(options: DiffusionOptions) -> int:
    """Returns the forward passes of a step: with guidance, one without the prompt as well."""
    return 2 if options.cfg_scale else 1


def job_of(asked: Asked) -> RegionJob | ChatJob:
    """Returns the job that a request asks for."""
    template = None if asked.template is None else Template.parse(asked.template)
    if asked.masks:
        prompts = None if asked.prompts is None else tuple(asked.prompts)
        return RegionJob(asked.images[0], asked.masks, asked.instruction, prompts, template)
    return ChatJob(asked.messages, asked.images, template)


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
