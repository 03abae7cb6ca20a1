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
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError

from torch import OutOfMemoryError

from ...generation_options import DiffusionOptions, options_for
from ..captioning.captioner import RegionCaptioner, Step
from .jobs import ChatJob, ForwardCounter, RegionJob, TooLong, completions
from .metrics import Metrics
from .tickets import EngineClosed, JobFailed, QueueFull, Ticket

OWN_OPTIONS = ("generator", "batch_size", "return_history", "compile")  # not for a job to set
RANDOM_OPTIONS = {"temperature": 0.0, "remasking": "low_confidence"}  # what decodes without chance
FAR_SHORTER = 8  # times cheaper: a job that need not wait for the end of the running batch


class _AllCancelled(Exception):
    """Nobody waits for the running batch any more."""


class Engine:
    """Runs jobs on one model, several in a batch, from a queue that sheds what is too much.

    Args:
        captioner: the model, its processor and default options.
        max_queue: most jobs waiting; one more is refused with `QueueFull`.
        max_queue_bytes: most memory of waiting pictures and masks, likewise.
        max_cost: most work of one job: positions times denoising steps, over all its passes, twice
            with guidance; one that asks for more is refused with ValueError.
        max_client_cost: most work of all jobs of one client that wait or run, refused likewise
            with `QueueFull`.
        max_batch: most passes (a picture's regions, up to the checkpoint's prompts) run together.
        window: seconds that the first job of a batch waits for company.
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
    ):
        counts = {
            "max_queue": max_queue,
            "max_batch": max_batch,
            "max_cost": max_cost,
            "max_client_cost": max_client_cost,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        captioner.check_options()
        self.captioner = captioner
        self.max_queue = max_queue
        self.max_queue_bytes = max_queue_bytes
        self.max_cost = max_cost
        self.max_client_cost = max_client_cost
        self.max_batch = max_batch
        self.window = window
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._owed: Counter[str] = Counter()  # cost of each client's jobs that wait or run
        self._turn = 0.0  # when the running batch may next be held up by a shorter one
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="perceptiondlm-engine", daemon=True)
        self.metrics = Metrics(
            queue_length=lambda: self.queue_length,
            running=lambda: self.running,
            up=lambda: self.alive,
        )
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
        options = options_for(job.task, self.captioner.options) | options
        try:
            if shorten is not None:
                options = self._bounded(job, options, shorten)
            prompt_tokens, cost = self._check(job, options)
        except ValueError:
            self.metrics.count("invalid")
            raise
        ticket = Ticket(
            job,
            options,
            key=self._key(job, options),
            prompt_tokens=prompt_tokens,
            cost=cost,
            client=client,
            on_step=on_step,
            follow=follow,
        )
        with self._changed:
            self.expect_room(job.nbytes)
            self._expect_patience(ticket)
            self._owed[client] += cost
            self._waiting.append(ticket)
            self._changed.notify_all()
        self.metrics.count("accepted")
        ticket.future.add_done_callback(lambda _: self._forget(ticket))
        return ticket

    def _check(self, job, options: dict) -> tuple[int, int]:
        """A job's prompt tokens and its cost; ValueError for one that does not fit."""
        checked = self._checked(options, job.task)
        positions = self.captioner.model.config.text_config.max_position_embeddings
        if max(checked.caption_length, checked.max_new_tokens) <= positions:
            self._expect_bounded(job.cost(0, checked))  # before long sequences are made of it
        prompt_tokens = job.check(self.captioner, checked)
        cost = job.cost(prompt_tokens, checked)
        self._expect_bounded(cost)
        return prompt_tokens, cost

    def _expect_bounded(self, cost: int):
        if cost > self.max_cost:
            raise TooLong(
                f"expected work of at most {self.max_cost:,} positions (tokens of prompt and"
                f" response, times steps, times two with cfg_scale), got {cost:,}: ask for fewer"
                " tokens, steps or regions"
            )

    def _expect_patience(self, ticket: Ticket):
        """Raises `QueueFull` for a client who has as much under way as one may have."""
        owed = self._owed[ticket.client] if ticket.client is not None else 0
        if owed and owed + ticket.cost > self.max_client_cost:
            self.metrics.count("refused")
            raise QueueFull(
                "too many requests of yours are under way already: try again later",
                self.metrics.seconds_until_free(len(self._waiting)),
            )

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
                self._check(job, options | {name: blocks * block})
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
        defaults = self.captioner.model.decoding_defaults
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
            self._start(batch)

    def _start(self, batch: list[Ticket], beside: Sequence[Ticket] = ()):
        """Runs a batch, while those `beside` it are held up."""
        batch = [t for t in batch if t.future.set_running_or_notify_cancel()]
        self._running = [*beside, *batch]
        try:
            self._run(batch, nested=bool(beside))
        finally:
            self._running = list(beside)

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
            return self._take(self._companions())

    def _take(self, batch: list[Ticket]) -> list[Ticket]:
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

    def _companions(self, cheapest: float = float("inf")) -> list[Ticket]:
        """The oldest waiting job of at most so much cost, and those that may run beside it."""
        fitting = [ticket for ticket in self._waiting if ticket.cost <= cheapest]
        if not fitting:
            return []
        first, *others = fitting
        batch = [first]
        for ticket in others:
            if ticket.key == first.key and self._passes([*batch, ticket]) <= self.max_batch:
                batch.append(ticket)
        return batch

    def _passes(self, tickets: list[Ticket]) -> int:
        most = self.captioner.model.config.num_region_prompts
        return sum(ticket.job.passes(most) for ticket in tickets)

    def _run(self, batch: list[Ticket], nested: bool = False):
        """Resolves every ticket of the batch, whatever happens."""
        batch = [ticket for ticket in batch if not ticket.future.done()]
        if not batch:
            return
        try:
            self._generate(batch, nested)
        except _AllCancelled:
            for ticket in batch:
                ticket.future.set_exception(CancelledError())
        except BaseException as error:  # nobody may wait for ever, whatever went wrong
            if len(batch) > 1:
                for ticket in batch:
                    self._run([ticket], nested)
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

    def _generate(self, batch: list[Ticket], nested: bool):
        started = time.monotonic()
        for ticket in batch:
            ticket.started = started
        jobs = [ticket.job for ticket in batch]
        most = self.captioner.model.config.num_region_prompts
        counter = ForwardCounter([job.passes(most) for job in jobs])

        def on_step(_, token_ids: list):
            if all(ticket.cancelled for ticket in batch):
                raise _AllCancelled
            if not nested:
                self._let_pass(batch)
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


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
