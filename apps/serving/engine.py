"""Runs one model for many callers: a bounded queue whose jobs are denoised together.

    engine = Engine(RegionCaptioner.from_pretrained("owner/name"))
    ticket = engine.submit(RegionJob.build("photo.jpg", [{"box": [10, 20, 200, 180]}]))
    print(ticket.result().result)        # as `RegionCaptioner` would give it
    engine.close()

Jobs are checked in the caller's thread, before they are queued; one thread runs the model. Jobs of
the same kind and options that arrive within a short window start as one batch. Others join between
two steps:

    queue  -->  start: a run, up to its   -->  step: the forward passes   -->  end: its callers get
                first forward pass             of several runs as one          their results
                                           ^                              |
                                           +------- the next step --------+

`turns` decides who starts and who steps.
"""

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import CancelledError

from torch import OutOfMemoryError

from ...generation_diffusion import Steps
from ..captioning.captioner import RegionCaptioner
from ..captioning.results import Step
from .admission import Admission
from .completions import completions
from .jobs import ChatJob, RegionJob
from .metrics import Metrics
from .packing import run_passes, settle
from .runs import Run
from .seen_cache import SeenCache
from .tickets import EngineClosed, JobFailed, QueueFull, Ticket
from .turns import (
    holds_back,
    next_to_start,
    next_to_step,
    num_companions_rows,
    share_out,
    spend_alone,
)

LACKS_MEMORY = (OutOfMemoryError, MemoryError)
MAX_LACKS = 3  # times that a job waits for some of the others' memory; then for all of it


