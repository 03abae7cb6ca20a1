"""Jobs of the engine that something goes wrong for: memory, cancelling, closing, chance."""

import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("fastapi", reason="the engine needs the package's apps extra")

from perceptiondlm.apps.captioning.captioner import RegionCaptioner  # noqa: E402
from perceptiondlm.apps.serving import engine as engine_module  # noqa: E402
from perceptiondlm.apps.serving.engine import Engine  # noqa: E402
from perceptiondlm.apps.serving.jobs import ChatJob, RegionJob  # noqa: E402
from perceptiondlm.generation_cache import ForwardPass  # noqa: E402
from perceptiondlm.generation_loop import answered  # noqa: E402
from serving import counted  # noqa: E402
from test_serve_admission import LONG, SHORT, LongJob  # noqa: E402


@pytest.fixture(scope="module")
def tree(make):
    return RegionCaptioner(*make(region_layout="independent"))


@pytest.fixture
def by_chance(tree, monkeypatch):
    """A function: makes random decoding, and other options, the checkpoint's default."""

    def change(**options):
        for name, value in ({"do_sample": True, "temperature": 1.0} | options).items():
            monkeypatch.setattr(tree.model.generation_config, name, value, raising=False)
        return tree

    return change


def short_beside_others(model, engine: Engine, size, monkeypatch, max_others: int = 0):
    """Leaves no memory for images of a size beside more than so many jobs."""
    steps = model.diffusion_steps

    def short_of_memory(images, *args, **options):
        of_size = not hasattr(images, "groups") and images[0].size == size
        if of_size and engine.running > 1 + max_others:
            raise torch.OutOfMemoryError("no room")
        return steps(images, *args, **options)

    monkeypatch.setattr(model, "diffusion_steps", short_of_memory)


# Chance.


@pytest.mark.parametrize("kind", ["captions", "answers"])
def test_seeded_jobs_get_what_they_get_alone_where_the_checkpoint_decodes_by_chance(
    by_chance, scene, kind
):
    captioner = by_chance()
    image, masks = scene((61, 47), 2)
    if kind == "captions":
        alone = captioner(image, masks, seed=3, **SHORT).captions
        job, options = RegionJob.build(image, masks), SHORT
    else:
        alone = captioner.ask(image, "what?", seed=3, max_new_tokens=5).answers
        job, options = ChatJob.ask(image, "what?"), {"max_new_tokens": 5}
    with Engine(captioner, window=0.3) as engine:
        tickets = [engine.submit(job, seed=3, **options) for _ in range(3)]
        results = [ticket.result(60).result for ticket in tickets]
    for result in results:
        assert (result.captions if kind == "captions" else result.answers) == alone


def test_candidates_of_a_checkpoint_take_places_and_count_as_work(by_chance, scene):
    image, masks = scene((61, 47), 2)
    job = RegionJob.build(image, masks)
    with Engine(by_chance(), window=0.0) as engine:
        one = engine.submit(job, seed=3, **SHORT)
        assert one.result(60)
    captioner = by_chance(num_return_sequences=3)
    alone = captioner.model.diffusion_generate(
        image, list(masks), processor=captioner.processor, seed=3, **SHORT
    )
    with Engine(captioner, window=0.0) as engine:
        three = engine.submit(job, seed=3, **SHORT)
        assert three.result(60).result.captions == alone.texts[0]
    assert (three.rows, three.cost) == (3 * one.rows, 3 * one.cost)


def test_a_job_may_not_ask_for_candidates_that_no_result_holds(tree, scene):
    with Engine(tree) as engine, pytest.raises(ValueError, match="num_return_sequences"):
        engine.submit(RegionJob.build(*scene((61, 47), 1)), num_return_sequences=3, temperature=1.0)


# Memory.


