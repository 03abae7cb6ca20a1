"""ParaDLC-Bench as published: what is read, and the recorded scores to the last bit."""

import functools
import json
import operator
import random
from pathlib import Path

import pytest
from perceptiondlm.apps.cli import main
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.evaluation.scoring import (
    Question,
    match_choice,
    ordered_sum,
    parse_question,
    score_benchmark,
    score_region,
)

FOLDER = Path(__file__).parent / "fixtures" / "paradlc"
CHOICES = ("The dog is red.", "The dog is not mentioned.", "The dog is blue and big.")
NOTHING = "nothing fits"


@pytest.fixture(scope="module")
def benchmark():
    return load_benchmark(FOLDER)


@pytest.fixture(scope="module")
def answers():
    return json.loads((FOLDER / "judge_answers.json").read_text())


@pytest.fixture(scope="module")
def expected():
    return json.loads((FOLDER / "expected_scores.json").read_text())


def bits(value):
    """Floats by their exact bits, inside any JSON structure."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [bits(item) for item in value]
    return float(value).hex() if isinstance(value, int | float) else value


def test_the_benchmark_has_its_published_size(benchmark):
    types = [q.type for questions in benchmark.questions.values() for q in questions]
    assert len(benchmark.regions_per_image()) == 100
    assert len(benchmark.samples) == 299
    assert (types.count("positive"), types.count("negative")) == (1137, 1208)


def test_every_region_score_is_the_recorded_one_to_the_last_bit(benchmark, answers, expected):
    evaluation = score_benchmark(benchmark.questions, answers)
    regions = {key: region.to_json() for key, region in evaluation.regions.items()}
    assert list(regions) == list(expected["regions"])
    assert bits(regions) == bits(expected["regions"])


def test_the_summary_is_the_recorded_one_to_the_last_bit(benchmark, answers, expected):
    assert bits(score_benchmark(benchmark.questions, answers).summary) == bits(expected["summary"])


def test_the_command_writes_the_recorded_scores(tmp_path, expected):
    output = tmp_path / "scores.json"
    arguments = ["--annotations", str(FOLDER), "--answers", str(FOLDER / "judge_answers.json")]
    assert main(["evaluate", "score", *arguments, "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert list(written)[:2] == ["summary", "regions"]
    assert bits(written["summary"]) == bits(expected["summary"])
    assert bits(written["regions"]) == bits(expected["regions"])


def test_the_order_of_answers_in_the_file_changes_nothing(benchmark, answers, expected):
    keys = list(answers)
    random.Random(5).shuffle(keys)
    evaluation = score_benchmark(benchmark.questions, {key: answers[key] for key in keys})
    assert bits(evaluation.summary) == bits(expected["summary"])


def test_sums_are_rounded_at_every_step():
    values = [0.1] * 10 + [1e16, 1.0, -1e16]
    assert ordered_sum(values) == functools.reduce(operator.add, values) == 0.0


# A second recorded set: answers are made from the choice they mean, so nothing is parsed here.


def intended_answers(qa: dict, seed: int) -> tuple[dict, dict]:
    """Answer texts of several forms, and the choice that each was made to name."""
    generator = random.Random(seed)
    texts, meant = {}, {}
    for key, questions in qa.items():
        asked = [["Yes", "No"], *([text for text, _ in q["choices"]] for q in questions)]
        picks = [generator.choice([*range(len(c)), None]) for c in asked]
        picks[0] = generator.randrange(2)
        texts[key] = [phrase(generator, c, pick) for c, pick in zip(asked, picks, strict=True)]
        meant[key] = picks
    return texts, meant


def phrase(generator: random.Random, choices: list[str], pick: int | None) -> str | None:
    if pick is None:
        return generator.choice([NOTHING, None, "(Z)", "?", "12345"])
    letter, text = "ABCD"[pick], choices[pick]
    forms = [letter, f" {letter.lower()}\n", text.upper(), text, f"{letter}. {text}", f"{letter}.!"]
    return generator.choice(forms)


def straightforward_scores(qa: dict, meant: dict) -> dict:
    """The protocol written down again, over indices alone."""
    regions = {}
    for key, questions in qa.items():
        recognition, *picks = meant[key]
        by_type = {"positive": [], "negative": []}
        for question, pick in zip(questions, picks, strict=True):
            value = question["choices"][pick][1] if pick is not None else 0
            by_type[question["type"]].append(value if recognition == 0 else min(value, 0))
        positive, negative = by_type["positive"], by_type["negative"]
        regions[key] = {
            "score": (add(positive) + add(negative)) / len(positive + negative),
            "positive": add(positive) / len(positive) if positive else 0,
            "negative": add(negative) / len(negative) if negative else None,
            "recognition": recognition == 0,
            "choice_index": meant[key],
        }
    return regions


def add(values: list[float]) -> float:
    return functools.reduce(operator.add, values, 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_another_recorded_set_is_scored_as_a_straightforward_oracle_does(benchmark, seed):
    qa = json.loads((FOLDER / "qa.json").read_text())
    if seed == 0:  # a set without negative questions
        qa = {key: [q for q in v if q["type"] == "positive"] for key, v in qa.items()}
    kept = {key: questions for key, questions in qa.items() if questions}
    questions = {key: [parse_question(q, key) for q in v] for key, v in kept.items()}
    texts, meant = intended_answers(kept, seed)
    evaluation = score_benchmark(questions, texts)
    regions = {key: region.to_json() for key, region in evaluation.regions.items()}
    expected = straightforward_scores(kept, meant)
    assert bits(regions) == bits(expected)
    positives = [region["positive"] for region in expected.values()]
    negatives = [r["negative"] for r in expected.values() if r["negative"] is not None]
    assert evaluation.summary["average_positive"] == add(positives) / len(positives)
    assert evaluation.summary["average_negative"] == (
        add(negatives) / len(negatives) if negatives else 0
    )


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("b", 1),
        (" C \n", 2),
        ("c. the dog is BLUE and big.", 2),
        ("(B) The dog is not mentioned.", 1),  # one choice occurs in it
        ("**A. The dog is red.**", 0),
        ("I think the answer is: The dog is blue and big.", 2),
        ("C. The dog is red.", 0),  # the text names one choice; its letter is not looked at
        ("B. no idea", 1),
        ("B.", 1),
        ("C\nbecause of the picture", 2),
        ("D. something else", None),  # no such choice
        ("D\nsomething else", None),
        ("B. The dog is red. The dog is blue and big.", 1),  # several: the letter decides
        ("The dog is not mentioned. Not: The dog is red.", 0),  # several: the last to begin
        ("The dog is b", 2),  # cut short
        ("The dog is", 1),  # cut short of the difference: the longest choice
        ("", 1),  # occurs in every choice: the longest
        (" \n", 1),
        ("E", 1),  # labels no choice but occurs in the longest
        ("(B)", None),
        ("B)", None),
        ("Answer: B", None),
        ("2", None),
        ("A person stands there", None),  # a word, not a letter
        ("none of these", None),
        (None, None),
        (3, None),
        ({"answer": "A"}, None),
    ],
)
def test_an_answer_names_the_choice_that_the_published_rules_give(answer, index):
    assert match_choice(answer, CHOICES) == index


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("Yes", 0),
        ("yes.", 0),
        ("NO!", 1),
        ("A", 0),
        ("b. No", 1),
        ("Yes, no doubt", 1),  # both named: the last to begin
        ("I cannot tell", 1),  # "no" occurs in it
        ("", 0),  # occurs in both: the longest
        ("d", None),
        ("perhaps", None),
        (None, None),
    ],
)
def test_a_recognition_answer_names_yes_or_no_by_the_same_rules(answer, index):
    assert match_choice(answer, ("Yes", "No")) == index


def test_of_choices_that_begin_together_the_longest_is_named():
    assert match_choice("so: red car, I say", ("red", "red car", "car")) == 2  # begins last
    assert match_choice("so: red car, I say", ("red", "red car", "blue")) == 1


QUESTIONS = (
    Question("?", ("right", "unsaid", "wrong"), (1, 0, -1), "positive"),
    Question("?", ("said", "unsaid"), (-1, 1), "negative"),
)


@pytest.mark.parametrize("recognition", ["perhaps", None, "d", "No"])
def test_without_a_yes_nothing_is_earned_and_wrong_answers_still_cost(recognition):
    region = score_region(QUESTIONS, [recognition, "right", "said"])
    assert (region.recognition, region.positive, region.negative) == (False, 0, -1)


def test_answers_that_fit_no_choice_score_zero():
    region = score_region(QUESTIONS, ["Yes", NOTHING, None])
    assert (region.score, region.positive, region.negative) == (0, 0, 0)
    assert region.choice_index == (0, None, None)


def test_a_region_without_negative_questions_has_no_negative_score():
    assert score_region(QUESTIONS[:1], ["Yes", "right"]).negative is None
    summary = score_benchmark({"a": QUESTIONS[:1]}, {"a": ["Yes", "right"]}).summary
    assert summary == {"average_positive": 1, "average_negative": 0, "average": 0.5}


def test_a_region_without_positive_questions_counts_as_zero():
    assert score_region(QUESTIONS[1:], ["Yes", "unsaid"]).positive == 0


def test_a_short_list_of_answers_leaves_questions_unanswered():
    assert score_region(QUESTIONS, ["Yes", "right"]).choice_index == (0, 0, None)


def test_more_answers_than_questions_are_refused():
    with pytest.raises(ValueError, match="region a: expected at most 3 answers.*got 4"):
        score_benchmark({"a": QUESTIONS}, {"a": ["Yes", "right", "said", "said"]})


def test_answers_of_the_wrong_form_are_refused():
    with pytest.raises(ValueError, match="region a: expected a list of answers, got 'Yes'"):
        score_benchmark({"a": QUESTIONS}, {"a": "Yes"})
    with pytest.raises(ValueError, match="unknown, first 'b'"):
        score_benchmark({"a": QUESTIONS}, {"b": ["Yes"]})


@pytest.mark.parametrize("absent", [{}, {"b": None}, {"b": []}])
def test_a_missing_prediction_counts_as_wrong_unless_dropped(absent):
    questions = {"a": QUESTIONS, "b": QUESTIONS}
    answers = {"a": ["Yes", "right", "unsaid"], **absent}
    wrong = score_benchmark(questions, answers)
    assert wrong.missing == ("b",) and wrong.summary["average"] == 0.5
    assert wrong.regions["b"].to_json() == {
        "score": 0,
        "positive": 0,
        "negative": 0,
        "recognition": False,
        "choice_index": [None, None, None],
    }
    dropped = score_benchmark(questions, answers, missing="drop")
    assert dropped.missing == ("b",) and dropped.summary["average"] == 1.0
    assert list(dropped.regions) == ["a"]


def test_the_command_reports_missing_predictions(tmp_path, answers, caplog):
    partial, output = tmp_path / "answers.json", tmp_path / "scores.json"
    partial.write_text(json.dumps(dict(list(answers.items())[:290])))
    arguments = ["--annotations", str(FOLDER), "--answers", str(partial), "--output", str(output)]
    assert main(["evaluate", "score", *arguments, "--missing", "drop"]) == 0
    written = json.loads(output.read_text())
    assert len(written["regions"]) == 290 and len(written["missing"]["regions"]) == 9
    assert "9 regions have no answers, dropped" in caplog.text
    assert main(["evaluate", "score", *arguments]) == 0
    assert len(json.loads(output.read_text())["regions"]) == 299


@pytest.mark.parametrize("content", ["{", "[1]", '{"nobody": []}'])
def test_the_command_answers_a_bad_file_with_one_line(tmp_path, content, capsys):
    bad = tmp_path / "answers.json"
    bad.write_text(content)
    arguments = ["--annotations", str(FOLDER), "--answers", str(bad), "--output", str(bad)]
    assert main(["evaluate", "score", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "record",
    [
        None,
        {"question": "?", "type": "positive", "choices": []},
        {"question": "?", "type": "positive", "choices": [["a", "b"]]},
        {"question": "?", "type": "positive", "choices": [["a", float("nan")]]},
        {"question": "?", "type": "neutral", "choices": [["a", 1]]},
        {"type": "positive", "choices": [["a", 1]]},
    ],
)
def test_a_bad_question_is_refused_with_its_place(record):
    with pytest.raises(ValueError, match="qa.json: region 7"):
        parse_question(record, "qa.json: region 7")
