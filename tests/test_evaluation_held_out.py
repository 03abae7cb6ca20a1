"""Measuring on held-out scenes: captions and answers counted by hand, through the commands."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from perceptiondlm.apps.cli import main
from perceptiondlm.evaluation import latency, sweep, synthetic
from perceptiondlm.evaluation.files import read_json
from perceptiondlm.evaluation.held_out import (
    describe_scenes,
    held_out_scenes,
    measurements,
    resolved_options,
)
from perceptiondlm.evaluation.sweep import SweepRule
from perceptiondlm.generation_options import DiffusionOptions, merge_options
from perceptiondlm.generation_rules import ACCEPT_RULES
from perceptiondlm.scenes.shapes import render_scene

SEED, COUNT = 40, 4
LENGTH, END = 6, 7


@functools.cache
def known_scenes() -> dict:
    scenes = [render_scene(seed, "heldout") for seed in range(100)]
    return {scene.image.tobytes(): scene for scene in scenes}


class SeeingModel:
    """Knows every scene by heart, and says of each region that it is red.

    A caption has 4 tokens before the end of turn; a group takes as many forward passes as steps.
    """

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(eot_token_id=END, eos_token_id=None, num_region_prompts=3)
    decoding_defaults = {}

    def __init__(self):
        self.calls = []

    def named_parameters(self):
        return [("weight", torch.arange(3.0))]

    def diffusion_generate(self, *, images, processor, masks=None, prompts=None, **options):
        DiffusionOptions(**options)
        if not isinstance(images, list):
            images, masks = [images], [masks]
        self.calls.append({"images": len(images), "masks": masks, **options})
        if masks is None:
            texts = [
                [answer_of(self.scene(image), prompt)]
                for (image,), prompt in zip(images, prompts, strict=True)
            ]
        else:
            texts = [
                [f"{caption_of(self.scene(image), mask)} red" for mask in own]
                for image, own in zip(images, masks, strict=True)
            ]
        ids = [[[1] * 4 + [END] * (LENGTH - 4) for _ in row] for row in texts]
        passes = sum(-(-len(row) // 3) for row in texts)
        steps = options.get("steps") or LENGTH
        return SimpleNamespace(texts=texts, token_ids=ids, num_forwards=passes * steps)

    def scene(self, image):
        return known_scenes()[image.tobytes()]


def caption_of(scene, mask) -> str:
    return next(o.caption for o in scene.objects if np.array_equal(o.mask, mask))


def answer_of(scene, question: str) -> str:
    return next(q.answer for q in scene.questions if q.question == question)


@pytest.fixture
def model(monkeypatch):
    model = SeeingModel()
    for module in (synthetic, sweep, latency):
        monkeypatch.setattr(module, "load_checkpoint", lambda args: (model, "processor"))
    return model


@pytest.fixture
def scenes():
    return held_out_scenes(SEED, COUNT, progress=False)


def describe(model, scenes, **options):
    return describe_scenes(model, "processor", scenes, progress=False, **options)


def test_every_region_and_question_gets_its_own_text(model, scenes):
    said = describe(model, scenes, batch_size=3)
    for scene, captions, answers in zip(scenes, said.captions, said.answers, strict=True):
        assert captions == [f"{thing.caption} red" for thing in scene.objects]
        assert answers == [question.answer for question in scene.questions]


def test_measurements_are_the_counts_by_hand(model, scenes):
    measured = measurements(scenes, describe(model, scenes))
    colours = [thing.attributes["colour"] for scene in scenes for thing in scene.objects]
    red = colours.count("red") / len(colours)
    passes = sum(-(-len(scene.objects) // 3) for scene in scenes)
    assert measured["regions"] == len(colours)
    assert measured["per_attribute"]["colour"] == measured["exact_caption_rate"] == red
    assert measured["attribute_accuracy"] == pytest.approx((4 + red) / 5)
    assert measured["question_accuracy"] == 1
    assert measured["passes"] == passes and measured["forwards_per_pass"] == LENGTH
    assert measured["tokens_per_forward"] == pytest.approx(len(colours) / passes)
    assert measured["tokens_per_forward_effective"] == pytest.approx(4 / 6 * len(colours) / passes)


def test_regions_can_go_one_at_a_time(model, scenes):
    together = describe(model, scenes)
    model.calls.clear()
    alone = describe(model, scenes, regions_per_pass=1)
    assert together.captions == alone.captions
    assert alone.num_groups == sum(len(scene.objects) for scene in scenes)
    assert {len(own) for call in model.calls for own in call["masks"] or []} == {1}


def test_an_answer_takes_no_more_steps_than_positions(model, scenes):
    describe(model, scenes[:1], options={"steps": 5, "max_new_tokens": 3})
    assert [call["steps"] for call in model.calls] == [5, 3]


def test_sizes_that_make_no_sense_are_refused(model, scenes):
    for name in ("batch_size", "regions_per_pass"):
        with pytest.raises(ValueError, match=f"{name} of 1 or more, got -1"):
            describe(model, scenes, **{name: -1})
    with pytest.raises(ValueError, match="scenes of 1 or more, got 0"):
        held_out_scenes(0, 0)


def test_a_real_model_captions_scenes_of_mixed_sizes(make):
    model, processor = make(region_layout="independent", roi_convention="aligned")
    scenes = held_out_scenes(SEED, 3, progress=False)
    assert len({scene.image.size for scene in scenes}) > 1
    options = {"caption_length": 4, "max_new_tokens": 2, "threshold": 0.9}
    said = describe_scenes(model, processor, scenes, options=options, progress=False)
    assert list(map(len, said.captions)) == [len(scene.objects) for scene in scenes]
    assert list(map(len, said.answers)) == [len(scene.questions) for scene in scenes]
    alone = describe_scenes(model, processor, scenes, batch_size=1, options=options, progress=False)
    assert alone.captions == said.captions and alone.answers == said.answers
    assert alone.captioning.forwards == said.captioning.forwards


def test_the_command_writes_what_a_reader_looks_for(model, tmp_path):
    report, texts = tmp_path / "report.json", tmp_path / "texts.json"
    given = ["--model", "some/model", "--subfolder", "tiny", "--scenes", "4", "--seed", str(SEED)]
    decoding = ["--steps", "5", "--factor", "0.5"]
    files = ["--output", str(report), "--texts", str(texts)]
    assert main(["evaluate", "synthetic", *given, *decoding, *files]) == 0
    found = read_json(report)
    options = found["decoding_options"]
    assert (options["steps"], options["factor"]) == (5, 0.5)
    assert found["model"] == "some/model" and found["subfolder"] == "tiny"
    assert found["seed"] == SEED and found["scenes"] == 4 and found["split"] == "heldout"
    assert found["versions"]["torch"] == torch.__version__ and "git_revision" in found
    assert found["regions"] == sum(len(scene.objects) for scene in held_out_scenes(SEED, 4))
    for share in ("attribute_accuracy", "interference_rate", "question_accuracy"):
        assert 0 <= found[share] <= 1
    first = read_json(texts)[0]
    assert first["seed"] == SEED
    assert all(c["caption"] == f"{c['truth']} red" for c in first["captions"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "x"], "expected --output"),
        (["--model", "x", "--output", "r", "--steps", "0"], "steps to be an integer"),
        (["--model", "x", "--output", "r", "--option", "stepz=1"], "got ['stepz']"),
    ],
)
def test_mistakes_are_one_line(model, capsys, given, message):
    assert main(["evaluate", "synthetic", *given]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    given = ["--model", str(tmp_path / "none"), "--output", str(tmp_path / "r.json")]
    assert main(["evaluate", "synthetic", *given]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_the_model_must_be_named(capsys):
    assert main(["evaluate", "synthetic", "--output", "r.json"]) == 2
    assert "expected --model PATH" in capsys.readouterr().err


def test_a_sweep_has_a_row_for_each_rule_and_budget(model, tmp_path):
    output = tmp_path / "sweep.json"
    given = ["--model", "m", "--scenes", "2", "--seed", str(SEED), "--output", str(output)]
    rules = ["--rules", "fixed,threshold:0.7+0.2,factor", "--steps", "3,full"]
    assert main(["evaluate", "sweep", *given, *rules]) == 0
    rows = read_json(output)["rows"]
    asked = [(row["rule"], row["value"], row["verify"], row["steps"]) for row in rows]
    assert asked == [
        (rule, value, verify, steps)
        for rule, value, verify in (
            ("fixed", None, None),
            ("threshold", 0.7, 0.2),
            ("factor", 1.0, None),
        )
        for steps in (3, 32)
    ]
    assert [row["forwards_per_pass"] for row in rows] == [3, LENGTH] * 3
    table = output.with_suffix(".md").read_text().splitlines()
    assert len(table) == 2 + len(rows) and table[0].startswith("| rule | value | verify | steps |")
    options = [c for c in model.calls if c["masks"] is not None]
    assert options[2]["threshold"] == 0.7


@pytest.mark.parametrize("own", [{"threshold": 0.9, "remask_below": 0.5}, {"fast": True}])
def test_a_fixed_row_is_fixed_whatever_the_checkpoint_prefers(own):
    chosen = merge_options({"caption_length": 11} | own, SweepRule.parse("fixed").options(4))
    options = DiffusionOptions(**chosen)
    assert (options.steps, options.caption_length) == (4, 11)
    assert [getattr(options, name) for name in (*ACCEPT_RULES, "remask_below")] == [None] * 4


@pytest.mark.parametrize("rules", ["quick", "fixed:3", "fixed+0.3", "threshold:high", "factor:-1"])
def test_rules_that_are_none_are_refused(rules, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "sweep", "--model", "m", "--rules", rules])
    assert "expected" in capsys.readouterr().err


def test_latency_rows_are_what_figures_take(model, tmp_path):
    output = tmp_path / "latency.json"
    given = ["--model", "m", "--regions", "1", "3", "--pictures", "1", "--output", str(output)]
    assert main(["evaluate", "latency", *given]) == 0
    rows = read_json(output)["rows"]
    assert [(row["label"], row["regions"]) for row in rows] == [
        ("all regions together", 1),
        ("all regions together", 3),
        ("one region at a time", 1),
        ("one region at a time", 3),
    ]
    assert [len(call["masks"][0]) for call in model.calls] == [1, 1, 3, 1, 1, 1, 1]


def test_the_options_in_force_are_those_over_the_checkpoints():
    model = SimpleNamespace(decoding_defaults={"caption_length": 11})
    found = resolved_options(model, {"temperature": 0.5})
    assert found["caption_length"] == found["steps"] == 11 and found["temperature"] == 0.5
