"""What a call of `diffusion_generate` returns, put together from the rows that were denoised.

A row is one sequence of a batch. It holds one response or more, each of which belongs to a place:
(image, region) or (question, 0). Where several rows answer for one place, as with the lengths of a
template's fields or several candidates, the likeliest is kept.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .generation_templates import Template, TemplateEncoder, TemplateSlot
from .processing_sequence import response_length

Place = tuple[int, int]


@dataclass
class Candidate:
    """Holds one of several responses for the same region or question.

    Attributes:
        text: None where there is no processor to decode it.
        token_ids: as in the output.
        score: as in the output.
    """

    text: str | None
    token_ids: list[int]
    score: float | None


@dataclass
class DiffusionOutput:
    """Holds captions or answers, and what they took.

    Attributes:
        texts: for each image the text of each region, in the order of the masks given; for
            questions one text each. None where there is no processor to decode them.
        token_ids: the same nesting, each a list of caption_length or max_new_tokens ids.
        num_forwards: forward passes, summed over region groups; running groups together in a batch
            does not change it. Those that choose among a template's texts count too.
        lengths: nested as the texts, the tokens of each response before its end: end-of-turn,
            end-of-text or a stop string.
        forward_passes: nested alike, those of the region group that each response was in.
        image_forwards: forward passes of each image or question, summed over its region groups.
        scores: nested alike, how sure the model is: the mean log-probability, in nats, of the
            response's tokens up to its end, that one included, each at the step that committed it;
            with a template, of the tokens in its fields. None where no token was denoised.
        token_scores: nested alike, on request: the log-probability of each of those tokens; None
            for a token that was given.
        fields: nested alike, with a template: the values of its fields.
        candidates: nested alike, with `num_return_sequences`: all responses, the likeliest first.
        history: after each step the token ids, nested alike, on request.
    """

    texts: list[list[str]] | None
    token_ids: list[list[list[int]]]
    num_forwards: int
    lengths: list[list[int]] = field(default_factory=list)
    forward_passes: list[list[int]] = field(default_factory=list)
    image_forwards: list[int] = field(default_factory=list)
    scores: list[list[float | None]] = field(default_factory=list)
    token_scores: list[list[list[float | None]]] | None = field(default=None, repr=False)
    fields: list[list[list | dict]] | None = None
    candidates: list[list[list[Candidate]]] | None = field(default=None, repr=False)
    history: list[list[list[list[int]]]] = field(default_factory=list, repr=False)

    @property
    def tokens_per_forward(self) -> float:
        """Returns TPF as published: response tokens, padding counted, over forward passes."""
        tokens = sum(len(ids) for response in self.token_ids for ids in response)
        return tokens / self.num_forwards if self.num_forwards else 0.0

    def to_dict(self) -> dict:
        """Returns plain lists and numbers, ready for JSON."""
        return {**dataclasses.asdict(self), "tokens_per_forward": self.tokens_per_forward}


@dataclass
class FilledTemplate:
    """Says what a row's response has of a template.

    Attributes:
        template, slot: the template, and its token ids at the row's lengths.
        chosen: the texts that were chosen for its fields of texts, by the field's number.
        log_probs: of those texts' tokens.
    """

    template: Template
    slot: TemplateSlot
    chosen: dict[int, str] = field(default_factory=dict)
    log_probs: list[float] = field(default_factory=list)


class Row(NamedTuple):
    """Says whose the responses of one sequence are.

    Attributes:
        places: (image, region) or (question, 0) of each response, in the sequence's order; None
            for one that another row has already.
        owners: the images or questions that the sequence's forward passes are counted for.
        key: tells the row from all others of the call, for what it draws.
        candidate: its number among `num_return_sequences`.
        templates: what each response has of a template; None without one.
        spent: forward passes that choosing among its templates' texts has taken.
    """

    places: list[Place | None]
    owners: list[int]
    key: tuple[int, ...]
    candidate: int = 0
    templates: list[FilledTemplate] | None = None
    spent: int = 0


class Denoised(NamedTuple):
    """Holds what became of one row.

    Attributes:
        token_ids: of each response; given tokens included.
        log_probs: of each token at the step that committed it; None for given tokens.
        forwards: forward passes.
    """

    token_ids: list[list[int]]
    log_probs: list[list[float | None]]
    forwards: int


class Response(NamedTuple):
    """Holds one response to a place, read from a row."""

    token_ids: list[int]
    length: int
    score: float | None
    token_scores: list[float | None]
    forwards: int
    candidate: int
    template: FilledTemplate | None


def nest(counts: Sequence[int], values: dict[Place, object]) -> list[list]:
    """Puts the values of places where the caller expects them, None where there is none yet."""
    return [[values.get((i, k)) for k in range(count)] for i, count in enumerate(counts)]


class OutputBuilder:
    """Puts the rows of one call together.

    Args:
        counts: the responses of each image or question.
        processor: decodes texts; None: there are none.
        ends: sequences of ids that end a response.
        stop_strings: texts that end one.
    """

    def __init__(self, counts: Sequence[int], processor, ends, stop_strings: Sequence[str]):
        self.counts = counts
        self.processor = processor
        self.ends = ends
        self.stop_strings = stop_strings
        self.responses: dict[Place, list[Response]] = {}
        self.forwards = [0] * len(counts)
        self.num_forwards = 0

    def add(self, row: Row, denoised: Denoised):
        """Takes what became of a row."""
        forwards = row.spent + denoised.forwards
        self.num_forwards += forwards
        for owner in row.owners:
            self.forwards[owner] += forwards
        for j, place in enumerate(row.places):
            if place is not None:
                template = row.templates[j] if row.templates is not None else None
                self.responses.setdefault(place, []).append(
                    self._response(row, denoised, j, template)
                )

    def _response(
        self, row: Row, denoised: Denoised, j: int, template: FilledTemplate | None
    ) -> Response:
        ids, log_probs = denoised.token_ids[j], denoised.log_probs[j]
        length = response_length(ids, self.ends)
        token_scores = log_probs[: length + 1]  # the token that ends it, too
        known = [value for value in token_scores if value is not None]
        if template is not None:
            known += template.log_probs
        score = sum(known) / len(known) if known else None
        return Response(
            ids, length, score, token_scores, denoised.forwards, row.candidate, template
        )

    def output(
        self, with_token_scores: bool, num_candidates: int, history: list
    ) -> DiffusionOutput:
        """Returns the likeliest response of each place, and what all of them took."""
        ranked = {place: _ranked(own) for place, own in self.responses.items()}
        best = {place: own[0] for place, own in ranked.items()}

        def values(read) -> list[list]:
            return nest(self.counts, {place: read(own) for place, own in best.items()})

        has_templates = any(own.template is not None for own in best.values())
        return DiffusionOutput(
            texts=None if self.processor is None else values(self._text),
            token_ids=values(lambda own: own.token_ids),
            num_forwards=self.num_forwards,
            lengths=values(lambda own: own.length),
            forward_passes=values(lambda own: own.forwards),
            image_forwards=self.forwards,
            scores=values(lambda own: own.score),
            token_scores=values(lambda own: own.token_scores) if with_token_scores else None,
            fields=values(self._fields) if has_templates else None,
            candidates=self._candidates(ranked) if num_candidates > 1 else None,
            history=history,
        )

    def _candidates(self, ranked: dict[Place, list[Response]]) -> list[list]:
        def all_of(own: list[Response]) -> list[Candidate]:
            return [Candidate(self._text(one), one.token_ids, one.score) for one in own]

        return nest(self.counts, {place: all_of(own) for place, own in ranked.items()})

    def _text(self, response: Response) -> str | None:
        """Decodes a response up to its end; fills a template's fields."""
        if self.processor is None:
            return None
        if response.template is not None:
            return response.template.template.text(self._values(response))
        text = self.processor.decode_answer(response.token_ids[: response.length])
        for stop in self.stop_strings:  # those that the tokenizer splits otherwise in context
            text = text.split(stop)[0].strip()
        return text

    def _fields(self, response: Response) -> list | dict:
        assert response.template is not None  # or there are no fields
        return response.template.template.named(self._values(response))

    def _values(self, response: Response) -> list[str]:
        processor, filled = self.processor, response.template
        assert filled is not None
        encoder = TemplateEncoder(
            processor.tokenizer, processor.mask_token_id, processor.eot_token_id
        )
        return encoder.values(filled.template, filled.slot, response.token_ids, filled.chosen)


