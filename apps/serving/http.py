"""Reads bodies within limits, tells clients apart, and answers failures with OpenAI's errors."""

import asyncio
import contextlib
import ipaddress
import logging
import re

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .errors import ApiError
from .limits import Limits

log = logging.getLogger(__name__)

DRAIN_BYTES, DRAIN_SECONDS = 64 << 20, 5.0  # read and dropped, so that a refusal is heard


def response_of(error: ApiError) -> JSONResponse:
    """Returns the response that says an error."""
    return JSONResponse(error.body(), error.status, error.headers)


def install_errors(app: FastAPI):
    """Answers every failure with an error body."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError):
        return response_of(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException):
        message = f"{error.detail}: {request.method} {request.url.path[:200]}"
        return response_of(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception):
        return response_of(ApiError(500, "internal error, see the server's log"))


class ByteBudget:
    """Bounds the memory of bodies that are being received or read, all requests together."""

    def __init__(self, size: int):
        self.size = size
        self.taken = 0

    def take(self, count: int):
        """Takes bytes; raises ApiError 429 where there are not so many left."""
        if self.taken + count > self.size:
            raise ApiError(
                429,
                "too much is being uploaded: try again later",
                code="overloaded",
                headers={"Retry-After": "2"},
            )
        self.taken += count

    def give(self, count: int):
        """Gives back what was taken."""
        self.taken -= count


async def read_body(request: Request, limits: Limits, budget: ByteBudget) -> bytearray:
    """Receives the body, within size and time; raises ApiError for one beyond them.

    What it took of the budget is the caller's to give back.
    """
    data = bytearray()
    declared = request.headers.get("content-length", "")

    with contextlib.ExitStack() as unless_whole:
        unless_whole.callback(lambda: budget.give(len(data)))
        try:
            if declared.isdigit() and int(declared) > limits.body_bytes:
                raise _too_large(limits.body_bytes)
            seconds = min(limits.body_seconds, limits.request_seconds)
            await asyncio.wait_for(_receive(request, data, limits, budget), seconds)
        except ClientDisconnect as error:
            log.info("a client went away before its request was whole")
            raise ApiError(499, "the client has gone") from error
        except ApiError:
            await drain(request)
            raise
        except asyncio.TimeoutError as error:  # not yet the built-in one in Python 3.10
            raise ApiError(
                408,
                f"expected the body within {limits.body_seconds:g} seconds",
                code="request_timeout",
                headers={"Connection": "close"},
            ) from error
        unless_whole.pop_all()
    return data


async def _receive(request: Request, data: bytearray, limits: Limits, budget: ByteBudget):
    async for chunk in request.stream():
        if len(data) + len(chunk) > limits.body_bytes:
            raise _too_large(limits.body_bytes)
        budget.take(len(chunk))
        data += chunk


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"expected a body of at most {limit / (1 << 20):g} MiB, got more",
        code="request_too_large",
        headers={"Connection": "close"},
    )


async def drain(request: Request):
    """Reads and drops what a client still sends: one whose connection breaks hears no refusal."""

    async def drop():
        left = DRAIN_BYTES
        while left > 0:
            message = await request.receive()
            if message["type"] != "http.request" or not message.get("more_body"):
                return
            left -= len(message.get("body", b""))

    try:
        await asyncio.wait_for(drop(), DRAIN_SECONDS)
    except asyncio.TimeoutError:
        pass


def client_of(request: Request) -> str:
    """Says whose request it is, by address: of IPv6, the network that one customer has."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(ipaddress.ip_network((address, 64), strict=False))


async def until_disconnected(request: Request):
    """Returns when the client has gone; to be called after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class MaxBody:
    """Refuses, as ASGI middleware, bodies that are too large and paths that lead nowhere.

    Args:
        app: the application beneath.
        max_bytes: of a body; more is answered with 413.
        refused: a pattern; a path in which it is found is answered with 404.
    """

    def __init__(self, app, max_bytes: int, refused: str):
        self.app = app
        self.max_bytes = max_bytes
        self.refused = re.compile(refused)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            return await response_of(_too_large(self.max_bytes))(scope, receive, send)
        received = 0

        async def counted():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(
                    413, f"expected a body of at most {self.max_bytes} bytes, got more"
                )
            return message

        if self.refused.search(scope["path"]):
            return await response_of(ApiError(404, "there are no uploads here"))(
                scope, receive, send
            )
        try:
            await self.app(scope, counted, send)
        except ClientDisconnect:
            log.info("a client went away before its request was whole")
