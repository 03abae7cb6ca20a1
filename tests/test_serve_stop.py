"""A server that is told to stop: nobody is cut off, everybody is answered."""

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi", reason="the endpoint needs the package's apps extra")

from perceptiondlm.apps.captioning.captioner import RegionCaptioner  # noqa: E402
from perceptiondlm.apps.serving import server as serving_server  # noqa: E402
from perceptiondlm.apps.serving.app import create_app  # noqa: E402
from perceptiondlm.apps.serving.engine import Engine  # noqa: E402
from perceptiondlm.apps.serving.limits import Limits  # noqa: E402
from serving import image_part, user  # noqa: E402

IMAGE = Path(__file__).parent / "fixtures" / "vectors" / "region_0.png"
BODY = {
    "model": "tester",
    "messages": user(image_part(IMAGE)),
    "masks": [[5, 5, 30, 30]],
    "caption_length": 4,
    "steps": 1,
}


@pytest.fixture(scope="module")
def captioner(load):
    return RegionCaptioner(*load("released-region"))


@contextlib.contextmanager
def running(captioner, *, window: float, grace: float):
    """The address of a server, its engine, and what tells it to stop and waits for its end."""
    engine = Engine(captioner, window=window, max_queue=500)
    app = create_app(engine, name="tester")
    server = serving_server.make_server(
        app, host="127.0.0.1", port=0, limits=Limits(), grace=grace, log_level="error"
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)

    def stop():
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()

    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}", engine, stop
    stop()


def post(address: str, **extra) -> httpx.Response:
    return httpx.post(f"{address}/v1/chat/completions", json=BODY | extra, timeout=60)


def test_what_is_still_queued_at_the_end_of_the_grace_period_is_told_so(captioner, monkeypatch):
    monkeypatch.setattr(serving_server, "ANSWER_SECONDS", 2.0)
    answers = []
    with running(captioner, window=60.0, grace=3.0) as (address, engine, stop):
        threads = [
            threading.Thread(target=lambda extra=extra: answers.append(post(address, **extra)))
            for extra in ({}, {"stream": True}, {})
        ]
        for thread in threads:
            thread.start()
        give_up = time.monotonic() + 30
        while engine.queue_length < 3 and time.monotonic() < give_up:
            time.sleep(0.02)
        started = time.monotonic()
        stop()
        assert time.monotonic() - started < 8
        for thread in threads:
            thread.join()
    streamed, *whole = sorted(answers, key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in whole] == [503, 503]
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in whole)
    assert whole[0].json()["error"]["code"] == "shutting_down"
    events = [line for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert json.loads(events[-2][6:])["error"]["code"] == "shutting_down"
    assert events[-1] == "data: [DONE]"


def test_no_connection_is_reset_while_requests_keep_coming(captioner):
    outcomes = Counter()
    with running(captioner, window=0.0, grace=15.0) as (address, _, stop):
        assert post(address).status_code == 200  # a worker is there
        ended = threading.Event()

        def press(client: httpx.Client):
            with client:
                while not ended.is_set():
                    try:
                        answer = client.post(f"{address}/v1/chat/completions", json=BODY)
                        outcomes[answer.status_code] += 1
                    except httpx.ConnectError:  # refused: nobody listens
                        outcomes["refused"] += 1
                        return
                    except httpx.TransportError as error:
                        outcomes[repr(error)] += 1
                        return

        clients = [httpx.Client(timeout=60) for _ in range(8)]  # which keep their connections
        threads = [threading.Thread(target=press, args=[client]) for client in clients]
        for thread in threads:
            thread.start()
        give_up = time.monotonic() + 30
        while outcomes[200] < 20 and time.monotonic() < give_up:
            time.sleep(0.02)
        stop()
        ended.set()
        for thread in threads:
            thread.join(30)
    assert set(outcomes) <= {200, 429, 503, "refused"}, outcomes
    assert outcomes[200] >= 20


def test_connections_that_nobody_has_accepted_yet_are_taken_over():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        clients = [socket.create_connection(listening.getsockname()) for _ in range(3)]
        taken = serving_server._accept_all(listening)
        assert {c.getpeername() for c in taken} == {c.getsockname() for c in clients}
        for connection in [*clients, *taken]:
            connection.close()


def test_a_connection_that_was_open_is_answered_503_and_closed(captioner):
    with running(captioner, window=0.0, grace=10.0) as (address, _, stop), httpx.Client() as client:
        assert client.get(f"{address}/health").status_code == 200
        thread = threading.Thread(target=stop)
        thread.start()
        time.sleep(0.4)  # it has begun to stop
        answer = client.post(f"{address}/v1/chat/completions", json=BODY)
        assert answer.status_code == 503 and answer.headers["connection"] == "close"
        thread.join()
