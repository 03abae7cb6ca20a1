"""What the server keeps of images that it has seen: answers stay the same, memory its bound."""

import itertools

import pytest
import torch

pytest.importorskip("fastapi", reason="the engine needs the package's apps extra")

from perceptiondlm.apps.captioning.captioner import RegionCaptioner  # noqa: E402
from perceptiondlm.apps.cli import main  # noqa: E402
from perceptiondlm.apps.serving.engine import Engine, JobFailed  # noqa: E402
from perceptiondlm.apps.serving.jobs import ChatJob, RegionJob  # noqa: E402
from perceptiondlm.apps.serving.seen_cache import (  # noqa: E402
    SeenCache,
    digest_of,
    separated,
)
from PIL import Image  # noqa: E402
from serving import counted  # noqa: E402

LAYOUTS = ["released", "independent"]
SHORT = {"caption_length": 4, "steps": 2}
ANSWER = {"max_new_tokens": 4, "steps": 2}


@pytest.fixture(params=LAYOUTS)
def captioner(request, make):
    return RegionCaptioner(*make(region_layout=request.param))


@pytest.fixture
def tree(make):
    return RegionCaptioner(*make(region_layout="independent"))


@pytest.fixture
def looked(monkeypatch):
    """A function: makes a model list how many images each of its runs of the vision path saw."""

    def watch(model) -> list[int]:
        runs = []
        see_features = model.see_features

        def counting(**tensors):
            runs.append(len(tensors["image_sizes"]))
            return see_features(**tensors)

        monkeypatch.setattr(model, "see_features", counting)
        return runs

    return watch


def run(engine: Engine, *jobs, **options) -> list:
    """Submits jobs together and returns their results."""
    tickets = [engine.submit(job, **options) for job in jobs]
    return [ticket.result(60).result for ticket in tickets]


def held(cache: SeenCache) -> int:
    """Counts the bytes of all tensors that a cache holds, each storage once."""
    tensors = [
        t for state, _ in cache._states.values() for group in state.groups for t in group.tensors()
    ]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_regions_seen_again_are_captioned_as_at_first_and_not_encoded(captioner, scene, looked):
    image, masks = scene((61, 47), 3)
    alone = captioner(image, masks, **SHORT).captions
    asked = captioner(image, masks, instruction="what?", **SHORT).captions
    with Engine(captioner, window=0.0) as engine:
        runs = looked(captioner.model)
        for _ in range(3):
            (found,) = run(engine, RegionJob.build(image, masks), **SHORT)
            assert found.captions == alone
        (found,) = run(engine, RegionJob.build(image, masks, "what?"), **SHORT)
        assert found.captions == asked and runs == [1]
        assert (counted(engine, "seen_misses"), counted(engine, "seen_hits")) == (1, 3)
        sample = engine.metrics.registry.get_sample_value("perceptiondlm_seen_bytes")
        assert sample == engine.seen.nbytes == held(engine.seen) > 0


def test_all_that_a_batch_lacks_is_seen_in_one_call(captioner, scene, looked):
    drawn = [scene((61, 47), count, seed) for seed, count in enumerate((2, 1, 3))]
    alone = [captioner(*one, **SHORT).captions for one in drawn]
    with Engine(captioner, window=0.3) as engine:
        run(engine, RegionJob.build(*drawn[0]), **SHORT)
        runs = looked(captioner.model)
        jobs = [RegionJob.build(*drawn[k]) for k in (1, 0, 2, 1)]
        found = run(engine, *jobs, **SHORT)
    assert [one.captions for one in found] == [alone[k] for k in (1, 0, 2, 1)]
    assert runs == [2]


def test_one_region_of_one_image_is_asked_as_alone(captioner, scene):
    image, masks = scene((61, 47), 1)
    with Engine(captioner, window=0.0) as engine:
        for instruction in (None, "what?"):
            expected = captioner(image, masks, instruction=instruction, **SHORT).captions
            for _ in range(2):
                (found,) = run(engine, RegionJob.build(image, masks, instruction), **SHORT)
                assert found.captions == expected


