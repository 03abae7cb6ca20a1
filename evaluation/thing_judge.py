"""Judges captions of scenes of things by their grammar, against what is known to be drawn.

A missing caption (None, empty, or past the end of a scene's list) is wrong in everything, never
dropped. All functions are pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..scenes.thing_facts import ThingFacts
from ..scenes.thing_grammar import LABELS
from ..scenes.thing_language import relations
from ..scenes.thing_parser import ReadCaption, read_caption

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


def score_thing_captions(
    scenes: Sequence[Sequence[ThingFacts]], captions: Sequence[Sequence[str | None]]
) -> dict:
    """Scores the captions of every region of some scenes.

    Args:
        scenes: the facts of each scene's things.
        captions: for each scene its captions, in the order of its things. A shorter list leaves the
            last regions without a caption.

    Returns:
        regions: how many there are; the unit of every share below but `relation_accuracy`.
        name_accuracy, grammatical, mixture_rate: shares (see `judge_caption`, `thing_parser`).
        attribute_accuracy: mean of the accuracies of the `ATTRIBUTES`; per_attribute: each.
        relation_accuracy: share of `relation_regions`, those where a relation is clear or told;
            None where there is no such region.
        exact_caption_rate: share of regions whose caption is right in everything.
        missing: how many regions have no caption.

    Raises:
        ValueError: no region, not one list for each scene, or more captions than regions.
    """
    if len(scenes) != len(captions):
        raise ValueError(f"expected captions of {len(scenes)} scenes, got {len(captions)}")
    for number, (things, texts) in enumerate(zip(scenes, captions, strict=True)):
        if len(texts) > len(things):
            raise ValueError(
                f"expected at most {len(things)} captions of scene {number}, got {len(texts)}"
            )

    judged = [
        judge_caption(texts[k] if k < len(texts) else None, things, k)
        for things, texts in zip(scenes, captions, strict=True)
        for k in range(len(things))
    ]
    if not judged:
        raise ValueError("expected at least one region, got none")
    related = [one.relation for one in judged if one.relation is not None]
    per_attribute = {
        name: sum(one.attributes[name] for one in judged) / len(judged) for name in ATTRIBUTES
    }
    return {
        "regions": len(judged),
        "name_accuracy": sum(one.name for one in judged) / len(judged),
        "attribute_accuracy": sum(per_attribute.values()) / len(per_attribute),
        "per_attribute": per_attribute,
        "relation_accuracy": sum(related) / len(related) if related else None,
        "relation_regions": len(related),
        "grammatical": sum(one.is_grammatical for one in judged) / len(judged),
        "mixture_rate": sum(one.is_mixture for one in judged) / len(judged),
        "exact_caption_rate": sum(one.is_right for one in judged) / len(judged),
        "missing": sum(one.is_missing for one in judged),
    }
