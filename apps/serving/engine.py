"""Runs one model for many callers: a bounded queue whose jobs are denoised together.

    engine = Engine(RegionCaptioner.from_pretrained("owner/name"))
    ticket = engine.submit(RegionJob.build("photo.jpg", [{"box": [10, 20, 200, 180]}]))
    print(ticket.result().result)        # as `RegionCaptioner` would give it
    engine.close()

Jobs are checked in the caller's thread, before they are queued; one thread runs the model. Jobs of
the same kind and options that arrive within a short window become one `diffusion_generate` call.
"""

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError

from torch import OutOfMemoryError

from ...generation_diffusion import DiffusionOutput
from ..captioning.captioner import RegionCaptioner
from ..captioning.results import Step
from .admission import Admission
from .completions import Completion, completions
from .jobs import ChatJob, RegionJob
from .metrics import Metrics
from .seen_cache import SeenCache
from .tickets import EngineClosed, JobFailed, QueueFull, Ticket

FAR_SHORTER = 8  # times cheaper: a job that need not wait for the end of the running batch


class _AllCancelled(Exception):
    """Nobody waits for the running batch any more."""


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
            run together.
        window: seconds that the first job of a batch waits for company.
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
        self._running: list[Ticket] = []
        self._owed: Counter[str] = Counter()  # cost of each client's jobs that wait or run
        self._turn = 0.0  # when the running batch may next be held up by a shorter one
        self._changed = threading.Condition()
        self._closed = False
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
            options, prompt_tokens, cost = self.admission.check(job, options, shorten)
        except ValueError:
            self.metrics.count("invalid")
            raise
        if self.seen is not None:
            _ = job.digest  # computed here, not in the engine's thread
        ticket = Ticket(
            job,
            options,
            key=self.admission.batch_key(job, options),
            prompt_tokens=prompt_tokens,
            cost=cost,
            client=client,
            on_step=on_step,
            follow=follow,
        )

        # Room is looked for and taken under one lock, so that no other job can come between.
        with self._changed:
            self.expect_room(job.nbytes)
            self._expect_patience(ticket)
            self._owed[client] += cost
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
        """Counts the jobs in the running batch."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Tells whether the engine's thread works on jobs."""
        return self._thread.is_alive() and not self._closed

    def close(self, *, drain: bool = True, timeout: float | None = None):
        """Takes no more jobs; finishes those that wait (`drain`) or drops all; ends the thread."""
        with self._changed:
            self._closed = True
            dropped = [] if drain else [*self._waiting, *self._running]
            self._changed.notify_all()
        for ticket in dropped:
            ticket.cancel()
        self._thread.join(timeout)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_):
        self.close(drain=False)

    # The engine's thread: which jobs run next.

    def _work(self):
        while (batch := self._next_batch()) is not None:
            self._start(batch)

    def _next_batch(self) -> list[Ticket] | None:
        """Waits for the oldest job and those that may run beside it; None when closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None

            # company may still come, until the batch is full
            deadline = self._waiting[0].submitted + self.window
            while (left := deadline - time.monotonic()) > 0 and not self._closed:
                if not self._waiting or self._rows(self._companions()) >= self.max_batch:
                    break
                self._changed.wait(left)
            return self._take(self._companions())

    def _companions(self, max_cost: float = float("inf")) -> list[Ticket]:
        """Returns the oldest waiting job of at most so much cost, and those that fit beside it."""
        affordable = [ticket for ticket in self._waiting if ticket.cost <= max_cost]
        if not affordable:
            return []
        first, *others = affordable
        batch = [first]
        for ticket in others:
            if ticket.key == first.key and self._rows([*batch, ticket]) <= self.max_batch:
                batch.append(ticket)
        return batch

    def _rows(self, tickets: list[Ticket]) -> int:
        """Returns how many rows, each a region group or a question, jobs take."""
        return sum(ticket.job.num_rows(self.captioner) for ticket in tickets)

    def _take(self, batch: list[Ticket]) -> list[Ticket]:
        """Takes tickets out of the queue."""
        chosen = set(map(id, batch))
        self._waiting = deque(t for t in self._waiting if id(t) not in chosen)
        return batch

    def _let_pass(self, batch: list[Ticket]):
        """Runs, between two steps of a long batch, one of jobs that are far shorter.

        So nobody waits for another's long request; that one gets half of the time at least.
        """
        if time.monotonic() < self._turn:
            return
        with self._changed:
            shorter = self._take(self._companions(sum(t.cost for t in batch) / FAR_SHORTER))
        if shorter:
            started = time.monotonic()
            self._start(shorter, beside=batch)
            ended = time.monotonic()
            self._turn = ended + (ended - started)

    # The engine's thread: what a batch goes through.

    def _start(self, batch: list[Ticket], beside: Sequence[Ticket] = ()):
        """Runs a batch, while those `beside` it are held up."""
        batch = [t for t in batch if t.future.set_running_or_notify_cancel()]
        self._running = [*beside, *batch]
        try:
            self._run(batch, nested=bool(beside))
        finally:
            self._running = list(beside)

    def _run(self, batch: list[Ticket], nested: bool = False):
        """Resolves every ticket of the batch, whatever happens."""
        batch = [ticket for ticket in batch if not ticket.future.done()]
        if not batch:
            return

        try:
            self._resolve(batch, self._generate(batch, nested))
        except _AllCancelled:
            for ticket in batch:
                ticket.future.set_exception(CancelledError())
        except BaseException as error:  # nobody may wait for ever, whatever went wrong
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
            for ticket in batch:  # one of them is to blame: the others run without it
                self._run([ticket], nested)

    def _generate(self, batch: list[Ticket], nested: bool) -> list[Completion]:
        """Denoises a batch, telling each ticket its steps."""
        started = time.monotonic()
        for ticket in batch:
            ticket.started = started
        jobs = [ticket.job for ticket in batch]
        numbers = itertools.count(1)

        def on_step(_, token_ids: list):
            if all(ticket.cancelled for ticket in batch):
                raise _AllCancelled
            if not nested:
                self._let_pass(batch)
            number = next(numbers)
            for ticket, rows in zip(batch, token_ids, strict=False):
                if ticket.wants_steps:
                    texts = self.captioner.partial_texts(rows, ticket.job.count)
                    ticket.tell(Step(number, texts))

        output = self._denoise(jobs, batch[0].options | {"batch_size": self.max_batch}, on_step)

        seconds = time.monotonic() - started
        done = completions(batch, output, seconds)
        tokens = sum(completion.completion_tokens for completion in done)
        self.metrics.add_batch(len(batch), seconds, tokens, output.num_forwards)
        return done

    def _denoise(self, jobs: list, options: dict, on_step) -> DiffusionOutput:
        """Runs jobs on what was seen of their images; without, where the memory is needed."""
        if self.seen is not None:
            try:
                return jobs[0].generate(self.captioner, jobs, options, on_step, self.seen)
            except (OutOfMemoryError, MemoryError):
                self.seen.clear()
        return jobs[0].generate(self.captioner, jobs, options, on_step)

    def _resolve(self, batch: list[Ticket], done: list[Completion]):
        for ticket, completion in zip(batch, done, strict=True):
            if ticket.cancelled:
                ticket.future.set_exception(CancelledError())
                continue
            self.metrics.add_latency(time.monotonic() - ticket.submitted)
            ticket.future.set_result(completion)

    def _fail(self, ticket: Ticket, error: BaseException):
        self.metrics.count("failed")
        if isinstance(error, OutOfMemoryError):
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
