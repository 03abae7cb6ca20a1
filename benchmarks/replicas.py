"""Measures the requests per second of two replicas of the server against those of one.

    python -m perceptiondlm.benchmarks.replicas --requests 200 --output replicas.json

Each replica is pinned to a core of its own and has one thread. Both servers run at once, and are
asked in turn, so that what else the machine does slows both; medians are reported. One core more,
for the server's door and the clients, keeps these from taking time of the replicas.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..common.files import write_json
from .denoising import describe_machine
from .workload import TRAINED_ARGUMENTS, noise_image

SECONDS_TO_START, SECONDS_TO_ANSWER, SECONDS_TO_END = 240, 300, 60
SIGNS = (b"ray::ServeReplica", b"ray::SERVE_REPLICA")  # how Ray calls replicas' processes


@contextlib.contextmanager
def serving(replicas: int, arguments) -> Iterator[str]:
    """Serves a trained model, each replica on a core of its own; gives the address."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port = own.getsockname()[1]
    program = [sys.executable, "-m", "perceptiondlm.apps.cli", "serve", "--name", "tiny"]
    program += TRAINED_ARGUMENTS
    program += ["--replicas", str(replicas), "--max-replicas", str(replicas)]
    program += ["--port", str(port), "--max-queue", str(arguments.requests), "--device", "cpu"]
    program += ["--max-client-cost", str(10**12), "--seen-cache-mb", "0"]

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(program, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(address, server)
        pin(server.pid, replicas)
        yield address
    finally:
        server.terminate()  # in the background Ctrl-C's signal may be ignored
        server.wait(SECONDS_TO_END)


def wait_until_ready(address: str, server: subprocess.Popen):
    """Waits for a server's health; raises RuntimeError for one that ends or takes too long."""
    give_up = time.monotonic() + SECONDS_TO_START
    while server.poll() is None and time.monotonic() < give_up:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/health", timeout=20).close()
            return
        time.sleep(0.5)
    raise RuntimeError(f"expected a server at {address}, got none")


def pin(server: int, replicas: int):
    """Pins each replica of a server, with all of its threads, to a core."""
    cores = sorted(os.sched_getaffinity(0))
    found = [pid for pid in descendants(server) if command_of(pid).startswith(SIGNS)]
    if len(found) != replicas or len(cores) < replicas:
        raise RuntimeError(f"expected {replicas} replicas and cores, got {len(found)}, {cores}")
    for pid, core in zip(found, cores, strict=False):
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), {core})


def descendants(pid: int) -> list[int]:
    """Returns the processes that a process started, and those that they did."""
    children = []
    with contextlib.suppress(OSError):  # some may end meanwhile
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            children += [int(child) for child in path.read_text().split()]
    return children + [each for child in children for each in descendants(child)]


def command_of(pid: int) -> bytes:
    """Returns a process's command line; nothing for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def body_of(arguments) -> bytes:
    """Returns a request about two regions of an image."""
    buffer = io.BytesIO()
    noise_image(np.random.default_rng(0)).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    image = {"type": "image_url", "image_url": {"url": url}}
    return json.dumps(
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": [image]}],
            "masks": [{"box": [4, 4, 40, 40]}, {"box": [20, 20, 60, 50]}],
            "caption_length": arguments.caption_length,
            "steps": arguments.caption_length,
        }
    ).encode()


def seconds_for(address: str, body: bytes, arguments) -> float:
    """Returns how long all requests take, so many at once."""

    def ask(_):
        url, kind = f"{address}/v1/chat/completions", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, body, kind)
        with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER) as answer:
            answer.read()

    started = time.perf_counter()
    with ThreadPoolExecutor(arguments.clients) as threads:
        list(threads.map(ask, range(arguments.requests)))
    return time.perf_counter() - started


def measure(arguments) -> dict:
    """Times both servers in turn; returns the result to write."""
    body, seconds = body_of(arguments), {1: [], 2: []}
    with serving(1, arguments) as one, serving(2, arguments) as two:
        for repeat in range(arguments.repeats + 1):
            for replicas, address in ((1, one), (2, two)):
                took = seconds_for(address, body, arguments)
                print(f"round {repeat}: {replicas} replicas took {took:.1f} s", flush=True)
                if repeat:  # the first is to warm up
                    seconds[replicas].append(took)

    rates = {n: arguments.requests / statistics.median(each) for n, each in seconds.items()}
    return {
        "machine": describe_machine("cpu"),
        "load": os.getloadavg(),
        "requests": arguments.requests,
        "clients": arguments.clients,
        "caption_length": arguments.caption_length,
        "seconds": seconds,
        "requests_per_second": rates,
        "ratio": rates[2] / rates[1],
    }


def main():
    """Measures, prints the ratio and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--caption-length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="JSON")
    arguments = parser.parse_args()

    result = measure(arguments)
    if arguments.output:
        write_json(arguments.output, result)
    rates = result["requests_per_second"]
    print(
        f"two replicas answer {rates[2]:.1f} requests a second, one {rates[1]:.1f}:"
        f" {result['ratio']:.2f} times as many"
    )


if __name__ == "__main__":
    main()