class Engine:
    """Runs jobs on one model, several in a batch, from a queue that sheds what is too much.

    Args:
        captioner: the model, its processor and default options.
        max_queue: most jobs waiting; one more is refused with `QueueFull`.
        max_queue_bytes: most memory of waiting images and region masks, likewise.
        max_cost: most work of one job: positions times denoising steps, over all its region
            groups, twice with guidance; one that asks for more is refused with ValueError.
        max_client_cost: most work of all jobs of one client that wait or run, refused likewise
            with `QueueFull`.
        max_batch: most region groups (an image's regions, up to the checkpoint's prompts) that
            run together; as many again of jobs far shorter than those.
        window: seconds that a job waits for company while nothing else is under way.
        seen_bytes: most memory of images that were seen and are kept for further jobs about them;
            0 keeps none.
    """

    def __init__(
        self,
        captioner: RegionCaptioner,
        *,
        max_queue: int = 64,
        max_queue_bytes: int = 512 << 20,
        max_cost: int = 2_000_000,
        max_client_cost: int = 8_000_000,
        max_batch: int = 8,
        window: float = 0.02,
        seen_bytes: int = 256 << 20,
    ):
        _expect_positive(
            max_queue=max_queue,
            max_batch=max_batch,
            max_cost=max_cost,
            max_client_cost=max_client_cost,
        )
        if seen_bytes < 0:
            raise ValueError(f"expected seen_bytes of at least 0, got {seen_bytes}")
        captioner.check_options()

        # What is fixed for as long as the engine lives.
        self.captioner = captioner
        self.max_queue = max_queue
        self.max_queue_bytes = max_queue_bytes
        self.max_client_cost = max_client_cost
        self.max_batch = max_batch
        self.window = window
        self.admission = Admission(captioner, max_cost)
        self.metrics = Metrics(
            queue_length=lambda: self.queue_length,
            running=lambda: self.running,
            up=lambda: self.alive,
            seen_bytes=lambda: self.seen.nbytes if self.seen is not None else 0,
        )
        self.seen = SeenCache(seen_bytes, self.metrics.count) if seen_bytes else None

        # What callers and the thread share; `_changed` guards the queue and what clients owe.
        self._waiting: deque[Ticket] = deque()
        self._runs: list[Run] = []  # which the thread alone changes
        self._is_held_back = False  # the next job, for the sake of those that run
        self._owed: Counter[str] = Counter()  # cost of each client's jobs that wait or run
        self._changed = threading.Condition()
        self._closed = self._drops = False
        self._thread = threading.Thread(target=self._work, name="perceptiondlm-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        job: RegionJob | ChatJob,
        *,
        on_step: Callable[[Step], None] | None = None,
        follow: bool = False,
        shorten: str | None = None,
        client: str | None = None,
        **options,
    ) -> Ticket:
        """Checks a job and queues it.

        Args:
            job: what to caption or answer.
            on_step: called in the engine's thread with a `Step` after each denoising step.
            follow: the ticket's `follow` will be read.
            shorten: the option among them, a response's length, that is only an upper bound: it is
                lowered where there is not so much room, and an answer longer than the checkpoint's
                usual one is decoded no further than to its end of turn.
            client: whose job it is; None: nobody's in particular.
            options: decoding options over the captioner's (see `DiffusionOptions`).

        Raises ValueError for a job or option that does not fit, `QueueFull`, `EngineClosed`.
        """
        try:
            checked = self.admission.check(job, options, shorten)
        except ValueError:
            self.metrics.count("invalid")
            raise
        if self.seen is not None:
            _ = job.digest  # computed here, not in the engine's thread
        rows = job.num_rows(self.captioner) * checked.num_candidates
        ticket = Ticket(
            job,
            checked,
            key=self.admission.batch_key(job, checked.options),
            rows=min(rows, self.max_batch),
            num_batches=-(-rows // self.max_batch),
            client=client,
            on_step=on_step,
            follow=follow,
        )

        # Room is looked for and taken under one lock, so that no other job can come between.
        with self._changed:
            self.expect_room(job.nbytes)
            self._expect_patience(ticket)
            self._owed[client] += ticket.cost
            self._waiting.append(ticket)
            self._changed.notify_all()
        self.metrics.count("accepted")
        ticket.future.add_done_callback(lambda _: self._forget(ticket))
        return ticket

    def expect_room(self, nbytes: int = 0):
        """Raises `EngineClosed`, or `QueueFull` where a job of so many bytes would be refused."""
        if self._closed:
            raise EngineClosed("expected a running engine, this one is shutting down")
        waiting = list(self._waiting)
        size = sum(other.job.nbytes for other in waiting)
        is_heavy = bool(waiting) and size + nbytes > self.max_queue_bytes
        if is_heavy or len(waiting) >= self.max_queue:
            raise self._refusal(f"{len(waiting)} requests are waiting already: try again later")

    def _expect_patience(self, ticket: Ticket):
        """Raises `QueueFull` for a client who has as much under way as one may have."""
        owed = self._owed[ticket.client] if ticket.client is not None else 0
        if owed and owed + ticket.cost > self.max_client_cost:
            raise self._refusal("too many requests of yours are under way already: try again later")

    def _refusal(self, message: str) -> QueueFull:
        self.metrics.count("refused")
        return QueueFull(message, self.metrics.seconds_until_free(len(self._waiting)))

    @property
    def queue_length(self) -> int:
        """Counts the jobs that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Counts the jobs that are under way."""
        return sum(len(run.tickets) for run in self._runs)

    @property
    def alive(self) -> bool:
        """Tells whether the engine's thread works on jobs."""
        return self._thread.is_alive() and not self._closed

    def close(self, *, drain: bool = True, timeout: float | None = None):
        """Takes no more jobs; finishes those that wait (`drain`) or drops all; ends the thread."""
        with self._changed:
            self._closed = True
            self._drops = self._drops or not drain
            under_way = [ticket for run in self._runs for ticket in run.tickets]
            dropped = [] if drain else [*self._waiting, *under_way]
            self._changed.notify_all()
        for ticket in dropped:
            ticket.cancel()
        self._thread.join(timeout)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_):
        self.close(drain=False)

    # The engine's thread: which jobs start, and what they go through.

    def _work(self):
        while self._admit():
            self._step()

    def _admit(self) -> bool:
        """Starts jobs for which there is room; where nothing runs it waits for some.

        Returns False when the engine is closed and all is done.
        """
        with self._changed:
            if not self._runs and not self._wait():
                return False
            self._forget_given_up()
            self._is_held_back = bool(self._waiting) and holds_back(self._runs)
            waiting = () if self._is_held_back else self._waiting
            batch, is_express = next_to_start(waiting, self._runs, self.max_batch)
            chosen = set(map(id, batch))
            self._waiting = deque(t for t in self._waiting if id(t) not in chosen)
        if batch and self._runs:
            self.metrics.count("joined", len(batch))
        self._start(batch, is_express)
        return True

    def _wait(self) -> bool:
        """Waits for a job and its company; returns False when closed and empty."""
        self._changed.wait_for(lambda: self._waiting or self._closed)
        if not self._waiting:
            return False

        # company may still come, until the batch is full
        deadline = self._waiting[0].submitted + self.window
        while (left := deadline - time.monotonic()) > 0 and not self._closed:
            if not self._waiting or num_companions_rows(self._waiting) >= self.max_batch:
                break
            self._changed.wait(left)
        return True

    def _start(self, batch: list[Ticket], is_express: bool = False, keeps: bool = True):
        """Starts jobs as one run, up to its first forward pass.

        `keeps`: what was seen of their images is looked up and kept.
        """
        batch = [ticket for ticket in batch if self._begins(ticket)]
        if not batch:
            return
        steps = self._steps_of(batch, self.seen if keeps else None)
        run = Run(batch, steps, is_express, keeps=keeps and self.seen is not None)
        self._runs.append(run)
        self._advance(run)

    def _begins(self, ticket: Ticket) -> bool:
        """Marks a job as running; one that nobody wants any more ends here."""
        if self._drops:
            ticket.cancel()
        if not ticket.begin():
            return False
        if ticket.cancelled:  # it was running before
            ticket.future.set_exception(CancelledError())
            return False
        return True

    def _forget_given_up(self):
        """Ends jobs that wait for memory and that nobody wants any more: others end at once."""
        for ticket in list(self._waiting):
            if ticket.cancelled and ticket.future.running():
                ticket.future.set_exception(CancelledError())

    def _steps_of(self, batch: list[Ticket], seen: SeenCache | None) -> Steps:
        """Begins the denoising of a batch, which tells each ticket its steps."""
        numbers = itertools.count(1)

        def on_step(_, token_ids: list):
            number = next(numbers)
            for ticket, rows in zip(batch, token_ids, strict=False):
                if ticket.wants_steps:
                    texts = self.captioner.partial_texts(rows, ticket.job.count)
                    ticket.tell(Step(number, texts))

        listener = on_step if any(ticket.wants_steps for ticket in batch) else None
        jobs = [ticket.job for ticket in batch]
        options = batch[0].options | {"batch_size": self.max_batch}
        return jobs[0].steps(self.captioner, jobs, options, listener, seen)

    def _step(self):
        """Runs the next forward passes, those of several runs together where that can be."""
        if self._drops:
            for ticket in [ticket for run in self._runs for ticket in run.tickets]:
                ticket.cancel()
        for run in [run for run in self._runs if run.is_given_up]:
            self._leave(run)
            for ticket in run.tickets:
                ticket.future.set_exception(CancelledError())

        stepping = next_to_step(self._runs)
        started = time.perf_counter()
        answers = run_passes([run.asked for run in stepping])
        seconds = time.perf_counter() - started
        share_out(self._runs, seconds, stepping, int(self._is_held_back))
        for run, answer in zip(stepping, answers, strict=True):
            if isinstance(answer, Exception):
                self._break(run, answer)
            else:
                self._advance(run, answer)

    def _advance(self, run: Run, logits=None):
        """Takes a run to its next forward pass, or to its end."""
        started = time.perf_counter()
        try:
            run.advance(logits)
            if logits is None:
                settle(self.captioner.model.device)
            spend_alone(self._runs, time.perf_counter() - started, run)
            if run.output is not None:
                self._leave(run)
                self._resolve(run)
            return
        except BaseException as error:  # nobody may wait for ever, whatever went wrong
            broken = error
        self._break(run, broken)

    def _leave(self, run: Run):
        """Ends a run; those for which there was no memory beside it may try again."""
        self._drop(run)
        self._release_held()

    def _release_held(self):
        with self._changed:
            for ticket in self._waiting:
                ticket.is_held = False

    def _drop(self, run: Run):
        run.close()
        self._runs = [other for other in self._runs if other is not run]

    def _break(self, run: Run, error: BaseException):
        """Goes on after an error: without what is kept, each job alone, later, or not at all."""
        self._drop(run)
        lacks_memory = isinstance(error, LACKS_MEMORY)
        if lacks_memory:
            error = error.with_traceback(None)  # whose frames hold memory

        tickets = [ticket for ticket in run.tickets if not ticket.future.done()]
        if lacks_memory and run.keeps and self.seen is not None:
            self.seen.clear()
            self._start(tickets, run.is_express, keeps=False)
        elif len(tickets) > 1:  # one of them is to blame: the others run without it
            for ticket in tickets:
                self._start([ticket], run.is_express)
        elif tickets and lacks_memory and self._runs:
            tickets[0].num_lacks += 1
            tickets[0].needs_all = tickets[0].num_lacks >= MAX_LACKS
            tickets[0].is_held = not tickets[0].needs_all
            with self._changed:
                self._waiting.appendleft(tickets[0])
        elif tickets:
            self._release_held()
            self._fail(tickets[0], error)

    def _resolve(self, run: Run):
        """Gives each caller of a run that has ended what came of its job."""
        assert run.output is not None  # it has ended
        done = completions(run.tickets, run.output, time.monotonic() - run.started)
        tokens = sum(completion.completion_tokens for completion in done)
        forwards = run.output.num_forwards
        self.metrics.add_batch(len(run.tickets), run.seconds, tokens, forwards)
        for ticket, completion in zip(run.tickets, done, strict=True):
            if ticket.cancelled:
                ticket.future.set_exception(CancelledError())
                continue
            self.metrics.add_latency(time.monotonic() - ticket.submitted)
            ticket.future.set_result(completion)

    def _fail(self, ticket: Ticket, error: BaseException):
        self.metrics.count("failed")
        if isinstance(error, LACKS_MEMORY):
            error = JobFailed(f"out of memory: try a smaller image or fewer regions ({error})")
        elif not isinstance(error, ValueError):
            cause, error = error, JobFailed(f"{type(error).__name__}: {error}")
            error.__cause__ = cause
        ticket.future.set_exception(error)

    def _forget(self, ticket: Ticket):
        """Frees what a job that is done held: its client's share, and its place in the queue."""
        with self._changed:
            self._owed[ticket.client] -= ticket.cost
            if self._owed[ticket.client] <= 0:
                del self._owed[ticket.client]
        if ticket.cancelled:
            self.metrics.count("cancelled")
            with self._changed:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                self._changed.notify_all()


def _expect_positive(**counts: int):
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}")