def test_a_job_that_never_has_memory_beside_others_gets_all_of_it(tree, scene, monkeypatch):
    image, masks = scene((61, 47), 1)
    large, large_masks = scene((90, 50), 1)
    alone = tree(large, large_masks, **SHORT).captions
    with Engine(tree, window=0.0, seen_bytes=0, max_batch=2) as engine:
        short_beside_others(tree.model, engine, (90, 50), monkeypatch)
        stops = threading.Event()

        def keep_busy():  # somebody is under way at any time
            tickets = []
            while not stops.is_set():
                tickets = [ticket for ticket in tickets if not ticket.future.done()]
                while len(tickets) < 4:
                    length = 6 + len(tickets)
                    tickets.append(
                        engine.submit(RegionJob.build(image, masks), caption_length=length)
                    )
                time.sleep(0.01)

        thread = threading.Thread(target=keep_busy)
        thread.start()
        try:
            while engine.running < 2:
                time.sleep(0.01)
            ticket = engine.submit(RegionJob.build(large, large_masks), **SHORT)
            assert ticket.result(60).result.captions == alone
        finally:
            stops.set()
            thread.join()
    assert counted(engine, "failed") == 0


def test_a_job_given_up_while_it_waits_for_memory_leaves_the_queue(tree, scene, monkeypatch):
    image, masks = scene((61, 47), 2)
    with Engine(tree, window=0.0, seen_bytes=0) as engine:
        short_beside_others(tree.model, engine, (90, 50), monkeypatch)
        going = threading.Semaphore(1)
        long = engine.submit(
            RegionJob.build(image, masks), on_step=lambda _: going.acquire(timeout=30), **LONG
        )
        held = engine.submit(RegionJob.build(*scene((90, 50), 1)), **SHORT)
        for _ in range(20):  # its steps
            going.release()
            if held.num_lacks:
                break
            time.sleep(0.1)
        assert held.is_held and engine.queue_length == 1
        held.cancel()
        going.release(2)
        with pytest.raises(CancelledError):
            held.result(10)
        assert engine.queue_length == 0 and not long.future.done()
        going.release(60)
        assert long.result(60)


def test_a_job_that_fails_makes_room_for_those_that_wait_for_memory(tree, scene, monkeypatch):
    image, masks = scene((61, 47), 2)

    def fails(step):
        if step.number == 4:
            raise RuntimeError("boom")

    with Engine(tree, window=0.0, seen_bytes=0) as engine:
        short_beside_others(tree.model, engine, (90, 50), monkeypatch, max_others=1)
        long = LongJob(engine, RegionJob.build(image, masks))
        bad = engine.submit(RegionJob.build(image, masks), on_step=fails, **LONG)
        is_late = []
        held = engine.submit(
            RegionJob.build(*scene((90, 50), 1)),
            on_step=lambda _: is_late.append(long.ticket.future.done()),
            **SHORT,
        )
        long.goes_on.set()
        assert bad.future.exception(60) and held.result(60) and long.ticket.result(60)
    assert held.num_lacks and not any(is_late)


def test_steps_that_run_again_after_a_failure_are_not_told_again(tree, scene, monkeypatch):
    image, masks = scene((61, 47), 2)
    alone = tree(image, masks, caption_length=9).captions
    run, passes = ForwardPass.run, []

    def short_of_memory_once(self):
        passes.append(self)
        if len(passes) == 6:
            raise torch.OutOfMemoryError("no room")
        return run(self)

    monkeypatch.setattr(ForwardPass, "run", short_of_memory_once)
    numbers = []
    with Engine(tree, window=0.0) as engine:
        ticket = engine.submit(
            RegionJob.build(image, masks),
            on_step=lambda step: numbers.append(step.number),
            caption_length=9,
        )
        assert ticket.result(60).result.captions == alone
    assert len(passes) == 6 + 9 and numbers == list(range(1, 10))


# Templates: texts are chosen in forward passes of their own, between which others run.

COLORS = ["red", "green", "blue", "gray", "pink", "brown", "black", "white", "any color of all"]


