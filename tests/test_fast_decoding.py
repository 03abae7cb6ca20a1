"""`fast=True`: what it stands for in each task, and what goes before it."""

from types import SimpleNamespace

import pytest
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.evaluation.held_out import resolved_options
from perceptiondlm.generation_options import OPTIONS, DiffusionOptions, merge_options

JOINT = {"region_layout": "released"}


@pytest.fixture(scope="module")
def joint(make):
    return make(seed=1, **JOINT)


@pytest.fixture
def caption(joint, scene):
    model, processor = joint
    image, masks = scene((61, 47), 3)
    return lambda **options: model.diffusion_generate(
        image, masks, processor=processor, **({"caption_length": 8} | options)
    )


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({}, {"threshold": 0.9, "prompt_refresh_interval": 0}),
        ({"factor": 1.0}, {"factor": 1.0, "prompt_refresh_interval": 0}),
        ({"prompt_refresh_interval": 2}, {"threshold": 0.9, "prompt_refresh_interval": 2}),
        ({"threshold": 0.1, "prompt_refresh_interval": 1}, {"threshold": 0.1}),
    ],
)
def test_captions_are_those_of_the_options_it_stands_for(caption, asked, meant):
    fast, written_out = caption(fast=True, **asked), caption(**meant)
    assert fast.token_ids == written_out.token_ids
    assert fast.num_forwards == written_out.num_forwards


def test_answers_keep_their_prompt_exact(joint, draw_image):
    model, processor = joint

    def answer(**options):
        given = {"prompts": "What?", "processor": processor, "max_new_tokens": 8}
        return model.diffusion_generate(draw_image(61, 47), **given, **options).token_ids

    assert answer(fast=True) == answer(threshold=0.9)


@pytest.mark.parametrize("task", ["captions", "answers", None])
def test_it_goes_before_the_checkpoints_rule_and_behind_the_calls(task):
    merged = merge_options({"factor": 1.0, "fast": False}, {"fast": True}, task)
    assert merged["threshold"] == 0.9 and merged.get("factor") is None
    assert merge_options({"fast": True}, {"factor": 2.0}, task).get("threshold") is None
    assert "threshold" not in merge_options({"fast": True}, {"fast": False}, task)
    assert ("prompt_refresh_interval" in merged) == (task == "captions")


@pytest.mark.parametrize(
    ("own", "asked", "meant"),
    [
        ({"fast": True, "threshold": 0.1}, {}, (0.1, 0)),
        ({"fast": True, "prompt_refresh_interval": 4}, {}, (0.9, 4)),
        ({"fast": True, "factor": 2.0}, {}, (None, 0)),
        ({"threshold": 0.1, "prompt_refresh_interval": 4}, {"fast": True}, (0.9, 0)),
        ({"fast": True}, {"threshold": 0.3}, (0.3, 0)),
        ({"fast": True, "threshold": 0.1}, {"fast": False}, (0.1, None)),
        ({"fast": True}, {"remasking": "random", "seed": 0}, (None, None)),
    ],
)
def test_a_captioner_and_its_calls_may_ask_for_it(joint, scene, monkeypatch, own, asked, meant):
    model, processor = joint
    passed, generate = [], model.diffusion_generate

    def listen(*args, **given):
        passed.append({name: given[name] for name in OPTIONS if name in given})
        return generate(*args, **given)

    monkeypatch.setattr(model, "diffusion_generate", listen)
    captioner = RegionCaptioner(model, processor, caption_length=4, **own)
    captioner(*scene((61, 47), 2), **asked)
    chosen = DiffusionOptions.build(model.decoding_defaults, passed[0], "captions")
    assert (chosen.threshold, chosen.prompt_refresh_interval) == meant


def test_a_fixed_schedule_by_name_goes_before_a_checkpoints_threshold():
    own = {"threshold": 0.9, "remask_below": 0.5}
    for ranked in ("random", "low_confidence"):
        chosen = DiffusionOptions.build(own, {"remasking": ranked}, "captions")
        assert chosen.threshold is chosen.remask_below is None
    both = {"remasking": "low_confidence", "threshold": 0.5}
    assert DiffusionOptions.build(own, both).threshold == 0.5


@pytest.mark.parametrize("task", ["captions", "answers"])
def test_a_fixed_schedule_by_name_goes_before_a_checkpoints_fast(task):
    chosen = DiffusionOptions.build({"fast": True}, {"remasking": "random"}, task)
    assert (chosen.fast, chosen.threshold, chosen.prompt_refresh_interval) == (False, None, None)
    with pytest.raises(ValueError, match="no remasking, got none of them and remasking 'random'"):
        DiffusionOptions.build({}, {"fast": True, "remasking": "random"}, task)


def test_the_options_in_force_are_recorded_as_captions_have_them():
    model = SimpleNamespace(decoding_defaults={"fast": True})
    found = resolved_options(model, {})
    assert (found["threshold"], found["prompt_refresh_interval"]) == (0.9, 0)


def test_a_checkpoint_may_prefer_it():
    chosen = DiffusionOptions.build({"fast": True}, {}, "captions")
    assert (chosen.threshold, chosen.prompt_refresh_interval) == (0.9, 0)


def test_without_what_it_stands_for_it_is_refused():
    with pytest.raises(ValueError, match="expected one of threshold, .* with fast, .* got none"):
        DiffusionOptions(fast=True)
    with pytest.raises(ValueError, match="expected fast as bool, got 'yes'"):
        DiffusionOptions(fast="yes")
