"""Decoding rules: which response positions are committed, or masked again, after a forward pass.

A rule is a small frozen object whose `commit` takes a `Prediction` and a `State` and returns the
next `State`; it knows nothing of the network. `Adaptive` is a rule that leaves to an acceptance,
`Threshold` or another of `ACCEPT_RULES`, which candidates are good enough. CONTRIBUTING.md says how
to add either.

Shapes: B rows, G groups of response positions in a row (a region's caption each, or one answer),
n positions a group, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch


@dataclass
class State:
    """Holds the response positions during denoising.

    Attributes:
        tokens: int64 (B, G, n), the mask token where `masked`.
        masked: bool (B, G, n), still to be filled; never read off token ids.
        valid: bool (B, G, n), false for groups that only pad the batch.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    valid: torch.Tensor


@dataclass
class Prediction:
    """Holds what one forward pass says about every response position.

    Attributes:
        logits: (B, G, n, V), float32 or float64, filtered; None where no rule reads them.
        tokens: int64 (B, G, n), the candidate of each position.
        confidence: float64 (B, G, n), by which positions are ranked.
        log_probs: float64 (B, G, n), of the candidates, in nats; None where nobody asks.
    """

    logits: torch.Tensor | None
    tokens: torch.Tensor
    confidence: torch.Tensor
    log_probs: torch.Tensor | None = None

    def entropy(self) -> torch.Tensor:
        """Returns the entropy of each position in nats, (B, G, n)."""
        assert self.logits is not None  # for a rule that says `uses_logits`
        log_probs = self.logits.double().log_softmax(-1)
        return -(log_probs.exp() * log_probs.masked_fill(log_probs.isinf(), 0)).sum(-1)


class Rule(Protocol):
    """Describes what the denoising loop asks of a rule.

    Attributes:
        steps: how many predictions the rule takes at most.
        adaptive: whether it may finish earlier, so that the loop has to look (which costs one
            synchronization with the device a step).
        uses_logits: whether it reads more of a prediction than candidates and confidence.
    """

    @property
    def steps(self) -> int: ...

    @property
    def adaptive(self) -> bool: ...

    @property
    def uses_logits(self) -> bool: ...

    def commit(self, step: int, prediction: Prediction, state: State, mask_token_id: int) -> State:
        """Returns the state after prediction number `step` (0-based)."""
        ...


