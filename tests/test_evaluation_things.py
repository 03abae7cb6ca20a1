"""Measuring on scenes of things: counted by hand, and through the commands."""

import dataclasses

import pytest
from perceptiondlm.apps.cli import main
from perceptiondlm.evaluation import confidence, latency, sweep, synthetic
from perceptiondlm.evaluation.asking import Asker
from perceptiondlm.evaluation.files import read_json
from perceptiondlm.evaluation.held_out import describe_scenes, held_out_scenes, measurements
from perceptiondlm.evaluation.held_things import (
    AskedThings,
    SeenThing,
    is_overlapping,
    render_things,
)
from perceptiondlm.evaluation.report import _synthetic
from perceptiondlm.evaluation.scene_kinds import THINGS
from perceptiondlm.evaluation.thing_judge import score_labels, score_region_answers
from perceptiondlm.evaluation.thing_measures import COUNTS, PARTS, ThingMeasures
from perceptiondlm.scenes import things
from perceptiondlm.scenes.thing_facts import ThingFacts
from perceptiondlm.scenes.thing_language import LABEL_INSTRUCTION
from perceptiondlm.scenes.thing_questions import RegionQuestion
from played_things import KnowingModel, kind_of, played_sources

CAT = ThingFacts("cat", "small", "top left", "whole", None, None, None, (0.2, 0.2), 0.02)
BICYCLE = ThingFacts("bicycle", "large", "left", "partly hidden", 2, None, None, (0.2, 0.5), 0.2)
UMBRELLA = ThingFacts("umbrella", "large", "right", "whole", None, None, "right", (0.8, 0.5), 0.1)
LEMON = ThingFacts("lemon", "small", "right", "whole", None, 2, None, (0.8, 0.5), 0.01)
ALONE = dataclasses.replace(CAT, center=(0.1, 0.9), position="bottom left", concept="dog")
FACTS = [CAT, BICYCLE, UMBRELLA, LEMON, ALONE]
SEED = 40


def scene_of(facts, clear) -> AskedThings:
    """Makes a scene of facts alone; `clear` has (diameter, share that is hidden) of each."""
    objects = [
        SeenThing(None, fact, "", diameter, hidden, [])
        for fact, (diameter, hidden) in zip(facts, clear, strict=True)
    ]
    return AskedThings(None, objects, [])


@pytest.fixture(scope="module")
def sources():
    return played_sources()


@pytest.fixture
def model(monkeypatch, sources):
    render = things.render_thing_scene
    monkeypatch.setattr(things, "default_sources", lambda: sources)
    model = KnowingModel()
    model.render = render
    monkeypatch.setattr(things, "render_thing_scene", model.rendered)
    for module in (synthetic, sweep, latency, confidence):
        monkeypatch.setattr(module, "load_checkpoint", lambda args: (model, "processor"))
    return model


@pytest.fixture
def scenes(model):
    return held_out_scenes(SEED, 4, THINGS, progress=False)


def asker(model, **options) -> Asker:
    return Asker(model, "processor", progress=False, **options)


def measured(model, scenes, *parts: str, **options) -> dict:
    """Measures some of the parts, with options of the asker."""
    skip = tuple(part for part in PARTS if part not in parts)
    more = ThingMeasures(skip=skip, count_scenes=2)
    return more.measure(asker(model, **options), scenes, SEED)[0]


# Judging, by hand.


def test_names_count_as_clear_from_24_pixels_on_and_up_to_half_hidden():
    clear = [(24, 0.0), (60, 0.5), (60, 0.51), (23, 0.0), (30, 0.0)]
    captions = ["a cat", "a dog", "an umbrella", "a lemon", "a dog"]
    scores = THINGS.score([scene_of(FACTS, clear)], [captions])
    assert scores["clear_regions"] == 3
    assert scores["clear_name_accuracy"] == pytest.approx(2 / 3)
    assert scores["name_accuracy"] == pytest.approx(4 / 5)
    none = THINGS.score([scene_of([CAT], [(10, 0.0)])], [["a cat"]])
    assert none["clear_name_accuracy"] is None and none["clear_regions"] == 0


