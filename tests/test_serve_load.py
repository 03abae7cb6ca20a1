"""`perceptiondlm serve` as a process of its own, under load, and told to stop."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import openai
import pytest

pytest.importorskip("fastapi", reason="the endpoint needs the package's apps extra")

from perceptiondlm.apps.captioning.captioner import RegionCaptioner  # noqa: E402
from perceptiondlm.apps.cli import main  # noqa: E402
from serving import image_part, user  # noqa: E402

VECTORS = Path(__file__).parent / "fixtures" / "vectors"
SHORT = {"caption_length": 8, "steps": 4}
REGIONS = SHORT | {"task": "regions"}
CLIENTS = 100


def region_files(index: int):
    masks = sorted(VECTORS.glob(f"region_{index}_mask_*.png"))[:3]
    return VECTORS / f"region_{index}.png", masks


@pytest.fixture(scope="module")
def server(converted, tmp_path_factory):
    """The address and the process of a server with room for 40."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "perceptiondlm.apps.cli",
        "serve",
        "--port",
        str(port),
        "--model",
        str(converted("released-region")),
        "--name",
        "tester",
        "--max-queue",
        "40",
        "--max-batch",
        "16",
        "--device",
        "cpu",
    ]
    log = (tmp_path_factory.mktemp("server") / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
    address = f"http://127.0.0.1:{port}"
    try:
        give_up = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < give_up, Path(log.name).read_text()
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield address, process
    finally:
        process.kill()
        process.wait()
        log.close()


def resident_mib(process: subprocess.Popen) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def request_of(index: int) -> dict:
    image, masks = region_files(index % 3)
    return {
        "model": "tester",
        "messages": user(image_part(image), *map(image_part, masks)),
        "extra_body": REGIONS,
    }


async def ask_all(address: str, retries: int) -> list:
    """What became of each of `CLIENTS` requests at once: captions, or the status of a refusal."""

    async def ask(client, index: int):
        try:
            answer = await client.chat.completions.create(**request_of(index))
        except openai.APIStatusError as error:
            assert error.status_code == 429 and error.response.headers["retry-after"]
            return error.status_code
        return [region["caption"] for region in answer.choices[0].message.regions]

    async with openai.AsyncOpenAI(
        base_url=f"{address}/v1",
        api_key="none",
        max_retries=retries,
        timeout=300,
        http_client=openai.DefaultAsyncHttpxClient(limits=httpx.Limits(max_connections=CLIENTS)),
    ) as client:
        return await asyncio.gather(*(ask(client, i) for i in range(CLIENTS)))


def metric(address: str, name: str) -> float:
    for line in httpx.get(f"{address}/metrics").text.splitlines():
        if line.startswith(f"perceptiondlm_{name} "):
            return float(line.split()[1])
    raise AssertionError(f"no metric {name}")


@pytest.mark.slow
def test_of_a_hundred_at_once_each_is_answered_rightly_or_refused_and_memory_is_flat(server, load):
    address, process = server
    captioner = RegionCaptioner(*load("released-region"))
    expected = [captioner(*region_files(i), **SHORT).captions for i in range(3)]
    sizes = []
    for _ in range(4):
        outcomes = asyncio.run(ask_all(address, retries=0))
        sizes.append(resident_mib(process))
        refused = Counter(outcome == 429 for outcome in outcomes)[True]
        answered = [(i, outcome) for i, outcome in enumerate(outcomes) if outcome != 429]
        assert len(answered) + refused == CLIENTS and len(answered) >= 40
        assert all(captions == expected[i % 3] for i, captions in answered)
    assert metric(address, "queue_length") == metric(address, "failed_total") == 0
    assert metric(address, "completed_total") == metric(address, "accepted_total")
    assert sizes[-1] - sizes[1] < 64, sizes  # after a round to warm up


@pytest.mark.slow
def test_of_a_hundred_that_come_again_all_are_answered(server):
    address, _ = server
    outcomes = asyncio.run(ask_all(address, retries=30))
    assert 429 not in outcomes and len(outcomes) == CLIENTS


def test_told_to_stop_the_server_answers_what_it_has_and_ends(server):
    address, process = server
    body = {**request_of(0), "task": "regions", "caption_length": 128}
    body.pop("extra_body")
    with httpx.stream(
        "POST", f"{address}/v1/chat/completions", json=body | {"stream": True}, timeout=120
    ) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        events = [line for line in lines if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
    assert process.wait(60) in (0, -signal.SIGTERM)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{address}/health")


def test_a_model_that_is_not_there_is_said_in_one_line(capsys):
    assert main(["serve", "--model", "/nowhere"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("perceptiondlm serve: ")
