"""The rows of a call: a sequence for each region group or question, candidate and field length.

    region group  -->  a slot for each region       -->  a sequence  -->  x candidates
    question      -->  a slot for its answer        -->  a sequence  -->  x candidates
    template      -->  a slot for each combination of its fields' lengths: a sequence for each

Rows of the same images compute their trunk once.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from .generation_cache import ForwardPass
from .generation_options import DiffusionOptions
from .generation_output import Denoised, FilledTemplate, Place, Row
from .generation_rules import Blockwise, Rule, StopAt
from .generation_scoring import choosing_texts
from .generation_seen import SeenGroup, inputs_of
from .generation_templates import Template, TemplateEncoder
from .processing_sequence import TokenSequence


class Made(NamedTuple):
    """Holds a sequence that was made, of what was seen, and whose responses it holds."""

    sequence: TokenSequence
    group: SeenGroup
    row: Row


Making = Generator[ForwardPass, torch.Tensor, list[Made]]


class Batch(NamedTuple):
    """Holds rows to denoise together.

    Attributes:
        inputs: the model's tensors.
        rows: whose responses they hold.
        rule: which positions are committed.
        suppressed: ids that are never produced.
        trunks: for each row where its trunk's keys and values are kept; None: nothing is kept.
        ready: rows in which nothing is left to denoise, and what they hold.
    """

    inputs: dict
    rows: list[Row]
    rule: Rule | Blockwise | None
    suppressed: tuple[int, ...]
    trunks: list[dict] | None = None
    ready: Sequence[tuple[Row, Denoised]] = ()


class Call(NamedTuple):
    """Holds what one call of `diffusion_generate` settled on.

    Attributes:
        processor: builds sequences and decodes texts; None only with prepared inputs.
        options: how to decode.
        counts: the responses of each image or question.
        task: "captions" or "answers".
        callback: what listens to the steps.
        templates: nested as the responses; None without.
        is_seen: the caller keeps the images for further calls.
    """

    processor: Any
    options: DiffusionOptions
    counts: list[int]
    task: str
    callback: Callable[[int, list], None] | None = None
    templates: list[list[Template]] | None = None
    is_seen: bool = False

    @property
    def has_candidates(self) -> bool:
        """Tells whether several rows answer for one place, and one of them is kept at the end."""
        templates = [one for own in self.templates or () for one in own]
        has_lengths = any(template.num_lengths > 1 for template in templates)
        return has_lengths or self.options.num_return_sequences > 1


class RowMaker:
    """Makes the rows of one call, and batches of them.

    Args:
        model: the model.
        call: what the call settled on.
    """

    def __init__(self, model, call: Call):
        self.model = model
        self.call = call
        self.is_tree = model.config.region_layout == "independent"
        self.mask_id = model.config.mask_token_id

    def region_rows(self, group: SeenGroup, asked: list[int], instruction) -> Making:
        """Makes the rows of one region group.

        It stops for each forward pass that chooses among a template's texts.

        Args:
            asked: the numbers of the image's masks that are asked about, in the order of the
                output.
            instruction: one for all, or one for each of those masks.
        """
        image, order = group.images[0], group.order
        numbers = {mask: k for k, mask in enumerate(asked)}  # places in the output
        regions = [p for p, mask in enumerate(order) if mask in numbers]
        if not regions:
            return []
        if len(regions) < len(order) and not self.is_tree:
            raise ValueError(
                "expected region_layout 'independent' to ask about some of the regions that were"
                f" seen, got {self.model.config.region_layout!r}: see them alone"
            )
        if isinstance(instruction, list):
            instruction = {mask: instruction[numbers[mask]] for mask in order if mask in numbers}

        def build(slots: list[list[int]], regions: Sequence[int] = regions) -> TokenSequence:
            return self.call.processor.region_sequence(
                group.geometry, 0, slots, instruction, regions=regions if self.is_tree else None
            )

        def build_alone(ids: list[int], j: int) -> tuple[TokenSequence, int]:
            # A branch for the region alone; jointly all regions, the others' responses masked.
            if self.is_tree:
                return build([ids], [regions[j]]), 0
            masked = [self.mask_id] * len(ids)
            return build([ids if p == j else masked for p in range(len(regions))]), j

        places = [(image, numbers[order[p]]) for p in regions]
        length = self.call.options.caption_length
        key = (image, group.masks[0])
        return (yield from self._rows(group, places, [image], key, length, build, build_alone))

    def answer_rows(self, number: int, prompt: str, group: SeenGroup) -> Making:
        """Makes the rows of one question about the images of a group.

        It stops for each forward pass that chooses among a template's texts.
        """
        processor = self.call.processor
        count = len(group.geometry["image_grids"]) if group.geometry else 0
        (text,) = processor.render_questions([[None] * count], [prompt])

        def build(slots: list[list[int]]) -> TokenSequence:
            return processor.chat_sequence(text, group.geometry, slot=slots[0])

        def build_alone(ids: list[int], j: int) -> tuple[TokenSequence, int]:
            return build([ids]), j

        length = self.call.options.max_new_tokens
        key = (number, 0)
        rows = self._rows(group, [(number, 0)], [number], key, length, build, build_alone)
        return (yield from rows)

    def _rows(self, group, places, owners, key, length: int, build, build_alone) -> Making:
        """Makes a row for each candidate and each combination of the fields' lengths."""
        variants: list[tuple[TokenSequence, list[Place | None], list[FilledTemplate] | None]]
        spent = 0
        if self.call.templates is None:
            sequence = build([[self.mask_id] * length] * len(places))
            variants = [(sequence, places, None)]
        else:
            filled = yield from self._filled(group, places, build_alone)
            choices = [own.choices for one in filled for own in one[0].template.fields]
            spent = sum(map(len, choices))  # each was tried in a forward pass
            variants = [
                (build([one.slot.ids for one in own]), kept, own)
                for own, kept in _combined(filled, places)
            ]
        made = []
        for candidate in range(self.call.options.num_return_sequences):
            own_key = (*key, candidate) if candidate else key
            for sequence, kept, templates in variants:
                row = Row(kept, owners, own_key, candidate, templates, spent)
                made.append(Made(sequence, group, row))
                spent = 0  # counted once
        return made

    def _filled(
        self, group, places: list[Place], build_alone
    ) -> Generator[ForwardPass, torch.Tensor, list[list[FilledTemplate]]]:
        """Encodes each response's template at every combination of its fields' lengths."""
        assert self.call.templates is not None
        encoder, filled = self._encoder, []
        for j, (i, k) in enumerate(places):
            template = self.call.templates[i][k]
            build = partial(build_alone, j=j)
            processor = self.call.processor
            chosen, log_probs = yield from choosing_texts(
                self.model, processor, template, encoder, group, build
            )
            own = []
            for lengths in template.lengths():
                slot = encoder.slot(template, lengths, chosen)
                own.append(FilledTemplate(template, slot, chosen, log_probs))
            filled.append(own)
        return filled

    @property
    def _encoder(self) -> TemplateEncoder:
        processor = self.call.processor
        return TemplateEncoder(processor.tokenizer, self.mask_id, processor.eot_token_id)

    def batches(self, made: list[Made]) -> Iterator[Batch]:
        """Yields batches of at most so many rows as the call's `batch_size` says."""
        for own in chunks(made, self.call.options.batch_size):
            yield self.batch(list(own))

    def batch(self, made: list[Made]) -> Batch:
        """Stacks rows into a batch, and chooses the rule and what is suppressed."""
        # A template may leave nothing to denoise: its texts were chosen.
        ready = [(one.row, _given(one.sequence)) for one in made if not self._is_open(one)]
        made = [one for one in made if self._is_open(one)]
        rows = [one.row for one in made]
        if not rows:
            return Batch({}, [], None, (), None, ready)

        groups = [one.group for one in made]
        sequences = [one.sequence for one in made]
        inputs = inputs_of(self.call.processor, groups, sequences, self.call.task)
        is_shared = (
            self.call.is_seen
            or self.call.templates is not None
            or len({id(group) for group in groups}) < len(groups)
        )
        trunks = [group.trunks for group in groups] if is_shared else None
        if self.call.templates is not None:
            rule, suppressed = self._template_settings(rows)
        else:
            rule, suppressed = settings(self.model, self.call)
        return Batch(inputs, rows, rule, suppressed, trunks, ready)

    def _is_open(self, made: Made) -> bool:
        ids = made.sequence.ids
        return any(ids[i] == self.mask_id for slot in made.sequence.slots for i in slot)

    def _template_settings(self, rows: list[Row]) -> tuple[Rule | Blockwise, tuple[int, ...]]:
        """Chooses the rule for the fields of templates, and the ids that none may hold."""
        filled = [one for row in rows for one in row.templates or ()]
        length = max(one.slot.ids.count(self.mask_id) for one in filled)
        options, config = self.call.options, self.model.config
        if self.call.task == "captions":
            rule: Rule | Blockwise = options.region_rule(scope_of(config), None, length)
        else:
            rule = options.answer_rule(length, None, per_token=True)

        tokenizer, vocabulary = self.call.processor.tokenizer, config.text_config.vocab_size
        ids = self._encoder.suppressed(any(one.template.keys is not None for one in filled))
        suppressed = {*ids, *range(len(tokenizer), vocabulary), *(options.suppress_tokens or ())}
        if len(suppressed) >= vocabulary:
            raise ValueError("expected suppress_tokens to leave a token for the fields, got all")
        return rule, tuple(sorted(suppressed))


