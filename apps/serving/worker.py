"""Reads what strangers send, in a process of its own that can be killed.

The process takes one task at a time from its standard input and answers on its standard output:
each message is a JSON header and blobs of bytes, no pickles. It holds no model, and its memory is
bounded, so that whatever a decoder does on bytes made up to harm it ends here.
"""

import contextlib
import json
import os
import struct
import sys
from typing import BinaryIO

from PIL import Image

HEAD = struct.Struct("<I")  # number of parts, and of bytes of each part
SIZE = struct.Struct("<Q")
MEMORY = 3  # times what may be decoded: as stored, converted, and sent
SPARE_BYTES = 256 << 20


def send(stream: BinaryIO, header: dict, blobs=()):
    """Writes a message: a header for JSON and blobs of bytes."""
    parts = [json.dumps(header).encode(), *blobs]
    stream.write(HEAD.pack(len(parts)))
    for part in parts:
        stream.write(SIZE.pack(len(part)))
        stream.write(part)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict, list[bytes]]:
    """Reads a message; raises EOFError where the other side has gone."""
    (count,) = HEAD.unpack(_exactly(stream, HEAD.size))
    header, *blobs = (
        _exactly(stream, *SIZE.unpack(_exactly(stream, SIZE.size))) for _ in range(count)
    )
    return json.loads(header), blobs


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError("the other side has gone")
    return data


def pack_images(images) -> tuple[list, list[bytes]]:
    """Returns modes and sizes of images, for a header, and their pixels, for blobs."""
    return [[image.mode, *image.size] for image in images], [image.tobytes() for image in images]


def unpack_images(heads: list, blobs: list[bytes]) -> list[Image.Image]:
    """Restores the images that `pack_images` was given; drops each blob as soon as it is one."""
    blobs.reverse()
    return [Image.frombytes(mode, (width, height), blobs.pop()) for mode, width, height in heads]


def main():
    """Answers tasks until the other side goes; meant to run as a program."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    from . import tasks  # before the silence: errors here are worth reading

    # Decoders' own remarks would break up messages, and fill logs.
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    base = _address_space()
    send(answers, {"ready": True})

    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            header, blobs = receive(requests)
            _limit_memory(base, header["limits"]["decoded_bytes"])
            send(answers, *tasks.run(header, blobs))


def _address_space() -> int:
    """Returns the bytes of memory that are mapped; 0 where that cannot be known."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _limit_memory(base: int, decoded: int):
    if not base:
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError, OSError):  # the hard limit is lower still
        resource.setrlimit(resource.RLIMIT_AS, (base + MEMORY * decoded + SPARE_BYTES, hard))
