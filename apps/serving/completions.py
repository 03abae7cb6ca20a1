"""Splits what a batch gave into what became of each of its jobs."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...generation_diffusion import DiffusionOutput
from ..captioning.captioner import RegionCaptioner
from ..captioning.results import Answers, RegionCaptions


@dataclass(frozen=True)
class Completion:
    """What became of a job.

    Attributes:
        result: captions or answers.
        prompt_tokens: of all its region groups, visual tokens included.
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
    """Estimates, while a batch runs, how many forward passes each job takes.

    A job's count is the number of steps after which its texts last changed, times its rows.

    Args:
        groups: rows of each job in the batch.
    """

    def __init__(self, groups: list[int]):
        self.groups = groups
        self.steps = 0
        self._last: list[list] = [[] for _ in groups]
        self._changed = [0] * len(groups)

    def add(self, token_ids: list):
        """Takes the ids of all jobs after a step."""
        self.steps += 1
        for i, rows in enumerate(token_ids):
            if rows != self._last[i]:
                self._last[i], self._changed[i] = rows, self.steps

    def forwards(self, output: DiffusionOutput) -> list[int]:
        """Returns the forward passes of each job, given the output of the whole batch."""
        if len(self.groups) == 1:
            return [output.num_forwards]
        if output.num_forwards == self.steps * sum(self.groups):  # no row finished early
            return [self.steps * groups for groups in self.groups]
        return [last * groups for last, groups in zip(self._changed, self.groups, strict=True)]


def completions(
    captioner: RegionCaptioner,
    tickets: list,
    output: DiffusionOutput,
    forwards: list[int],
    seconds: float,
) -> list[Completion]:
    """Returns what each ticket's job gets of a batch's output.

    Args:
        captioner: made the output.
        tickets: of the batch, in its order.
        forwards: forward passes of each job.
        seconds: that the batch took.
    """
    done = []
    for i, ticket in enumerate(tickets):
        ids = output.token_ids[i]
        kept = [response_length(captioner.processor, row) for row in ids]

        result = ticket.job.result_of(
            output.texts[i],
            num_forwards=forwards[i],
            tokens_per_forward=sum(map(len, ids)) / forwards[i],
            seconds=seconds,
        )
        done.append(
            Completion(
                result,
                prompt_tokens=ticket.prompt_tokens,
                completion_tokens=sum(kept),
                ended=all(n < len(row) for n, row in zip(kept, ids, strict=True)),
                batch_size=len(tickets),
                queued_seconds=ticket.started - ticket.submitted,
            )
        )
    return done


def response_length(processor, ids: Sequence[int]) -> int:
    """Returns how many tokens of a response stand before its end of turn or text."""
    stops = {processor.eot_token_id, processor.tokenizer.eos_token_id}
    return next((i for i, token in enumerate(ids) if token in stops), len(ids))
