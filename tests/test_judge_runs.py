"""Whole judge runs: concurrency, cache, budget, kill and resume, failure, and what is written."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from perceptiondlm.apps.cli import main
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.evaluation.files import read_journal, read_json
from perceptiondlm.evaluation.score import score
from test_evaluation_benchmarks import write_paradlc
from test_judge_server import (
    KEY,
    Reply,
    completion,
    error,
    letter_of,
    serving,
)

IMAGES, REGIONS = 3, 2
CALLS = IMAGES * REGIONS * 3  # recognition and two questions a region


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A benchmark and captions for it, all different."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    folder = write_paradlc(tmp_path / "bench", IMAGES, REGIONS)
    captions = {s.key: f"a caption of {s.key}" for s in load_benchmark(folder).samples}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return tmp_path


def command(folder, url: str, *options: str, mode: str = "text") -> list[str]:
    return [
        *("evaluate", "judge", "--benchmark", str(folder / "bench"), "--base-url", url),
        *("--predictions", str(folder / "captions.json"), "--model", "judge-1"),
        *("--output", str(folder / "answers.json"), "--mode", mode),
        *("--attempts", "2", "--first-delay", "0.01", *options),
    ]


def scores_of(folder) -> dict:
    return score(load_benchmark(folder / "bench"), read_json(folder / "answers.json"))


@pytest.fixture
def undisturbed(folder):
    """The scores of a run that nothing disturbs."""
    with serving(lambda _, body: letter_of(body)) as server:
        assert main(command(folder, server.url)) == 0
        assert server.answered == CALLS
    scores = scores_of(folder)
    for file in ("answers.json", "answers.cache.jsonl"):
        (folder / file).unlink()
    return scores


def test_every_question_is_asked_once_and_a_second_run_costs_nothing(folder, capsys):
    with serving(lambda _, body: letter_of(body)) as server:
        assert main(command(folder, server.url)) == 0
        assert server.answered == CALLS
        first = (folder / "answers.json").read_text()
        assert main(command(folder, server.url)) == 0
        assert server.answered == CALLS
    assert (folder / "answers.json").read_text() == first
    assert f"0 calls made, {CALLS} answers from the cache" in capsys.readouterr().out
    assert all(len(answers) == 3 for answers in json.loads(first).values())


def test_another_model_or_caption_is_asked_anew(folder):
    with serving(lambda _, body: letter_of(body)) as server:
        main(command(folder, server.url))
        main(command(folder, server.url, "--model", "judge-2"))
        assert server.answered == 2 * CALLS
        captions = read_json(folder / "captions.json")
        captions["70_0"] = "another caption"
        (folder / "captions.json").write_text(json.dumps(captions))
        main(command(folder, server.url))
        assert server.answered == 2 * CALLS + 3


def test_images_are_shown_with_the_question(folder):
    with serving(lambda _, body: letter_of(body)) as server:
        assert main(command(folder, server.url, mode="image")) == 0
        content = server.requests[0]["messages"][0]["content"]
    assert [p["type"] for p in content] == ["text", "image_url", "text", "image_url", "text"]


def test_a_missing_image_is_noticed_before_anything_is_paid_for(folder, capsys):
    (folder / "bench" / "images" / "2.png").unlink()
    with serving(lambda _, body: letter_of(body)) as server:
        assert main(command(folder, server.url, mode="image")) == 2
        assert server.requests == []
    assert "found 1 of 3 missing" in capsys.readouterr().err


@pytest.mark.parametrize("concurrency", [1, 4])
def test_calls_under_way_at_once_are_bounded(folder, concurrency):
    together = threading.Barrier(concurrency)

    def script(number, body):
        if number < concurrency:
            together.wait(timeout=5)  # passes only if so many are under way at once
        return letter_of(body)

    with serving(script) as server:
        assert main(command(folder, server.url, "--concurrency", str(concurrency))) == 0
        assert server.most_under_way == concurrency


def test_a_spent_budget_ends_the_run_and_the_next_goes_on(folder, undisturbed, capsys):
    with serving(lambda _, body: letter_of(body)) as server:
        assert main(command(folder, server.url, "--max-calls", "7", "--concurrency", "3")) == 1
        assert server.answered == 7
        assert not (folder / "answers.json").exists()
        assert "the budget of 7 calls is spent" in capsys.readouterr().out
        assert main(command(folder, server.url)) == 0
        assert server.answered == CALLS
    assert scores_of(folder) == undisturbed


def test_a_killed_run_goes_on_with_the_same_scores_and_calls(folder, undisturbed):
    started, victim = threading.Event(), []

    def kill_at_the_eighth(number, body):
        if number == 7:
            started.wait(timeout=60)
            os.kill(victim[0].pid, signal.SIGKILL)
            victim[0].wait()
            return Reply(b"", cut=True)  # nobody is there to read it
        return letter_of(body)

    with serving(kill_at_the_eighth) as server:
        arguments = command(folder, server.url, "--concurrency", "1")
        victim.append(
            subprocess.Popen(
                [sys.executable, "-m", "perceptiondlm.apps.cli", *arguments],
                stderr=subprocess.DEVNULL,
                cwd=folder,
            )
        )
        started.set()
        assert victim[0].wait(timeout=60) == -signal.SIGKILL
        assert server.answered == 7
        with open(folder / "answers.cache.jsonl", "a") as cache:
            cache.write('{"key": "torn')  # as a kill in the middle of a write leaves it
        assert main(command(folder, server.url)) == 0
        assert server.answered == CALLS
    assert scores_of(folder) == undisturbed


def test_troubles_on_the_way_change_no_score(folder, undisturbed):
    troubles = {
        1: error(429, Retry_After="0.1"),
        5: error(500),
        9: Reply(b"{"),
        13: Reply({"choices": []}, cut=True),
    }
    with serving(lambda number, body: troubles.get(number) or letter_of(body)) as server:
        assert main(command(folder, server.url, "--attempts", "5")) == 0
        assert (server.answered, len(server.requests)) == (CALLS + 1, CALLS + 4)
    assert scores_of(folder) == undisturbed


def test_a_failed_question_is_recorded_and_asked_again_by_the_next_run(folder, undisturbed, capsys):
    def malformed_for_one(_, body):
        one = "hound 71_0" in body["messages"][0]["content"]
        return Reply(b"<html>") if one else letter_of(body)

    with serving(malformed_for_one) as server:
        assert main(command(folder, server.url)) == 1
    out = capsys.readouterr().out
    assert "1 questions have no answer" in out and "<html>" in out and "goes on from there" in out
    failures = [r for r in read_journal(folder / "answers.cache.jsonl") if "failure" in r]
    assert [(f["region"], f["question"]) for f in failures] == [("71_0", 0)]
    assert "expected a chat completion" in failures[0]["failure"]
    with serving(lambda _, body: letter_of(body)) as server:
        assert main(command(folder, server.url)) == 0
        assert server.answered == 1
    assert scores_of(folder) == undisturbed


def test_a_dead_endpoint_ends_the_run_soon(folder, capsys):
    with serving(letter_of) as server:
        url = server.url
    assert main(command(folder, url)) == 1
    out = capsys.readouterr().out
    assert "calls in a row failed" in out and "refused" in out


def test_a_refused_key_ends_the_run_at_once_and_is_written_nowhere(folder, capsys, caplog):
    with serving(lambda *_: error(401, f"no such key: {KEY}")) as server:
        assert main(command(folder, server.url, "--concurrency", "1")) == 1
        assert len(server.requests) == 1
    printed = capsys.readouterr()
    assert "no such key: [key]" in printed.out
    written = "".join(file.read_text() for file in folder.glob("answers*"))
    assert KEY not in printed.out + printed.err + caplog.text + written


def test_the_key_is_in_no_file_of_a_finished_run(folder):
    with serving(lambda _, body: letter_of(body)) as server:
        main(command(folder, server.url))
    files = [file for file in folder.glob("answers*") if file.is_file()]
    assert len(files) == 3 and not any(KEY in file.read_text() for file in files)


def test_the_run_is_recorded_beside_the_answers(folder):
    with serving(lambda _, body: letter_of(body)) as server:
        main(command(folder, server.url, "--request", '{"max_tokens": null, "seed": 3}'))
        assert server.requests[0]["seed"] == 3 and "max_tokens" not in server.requests[0]
    record = read_json(folder / "answers.run.json")
    assert record["judge"] == "judge-1" and record["calls"] == CALLS
    assert record["prompt_version"] == "perceptiondlm-judge-1" and record["mode"] == "text"
    assert record["request"] == {"temperature": 0, "seed": 3}
    assert record["endpoint"].startswith("http://127.0.0.1:")
    assert len(record["predictions_sha256"]) == 64
    assert {"hardware", "versions", "git_revision"} == set(record["environment"])


def test_regions_without_a_caption_are_not_asked_about(folder, caplog):
    captions = read_json(folder / "captions.json")
    del captions["70_0"]
    (folder / "captions.json").write_text(json.dumps({**captions, "unknown": "x"}))
    with serving(lambda *_: completion("A")) as server:
        assert main(command(folder, server.url)) == 0
        assert server.answered == CALLS - 3
    assert "1 of 6 regions have no caption" in caplog.text
    assert "1 captions in" in caplog.text
    assert scores_of(folder)["missing"]["regions"] == ["70_0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "expected an object"), ('{"x": "y"}', "none of them"), ('{"70_0": 3}', "got 3")],
)
def test_a_bad_prediction_file_is_refused(folder, content, message, capsys):
    (folder / "captions.json").write_text(content)
    assert main(command(folder, "http://127.0.0.1:1/v1")) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("request_fields", ["[1]", "{", "3"])
def test_request_fields_must_be_an_object(folder, request_fields):
    with pytest.raises(SystemExit):
        main(command(folder, "http://127.0.0.1:1/v1", "--request", request_fields))
