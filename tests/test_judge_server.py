"""The judge against a real HTTP server on loopback: what it sends, retries, counts and gives up."""

import contextlib
import email.utils
import hashlib
import json
import logging
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from perceptiondlm.common.chat_endpoint import (
    CallBudget,
    CallFailure,
    Endpoint,
    RetryPolicy,
    make_client,
    public_url,
    retry_after,
)

KEY = "sk-very-secret-0123456789"
QUICK = RetryPolicy(attempts=4, first_delay=0.01)
MESSAGES = [{"role": "user", "content": "Which letter?"}]


class Reply:
    """One HTTP response.

    `cut` breaks the connection in the middle of the body; `endless` sends the body again and again.
    """

    def __init__(self, body, status=200, headers=None, *, delay=0.0, cut=False, endless=False):
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status = status
        self.headers = headers or {}
        self.delay = delay
        self.cut = cut
        self.endless = endless


def completion(text) -> Reply:
    message = {"role": "assistant", "content": text}
    return Reply({"id": "x", "object": "chat.completion", "choices": [{"message": message}]})


def error(status: int, message: str = "no", **headers) -> Reply:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply({"error": {"message": message}}, status, headers)


def letter_of(body: dict) -> Reply:
    """A judge that answers the same question always alike."""
    digest = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()
    return completion("AB"[digest[0] % 2])


