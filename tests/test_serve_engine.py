"""The engine: batches, its queue, refusals, and what becomes of every job."""

import threading
import time
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the engine needs the package's apps extra")

from perceptiondlm.apps.captioning.captioner import RegionCaptioner  # noqa: E402
from perceptiondlm.apps.serving.engine import (  # noqa: E402
    Engine,
    EngineClosed,
    JobFailed,
    QueueFull,
)
from perceptiondlm.apps.serving.jobs import ChatJob, RegionJob  # noqa: E402
from PIL import Image  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from serving import counted  # noqa: E402

VECTORS = Path(__file__).parent / "fixtures" / "vectors"
SHORT = {"caption_length": 8}


@pytest.fixture(scope="module")
def captioner(load):
    return RegionCaptioner(*load("released-region"))


@pytest.fixture
def engine(captioner):
    with Engine(captioner, window=0.2) as engine:
        yield engine


def region_files(index: int):
    masks = sorted(VECTORS.glob(f"region_{index}_mask_*.png"))
    return VECTORS / f"region_{index}.png", masks


def region_job(index: int) -> RegionJob:
    return RegionJob.build(*region_files(index))


class Gate:
    """A job that keeps the engine busy until it is opened."""

    def __init__(self, engine: Engine):
        self.entered, self.opened = threading.Event(), threading.Event()
        self.ticket = engine.submit(region_job(0), on_step=self._wait, caption_length=2)
        assert self.entered.wait(20)

    def _wait(self, step):
        self.entered.set()
        assert self.opened.wait(20)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.3}])
def test_a_batch_gives_each_caller_what_the_library_gives_alone(engine, captioner, options):
    alone = [captioner(*region_files(i), **SHORT, **options) for i in range(3)]
    tickets = [engine.submit(region_job(i % 3), **SHORT, **options) for i in range(6)]
    done = [ticket.result(60) for ticket in tickets]
    assert done[0].batch_size == 6
    for i, completion in enumerate(done):
        assert completion.result.captions == alone[i % 3].captions
        assert completion.result.num_forwards == alone[i % 3].num_forwards


def test_questions_of_one_batch_are_answered_as_alone(engine, captioner):
    images = [region_files(i)[0] for i in range(3)]
    alone = [captioner.ask(p, "What is it?", max_new_tokens=8).answers for p in images]
    tickets = [engine.submit(ChatJob.ask(p, "What is it?"), max_new_tokens=8) for p in images]
    assert [ticket.result(60).result.answers for ticket in tickets] == alone
    assert tickets[0].result().batch_size == 3


def test_captions_and_questions_and_other_options_do_not_share_a_batch(engine):
    tickets = [
        engine.submit(region_job(0), **SHORT),
        engine.submit(ChatJob.ask(region_files(0)[0], "What?"), max_new_tokens=8),
        engine.submit(region_job(0), **SHORT, steps=4),
    ]
    assert [ticket.result(60).batch_size for ticket in tickets] == [1, 1, 1]


def test_each_instruction_of_a_batch_is_followed(engine, captioner):
    image, masks = region_files(0)
    alone = captioner(image, masks, instruction="Name each region.", **SHORT).captions
    tickets = [
        engine.submit(RegionJob.build(image, masks), **SHORT),
        engine.submit(RegionJob.build(image, masks, "Name each region."), **SHORT),
    ]
    assert tickets[1].result(60).result.captions == alone
    assert tickets[0].result(60).batch_size == 2


def test_a_seeded_random_job_runs_alone_and_repeats(engine, captioner):
    options = SHORT | {"temperature": 1.0, "seed": 3}
    alone = captioner(*region_files(1), **options).captions
    tickets = [engine.submit(region_job(1), **options) for _ in range(2)]
    for ticket in tickets:
        assert ticket.result(60).result.captions == alone
        assert ticket.result().batch_size == 1


def test_more_regions_than_prompts_and_than_a_batch_are_all_captioned(captioner):
    image, masks = region_files(1)
    many = (masks * 5)[:19]
    alone = captioner(image, many, **SHORT, batch_size=2).captions
    with Engine(captioner, max_batch=2) as engine:
        ticket = engine.submit(RegionJob.build(image, many), follow=True, **SHORT)
        steps = [step.number for step in ticket.follow()]
        assert ticket.result(60).result.captions == alone
    assert steps[-1] == 16 and steps == sorted(steps)


def test_a_full_queue_refuses_and_says_when_to_come_back(captioner):
    with Engine(captioner, max_queue=2) as engine:
        gate = Gate(engine)
        waiting = [engine.submit(region_job(0), **SHORT) for _ in range(2)]
        with pytest.raises(QueueFull) as refusal:
            engine.submit(region_job(0), **SHORT)
        assert refusal.value.retry_after >= 1
        gate.opened.set()
        assert all(ticket.result(60).result.captions for ticket in waiting)
        assert counted(engine, "refused") == 1


