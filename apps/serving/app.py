"""The endpoint as an ASGI application: OpenAI's chat completions over an engine."""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from ..captioning.captioner import Step
from .chat import Asked
from .engine import Engine, EngineClosed, JobFailed, QueueFull, Ticket
from .errors import ApiError
from .fetch import UrlPolicy
from .http import (
    ByteBudget,
    client_of,
    drain,
    install_errors,
    read_body,
    until_disconnected,
)
from .jobs import Completion, job_of
from .limits import Limits
from .pool import shared_pool
from .request import expect_model, request_schema
from .writer import ChatWriter

SUBMITTERS = 8  # threads that wait for what workers read, check it and queue it
UPLOAD_BYTES = 512 << 20  # of all bodies in the making
PING_SECONDS = 15  # between signs of life to a client that streams and waits
CLOSE_SECONDS = 5  # for the running step, when the server stops
RETRY_SECONDS = 5  # until a server that stops is likely to be back

log = logging.getLogger(__name__)


def create_app(
    engine: Engine,
    *,
    name: str,
    limits: Limits | None = None,
    policy: UrlPolicy | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """The endpoint as an ASGI application, which closes the engine when it ends.

    Its `state.endpoint` is the `Endpoint`, whose `stop` answers what is still unanswered.

    Args:
        engine: an `Engine`; name: what clients call the model.
        limits: a `Limits`; policy: a `UrlPolicy`, by default one that fetches nothing.
        api_key: what clients must send as bearer token; None or "": nothing.
    """
    endpoint = Endpoint(engine, name, limits, policy)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        endpoint.close()

    async def authorized(request: Request):
        given = request.headers.get("authorization", "").encode()
        if api_key and not secrets.compare_digest(given, f"Bearer {api_key}".encode()):
            raise ApiError(
                401,
                "expected the right API key as bearer token",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    app = FastAPI(title="PerceptionDLM", lifespan=lifespan, redoc_url=None)
    app.state.endpoint = endpoint
    install_errors(app)

    @app.get("/health")
    async def health():
        ready = engine.alive and not endpoint.stopping.is_set()
        status = {
            "status": "ok" if ready else "stopping",
            "model": name,
            "queue_length": engine.queue_length,
            "running": engine.running,
        }
        return JSONResponse(status, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics():
        text = engine.metrics.prometheus(
            queue_length=engine.queue_length, running=engine.running, up=engine.alive
        )
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=[Depends(authorized)])
    async def models():
        return {"object": "list", "data": [endpoint.card()]}

    @app.get("/v1/models/{wanted:path}", dependencies=[Depends(authorized)])
    async def model(wanted: str):
        expect_model(name, wanted)
        return endpoint.card()

    described = {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": request_schema()}},
        }
    }

    @app.post("/v1/chat/completions", dependencies=[Depends(authorized)], openapi_extra=described)
    async def chat(request: Request):
        return await endpoint.chat(request)

    return app


class Endpoint:
    """Chat completions over an engine."""

    def __init__(self, engine: Engine, name: str, limits: Limits | None, policy: UrlPolicy | None):
        self.engine = engine
        self.name = name
        self.limits = limits or Limits()
        self.policy = policy or UrlPolicy()
        self.pool = shared_pool()
        self.uploads = ByteBudget(max(UPLOAD_BYTES, self.limits.body_bytes))
        self.submitters = ThreadPoolExecutor(SUBMITTERS, thread_name_prefix="perceptiondlm-read")
        self.stopping = asyncio.Event()  # nothing new is taken
        self.stopped = asyncio.Event()  # nothing is waited for any more

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

    def card(self) -> dict:
        """The model as OpenAI lists one."""
        created = int(self.engine.metrics.started)
        return {"id": self.name, "object": "model", "created": created, "owned_by": "perceptiondlm"}

    async def chat(self, request: Request):
        """Answers one request, or raises ApiError."""
        deadline = time.monotonic() + self.limits.request_seconds
        if self.stopping.is_set():
            await drain(request)
            raise _shutting_down()
        body = await read_body(request, self.limits, self.uploads)
        mailbox = Mailbox()
        submit = asyncio.get_running_loop().run_in_executor(
            self.submitters, self._submit, body, mailbox, client_of(request), deadline
        )
        asked, ticket = await self._submitted(submit, len(body))

        writer = ChatWriter(self.name)
        if asked.stream:
            events = self._events(ticket, mailbox, writer, asked.include_usage, deadline)
            return StreamingResponse(
                events,
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
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
            raise _shutting_down()
        finally:
            stopped.cancel()

    def _submit(
        self, body: bytearray, mailbox: "Mailbox", client: str, deadline: float
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
            raise _shutting_down() from error
        ticket.future.add_done_callback(lambda _: mailbox.ring())
        return asked, ticket

    async def _outcome(self, request: Request, ticket: Ticket, deadline: float) -> Completion:
        """Waits for the result, the client's leaving, the server's end or the deadline."""
        done = asyncio.wrap_future(ticket.future)
        gone = asyncio.create_task(until_disconnected(request))
        stopped = asyncio.create_task(self.stopped.wait())
        try:
            await asyncio.wait(
                {done, gone, stopped},
                timeout=max(0, deadline - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if done.done():
                return _result(ticket)
            if gone.done():
                log.info("a client went away before it was answered")
                raise ApiError(499, "the client has gone")
            raise _shutting_down() if stopped.done() else self._timeout()
        finally:
            for waiting in (gone, stopped, done):
                waiting.cancel()
            ticket.cancel()  # nothing, once it is done

    def _timeout(self) -> ApiError:
        return ApiError(
            504,
            f"expected an answer within {self.limits.request_seconds:g} seconds",
            code="timeout",
        )

    async def _events(
        self,
        ticket: Ticket,
        mailbox: "Mailbox",
        writer: ChatWriter,
        include_usage: bool,
        deadline: float,
    ) -> AsyncIterator[str]:
        """Server-sent events: the start, states, the end; an error ends them as well."""
        stopped = asyncio.create_task(self.stopped.wait())
        stopped.add_done_callback(lambda _: mailbox.ring())
        try:
            yield _event(writer.start())
            while not ticket.future.done():
                left = deadline - time.monotonic()
                if self.stopped.is_set():
                    raise _shutting_down()
                if left <= 0:
                    raise self._timeout()
                step = await mailbox.get(min(PING_SECONDS, left))
                if step is not None:
                    yield _event(writer.state(step))
                elif not (ticket.future.done() or self.stopped.is_set()):
                    yield ": waiting\n\n"
            for chunk in writer.end(_result(ticket), include_usage):
                yield _event(chunk)
        except ApiError as error:
            yield _event(error.body())
        except (asyncio.CancelledError, GeneratorExit):
            log.info("a client went away while it was answered")
            raise
        finally:
            stopped.cancel()
            if not ticket.future.done():
                ticket.cancel()
        yield "data: [DONE]\n\n"


class Mailbox:
    """Hands the latest step from the engine's thread to a coroutine; older ones are dropped."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._step: Step | None = None

    def put(self, step: Step):
        """From any thread: the newest step."""
        self._step = step
        self.ring()

    def ring(self):
        """From any thread: wakes the reader."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, the reader gone
            self._loop.call_soon_threadsafe(self._news.set)

    async def get(self, seconds: float) -> Step | None:
        """The newest step, or None when rung without one or nothing came in time."""
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except asyncio.TimeoutError:  # not yet the built-in one in Python 3.10
            return None
        self._news.clear()
        step, self._step = self._step, None
        return step


def _result(ticket: Ticket) -> Completion:
    """A finished ticket's completion, or its failure as ApiError."""
    try:
        return ticket.future.result(0)
    except CancelledError as error:
        raise _shutting_down() from error
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_input") from error
    except JobFailed as error:
        log.error("a request failed", exc_info=error)
        raise ApiError(500, str(error), code="model_failed") from error


def _shutting_down() -> ApiError:
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


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
