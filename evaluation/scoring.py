"""Scores a judge's answers by the published protocol of DLC-Bench and ParaDLC-Bench.

A region is judged by a Yes/No recognition question and then by its own questions. A judge's answer
is text; `match_choice` says which choice it names, and that choice carries the score. All functions
are pure.
"""

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

RECOGNITION_CHOICES = ("Yes", "No")
QUESTION_TYPES = ("positive", "negative")
MISSING_POLICIES = ("wrong", "drop")


@dataclass(frozen=True)
class Question:
    """One multiple-choice question about a caption.

    Attributes:
        text: what is asked.
        choices: the texts to choose from.
        scores: what each choice is worth.
        type: "positive" (what a caption should say) or "negative" (what it should not).
        subtype: which negative: "salient negative" (something outside the region) or "negative
            part" (a part that the object does not show).
    """

    text: str
    choices: tuple[str, ...]
    scores: tuple[float, ...]
    type: str
    subtype: str | None = None


@dataclass(frozen=True)
class RegionScore:
    """The scores of one region.

    Attributes:
        score: mean over all questions (0 if there are none).
        positive: mean over positive questions (0 if there are none).
        negative: mean over negative questions (None if there are none).
        recognition: whether the judge took the description to be of the region's class.
        choice_index: the choice that each answer names, recognition first; None for no choice.
    """

    score: float
    positive: float
    negative: float | None
    recognition: bool
    choice_index: tuple[int | None, ...]

    def to_json(self) -> dict:
        """Returns the score as JSON holds it."""
        return {**asdict(self), "choice_index": list(self.choice_index)}


@dataclass(frozen=True)
class Evaluation:
    """The scores of a whole benchmark.

    Attributes:
        summary: `average_positive`, `average_negative` and their mean `average`.
        regions: the score of each region, in the benchmark's order.
        missing: regions without answers, whether counted or dropped.
    """

    summary: dict[str, float]
    regions: dict[str, RegionScore]
    missing: tuple[str, ...]


def match_choice(answer: object, choices: Sequence[str]) -> int | None:
    """Finds the choice that an answer names: its index, or None if it names none.

    Case and surrounding space never count. The first rule that applies decides:

    1. the answer is a choice, a choice after its letter ("b. the dog"), or a choice's letter;
    2. exactly one choice occurs in it ("I think: the dog");
    3. it starts with one of the letters a to e and a full stop: that choice, whatever follows;
    4. several choices occur in it: the one whose first occurrence is last; of those starting at
       the same place the longest (the earlier of equals);
    5. it occurs in a choice (an answer cut short): the longest such choice (the earlier of equals);
    6. it is a single letter a to e, or such a letter and a line break: that choice.

    These are the published rules with their consequences: an empty answer occurs in every choice,
    so it names the longest (rule 5; "Yes" when the question is recognition), and so does a letter
    that labels no choice but occurs in one. Where the published code would stop with an error, the
    answer names no choice: a letter beyond the choices under rules 3 and 6, and whatever is not
    text (a missing answer is None). A sixth choice is lettered f, and so on.
    """
    if not isinstance(answer, str):
        return None
    text = answer.strip().lower()
    options = [choice.strip().lower() for choice in choices]

    # Rule 1
    for index, (letter, option) in enumerate(zip(_letters(options), options, strict=False)):
        if text in (option, f"{letter}. {option}", letter):
            return index

    # Rules 2 to 4
    named = [index for index, option in enumerate(options) if option in text]
    if len(named) == 1:
        return named[0]
    if text[1:2] == "." and text[0] in _letters(options):
        return _labeled(text[0], options)
    if named:
        return max(named, key=lambda index: (text.index(options[index]), len(options[index])))

    # Rules 5 and 6
    containing = [index for index, option in enumerate(options) if text in option]
    if containing:
        return max(containing, key=lambda index: len(options[index]))
    if text[:1] in _letters(options) and text[1:2] in ("", "\n"):
        return _labeled(text[0], options)
    return None


def _letters(options: Sequence[str]) -> str:
    """Returns the letters that may label a choice: a to e, more only if there are more choices."""
    return string.ascii_lowercase[: max(5, len(options))]


def _labeled(letter: str, options: Sequence[str]) -> int | None:
    """Returns the index of the choice under a letter, or None beyond the choices."""
    index = string.ascii_lowercase.index(letter)
    return index if index < len(options) else None


