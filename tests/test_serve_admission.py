"""Jobs that join others between two steps: what they get, when they start, and who goes first."""

import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("fastapi", reason="the engine needs the package's apps extra")

from perceptiondlm.apps.captioning.captioner import RegionCaptioner  # noqa: E402
from perceptiondlm.apps.serving import packing  # noqa: E402
from perceptiondlm.apps.serving.engine import Engine, JobFailed  # noqa: E402
from perceptiondlm.apps.serving.jobs import ChatJob, RegionJob  # noqa: E402
from perceptiondlm.apps.serving.turns import (  # noqa: E402
    next_to_start,
    next_to_step,
    share_out,
    spend_alone,
)
from serving import counted  # noqa: E402

SHORT = {"caption_length": 4}
LONG = {"caption_length": 48}


@pytest.fixture(scope="module")
def tree(make):
    return RegionCaptioner(*make(region_layout="independent"))


@pytest.fixture(scope="module")
def joint(make):
    return RegionCaptioner(*make(region_layout="released"))


@pytest.fixture
def together(monkeypatch):
    """Lists how many forward passes ran as one, each time that several did."""
    counts = []
    packed_logits = packing.packed_logits

    def counting(passes):
        counts.append(len(passes))
        return packed_logits(passes)

    monkeypatch.setattr(packing, "packed_logits", counting)
    return counts


class LongJob:
    """A job that is under way, and goes on when it is let."""

    def __init__(self, engine: Engine, job: RegionJob, **options):
        self.begun, self.goes_on = threading.Event(), threading.Event()
        self.steps = []
        self.ticket = engine.submit(job, on_step=self._step, **(LONG | options))
        assert self.begun.wait(30)

    def _step(self, step):
        self.steps.append((step.number, time.monotonic()))
        self.begun.set()
        assert self.goes_on.wait(30)


# What a job gets does not depend on what runs beside it.

CASES = [
    ("captions", {"caption_length": 4}),
    ("captions", {"caption_length": 9, "steps": 3}),
    ("captions", {"caption_length": 12, "threshold": 0.2}),
    ("captions", {"caption_length": 6, "entropy_bound": 1.0, "remask_below": 0.05}),
    ("captions", {"caption_length": 5, "temperature": 1.0, "seed": 3}),
    ("captions", {"caption_length": 5, "temperature": 0.7, "top_k": 9, "seed": 4}),
    ("captions", {"caption_length": 5, "cfg_scale": 0.5}),
    ("captions", {"caption_length": 7, "remasking": "random", "seed": 5}),
    ("captions", {"caption_length": 6, "fast": True}),
    ("answers", {"max_new_tokens": 6}),
    ("answers", {"max_new_tokens": 6, "fast": True}),
    ("answers", {"max_new_tokens": 8, "block_length": 4, "threshold": 0.3}),
    ("answers", {"max_new_tokens": 8, "block_length": 4, "block_cache": "dual", "threshold": 0.3}),
    ("answers", {"max_new_tokens": 5, "temperature": 1.0, "seed": 6}),
]


def asked(captioner, scene, index: int):
    """A job of the cases, its options, and what the library gives for it alone."""
    task, options = CASES[index]
    image, masks = scene((61 + 13 * (index % 3), 47), 1 + index % 3, index % 4)
    if task == "answers":
        alone = captioner.ask(image, f"question {index}?", **options)
        return ChatJob.ask(image, f"question {index}?"), options, (alone.answers, alone.scores)
    alone = captioner(image, masks, **options)
    return RegionJob.build(image, masks), options, scored(alone)


def scored(result) -> tuple:
    return result.captions, [region.score for region in result.regions]


def given(result) -> tuple:
    return (result.answers, result.scores) if hasattr(result, "answers") else scored(result)


@pytest.mark.parametrize("layout", ["independent", "released"])
def test_jobs_of_all_kinds_that_join_a_long_one_get_what_they_get_alone(
    make, scene, together, layout
):
    captioner = RegionCaptioner(*make(region_layout=layout))
    cases = [asked(captioner, scene, index) for index in range(len(CASES))]
    image, masks = scene((80, 50), 3, 9)
    alone = captioner(image, masks, **LONG)
    with Engine(captioner, window=0.0, max_batch=6) as engine:
        long = LongJob(engine, RegionJob.build(image, masks))
        tickets = [engine.submit(job, **options) for job, options, _ in cases]
        long.goes_on.set()
        found = [ticket.result(120).result for ticket in tickets]
        long_found = long.ticket.result(120).result

    for result, (_, _, (texts, scores)) in zip(found, cases, strict=True):
        assert given(result)[0] == texts
        assert given(result)[1] == pytest.approx(scores, abs=1e-4)
    assert long_found.captions == alone.captions
    assert [n for n, _ in long.steps] == list(range(1, 49))
    assert bool(together) == (layout == "independent")


