"""Splits what a batch gave into what became of each of its jobs."""

from dataclasses import dataclass
from typing import NamedTuple

from ...generation_diffusion import DiffusionOutput
from ..captioning.results import Answers, RegionCaptions


class Found(NamedTuple):
    """Holds what a batch gave for one job: of each response its text, score and template's fields.

    `fields` is None without a template.
    """

    texts: list[str]
    scores: list[float | None]
    fields: list[list | dict] | None


@dataclass(frozen=True)
class Completion:
    """What became of a job.

    Attributes:
        result: captions or answers.
        prompt_tokens: of all its region groups, visual tokens included.
        completion_tokens: of its texts, up to their ends.
        ended: whether every text ended by itself, not at its length.
        batch_size: jobs that were started together.
        queued_seconds: time before it ran.
    """

    result: RegionCaptions | Answers
    prompt_tokens: int
    completion_tokens: int
    ended: bool
    batch_size: int
    queued_seconds: float


def completions(tickets: list, output: DiffusionOutput, seconds: float) -> list[Completion]:
    """Returns what each ticket's job gets of a batch's output.

    Args:
        tickets: of the batch, in its order.
        output: of the batch.
        seconds: that the batch took.
    """
    done = []
    for i, ticket in enumerate(tickets):
        # A job is an image with its regions, or a question: a row for each of its responses.
        ids = output.token_ids[i]
        lengths = output.lengths[i]
        forwards = output.image_forwards[i]

        result = ticket.job.result_of(
            Found(output.texts[i], output.scores[i], output.fields[i] if output.fields else None),
            num_forwards=forwards,
            tokens_per_forward=sum(map(len, ids)) / forwards,
            seconds=seconds,
        )
        done.append(
            Completion(
                result,
                prompt_tokens=ticket.prompt_tokens,
                completion_tokens=sum(lengths),
                ended=all(n < len(row) for n, row in zip(lengths, ids, strict=True)),
                batch_size=len(tickets),
                queued_seconds=ticket.started - ticket.submitted,
            )
        )
    return done