class JudgeServer(ThreadingHTTPServer):
    """Speaks chat completions; `script(number, body)` makes the reply to each request."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.requests, self.times, self.headers = [], [], []
        self.answered = self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.requests)
            server.requests.append(body)
            server.times.append(time.monotonic())
            names = {name.lower(): value for name, value in self.headers.items()}
            server.headers.append({**names, "path": self.path})
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            self._send(server.script(number, body))
        finally:
            with server.lock:
                server.under_way -= 1

    def _send(self, reply: Reply):
        time.sleep(reply.delay)
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/json")
        if not reply.endless:
            self.send_header("Content-Length", str(len(reply.body)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # until the client has enough
            while reply.endless:
                self.wfile.write(reply.body)
                time.sleep(0.01)
        self.wfile.write(reply.body[: len(reply.body) // 2] if reply.cut else reply.body)
        self.close_connection = True
        with self.server.lock:
            self.server.answered += reply.status == 200 and not reply.cut

    def log_message(self, *_):
        pass


@contextmanager
def serving(script):
    """A judge server for the time of a test."""
    server = JudgeServer(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def endpoint(url: str, monkeypatch, *, timeout=5.0, policy=QUICK, limit=None, **request):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    client = make_client(url, timeout)
    return Endpoint(client, "judge-1", request=request, policy=policy, budget=CallBudget(limit))


def ask_of(replies: list[Reply], monkeypatch, **options):
    """Asks once, the server replying from a list; returns answer, server and endpoint."""
    with serving(lambda number, _: replies[number]) as server:
        judge = endpoint(server.url, monkeypatch, **options)
        return judge.ask(MESSAGES), server, judge


def test_a_question_is_sent_with_model_options_and_key(monkeypatch):
    answer, server, judge = ask_of([completion("B")], monkeypatch, temperature=0, max_tokens=7)
    assert answer == "B" and judge.budget.spent == 1
    assert server.requests == [
        {"model": "judge-1", "messages": MESSAGES, "temperature": 0, "max_tokens": 7}
    ]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


def test_an_empty_answer_is_an_answer(monkeypatch):
    assert ask_of([completion("")], monkeypatch)[0] == ""


@pytest.mark.parametrize(
    "trouble",
    [
        error(429),
        error(408),
        error(500),
        error(503),
        Reply(b"{not json"),
        Reply(b"\xff\xfe\x00"),
        Reply({"choices": []}),
        Reply([1]),
        completion(None),
        Reply({"choices": [{"message": {"content": "B"}}]}, cut=True),
    ],
)
def test_trouble_that_may_pass_is_tried_again(monkeypatch, trouble):
    answer, server, judge = ask_of([trouble, trouble, completion("A")], monkeypatch)
    assert answer == "A"
    assert len(server.requests) == judge.budget.spent == 3


def test_a_slow_answer_is_waited_for(monkeypatch):
    slow = completion("A")
    slow.delay = 0.3
    answer, server, _ = ask_of([slow], monkeypatch, timeout=5)
    assert answer == "A" and len(server.requests) == 1


def test_an_answer_slower_than_the_time_out_is_asked_for_again(monkeypatch):
    slow = completion("late")
    slow.delay = 2
    answer, server, _ = ask_of([slow, completion("A")], monkeypatch, timeout=1)
    assert answer == "A" and len(server.requests) == 2


def test_retry_after_is_honored(monkeypatch):
    _, server, _ = ask_of([error(429, Retry_After="0.5"), completion("A")], monkeypatch)
    assert server.times[1] - server.times[0] >= 0.5


def test_a_retry_after_of_minutes_is_honored_too(monkeypatch):
    replies = [error(429, Retry_After="300"), completion("A")]
    with serving(lambda number, _: replies[number]) as server:
        judge, waits = endpoint(server.url, monkeypatch), []
        monkeypatch.setattr(judge.stop, "wait", waits.append)
        assert judge.ask(MESSAGES) == "A"
    assert waits == [300]


def test_a_stopped_run_waits_for_nothing_and_asks_nothing_more(monkeypatch):
    with serving(lambda *_: error(429, Retry_After="300")) as server:
        judge = endpoint(server.url, monkeypatch)
        threading.Timer(0.3, judge.stop.set).start()
        start = time.monotonic()
        with pytest.raises(CallFailure, match="stopped"):
            judge.ask(MESSAGES)
        assert time.monotonic() - start < 5
        assert len(server.requests) == judge.budget.spent == 1


def test_delays_double_up_to_a_maximum():
    policy = RetryPolicy(first_delay=1, max_delay=5)
    for attempt, delay in enumerate([1, 2, 4, 5, 5]):
        assert delay / 2 <= policy.delay(attempt) <= delay


def test_a_retry_after_that_is_too_long_ends_the_run(monkeypatch):
    with pytest.raises(CallFailure, match="tried again in 9999 s") as failure:
        ask_of([error(429, Retry_After="9999")], monkeypatch)
    assert failure.value.fatal


def test_retry_after_is_read_as_seconds_or_a_date():
    assert retry_after({"retry-after": "7"}) == 7
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 < retry_after({"retry-after": later}) <= 30
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_lasting_trouble_is_a_failure_with_its_reason(monkeypatch):
    with pytest.raises(CallFailure, match=r"HTTP 500.*broken.*\(4 attempts\)") as failure:
        ask_of([error(500, "broken")] * 4, monkeypatch)
    assert not failure.value.fatal


def test_lasting_malformed_output_says_what_came(monkeypatch):
    with pytest.raises(CallFailure, match="expected a chat completion, got '<html>"):
        ask_of([Reply(b"<html>busy</html>")] * 4, monkeypatch)


def test_a_refused_request_is_not_repeated(monkeypatch):
    with serving(lambda *_: error(400, "too long")) as server:
        with pytest.raises(CallFailure, match="HTTP 400.*too long") as failure:
            endpoint(server.url, monkeypatch).ask(MESSAGES)
        assert len(server.requests) == 1 and not failure.value.fatal


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_address_ends_the_run(monkeypatch, status):
    with pytest.raises(CallFailure, match=f"HTTP {status}") as failure:
        ask_of([error(status)], monkeypatch)
    assert failure.value.fatal


def test_spent_credit_ends_the_run(monkeypatch):
    body = {"error": {"message": "pay", "code": "insufficient_quota"}}
    with pytest.raises(CallFailure, match="pay") as failure:
        ask_of([Reply(body, 429)], monkeypatch)
    assert failure.value.fatal


def test_a_refused_connection_is_a_failure_with_its_reason(monkeypatch):
    with serving(letter_of) as server:
        url = server.url
    with pytest.raises(CallFailure, match="no connection.*refused"):
        endpoint(url, monkeypatch).ask(MESSAGES)


def test_the_budget_counts_retries_and_stops_before_the_next_call(monkeypatch):
    with serving(lambda *_: error(500)) as server:
        with pytest.raises(CallFailure, match="budget of 3 calls") as failure:
            endpoint(server.url, monkeypatch, limit=3).ask(MESSAGES)
        assert len(server.requests) == 3 and failure.value.fatal


def test_the_key_is_in_no_message_and_no_log(monkeypatch, caplog):
    with caplog.at_level(logging.DEBUG), pytest.raises(CallFailure) as failure:
        ask_of([error(401, f"bad key {KEY}")], monkeypatch)
    assert "bad key [key]" in str(failure.value)
    assert KEY not in str(failure.value) and KEY not in caplog.text


def test_azure_is_asked_with_its_own_key(monkeypatch):
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    with serving(lambda *_: completion("A")) as server:
        client = make_client(server.url.removesuffix("/v1"), 5, azure_api_version="2024-10-21")
        assert Endpoint(client, "deployed").ask(MESSAGES) == "A"
        assert server.headers[0]["api-key"] == KEY
        assert "deployments/deployed" in server.headers[0]["path"]


def test_a_server_of_ones_own_needs_no_key_but_the_vendor_does(monkeypatch):
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    assert make_client("http://127.0.0.1:1/v1", 5).api_key == "none"
    with pytest.raises(ValueError, match="key for the endpoint in OPENAI_API_KEY"):
        make_client(None, 5)


def test_a_recorded_url_carries_no_credentials():
    assert public_url("https://me:secret@host:8/v1?token=x") == "https://host:8/v1"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RetryPolicy(attempts=0), "attempts of 1 or more, got 0"),
        (lambda: CallBudget(-1), "budget of 0 or more, got -1"),
        (lambda: make_client("http://x", 0), "timeout of more than 0 seconds, got 0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
