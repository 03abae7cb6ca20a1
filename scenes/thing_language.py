"""Words scenes of things: relations, labels, captions in many wordings, a tokenizer's corpus."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .concepts import CONCEPTS
from .thing_facts import ThingFacts
from .thing_grammar import (
    CUTS,
    HIDDEN,
    IMAGE,
    LABELS,
    NOUNS,
    PLACES,
    RELATIONS,
    TEMPLATES,
    article,
    sentence,
)

LABEL_INSTRUCTION = "Name each region."
SIDE_MARGIN = 0.2  # of a side, between the centers of things of which one is beside the other
SIDE_SLOPE = 0.5  # upper bound for their other distance, over that one
DEPTH = ("in front of", "behind", "on")  # relations that overlapping masks show
DEPTH_WEIGHT = 3  # how much more often one of them is told than another relation
WHOLE_SHARE = 0.3  # of the captions of whole things say so
IMAGE_SHARE = 0.3  # of the captions without a relation end the place with "of the image"


@dataclass(frozen=True)
class Relation:
    """Says how a thing of a scene lies to another."""

    kind: str  # of `thing_grammar.RELATIONS`
    other: int  # index of the other thing


def relations(things: Sequence[ThingFacts], k: int) -> list[Relation]:
    """Lists all clear relations of thing `k` to others.

    One thing is left of another when their centers are `SIDE_MARGIN` apart along x and at most
    `SIDE_SLOPE` times that distance apart along y; above likewise. It is in front of what it hides
    most of, and on what its facts say it lies on.
    """
    found = []
    own = things[k]
    for j, other in enumerate(things):
        if j == k:
            continue
        if other.hidden_by == k:
            found.append(Relation("in front of", j))
        if own.hidden_by == j:
            found.append(Relation("behind", j))
        if own.on == j:
            found.append(Relation("on", j))

        across, down = other.center[0] - own.center[0], other.center[1] - own.center[1]
        if abs(across) >= SIDE_MARGIN and abs(down) <= SIDE_SLOPE * abs(across):
            found.append(Relation("left of" if across > 0 else "right of", j))
        if abs(down) >= SIDE_MARGIN and abs(across) <= SIDE_SLOPE * abs(down):
            found.append(Relation("above" if down > 0 else "below", j))
    return found


def pick(rng: np.random.Generator, choices: Sequence):
    """Draws one of some choices, all as likely."""
    return choices[int(rng.random() * len(choices))]


def label_of(rng: np.random.Generator, thing: ThingFacts) -> str:
    """Draws a thing's label: its name, or in one case of four another right name."""
    names = LABELS[thing.concept]
    return names[0] if rng.random() < 0.75 else pick(rng, names)


def noun_of(rng: np.random.Generator, concept: str) -> str:
    """Draws the name that a sentence calls a thing: in one case of four any that takes "a"."""
    names = NOUNS[concept]
    return names[0] if rng.random() < 0.75 else pick(rng, names)


def _told_relation(rng: np.random.Generator, things, k: int) -> Relation | None:
    """Draws the relation that a caption tells; None where none is clear."""
    found = relations(things, k)
    if not found:
        return None
    weighted = [one for one in found for _ in range(DEPTH_WEIGHT if one.kind in DEPTH else 1)]
    return pick(rng, weighted)


def _told_state(rng: np.random.Generator, thing: ThingFacts) -> str | None:
    """Draws how a caption tells what is hidden or cut off; None to leave it out."""
    if thing.hidden != "whole":
        return pick(rng, HIDDEN[thing.hidden])
    if thing.cut is not None:
        return pick(rng, CUTS[thing.cut])
    return pick(rng, HIDDEN["whole"]) if rng.random() < WHOLE_SHARE else None


_ROWS = [tuple(template.split()) for template in TEMPLATES]
_BY_FACTS = {
    key: [row for row in _ROWS if ("R" in row, "H" in row) == key]
    for key in ((True, True), (True, False), (False, True), (False, False))
}


def caption_of(rng: np.random.Generator, things: Sequence[ThingFacts], k: int) -> str:
    """Draws a caption of thing `k` of a scene, in one of many wordings.

    It tells what `thing_grammar` says every caption tells; all that it tells is true.
    """
    thing = things[k]
    relation, state = _told_relation(rng, things, k), _told_state(rng, thing)
    place = pick(rng, PLACES[thing.position])
    told = {"S": thing.size, "N": noun_of(rng, thing.concept), "P": place, "H": state}
    if relation is not None:
        other = noun_of(rng, things[relation.other].concept)
        told["R"] = pick(rng, RELATIONS[relation.kind])
        told["O"] = f"{'the' if rng.random() < 0.5 else article(other)} {other}"
    elif rng.random() < IMAGE_SHARE:
        told["P"] = place + IMAGE

    row = pick(rng, _BY_FACTS[relation is not None, state is not None])
    tokens = [told.get(token, token) for token in row]
    for i, token in enumerate(tokens):
        if token == "A":
            tokens[i] = article(tokens[i + 1])
    return sentence(tokens)


def iter_thing_corpus(
    scenes: Sequence[Sequence[ThingFacts]], *, seed: int = 0, rounds: int = 1
) -> Iterator[str]:
    """Yields texts of all kinds about scenes, and every name, to train a tokenizer on."""
    from .thing_questions import ask_about_region, ask_about_scene

    rng = np.random.default_rng(seed)
    for concept in CONCEPTS:
        yield from (concept.name, *concept.synonyms)
    for things in (things for _ in range(rounds) for things in scenes):
        for question in ask_about_scene(rng, things):
            yield from (question.question, question.answer)
        for k in range(len(things)):
            yield from (caption_of(rng, things, k), label_of(rng, things[k]))
            for question in ask_about_region(rng, things, k):
                yield from (question.question, question.answer)
