"""An endpoint in trouble: what is asked again, in the same run or the next, and what ends it."""

import json
import time

import pytest
import yaml
from engine_data import write_panoptic, write_sa1b
from perceptiondlm.apps.cli import main
from perceptiondlm.common import chat_endpoint
from perceptiondlm.pipelines.endpoint import ChatModel, EndpointOptions, EngineStopped, Failure
from test_engine_runs import expect_counts, lines, values_of
from test_judge_server import Reply, completion, error, serving

TROUBLES = {
    "429": error(429, Retry_After="0.01"),
    "500": error(500),
    "an HTML page": Reply(b"<html>Bad gateway</html>", 502),
    "an HTML page as if all were well": Reply(b"<html>Hello</html>"),
    "invalid JSON": Reply(b'{"choices": ['),
    "JSON of another form": Reply({"choices": [{"text": "x"}]}),
    "cut off": Reply({"choices": [{"message": {"content": "B"}}]}, cut=True),
    "slow": Reply({"choices": []}, delay=0.5),
    "an endless body": Reply(b" " * 1000, endless=True),
    "an endless body of an error": Reply(b" " * 1000, 500, endless=True),
}


def options(server, **changes) -> EndpointOptions:
    values = {"base_url": server.url, "model": "m", "attempts": 2, "first_delay": 0.01}
    return EndpointOptions(**{**values, "timeout": 0.3, **changes})


def question(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=list(TROUBLES))
def test_trouble_that_stays_is_a_failure_that_may_pass_and_soon_told(trouble):
    # Where nothing waits for it, time-out is long, or a busy machine's own slowness would count.
    timeout = 0.3 if trouble.delay or trouble.endless else 5.0
    with serving(lambda *_: trouble) as server:
        start = time.monotonic()
        (answer,) = ChatModel(options(server, timeout=timeout))([question("a")])
        assert time.monotonic() - start < 2.5
        assert len(server.requests) == 2
    assert isinstance(answer, Failure) and answer.passing and "2 attempts" in answer.reason


@pytest.mark.parametrize(
    "reply",
    [
        error(400, "too long"),
        Reply({"choices": [{"message": {"content": "A"}, "finish_reason": "length"}]}),
        completion("\ud800"),
    ],
    ids=["400", "cut at max_tokens", "no text"],
)
def test_a_failure_of_the_question_itself_does_not_pass(reply):
    with serving(lambda *_: reply) as server:
        (answer,) = ChatModel(options(server))([question("a")])
        assert len(server.requests) == 1
    assert isinstance(answer, Failure) and not answer.passing


def test_a_body_is_read_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(chat_endpoint, "MAX_BODY", 5000)
    with serving(lambda *_: Reply(b" " * 6000 + b"{}")) as server:
        (answer,) = ChatModel(options(server, attempts=1))([question("a")])
    assert "expected a body of 5,000 bytes at most" in answer.reason


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_and_ends_the_run(status):
    with serving(lambda *_: completion("x")) as other:
        away = Reply({}, status, {"Location": f"{other.url}/chat/completions?key=secret"})
        with serving(lambda *_: away) as server, pytest.raises(EngineStopped) as caught:
            ChatModel(options(server))([question("a")])
        assert other.requests == []
    assert f"a redirect to {other.url}/chat/completions: give" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("failures", "stops"), [(7, False), (8, True)])
def test_eight_failures_in_a_row_end_the_run_and_seven_do_not(failures, stops):
    def script(number, body):
        return error(500) if number < failures else completion("x")

    with serving(script) as server:
        model = ChatModel(options(server, attempts=1, concurrency=1))
        asked = [question(str(i)) for i in range(9)]
        if stops:
            with pytest.raises(EngineStopped, match="HTTP 500"):
                model(asked)
        else:
            assert [isinstance(a, Failure) for a in model(asked)] == [True] * 7 + [False] * 2


# From run to run.


class Moody:
    """A captioner, an extractor and a judge that fail some questions until they are well."""

    def __init__(self, trouble: Reply, fails):
        self.trouble, self.fails, self.well = trouble, fails, False

    def __call__(self, number, body) -> Reply:
        content = body["messages"][0]["content"]
        kind = body["model"]
        if not self.well and self.fails(kind, json.dumps(content)):
            return self.trouble
        if kind == "judge":
            return completion("Yes")
        number = sum(map(ord, json.dumps(content)))  # the same caption for the same region
        return completion("star" if kind == "namer" else f"A star with number {number} on it")


def some(kind_wanted: str):
    """Fails a third of the questions of a kind, by what they ask."""
    return lambda kind, text: kind == kind_wanted and sum(map(ord, text)) % 3 == 0


@pytest.mark.parametrize(
    ("branch", "kind", "stage", "name"),
    [
        ("sa1b", "eye", "caption", "429"),
        ("sa1b", "namer", "categories", "500"),
        ("coconut", "judge", "verify", "cut off"),
    ],
)
def test_a_region_whose_calls_failed_is_asked_about_again(
    tmp_path, capsys, branch, kind, stage, name
):
    if branch == "sa1b":
        total = sum(write_sa1b(tmp_path / "data", range(4)).values())
    else:
        total = write_panoptic(tmp_path / "data", range(4))
    script = Moody(TROUBLES[name], some(kind))
    with serving(script) as server:
        ask = {"kind": "endpoint", "base_url": server.url, "first_delay": 0.01, "attempts": 2}
        second = "categories" if branch == "sa1b" else "verifier"
        model = {"categories": "namer", "verifier": "judge"}[second]
        sections = {"captioner": {**ask, "model": "eye"}, second: {**ask, "model": model}}
        values = values_of(tmp_path, branch, **sections)
        values["output"]["max_broken_share"] = 1.0
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))

        def run() -> dict:
            assert main(["engine", str(tmp_path / "recipe.yaml")]) == 0
            summary = json.loads((tmp_path / "out" / "summary.json").read_text())
            expect_counts(summary, tmp_path / "out", total)
            return summary

        summary = run()
        failed = summary["failed_calls"]
        assert 0 < failed < total and summary["regions"] == total - failed
        assert summary["stages"][stage]["dropped"] == {"call failed": failed}
        assert f"{failed} regions were dropped because calls failed" in capsys.readouterr().out

        script.well, before = True, len(server.requests)
        summary = run()
        assert summary["failed_calls"] == 0 and summary["regions"] == total
        # the failed ones, and what follows for those that had no caption
        questions = failed * (2 if stage == "caption" else 1)
        assert len(server.requests) - before == questions
        before = len(server.requests)
        run()
        assert len(server.requests) == before
    assert lines(tmp_path / "out" / "dropped.jsonl") == []


def test_a_run_that_stopped_over_failed_calls_goes_on_when_the_endpoint_is_well(tmp_path, capsys):
    total = sum(write_sa1b(tmp_path / "data", range(2)).values())
    script = Moody(error(500), lambda kind, text: True)
    with serving(script) as server:
        ask = {"kind": "endpoint", "base_url": server.url, "first_delay": 0.01, "attempts": 1}
        values = values_of(tmp_path, captioner={**ask, "model": "eye"})
        values["output"] |= {"part_images": 1, "batch_images": 1}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        assert main(["engine", str(tmp_path / "recipe.yaml")]) == 2  # too many broken images
        assert "HTTP 500" in capsys.readouterr().err
        script.well = True
        assert main(["engine", str(tmp_path / "recipe.yaml")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    expect_counts(summary, tmp_path / "out", total)
    assert summary["regions"] == total
