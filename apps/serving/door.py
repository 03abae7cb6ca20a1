"""Takes requests until it is told to stop, and waits for their answers: what all servers share."""

import asyncio
import logging
import time

from fastapi import Request
from fastapi.responses import Response

from .errors import ApiError
from .http import ByteBudget, until_disconnected
from .limits import Limits

UPLOAD_BYTES = 512 << 20  # of all bodies in the making
RETRY_SECONDS = 5  # until a server that stops is likely to be back

log = logging.getLogger(__name__)


class Door:
    """Is what the application's routes call: an engine's `Endpoint`, or a `Relay` to replicas.

    Args:
        name: what clients call the model.
        limits: what one request may ask for.

    Attributes:
        stopping: set once nothing new is taken.
        stopped: set once nothing is waited for any more.
    """

    def __init__(self, name: str, limits: Limits):
        self.name = name
        self.limits = limits
        self.uploads = ByteBudget(max(UPLOAD_BYTES, limits.body_bytes))
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
        """Ends what answers requests."""
        raise NotImplementedError

    def card(self) -> dict:
        """Returns the model as OpenAI lists one."""
        raise NotImplementedError

    async def status(self) -> dict:
        """Returns what `/health` says."""
        raise NotImplementedError

    async def prometheus(self) -> bytes:
        """Returns what `/metrics` says."""
        raise NotImplementedError

    async def chat(self, request: Request) -> Response:
        """Answers one request, or raises ApiError."""
        raise NotImplementedError

    def card_since(self, started: float) -> dict:
        """Returns the model as OpenAI lists one, there since so many seconds of the epoch."""
        owner = "perceptiondlm"
        return {"id": self.name, "object": "model", "created": int(started), "owned_by": owner}

    async def wait_for(self, done: asyncio.Future, request: Request, deadline: float):
        """Waits for an answer; raises ApiError if before that the client leaves, or time is up.

        Args:
            done: the answer in the making; it is left as it is.
            request: whose body was read.
            deadline: in seconds of the monotonic clock.
        """
        gone = asyncio.create_task(until_disconnected(request))
        end = asyncio.create_task(self.stopped.wait())
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
            raise shutting_down() if end.done() else self.timed_out()
        finally:
            gone.cancel()
            end.cancel()

    def timed_out(self) -> ApiError:
        """Returns the refusal of what took too long."""
        seconds = self.limits.request_seconds
        return ApiError(504, f"expected an answer within {seconds:g} seconds", code="timeout")


def shutting_down() -> ApiError:
    """Returns the refusal of a server that stops."""
    return ApiError(
        503,
        "the server is shutting down: try again later",
        code="shutting_down",
        headers={"Retry-After": str(RETRY_SECONDS)},
    )
