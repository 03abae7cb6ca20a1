"""Holds the jobs that are being denoised: which start together, and how far they are."""

import time
from collections.abc import Sequence

import torch

from ...generation_cache import ForwardPass
from ...generation_diffusion import DiffusionOutput, Steps
from .tickets import Ticket


class Run:
    """Jobs that were started together, somewhere between their first step and their last.

    Args:
        tickets: of the jobs.
        steps: their denoising, as `diffusion_steps` gives it.
        is_express: it takes no place of those that are not far shorter than others.
        keeps: what was seen of its images is looked up and kept.

    Attributes:
        asked: the forward pass that comes next; None before the start and after the end.
        output: what came of it; None until it has ended.
        num_passes: forward passes that were answered.
        seconds: of the model's time that it took.
        lag: seconds that it is behind its fair share of the model's time.
    """

    def __init__(
        self,
        tickets: Sequence[Ticket],
        steps: Steps,
        is_express: bool = False,
        keeps: bool = False,
    ):
        self.tickets = list(tickets)
        self.steps = steps
        self.is_express = is_express
        self.keeps = keeps

        self.asked: ForwardPass | None = None
        self.output: DiffusionOutput | None = None
        self.num_passes = 0
        self.seconds = self.lag = 0.0
        self._stepping = 0.0  # seconds of its forward passes

        self.started = time.monotonic()
        for ticket in self.tickets:
            ticket.started = self.started

    @property
    def rows(self) -> int:
        """Counts the rows of its batch."""
        return sum(ticket.rows for ticket in self.tickets)

    @property
    def positions(self) -> int:
        """Counts the positions that its next forward pass computes."""
        if self.asked is None:
            return 0
        network, ids = self.asked.network, self.asked.response_ids
        prompt = 0 if network.prompt is None else network.prompt_length  # kept, or not
        return len(ids) * (prompt + ids.shape[1])

    @property
    def num_steps(self) -> int:
        """Returns how many forward passes it takes, at most."""
        return max(ticket.num_steps for ticket in self.tickets)

    @property
    def work_left(self) -> float:
        """Returns what is left of the jobs' cost; a pass at least."""
        share = max(self.num_steps - self.num_passes, 1) / self.num_steps
        return share * sum(ticket.cost for ticket in self.tickets)

    @property
    def expected_seconds(self) -> float:
        """Guesses the model's time of all its forward passes; 0 before the first."""
        if not self.num_passes:
            return 0.0
        return self._stepping / self.num_passes * self.num_steps

    @property
    def needs_all(self) -> bool:
        """Tells whether nothing may run beside it."""
        return any(ticket.needs_all for ticket in self.tickets)

    @property
    def is_given_up(self) -> bool:
        """Tells whether nobody waits for it any more."""
        return all(ticket.cancelled for ticket in self.tickets)

    def advance(self, logits: torch.Tensor | None = None):
        """Goes on to the next forward pass, or to the end.

        Args:
            logits: what the pass gave that was asked for; None at the start.
        """
        try:
            self.asked = self.steps.send(logits)  # type: ignore[arg-type]
        except StopIteration as end:
            self.asked, self.output = None, end.value
        self.num_passes += logits is not None

    def spend(self, seconds: float, is_pass: bool = False):
        """Notes time of the model; of a forward pass, or of what comes before and after it."""
        self.seconds += seconds
        self._stepping += seconds * is_pass

    def close(self):
        """Ends it early, and frees what it held."""
        self.asked = None
        self.steps.close()
