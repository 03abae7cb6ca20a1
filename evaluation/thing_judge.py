"""Judges what is said of scenes of things by their grammar, against what is known to be drawn.

A missing text (None, empty, or past the end of a scene's list) is wrong in everything, never
dropped. All functions are pure.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ..scenes.thing_facts import ThingFacts
from ..scenes.thing_grammar import LABELS
from ..scenes.thing_language import relations
from ..scenes.thing_parser import ReadCaption, read_caption
from ..scenes.thing_questions import RegionQuestion

JUDGE_VERSION = "things-grammar-1"  # to be changed whenever what is right is
ATTRIBUTES = ("size", "position", "hidden", "cut")


@dataclass(frozen=True)
class JudgedThing:
    """What the judge found in one region's caption."""

    name: bool
    attributes: dict[str, bool]  # by `ATTRIBUTES`
    relation: bool | None  # None: no relation is clear, and none is told
    is_grammatical: bool
    is_mixture: bool
    is_missing: bool

    @property
    def is_right(self) -> bool:
        """Tells whether nothing is wrong."""
        return (
            self.name
            and all(self.attributes.values())
            and self.relation is not False
            and self.is_grammatical
        )


def judge_caption(text: str | None, things: Sequence[ThingFacts], k: int) -> JudgedThing:
    """Judges the caption of thing `k` of a scene.

    The name is right when the text calls the thing by a right name and nothing else by another.
    Size and position are right when they are told, and nothing but the true one. What is hidden, or
    cut off, is right when what is told is true, and has to be told where something is (where a
    thing is both, one of the two). A relation is right when at least one is told, to things of the
    scene, and each that is told is clear in it.
    """
    said, thing = read_caption(text), things[k]
    missing = not (text or "").strip()
    silent = not said.hidden and not said.cuts
    attributes = {
        "size": set(said.sizes) == {thing.size},
        "position": set(said.places) == {thing.position},
        "hidden": set(said.hidden) <= {thing.hidden}
        and not missing
        and not (silent and thing.hidden != "whole"),
        "cut": set(said.cuts) <= {thing.cut}
        and not missing
        and not (silent and thing.cut is not None)
        and not (set(said.hidden) == {"whole"} and thing.cut is not None and not said.cuts),
    }
    return JudgedThing(
        name=set(said.names) == {thing.concept},
        attributes=attributes,
        relation=_relation(said, things, k),
        is_grammatical=said.is_grammatical,
        is_mixture=said.is_mixture,
        is_missing=missing,
    )


def _relation(said: ReadCaption, things: Sequence[ThingFacts], k: int) -> bool | None:
    """Judges what relations a caption tells; None where there is none, and none is told."""
    true = {(one.kind, things[one.other].concept) for one in relations(things, k)}
    if not true and not said.relations:
        return None
    return bool(said.relations) and set(said.relations) <= true


def label_is_right(text: str | None, thing: ThingFacts) -> bool:
    """Tells whether a label is a right name, up to case and outer spaces."""
    return (text or "").strip().lower() in LABELS[thing.concept]


def judge_captions(
    scenes: Sequence[Sequence[ThingFacts]], captions: Sequence[Sequence[str | None]]
) -> list[list[JudgedThing]]:
    """Judges the captions of every region of some scenes.

    Args:
        scenes: the facts of each scene's things.
        captions: for each scene its captions, in the order of its things. A shorter list leaves the
            last regions without a caption.

    Raises ValueError for not one list for each scene, or more captions than regions.
    """
    return [
        [judge_caption(text, things, k) for k, text in enumerate(texts)]
        for things, texts in zip(scenes, padded(scenes, captions, "captions"), strict=True)
    ]