def score_region(questions: Sequence[Question], answers: Sequence[object]) -> RegionScore:
    """Scores one region from its answers: recognition first, then one per question.

    An answer that names no choice scores 0. Unless recognition names Yes, every score becomes
    min(0, score): a recognition that fits neither choice counts as No, so an odd answer never earns
    anything. Questions beyond the answers are unanswered (score 0). Raises ValueError for more
    answers than questions.
    """
    if len(answers) > 1 + len(questions):
        raise ValueError(
            f"expected at most {1 + len(questions)} answers (recognition and {len(questions)}"
            f" questions), got {len(answers)}"
        )
    answers = [*answers, *[None] * (1 + len(questions) - len(answers))]

    # From the answers' text to choices, and from choices to scores
    recognition_index = match_choice(answers[0], RECOGNITION_CHOICES)
    is_recognized = recognition_index == 0
    indices = [match_choice(a, q.choices) for a, q in zip(answers[1:], questions, strict=True)]
    scores = [
        question_score(question, index, is_recognized)
        for question, index in zip(questions, indices, strict=True)
    ]

    positives = [s for s, q in zip(scores, questions, strict=True) if q.type == "positive"]
    negatives = [s for s, q in zip(scores, questions, strict=True) if q.type == "negative"]
    total = ordered_sum(positives) + ordered_sum(negatives)
    return RegionScore(
        score=total / len(scores) if scores else 0,
        positive=mean(positives),
        negative=mean(negatives) if negatives else None,
        recognition=is_recognized,
        choice_index=(recognition_index, *indices),
    )


def question_score(question: Question, index: int | None, is_recognized: bool) -> float:
    """Returns the score of a choice; never more than 0 for an object that is not recognized."""
    score = 0 if index is None else question.scores[index]
    return score if is_recognized else min(0, score)


def score_benchmark(
    questions: Mapping[str, Sequence[Question]],
    answers: Mapping[str, Sequence[object] | None],
    *,
    missing: str = "wrong",
) -> Evaluation:
    """Scores every region of a benchmark.

    Args:
        questions: the questions of each region; their order is the order of summation.
        answers: per region the recognition answer, then one per question. A region that is absent
            or None or has an empty list has no prediction.
        missing: "wrong" gives such a region no recognition and 0 for every question, so it stays
            in the averages; "drop" leaves it out of them, as the published script does.

    Raises ValueError for answers about other regions, or for more answers than questions.
    """
    if missing not in MISSING_POLICIES:
        raise ValueError(f"expected missing to be one of {MISSING_POLICIES}, got {missing!r}")
    unknown = [key for key in answers if key not in questions]
    if unknown:
        raise ValueError(
            f"expected answers about the benchmark's regions, got {len(unknown)} unknown,"
            f" first {unknown[0]!r}"
        )

    # A region without answers is scored as one with an empty list, or not at all.
    absent = {key: [] for key in questions if answers.get(key) in (None, [])}
    regions = {
        key: _score_named(key, asked, absent[key] if key in absent else answers[key])
        for key, asked in questions.items()
        if missing == "wrong" or key not in absent
    }
    return Evaluation(summarize(regions.values()), regions, tuple(absent))


def _score_named(key: str, questions: Sequence[Question], answers: object) -> RegionScore:
    if isinstance(answers, str) or not isinstance(answers, Sequence):
        raise ValueError(f"region {key}: expected a list of answers, got {answers!r}")
    try:
        return score_region(questions, answers)
    except ValueError as error:
        raise ValueError(f"region {key}: {error}") from error


def summarize(regions: Iterable[RegionScore]) -> dict[str, float]:
    """Averages scores over regions; those without negative questions are left out of theirs."""
    regions = list(regions)
    positive = mean([region.positive for region in regions])
    negative = mean([region.negative for region in regions if region.negative is not None])
    return {
        "average_positive": positive,
        "average_negative": negative,
        "average": (positive + negative) / 2,
    }


def mean(values: Sequence[float]) -> float:
    """Returns the mean, summed in order; 0 of nothing."""
    return ordered_sum(values) / len(values) if values else 0


def ordered_sum(values: Iterable[float]) -> float:
    """Sums from left to right, the same to the last bit in every version of Python.

    From 3.12 on `sum` compensates the rounding, which gives other last bits.
    """
    total = 0
    for value in values:
        total += value
    return total


def parse_question(record: object, where: str) -> Question:
    """Parses one question of a `qa.json`. Raises ValueError, in which `where` names the place."""
    if not isinstance(record, dict) or not isinstance(record.get("question"), str):
        raise ValueError(f"{where}: expected an object with a text 'question', got {record!r}")
    if record.get("type") not in QUESTION_TYPES:
        raise ValueError(
            f"{where}: expected type to be one of {QUESTION_TYPES}, got {record.get('type')!r}"
        )
    choices = record.get("choices")
    if not isinstance(choices, list) or not choices or not all(map(_is_choice, choices)):
        raise ValueError(f"{where}: expected choices of [text, number], got {choices!r}")
    texts, scores = zip(*choices, strict=True)
    return Question(record["question"], texts, scores, record["type"], record.get("subtype"))


def _is_choice(choice: object) -> bool:
    return (
        isinstance(choice, list)
        and len(choice) == 2
        and isinstance(choice[0], str)
        and isinstance(choice[1], int | float)
        and not isinstance(choice[1], bool)
        and math.isfinite(choice[1])
    )
