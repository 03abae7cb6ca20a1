"""Holds a job's place in an engine's queue, its steps and its result."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

from ..captioning.results import Step
from .admission import Checked
from .completions import Completion
from .jobs import ChatJob, RegionJob

STREAM_SECONDS = 0.5  # how often a reader without news looks whether the job is done


class QueueFull(Exception):
    """Refuses a job while others wait; `retry_after` guesses when a place is free (s)."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosed(Exception):
    """Refuses a job because the engine takes no more."""


class JobFailed(Exception):
    """Says that the model failed on a job that passed every check, say for want of memory."""


class Ticket:
    """A job's place in the queue, and its result.

    `wait` for it, `result` for it, `follow` its steps, or `cancel` it.

    Args:
        job: what is asked for.
        checked: how it is decoded, and what that takes.
        key: equal for jobs that can share a batch.
        rows: of a batch, at most; num_batches: how many of them, one after another.
        client: whose it is.
        on_step, follow: see `Engine.submit`.
    """

    def __init__(
        self,
        job: RegionJob | ChatJob,
        checked: Checked,
        *,
        key,
        rows: int,
        num_batches: int,
        client: str | None,
        on_step,
        follow,
    ):
        self.job = job
        self.options = checked.options
        self.key = key
        self.prompt_tokens = checked.prompt_tokens
        self.cost = checked.cost
        self.num_steps = checked.num_steps * num_batches + checked.num_choosing
        self.rows = rows
        self.joins = checked.joins
        self.client = client

        # What becomes of it.
        self.wants_steps = follow or on_step is not None
        self.future: Future[Completion] = Future()
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.num_lacks = 0  # times that there was no memory for it beside others
        self.is_held = False  # until there is more of it
        self.needs_all = False  # there was too little too often: nothing may run beside it

        # The latest step, for a reader in another thread.
        self._on_step = on_step
        self._cancelled = threading.Event()
        self._news = threading.Condition()
        self._latest: Step | None = None
        self.future.add_done_callback(self._wake)

    @property
    def cancelled(self) -> bool:
        """Tells whether nobody wants the result any more."""
        return self._cancelled.is_set()

    def begin(self) -> bool:
        """Marks it as running; tells whether anybody still wants it."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the result; raises TimeoutError, CancelledError or the job's own error."""
        return self.future.result(timeout)

    def cancel(self):
        """Drops the job: at once while it waits, after the current step when it runs.

        One that shares a batch with others keeps its rows until nobody wants any of the batch.
        """
        self._cancelled.set()
        self.future.cancel()

    def follow(self) -> Iterator[Step]:
        """Yields the latest step whenever there is news, until the job is done.

        Steps that a slow reader missed are left out. Closing the iterator does not cancel the job.
        """
        seen = 0
        while True:
            with self._news:
                fresh = self._news.wait_for(
                    lambda seen=seen: self.future.done() or self._number() > seen, STREAM_SECONDS
                )
                latest = self._latest
            if latest is not None and latest.number > seen:
                seen = latest.number
                yield latest
            elif fresh and self.future.done():
                return

    def _number(self) -> int:
        return self._latest.number if self._latest is not None else 0

    def tell(self, step: Step):
        """Takes a step's texts from the engine's thread.

        Steps that are run again, because something failed, are not told again.
        """
        if step.number <= self._number():
            return
        with self._news:
            self._latest = step
            self._news.notify_all()
        if self._on_step is not None:
            self._on_step(step)

    def _wake(self, _):
        with self._news:
            self._news.notify_all()
