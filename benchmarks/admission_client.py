"""Asks one engine for captions, in a process of its own, and prints how long each request took.

`benchmarks.admission` runs this file with the package of any checkout, whose engine need not know
of it: it uses nothing but `Engine.submit` and what a ticket's future gives.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ..apps.captioning.captioner import RegionCaptioner
from ..apps.serving.engine import Engine
from ..apps.serving.jobs import RegionJob

# The trained model of this checkout, whichever package runs it.
ROOT, SUBFOLDER = Path(os.path.abspath(__file__)).parents[1], "tests/shapes_model"
SIDE, BOX = 64, 24
SECONDS_TO_ANSWER = 600


class Asker:
    """Submits requests about drawn images and notes when each was answered."""

    def __init__(self, engine: Engine, regions: int):
        self.engine = engine
        self.regions = regions
        self.done: dict[int, float] = {}  # seconds of each request

    def ask(self, number: int, **options):
        """Submits the request of a number, about an image of its own; returns the ticket."""
        started = time.perf_counter()
        ticket = self.engine.submit(drawn_job(number, self.regions), **options)

        def note(_):
            self.done[number] = time.perf_counter() - started

        ticket.future.add_done_callback(note)
        return ticket


def drawn_job(number: int, regions: int) -> RegionJob:
    """Draws an image of colored squares with boxes as regions, another for each number."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((SIDE, SIDE))
    corners = random.integers(0, SIDE - BOX, (regions, 2)).tolist()
    return RegionJob.build(image, [{"box": [x, y, x + BOX, y + BOX]} for x, y in corners])


def beside_a_long_one(engine: Engine, asked: dict, interval: float) -> dict:
    """Asks for short captions, each so many seconds after the one before, while a long one runs."""
    asker, count = Asker(engine, asked["regions"]), asked["requests"]
    long = asker.ask(count, caption_length=asked["long_length"])
    while not engine.running:
        time.sleep(0.001)
    begun = time.perf_counter()
    tickets = []
    for number in range(count):
        time.sleep(max(0.0, begun + number * interval - time.perf_counter()))
        tickets.append(asker.ask(number))
    texts = captions([*tickets, long])
    own = [asker.done[number] for number in range(count)]
    return {"short_seconds": own, "long_seconds": asker.done[count], "captions": texts}


def all_equal(engine: Engine, asked: dict) -> dict:
    """Asks for equal captions, so many clients at a time, each again when it was answered."""
    asker = Asker(engine, asked["regions"])

    def one(number: int):
        ticket = asker.ask(number)
        ticket.result(SECONDS_TO_ANSWER)
        return ticket

    started = time.perf_counter()
    with ThreadPoolExecutor(asked["clients"]) as clients:
        tickets = list(clients.map(one, range(asked["requests"])))
    seconds = time.perf_counter() - started
    own = [asker.done[number] for number in range(asked["requests"])]
    return {"seconds": seconds, "short_seconds": own, "captions": captions(tickets)}


def captions(tickets: list) -> list[list[str]]:
    """Waits for the captions of requests."""
    return [ticket.result(SECONDS_TO_ANSWER).result.captions for ticket in tickets]


def main(asked: dict):
    """Runs one way of asking on a trained model and prints the result as JSON."""
    captioner = RegionCaptioner.from_pretrained(ROOT, subfolder=SUBFOLDER, device="cpu")
    max_queue = max(asked["requests"], asked["max_batch"]) + 1
    limits = {"max_queue": max_queue, "max_client_cost": 10**12, "seen_bytes": 0}
    with Engine(captioner, max_batch=asked["max_batch"], **limits) as engine:
        # Warm up: the shapes of one request and of a batch of them.
        warm = Asker(engine, asked["regions"])
        numbers = range(10**6, 10**6 + asked["max_batch"])
        captions([warm.ask(number) for number in numbers])
        captions([warm.ask(10**6, caption_length=asked["long_length"], steps=2)])
        captions([warm.ask(10**6)])
        alone = warm.done[10**6]

        if asked["way"] == "equal":
            found = all_equal(engine, asked)
        else:
            interval = asked["spacing"] * asked["alone"] if asked["way"] == "spread" else 0.0
            found = beside_a_long_one(engine, asked, interval)
    print(json.dumps({"alone_seconds": alone, **found}))
