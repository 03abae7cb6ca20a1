"""Reads, in a worker process, the body of a request, or what the web page sends."""

import functools
import time
from dataclasses import fields

from ..web.input import read_page
from .chat import Asked, RequestReader
from .errors import ApiError
from .fetch import UrlPolicy, fetch
from .limits import Limits
from .request import expect_model, read_request
from .worker import pack_images, unpack_images

Message = tuple[dict, list[bytes]]


def run(header: dict, blobs: list[bytes]) -> Message:
    """Runs a task; returns what it has read, or the error that it ended with."""
    try:
        return TASKS[header["task"]](header, *blobs, limits=Limits(**header["limits"]))
    except ApiError as error:
        return _failure(error.status, str(error), error.code, error.param)
    except ValueError as error:
        return _failure(400, str(error), "invalid_input")
    except MemoryError:
        return _failure(400, "expected images that fit in memory, got larger ones", "invalid_input")
    except Exception as error:  # of this package's own, or a decoder's
        return _failure(500, f"{type(error).__name__}: {error}", "internal_error")


def _failure(status: int, message: str, code: str | None, param: str | None = None) -> Message:
    return {"error": {"status": status, "message": message, "code": code, "param": param}}, []


def _read_chat(header: dict, body: bytes, *, limits: Limits) -> Message:
    request = read_request(body)
    expect_model(header["model"], request.model)
    policy = UrlPolicy(frozenset(header["hosts"]), **header["policy"])
    get = functools.partial(
        fetch, policy=policy, limits=limits, deadline=time.monotonic() + policy.seconds
    )
    return pack_asked(RequestReader(limits, get)(request))


def pack_asked(asked: Asked) -> Message:
    """Returns a read request as a message."""
    heads, blobs = pack_images([*asked.images, *asked.masks])
    plain = {f.name: getattr(asked, f.name) for f in fields(asked)}
    images, masks = plain.pop("images"), plain.pop("masks")
    return {"asked": plain, "images": heads, "counts": [len(images), len(masks)]}, blobs


def unpack_asked(header: dict, blobs: list[bytes]) -> Asked:
    """Restores the request that `pack_asked` was given."""
    images = unpack_images(header["images"], blobs)
    first = header["counts"][0]
    return Asked(images=tuple(images[:first]), masks=tuple(images[first:]), **header["asked"])


def _read_page(header: dict, text: bytes, *, limits: Limits) -> Message:
    image, masks = read_page(text.decode(), limits)
    heads, blobs = pack_images([*filter(None, [image]), *masks])
    return {"images": heads}, blobs


TASKS = {"chat": _read_chat, "page": _read_page}
