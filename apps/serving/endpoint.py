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
from .door import Door, shutting_down
from .engine import Engine, EngineClosed, JobFailed, QueueFull, Ticket
from .errors import ApiError
from .events import END, Mailbox, event, event_stream
from .fetch import UrlPolicy
from .http import client_of, drain, read_body
from .jobs import job_of
from .limits import Limits
from .pool import shared_pool
from .writer import ChatWriter

SUBMITTERS = 8  # threads that wait for what workers read, check it and queue it
CLOSE_SECONDS = 5  # for the running step, when the server stops

log = logging.getLogger(__name__)


class Endpoint(Door):
    """Answers chat completions over an engine.

    Args:
        engine: runs the model.
        name, limits: as for `Door`.
        policy: which URLs are fetched; by default none.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        limits: Limits | None = None,
        policy: UrlPolicy | None = None,
    ):
        super().__init__(name, limits or Limits())
        self.engine = engine
        self.policy = policy or UrlPolicy()
        self.pool = shared_pool()
        self.submitters = ThreadPoolExecutor(SUBMITTERS, thread_name_prefix="perceptiondlm-read")

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
        return self.card_since(self.engine.metrics.started)

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
            await self.wait_for(done, request, deadline)
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
                    raise self.timed_out()
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


def _drop(submit: asyncio.Future):
    """Cancels the ticket of a request that nobody waits for any more."""
    if not submit.cancelled() and submit.exception() is None:
        submit.result()[1].cancel()
