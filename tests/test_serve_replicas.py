"""Requests pass through a relay to replicas; these are played, so that they die when it is said."""

import argparse
import asyncio
import json
import socket

import pytest

pytest.importorskip("fastapi", reason="the endpoint needs the package's apps extra")
pytest.importorskip("ray", reason="replicas need the package's scale extra")

import httpx  # noqa: E402
from perceptiondlm.apps.cli import main  # noqa: E402
from perceptiondlm.apps.serving import relay as relay_module  # noqa: E402
from perceptiondlm.apps.serving.app import app_of  # noqa: E402
from perceptiondlm.apps.serving.limits import Limits  # noqa: E402
from perceptiondlm.apps.serving.relay import Relay, merge_metrics  # noqa: E402
from perceptiondlm.apps.serving.replicas import (  # noqa: E402
    add_replica_arguments,
    running_relay,
    wants_ray,
)
from prometheus_client import generate_latest  # noqa: E402
from ray.exceptions import ActorDiedError, ActorUnavailableError  # noqa: E402

DIED, AWAY = ActorDiedError(), ActorUnavailableError("away", None)
START = {"type": "http.response.start", "status": 200}
JSON = [(b"content-type", b"application/json"), (b"content-length", b"2")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
WHOLE = [START | {"headers": JSON}, {"type": "http.response.body", "body": b"{}"}]
STREAM = [START | {"headers": EVENTS}, {"type": "http.response.body", "body": b"data: 1\n\n"}]
STOPPING = [START | {"headers": JSON, "status": 503}, {"type": "http.response.body", "body": b""}]


class Call:
    """A call that says what it was told to, and fails where that is an error."""

    def __init__(self, says: list):
        self.says = list(says)
        self.cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        if not self.says:
            raise StopAsyncIteration
        said = self.says.pop(0)
        if isinstance(said, Exception):
            raise said
        if said == "forever":
            await asyncio.sleep(60)
        return said

    def cancel(self):
        self.cancelled = True


class Handle:
    """Plays Ray Serve's handle: each request gets the next of some calls."""

    def __init__(self, *calls: list):
        self.calls = [Call(call) for call in calls]
        self.asked = []
        self.answer = self

    def options(self, stream: bool):
        assert stream
        return self

    def remote(self, client, body):
        self.asked.append((client, body))
        return self.calls[len(self.asked) - 1]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(relay_module, "PAUSE_SECONDS", 0)


def ask(handle: Handle, *, api_key=None, limits=None, before=None, **sent) -> httpx.Response:
    async def asked():
        relay = Relay(handle, "tester", limits or Limits(), max_requests=4)
        if before:
            before(relay)
        transport = httpx.ASGITransport(app_of(relay, api_key))
        async with httpx.AsyncClient(transport=transport, base_url="http://it") as client:
            answer = await client.post("/v1/chat/completions", **({"content": b"{}"} | sent))
        assert before or (relay.under_way, relay.uploads.taken) == (0, 0)
        return answer

    return asyncio.run(asked())


@pytest.mark.parametrize("lost", [[DIED], [AWAY], [WHOLE[0], DIED], [WHOLE[0], AWAY], STOPPING])
def test_a_request_whose_replica_is_lost_is_answered_by_another(lost):
    handle = Handle(lost, WHOLE)
    answer = ask(handle, content=b'{"a": 1}')
    assert (answer.status_code, answer.text) == (200, "{}")
    assert [body for _, body in handle.asked] == [b'{"a": 1}'] * 2


def test_a_request_under_which_three_replicas_died_is_refused():
    handle = Handle([DIED], [DIED], [DIED], WHOLE)
    answer = ask(handle)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
    assert len(handle.asked) == 3


def test_a_stream_whose_replica_dies_ends_with_an_error_event():
    answer = ask(Handle([*STREAM, DIED]))
    told, error, end = [line[6:] for line in answer.text.splitlines() if line]
    assert (answer.status_code, told, end) == (200, "1", "[DONE]")
    assert json.loads(error)["error"]["code"] == "replica_lost"


def test_a_stream_that_has_not_begun_is_asked_of_another_replica():
    assert ask(Handle([DIED], STREAM)).text == "data: 1\n\n"


def test_what_takes_longer_than_it_may_is_given_up_at_the_replica_too():
    handle = Handle(["forever"])
    answer = ask(handle, limits=Limits(request_seconds=0.2))
    assert answer.status_code == 504 and handle.calls[0].cancelled


def test_a_stream_that_takes_longer_than_it_may_ends_with_an_error_event():
    handle = Handle([*STREAM, "forever"])
    answer = ask(handle, limits=Limits(request_seconds=0.2))
    assert '"timeout"' in answer.text and answer.text.endswith("data: [DONE]\n\n")
    assert handle.calls[0].cancelled


def test_the_key_the_body_and_the_room_are_checked_before_a_replica_is_asked():
    handle = Handle()
    assert ask(handle, api_key="secret").status_code == 401
    assert ask(handle, limits=Limits(body_bytes=1)).status_code == 413
    full = ask(handle, before=lambda relay: setattr(relay, "under_way", 4))
    assert full.status_code == 429 and full.headers["retry-after"]
    assert ask(handle, before=Relay.stop).status_code == 503
    assert handle.asked == []


def test_metrics_of_replicas_are_told_apart_by_a_label():
    text = "# HELP x_total what\n# TYPE x_total counter\nx_total {}\n"

    class Registry:
        collect = staticmethod(
            lambda: merge_metrics([("a", text.format(1)), ("b", text.format(2))])
        )

    lines = generate_latest(Registry()).decode().splitlines()
    assert {'x_total{replica="a"} 1.0', 'x_total{replica="b"} 2.0'} <= set(lines)
    assert "perceptiondlm_replicas 2.0" in lines
    assert lines.count("# TYPE x_total counter") == 1


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_replica_arguments(parser)
    values = vars(parser.parse_args(given))
    return argparse.Namespace(
        **values, max_queue=4, device=None, model=None, name="x", host="127.0.0.1", port=0
    )


def test_one_replica_in_process_needs_no_ray():
    assert not wants_ray(arguments())
    assert all(map(wants_ray, [arguments("--replicas", "2"), arguments("--max-replicas", "1")]))
    with pytest.raises(ValueError, match="with --gpus-per-replica"):
        wants_ray(arguments("--gpus-per-replica", "1"))


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5", ""])
def test_a_number_of_replicas_is_at_least_one(count, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--replicas", count])
    assert "expected a number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "device", "message"),
    [
        (["--replicas", "3", "--max-replicas", "2"], None, "at least --replicas 3"),
        (["--address", "ray://head:10001"], None, "no Ray client"),
        (["--address", "127.0.0.1:1"], None, "no answer"),
        (["--address", "nowhere"], None, "HOST:PORT"),
        (["--replicas", "2"], "cuda:1", "got 'cuda:1'"),
        (["--replicas", "2"], "cuda", "--gpus-per-replica above 0"),
        (["--replicas", "2", "--gpus-per-replica", "1"], "cpu", "--gpus-per-replica above 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_ray_starts(given, device, message):
    args = arguments(*given)
    args.device = device
    with pytest.raises(ValueError, match=message), running_relay(args, Limits()):
        pass


def test_a_port_in_use_is_refused_before_replicas_are_loaded():
    args = arguments("--replicas", "2")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        args.port = other.getsockname()[1]
        with pytest.raises(ValueError, match="in use"), running_relay(args, Limits()):
            pass


def test_without_ray_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(["serve", "--replicas", "2"]) == 2
    assert 'pip install "perceptiondlm[scale]"' in capsys.readouterr().err
