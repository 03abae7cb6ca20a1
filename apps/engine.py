"""One model for many callers: a bounded queue whose jobs are denoised together.

    engine = Engine(RegionCaptioner.from_pretrained("owner/name"))
    ticket = engine.submit(RegionJob.build("photo.jpg", [{"box": [10, 20, 200, 180]}]))
    print(ticket.result().result)        # as `RegionCaptioner` would give it
    engine.close()

Jobs are checked in the caller's thread, before they are queued; one thread runs the model. Jobs of
the same kind and options that arrive within a short window become one `diffusion_generate` call.
"""

import bisect
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future

from torch import OutOfMemoryError

from ..generation_options import DiffusionOptions, options_for
from .captioner import RegionCaptioner, Step
from .serving_jobs import ChatJob, Completion, ForwardCounter, RegionJob, TooLong, completions
from .serving_metrics import Metrics

OWN_OPTIONS = ("generator", "batch_size", "return_history", "compile")  # not for a job to set
RANDOM_OPTIONS = {"temperature": 0.0, "remasking": "low_confidence"}  # what decodes without chance
STREAM_SECONDS = 0.5  # how often a reader without news looks whether the job is done


class QueueFull(Exception):
    """There are as many jobs waiting as may; `retry_after` guesses when a place is free (s)."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosed(Exception):
    """The engine takes no more jobs."""


class JobFailed(Exception):
    """The model failed on a job that had passed every check, say for want of memory."""


class _AllCancelled(Exception):
    """Nobody waits for the running batch any more."""


class Ticket:
    """A job's place in the queue, and its result.

    `wait` for it, `result` for it, `follow` its steps, or `cancel` it.
    """

    def __init__(
        self, job: RegionJob | ChatJob, options: dict, key, prompt_tokens: int, on_step, follow
    ):
        self.job = job
        self.options = options
        self.key = key
        self.prompt_tokens = prompt_tokens
        self.wants_steps = follow or on_step is not None
        self.future: Future[Completion] = Future()
        self.submitted = time.monotonic()
        self.started: float | None = None
        self._on_step = on_step
        self._cancelled = threading.Event()
        self._news = threading.Condition()
        self._latest: Step | None = None
        self.future.add_done_callback(self._wake)

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants the result any more."""
        return self._cancelled.is_set()

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the result; raises TimeoutError, CancelledError or the job's own error."""
        return self.future.result(timeout)

    def cancel(self):
        """Drops the job: at once while it waits, after the current step when it runs."""
        self._cancelled.set()
        self.future.cancel()

    def follow(self) -> Iterator[Step]:
        """Yields the latest step whenever there is news, until the job is done; steps that a slow
        reader missed are left out. Closing the iterator does not cancel the job."""
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
        """Takes a step's texts from the engine's thread."""
        with self._news:
            self._latest = step
            self._news.notify_all()
        if self._on_step is not None:
            self._on_step(step)

    def _wake(self, _):
        with self._news:
            self._news.notify_all()


