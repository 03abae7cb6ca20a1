"""Holds one engine in a process of its own, as a replica of a Ray Serve deployment."""

import argparse
import asyncio
import logging
from collections.abc import AsyncIterator

from ray import serve

from .app import create_app
from .arguments import limits_of, load_engine
from .fetch import UrlPolicy
from .pool import shared_pool

log = logging.getLogger(__name__)


class Replica:
    """Answers what a `Relay` passes on, by the application that serves a single engine.

    Args:
        args: the parsed command line of `perceptiondlm serve`.
        name: what clients call the model.
    """

    def __init__(self, args: argparse.Namespace, name: str):
        shared_pool().warm_up()
        engine = load_engine(args)
        policy = UrlPolicy(frozenset(args.allow_url_host), args.allow_private_urls)
        self.app = create_app(engine, name=name, limits=limits_of(args), policy=policy)
        self.endpoint = self.app.state.endpoint
        self.id = serve.get_replica_context().replica_id.unique_id
        self._running: set[asyncio.Task] = set()

    async def answer(self, client: tuple | None, body: bytes) -> AsyncIterator[dict]:
        """Yields the messages of ASGI that answer a chat completion's body."""
        messages: asyncio.Queue[dict | None] = asyncio.Queue()
        left = asyncio.Event()
        unread = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive():
            if unread:
                return unread.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        task = asyncio.create_task(self.app(_scope(client, body), receive, messages.put))
        self._running.add(task)
        task.add_done_callback(lambda task: self._finish(task, messages))
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            left.set()  # not cancelled: the application drops the job as for any client that leaves

    async def status(self) -> dict:
        """Returns the replica's share of `/health`."""
        status = await self.endpoint.status()
        return {"replica": self.id, **status}

    async def prometheus(self) -> tuple[str, str]:
        """Returns the replica's id and metrics."""
        return self.id, (await self.endpoint.prometheus()).decode()

    async def check_health(self):
        """Raises where `/health` would not be ok; Ray Serve then starts another replica."""
        status = await self.endpoint.status()
        if status["status"] != "ok":
            raise RuntimeError(f"expected an engine that runs, got {status}")

    def __del__(self):
        if hasattr(self, "endpoint"):
            self.endpoint.close()

    def _finish(self, task: asyncio.Task, messages: asyncio.Queue):
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a request failed", exc_info=task.exception())
        messages.put_nowait(None)


def _scope(client: tuple | None, body: bytes) -> dict:
    """Returns the scope of ASGI for a request; the relay has checked everything but its body."""
    path = "/v1/chat/completions"
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": client,
        "server": None,
    }
