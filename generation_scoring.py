"""How likely given texts are: `diffusion_score`, by bounds of masked-diffusion likelihoods.

    log p(r | prompt) >= E_l E_m [ (n / l) sum_{i in m} log p(r_i | prompt, r with m masked) ]

Here n is the response's length, l is uniform over 1 ... n, and m is l of its positions, every
choice of them equally likely (equation 6 of LLaDA, arXiv:2502.09992). With all positions masked in
one forward pass the sum is the response's pseudo-likelihood, cheaper and of less worth.

Shapes: I items, that is, a text for a region or question each; S draws of an item, n positions of
its response, V vocabulary.
"""

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch

from .configuration_perceptiondlm import PerceptionDLMConfig
from .generation_cache import ForwardPass, ResponseNetwork
from .generation_loop import answered
from .generation_options import DiffusionOptions, integer, one_of
from .generation_seen import SeeingMixin, Seen, SeenGroup, expect_seen_by, inputs_of, plan_groups
from .generation_templates import Template, TemplateEncoder
from .image_loading import describe
from .image_processing_perceptiondlm import pair_images, pair_masks
from .modeling_language import fastest_linear
from .processing_perceptiondlm import pair_prompts
from .processing_sequence import TokenSequence, encode_text

METHODS = ("monte_carlo", "one_pass")
ROWS_AT_ONCE = 8  # sequences in one forward pass, where the caller does not say


class Item(NamedTuple):
    """Holds one text for one region or question.

    Attributes:
        group: what was seen.
        sequence: in which the text's positions are masked.
        columns: of those positions in the sequence.
        target: the text's token ids.
    """

    group: SeenGroup
    sequence: TokenSequence
    columns: Sequence[int]
    target: list[int]


