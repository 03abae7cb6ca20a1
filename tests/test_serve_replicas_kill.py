"""Replicas on a real Ray Serve: one is killed, and nobody notices; Ctrl-C leaves no process."""

import io
import os
import signal
from collections import Counter

import pytest
import replica_trial
from PIL import Image
from shapes import shapes_captioner

pytest.importorskip("ray")
ROOMY = ("--max-queue", "200", "--max-client-cost", "1000000000")


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


@pytest.mark.slow
def test_two_hundred_requests_are_answered_rightly_though_a_replica_is_killed(tmp_path):
    log = tmp_path / "server.log"
    captioner = shapes_captioner(device="cpu")
    asked = replica_trial.questions(200)
    expected = [
        [
            region.caption
            for region in captioner(opened(each[0]), each[1], **replica_trial.OPTIONS).regions
        ]
        for each in asked[:8]
    ] * 25

    with replica_trial.serving_replicas("--replicas", "2", *ROOMY, log=log) as (address, server):
        victim, *others = replica_trial.replica_pids(server)
        assert len(others) == 1
        left = []

        def kill(unanswered):
            left.extend(unanswered)
            os.kill(victim, signal.SIGKILL)

        answers = replica_trial.ask_all(address, [each[2] for each in asked], kill)
        metrics = replica_trial.httpx.get(f"{address}/metrics", timeout=30).text

    assert len(left) > 20  # it was killed in the middle
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses == {200: 200}, [each.text for each in answers if each.status_code != 200][:3]
    assert [replica_trial.captions_in(answer) for answer in answers] == expected
    (line,) = [line for line in metrics.splitlines() if line.startswith("perceptiondlm_retries_t")]
    assert float(line.split()[1]) > 0, log.read_text()
