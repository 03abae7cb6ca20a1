"""The exact judge of synthetic scenes, on cases counted by hand."""

from dataclasses import dataclass

import pytest
from perceptiondlm.evaluation.synthetic_judge import score_answers, score_captions
from perceptiondlm.scenes.language import Question
from perceptiondlm.scenes.shapes import render_scene

RED_CIRCLE = {
    "shape": "circle",
    "colour": "red",
    "size": "small",
    "pattern": "plain",
    "position": "top left",
}
BLUE_STAR = {
    "shape": "star",
    "colour": "blue",
    "size": "large",
    "pattern": "plain",
    "position": "right",
}
RED_CAPTION = "a small plain red circle at the top left"
BLUE_CAPTION = "a large plain blue star at the right"


@dataclass
class Thing:
    attributes: dict


@dataclass
class Drawn:
    objects: list


SCENE = Drawn([Thing(RED_CIRCLE), Thing(BLUE_STAR)])


def score(*captions):
    return score_captions([SCENE], [list(captions)])


def test_right_captions_score_one_and_do_not_interfere():
    scores = score(RED_CAPTION, BLUE_CAPTION)
    assert scores["regions"] == 2
    assert scores["attribute_accuracy"] == scores["exact_caption_rate"] == 1.0
    assert scores["interference_rate"] == 0.0
    assert set(scores["per_attribute"].values()) == {1.0}


def test_one_wrong_attribute_costs_a_tenth_of_two_captions():
    scores = score(RED_CAPTION.replace("red", "green"), BLUE_CAPTION)
    assert scores["attribute_accuracy"] == pytest.approx(0.9)
    assert scores["per_attribute"]["colour"] == 0.5
    assert scores["exact_caption_rate"] == 0.5


def test_a_wrong_value_that_no_other_region_has_is_no_interference():
    assert score(RED_CAPTION.replace("red", "green"), BLUE_CAPTION)["interference_rate"] == 0.0


def test_the_value_of_another_region_is_interference():
    scores = score(RED_CAPTION.replace("red", "blue"), BLUE_CAPTION)
    assert scores["interference_rate"] == 0.5
    assert scores["interference_per_attribute"]["colour"] == 0.5
    assert scores["interference_per_attribute"]["shape"] == 0.0


def test_swapped_captions_are_two_interfering_captions_not_eight():
    scores = score(BLUE_CAPTION, RED_CAPTION)
    assert scores["interference_rate"] == 1.0
    assert scores["attribute_accuracy"] == pytest.approx(0.2)  # both are plain


def test_another_regions_value_of_a_different_attribute_is_no_interference():
    # "circle" is the shape of region 0; the wrong colour "white" is nobody's
    assert score(RED_CAPTION, BLUE_CAPTION.replace("blue", "white"))["interference_rate"] == 0.0


def test_a_value_shared_with_another_region_is_not_held_against_the_caption():
    scores = score(RED_CAPTION, BLUE_CAPTION.replace("blue ", ""))
    assert scores["per_attribute"]["pattern"] == 1.0
    assert scores["interference_rate"] == 0.0


def test_naming_its_own_value_and_another_regions_is_wrong_and_interference():
    scores = score(RED_CAPTION + " by a blue thing", BLUE_CAPTION)
    assert scores["per_attribute"]["colour"] == 0.5
    assert scores["interference_rate"] == 0.5


def test_a_superfluous_value_that_is_nobodys_is_wrong_but_no_interference():
    # both regions are plain: naming "plain" as well is not taken from the other one
    scores = score(RED_CAPTION.replace("plain", "plain dotted"), BLUE_CAPTION)
    assert scores["per_attribute"]["pattern"] == 0.5
    assert scores["interference_rate"] == 0.0


@pytest.mark.parametrize("missing", [[], [None, None], ["", "  "]])
def test_a_missing_caption_is_wrong_in_everything_and_counted(missing):
    scores = score_captions([SCENE], [missing])
    assert (scores["regions"], scores["missing"]) == (2, 2)
    assert scores["attribute_accuracy"] == scores["exact_caption_rate"] == 0.0
    assert scores["interference_rate"] == 0.0


def test_what_chance_gives_is_told_from_mixing_up():
    # "blue" is the other region's in SCENE, and in neither of the other scenes with two regions
    other = Drawn([Thing(RED_CIRCLE), Thing({**BLUE_STAR, "colour": "green"})])
    captions = [RED_CAPTION.replace("red", "blue"), BLUE_CAPTION]
    right = [RED_CAPTION, BLUE_CAPTION.replace("blue", "green")]
    scores = score_captions([SCENE, other, other], [captions, right, right])
    assert scores["interference_rate"] == pytest.approx(1 / 6)
    assert scores["interference_by_chance"] == 0.0
    scenes = [SCENE, Drawn(SCENE.objects), other]
    scores = score_captions(scenes, [captions, [RED_CAPTION, BLUE_CAPTION], right])
    assert scores["interference_by_chance"] == pytest.approx(1 / 12)


def test_regions_weigh_the_same_whatever_their_scene():
    crowd = Drawn([Thing(RED_CIRCLE)] * 3)
    scores = score_captions([SCENE, crowd], [[None, None], [RED_CAPTION] * 3])
    assert scores["exact_caption_rate"] == pytest.approx(3 / 5)


def test_word_order_case_and_punctuation_do_not_matter():
    assert score("Top-Left: CIRCLE, red; (plain, small).", BLUE_CAPTION)["exact_caption_rate"] == 1


def test_top_left_is_not_top():
    assert score(RED_CAPTION[: -len(" left")], BLUE_CAPTION)["per_attribute"]["position"] == 0.5


def test_more_captions_than_regions_raise():
    with pytest.raises(ValueError, match="at most 2 captions of scene 0, got 3"):
        score(RED_CAPTION, BLUE_CAPTION, RED_CAPTION)


def test_another_number_of_scenes_raises():
    with pytest.raises(ValueError, match="captions of 1 scenes, got 0"):
        score_captions([SCENE], [])


def test_no_regions_raise():
    with pytest.raises(ValueError, match="at least one region"):
        score_captions([], [])


def test_the_captions_of_rendered_scenes_are_right_by_the_judge():
    scenes = [render_scene(seed, "heldout") for seed in range(20)]
    scores = score_captions(scenes, [[thing.caption for thing in s.objects] for s in scenes])
    assert scores["exact_caption_rate"] == 1.0


QUESTIONS = [
    Question("How many objects are there?", "two", "count"),
    Question("Is there a red star?", "no", "exists"),
    Question("Is there a red circle?", "yes", "exists"),
    Question("What is at the right?", "blue star", "what_at"),
]


def test_answers_are_counted_by_kind():
    scores = score_answers(QUESTIONS, ["Two.", "yes", "Yes", "star"])
    assert scores["question_accuracy"] == 0.5
    assert scores["per_kind"] == {"count": 1.0, "exists": 0.5, "what_at": 0.0}
    assert scores["kind_counts"] == {"count": 1, "exists": 2, "what_at": 1}


def test_a_missing_answer_is_wrong():
    assert score_answers(QUESTIONS[:2], [None, "no"])["question_accuracy"] == 0.5


def test_another_number_of_answers_raises():
    with pytest.raises(ValueError, match="expected 4 answers, got 1"):
        score_answers(QUESTIONS, ["two"])


def test_no_questions_raise():
    with pytest.raises(ValueError, match="at least one question"):
        score_answers([], [])