def probability_of(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Returns the softmax probability, float64 (B, G, n), of each position's token.

    `logits` are (B, G, n, V). The value is `1 / (1 + others)`, with the others' sum taken by
    itself: so float32 logits tell probabilities apart, however near to 1, as well as a softmax in
    float64 does.
    """
    # Odds of all other tokens against this one.
    index = tokens[..., None]
    odds = (logits - logits.gather(-1, index)).exp_().scatter_(-1, index, 0)
    return 1 / (1 + odds.sum(-1, dtype=torch.float64))


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks the values along the last axis, the smallest 0, equals by position."""
    # A stable sort: equals keep their order.
    order = values.argsort(dim=-1, stable=True)
    places = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def largest(values: torch.Tensor, eligible: torch.Tensor, count) -> torch.Tensor:
    """Marks the `count` largest eligible values along the last axis, equals by position.

    `count` is a number, or int (B, G, 1). Returns bool, of the shape of `values`.
    """
    ranked = ranks((-values).masked_fill(~eligible, torch.inf))
    return eligible & (ranked < count)


def fill(state: State, chosen: torch.Tensor, tokens: torch.Tensor) -> State:
    """Commits the chosen positions, bool (B, G, n), with the given tokens."""
    return replace(
        state, tokens=torch.where(chosen, tokens, state.tokens), masked=state.masked & ~chosen
    )


def before_end(state: State, sequences: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Marks, bool (B, G, n), the positions before the first committed one of some sequences.

    This one function decides where a response ends: at its end-of-turn, or at a stop string.
    """
    n = state.tokens.shape[-1]
    first = torch.full_like(state.tokens[..., :1], n)
    places = torch.arange(n, device=state.tokens.device)

    # The earliest place at which one of them stands whole and committed.
    for sequence in sequences:
        width = len(sequence)
        if width > n:
            continue
        wanted = torch.tensor(sequence, device=state.tokens.device)
        found = (state.tokens.unfold(-1, width, 1) == wanted).all(-1)
        found &= ~state.masked.unfold(-1, width, 1).any(-1)  # (B, G, n - width + 1)
        starts = places[: n - width + 1].expand_as(found).masked_fill(~found, n)
        first = torch.minimum(first, starts.amin(-1, keepdim=True))
    return places < first


@dataclass(frozen=True)
class RemaskLowConfidence:
    """Fills everything, then masks the least confident positions again (the released region rule).

    After step s of S, exactly the `int(N (S - 1 - s) / S)` positions of lowest confidence are
    masked again, committed or not. The mask token is committed like any other: a position filled
    with it is filled anew only when its confidence puts it among those.

    Attributes:
        steps: S.
        scope: "image" ranks the N positions of all captions of a row together; "region" ranks
            each caption's own, so that captions do not influence each other.
        per_token: S is at most the positions of a caption, the longest of those ranked together:
            one step for each token, where responses of several lengths run together.
    """

    steps: int
    scope: str = "image"
    per_token: bool = False
    adaptive = False
    uses_logits = False

    def commit(self, step: int, prediction: Prediction, state: State, mask_token_id: int) -> State:
        """Returns the state after prediction number `step` (0-based)."""
        B, G, n = state.tokens.shape
        ranked_together = (B, 1, G * n) if self.scope == "image" else (B, G, n)
        valid = state.valid.view(ranked_together)

        # How many of each caption, or of all captions of a row, are masked again.
        total = valid.sum(-1, keepdim=True).double()
        steps: int | torch.Tensor = self.steps
        if self.per_token:
            lengths = state.valid.sum(-1).view(B, -1, G if self.scope == "image" else 1)
            steps = lengths.amax(-1, keepdim=True).double().clamp(min=1)  # (B, 1 or G, 1)
        count = (total * ((steps - 1 - step) / steps)).long()

        confidence = prediction.confidence.view(ranked_together).masked_fill(~valid, torch.inf)
        masked = ((ranks(confidence) < count) & valid).view(B, G, n)
        # Fill first, then mask: a position may be filled and masked again in one step.
        tokens = torch.where(state.masked, prediction.tokens, state.tokens)
        return replace(state, tokens=tokens.masked_fill(masked, mask_token_id), masked=masked)


@dataclass(frozen=True)
class SemiAutoregressive:
    """Decodes block after block, in each the most confident positions first (LLaDA's rule).

    Each of a block's `steps / blocks` steps commits `floor(n / steps)` positions, and one more in
    the first `n mod steps`; what is committed stays. A position for which the mask token is chosen
    is not committed but decoded again, in its block's steps or later ones, as in LLaDA's and
    LLaDA-V's code, which tell masked positions by their token.
    """

    steps: int
    block_length: int
    blocks: int
    adaptive: bool = False  # True: rows may come to it that have nothing to decode
    uses_logits = False

    def commit(self, step: int, prediction: Prediction, state: State, mask_token_id: int) -> State:
        """Returns the state after prediction number `step` (0-based)."""
        # How many positions this step commits.
        steps = self.steps // self.blocks
        quota = self.block_length // steps + (step % steps < self.block_length % steps)

        # Positions up to the end of the present block.
        places = torch.arange(state.tokens.shape[-1], device=state.tokens.device)
        eligible = state.masked & (places < (step // steps + 1) * self.block_length)
        chosen = largest(prediction.confidence, eligible, quota)
        return fill(state, chosen & (prediction.tokens != mask_token_id), prediction.tokens)


class Accept(Protocol):
    """Describes an acceptance, which `Adaptive` asks what to commit.

    It is built of one number, `value`, which has a default. Called with a prediction and the
    eligible positions, bool (B, G, n): those that are masked in the first unfinished block. It
    returns those of them that are good enough, bool (B, G, n). The prediction's logits are there,
    and filtered: what may not be chosen is -inf. Its candidates are the likeliest tokens or, at a
    temperature above 0, drawn ones.
    """

    @property
    def value(self) -> float: ...

    def __call__(self, prediction: Prediction, eligible: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Threshold:
    """Accepts candidates of at least this probability (Fast-dLLM, arXiv:2505.22618)."""

    value: float = 0.9

    def __call__(self, prediction: Prediction, eligible: torch.Tensor) -> torch.Tensor:
        return eligible & (prediction.confidence >= self.value)


@dataclass(frozen=True)
class Factor:
    """Accepts the k most confident while `(k + 1)(1 - c_k) < value` (Fast-dLLM's factor rule)."""

    value: float = 1.0

    def __call__(self, prediction: Prediction, eligible: torch.Tensor) -> torch.Tensor:
        rank = ranks((-prediction.confidence).masked_fill(~eligible, torch.inf))
        fits = (rank + 2) * (1 - prediction.confidence) < self.value

        # Only an unbroken run from the most confident on is taken.
        first_failure = rank.masked_fill(fits | ~eligible, rank.shape[-1]).amin(-1, keepdim=True)
        return eligible & (rank < first_failure)


@dataclass(frozen=True)
class EntropyBound:
    """Accepts the positions of lowest entropy within a bound (EB-Sampler, arXiv:2505.24857).

    All but the largest of their entropies add up to at most `value` nats, which bounds the error
    of taking them as independent.
    """

    value: float = 0.1

    def __call__(self, prediction: Prediction, eligible: torch.Tensor) -> torch.Tensor:
        entropy = prediction.entropy().masked_fill(~eligible, torch.inf)
        ordered, order = entropy.sort(dim=-1, stable=True)
        before = ordered.masked_fill(ordered.isinf(), 0).cumsum(-1) - ordered
        accepted = (before <= self.value) & ordered.isfinite()
        return torch.zeros_like(eligible).scatter(-1, order, accepted)


ACCEPT_RULES: dict[str, Callable[..., Accept]] = {
    "threshold": Threshold,
    "factor": Factor,
    "entropy_bound": EntropyBound,
}


@dataclass(frozen=True)
class Adaptive:
    """Commits what `accept` takes, group by group, within a budget of `steps`.

    Every group commits at least its most confident position a step, and enough of them that the
    budget suffices, so no region starves another. A group ends at its first end-of-turn: what
    follows becomes end-of-turn without being decoded.

    Attributes:
        steps: the budget of predictions.
        accept: which eligible candidates are good enough, of `ACCEPT_RULES`.
        block_length: of semi-autoregressive decoding; a caption is one block.
        eot_token_id: the end-of-turn, or None to decode every position.
        remask_below: masks committed positions again whose token's probability has fallen under
            this, as far as the budget allows (WINO, arXiv:2507.18578); None: what is committed
            stays.
        per_token: the budget of a group is at most its positions, where groups of several lengths
            run together.
    """

    steps: int
    accept: Callable[[Prediction, torch.Tensor], torch.Tensor]
    block_length: int
    eot_token_id: int | None = None
    remask_below: float | None = None
    per_token: bool = False
    adaptive = True
    uses_logits = True

    def commit(self, step: int, prediction: Prediction, state: State, mask_token_id: int) -> State:
        """Returns the state after prediction number `step` (0-based)."""
        eligible = in_first_block(state.masked, self.block_length)

        # As many as the budget requires, from the block and, where it is too small, beyond it.
        left = state.masked.sum(-1, keepdim=True)
        steps_left = (self._budget(state) - step).clamp(min=1)
        quota = torch.ceil(left / steps_left).long().clamp(min=1)
        required = largest(prediction.confidence, eligible, quota)
        short = (quota - eligible.sum(-1, keepdim=True)).clamp(min=0)
        beyond = largest(prediction.confidence, state.masked & ~eligible, short)

        # What the rule accepts comes on top; what has become unlikely is masked again.
        chosen = required | beyond | self.accept(prediction, eligible)
        remasked = self._remasked(step, prediction, state)
        state = fill(state, chosen, prediction.tokens)
        if remasked is not None:
            tokens = state.tokens.masked_fill(remasked, mask_token_id)
            state = replace(state, tokens=tokens, masked=state.masked | remasked)
        return self._end_turns(state)

    def _budget(self, state: State) -> torch.Tensor:
        """Returns the predictions that each group may take, int64 (B, G, 1)."""
        lengths = state.valid.sum(-1, keepdim=True)
        return lengths.clamp(max=self.steps) if self.per_token else lengths.fill_(self.steps)

    def _remasked(self, step: int, prediction: Prediction, state: State) -> torch.Tensor | None:
        """Marks committed positions, bool (B, G, n), that have become unlikely; None: none."""
        if self.remask_below is None or step + 2 >= self.steps:
            return None
        assert prediction.logits is not None  # for a rule that says `uses_logits`
        committed = state.valid & ~state.masked & (step + 2 < self._budget(state))
        return committed & (probability_of(state.tokens, prediction.logits) < self.remask_below)

    def _end_turns(self, state: State) -> State:
        """Fills what follows a committed end-of-turn with end-of-turn."""
        if self.eot_token_id is None:
            return state
        after = state.masked & state.valid & ~before_end(state, ((self.eot_token_id,),))
        return fill(state, after, torch.full_like(state.tokens, self.eot_token_id))


def in_first_block(masked: torch.Tensor, block_length: int) -> torch.Tensor:
    """Marks the masked positions, bool (B, G, n), of each group's first block that holds any."""
    n = masked.shape[-1]
    if block_length >= n:
        return masked
    # The block of each position, and the first one that has a masked position.
    blocks = torch.arange(n, device=masked.device) // block_length
    first = blocks.expand_as(masked).masked_fill(~masked, n).amin(-1, keepdim=True)
    return masked & (blocks == first)


@dataclass(frozen=True)
class StopAt:
    """Wraps a rule: once a stop sequence stands committed, only positions before it are decoded."""

    rule: Rule
    sequences: tuple[tuple[int, ...], ...]
    adaptive = True

    @property
    def steps(self) -> int:
        """Returns the wrapped rule's number of predictions."""
        return self.rule.steps

    @property
    def uses_logits(self) -> bool:
        """Tells whether the wrapped rule reads logits."""
        return self.rule.uses_logits

    def commit(self, step: int, prediction: Prediction, state: State, mask_token_id: int) -> State:
        """Returns the state after prediction number `step` (0-based)."""
        before = before_end(state, self.sequences)
        # The wrapped rule sees nothing behind the stop.
        visible = replace(state, masked=state.masked & before)
        decoded = self.rule.commit(step, prediction, visible, mask_token_id)
        return replace(decoded, masked=decoded.masked | (state.masked & ~before))

    def finished(self, state: State) -> torch.Tensor:
        """Tells, bool (B,), the rows in which nothing before a stop is masked."""
        return ~(state.masked & before_end(state, self.sequences)).flatten(1).any(1)


@dataclass(frozen=True)
class Blockwise:
    """Says how one block after another is decoded to its end, all rows in the same one.

    Attributes:
        rule: of one block; `steps` are a block's.
        blocks, block_length: how many, and the positions of each.
        eot_token_id: the blocks behind the one that holds it are filled with it, not decoded;
            None: every block is decoded.
        stops: token sequences; behind the block that completes one nothing is decoded.
    """

    rule: Rule
    blocks: int
    block_length: int
    eot_token_id: int | None = None
    stops: tuple[tuple[int, ...], ...] = ()

    def window(self, block: int) -> slice:
        """Returns a block's positions."""
        return slice(block * self.block_length, (block + 1) * self.block_length)

    def end_turns(self, state: State) -> State:
        """Fills what follows a committed end-of-turn with end-of-turn, between two blocks."""
        if self.eot_token_id is None:
            return state
        after = state.masked & ~before_end(state, ((self.eot_token_id,),))
        return fill(state, after, torch.full_like(state.tokens, self.eot_token_id))

    def stopped(self, state: State) -> torch.Tensor:
        """Tells, bool (B,), the rows in which every response holds a stop, between two blocks."""
        open_before = before_end(state, self.stops) & state.masked
        return ~open_before.flatten(1).any(1)


def finished(rule: Rule, state: State) -> torch.Tensor:
    """Tells, bool (B,), the rows in which `rule` has nothing left to decode."""
    if isinstance(rule, StopAt):
        return rule.finished(state)
    return ~state.masked.flatten(1).any(1)
