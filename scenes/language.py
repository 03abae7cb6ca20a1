"""Words a synthetic scene: captions of its objects, and questions; finds what a text names."""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from .shape_objects import COLORS, PATTERNS, SHAPES, SIZES

GRID = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
POSITIONS = tuple(name for row in GRID for name in row)
# The data's own words are British, as the embedded model has learned them.
VOCABULARY = {
    "shape": SHAPES,
    "colour": tuple(COLORS),
    "size": tuple(SIZES),
    "pattern": PATTERNS,
    "position": POSITIONS,
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True)
class Question:
    """A question about the whole scene, its short answer, and its kind (see `ask`)."""

    question: str
    answer: str
    kind: str


def caption_of(attributes: dict[str, str]) -> str:
    """Returns the one caption of an object with these attributes."""
    return "a {size} {pattern} {colour} {shape} at the {position}".format(**attributes)


def normalize(text: str) -> str:
    """Returns lower case letters and digits alone, with one space for all that is between them."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


# longest first, so that "top left" is not read as "top"
_WORDS = {
    name: re.compile(rf"\b(?:{'|'.join(sorted(values, key=len, reverse=True))})\b")
    for name, values in VOCABULARY.items()
}


def named_values(text: str) -> dict[str, set[str]]:
    """Finds every value of each attribute that a text names, whatever its case and order."""
    text = normalize(text)
    return {name: set(words.findall(text)) for name, words in _WORDS.items()}


def answer_matches(answer: str, expected: str) -> bool:
    """Tells whether an answer is the expected one, up to case, spaces and punctuation."""
    return normalize(answer) == normalize(expected)


def ask(rng: np.random.Generator, objects: list[dict[str, str]]) -> list[Question]:
    """Draws questions, at most one of each kind, about objects given by their attributes.

    Kinds: `count`, `count_colour`, `exists` always; `shape_of_colour`, and `colour_at` and
    `shape_at`, when some color or position is there once.
    """
    questions = [
        Question("How many objects are there?", NUMBERS[len(objects)], "count"),
        _ask_count_color(rng, objects),
        _ask_exists(rng, objects),
    ]

    # Of what identifies one object alone, by its color or its position.
    for key, text, answer, kind in (
        ("colour", "What shape is the {colour} object?", "{shape}", "shape_of_colour"),
        ("position", "What colour is the object at the {position}?", "{colour}", "colour_at"),
        ("position", "What shape is the object at the {position}?", "{shape}", "shape_at"),
    ):
        counts = Counter(thing[key] for thing in objects)
        alone = [thing for thing in objects if counts[thing[key]] == 1]

        if alone:
            thing = alone[rng.integers(len(alone))]
            questions.append(Question(text.format(**thing), answer.format(**thing), kind))
    return questions


def _ask_count_color(rng: np.random.Generator, objects: list[dict[str, str]]) -> Question:
    """Asks for the number of a color that is there in three cases of four, else of another."""
    counts = Counter(thing["colour"] for thing in objects)
    color = _choose_color(rng, counts, 0.75)
    return Question(f"How many {color} objects are there?", NUMBERS[counts[color]], "count_colour")


def _ask_exists(rng: np.random.Generator, objects: list[dict[str, str]]) -> Question:
    """Asks whether a color is there: yes or no with even odds."""
    counts = Counter(thing["colour"] for thing in objects)
    color = _choose_color(rng, counts, 0.5)
    article = "an" if color[0] in "aeiou" else "a"
    answer = "yes" if color in counts else "no"
    return Question(f"Is there {article} {color} object?", answer, "exists")


def _choose_color(rng: np.random.Generator, counts: Counter, present_share: float) -> str:
    """Draws a color that is there in a share of the cases, else one that is not."""
    present = rng.random() < present_share or len(counts) == len(COLORS)
    choices = [color for color in COLORS if (color in counts) == present]
    return choices[rng.integers(len(choices))]