def padded(scenes: Sequence[Sequence], texts: Sequence[Sequence], kind: str) -> list[list]:
    """Fills up the texts of each scene's regions with None, for those that are missing.

    Raises ValueError for not one list for each scene, or more texts, of some `kind`, than regions.
    """
    if len(scenes) != len(texts):
        raise ValueError(f"expected {kind} of {len(scenes)} scenes, got {len(texts)}")
    filled = []
    for number, (regions, own) in enumerate(zip(scenes, texts, strict=True)):
        if len(own) > len(regions):
            raise ValueError(
                f"expected at most {len(regions)} {kind} of scene {number}, got {len(own)}"
            )
        filled.append([*own, *[None] * (len(regions) - len(own))])
    return filled


def summarize(judged: Sequence[JudgedThing]) -> dict:
    """Counts what was found in the captions of some regions.

    Returns:
        regions: how many there are; the unit of every share below but `relation_accuracy`.
        name_accuracy, grammatical, mixture_rate: shares (see `judge_caption`, `thing_parser`).
        attribute_accuracy: mean of the accuracies of the `ATTRIBUTES`; per_attribute: each.
        relation_accuracy: share of `relation_regions`, those where a relation is clear or told.
        exact_caption_rate: share of regions whose caption is right in everything.
        missing: how many regions have no caption.

    A share of no regions is None.
    """
    related = [one.relation for one in judged if one.relation is not None]
    per_attribute = {name: share([one.attributes[name] for one in judged]) for name in ATTRIBUTES}
    marks = [right for one in judged for right in one.attributes.values()]
    return {
        "regions": len(judged),
        "name_accuracy": share([one.name for one in judged]),
        "attribute_accuracy": share(marks),
        "per_attribute": per_attribute,
        "relation_accuracy": share(related),
        "relation_regions": len(related),
        "grammatical": share([one.is_grammatical for one in judged]),
        "mixture_rate": share([one.is_mixture for one in judged]),
        "exact_caption_rate": share([one.is_right for one in judged]),
        "missing": sum(one.is_missing for one in judged),
    }


def score_labels(
    scenes: Sequence[Sequence[ThingFacts]], labels: Sequence[Sequence[str | None]]
) -> dict:
    """Scores the label of every region: `label_accuracy`, and `missing_labels`.

    Raises ValueError for no region, and for labels that do not fit, as `judge_captions`.
    """
    filled = padded(scenes, labels, "labels")
    pairs = [
        pair
        for things, texts in zip(scenes, filled, strict=True)
        for pair in zip(texts, things, strict=True)
    ]
    if not pairs:
        raise ValueError("expected at least one region, got none")
    return {
        "label_accuracy": share([label_is_right(text, thing) for text, thing in pairs]),
        "missing_labels": sum(not (text or "").strip() for text, _ in pairs),
    }


def score_region_answers(
    questions: Sequence[Sequence[RegionQuestion]], answers: Sequence[Sequence[str | None]]
) -> dict:
    """Scores the answer to one question about each region.

    Args:
        questions: for each scene the question about each region.
        answers: for each scene the answers, in the same order; missing ones are wrong.

    Returns `region_question_accuracy`, `region_questions` (how many), `missing_region_answers`, and
    `region_questions_per_kind`: kind to `accuracy` and `questions`. Raises ValueError for no
    question, and for answers that do not fit, as `judge_captions`.
    """
    marks: dict[str, list[bool]] = defaultdict(list)
    missing = 0
    filled = padded(questions, answers, "answers")
    for asked, texts in zip(questions, filled, strict=True):
        for question, text in zip(asked, texts, strict=True):
            marks[question.kind].append(question.is_right(text))
            missing += not (text or "").strip()
    if not marks:
        raise ValueError("expected at least one question, got none")

    return {
        "region_question_accuracy": share([mark for own in marks.values() for mark in own]),
        "region_questions": sum(map(len, marks.values())),
        "missing_region_answers": missing,
        "region_questions_per_kind": {
            kind: {"accuracy": share(own), "questions": len(own)}
            for kind, own in sorted(marks.items())
        },
    }


def share(marks: Sequence[bool]) -> float | None:
    """Returns how many of some marks are set, as a share; None without marks."""
    return sum(marks) / len(marks) if marks else None