def test_questions_about_images_seen_before_are_answered_as_alone(captioner, draw_image, looked):
    images = [draw_image(60, 40, seed) for seed in range(2)]
    questions = ["what is it?", "which color is it?"]
    pairs = list(itertools.product(images, questions))
    alone = [captioner.ask(image, question, **ANSWER).answers for image, question in pairs]
    with Engine(captioner, window=0.3) as engine:
        runs = looked(captioner.model)
        for _ in range(2):
            found = run(engine, *(ChatJob.ask(*pair) for pair in pairs), **ANSWER)
            assert [one.answers for one in found] == alone
    assert runs == [2] and counted(engine, "seen_hits") == 6


def test_conversations_with_and_without_images_are_answered_as_their_inputs_are(
    captioner, draw_image
):
    model, processor = captioner.model, captioner.processor
    images = (draw_image(60, 40), draw_image(40, 50, 1))
    image = {"type": "image"}
    talks = [
        ([{"role": "user", "content": "hello"}], ()),
        ([{"role": "user", "content": [image, image, {"type": "text", "text": "?"}]}], images),
        (
            [
                {"role": "user", "content": [image, {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": "a cat"},
                {"role": "user", "content": [image, {"type": "text", "text": "and this?"}]},
            ],
            images[::-1],
        ),
    ]
    expected = []
    for messages, own in talks:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(list(own) or None, text=[text], max_new_tokens=4)
        out = model.diffusion_generate(inputs=inputs, processor=processor, steps=2)
        expected.append(out.texts[0])
    with Engine(captioner, window=0.2) as engine:
        for _ in range(2):
            found = run(engine, *(ChatJob(*talk) for talk in talks), **ANSWER)
            assert [one.answers for one in found] == expected
        assert (counted(engine, "seen_misses"), counted(engine, "seen_hits")) == (2, 2)


def test_more_groups_than_a_batch_has_rows_are_captioned_without_being_kept(tree, scene):
    image, masks = scene((61, 47), 4)
    many = (masks * 9)[:33]  # three region groups
    alone = tree(image, many, **SHORT).captions
    with Engine(tree, max_batch=2) as engine:
        (found,) = run(engine, RegionJob.build(image, many), **SHORT)
        assert found.captions == alone and len(engine.seen) == 0


@torch.no_grad()
def test_memory_stays_within_its_bound_over_a_thousand_images(tree):
    one, mask = Image.new("RGB", (8, 8)), Image.new("L", (8, 8), 255)
    model, processor = tree.model, tree.processor
    size = model.see(one, [mask], processor=processor).nbytes
    kept_sizes = []
    cache = SeenCache(5 * size)
    for number in range(0, 1000, 20):
        colors = [(k % 256, k // 256, 0) for k in range(number, number + 20)]
        images = [Image.new("RGB", (8, 8), color) for color in colors]

        def see(places, images=images):
            own = [images[k] for k in places]
            return model.see(own, [[mask]] * len(own), processor=processor)

        with cache.seen([digest_of([image], [mask]) for image in images], see) as seen:
            if number % 100 == 0:  # a trunk each, by which they grow
                model.diffusion_generate(seen, processor=processor, caption_length=1)
        assert cache.nbytes == held(cache) <= cache.max_bytes
        kept_sizes.append(len(cache))
    assert max(kept_sizes) == 5


def test_what_grows_beyond_the_bound_is_kept_without_its_trunks_or_not_at_all(tree, scene):
    image, masks = scene((61, 47), 2)
    job = RegionJob.build(image, masks)
    plain = tree.model.see(image, masks, processor=tree.processor).nbytes
    for bound, count in ((plain, 1), (plain - 1, 0)):
        with Engine(tree, window=0.0, seen_bytes=bound) as engine:
            first, again = (run(engine, job, **SHORT)[0].captions for _ in range(2))
            assert first == again == tree(image, masks, **SHORT).captions
            assert (len(engine.seen), engine.seen.nbytes) == (count, plain * count)
            assert counted(engine, "seen_hits") == count


def test_the_state_used_longest_ago_goes_first(tree, draw_image):
    images = {name: draw_image(16, 16, seed) for seed, name in enumerate("abc")}
    see = tree.model.see
    cache = SeenCache(2 * see(images["a"], processor=tree.processor).nbytes)
    missed = []
    for name in "abacab":

        def seen_now(places, name=name):
            missed.append(name)
            return see([images[name]], processor=tree.processor)

        with cache.seen([name.encode()], seen_now):
            pass
    assert missed == ["a", "b", "c", "b"]


def test_parts_of_what_was_seen_together_hold_no_memory_of_each_other(captioner, scene):
    images, masks = zip(*(scene((61, 47), count, count) for count in (2, 1)), strict=True)
    parts = separated(captioner.model.see(images, masks, processor=captioner.processor))
    tensors = [t for part in parts for group in part.groups for t in group.tensors()]
    assert [part.counts for part in parts] == [[2], [1]]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


def test_the_digest_tells_everything_apart_that_is_seen_otherwise(scene):
    image, masks = scene((20, 30), 2)
    other, _ = scene((30, 20), 2, 1)
    turned = Image.frombytes("RGB", (30, 20), image.tobytes())  # the same bytes
    masks = [Image.fromarray(mask).convert("L") for mask in masks]
    asked = [
        ([image], masks),
        ([image], masks[::-1]),
        ([image], masks[:1]),
        ([image], ()),
        ([image, other], ()),
        ([other, image], ()),
        ([turned], ()),
    ]
    assert len({digest_of(*one) for one in asked}) == len(asked)
    assert digest_of([image.copy()], masks) == digest_of([image], masks)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_job_that_lacks_the_memory_of_what_is_kept_gets_it(tree, scene, monkeypatch, error):
    drawn = [scene((61, 47), 2, seed) for seed in range(2)]
    alone = tree(*drawn[1], **SHORT).captions
    generate = tree.model.diffusion_steps
    with Engine(tree, window=0.0) as engine:
        run(engine, RegionJob.build(*drawn[0]), **SHORT)

        def short_of_memory(*args, **options):
            if len(engine.seen):
                raise error("no room")
            return generate(*args, **options)

        monkeypatch.setattr(tree.model, "diffusion_steps", short_of_memory)
        assert run(engine, RegionJob.build(*drawn[1]), **SHORT)[0].captions == alone
        assert engine.seen.nbytes == 0

        def never(*args, **options):
            raise error("no room at all")

        monkeypatch.setattr(tree.model, "diffusion_steps", never)
        with pytest.raises(JobFailed, match="no room at all"):
            run(engine, RegionJob.build(*drawn[1]), **SHORT)


def test_nothing_is_kept_where_the_bound_is_nothing(tree, scene):
    image, masks = scene((61, 47), 2)
    with Engine(tree, window=0.0, seen_bytes=0) as engine:
        (found,) = run(engine, RegionJob.build(image, masks), **SHORT)
        assert found.captions == tree(image, masks, **SHORT).captions
        assert engine.seen is None and counted(engine, "seen_misses") == 0
        assert engine.metrics.registry.get_sample_value("perceptiondlm_seen_bytes") == 0


def test_a_bound_below_nothing_is_refused(tree, capsys):
    with pytest.raises(ValueError, match="seen_bytes of at least 0, got -1"):
        Engine(tree, seen_bytes=-1)
    assert main(["serve", "--seen-cache-mb", "-1"]) == 2
    assert "seen_bytes of at least 0" in capsys.readouterr().err