class Engine:
    """Runs jobs on one model, several in a batch, from a queue that sheds what is too much.

    Args:
        captioner: the model, its processor and default options.
        max_queue: most jobs waiting; one more is refused with `QueueFull`.
        max_queue_bytes: most memory of waiting pictures and masks, likewise.
        max_batch: most passes (a picture's regions, up to the checkpoint's prompts) run together.
        window: seconds that the first job of a batch waits for company.
    """

    def __init__(
        self,
        captioner: RegionCaptioner,
        *,
        max_queue: int = 64,
        max_queue_bytes: int = 2 << 30,
        max_batch: int = 8,
        window: float = 0.02,
    ):
        for name, value in (("max_queue", max_queue), ("max_batch", max_batch)):
            if value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        captioner.check_options()
        self.captioner = captioner
        self.max_queue = max_queue
        self.max_queue_bytes = max_queue_bytes
        self.max_batch = max_batch
        self.window = window
        self.metrics = Metrics()
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
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
            options: decoding options over the captioner's (see `DiffusionOptions`).

        Raises ValueError for a job or option that does not fit, `QueueFull`, `EngineClosed`.
        """
        options = options_for(job.task, self.captioner.options) | options
        try:
            if shorten is not None:
                options = self._bounded(job, options, shorten)
            prompt_tokens = job.check(self.captioner, self._checked(options, job.task))
        except ValueError:
            self.metrics.count("invalid")
            raise
        ticket = Ticket(job, options, self._key(job, options), prompt_tokens, on_step, follow)
        with self._changed:
            self.expect_room(job.nbytes)
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
        heavy = bool(waiting) and size + nbytes > self.max_queue_bytes
        if heavy or len(waiting) >= self.max_queue:
            self.metrics.count("refused")
            raise QueueFull(
                f"{len(waiting)} requests are waiting already: try again later",
                self.metrics.seconds_until_free(len(waiting)),
            )

    def _bounded(self, job, options: dict, name: str) -> dict:
        """Options under which `options[name]` is the most that a response may take."""
        captioner = self.captioner
        options = options | {name: self._room(job, options, name)}
        usual = self._checked(options_for(job.task, captioner.options), job.task)
        if name != "max_new_tokens" or options[name] <= usual.max_new_tokens:
            return options
        end = captioner.processor.tokenizer.convert_ids_to_tokens(captioner.processor.eot_token_id)
        return options | {"stop_strings": [*(options.get("stop_strings") or ()), end]}

    def _room(self, job, options: dict, name: str) -> int:
        """The largest length up to `options[name]` that fits: whole blocks, and 1 at least."""

        def is_too_long(blocks: int) -> bool:
            try:
                job.check(self.captioner, self._checked(options | {name: blocks * block}, job.task))
            except TooLong:
                return True
            return False

        block = options.get("block_length") or 1
        most = options[name] // block
        if most < 1 or not is_too_long(most):
            return options[name]
        return block * max(1, bisect.bisect_left(range(1, most), True, key=is_too_long))

    def _key(self, job, options: dict):
        """What jobs of one batch have in common; a job whose chance is seeded stays alone."""
        is_random = any(options.get(name, off) != off for name, off in RANDOM_OPTIONS.items())
        if is_random and options.get("seed") is not None:
            return object()
        return type(job), tuple(sorted((k, _frozen(v)) for k, v in options.items()))

    def _checked(self, options: dict, task: str) -> DiffusionOptions:
        reserved = sorted(set(options) & set(OWN_OPTIONS))
        if reserved:
            raise ValueError(f"expected options that a job may set, got {reserved}")
        defaults = self.captioner.model.config.generation_defaults
        return DiffusionOptions.build(defaults, options, task)

    @property
    def queue_length(self) -> int:
        """Jobs waiting."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs in the running batch."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Whether jobs are being worked on."""
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

    # The engine's thread.

    def _work(self):
        while (batch := self._next_batch()) is not None:
            self._running = [t for t in batch if t.future.set_running_or_notify_cancel()]
            try:
                self._run(self._running)
            finally:
                self._running = []

    def _next_batch(self) -> list[Ticket] | None:
        """The oldest job and those that may run beside it; None when closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            deadline = self._waiting[0].submitted + self.window
            while (left := deadline - time.monotonic()) > 0 and not self._closed:
                if not self._waiting or self._passes(self._companions()) >= self.max_batch:
                    break
                self._changed.wait(left)
            batch = self._companions()
            chosen = set(map(id, batch))
            self._waiting = deque(t for t in self._waiting if id(t) not in chosen)
            return batch

    def _companions(self) -> list[Ticket]:
        if not self._waiting:
            return []
        first, *others = self._waiting
        batch = [first]
        for ticket in others:
            if ticket.key == first.key and self._passes([*batch, ticket]) <= self.max_batch:
                batch.append(ticket)
        return batch

    def _passes(self, tickets: list[Ticket]) -> int:
        most = self.captioner.model.config.num_region_prompts
        return sum(ticket.job.passes(most) for ticket in tickets)

    def _run(self, batch: list[Ticket]):
        """Resolves every ticket of the batch, whatever happens."""
        batch = [ticket for ticket in batch if not ticket.future.done()]
        if not batch:
            return
        try:
            self._generate(batch)
        except _AllCancelled:
            for ticket in batch:
                ticket.future.set_exception(CancelledError())
        except BaseException as error:  # nobody may wait for ever, whatever went wrong
            if len(batch) > 1:
                for ticket in batch:
                    self._run([ticket])
            else:
                self._fail(batch[0], error)

    def _fail(self, ticket: Ticket, error: BaseException):
        self.metrics.count("failed")
        if isinstance(error, OutOfMemoryError):
            error = JobFailed(f"out of memory: try a smaller picture or fewer regions ({error})")
        elif not isinstance(error, ValueError):
            cause, error = error, JobFailed(f"{type(error).__name__}: {error}")
            error.__cause__ = cause
        ticket.future.set_exception(error)

    def _generate(self, batch: list[Ticket]):
        started = time.monotonic()
        for ticket in batch:
            ticket.started = started
        jobs = [ticket.job for ticket in batch]
        most = self.captioner.model.config.num_region_prompts
        counter = ForwardCounter([job.passes(most) for job in jobs])

        def on_step(_, token_ids: list):
            if all(ticket.cancelled for ticket in batch):
                raise _AllCancelled
            number = counter.add(token_ids)
            for ticket, rows in zip(batch, token_ids, strict=False):
                if ticket.wants_steps:
                    ticket.tell(Step(number, self.captioner._texts(rows, ticket.job.count)))

        output = jobs[0].generate(
            self.captioner, jobs, batch[0].options | {"batch_size": self.max_batch}, on_step
        )
        seconds = time.monotonic() - started
        done = completions(self.captioner, batch, output, counter, seconds)
        self.metrics.add_batch(
            len(batch), seconds, sum(d.completion_tokens for d in done), output.num_forwards
        )
        for ticket, completion in zip(batch, done, strict=True):
            if ticket.cancelled:
                ticket.future.set_exception(CancelledError())
                continue
            self.metrics.add_latency(time.monotonic() - ticket.submitted)
            ticket.future.set_result(completion)

    def _forget(self, ticket: Ticket):
        """Frees the place in the queue of a job that was cancelled while it waited."""
        if ticket.cancelled:
            self.metrics.count("cancelled")
            with self._changed:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                self._changed.notify_all()


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