def masked_counts(
    length: int, samples: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draws how many positions each sample masks, int64 (samples,) in 1 ... length.

    The counts are spaced evenly from a random start, going on at 1 after the last. Each is uniform,
    and the mean over them varies less than that of independent draws.
    """
    start = torch.rand((), generator=generator, dtype=torch.float64)
    places = (start + torch.arange(samples, dtype=torch.float64) / samples) % 1.0
    return (places * length).long().clamp(max=length - 1) + 1


def draw_masks(
    counts: torch.Tensor, length: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draws bool (S, length) with `counts` (S,) positions set, all choices equally likely."""
    order = torch.rand(len(counts), length, generator=generator, dtype=torch.float64).argsort(-1)
    return order.argsort(-1) < counts[:, None]


def bound_terms(logits: torch.Tensor, target: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Estimates the bound from each sample, float64 (S,), in nats.

    Args:
        logits: (S, n, V) of the response with the masked positions masked.
        target: int64 (n,), the response.
        masked: bool (S, n), one position or more in each sample.
    """
    chosen = logits.double().log_softmax(-1).gather(-1, target.expand(len(logits), -1)[..., None])
    weights = target.shape[0] / masked.sum(-1)
    return weights * (chosen[..., 0] * masked).sum(-1)


def scoring_items(
    model,
    processor,
    items: Sequence[Item],
    masks: Sequence[torch.Tensor],
    batch_size: int = ROWS_AT_ONCE,
    task: str = "captions",
) -> Generator[ForwardPass, torch.Tensor, list[torch.Tensor]]:
    """Estimates the bound of each item from each of its draws, float64 (S,) each.

    It stops for each forward pass, whose logits it takes (`answered` runs them one by one).

    Args:
        items: as many as there are `masks`.
        masks: bool (S, n), the positions of each item's text that are masked; S is the same for
            all.
        batch_size: sequences in one forward pass.
        task: "captions" or "answers".
    """
    terms: list[list[torch.Tensor]] = [[] for _ in items]
    for first in range(0, len(items), batch_size):
        chunk = range(first, min(first + batch_size, len(items)))
        groups = [items[i].group for i in chunk]
        inputs = inputs_of(processor, groups, [items[i].sequence for i in chunk], task)
        inputs = {k: v.to(model.device) for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        trunks = [group.trunks for group in groups]

        # The prompt is computed once, for all draws of its responses.
        network, repeats = None, max(1, batch_size // len(chunk))
        for draws in zip(*(masks[i].split(repeats) for i in chunk), strict=True):
            if network is None or len(draws[0]) != repeats:
                repeats = len(draws[0])
                network = ResponseNetwork(model, inputs, trunks=trunks, repeats=repeats)
            found = yield from _scoring_draws(network, [items[i] for i in chunk], draws)
            for i, own in zip(chunk, found, strict=True):
                terms[i].append(own)
    return [torch.cat(own) for own in terms]


def _scoring_draws(
    network: ResponseNetwork, items: Sequence[Item], draws: Sequence[torch.Tensor]
) -> Generator[ForwardPass, torch.Tensor, list[torch.Tensor]]:
    """Asks for one forward pass; returns each item's terms, float64 (S,)."""
    ids = network.response_ids.clone()  # (I * S, A), all texts masked
    S, n = len(draws[0]), max(len(item.target) for item in items)
    columns = torch.zeros(len(items) * S, n, dtype=torch.int64, device=ids.device)
    rows = [slice(i * S, (i + 1) * S) for i in range(len(items))]

    # What is not masked is shown.
    for row, item, masked in zip(rows, items, draws, strict=True):
        own = torch.tensor(item.columns, device=ids.device) - item.sequence.prompt_length
        columns[row, : len(own)] = own
        target = torch.tensor(item.target, device=ids.device).expand(S, -1)
        ids[row, own] = torch.where(masked.to(ids.device), ids[row, own], target)
    (logits,) = (yield ForwardPass(network, ids, columns[:, None], 0)).unbind(1)  # (I * S, n, V)

    return [
        bound_terms(
            logits[row, : len(item.target)],
            torch.tensor(item.target, device=logits.device),
            masked.to(logits.device),
        ).cpu()
        for row, item, masked in zip(rows, items, draws, strict=True)
    ]


class ScoringMixin(SeeingMixin):
    """Gives `diffusion_score` to a model."""

    config: PerceptionDLMConfig

    @torch.no_grad()
    def diffusion_score(
        self,
        images,
        masks=None,
        texts=None,
        *,
        prompts=None,
        method: str = "monte_carlo",
        samples: int = 128,
        seed: int = 0,
        length: int | None = None,
        batch_size: int = ROWS_AT_ONCE,
        processor=None,
    ) -> list[list]:
        """Says how likely given texts are as responses, in nats.

        So "which region is the striped mug" is one text for all regions, and a choice among labels
        a list of texts for a region.

        Args:
            images, masks, prompts, processor: as for `diffusion_generate`; without masks, prompts
                are the questions that the texts answer.
            texts: one for all regions, or nested as the masks: for each region (or question) one,
                or a list of them.
            method: "monte_carlo" averages the bound over `samples` draws; "one_pass" masks all
                positions in one forward pass.
            seed: of the draws; texts of equal length see the same.
            length: each text is padded with end-of-turn to so many tokens, which count too
                (default: those of the checkpoint's captions or answers); 0: the text and one
                end-of-turn.
            batch_size: sequences in one forward pass.

        Returns, nested as `DiffusionOutput.texts`, a bound for each text: a number, or a list of
        them where a list was given. Raises ValueError for inputs that do not fit together.
        """
        one_of(*METHODS)("method", method)
        integer(1)("samples", samples)
        integer(1)("batch_size", batch_size)
        integer(0)("seed", seed)
        fastest_linear(self)  # type: ignore[arg-type]
        processor = processor or self._saved_processor()
        self._check_processor(processor)

        # What is asked about, and the texts for each.
        has_masks = images.counts is not None if isinstance(images, Seen) else masks is not None
        task = "captions" if has_masks else "answers"
        defaults = DiffusionOptions.build(self.decoding_defaults, {}, task)  # type: ignore[attr-defined]
        usual = defaults.caption_length if has_masks else defaults.max_new_tokens
        if length is None:
            length = usual
        integer(0)("length", length)
        if has_masks:
            places, counts = self._asked_regions(images, masks, prompts, processor)
        else:
            places, counts = self._asked_images(images, prompts, processor)
        is_single = has_masks and not isinstance(images, (list, tuple)) and len(counts) == 1
        given = pair_texts(texts, counts, is_single, not has_masks)

        # One sequence for each text.
        items, owners = [], []
        for place, make in places.items():
            own = given[place[0]][place[1]]
            for text in [own] if isinstance(own, str) else own:
                target = self._target(text, length, processor)
                items.append(make(target))
                owners.append(place)
        masks_of = [_draws(len(item.target), method, samples, seed) for item in items]
        steps = scoring_items(self, processor, items, masks_of, batch_size, task)
        found = answered(steps, ForwardPass.run)

        scores: list[list] = [[[] for _ in range(count)] for count in counts]
        for (i, k), terms in zip(owners, found, strict=True):
            scores[i][k].append(float(terms.mean()))
        return [
            [
                own[0] if isinstance(text, str) else own
                for own, text in zip(row, texts_of, strict=True)
            ]
            for row, texts_of in zip(scores, given, strict=True)
        ]

    def _target(self, text: str, length: int, processor) -> list[int]:
        ids = encode_text(processor.tokenizer, text)
        if length and len(ids) > length:
            raise ValueError(
                f"expected a text of at most {length} tokens, got {len(ids)}: {text[:80]!r}"
            )
        return ids + [processor.eot_token_id] * (length - len(ids) if length else 1)

    def _asked_regions(self, images, masks, prompts, processor):
        """Sees the regions; returns for each place what makes its item, and how many there are."""
        is_single = not isinstance(images, (list, tuple))
        if isinstance(images, Seen):
            expect_seen_by(images, self)
            groups, asked = images.groups, images.chosen or []
        else:
            images, masks = pair_masks(images, masks)
            asked = [list(range(len(own))) for own in masks]
            plan = plan_groups([len(own) for own in masks], self.config.num_region_prompts)
            groups = self._see_regions(plan, images, masks, processor)
        counts = [len(own) for own in asked]
        instructions = pair_prompts(prompts, counts, is_single and len(counts) == 1)

        places = {}
        for i, chosen in enumerate(asked):
            for k, mask in enumerate(chosen):
                group = next(g for g in groups if g.images == [i] and mask in g.masks)
                own = instructions[i]
                asks = own[k] if isinstance(own, list) else own
                is_own = isinstance(own, list)
                places[i, k] = self._region_item(group, mask, asks, is_own, processor)
        return places, counts

    def _region_item(self, group: SeenGroup, mask: int, text: str | None, is_own: bool, processor):
        """Makes a function of a text's ids to the item of one region."""
        region = group.order.index(mask)
        is_tree = self.config.region_layout == "independent"
        instruction = {k: text for k in group.order} if is_own else text

        def make(target: list[int]) -> Item:
            # A branch for the region alone; jointly all regions, the others' captions masked.
            regions = [region] if is_tree else None
            slot = [self.config.mask_token_id] * len(target)
            slots = [slot] * (1 if is_tree else len(group.order))
            sequence = processor.region_sequence(
                group.geometry, 0, slots, instruction, regions=regions
            )
            columns = sequence.slots[0 if is_tree else region]
            return Item(group, sequence, columns, target)

        return make

    def _asked_images(self, images, prompts, processor):
        """Sees the images of questions; returns for each what makes its item, and their counts."""
        if prompts is None:
            raise ValueError("expected masks, or prompts that the texts answer, got neither")
        prompts = [prompts] if is_one_prompt(prompts) else list(prompts)
        if isinstance(images, Seen):
            expect_seen_by(images, self)
            groups = pair_seen(images, len(prompts))
        else:
            groups = self._see_images(pair_images(images, len(prompts)), processor)

        places = {}
        for i, (group, prompt) in enumerate(zip(groups, prompts, strict=True)):
            count = len(group.geometry["image_grids"]) if group.geometry else 0
            (text,) = processor.render_questions([[None] * count], [prompt])

            def make(target: list[int], group=group, text=text) -> Item:
                slot = [self.config.mask_token_id] * len(target)
                sequence = processor.chat_sequence(text, group.geometry, slot=slot)
                return Item(group, sequence, sequence.slots[0], target)

            places[i, 0] = make
        return places, [1] * len(prompts)


def choosing_texts(
    model,
    processor,
    template: Template,
    encoder: TemplateEncoder,
    group: SeenGroup,
    build: Callable[[list[int]], tuple[TokenSequence, int]],
) -> Generator[ForwardPass, torch.Tensor, tuple[dict[int, str], list[float]]]:
    """Chooses the likeliest text of each of a template's fields of texts, one after another.

    It stops for each forward pass, whose logits it takes.

    Each text is judged by the mean log-probability of its tokens, all of them masked together,
    beside masks in the fields that are still open, at their shortest.

    Args:
        build: makes the sequence of the template's token ids, and says which of its responses
            they are.

    Returns the texts by the fields' numbers, and their tokens' log-probabilities.
    """
    chosen: dict[int, str] = {}
    log_probs: list[float] = []
    shortest = [
        min(len(encoder.choice_ids(template, k, c)) for c in own.choices) if own.choices else n
        for k, (own, n) in enumerate(zip(template.fields, template.lengths()[0], strict=True))
    ]
    for k, own in enumerate(template.fields):
        if not own.choices:
            continue
        items = []
        for choice in own.choices:
            target = encoder.choice_ids(template, k, choice)
            slot = encoder.slot(template, [*shortest[:k], len(target), *shortest[k + 1 :]], chosen)
            sequence, j = build(slot.ids)
            span, start = slot.spans[k], sequence.slots[j].start
            columns = range(start + span.start, start + span.stop)
            items.append(Item(group, sequence, columns, target))

        masks = [torch.ones(1, len(item.target), dtype=torch.bool) for item in items]
        found = yield from scoring_items(model, processor, items, masks)
        means = [float(s) / len(item.target) for s, item in zip(found, items, strict=True)]
        best = max(range(len(means)), key=means.__getitem__)
        chosen[k] = own.choices[best]
        log_probs += [means[best]] * len(items[best].target)
    return chosen, log_probs


def _draws(length: int, method: str, samples: int, seed: int) -> torch.Tensor:
    """Draws which positions of a text are masked, bool (S, length)."""
    if method == "one_pass":
        return torch.ones(1, length, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    return draw_masks(masked_counts(length, samples, generator), length, generator)


def is_one_prompt(prompts) -> bool:
    """Tells whether this is one prompt, a text or a conversation, and no list of them.

    Raises ValueError for anything that is neither.
    """
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValueError(
            f"expected a question, a conversation or a list of them, got {describe(prompts)}"
        )
    if all(isinstance(message, dict) for message in prompts):
        return True
    for prompt in prompts:
        turns = prompt if isinstance(prompt, (list, tuple)) else [prompt]
        is_text = isinstance(prompt, str)
        if not (is_text or turns and all(isinstance(turn, dict) for turn in turns)):
            raise ValueError(
                f"expected each prompt as a text or a list of messages, got {describe(prompt)}"
            )
    return False


def pair_seen(seen: Seen, count: int) -> list[SeenGroup]:
    """Pairs each of `count` prompts with the image that was seen: one for all, or one for each."""
    if len(seen.groups) not in (1, count):
        raise ValueError(
            f"expected one image that was seen, or one for each of {count} prompts, got"
            f" {len(seen.groups)}"
        )
    return seen.groups * count if len(seen.groups) == 1 else seen.groups


def pair_texts(
    texts, counts: Sequence[int], is_single: bool, are_questions: bool
) -> list[list[str | list[str]]]:
    """Pairs each region or question with its text or texts.

    Args:
        texts: one for all, or nested as the regions; a question's is its entry itself.
        counts: the regions of each image, or 1 for each question.
        is_single: there is one image, which needs no outer list.
        are_questions: they belong to questions.

    Raises ValueError for texts that are nested otherwise.
    """
    if isinstance(texts, str):
        return [[texts] * count for count in counts]
    if not isinstance(texts, (list, tuple)):
        raise ValueError(f"expected texts to score, got {describe(texts)}")
    nested = [[own] for own in texts] if are_questions else list(texts)
    if is_single and (len(nested) != 1 or len(nested) == counts[0] and not _is_deep(nested[0])):
        nested = [nested]
    if len(nested) != len(counts):
        raise ValueError(f"expected texts for {len(counts)} images or prompts, got {len(nested)}")

    for own, count in zip(nested, counts, strict=True):
        if not isinstance(own, (list, tuple)) or len(own) != count:
            got = len(own) if isinstance(own, (list, tuple)) else describe(own)
            raise ValueError(f"expected a text, or a list, for each of {count} regions, got {got}")
        for one in own:
            candidates = [one] if isinstance(one, str) else one
            if not isinstance(candidates, (list, tuple)) or not candidates:
                raise ValueError(f"expected a text or a list of texts, got {describe(one)}")
            if not all(isinstance(text, str) for text in candidates):
                raise ValueError(f"expected texts to score, got {describe(one)}")
    return [list(own) for own in nested]


def _is_deep(own) -> bool:
    """Tells whether an entry holds the texts of several regions, or of one in a list."""
    return isinstance(own, (list, tuple)) and any(isinstance(one, (list, tuple)) for one in own)
