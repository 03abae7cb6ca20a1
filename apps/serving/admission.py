"""Decides which jobs an engine takes, with which options, and which of them may share a batch."""

import bisect
import dataclasses
from typing import NamedTuple

from ...generation_cache import is_packable
from ...generation_options import IN_BLOCKS, TEMPLATE_DECIDES, DiffusionOptions, merge_options
from ..captioning.captioner import RegionCaptioner
from .jobs import ChatJob, RegionJob, TooLong, num_choosing, num_steps, template_length

OWN_OPTIONS = (  # not for a job to set
    *("generator", "batch_size", "return_history", "compile"),
    "num_return_sequences",  # of which a result holds one
)


class Checked(NamedTuple):
    """Says how a job is decoded, and what that takes.

    Attributes:
        options: over the checkpoint's.
        prompt_tokens: of all its region groups.
        cost: see `RegionJob.cost`.
        num_steps: denoising steps at most, of one batch.
        num_choosing: forward passes before them, which choose among a template's texts.
        joins: its forward passes run together with those of others (see `is_packable`).
        num_candidates: rows for each of its own, by the checkpoint's `num_return_sequences`.
    """

    options: dict
    prompt_tokens: int
    cost: int
    num_steps: int
    num_choosing: int
    joins: bool
    num_candidates: int


class Admission:
    """Checks jobs before they are queued.

    Args:
        captioner: the model, its processor and default options.
        max_cost: most work of one job (see `RegionJob.cost`).
    """

    def __init__(self, captioner: RegionCaptioner, max_cost: int):
        self.captioner = captioner
        self.max_cost = max_cost

    def check(self, job: RegionJob | ChatJob, options: dict, shorten: str | None) -> Checked:
        """Returns the options that a job runs with, and what it takes.

        Args:
            job: what to caption or answer.
            options: decoding options over the captioner's.
            shorten: the option among them that is only an upper bound (see `Engine.submit`).

        Raises ValueError for a job or option that does not fit.
        """
        bound = options.get(shorten) if shorten is not None else None
        if job.template is not None:
            options = {name: value for name, value in options.items() if name != shorten}
            given = [name for name in TEMPLATE_DECIDES if options.get(name) is not None]
            if given:
                raise ValueError(
                    f"expected no {', '.join(given)} with a template, whose fields say how long"
                    " they are"
                )
        options = merge_options(self._defaults(job), options, job.task)
        if job.template is not None and bound is not None:
            self._expect_bound(job, bound)
        elif shorten is not None:
            options = self._shortened(job, options, shorten)
        return self._measure(job, options)

    def batch_key(self, job: RegionJob | ChatJob, options: dict):
        """Returns what jobs of one batch have in common.

        Random jobs with a seed stay alone: what they draw depends on their place in a batch.
        """
        built = self._built(options, job)  # the checkpoint's own defaults may be random
        if built.is_random and built.seed is not None:
            return object()
        kind = type(job), job.template, job.task == "answers" and not job.images
        return *kind, tuple(sorted((k, _frozen(v)) for k, v in options.items()))

    def _measure(self, job, options: dict) -> Checked:
        """Returns what a job takes; raises ValueError if it does not fit."""
        built = self._built(options, job)
        positions = self.captioner.model.config.text_config.max_position_embeddings
        if max(built.caption_length, built.max_new_tokens) <= positions:
            self._expect_affordable(job.cost(0, built))  # before long sequences are made of it

        prompt_tokens = job.check(self.captioner, built)
        cost = job.cost(prompt_tokens, built)
        self._expect_affordable(cost)

        length = built.caption_length if job.task == "captions" else built.max_new_tokens
        steps = max(1, num_steps(job.template, length, built))
        layout = self.captioner.model.config.region_layout
        joins = is_packable(layout, built.cfg_scale, built.compile, built.block_cache)
        choosing = num_choosing(job.template, job.count)
        candidates = built.num_return_sequences
        return Checked(options, prompt_tokens, cost, steps, choosing, joins, candidates)

    def _expect_affordable(self, cost: int):
        if cost > self.max_cost:
            raise TooLong(
                f"expected work of at most {self.max_cost:,} positions (tokens of prompt and"
                f" response, times steps, times two with cfg_scale), got {cost:,}: ask for fewer"
                " tokens, steps, regions or lengths of a template's fields"
            )

    def _expect_bound(self, job, bound: int):
        length = template_length(job.template, self.captioner.processor)
        if length > bound:
            raise ValueError(
                f"expected max_tokens of at least the template's {length} tokens, got {bound}"
            )

    def _shortened(self, job, options: dict, name: str) -> dict:
        """Returns options under which `options[name]` is the most that a response may take."""
        captioner = self.captioner
        options = options | {name: self._room(job, options, name)}
        usual = self._built(self._defaults(job), job)
        if name != "max_new_tokens" or options[name] <= usual.max_new_tokens:
            return options

        # An answer with more room than usual is decoded to its end of turn and no further.
        end = captioner.processor.tokenizer.convert_ids_to_tokens(captioner.processor.eot_token_id)
        return options | {"stop_strings": [*(options.get("stop_strings") or ()), end]}

    def _room(self, job, options: dict, name: str) -> int:
        """Returns the largest length up to `options[name]` that fits: whole blocks, at least 1."""

        def is_too_long(blocks: int) -> bool:
            try:
                self._measure(job, options | {name: blocks * block})
            except TooLong:
                return True
            return False

        block = options.get("block_length") or 1
        max_blocks = options[name] // block
        if max_blocks < 1 or not is_too_long(max_blocks):
            return options[name]
        return block * max(1, bisect.bisect_left(range(1, max_blocks), True, key=is_too_long))

    def _defaults(self, job) -> dict:
        return self.captioner.defaults_for(job.task, job.template is not None)

    def _built(self, options: dict, job) -> DiffusionOptions:
        """Returns all options; with a template its length is that of the response."""
        reserved = sorted(set(options) & set(OWN_OPTIONS))
        if reserved:
            raise ValueError(f"expected options that a job may set, got {reserved}")
        defaults = self.captioner.model.decoding_defaults
        built = DiffusionOptions.build(defaults, options, job.task)
        if job.template is None:
            return built
        length = template_length(job.template, self.captioner.processor)
        return dataclasses.replace(
            built,
            caption_length=length,
            max_new_tokens=length,
            **dict.fromkeys(IN_BLOCKS),
        )


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
