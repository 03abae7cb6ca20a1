"""The denoising loop: predict, choose, commit; it knows nothing of the network.

           +--------------------------- step 0, 1, 2, ... --------------------------+
           |                                                                        |
    state --> predict --> logits --> sampler --> prediction --> rule.commit --> state
    masked    network,    (B,G,n,V)  candidate   + confidence   commits, masks   fewer
    tokens    one pass               tokens                     again            masked

`denoise` runs it to its end. `denoising` stops at each "predict" for its caller to answer, so that
several loops can be answered by one run of the network.

Shapes: B rows run together, G groups of response positions in a row (a region's caption each, or
one answer), n positions a group, V vocabulary.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from .generation_rules import Blockwise, Prediction, Rule, State, finished, probability_of

T = TypeVar("T")  # what steps return in the end
Outcome = tuple[State, torch.Tensor, torch.Tensor]


class RowNoise:
    """Draws uniform numbers with a generator for each row.

    So what a row draws does not depend on the rows beside it.

    Args:
        seed: of the whole call.
        keys: what tells each row from all others of the call, whole numbers.
        sizes: each row's groups of response positions, and the positions of its longest group;
            what only pads the batch draws nothing.
        device: on which to draw.
    """

    def __init__(
        self,
        seed: int,
        keys: Sequence[tuple[int, ...]],
        sizes: Sequence[tuple[int, int]],
        device,
    ):
        self.sizes = sizes
        self.generators = []
        for key in keys:
            (own,) = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)
            self.generators.append(torch.Generator(device).manual_seed(int(own)))

    def __call__(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Draws from [0, 1) in the given shape (B, G, n, ...); 0.5 for what pads."""
        device = self.generators[0].device
        drawn = torch.full(shape, 0.5, dtype=dtype, device=device)
        for row, (own, generator) in enumerate(zip(self.sizes, self.generators, strict=True)):
            # Drawn for the row's own positions alone: padding must not use up draws.
            groups, length = own
            own_shape = (groups, length, *shape[3:])
            draws = torch.rand(own_shape, generator=generator, dtype=dtype, device=device)
            drawn[row, :groups, :length] = draws
        return drawn


