"""Answers chat completions over an engine: whole or streamed, each within its deadline."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from .chat import Asked
from .completions import Completion
from .engine import Engine, EngineClosed, JobFailed, QueueFull, Ticket
from .errors import ApiError
from .events import END, Mailbox, event, event_stream
from .fetch import UrlPolicy
from .http import ByteBudget, client_of, drain, read_body, until_disconnected
from .jobs import job_of
from .limits import Limits
from .pool import shared_pool
from .writer import ChatWriter

SUBMITTERS = 8  # threads that wait for what workers read, check it and queue it
UPLOAD_BYTES = 512 << 20  # of all bodies in the making
CLOSE_SECONDS = 5  # for the running step, when the server stops
RETRY_SECONDS = 5  # until a server that stops is likely to be back

log = logging.getLogger(__name__)


class Endpoint:
    """Answers chat completions over an engine.

    Args:
        engine: runs the model.
        name: what clients call the model.
        limits: what one request may ask for.
        policy: which URLs are fetched; by default none.

    Attributes:
        stopping: set once nothing new is taken.
        stopped: set once nothing is waited for any more.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        limits: Limits | None = None,
        policy: UrlPolicy | None = None,
    ):
        self.engine = engine
        self.name = name
        self.limits = limits or Limits()
        self.policy = policy or UrlPolicy()
        self.pool = shared_pool()
        self.uploads = ByteBudget(max(UPLOAD_BYTES, self.limits.body_bytes))
        self.submitters = ThreadPoolExecutor(SUBMITTERS, thread_name_prefix="perceptiondlm-read")
        self.stopping = asyncio.Event()
        self.stopped = asyncio.Event()

    def stop(self):
        """Takes nothing new, and answers 503 to what comes; what is under way goes on."""
        self.stopping.set()

    def give_up(self):
        """Answers 503 to all that is not answered yet."""
        self.stop()
        self.stopped.set()

    def close(self):
        """Ends the engine; what was under way has been answered by now."""
        self.engine.close(drain=False, timeout=CLOSE_SECONDS)
        self.submitters.shutdown(wait=False, cancel_futures=True)

    async def status(self) -> dict:
        """Returns what `/health` says."""
        is_ready = self.engine.alive and not self.stopping.is_set()
        return {
            "status": "ok" if is_ready else "stopping",
            "model": self.name,
            "queue_length": self.engine.queue_length,
            "running": self.engine.running,
        }

    async def prometheus(self) -> bytes:
        """Returns what `/metrics` says."""
        return self.engine.metrics.prometheus()

    def card(self) -> dict:
        """Returns the model as OpenAI lists one."""
        return model_card(self.name, self.engine.metrics.started)

    async def chat(self, request: Request) -> Response:
        """Answers one request, or raises ApiError."""
        deadline = time.monotonic() + self.limits.request_seconds
        if self.stopping.is_set():
            await drain(request)
            raise shutting_down()

        # Reading, checking and queueing take a thread, and a worker process for the images.
        body = await read_body(request, self.limits, self.uploads)
        mailbox = Mailbox()
        submit = asyncio.get_running_loop().run_in_executor(
            self.submitters, self._submit, body, mailbox, client_of(request), deadline
        )
        asked, ticket = await self._submitted(submit, len(body))

        writer = ChatWriter(self.name)
        if asked.stream:
            return event_stream(
                self._events(ticket, mailbox, writer, asked.include_usage, deadline)
            )
        completion = await self._outcome(request, ticket, deadline)
        return JSONResponse(writer.whole(completion))

    async def _submitted(self, submit: asyncio.Future, size: int) -> tuple[Asked, Ticket]:
        """Waits until a request is queued, or the server gives it up."""
        submit.add_done_callback(lambda _: self.uploads.give(size))
        stopped = asyncio.create_task(self.stopped.wait())
        try:
            await asyncio.wait({submit, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if submit.done():
                return submit.result()
            submit.add_done_callback(_drop)
            raise shutting_down()
        finally:
            stopped.cancel()

    def _submit(
        self, body: bytearray, mailbox: Mailbox, client: str, deadline: float
    ) -> tuple[Asked, Ticket]:
        """Parses, decodes, checks and queues; runs in a thread, reads in a worker process."""
        try:
            self.engine.expect_room()  # before any work is done
            asked = self.pool.read_chat(body, self.name, self.limits, self.policy, deadline)
            ticket = self.engine.submit(
                job_of(asked),
                on_step=mailbox.put if asked.stream else None,
                shorten=asked.shorten,
                client=client,
                **asked.options,
            )
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_input") from error
        except QueueFull as error:
            wait = {"Retry-After": str(round(error.retry_after))}
            raise ApiError(429, str(error), code="queue_full", headers=wait) from error
        except EngineClosed as error:
            raise shutting_down() from error

        # So that a stream that waits for the next step hears of the end.
        ticket.future.add_done_callback(lambda _: mailbox.ring())
        return asked, ticket

    async def _outcome(self, request: Request, ticket: Ticket, deadline: float) -> Completion:
        """Waits for the result, the client's leaving, the server's end or the deadline."""
        done = asyncio.wrap_future(ticket.future)
        try:
            await until_answered(request, done, self.stopped, self.limits, deadline)
            return _result(ticket)
        finally:
            done.cancel()
            ticket.cancel()  # nothing, once it is done

    async def _events(
        self,
        ticket: Ticket,
        mailbox: Mailbox,
        writer: ChatWriter,
        include_usage: bool,
        deadline: float,
    ) -> AsyncIterator[str]:
        """Yields the data of events: the start, states, the end; an error ends them as well."""
        stopped = asyncio.create_task(self.stopped.wait())
        stopped.add_done_callback(lambda _: mailbox.ring())
        try:
            yield event(writer.start())

            # Of the steps that came while one was sent, the latest alone is told.
            while not ticket.future.done():
                left = deadline - time.monotonic()
                if self.stopped.is_set():
                    raise shutting_down()
                if left <= 0:
                    raise timed_out(self.limits)
                step = await mailbox.get(left)
                if step is not None:
                    yield event(writer.state(step))

            for chunk in writer.end(_result(ticket), include_usage):
                yield event(chunk)
        except ApiError as error:
            yield event(error.body())
        except (asyncio.CancelledError, GeneratorExit):
            log.info("a client went away while it was answered")
            raise
        finally:
            stopped.cancel()
            if not ticket.future.done():  # else it might be counted as cancelled
                ticket.cancel()
        yield END


async def until_answered(
    request: Request,
    done: asyncio.Future,
    stopped: asyncio.Event,
    limits: Limits,
    deadline: float,
):
    """Returns once `done` is; raises ApiError if before that the client leaves, or time is up.

    Args:
        request: whose body was read.
        done: the answer in the making; it is left as it is.
        stopped: set once nothing is waited for any more.
        limits, deadline: when it is given up, as said and in seconds of the monotonic clock.
    """
    gone = asyncio.create_task(until_disconnected(request))
    end = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait(
            {done, gone, end},
            timeout=max(0, deadline - time.monotonic()),
            return_when=asyncio.FIRST_COMPLETED,
        )
        # A result that is there goes before every other event.
        if done.done():
            return
        if gone.done():
            log.info("a client went away before it was answered")
            raise ApiError(499, "the client has gone")
        raise shutting_down() if end.done() else timed_out(limits)
    finally:
        gone.cancel()
        end.cancel()


def model_card(name: str, started: float) -> dict:
    """Returns a model as OpenAI lists one."""
    return {"id": name, "object": "model", "created": int(started), "owned_by": "perceptiondlm"}


def timed_out(limits: Limits) -> ApiError:
    """Returns the refusal of what took too long."""
    return ApiError(
        504,
        f"expected an answer within {limits.request_seconds:g} seconds",
        code="timeout",
    )


def _result(ticket: Ticket) -> Completion:
    """Returns a finished ticket's completion, or raises its failure as ApiError."""
    try:
        return ticket.future.result(0)
    except CancelledError as error:
        raise shutting_down() from error
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_input") from error
    except JobFailed as error:
        log.error("a request failed", exc_info=error)
        raise ApiError(500, str(error), code="model_failed") from error


def shutting_down() -> ApiError:
    """Returns the refusal of a server that stops."""
    return ApiError(
        503,
        "the server is shutting down: try again later",
        code="shutting_down",
        headers={"Retry-After": str(RETRY_SECONDS)},
    )


def _drop(submit: asyncio.Future):
    """Cancels the ticket of a request that nobody waits for any more."""
    if not submit.cancelled() and submit.exception() is None:
        submit.result()[1].cancel()