def chunks(items: Sequence, size: int | None) -> list[Sequence]:
    """Cuts a sequence into pieces of at most `size` items; None: into one piece."""
    size = size or max(len(items), 1)
    return [items[i : i + size] for i in range(0, len(items), size)]


def scope_of(config) -> str:
    """Says whose positions re-masking ranks together."""
    return "region" if config.region_layout == "independent" else "image"


def settings(model, call: Call) -> tuple[Rule | Blockwise, tuple[int, ...]]:
    """Chooses the rule for whole captions or answers, and the ids that are suppressed in them."""
    options, eot = call.options, model.config.eot_token_id
    suppressed = tuple(options.suppress_tokens or ())
    if call.task == "captions":
        return options.region_rule(scope_of(model.config), eot), suppressed
    rule = options.answer_rule(options.max_new_tokens, eot)
    stops: tuple[tuple[int, ...], ...] = ()
    if options.stop_strings:
        stops = stop_sequences(options, call.processor or model._saved_processor())
    if isinstance(rule, Blockwise):
        # A block is left when all of it is decoded, so the mask token is no choice.
        return replace(rule, stops=stops), (*suppressed, model.config.mask_token_id)
    return StopAt(rule, stops) if stops else rule, suppressed


def stop_sequences(options: DiffusionOptions, processor) -> tuple[tuple[int, ...], ...]:
    """Encodes each stop string to token ids."""
    encoded = (
        processor.tokenizer(stop, add_special_tokens=False)["input_ids"]
        for stop in options.stop_strings or ()
    )
    return tuple(map(tuple, encoded))


def _combined(filled: list[list[FilledTemplate]], places: list[Place]):
    """Yields templates for each row, and the places that the row answers for.

    Row j has combination j of each response's lengths. One that has fewer combinations stands in
    further rows with its last, for nobody.
    """
    for j in range(max(map(len, filled))):
        own = [combinations[min(j, len(combinations) - 1)] for combinations in filled]
        kept = [
            place if j < len(combinations) else None
            for place, combinations in zip(places, filled, strict=True)
        ]
        yield own, kept


def _given(sequence: TokenSequence) -> Denoised:
    """Returns what stands in a sequence's responses."""
    ids = [[sequence.ids[i] for i in slot] for slot in sequence.slots]
    return Denoised(ids, [[None] * len(own) for own in ids], 0)
