"""The endpoint as an ASGI application: OpenAI's chat completions over an engine."""

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from .captioner import Step
from .engine import Engine, EngineClosed, JobFailed, QueueFull, Ticket
from .serving_chat import Asked, RequestReader
from .serving_fetch import UrlPolicy, fetch
from .serving_http import (
    ApiError,
    ByteBudget,
    SendTimeout,
    install_errors,
    read_body,
    until_disconnected,
)
from .serving_jobs import Completion, job_of
from .serving_limits import Limits
from .serving_request import read_request, request_schema
from .serving_writer import ChatWriter

DECODERS = 8  # threads that read pictures
UPLOAD_BYTES = 512 << 20  # of all bodies in the making
PING_SECONDS = 15  # between signs of life to a client that streams and waits
CLOSE_SECONDS = 5  # for the running step, when the server stops

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

    async def authorised(request: Request):
        given = request.headers.get("authorization", "").encode()
        if api_key and not secrets.compare_digest(given, f"Bearer {api_key}".encode()):
            raise ApiError(
                401,
                "expected the right API key as bearer token",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    app = FastAPI(title="PerceptionDLM", lifespan=lifespan, redoc_url=None)
    app.add_middleware(SendTimeout, seconds=endpoint.limits.send_seconds)
    install_errors(app)

    @app.get("/health")
    async def health():
        status = {
            "status": "ok" if engine.alive else "stopping",
            "model": name,
            "queue_length": engine.queue_length,
            "running": engine.running,
        }
        return JSONResponse(status, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics():
        text = engine.metrics.prometheus(
            queue_length=engine.queue_length, running=engine.running, up=engine.alive
        )
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=[Depends(authorised)])
    async def models():
        return {"object": "list", "data": [endpoint.card()]}

    @app.get("/v1/models/{wanted:path}", dependencies=[Depends(authorised)])
    async def model(wanted: str):
        endpoint.expect_model(wanted)
        return endpoint.card()

    described = {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": request_schema()}},
        }
    }

    @app.post("/v1/chat/completions", dependencies=[Depends(authorised)], openapi_extra=described)
    async def chat(request: Request):
        return await endpoint.chat(request)

    return app


class Endpoint:
    """Chat completions over an engine."""

    def __init__(self, engine: Engine, name: str, limits: Limits | None, policy: UrlPolicy | None):
        self.engine = engine
        self.name = name
        self.limits = limits or Limits()
        policy = policy or UrlPolicy()
        self.read = RequestReader(self.limits, lambda url: fetch(url, policy, self.limits))
        self.uploads = ByteBudget(max(UPLOAD_BYTES, self.limits.body_bytes))
        self.decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="perceptiondlm-decode")

    def close(self):
        """Ends the engine; what was under way has been answered by now."""
        self.engine.close(drain=False, timeout=CLOSE_SECONDS)
        self.decoders.shutdown(wait=False, cancel_futures=True)

    def card(self) -> dict:
        """The model as OpenAI lists one."""
        created = int(self.engine.metrics.started)
        return {"id": self.name, "object": "model", "created": created, "owned_by": "perceptiondlm"}

    def expect_model(self, name: str):
        """Refuses another model's name."""
        if name != self.name:
            raise ApiError(
                404,
                f"expected the model {self.name!r}, got {name[:200]!r}",
                code="model_not_found",
                param="model",
            )

    async def chat(self, request: Request):
        """Answers one request, or raises ApiError."""
        body = await read_body(request, self.limits, self.uploads)
        mailbox = Mailbox()
        try:
            asked, ticket = await asyncio.get_running_loop().run_in_executor(
                self.decoders, self._submit, body, mailbox
            )
        finally:
            self.uploads.give(len(body))
        writer = ChatWriter(self.name)
        if asked.stream:
            events = self._events(ticket, mailbox, writer, asked.include_usage)
            return StreamingResponse(
                events,
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        completion = await self._outcome(request, ticket)
        return JSONResponse(writer.whole(completion))

    def _submit(self, body: bytearray, mailbox: "Mailbox") -> tuple[Asked, Ticket]:
        """Parses, decodes, checks and queues; runs in a decoder thread."""
        try:
            self.engine.expect_room()  # before any work is done
            request = read_request(body)
            self.expect_model(request.model)
            asked = self.read(request)
            listener = mailbox.put if asked.stream else None
            ticket = self.engine.submit(
                job_of(asked), on_step=listener, shorten=asked.shorten, **asked.options
            )
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_input") from error
        except QueueFull as error:
            wait = {"Retry-After": str(round(error.retry_after))}
            raise ApiError(429, str(error), code="queue_full", headers=wait) from error
        except EngineClosed as error:
            raise ApiError(503, str(error), code="shutting_down") from error
        ticket.future.add_done_callback(lambda _: mailbox.ring())
        return asked, ticket

    async def _outcome(self, request: Request, ticket: Ticket) -> Completion:
        """Waits for the result, the client's leaving or the time to give up."""
        done = asyncio.wrap_future(ticket.future)
        gone = asyncio.create_task(until_disconnected(request))
        try:
            await asyncio.wait(
                {done, gone},
                timeout=self.limits.request_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if done.done():
                return _result(ticket)
            if gone.done():
                raise ApiError(499, "the client has gone")
            raise self._timeout()
        finally:
            gone.cancel()
            done.cancel()
            ticket.cancel()  # nothing, once it is done

    def _timeout(self) -> ApiError:
        return ApiError(
            504,
            f"expected an answer within {self.limits.request_seconds:g} seconds",
            code="timeout",
        )

    async def _events(
        self, ticket: Ticket, mailbox: "Mailbox", writer: ChatWriter, include_usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events: the start, states, the end; an error ends them as well."""

        deadline = asyncio.get_running_loop().time() + self.limits.request_seconds
        try:
            yield _event(writer.start())
            while not ticket.future.done():
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0:
                    raise self._timeout()
                step = await mailbox.get(min(PING_SECONDS, left))
                if step is not None:
                    yield _event(writer.state(step))
                elif not ticket.future.done():
                    yield ": waiting\n\n"
            for chunk in writer.end(_result(ticket), include_usage):
                yield _event(chunk)
        except ApiError as error:
            yield _event(error.body())
        finally:
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
        raise ApiError(503, "the server is shutting down", code="shutting_down") from error
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_input") from error
    except JobFailed as error:
        log.error("a request failed", exc_info=error)
        raise ApiError(500, str(error), code="model_failed") from error


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