def test_regions_that_overlap_are_counted_apart_from_the_others():
    # the umbrella hides the bicycle and carries the lemon
    assert [is_overlapping(FACTS, k) for k in range(5)] == [False, True, True, True, False]
    scores = THINGS.score([scene_of(FACTS, [(60, 0.0)] * 5)], [["a cat", "a bicycle", "a dog"]])
    assert (scores["overlapping"]["regions"], scores["apart"]["regions"]) == (3, 2)
    assert scores["overlapping"]["name_accuracy"] == pytest.approx(1 / 3)
    assert scores["apart"]["name_accuracy"] == 1 / 2
    assert (scores["overlapping"]["missing"], scores["apart"]["missing"]) == (1, 1)


def test_a_missing_label_or_answer_is_wrong():
    scores = score_labels([[CAT, BICYCLE, UMBRELLA]], [["cat", "bike"]])
    assert scores == {"label_accuracy": pytest.approx(2 / 3), "missing_labels": 1}
    yes = RegionQuestion("Is it alive?", "Yes, it is.", "alive", frozenset(["yes it is"]))
    side = RegionQuestion("Which side?", "On the left.", "side", frozenset(["on the left"]))
    scores = score_region_answers([[yes, side], [yes]], [["yes it is"], [None]])
    assert scores["region_question_accuracy"] == pytest.approx(1 / 3)
    assert scores["region_questions"] == 3 and scores["missing_region_answers"] == 2
    assert scores["region_questions_per_kind"] == {
        "alive": {"accuracy": 0.5, "questions": 2},
        "side": {"accuracy": 0, "questions": 1},
    }


@pytest.mark.parametrize("texts", [[], [["a"] * 4]])
def test_texts_that_do_not_fit_the_regions_are_refused(texts):
    with pytest.raises(ValueError, match="expected (labels of 1 scenes|at most 3 labels)"):
        score_labels([[CAT, BICYCLE, UMBRELLA]], texts)
    with pytest.raises(ValueError, match="at least one region"):
        score_labels([], [])
    with pytest.raises(ValueError, match="at least one question"):
        score_region_answers([], [])


# Asking.


def test_whoever_knows_everything_is_right_in_everything(model, scenes):
    said = describe_scenes(model, "processor", scenes, progress=False)
    found = measurements(scenes, said, THINGS) | measured(model, scenes, *PARTS)
    regions = sum(len(scene.objects) for scene in scenes)
    assert found["regions"] == found["region_questions"] == regions
    names = ("name_accuracy", "clear_name_accuracy", "relation_accuracy", "grammatical")
    names += ("label_accuracy", "region_question_accuracy", "unseen_style_name_accuracy")
    names += ("unseen_style_clear_name_accuracy", "unseen_background_name_accuracy")
    assert [found[name] for name in names] == [1] * len(names)
    assert found["mixture_rate"] == found["missing"] == 0
    per_kind = found["region_questions_per_kind"]
    assert sum(own["questions"] for own in per_kind.values()) == regions and len(per_kind) > 3


def test_what_is_not_known_is_wrong_where_it_stands(model, scenes):
    seen = [thing for scene in model.scenes.values() for thing in scene.things]
    model.knows = lambda thing: thing.facts.size != "small"
    share = sum(map(model.knows, seen)) / len(seen)
    assert 0 < share < 1
    found = measured(model, scenes, "labels", "region_questions")
    assert found["label_accuracy"] == found["region_question_accuracy"] == pytest.approx(share)
    assert (
        found["missing_labels"] == found["missing_region_answers"] == round((1 - share) * len(seen))
    )


def test_labels_are_counted_apart_where_boxes_tell_no_regions_apart(model, scenes):
    found = measured(model, scenes, "labels")
    assert found["overlapping_label_accuracy"] == found["apart_label_accuracy"] == 1
    # Of what others hide in part it knows nothing, which tells on overlapping things alone.
    model.knows = lambda thing: thing.facts.hidden == "whole"
    found = measured(model, scenes, "labels")
    assert found["apart_label_accuracy"] == 1 > found["overlapping_label_accuracy"]


def test_an_unseen_style_and_an_unseen_background_are_told_apart(model, scenes):
    model.knows = lambda thing: thing.style != "openmoji"
    found = measured(model, scenes, "unseen_style", "unseen_background")
    assert found["unseen_style_name_accuracy"] == found["unseen_style"]["grammatical"] == 0
    assert found["unseen_background_name_accuracy"] == 1
    assert found["unseen_style"]["missing"] == found["unseen_style"]["regions"] > 0