def _ranked(responses: list[Response]) -> list[Response]:
    """Keeps the likeliest response of each candidate, and sorts them; the first of equals first."""

    def likelihood(response: Response) -> float:
        return -float("inf") if response.score is None else response.score

    by_candidate: dict[int, Response] = {}
    for response in responses:
        known = by_candidate.get(response.candidate)
        if known is None or likelihood(response) > likelihood(known):
            by_candidate[response.candidate] = response
    return sorted(by_candidate.values(), key=likelihood, reverse=True)


# Calls that caption some images and answer questions about others.


class Part(NamedTuple):
    """Holds what one part of a call gave: for which images, and what."""

    images: list[int]
    output: DiffusionOutput


def merge_parts(parts: Sequence[Part], count: int) -> DiffusionOutput:
    """Puts the parts of a call about `count` images together."""

    def merged(name: str):
        values: list = [None] * count
        for part in parts:
            own = getattr(part.output, name)
            if own is None:
                return None
            for i, value in zip(part.images, own, strict=True):
                values[i] = value
        return values

    names = [one.name for one in dataclasses.fields(DiffusionOutput)]
    nested = {name: merged(name) for name in names if name not in ("num_forwards", "history")}
    history: list[list] = []
    done: list[tuple[list[int], list]] = []
    for part in parts:
        history += [_placed([*done, (part.images, step)], count) for step in part.output.history]
        done.append((part.images, part.output.token_ids))
    total = sum(part.output.num_forwards for part in parts)
    return DiffusionOutput(**nested, num_forwards=total, history=history)


def part_listener(callback, parts: Sequence[Part], images: list[int], count: int):
    """Makes the callback of one part of a call; `parts` are those that were done before."""
    if callback is None:
        return None

    def listen(step: int, nested: list):
        done = [(part.images, part.output.token_ids) for part in parts]
        callback(step, _placed([*done, (images, nested)], count))

    return listen


def _placed(pieces: Sequence[tuple[list[int], list]], count: int) -> list:
    """Puts the values of some images where they belong; an empty list where nothing has begun."""
    values: list = [[] for _ in range(count)]
    for images, own in pieces:
        for i, value in zip(images, own, strict=True):
            values[i] = value
    return values
