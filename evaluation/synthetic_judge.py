"""Judges captions and answers about synthetic scenes exactly, against what is known to be drawn.

A caption is right in an attribute when it names the region's value of it and no other value. A
missing caption or answer (None, empty, or past the end of a scene's list) is wrong in everything,
never dropped. All functions are pure.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..scenes.language import VOCABULARY, Question, answer_matches, named_values
from ..scenes.shapes import Scene
from .scoring import ordered_sum

# to be changed whenever a question or answer of `synthetic_folder`, or what is right here, is
JUDGE_VERSION = "synthetic-exact-1"


def wrong_attributes(caption: str | None, truth: Mapping[str, str]) -> dict[str, set[str]]:
    """Finds the attributes that a caption gets wrong, each with the wrong values that it names.

    Args:
        caption: free text, or None.
        truth: the region's value of each attribute.

    Returns:
        Attribute to wrong values. The set is empty when the attribute is not named at all.
    """
    named = named_values(caption or "")
    return {
        name: named[name] - {truth[name]} for name in VOCABULARY if named[name] != {truth[name]}
    }


def borrowed_attributes(
    wrong: Mapping[str, set[str]], truths: Sequence[Mapping[str, str]]
) -> set[str]:
    """Finds the wrong attributes of which a named value is that of another region of the scene.

    Args:
        wrong: what `wrong_attributes` found; never the region's own value.
        truths: the attributes of the scene's regions; its own may be among them.
    """
    return {
        name for name, values in wrong.items() if any(truth[name] in values for truth in truths)
    }


def score_captions(scenes: Sequence[Scene], captions: Sequence[Sequence[str | None]]) -> dict:
    """Scores the captions of every region of some scenes.

    Args:
        scenes: the scenes, or anything whose `objects` have `attributes`.
        captions: for each scene its captions, in the order of its objects. A shorter list leaves
            the last regions without a caption.

    Returns:
        regions: how many regions there are; the unit of every share below.
        attribute_accuracy: mean of the accuracies of the five attributes.
        per_attribute: attribute to the share of regions whose caption names its value alone.
        exact_caption_rate: share of regions right in all five attributes.
        interference_rate: share of regions whose caption is wrong in at least one attribute by
            naming the value of that same attribute of another region in the scene. A size is one
            of two, so a wrong size nearly always counts.
        interference_by_chance: the same share with each scene's other regions taken from other
            scenes with as many: what wrong values coincide with though nothing was mixed up.
        interference_per_attribute: the share, attribute by attribute.
        missing: how many regions have no caption.

    Raises:
        ValueError: no region, not one list for each scene, or more captions than regions.
    """
    if len(scenes) != len(captions):
        raise ValueError(f"expected captions of {len(scenes)} scenes, got {len(captions)}")

    judged = list(_judge_regions(scenes, captions))
    regions = len(judged)
    if not regions:
        raise ValueError("expected at least one region, got none")

    # Shares of regions
    right = {name: sum(name not in one.wrong for one in judged) for name in VOCABULARY}
    borrowed = {name: sum(name in one.borrowed for one in judged) for name in VOCABULARY}
    return {
        "regions": regions,
        "attribute_accuracy": sum(right.values()) / (len(VOCABULARY) * regions),
        "per_attribute": _shares(right, regions),
        "exact_caption_rate": sum(not one.wrong for one in judged) / regions,
        "interference_rate": sum(bool(one.borrowed) for one in judged) / regions,
        "interference_by_chance": ordered_sum(one.by_chance for one in judged) / regions,
        "interference_per_attribute": _shares(borrowed, regions),
        "missing": sum(one.is_missing for one in judged),
    }


@dataclass(frozen=True)
class _JudgedCaption:
    """What the judge found in one region's caption."""

    wrong: dict[str, set[str]]  # as `wrong_attributes` finds
    borrowed: set[str]  # as `borrowed_attributes` finds
    by_chance: float  # as `_borrowed_by_chance` estimates
    is_missing: bool


def _judge_regions(
    scenes: Sequence[Scene], captions: Sequence[Sequence[str | None]]
) -> Iterator[_JudgedCaption]:
    """Judges the captions of all scenes, region by region."""
    alike = defaultdict(list)  # the scenes with so many regions
    for scene in scenes:
        alike[len(scene.objects)].append(scene)

    for index, (scene, texts) in enumerate(zip(scenes, captions, strict=True)):
        truths = [thing.attributes for thing in scene.objects]
        for k, text in enumerate(_padded(texts, len(truths), index)):
            wrong = wrong_attributes(text, truths[k])
            yield _JudgedCaption(
                wrong,
                borrowed_attributes(wrong, truths),
                _borrowed_by_chance(wrong, k, alike[len(truths)], scene),
                is_missing=not (text or "").strip(),
            )


def _borrowed_by_chance(wrong: Mapping, k: int, alike: Sequence[Scene], own: Scene) -> float:
    """Returns how often a wrong value would be another region's in scenes that were not shown.

    It is the share of the other scenes with as many regions in which a region, number `k` left out,
    has a wrong value that was named.
    """
    if not any(wrong.values()) or len(alike) == 1:
        return 0.0
    others = [[thing.attributes for thing in scene.objects] for scene in alike if scene is not own]
    hits = sum(bool(borrowed_attributes(wrong, [*t[:k], *t[k + 1 :]])) for t in others)
    return hits / len(others)


def score_answers(expected: Sequence[Question], answers: Sequence[str | None]) -> dict:
    """Scores short answers, exact up to case, spaces and punctuation.

    Args:
        expected: the questions with their answers.
        answers: one answer for each question, None for a missing one.

    Returns:
        questions: how many; question_accuracy: the share answered right; per_kind: kind of
        question to the share of its questions answered right; kind_counts: kind to how many.

    Raises:
        ValueError: no question, or not as many answers as questions.
    """
    if len(expected) != len(answers):
        raise ValueError(f"expected {len(expected)} answers, got {len(answers)}")
    if not expected:
        raise ValueError("expected at least one question, got none")

    marks: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(expected, answers, strict=True):
        marks[question.kind].append(answer_matches(answer or "", question.answer))

    return {
        "questions": len(expected),
        "question_accuracy": sum(map(sum, marks.values())) / len(expected),
        "per_kind": {kind: sum(marks[kind]) / len(marks[kind]) for kind in sorted(marks)},
        "kind_counts": {kind: len(marks[kind]) for kind in sorted(marks)},
    }


def _padded(texts: Sequence[str | None], regions: int, scene: int) -> list[str | None]:
    """Fills the captions of a scene up with None. Raises ValueError for too many."""
    if len(texts) > regions:
        raise ValueError(f"expected at most {regions} captions of scene {scene}, got {len(texts)}")
    return [*texts, *[None] * (regions - len(texts))]


def _shares(counts: Mapping[str, int], total: int) -> dict[str, float]:
    return {name: count / total for name, count in counts.items()}