@dataclass(frozen=True)
class Sampler:
    """Chooses a candidate and its confidence for each position.

    Attributes:
        temperature: of the Gumbel noise (LLaDA's `exp(logits) / (-log U)^temperature`); 0: argmax.
        top_k, top_p: keep so many likeliest tokens, or so much probability, before choosing.
        remasking: "low_confidence" (softmax probability of the candidate) or "random".
        suppressed: int64 (ids,), never chosen.
        noise: gives uniform draws of a shape and dtype; None: of torch's global generator.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    remasking: str = "low_confidence"
    suppressed: torch.Tensor | None = None
    noise: Callable[[torch.Size, torch.dtype], torch.Tensor] | None = None

    @property
    def is_deterministic(self) -> bool:
        """Tells whether the same logits always give the same prediction."""
        return self.temperature == 0 and self.remasking != "random"

    def __call__(self, logits: torch.Tensor) -> Prediction:
        """Makes a prediction of logits (B, G, n, V) of any float type."""
        # Filter what may be chosen.
        logits = logits.float() if self.temperature == 0 else logits.double()
        if self.suppressed is not None:
            logits = logits.index_fill(-1, self.suppressed, -torch.inf)
        logits = keep_top_p(keep_top_k(logits, self.top_k), self.top_p)

        # Choose, and say how sure the choice is.
        tokens = self._choose(logits)
        probability = probability_of(tokens, logits)
        confidence = probability
        if self.remasking == "random":
            confidence = self._uniform(tokens, torch.float64)
        return Prediction(logits, tokens, confidence, probability.log())

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        uniform = self._uniform(logits, logits.dtype)
        return (logits - self.temperature * (-uniform.log()).log()).argmax(-1)

    def _uniform(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.noise is None:
            return torch.rand(like.shape, device=like.device, dtype=dtype)
        return self.noise(like.shape, dtype)


def keep_top_k(logits: torch.Tensor, k: int | None) -> torch.Tensor:
    """Sets all but the k largest logits (..., V) to -inf."""
    if k is None or k >= logits.shape[-1]:
        return logits
    # Ties with the k-th are kept.
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float | None) -> torch.Tensor:
    """Keeps the likeliest tokens of (..., V) until they hold probability p."""
    if p is None or p >= 1:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    # What lies before a token decides: the one that passes p is kept.
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= p)
    return logits.masked_fill(dropped, -torch.inf)


class Memory:
    """Remembers what the network said of each state that a row has been in.

    With more steps than positions, rows come back to states that they were in before; those
    predictions are taken again instead of run again.
    """

    def __init__(self, batch: int):
        self.rows: list[dict] = [{} for _ in range(batch)]

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
        assert prediction.log_probs is not None  # a sampler's always are
        said = zip(prediction.tokens, prediction.confidence, prediction.log_probs, strict=True)
        for row, key, one in zip(self.rows, keys, said, strict=True):
            row.setdefault(key, one)

    def prediction(self, keys: list[bytes]) -> Prediction:
        """Returns the prediction kept for the states.

        For a row without one, which has finished and will not change, it is any of its others.
        """
        keyed = zip(self.rows, keys, strict=True)
        said = [row[key] if key in row else next(iter(row.values())) for row, key in keyed]
        return Prediction(None, *map(torch.stack, zip(*said, strict=True)))


def answered(steps: Generator[Any, Any, T], answer: Callable[[Any], Any]) -> T:
    """Runs steps to their end, answers all that they ask for, and returns what they return."""
    try:
        asked = next(steps)
        while True:
            asked = steps.send(answer(asked))
    except StopIteration as end:
        return end.value


def translated(steps: Generator[Any, Any, T], ask: Callable[..., Any]) -> Generator[Any, Any, T]:
    """Passes on what steps ask for, a tuple, as `ask` puts it, and hands them the answers."""
    try:
        asked = next(steps)
        while True:
            asked = steps.send((yield ask(*asked)))
    except StopIteration as end:
        return end.value


def denoise(
    predict: Callable[[torch.Tensor, int], torch.Tensor],
    state: State,
    rule: Rule,
    sampler: Sampler,
    mask_token_id: int,
    on_step: Callable[[int, State], None] | None = None,
    depends_on_step: bool = True,
) -> Outcome:
    """Runs the loop.

    Returns the last state, each row's forward passes, int64 (B,), and the log-probability of each
    position's token at the step that committed it, float64 (B, G, n).

    Args:
        predict: gives logits (B, G, n, V) of all response positions from tokens and a step number.
        on_step: called with a step's number and the new state, where it ran a forward pass or
            changed the state.
        depends_on_step: whether the same tokens may get other logits at another step. If not, and
            the choice is not random, no state is shown to the network twice.
    """
    steps = denoising(state, rule, sampler, mask_token_id, on_step, depends_on_step)
    return answered(steps, lambda asked: predict(*asked))


def denoising(
    state: State,
    rule: Rule,
    sampler: Sampler,
    mask_token_id: int,
    on_step: Callable[[int, State], None] | None = None,
    depends_on_step: bool = True,
) -> Generator[tuple[torch.Tensor, int], torch.Tensor, Outcome]:
    """Runs the loop, and stops for each prediction: yields tokens and a step number, takes logits.

    The arguments and what is returned are those of `denoise`.
    """
    # A rule with more steps than positions comes back to states that it has seen.
    B, _, n = state.tokens.shape
    forwards = torch.zeros(B, dtype=torch.int64, device=state.tokens.device)
    log_probs = torch.zeros_like(state.tokens, dtype=torch.float64)
    may_finish_early = rule.adaptive or rule.steps > n
    may_repeat = not depends_on_step and sampler.is_deterministic and not rule.uses_logits
    memory = Memory(B) if may_repeat and rule.steps > n else None

    # Rows with something left to decode.
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
            prediction = sampler((yield state.tokens, step))
            forwards += needed
        if memory is not None:
            if runs:
                memory.add(keys, prediction)
            prediction = memory.prediction(keys)

        # Commit. A row that has finished is left as it is while others of its batch go on.
        before, state = state, rule.commit(step, prediction, state, mask_token_id)
        if may_finish_early:
            state = _keep_finished(~running, before, state)
        committed = before.masked & ~state.masked
        assert prediction.log_probs is not None  # a sampler's always are
        log_probs = torch.where(committed, prediction.log_probs, log_probs)
        if on_step is not None and (runs or not torch.equal(before.tokens, state.tokens)):
            on_step(step, state)
    return state, forwards, log_probs


def denoising_blocks(
    state: State,
    plan: Blockwise,
    sampler: Sampler,
    mask_token_id: int,
    on_step: Callable[[int, State], None] | None = None,
) -> Generator[tuple[torch.Tensor, int, int], torch.Tensor, Outcome]:
    """Runs the loop for one block after another, each to its end; returns what `denoise` does.

    Rows that have finished a block wait for the others, so each decodes as it would alone. For each
    prediction it yields all tokens, the block's number and the step's number in it, and takes
    logits (B, G, block_length, V) of the block's positions.
    """
    B = len(state.tokens)
    forwards = torch.zeros(B, dtype=torch.int64, device=state.tokens.device)
    log_probs = torch.zeros_like(state.tokens, dtype=torch.float64)
    steps_before = 0

    for block in range(plan.blocks):
        window, whole = plan.window(block), state
        stopped = plan.stopped(whole)[:, None, None]
        # What stands behind a stop looks as if it were decoded, and keeps its mask tokens.
        part = State(
            whole.tokens[..., window],
            whole.masked[..., window] & ~stopped,
            whole.valid[..., window],
        )

        def ask(tokens, step, block=block, whole=whole, window=window):
            return _put(whole.tokens, window, tokens), block, step

        def on_block_step(step, part, first=steps_before, whole=whole, window=window):
            assert on_step is not None
            on_step(first + step, _put_part(whole, window, part))

        listener = None if on_step is None else on_block_step
        steps = denoising(part, plan.rule, sampler, mask_token_id, listener)
        done, own, scores = yield from translated(steps, ask)

        # Into the whole again; what was hidden behind a stop is still masked.
        done.masked |= whole.masked[..., window] & stopped
        state = plan.end_turns(_put_part(whole, window, done))
        log_probs[..., window] = scores
        forwards += own
        steps_before += plan.rule.steps
    return state, forwards, log_probs


def _put(values: torch.Tensor, window: slice, part: torch.Tensor) -> torch.Tensor:
    """Returns a copy of values (B, G, n) with some positions replaced."""
    values = values.clone()
    values[..., window] = part
    return values


def _put_part(state: State, window: slice, part: State) -> State:
    """Returns a state with a block's positions replaced."""
    tokens = _put(state.tokens, window, part.tokens)
    return replace(state, tokens=tokens, masked=_put(state.masked, window, part.masked))


def _keep_finished(done: torch.Tensor, state: State, proposed: State) -> State:
    """Takes the proposed state, but for the rows that are done, bool (B,)."""
    kept = done[:, None, None]
    return replace(
        state,
        tokens=torch.where(kept, state.tokens, proposed.tokens),
        masked=torch.where(kept, state.masked, proposed.masked),
    )