def test_names_are_counted_by_the_number_of_things(model, scenes):
    found = measured(model, scenes, "counts")
    assert set(found) == {"names_by_count"}
    regions = {int(count): own["regions"] for count, own in found["names_by_count"].items()}
    assert regions == {count: 2 * count for count in COUNTS}
    assert all(own["name_accuracy"] == 1 for own in found["names_by_count"].values())


@pytest.mark.parametrize(
    "layout, size, regions_per_pass",
    [("independent", 3, None), ("independent", 8, 2), ("released", 3, None)],
)
def test_questions_name_no_region_of_another_group(model, layout, size, regions_per_pass):
    model.config.region_layout, model.config.num_region_prompts = layout, size
    more = held_out_scenes(SEED, 24, THINGS, progress=False)
    found = measured(model, more, "region_questions", regions_per_pass=regions_per_pass)
    assert found["region_question_accuracy"] == 1
    most = 1 if layout == "released" else regions_per_pass or size
    groups = [own for call in model.calls for own in call["masks"]]
    assert max(map(len, groups)) == most
    prompts = [own for call in model.calls for own in call["prompts"]]
    named = [kind_of(text)[1] for own in prompts for text in own if "<region" in text]
    assert all(number < most for number in named) and bool(named) == (most > 1)


def test_what_a_region_is_asked_depends_on_the_seed_alone(model, scenes):
    model.config.num_region_prompts = 8
    kept = []
    for order in (scenes, scenes[::-1]):
        model.calls.clear()
        measured(model, order, "region_questions")
        kept.append([own for call in model.calls for own in call["prompts"]])
    assert kept[0] == kept[1][::-1]
    first = [[thing.questions[0].question for thing in scene.objects] for scene in scenes]
    assert kept[0] == first


def test_labels_and_answers_have_lengths_and_steps_of_their_own(model, scenes):
    more = ThingMeasures(label_length=5, answer_length=9, skip=("unseen_style", *PARTS[3:]))
    options = {"caption_length": 20, "steps": 7, "max_new_tokens": 4}
    more.measure(asker(model, options=options), scenes, SEED)
    asked = {call["prompts"][0] == LABEL_INSTRUCTION: call for call in model.calls}
    assert (asked[True]["caption_length"], asked[True]["steps"]) == (5, 5)
    assert (asked[False]["caption_length"], asked[False]["steps"]) == (9, 7)
    assert all("max_new_tokens" not in call for call in asked.values())


@pytest.mark.parametrize("layout", ["independent", "released"])
def test_a_real_model_says_something_of_everything(make, model, scenes, layout):
    real, processor = make(num_region_prompts=4, roi_convention="aligned", region_layout=layout)
    more = ThingMeasures(unseen_scenes=1, count_scenes=1, label_length=2, answer_length=2)
    asked = Asker(real, processor, options={"caption_length": 2, "steps": 1}, progress=False)
    found, texts = more.measure(asked, scenes[:2], SEED)
    assert found["names_by_count"]["24"] == {"name_accuracy": 0, "regions": 24}
    for scene, own in zip(scenes[:2], texts, strict=True):
        assert len(own["labels"]) == len(own["region_answers"]) == len(scene.objects)


# The commands.


def command(step: str, tmp_path, *options: str) -> dict:
    output = tmp_path / "report.json"
    given = ["--model", "m", "--scene-kind", "things", "--output", str(output)]
    assert main(["evaluate", step, *given, *options]) == 0
    return read_json(output)


def test_the_command_writes_what_a_reader_of_things_looks_for(model, tmp_path):
    texts = tmp_path / "texts.json"
    sizes = ("--scenes", "2", "--unseen-scenes", "1", "--count-scenes", "1", "--seed", "3")
    lengths = ("--caption-length", "30", "--label-length", "4", "--steps", "4")
    found = command("synthetic", tmp_path, *sizes, *lengths, "--texts", str(texts))
    names = "name_accuracy relation_accuracy grammatical mixture_rate unseen_style_name_accuracy"
    names += " clear_name_accuracy unseen_background_name_accuracy names_by_count label_accuracy"
    names += " region_question_accuracy region_questions_per_kind overlapping apart"
    assert set(names.split()) <= set(found)
    assert found["scene_kind"] == "things" and found["judge"].startswith("things-grammar")
    assert found["decoding_options"]["caption_length"] == 30
    assert found["more"]["label_length"] == 4 and found["more"]["answer_length"] == 18
    first = read_json(texts)[0]
    assert set(first) == {"seed", "captions", "answers", "labels", "region_answers"}
    assert all(one["truth"] == one["label"] for one in first["labels"])


