"""Passes requests on to replicas of an engine, and to another one when a replica dies.

    client --> uvicorn, `app_of(Relay)` --> Ray Serve's handle --> `Replica`: application, engine

Ray Serve chooses a replica that has room, starts another for one that died, and fails what was
under way there. Captioning changes nothing, so that is asked again here.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from .door import RETRY_SECONDS, Door, shutting_down
from .errors import ApiError
from .events import END, event
from .http import drain, read_body
from .limits import Limits

MAX_DEATHS = 3  # of replicas under one request, which may well be their cause
PAUSE_SECONDS = 0.2  # before a request is passed on again
ASK_SECONDS = 5.0  # for replicas to say how they are
DROPPED_HEADERS = (b"content-length", b"connection")  # which the server writes itself
SSE = "text/event-stream"

log = logging.getLogger(__name__)


class Relay(Door):
    """Answers chat completions by replicas.

    Args:
        handle: Ray Serve's handle of a deployment of `Replica`.
        name, limits: as for `Door`.
        max_requests: that wait or run, in all replicas together; more are refused.
    """

    def __init__(self, handle, name: str, limits: Limits, max_requests: int):
        super().__init__(name, limits)
        self.handle = handle
        self.max_requests = max_requests
        self.started = time.time()

        self.under_way = 0
        self.registry = CollectorRegistry()
        self.retried = Counter(
            "retries", "requests passed on again", namespace="perceptiondlm", registry=self.registry
        )

    def close(self):
        """Does nothing: who started the replicas ends them."""

    def card(self) -> dict:
        """Returns the model as OpenAI lists one."""
        return self.card_since(self.started)

    async def status(self) -> dict:
        """Returns what `/health` says: ok as long as one replica is."""
        replicas = await self._ask_all("status")
        is_ready = any(each["status"] == "ok" for each in replicas)
        word = "stopping" if self.stopping.is_set() else "ok" if is_ready else "no replica"
        return {
            "status": word,
            "model": self.name,
            "queue_length": sum(each["queue_length"] for each in replicas),
            "running": sum(each["running"] for each in replicas),
            "under_way": self.under_way,
            "replicas": [
                {name: each[name] for name in ("replica", "status", "queue_length", "running")}
                for each in replicas
            ],
        }

    async def prometheus(self) -> bytes:
        """Returns each replica's metrics with its id as label `replica`, and the relay's own."""
        texts = await self._ask_all("prometheus")
        registry = CollectorRegistry()
        registry.register(_Collected(merge_metrics(texts)))
        return generate_latest(self.registry) + generate_latest(registry)

    async def chat(self, request: Request) -> Response:
        """Answers one request by a replica, or raises ApiError."""
        deadline = time.monotonic() + self.limits.request_seconds
        if self.stopping.is_set():
            await drain(request)
            raise shutting_down()
        self._expect_room()

        self.under_way += 1
        with contextlib.ExitStack() as held:
            held.callback(self._leave)
            body = await read_body(request, self.limits, self.uploads)
            held.callback(self.uploads.give, len(body))
            response = await self._response(request, bytes(body), deadline)
            if isinstance(response, _Stream):
                response.held = held.pop_all()  # until it ends
            return response

    async def _response(self, request: Request, body: bytes, deadline: float) -> Response:
        client = tuple(request.client) if request.client else None
        asked = asyncio.create_task(self._ask(client, body))
        try:
            await self.wait_for(asked, request, deadline)
            call, start, content = asked.result()
        finally:
            asked.cancel()

        if content is not None:
            return _with_headers(Response(content, start["status"]), start)
        events = self._events(call, deadline)
        return _with_headers(_Stream(events, start["status"], media_type=SSE), start)

    async def _ask(self, client: tuple | None, body: bytes) -> tuple:
        """Passes a request on until a replica answers it.

        Returns the call, its first message and all of its content: None for events, of which each
        is passed on when it comes.
        """
        deaths = 0
        while True:
            call = self.handle.options(stream=True).answer.remote(client, body)
            try:
                start = await call.__anext__()
                if _is_stream(start):
                    return call, start, None
                content = b"".join([message.get("body", b"") async for message in call])
                if start["status"] != 503:  # what a replica says whose engine has ended
                    return call, start, content
                reason = "it is stopping"
            except RayTaskError as error:
                log.error("a replica failed", exc_info=error)
                raise ApiError(500, "internal error, see the replica's log") from error
            except (RayError, StopAsyncIteration) as error:
                deaths += isinstance(error, ActorDiedError)
                reason = type(error).__name__
            except asyncio.CancelledError:
                call.cancel()
                raise

            if deaths >= MAX_DEATHS:
                raise _lost(f"{deaths} replicas died while this was asked of them")
            log.warning("a replica was lost (%s): its request is passed on again", reason)
            self.retried.inc()
            await asyncio.sleep(PAUSE_SECONDS)

    async def _events(self, call, deadline: float) -> AsyncIterator[bytes]:
        """Yields the bytes of events; when their replica dies, an error event ends them."""
        stopped = asyncio.create_task(self.stopped.wait())
        is_whole = False
        try:
            while (message := await self._next(call, stopped, deadline)) is not None:
                yield message.get("body", b"")
            is_whole = True
        except ApiError as error:
            yield f"data: {event(error.body())}\n\ndata: {END}\n\n".encode()
        finally:
            stopped.cancel()
            if not is_whole:
                call.cancel()

    async def _next(self, call, stopped: asyncio.Task, deadline: float) -> dict | None:
        """Returns an answer's next message, or None at its end."""
        coming = asyncio.ensure_future(_message(call))
        left = max(0, deadline - time.monotonic())
        try:
            await asyncio.wait({coming, stopped}, timeout=left, return_when="FIRST_COMPLETED")
            if coming.done():
                return coming.result()
            raise shutting_down() if stopped.done() else self.timed_out()
        except RayError as error:
            log.warning("a replica was lost (%s) in the middle of a stream", type(error).__name__)
            raise _lost("the replica died in the middle of this stream") from error
        finally:
            coming.cancel()

    async def _ask_all(self, method: str) -> list:
        """Returns what each replica that answers in time says."""
        try:
            asked = self.handle.broadcast(method).results_async(timeout_s=ASK_SECONDS)
            return list(await asked)
        except (RayError, TimeoutError, asyncio.TimeoutError) as error:
            log.warning("replicas did not say how they are: %r", error)
            return []

    def _expect_room(self):
        if self.under_way >= self.max_requests:
            raise ApiError(
                429,
                f"{self.under_way} requests wait or run already: try again later",
                code="queue_full",
                headers={"Retry-After": "2"},
            )

    def _leave(self):
        self.under_way -= 1


