"""The denoising loop: predict, choose, commit, by small rules that know nothing of the network.

Shapes: B passes run together, G groups of answer positions in a pass (a region's caption each, or
one answer), n positions a group, V vocabulary. What is still masked is a boolean of its own, never
read off token ids.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch


@dataclass
class State:
    """Answer positions during denoising.

    Attributes:
        tokens: int64 (B, G, n), the mask token where `masked`.
        masked: bool (B, G, n), still to be filled.
        valid: bool (B, G, n), false for groups that only pad the batch.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    valid: torch.Tensor


@dataclass
class Prediction:
    """What one forward pass says about every answer position.

    Attributes:
        logits: (B, G, n, V), float32 or float64, filtered; None where no rule reads them.
        tokens: int64 (B, G, n), the candidate of each position.
        confidence: float64 (B, G, n), by which positions are ranked.
    """

    logits: torch.Tensor | None
    tokens: torch.Tensor
    confidence: torch.Tensor

    def entropy(self) -> torch.Tensor:
        """Entropy in nats (B, G, n)."""
        log_probs = self.logits.double().log_softmax(-1)
        return -(log_probs.exp() * log_probs.masked_fill(log_probs.isinf(), 0)).sum(-1)


class RowNoise:
    """Uniform draws in which each row has a generator of its own, so that what a row draws does
    not depend on the rows beside it.

    Args:
        seed: of the whole call.
        keys: what tells each row from all others of the call, whole numbers.
        counts: each row's groups of response positions; what only pads the batch draws nothing.
        device: on which to draw.
    """

    def __init__(self, seed: int, keys: Sequence[tuple[int, ...]], counts: Sequence[int], device):
        self.counts = counts
        self.generators = []
        for key in keys:
            (own,) = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)
            self.generators.append(torch.Generator(device).manual_seed(int(own)))

    def __call__(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Draws from [0, 1) in the given shape (B, G, ...); 0.5 for groups that pad."""
        device = self.generators[0].device
        drawn = torch.full(shape, 0.5, dtype=dtype, device=device)
        for row, (count, generator) in enumerate(zip(self.counts, self.generators, strict=True)):
            own = (count, *shape[2:])
            drawn[row, :count] = torch.rand(own, generator=generator, dtype=dtype, device=device)
        return drawn


@dataclass(frozen=True)
class Sampler:
    """Chooses a candidate and its confidence for each position.

    Attributes:
        temperature: of the Gumbel noise (LLaDA's `exp(logits) / (-log U)^temperature`); 0: argmax.
        top_k, top_p: keep so many likeliest tokens, or so much probability, before choosing.
        remasking: "low_confidence" (softmax probability of the candidate) or "random".
        banned: int64 (ids,), never chosen.
        noise: gives uniform draws of a shape and dtype; None: of torch's global generator.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    remasking: str = "low_confidence"
    banned: torch.Tensor | None = None
    noise: Callable[[torch.Size, torch.dtype], torch.Tensor] | None = None

    @property
    def is_deterministic(self) -> bool:
        """Whether the same logits always give the same prediction."""
        return self.temperature == 0 and self.remasking != "random"

    def __call__(self, logits: torch.Tensor) -> Prediction:
        """Prediction from logits (B, G, n, V) of any float type."""
        logits = logits.float() if self.temperature == 0 else logits.double()
        if self.banned is not None:
            logits = logits.index_fill(-1, self.banned, -torch.inf)
        logits = keep_top_p(keep_top_k(logits, self.top_k), self.top_p)
        tokens = self._choose(logits)
        if self.remasking == "random":
            confidence = self._uniform(tokens, torch.float64)
        else:
            confidence = probability_of(tokens, logits)
        return Prediction(logits, tokens, confidence)

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        uniform = self._uniform(logits, logits.dtype)
        return (logits - self.temperature * (-uniform.log()).log()).argmax(-1)

    def _uniform(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.noise is None:
            return torch.rand(like.shape, device=like.device, dtype=dtype)
        return self.noise(like.shape, dtype)


def probability_of(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Softmax probability, float64 (B, G, n), of each position's token among logits (B, G, n, V).

    `1 / (1 + others)`, with the others' sum taken by itself: so float32 logits tell probabilities
    apart, however near to 1, as well as a softmax in float64 does.
    """
    index = tokens[..., None]
    odds = (logits - logits.gather(-1, index)).exp_().scatter_(-1, index, 0)
    return 1 / (1 + odds.sum(-1, dtype=torch.float64))


def keep_top_k(logits: torch.Tensor, k: int | None) -> torch.Tensor:
    """Sets all but the k largest logits (..., V) to -inf."""
    if k is None or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float | None) -> torch.Tensor:
    """Keeps the likeliest tokens of (..., V) until they hold probability p."""
    if p is None or p >= 1:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= p)
    return logits.masked_fill(dropped, -torch.inf)


class Rule(Protocol):
    """Which positions are committed, or masked again, after each prediction.

    `steps` is the most predictions the rule takes; `adaptive` says that it may finish earlier, so
    that the loop looks (one host synchronisation a step); `uses_logits` that it reads more of a
    prediction than candidates and their confidence. `commit` returns the next state.
    """

    steps: int
    adaptive: bool
    uses_logits: bool

    def commit(self, step: int, prediction: Prediction, state: State, mask_token_id: int) -> State:
        """State after prediction number `step` (0-based)."""
        ...


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Rank of each value along the last axis, smallest 0; equals by position."""
    order = values.argsort(dim=-1, stable=True)
    places = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def largest(values: torch.Tensor, eligible: torch.Tensor, count) -> torch.Tensor:
    """Bool: the `count` (a number, or int (B, G, 1)) largest eligible values along the last axis,
    equals by position."""
    ranked = ranks((-values).masked_fill(~eligible, torch.inf))
    return eligible & (ranked < count)


@dataclass(frozen=True)
class JointRemasking:
    """The released region rule: fill everything, then re-mask the least confident.

    After step s of S, exactly the `int(N (S - 1 - s) / S)` positions of lowest confidence are
    masked again, committed or not. The mask token is committed like any other: a position filled
    with it is filled anew only when its confidence puts it among those. `scope` "image" ranks the
    N positions of all captions of a pass together; "region" ranks each caption's own, so that
    captions do not influence each other.
    """

    steps: int
    scope: str = "image"
    adaptive = False
    uses_logits = False

    def commit(self, step: int, prediction: Prediction, state: State, mask_token_id: int) -> State:
        shape = state.tokens.shape
        joint = (shape[0], 1, -1) if self.scope == "image" else shape
        valid = state.valid.view(joint)
        total = valid.sum(-1, keepdim=True).double()
        count = (total * ((self.steps - 1 - step) / self.steps)).long()
        least = ranks(prediction.confidence.view(joint).masked_fill(~valid, torch.inf)) < count
        tokens = torch.where(state.masked, prediction.tokens, state.tokens)
        masked = (least & valid).view(shape)
        return replace(state, tokens=tokens.masked_fill(masked, mask_token_id), masked=masked)


@dataclass(frozen=True)
class BlockCommit:
    """LLaDA's semi-autoregressive rule: blocks left to right, the most confident first.

    Each of a block's `steps / blocks` steps commits `floor(n / steps)` positions, and one more in
    the first `n mod steps`; what is committed stays.

    Attributes:
        retry_masks: a position for which the mask token is chosen is not committed but decoded
            again, in its block's steps or later ones, as in LLaDA's and LLaDA-V's code, which tell
            masked positions by their token. Matters only where the mask token is not banned.
    """

    steps: int
    block_length: int
    blocks: int
    retry_masks: bool = False
    adaptive = False
    uses_logits = False

    def commit(self, step: int, prediction: Prediction, state: State, mask_token_id: int) -> State:
        steps = self.steps // self.blocks
        quota = self.block_length // steps + (step % steps < self.block_length % steps)
        places = torch.arange(state.tokens.shape[-1], device=state.tokens.device)
        eligible = state.masked & (places < (step // steps + 1) * self.block_length)
        chosen = largest(prediction.confidence, eligible, quota)
        if self.retry_masks:
            chosen &= prediction.tokens != mask_token_id
        return fill(state, chosen, prediction.tokens)


def in_first_block(masked: torch.Tensor, block_length: int) -> torch.Tensor:
    """Bool (B, G, n): masked positions of each group's first block that holds any."""
    n = masked.shape[-1]
    if block_length >= n:
        return masked
    blocks = torch.arange(n, device=masked.device) // block_length
    first = blocks.expand_as(masked).masked_fill(~masked, n).amin(-1, keepdim=True)
    return masked & (blocks == first)


def fill(state: State, chosen: torch.Tensor, tokens: torch.Tensor) -> State:
    """Commits the chosen positions (bool B, G, n) with the given tokens."""
    return replace(
        state, tokens=torch.where(chosen, tokens, state.tokens), masked=state.masked & ~chosen
    )


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
        return eligible & _unbroken(fits | ~eligible, rank)


@dataclass(frozen=True)
class EntropyBound:
    """Accepts the positions of lowest entropy while all but the largest of their entropies add up
    to at most `value` nats, which bounds the error of taking them as independent (EB-Sampler,
    arXiv:2505.24857)."""

    value: float = 0.1

    def __call__(self, prediction: Prediction, eligible: torch.Tensor) -> torch.Tensor:
        entropy = prediction.entropy().masked_fill(~eligible, torch.inf)
        ordered, order = entropy.sort(dim=-1, stable=True)
        before = ordered.masked_fill(ordered.isinf(), 0).cumsum(-1) - ordered
        accepted = (before <= self.value) & ordered.isfinite()
        return torch.zeros_like(eligible).scatter(-1, order, accepted)


def _unbroken(fits: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Positions before whose rank, and at it, every position fits."""
    first_failure = rank.masked_fill(fits, rank.shape[-1]).amin(-1, keepdim=True)
    return rank < first_failure


@dataclass(frozen=True)
class Adaptive:
    """Commits what `accept` takes, group by group, within a budget of `steps`.

    Every group commits at least its most confident position a step, and enough of them that the
    budget suffices, so no region starves another. A group ends at its first end-of-turn: what
    follows becomes end-of-turn without being decoded.

    Attributes:
        accept: which eligible candidates are good enough (`Threshold`, `Factor`, `EntropyBound`).
        block_length: of semi-autoregressive decoding; a caption is one block.
        eot_token_id: the end-of-turn, or None to decode every position.
        verify: masks committed positions whose held token has fallen under this probability
            again, as far as the budget allows (WINO, arXiv:2507.18578); None: what is committed
            stays.
    """

    steps: int
    accept: Callable[[Prediction, torch.Tensor], torch.Tensor]
    block_length: int
    eot_token_id: int | None = None
    verify: float | None = None
    adaptive = True
    uses_logits = True

    def commit(self, step: int, prediction: Prediction, state: State, mask_token_id: int) -> State:
        eligible = in_first_block(state.masked, self.block_length)
        left = state.masked.sum(-1, keepdim=True)
        quota = torch.ceil(left / (self.steps - step)).long().clamp(min=1)
        required = largest(prediction.confidence, eligible, quota)
        short = (quota - eligible.sum(-1, keepdim=True)).clamp(min=0)  # the block is too small
        beyond = largest(prediction.confidence, state.masked & ~eligible, short)
        chosen = required | beyond | self.accept(prediction, eligible)
        doubted = self._doubted(step, prediction, state)
        state = fill(state, chosen, prediction.tokens)
        if doubted is not None:
            tokens = state.tokens.masked_fill(doubted, mask_token_id)
            state = replace(state, tokens=tokens, masked=state.masked | doubted)
        return self._end_turns(state)

    def _doubted(self, step: int, prediction: Prediction, state: State) -> torch.Tensor | None:
        if self.verify is None or step + 2 >= self.steps:
            return None
        committed = state.valid & ~state.masked
        return committed & (probability_of(state.tokens, prediction.logits) < self.verify)

    def _end_turns(self, state: State) -> State:
        if self.eot_token_id is None:
            return state
        ended = (state.tokens == self.eot_token_id) & ~state.masked & state.valid
        after = (ended.cumsum(-1) > 0) & state.valid & state.masked
        return fill(state, after, torch.full_like(state.tokens, self.eot_token_id))


@dataclass(frozen=True)
class StopAt:
    """Wraps a rule: once a stop sequence stands committed, only positions before it are decoded."""

    rule: Rule
    sequences: tuple[tuple[int, ...], ...]
    adaptive = True

    @property
    def steps(self) -> int:
        return self.rule.steps

    @property
    def uses_logits(self) -> bool:
        return self.rule.uses_logits

    def commit(self, step: int, prediction: Prediction, state: State, mask_token_id: int) -> State:
        before = before_stop(state, self.sequences)
        visible = replace(state, masked=state.masked & before)
        decoded = self.rule.commit(step, prediction, visible, mask_token_id)
        return replace(decoded, masked=decoded.masked | (state.masked & ~before))

    def finished(self, state: State) -> torch.Tensor:
        """Bool (B,): nothing before a stop is masked."""
        return ~(state.masked & before_stop(state, self.sequences)).flatten(1).any(1)


def before_stop(state: State, sequences: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Bool (B, G, n): positions before the first committed stop sequence of their group."""
    n = state.tokens.shape[-1]
    first = torch.full_like(state.tokens[..., :1], n)
    places = torch.arange(n, device=state.tokens.device)
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


def finished(rule: Rule, state: State) -> torch.Tensor:
    """Bool (B,): passes with nothing left for `rule` to decode."""
    if isinstance(rule, StopAt):
        return rule.finished(state)
    return ~state.masked.flatten(1).any(1)


class Memory:
    """What the network said of each state that a row has been in.

    With more steps than positions, rows come back to states that they were in before; those
    predictions are taken again instead of run again.
    """

    def __init__(self, batch: int):
        self.rows = [{} for _ in range(batch)]

    @staticmethod
    def keys(tokens: torch.Tensor) -> list[bytes]:
        """Names the state of each row, from its tokens (B, G, n)."""
        return [row.tobytes() for row in tokens.cpu().numpy()]

    def unseen(self, keys: list[bytes], device) -> torch.Tensor:
        """Tells, bool (B,), the rows whose states have no prediction yet."""
        known = [key in row for key, row in zip(keys, self.rows, strict=True)]
        return ~torch.tensor(known, device=device)

    def add(self, keys: list[bytes], prediction: Prediction):
        """Keeps the prediction made from the states, without its logits."""
        said = zip(prediction.tokens, prediction.confidence, strict=True)
        for row, key, one in zip(self.rows, keys, said, strict=True):
            row.setdefault(key, one)

    def prediction(self, keys: list[bytes]) -> Prediction:
        """Returns the prediction kept for the states; for a row without one, which has finished
        and will not change, any of its others."""
        keyed = zip(self.rows, keys, strict=True)
        said = [row[key] if key in row else next(iter(row.values())) for row, key in keyed]
        candidates, confidence = map(torch.stack, zip(*said, strict=True))
        return Prediction(None, candidates, confidence)


def denoise(
    predict: Callable[[torch.Tensor, int], torch.Tensor],
    state: State,
    rule: Rule,
    sampler: Sampler,
    mask_token_id: int,
    on_step: Callable[[int, State], None] | None = None,
    depends_on_step: bool = True,
) -> tuple[State, torch.Tensor]:
    """Runs the loop; returns the last state and each row's forward passes, int64 (B,).

    Args:
        predict: gives logits (B, G, n, V) of all response positions from tokens and a step number.
        on_step: called with a step's number and the new state, where it ran a forward pass or
            changed the state.
        depends_on_step: whether the same tokens may get other logits at another step. If not, and
            the choice is not random, no state is shown to the network twice.
    """
    B, _, n = state.tokens.shape
    forwards = torch.zeros(B, dtype=torch.int64, device=state.tokens.device)
    may_finish_early = rule.adaptive or rule.steps > n
    may_repeat = not depends_on_step and sampler.is_deterministic and not rule.uses_logits
    memory = Memory(B) if may_repeat and rule.steps > n else None

    running = torch.ones(B, dtype=torch.bool, device=state.tokens.device)
    for step in range(rule.steps):
        if may_finish_early:
            running = ~finished(rule, state)
            if not bool(running.any()):
                break

        # Predict, unless the network has seen all of this before.
        needed = running
        if memory is not None:
            keys = memory.keys(state.tokens)
            needed = running & memory.unseen(keys, running.device)
        runs = memory is None or bool(needed.any())
        if runs:
            prediction = sampler(predict(state.tokens, step))
            forwards += needed
        if memory is not None:
            if runs:
                memory.add(keys, prediction)
            prediction = memory.prediction(keys)

        # Commit. A row that has finished is left as it is while others of its batch go on.
        before, state = state, rule.commit(step, prediction, state, mask_token_id)
        if may_finish_early:
            state = _keep_finished(~running, before, state)
        if on_step is not None and (runs or not torch.equal(before.tokens, state.tokens)):
            on_step(step, state)
    return state, forwards


def _keep_finished(done: torch.Tensor, state: State, proposed: State) -> State:
    kept = done[:, None, None]
    return replace(
        state,
        tokens=torch.where(kept, state.tokens, proposed.tokens),
        masked=torch.where(kept, state.masked, proposed.masked),
    )


def accept_rule(name: str, value: float | None):
    """The acceptance called `name`, with its own default when `value` is None."""
    if not isinstance(name, str) or name not in ACCEPT_RULES:
        raise ValueError(f"expected adaptive to be one of {', '.join(ACCEPT_RULES)}, got {name!r}")
    kind = ACCEPT_RULES[name]
    if value is None:
        return kind()
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"expected adaptive_value of 0 or more, got {value!r}")
    return kind(float(value))


ACCEPT_RULES = {"threshold": Threshold, "factor": Factor, "entropy_bound": EntropyBound}