def test_a_report_takes_measurements_of_things(model, tmp_path):
    found = command("synthetic", tmp_path, "--scenes", "1", "--skip", "counts,unseen_style")
    text = _synthetic(found)
    for title in ("names", "relations", "grammatical captions", "labels", "size"):
        assert f"| {title} | 100.00 |" in text
    assert "unseen drawing style" not in text and "another region" not in text


def test_parts_can_be_left_out(model, tmp_path):
    found = command("synthetic", tmp_path, "--scenes", "1", "--skip", ",".join(PARTS))
    assert "name_accuracy" in found and "label_accuracy" not in found
    assert not {"names_by_count", "unseen_style_name_accuracy"} & set(found)
    assert {call["caption_length"] for call in model.calls if "caption_length" in call} == set()


@pytest.mark.parametrize(
    "given, message",
    [
        (("--label-length", "4"), "expected --label-length with --scene-kind things alone"),
        (("--skip", "labels", "--seed", "1"), "expected --skip with --scene-kind things alone"),
    ],
)
def test_options_of_things_are_refused_for_shapes(model, capsys, given, message):
    assert main(["evaluate", "synthetic", "--model", "m", "--output", "r.json", *given]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("given", [("--skip", "captions"), ("--count-scenes", "0")])
def test_measures_that_make_no_sense_are_usage_errors(capsys, given):
    with pytest.raises(SystemExit):
        main(["evaluate", "synthetic", "--scene-kind", "things", *given])
    assert "expected" in capsys.readouterr().err


def test_a_sweep_of_things_shows_names_sentences_and_mixtures(model, tmp_path):
    found = command(
        "sweep",
        tmp_path,
        "--scenes",
        "2",
        "--rules",
        "fixed",
        "--steps",
        "1,full",
        "--caption-length",
        "30",
    )
    assert [row["steps"] for row in found["rows"]] == [1, 30]
    assert found["scene_kind"] == "things" and found["options"] == {"caption_length": 30}
    (header, _, first, _) = (tmp_path / "report.md").read_text().splitlines()
    titles = [cell.strip() for cell in header.strip("|").split("|")]
    cells = dict(zip(titles, (c.strip() for c in first.strip("|").split("|")), strict=True))
    assert cells["name accuracy %"] == cells["relation accuracy %"] == "100.00"
    assert cells["grammatical %"] == "100.00" and cells["mixture rate %"] == "0.00"
    assert cells["forwards per pass"] == "1.00" and "interference rate %" not in titles


def test_latency_takes_as_many_things_as_are_asked_for(model, tmp_path):
    found = command("latency", tmp_path, "--regions", "2", "12", "--pictures", "1")
    assert [row["regions"] for row in found["rows"]] == [2, 12] * 2
    assert [len(call["masks"][0]) for call in model.calls] == [2, 2, 12] + [1] * 14


def test_more_things_than_a_scene_can_hold_are_refused(model, tmp_path, capsys):
    given = ["--model", "m", "--output", str(tmp_path / "r.json"), "--regions", "25"]
    assert main(["evaluate", "latency", "--scene-kind", "things", *given]) == 2
    assert "expected regions from 1 to 24, got 25" in capsys.readouterr().err


def test_confidence_is_about_right_captions_and_right_names():
    marks = THINGS.mark(
        scene_of([CAT, BICYCLE, UMBRELLA], [(60, 0.0)] * 3),
        ["A small cat is at the top left, above the bicycle.", "A bike.", "A dog."],
    )
    assert marks == {"captions": [True, False, False], "names": [True, True, False]}


def test_confidence_is_measured_on_things(make, model):
    scenes = [render_things(SEED, "heldout", 2)]
    real, processor = make(num_region_prompts=8, roi_convention="aligned")
    options = {"caption_length": 150, "steps": 1}
    found = confidence.measure(real, processor, scenes, options, "one_pass", THINGS)
    assert found["regions"] == found["wrong_captions"] == found["names"]["wrong"] == 2
    assert found["roc_area"] is found["names"]["roc_area"] is None
    assert found["captions_looked_for"] == 2 and 0 <= found["region_found"] <= 1