def test_passes_together_give_the_logits_of_each_alone(tree, scene):
    model, processor = tree.model, tree.processor
    calls = [({"caption_length": 3}, 1), ({"caption_length": 17}, 3), ({"caption_length": 8}, 2)]
    passes = []
    for options, count in calls:
        image, masks = scene((61, 47 + count), count, count)
        steps = model.diffusion_steps(image, masks, processor=processor, **options)
        passes.append(next(steps))
    alone = [one.run() for one in passes]
    for own, expected in zip(packing.packed_logits(passes), alone, strict=True):
        assert own.shape == expected.shape
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


# When jobs start and who steps.


def test_a_short_job_is_answered_while_a_long_one_runs(tree, scene, together):
    image, masks = scene((61, 47), 2)
    with Engine(tree, window=0.0) as engine:
        long = LongJob(engine, RegionJob.build(image, masks))
        short = engine.submit(RegionJob.build(image, masks[:1]), caption_length=16)
        long.goes_on.set()
        completion = short.result(60)
        assert not long.ticket.future.done()
        long.ticket.result(60)
        assert completion.batch_size == 1 and counted(engine, "joined") == 1
    assert together  # not far shorter: both step


def test_steps_of_a_stream_come_while_others_join(tree, scene):
    image, masks = scene((61, 47), 2)
    with Engine(tree, window=0.0) as engine:
        long = LongJob(engine, RegionJob.build(image, masks))
        tickets = [
            engine.submit(RegionJob.build(image, masks), follow=True, **SHORT) for _ in range(3)
        ]
        long.goes_on.set()
        numbers = [[step.number for step in ticket.follow()] for ticket in tickets]
        assert all(ticket.result(60).result.captions for ticket in tickets)
    for own in numbers:  # a slow reader may miss some
        assert own and own == sorted(set(own)) and own[-1] == 4


def test_a_job_given_up_ends_and_those_beside_it_go_on(tree, scene):
    image, masks = scene((61, 47), 2)
    alone = tree(image, masks, **SHORT).captions
    with Engine(tree, window=0.0) as engine:
        long = LongJob(engine, RegionJob.build(image, masks))
        short = engine.submit(RegionJob.build(image, masks), **SHORT)
        long.ticket.cancel()
        long.goes_on.set()
        assert short.result(60).result.captions == alone
        with pytest.raises(CancelledError):
            long.ticket.result(60)
        assert engine.running == 0


def test_a_job_that_fails_takes_no_other_with_it(tree, scene, monkeypatch):
    image, masks = scene((61, 47), 2)
    alone = tree(image, masks, **SHORT).captions
    expected = tree(image, masks, **LONG).captions
    see = tree.model.see

    def short_sighted(images, *args, **options):
        if images[0].size == (50, 50):
            raise RuntimeError("boom")
        return see(images, *args, **options)

    monkeypatch.setattr(tree.model, "see", short_sighted)
    with Engine(tree, window=0.0) as engine:
        long = LongJob(engine, RegionJob.build(image, masks))
        bad = engine.submit(RegionJob.build(*scene((50, 50), 1)), **SHORT)
        good = engine.submit(RegionJob.build(image, masks), **SHORT)
        long.goes_on.set()
        assert good.result(60).result.captions == alone
        with pytest.raises(JobFailed, match="boom"):
            bad.result(60)
        assert long.ticket.result(60).result.captions == expected


def test_passes_that_lack_memory_together_run_each_alone(tree, scene, monkeypatch):
    image, masks = scene((61, 47), 2)
    alone = [tree(image, masks, **options).captions for options in (SHORT, LONG)]

    def short_of_memory(passes):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(packing, "packed_logits", short_of_memory)
    with Engine(tree, window=0.0) as engine:
        long = LongJob(engine, RegionJob.build(image, masks))
        short = engine.submit(RegionJob.build(image, masks), **SHORT)
        long.goes_on.set()
        assert [t.result(60).result.captions for t in (short, long.ticket)] == alone


def test_a_job_for_which_there_is_no_memory_beside_another_runs_after_it(tree, scene, monkeypatch):
    image, masks = scene((61, 47), 2)
    alone = tree(image, masks, **SHORT).captions
    steps = tree.model.diffusion_steps
    with Engine(tree, window=0.0) as engine:

        def short_of_memory(*args, **options):
            if engine.running > 1:
                raise torch.OutOfMemoryError("no room")
            return steps(*args, **options)

        monkeypatch.setattr(tree.model, "diffusion_steps", short_of_memory)
        long = LongJob(engine, RegionJob.build(image, masks))
        short = engine.submit(RegionJob.build(image, masks), **SHORT)
        long.goes_on.set()
        assert long.ticket.result(60).result.captions
        assert short.result(60).result.captions == alone
        assert counted(engine, "failed") == 0


def test_what_two_jobs_under_way_ask_about_one_image_is_seen_once(tree, scene, monkeypatch):
    image, masks = scene((61, 47), 2)
    alone = tree(image, masks, **SHORT).captions
    seen = []
    see_features = tree.model.see_features
    monkeypatch.setattr(
        tree.model,
        "see_features",
        lambda **tensors: seen.append(len(tensors["image_sizes"])) or see_features(**tensors),
    )
    with Engine(tree, window=0.0) as engine:
        long = LongJob(engine, RegionJob.build(image, masks))
        short = engine.submit(RegionJob.build(image.copy(), masks), **SHORT)
        long.goes_on.set()
        assert short.result(60).result.captions == alone
        assert not long.ticket.future.done()
    assert seen == [1]