def test_a_queue_heavy_with_pixels_refuses(captioner):
    with Engine(captioner, max_queue_bytes=2 * region_job(0).nbytes) as engine:
        gate = Gate(engine)
        waiting = [engine.submit(region_job(0), **SHORT) for _ in range(2)]
        with pytest.raises(QueueFull):
            engine.submit(region_job(0), **SHORT)
        gate.opened.set()
        wait([ticket.future for ticket in waiting], 60)


def test_a_job_that_breaks_a_batch_does_not_break_the_others(engine, captioner):
    good = [region_job(0), region_job(1)]
    bad = replace(good[0], masks=(Image.new("L", (3, 3), 255),))  # slipped through every check
    alone = captioner(*region_files(1), **SHORT).captions
    tickets = [engine.submit(job, **SHORT) for job in (good[0], bad, good[1])]
    assert tickets[2].result(60).result.captions == alone
    assert tickets[0].result(60).batch_size == 1
    with pytest.raises(ValueError, match="image's size"):
        tickets[1].result(60)


def test_an_error_of_the_model_reaches_its_caller_and_the_engine_lives(engine, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(engine.captioner.model, "diffusion_steps", broken)
        with pytest.raises(JobFailed, match="boom"):
            engine.submit(region_job(0), **SHORT).result(60)
    assert engine.submit(region_job(0), **SHORT).result(60).result.captions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_length": 0}, "caption_length"),
        ({"steps": 0}, "steps"),
        ({"color": 3}, "color"),
        ({"block_length": 3}, "block_length"),
        ({"batch_size": 3}, "batch_size"),
        ({"caption_length": 5000}, "at most 4096 tokens"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_before_the_queue(engine, options, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(region_job(0), **options)
    assert counted(engine, "invalid") == 1


def test_a_cancelled_job_leaves_the_queue_and_a_running_one_stops(captioner):
    with Engine(captioner) as engine:
        gate = Gate(engine)
        ticket = engine.submit(region_job(0), **SHORT)
        assert engine.queue_length == 1
        ticket.cancel()
        assert engine.queue_length == 0
        gate.ticket.cancel()
        gate.opened.set()
        with pytest.raises(CancelledError):
            gate.ticket.result(20)
        with pytest.raises(CancelledError):
            ticket.result(20)
        assert counted(engine, "cancelled") == 2
        assert engine.submit(region_job(0), **SHORT).result(60).result.captions


def test_closing_finishes_what_waits_and_takes_nothing_more(captioner):
    engine = Engine(captioner)
    tickets = [engine.submit(region_job(0), **SHORT) for _ in range(3)]
    engine.close(drain=True, timeout=60)
    assert all(ticket.result(0).result.captions for ticket in tickets)
    with pytest.raises(EngineClosed):
        engine.submit(region_job(0))
    assert not engine.alive


def test_closing_without_draining_leaves_nobody_waiting(captioner):
    engine = Engine(captioner)
    gate = Gate(engine)
    waiting = engine.submit(region_job(0), **SHORT)
    threading.Timer(0.2, gate.opened.set).start()
    engine.close(drain=False, timeout=20)
    for ticket in (gate.ticket, waiting):
        with pytest.raises(CancelledError):
            ticket.result(1)


def test_a_slow_reader_of_steps_does_not_hold_the_engine_up(engine):
    ticket = engine.submit(region_job(0), follow=True, caption_length=16)
    assert ticket.result(60)
    steps = list(ticket.follow())  # read only now: the last one is left
    assert [step.number for step in steps] == [16]


def test_metrics_add_up(captioner):
    started = time.monotonic()
    with Engine(captioner, window=0.1) as engine:
        tickets = [engine.submit(region_job(0), **SHORT) for _ in range(4)]
        done = [ticket.result(60) for ticket in tickets]
        families = text_string_to_metric_families(engine.metrics.prometheus().decode())
    samples = [sample for family in families for sample in family.samples]
    now = {s.name.removeprefix("perceptiondlm_"): s.value for s in samples if not s.labels}
    sizes = {s.labels["le"]: s.value for s in samples if s.name.endswith("batch_size_bucket")}
    assert (now["accepted_total"], now["completed_total"], now["batches_total"]) == (4, 4, 1)
    assert now["tokens_total"] == sum(completion.completion_tokens for completion in done)
    assert now["forwards_total"] == sum(completion.result.num_forwards for completion in done)
    assert now["latency_seconds_count"] == 4 and now["tokens_per_second"] > 0
    assert 0 < now["latency_seconds_sum"] <= 4 * (time.monotonic() - started)
    assert (sizes["2.0"], sizes["4.0"], sizes["+Inf"]) == (0, 1, 1)
    assert (now["up"], now["queue_length"], now["running"]) == (1, 0, 0)


def test_a_request_may_choose_another_acceptance_than_the_server(load):
    captioner = RegionCaptioner(*load("released-region"), threshold=1.0, **SHORT)
    with Engine(captioner) as engine:
        done = engine.submit(region_job(0), factor=1e6).result()
    assert done.result.num_forwards == 1
