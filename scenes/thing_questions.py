"""Asks questions about one thing of a scene, and about the scene, and knows the right answers."""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import language
from .concepts import CONCEPTS, concept_named
from .language import Question, normalize
from .thing_facts import ThingFacts
from .thing_grammar import NOUNS, article
from .thing_language import pick

LARGER = 1.5  # bound for the areas' ratio from which on one of two things is the larger
NUMBERS = (
    *language.NUMBERS,
    *("nine ten eleven twelve thirteen".split()),
    *("fourteen fifteen sixteen seventeen eighteen nineteen twenty twenty-one".split()),
    *("twenty-two twenty-three twenty-four".split()),
)
QUESTIONS = {
    "what": ("What is it?", "What is this?", "What can be seen here?"),
    "in_front_of": ("What is it in front of?", "What does it cover in part?"),
    "alive": ("Is it alive?", "Is this a living thing?"),
    "edible": ("Is it edible?", "Can it be eaten?"),
    "vehicle": ("Is it a vehicle?", "Is this some kind of vehicle?"),
    "side": ("Which side of the image is it on?", "On which side of the image is it?"),
    "hidden": ("Is any of it hidden?", "Is some of it covered?"),
    "larger": ("Is it larger than <region {j}>?", "Which is larger, it or <region {j}>?"),
}
_KIND_WORDS = {"alive": "alive", "edible": "edible", "vehicle": "a vehicle"}


@dataclass(frozen=True)
class RegionQuestion:
    """A question about one region, one of its right answers, and all of them."""

    question: str  # may name others, "<region 2>", by their index in the scene
    answer: str
    kind: str  # of `QUESTIONS`
    accepted: frozenset[str]  # every right answer, as `language.normalize` gives it
    other: int | None = None  # index of the thing that the question names

    def is_right(self, answer: str | None) -> bool:
        """Tells whether an answer is right, up to case, spaces and punctuation."""
        return normalize(answer or "") in self.accepted


def _a(name: str) -> str:
    return f"{article(name)} {name}"


def answers_to(things: Sequence[ThingFacts], k: int, kind: str, other: int | None = None):
    """Returns all wordings of the answer about thing `k`; none where the question is not asked."""
    return _ANSWERS[kind](things, k, other)


def _what(things, k, other):
    names = NOUNS[things[k].concept]
    forms = ("It is {}.", "This is {}.", "That is {}.", "{}.")
    return [form.format(_a(name)) for name in names for form in forms]


def _in_front_of(things, k, other):
    hidden = [one.concept for one in things if one.hidden_by == k]
    forms = ("It is in front of {}.", "It covers part of {}.", "In front of {}.")
    if not hidden:
        return ["It is in front of nothing.", "It covers nothing.", "Nothing else."]
    nouns = [name for concept in hidden for name in NOUNS[concept]]
    return [form.format(_a(name)) for name in nouns for form in forms]


def _is(kind: str):
    """Returns the answers to whether a thing is of a kind."""

    def answers(things, k, other):
        concept = concept_named(things[k].concept)
        word = _KIND_WORDS[kind]
        if kind == "edible" and concept.is_alive and not concept.is_edible:
            return []  # whether a fish can be eaten is a matter of opinion
        if getattr(concept, f"is_{kind}"):
            forms = (f"Yes, it is {word}.", f"Yes, {{}} is {word}.", "Yes, it is.")
        else:
            forms = (f"No, it is not {word}.", f"No, {{}} is not {word}.", "No, it is not.")
        return [form.format(_a(name)) for name in NOUNS[concept.name] for form in forms]

    return answers


def _side(things, k, other):
    words = things[k].position.split()
    side = words[-1] if words[-1] in ("left", "right") else None
    if side is None:
        return ["It is in the middle.", "In the middle.", "Neither side, it is in the middle."]
    return [f"It is on the {side} side.", f"It is on the {side}.", f"On the {side}."]


def _hidden(things, k, other):
    thing = things[k]
    if thing.hidden == "whole":
        return ["No, nothing hides it.", "No, nothing is in front of it.", "None of it is hidden."]
    how = {"partly hidden": "part", "mostly hidden": "most"}[thing.hidden]
    if thing.hidden_by is None:
        return [f"Yes, {how} of it is hidden."]
    nouns = NOUNS[things[thing.hidden_by].concept]
    forms = (f"Yes, {how} of it is hidden by {{}}.", f"Yes, {{}} covers {how} of it.")
    return [form.format(_a(name)) for name in nouns for form in forms]