class _Stream(StreamingResponse):
    """Sends events, and frees what the request held however they end."""

    held = contextlib.ExitStack()

    async def __call__(self, scope, receive, send):
        with self.held:
            await super().__call__(scope, receive, send)


class _Collected:
    """Gives families of metrics that are known to a registry."""

    def __init__(self, families: list[Metric]):
        self.families = families

    def collect(self) -> list[Metric]:
        return self.families


def merge_metrics(texts: list[tuple[str, str]]) -> list[Metric]:
    """Merges replicas' metrics, each an id and a text, into families with the label `replica`."""
    count = GaugeMetricFamily("perceptiondlm_replicas", "replicas that answer", value=len(texts))
    families: dict[str, Metric] = {count.name: count}
    for replica, text in texts:
        for found in text_string_to_metric_families(text):
            family = families.setdefault(
                found.name, Metric(found.name, found.documentation, found.type)
            )
            for sample in found.samples:
                family.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    return list(families.values())


async def _message(call) -> dict | None:
    try:
        return await call.__anext__()
    except StopAsyncIteration:
        return None


def _is_stream(start: dict) -> bool:
    return dict(start["headers"]).get(b"content-type", b"").startswith(SSE.encode())


def _with_headers(response: Response, start: dict) -> Response:
    """Gives a response the headers of a replica's."""
    for name, value in start["headers"]:
        if name.lower() not in DROPPED_HEADERS:
            response.headers[name.decode("latin-1")] = value.decode("latin-1")
    return response


def _lost(message: str) -> ApiError:
    return ApiError(503, message, code="replica_lost", headers={"Retry-After": str(RETRY_SECONDS)})
