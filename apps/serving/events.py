"""Streams states of a running job to a client as server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus

from ..captioning.results import Step

PING_SECONDS = 15  # between signs of life to a client that waits
END = "[DONE]"  # the last event, as OpenAI's

# By default the library ends every stream at the first SIGTERM. Here a stream goes on until the
# grace period ends, and then ends itself with an error event (see `Endpoint.give_up`).
AppStatus.disable_automatic_graceful_drain()


class Mailbox:
    """Hands the latest step from the engine's thread to a coroutine; older ones are dropped."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._step: Step | None = None

    def put(self, step: Step):
        """Takes the newest step, from any thread."""
        self._step = step
        self.ring()

    def ring(self):
        """Wakes the reader, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, the reader gone
            self._loop.call_soon_threadsafe(self._news.set)

    async def get(self, seconds: float) -> Step | None:
        """Returns the newest step, or None when rung without one or nothing came in time."""
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except asyncio.TimeoutError:  # not yet the built-in one in Python 3.10
            return None
        self._news.clear()
        step, self._step = self._step, None
        return step


def event(content: dict) -> str:
    """Returns an event's data: JSON, on one line."""
    return json.dumps(content, ensure_ascii=False)


def event_stream(events: AsyncIterator[str]) -> EventSourceResponse:
    """Returns a response that sends the data of events as they come, and comments between them."""
    response = EventSourceResponse(
        events,
        sep="\n",
        headers={"Cache-Control": "no-cache"},
        ping=PING_SECONDS,
        ping_message_factory=lambda: ServerSentEvent(comment="waiting", sep="\n"),
    )
    # Whether the connection stays open is the server's to say: when it stops, it does not.
    del response.headers["connection"]
    return response