def _larger(things, k, other):
    if other is None:
        return []
    ratio = things[k].area / things[other].area
    if LARGER > ratio > 1 / LARGER:
        return []
    large, small = (k, other) if ratio >= LARGER else (other, k)
    yes = "Yes, it is larger than {s}." if large == k else "No, it is smaller than {l}."
    forms = (yes, "The {L} is larger.", "The {L} is larger than the {S}.")
    pairs = [(a, b) for a in NOUNS[things[large].concept] for b in NOUNS[things[small].concept]]
    texts = [f.format(l=f"the {a}", s=f"the {b}", L=a, S=b) for a, b in pairs for f in forms]
    return list(dict.fromkeys(texts))


_ANSWERS = {
    "what": _what,
    "in_front_of": _in_front_of,
    **{kind: _is(kind) for kind in _KIND_WORDS},
    "side": _side,
    "hidden": _hidden,
    "larger": _larger,
}


def region_question(
    rng: np.random.Generator, things: Sequence[ThingFacts], k: int, kind: str
) -> RegionQuestion | None:
    """Draws a question of a kind about thing `k`, and an answer; None where none can be asked."""
    other = None
    if kind == "larger" and len(things) > 1:
        other = pick(rng, [j for j in range(len(things)) if j != k])
    answers = answers_to(things, k, kind, other)
    if not answers:
        return None
    text = pick(rng, QUESTIONS[kind]).format(j=other)
    answer = pick(rng, answers)
    answer = answer[:1].upper() + answer[1:]
    return RegionQuestion(text, answer, kind, frozenset(map(normalize, answers)), other)


def ask_about_region(
    rng: np.random.Generator, things: Sequence[ThingFacts], k: int
) -> list[RegionQuestion]:
    """Draws a question of each kind about thing `k`, as far as it can be asked."""
    drawn = (region_question(rng, things, k, kind) for kind in QUESTIONS)
    return [question for question in drawn if question is not None]


# Questions about the whole scene, answered as shortly as those about shapes.

_OF_KIND = {"alive": "living things", "vehicle": "vehicles"}
_SIDES = {
    "left": "farthest to the left",
    "right": "farthest to the right",
    "top": "closest to the top",
    "bottom": "closest to the bottom",
}
FARTHEST_MARGIN = 0.1  # of a side, from the thing at the left to the next


@functools.cache
def _names() -> tuple[str, ...]:
    return tuple(concept.name for concept in CONCEPTS)


def ask_about_scene(rng: np.random.Generator, things: Sequence[ThingFacts]) -> list[Question]:
    """Draws questions, at most one of each kind: `count`, `count_kind`, `exists` always.

    `thing_at_side` where one thing is clearly the farthest to a side, `thing_at` where a position
    is there once.
    """
    kind = pick(rng, tuple(_OF_KIND))
    count = sum(getattr(concept_named(thing.concept), f"is_{kind}") for thing in things)
    questions = [
        Question("How many things are there?", NUMBERS[len(things)], "count"),
        Question(f"How many {_OF_KIND[kind]} are there?", NUMBERS[count], "count_kind"),
        _ask_exists(rng, things),
    ]

    side = pick(rng, tuple(_SIDES))
    axis, sign = side in ("top", "bottom"), 1 if side in ("left", "top") else -1
    ordered = sorted(things, key=lambda thing: sign * thing.center[axis])
    places = [sign * thing.center[axis] for thing in ordered]
    if len(things) == 1 or places[1] - places[0] >= FARTHEST_MARGIN:
        text = f"Which thing is {_SIDES[side]}?"
        questions.append(Question(text, ordered[0].concept, "thing_at_side"))

    counts = Counter(thing.position for thing in things)
    alone = [thing for thing in things if counts[thing.position] == 1]
    if alone:
        thing = pick(rng, alone)
        where = "in the" if thing.position == "center" else "at the"
        text = f"What is {where} {thing.position}?"
        questions.append(Question(text, thing.concept, "thing_at"))
    return questions


def _ask_exists(rng: np.random.Generator, things: Sequence[ThingFacts]) -> Question:
    """Asks whether a thing is there: yes or no with even odds."""
    there = [thing.concept for thing in things]
    is_there = rng.random() < 0.5
    name = pick(rng, there) if is_there else pick(rng, _names())
    return Question(f"Is there {_a(name)}?", "yes" if name in there else "no", "exists")
