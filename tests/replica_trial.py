"""Runs `perceptiondlm serve` with replicas on Ray, asks it for captions, and kills a replica."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import scale_data
import scale_trial
from perceptiondlm.image_masks import encode_rle
from serving import image_part, user
from shapes import ARGUMENTS

OPTIONS = {"caption_length": 4, "steps": 4}
SECONDS_TO_START, SECONDS_TO_END = 240, 60


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


@contextlib.contextmanager
def serving_replicas(*options: str, log: Path):
    """Serves the model of shapes; gives the address and the process, which is ended by Ctrl-C."""
    port = free_port()
    program = [sys.executable, "-m", "perceptiondlm.apps.cli", "serve", *ARGUMENTS]
    where = ["--name", "tester", "--port", str(port)]
    with open(log, "wb") as told:
        server = subprocess.Popen(
            [*program, *where, *options],
            stdout=told,
            stderr=told,
            start_new_session=True,
            # heeded as in a terminal, also where all this runs in the background
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        address = f"http://127.0.0.1:{port}"
        expect_ready(address, server, log)
        yield address, server
    finally:
        left = scale_trial.descendants(server.pid)
        os.killpg(server.pid, signal.SIGINT)  # as a terminal sends Ctrl-C
        try:
            server.wait(SECONDS_TO_END)
        finally:
            if server.poll() is None:
                server.kill()
    expect_gone(left)


def expect_ready(address: str, server: subprocess.Popen, log: Path):
    give_up = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < give_up:
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}/health", timeout=20).status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"the server did not start: {log.read_text()}")


def expect_gone(pids: dict[int, str]):
    """Waits until none of these processes is left."""
    give_up = time.monotonic() + 20
    while left := {p: line for p, line in pids.items() if alive(p)}:
        assert time.monotonic() < give_up, left
        time.sleep(0.2)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def replica_pids(server: subprocess.Popen) -> list[int]:
    found = scale_trial.descendants(server.pid).items()
    signs = "ray::SERVE_REPLICA", "ray::ServeReplica"  # Ray renames what works
    return [pid for pid, line in found if line.startswith(signs)]


def questions(count: int) -> list[tuple]:
    """Draws images with region masks, one image in eight bodies; returns pairs and bodies."""
    drawn = scale_data.draw(8)
    return [(image, masks, body_of(image, masks)) for image, masks in drawn] * (count // 8)


def body_of(image, masks, **extra) -> dict:
    return {
        "model": "tester",
        "messages": user(image_part(image)),
        "masks": [encode_rle(mask) for mask in masks],
        **OPTIONS,
        **extra,
    }


def ask(address: str, body: dict) -> httpx.Response:
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300)


def captions_in(answer: httpx.Response) -> list[str]:
    regions = answer.json()["choices"][0]["message"]["regions"]
    return [region["caption"] for region in regions]


def ask_all(address: str, bodies: list[dict], during=None) -> list[httpx.Response]:
    """Asks for all at once; `during` is called when a tenth is answered."""
    with ThreadPoolExecutor(len(bodies)) as threads:
        asked = [threads.submit(ask, address, body) for body in bodies]
        while during and sum(each.done() for each in asked) < len(bodies) // 10:
            time.sleep(0.02)
        if during:
            during([each for each in asked if not each.done()])
        return [each.result() for each in asked]
