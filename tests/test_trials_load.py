"""Thousands of requests of every kind to one server: all are answered, and its memory stays flat.

The server is a process of its own with a very small model, so that what is tried is the server and
not the model. Requests are drawn from seeds: images
from one pixel to 2000x1500, 1 to 24 regions in every form, questions, streams, and a quarter that
is broken or hostile.
"""

import asyncio
import base64
import functools
import io
import json
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import httpx
import pytest
from PIL import Image, ImageDraw
from trial_processes import family

pytest.importorskip("fastapi", reason="the endpoint needs the package's apps extra")

pytestmark = pytest.mark.slow
ROUNDS, REQUESTS, CLIENTS = 40, 200, 8
EARLY, LATE = slice(10, 20), slice(30, 40)  # rounds whose medians are compared
TOLERANCE = 0.05  # of the early median
SIZES = [
    (1, 1), (2, 3), (7, 40), (16, 16), (64, 48), (100, 300), (333, 200), (500, 500), (640, 480),
]  # fmt: skip
LARGE = [(1280, 720), (1500, 2000), (2000, 1500)]
SHORT = {"model": "tester", "caption_length": 4}
ANSWERED, REFUSED = (200,), (400, 404, 405, 408, 413, 422, 429)


# What is sent.


@functools.cache
def encoded(size: tuple[int, int], kind: str, seed: int) -> str:
    """A drawn image as data URL."""
    draw = random.Random(f"{size}{seed}")
    image = Image.new("RGB", size, tuple(draw.randrange(256) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(5):
        x, y = draw.randrange(size[0]), draw.randrange(size[1])
        color = tuple(draw.randrange(256) for _ in range(3))
        pen.ellipse((x, y, x + size[0] // 3, y + size[1] // 3), fill=color)
    return data_url(image, kind)


def data_url(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def region(draw: random.Random, size: tuple[int, int]):
    """A region mask of some form."""
    width, height = size
    x0, y0 = draw.randrange(width), draw.randrange(height)
    x1, y1 = draw.randint(x0 + 1, width), draw.randint(y0 + 1, height)
    form = draw.randrange(5)
    if form == 0:
        return [x0, y0, x1, y1]
    if form == 1:
        return {"polygons": [[x0, y0, x1, y0, x1, y1, x0, y1]]}
    if form == 2:
        inside, total = width * height // 2 or 1, width * height
        return {"size": [height, width], "counts": [total - inside, inside]}
    if form == 3 and width * height < 100_000:
        mask = Image.new("L", size)
        mask.paste(255, (x0, y0, x1, y1))
        return data_url(mask, "png")
    return {"box": [x0, y0, x1, y1]}


def content(url: str, text: str | None = None) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    parts += [{"type": "text", "text": text}] if text else []
    return [{"role": "user", "content": parts}]


def honest(draw: random.Random) -> dict:
    """A request that is to be answered."""
    size = draw.choice(LARGE if draw.random() < 0.04 else SIZES)
    url = encoded(size, draw.choice(("png", "jpeg", "webp")), draw.randrange(3))
    options = {"steps": draw.randint(1, 2), "stream": draw.random() < 0.2}
    if draw.random() < 0.25:
        return {
            "model": SHORT["model"],
            "messages": content(url, draw.choice(("What color is it?", "How many are there?"))),
            "max_tokens": 4,
            **options,
        }
    count = draw.randint(1, 24) if draw.random() < 0.1 else draw.randint(1, 4)
    masks = [region(draw, size) for _ in range(count)]
    return {**SHORT, "messages": content(url), "masks": masks, "task": "regions", **options}


def claims(width: int, height: int) -> bytes:
    """A small PNG that claims to be large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9))
    return b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b"")


@functools.cache
def large_mask() -> str:
    return data_url(Image.new("L", (3000, 3000), 255), "png")


def png_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def with_url(url: str):
    return lambda draw: {**SHORT, "messages": content(url), "masks": [[0, 0, 1, 1]]}


def changed(**changes):
    return lambda draw: {**honest(draw), "stream": False, **changes}


def half_of_png() -> str:
    data = base64.b64decode(encoded((500, 500), "png", 0).split(",")[1])
    return png_url(data[: len(data) // 2])


BROKEN = {
    "no JSON": lambda draw: draw.randbytes(draw.randrange(2000)),
    "half of a request": lambda draw: json.dumps(honest(draw)).encode()[: draw.randrange(1, 200)],
    "deep JSON": lambda draw: b"[" * 100_000,
    "another model": changed(model="another"),
    "another task": changed(task="everything"),
    "no masks": changed(masks=[], task="regions"),
    "a mask of another size": changed(masks=[{"size": [9999, 9999], "counts": [0, 9999 * 9999]}]),
    "large masks of a small image": lambda draw: {**honest(draw), "masks": [large_mask()] * 30},
    "65 masks": changed(masks=[[0, 0, 1, 1]] * 65),
    "a mask of nothing": changed(masks=[[5, 5, 5, 5]]),
    "numbers without end": changed(masks=[{"box": [float("nan"), 0, float("inf"), 1]}]),
    "a polygon of 100,000 points": changed(masks=[{"polygons": [[0, 0, 9000, 9000] * 50_000]}]),
    "steps without end": changed(steps=10**9),
    "a caption without end": changed(caption_length=10**9),
    "much work": changed(caption_length=256, steps=256, cfg_scale=2.0, masks=[[0, 0, 1, 1]] * 64),
    "a long stop": changed(stop=["a" * 1_000_000]),
    "many keys": changed(**{f"key{k}": k for k in range(1000)}),
    "an unknown option": changed(nonsense=1),
    "a bomb": with_url(png_url(claims(50_000, 50_000))),
    "a very wide image": with_url(png_url(claims(39_000_000, 1))),
    "half of a PNG": with_url(half_of_png()),
    "noise for an image": lambda draw: with_url(png_url(draw.randbytes(3000)))(draw),
    "a file": with_url("file:///etc/passwd"),
    "a URL": with_url("http://127.0.0.1:1/a.png"),
    "no image": changed(messages=[{"role": "user", "content": "What?"}]),
    "no messages": changed(messages=[]),
}
WAYS = {  # method, path, headers of requests that are no chat completions
    "another place": ("GET", "/v1/nothing", {}),
    "another method": ("PUT", "/v1/chat/completions", {}),
    "long headers": ("GET", "/health", {"x-long": "a" * 5000}),
}
# Of these some are answered: headers and outlines may be short enough, a question needs no image.
MAY_BE_ANSWERED = {"long headers", "no image", "numbers without end", "a polygon of 100,000 points"}


def drawn(seed: int) -> tuple[str, str, str, dict, bytes]:
    """Kind, method, path, headers and body of a request."""
    draw = random.Random(seed)
    if draw.random() < 0.02:
        kind = draw.choice(sorted(WAYS))
        return kind, *WAYS[kind], b""
    kind, make = "honest", honest
    if draw.random() < 0.23:
        kind = draw.choice(sorted(BROKEN))
        make = BROKEN[kind]
    body = make(draw)
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return kind, "POST", "/v1/chat/completions", {}, body


# The server.


@pytest.fixture(scope="module")
def server(converted, tmp_path_factory):
    """The address, the process and the log of a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = ["--model", str(converted("released-region")), "--name", SHORT["model"]]
    command = [sys.executable, "-m", "perceptiondlm.apps.cli", "serve", "--port", str(port)]
    path = tmp_path_factory.mktemp("server") / "log"
    with path.open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        options = [
            *model,
            "--device",
            "cpu",
            "--max-client-cost",
            "1000000000",
        ]  # all are of one address
        process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        give_up = time.monotonic() + 120
        while not is_up(address):
            assert process.poll() is None and time.monotonic() < give_up, path.read_text()
            time.sleep(0.2)
        yield address, process, path
    finally:
        process.kill()
        process.wait()


def is_up(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def memory_mib(pid: int) -> tuple[float, float]:
    """Resident memory of a process, and of it with all its children."""
    return resident_mib(pid), sum(map(resident_mib, family(pid)))


def resident_mib(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    return int(text.split("VmRSS:")[1].split()[0]) / 1024 if "VmRSS:" in text else 0


async def play_round(address: str, number: int) -> list[tuple[str, int, str]]:
    """Sends a round's requests, `CLIENTS` at a time; gives kind, status and what was said."""
    seeds = iter(range(number * REQUESTS, (number + 1) * REQUESTS))
    outcomes = []

    async def client(session: httpx.AsyncClient):
        for seed in seeds:
            kind, method, path, headers, body = drawn(seed)
            answer = await session.request(method, path, headers=headers, content=body)
            outcomes.append((kind, answer.status_code, answer.text[-2000:]))

    async with httpx.AsyncClient(base_url=address, timeout=120) as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    return outcomes


def expect_right(kind: str, status: int, text: str):
    """What is honest is answered, or refused for being too much at once; what is not is refused."""
    if kind == "honest":
        assert status in (*ANSWERED, 429), (status, text)
        assert not text.startswith("data: ") or text.rstrip().endswith("data: [DONE]"), text
    elif kind not in MAY_BE_ANSWERED:
        assert status in REFUSED, (kind, status, text)
    assert status in (*ANSWERED, *REFUSED), (kind, status, text)


def test_8000_requests_are_all_answered_or_refused_and_memory_is_flat(server, capsys):
    address, process, log = server
    counts, sizes, families, started = Counter(), [], [], time.monotonic()
    for number in range(ROUNDS):
        outcomes = asyncio.run(play_round(address, number))
        assert len(outcomes) == REQUESTS
        for kind, status, text in outcomes:
            expect_right(kind, status, text)
            counts["honest" if kind == "honest" else "others", status] += 1
        size, family = memory_mib(process.pid)
        sizes.append(size)
        families.append(family)
    seconds = time.monotonic() - started
    report(capsys, counts, sizes, families, seconds)
    assert "Traceback" not in log.read_text()
    for values in (sizes, families):
        early, late = statistics.median(values[EARLY]), statistics.median(values[LATE])
        assert late < early * (1 + TOLERANCE), values


def report(capsys, counts: Counter, sizes: list, families: list, seconds: float):
    total = ROUNDS * REQUESTS
    with capsys.disabled():
        print(f"\n{total} requests in {seconds:.0f} s, {total / seconds:.1f} a second")
        print(", ".join(f"{kind} {status}: {n}" for (kind, status), n in sorted(counts.items())))
        for name, values in (("server", sizes), ("with its workers", families)):
            early, late = statistics.median(values[EARLY]), statistics.median(values[LATE])
            print(
                f"MiB {name}: rounds 11-20 {early:.0f}, 31-40 {late:.0f} (most {max(values):.0f})"
            )