@pytest.mark.parametrize("layout", ["independent", "released"])
def test_each_forward_pass_that_chooses_a_text_is_a_step_of_its_own(make, scene, layout):
    model, processor = make(region_layout=layout)
    image, masks = scene((61, 47), 2)
    call = {"template": {"color": COLORS, "size": ["s", "m"]}, "processor": processor}
    expected = model.diffusion_generate(image, list(masks), **call)
    steps, passes = model.diffusion_steps(image, list(masks), **call), []

    def answer(one: ForwardPass):
        passes.append(len(one.response_ids))
        return one.run()

    assert answered(steps, answer).texts == expected.texts
    assert passes == [8, 1, 2] * 2  # at most eight texts at once


def test_a_job_that_chooses_among_many_texts_ends_when_it_is_given_up(tree, scene, monkeypatch):
    image, masks = scene((61, 47), 2)
    job = RegionJob.build(image, masks, template={"a": COLORS, "b": COLORS, "c": COLORS})
    run, passes = ForwardPass.run, []

    def noting(self):
        passes.append(self)
        if len(passes) == 3:
            ticket.cancel()
        return run(self)

    monkeypatch.setattr(ForwardPass, "run", noting)
    with Engine(tree, window=0.2) as engine:
        ticket = engine.submit(job)
        with pytest.raises(CancelledError):
            ticket.result(60)
        assert ticket.num_steps == 12 + 1 and engine.running == 0
    assert len(passes) == 3


# A stream of jobs whose start takes most of their time.


def test_a_long_job_gets_its_share_beside_jobs_that_hardly_do_more_than_start(
    tree, scene, monkeypatch
):
    image, masks = scene((61, 47), 1)
    clock = [0.0]  # a step takes 1, a start 10
    run_passes, diffusion_steps = engine_module.run_passes, tree.model.diffusion_steps

    def step(passes):
        clock[0] += 1
        return run_passes(passes)

    def start(*args, **options):
        clock[0] += 10
        return diffusion_steps(*args, **options)

    times = SimpleNamespace(perf_counter=lambda: clock[0], monotonic=time.monotonic)
    monkeypatch.setattr(engine_module, "time", times)
    monkeypatch.setattr(engine_module, "run_passes", step)
    monkeypatch.setattr(tree.model, "diffusion_steps", start)
    with Engine(tree, window=0.0) as engine:
        ends, shorts = [], []

        def again(_=None):
            if not ends:
                shorts.append(engine.submit(RegionJob.build(image, masks), caption_length=1))
                shorts[-1].future.add_done_callback(again)

        long = LongJob(engine, RegionJob.build(image, masks))
        long.ticket.future.add_done_callback(lambda _: ends.append(clock[0]))
        again()
        again()
        long.goes_on.set()
        assert long.ticket.result(120)
        assert [ticket.result(60) for ticket in shorts]
    # A third of the time is what it took, 48 steps, and what it was behind: as much, and a round.
    assert ends[0] < 3 * (48 + 48) + 2 * (10 + 1) and len(shorts) > 9


# The end.


def test_closing_drops_also_those_that_start_again_after_a_failure(tree, scene, monkeypatch):
    image, masks = scene((61, 47), 2)
    see, entered, goes_on = tree.model.see, threading.Event(), threading.Event()

    def slow(images, *args, **options):
        if len(images) > 1:
            raise RuntimeError("boom")
        entered.set()
        assert goes_on.wait(30)
        return see(images, *args, **options)

    monkeypatch.setattr(tree.model, "see", slow)
    engine = Engine(tree, window=0.3)
    others = [scene((61, 47), 1, seed) for seed in range(2)]
    tickets = [engine.submit(RegionJob.build(*other), **LONG) for other in others]
    assert entered.wait(30)
    threading.Timer(0.2, goes_on.set).start()
    engine.close(drain=False, timeout=30)
    for ticket in tickets:
        with pytest.raises(CancelledError):
            ticket.result(5)