def test_closing_finishes_what_is_under_way_and_what_waits(tree, scene):
    image, masks = scene((61, 47), 2)
    engine = Engine(tree, window=0.0, max_batch=1)
    long = LongJob(engine, RegionJob.build(image, masks))
    tickets = [engine.submit(RegionJob.build(image, masks), caption_length=40) for _ in range(2)]
    long.goes_on.set()
    engine.close(drain=True, timeout=120)
    assert all(ticket.result(0).result.captions for ticket in (long.ticket, *tickets))
    assert not engine.alive and engine.running == engine.queue_length == 0


# The choices by themselves.


def waiting(cost, rows=1, joins=True, key="a", is_held=False, needs_all=False):
    return SimpleNamespace(
        cost=cost, rows=rows, joins=joins, key=key, is_held=is_held, needs_all=needs_all
    )


def running(
    work_left, rows=1, is_express=False, lag=0.0, expected=1.0, positions=1, needs_all=False
):
    run = SimpleNamespace(
        work_left=work_left,
        rows=rows,
        is_express=is_express,
        lag=lag,
        expected_seconds=expected,
        positions=positions,
        needs_all=needs_all,
        tickets=[None],
        seconds=0.0,
    )

    def spend(seconds, is_pass=False):
        run.seconds += seconds

    run.spend = spend
    return run


@pytest.mark.parametrize(
    ("queue", "runs", "expected"),
    [
        # the oldest, and those of its kind, as far as there is room
        ([waiting(1), waiting(1, key="b"), waiting(1)], [], ([0, 2], False)),
        ([waiting(1, rows=3), waiting(1, rows=2), waiting(1)], [], ([0, 2], False)),
        # beside others where there are places left
        ([waiting(9), waiting(9)], [running(10, rows=3)], ([0], False)),
        ([waiting(9)], [running(10, rows=4)], ([], False)),
        # nobody overtakes the oldest but who is far shorter
        ([waiting(9, rows=2), waiting(9)], [running(10, rows=3)], ([], False)),
        ([waiting(9, rows=2), waiting(1)], [running(10, rows=3)], ([1], True)),
        ([waiting(1), waiting(1)], [running(10, rows=4)], ([0, 1], True)),
        ([waiting(1)], [running(10, rows=4), running(1, rows=4, is_express=True)], ([], False)),
        # nor do the far shorter overtake each other
        (
            [waiting(1, rows=2), waiting(1)],
            [running(10, rows=4), running(1, rows=3, is_express=True)],
            ([], False),
        ),
        (
            [waiting(1, joins=False), waiting(1)],
            [running(10, rows=4), running(1, is_express=True)],
            ([], False),
        ),
        # those that cannot share passes start alone
        ([waiting(9, joins=False)], [running(10)], ([], False)),
        ([waiting(9, joins=False)], [], ([0], False)),
        ([waiting(1, joins=False)], [running(10)], ([0], True)),
        # one without memory waits for others to end
        ([waiting(9, is_held=True), waiting(9)], [running(10)], ([1], False)),
        ([waiting(9, is_held=True)], [], ([0], False)),
        # one that lacked it too often waits for all to end, and runs by itself
        ([waiting(1, needs_all=True), waiting(9)], [running(10)], ([], False)),
        ([waiting(9, needs_all=True), waiting(9)], [], ([0], False)),
        ([waiting(9), waiting(9, needs_all=True), waiting(9)], [], ([0, 2], False)),
        ([waiting(1)], [running(10, needs_all=True)], ([], False)),
    ],
)
def test_who_starts(queue, runs, expected):
    batch, is_express = next_to_start(queue, runs, 4)
    places = {id(ticket): place for place, ticket in enumerate(queue)}
    assert ([places[id(ticket)] for ticket in batch], is_express) == expected


def test_those_step_that_are_about_as_short_as_the_shortest_and_those_far_behind():
    runs = [running(8), running(64), running(65), running(99, lag=0.1)]
    assert next_to_step(runs) == [runs[0], runs[1], runs[3]]
    assert next_to_step([]) == []


def test_a_long_run_beside_short_ones_gets_its_share_of_the_time():
    long = running(10_000, expected=1.6, positions=4)
    shorts = [running(1, positions=1) for _ in range(3)]
    took = 0.0
    for _ in range(1000):
        stepping = next_to_step([long, *shorts])
        seconds = 0.01 * sum(run.positions for run in stepping)
        share_out([long, *shorts], seconds, stepping)
        took += seconds
    assert all(run.seconds > 0 for run in shorts)
    # a quarter, but for the tenth of a second that it may be behind
    assert long.seconds == pytest.approx(took / 4, abs=0.2)


def test_time_that_one_run_takes_for_itself_puts_the_others_behind():
    first, second = running(1), running(1)
    spend_alone([first, second], 0.5, first)
    assert (first.seconds, first.lag, second.seconds, second.lag) == (0.5, 0, 0, 0.25)
