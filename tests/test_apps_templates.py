"""Questions for regions, templates and scores, from Python's captioner and the command line."""

import json

import pytest
from perceptiondlm.apps.captioning.captioner import MASKED, RegionCaptioner
from perceptiondlm.apps.cli import main
from shapes import ARGUMENTS, shapes_captioner

LENGTHS = {"caption_length": 4, "max_new_tokens": 4}


@pytest.fixture
def tree(make):
    """A captioner whose own lengths are no business of templates."""
    return RegionCaptioner(*make(region_layout="independent"), **LENGTHS)


def test_each_region_has_its_own_question_and_score(tree, scene):
    image, masks = scene((61, 47), 3)
    asked = ["what color?", None, "is it behind <region 0>?"]
    for instruction in (None, "name it"):
        out = tree.model.diffusion_generate(
            image,
            masks,
            [text or instruction for text in asked],
            processor=tree.processor,
            caption_length=4,
        )
        result = tree(image, masks, questions=asked, instruction=instruction)
        assert result.captions == out.texts[0]
        assert [region.score for region in result.regions] == pytest.approx(out.scores[0])
        written = json.loads(json.dumps(result.to_dict()))["regions"]
        assert [one["score"] for one in written] == [round(score, 4) for score in out.scores[0]]


def test_a_template_fills_captions_and_answers(tree, scene):
    image, masks = scene((61, 47), 2)
    template = {"color": ["red", "blue"], "rest": "{1-2}"}
    result = tree(image, masks, template=template)
    assert [json.loads(caption) for caption in result.captions] == [
        r.fields for r in result.regions
    ]
    each = tree(image, masks, template=["{2}", template])
    assert each.regions[1].fields == result.regions[1].fields
    assert each.regions[0].fields == [each.captions[0]]

    answers = tree.ask(image, ["is it?", "what?"], template=["{yes|no}", "a {2}"])
    assert answers.fields[0] == [answers.answers[0]] and answers.answers[1].startswith("a ")
    assert [entry["fields"] for entry in answers.to_dict()["answers"]] == answers.fields
    plain = tree.ask(image, "is it?")
    assert plain.fields is None and "fields" not in plain.to_dict()["answers"][0]


def test_a_stream_shows_fixed_text_early_and_several_lengths_at_the_end(tree, scene):
    image, masks = scene((61, 47), 1)
    *steps, last = tree.stream(image, masks, template="it is {2}")
    assert steps[0].texts[0].startswith("it is") and MASKED in steps[0].texts[0]
    assert last.texts == last.result.captions
    *steps, last = tree.stream(image, masks, template="it is {1-2}")
    assert all(step.texts == [MASKED] for step in steps) and last.texts[0].startswith("it is")


WRONG = [
    ({"questions": "what?"}, "a list of questions, one for each region, got a text"),
    ({"questions": ["a"]}, "expected a prompt for each of 2 masks, got 1"),
    ({"questions": ["a", 3]}, "expected texts or None"),
    ({"template": ["{1}"]}, "a template for each of 2 regions, got 1"),
    ({"template": "none"}, "expected a template with a field"),
    ({"template": "{1}", "caption_length": 3}, "no caption_length with a template"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_does_not_fit_is_refused(tree, scene, options, message):
    with pytest.raises(ValueError, match=message):
        tree(*scene((61, 47), 2), **options)


def test_the_command_line_writes_scores_into_its_json(vectors, tmp_path):
    image = str(vectors / "region_0.png")
    command, captioner = ["caption", image, *ARGUMENTS], shapes_captioner()
    box = {"box": [10, 10, 60, 40]}
    (region,) = captioner(image, [box]).regions
    for name in ("a.json", "a.jsonl", "a.coco.json"):
        file = tmp_path / name
        assert main([*command, "--box", "10,10,60,40", "--captions", str(file)]) == 0
        content = json.loads(file.read_text())
        if name == "a.coco.json":
            (found,) = content["annotations"]
        else:
            (found,) = (content[0] if isinstance(content, list) else content)["regions"]
        assert found["score"] == pytest.approx(region.score, abs=2e-4)
    file = tmp_path / "b.json"
    assert main([*command, "--question", "what?", "--captions", str(file)]) == 0
    (answer,) = json.loads(file.read_text())[0]["answers"]
    assert answer["score"] == pytest.approx(captioner.ask(image, "what?").scores[0], abs=2e-4)
