"""Declares the language of scenes of things: names, wordings of facts, and templates of captions.

A template is a row of tokens: words and marks stand for themselves, capitals for what is told:

    S size   N name   P place   R relation   O another thing, with its article   H what is hidden
    A indefinite article of what follows

Every caption tells size, name and place; a relation where one is clear; what is hidden, or which
border cuts the thing off, where something is. "The whole is seen" may be told or left out.
"""

from .concepts import CONCEPTS, Concept
from .language import GRID, POSITIONS

SIZES = ("small", "medium-sized", "large")

# Synonyms that take no article, plural or uncountable ones: they are labels, not told in sentences.
_WITHOUT_ARTICLE = {"french fries", "crossed swords", "dna", "soft ice cream"}


def _takes_article(concept: Concept, name: str) -> bool:
    """Tells whether "a" may stand before a name; not before "grapes" of "bunch of grapes"."""
    return name not in _WITHOUT_ARTICLE and not concept.name.endswith(f" of {name}")


LABELS = {concept.name: (concept.name, *concept.synonyms) for concept in CONCEPTS}
NOUNS = {
    concept.name: tuple(name for name in LABELS[concept.name] if _takes_article(concept, name))
    for concept in CONCEPTS
}

IMAGE = " of the image"  # may end the wording of a place


def _places(position: str) -> tuple[str, ...]:
    """Returns the wordings of a position, without `IMAGE`."""
    if position == "center":
        return ("in the center", "in the middle")
    if position in ("left", "right"):
        return (f"on the {position}", f"on the {position} side", f"at the {position} side")
    upper = {"top": "upper", "bottom": "lower"}[position.split()[0]]
    if " " not in position:
        return (f"at the {position}", f"in the {upper} part", f"at the {position} center")
    side = position.split()[1]
    return (
        f"at the {position}",
        f"in the {position} corner",
        f"in the {upper} {side} corner",
    )


PLACES = {position: _places(position) for position in POSITIONS}
assert set(PLACES) == {name for row in GRID for name in row}

RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "lower down than"),
    "in front of": ("in front of", "covering part of"),
    "behind": ("behind", "in back of"),
    "on": ("on top of", "lying on"),
}
HIDDEN = {
    "whole": ("fully visible", "in full view"),
    "partly hidden": ("partly hidden", "partly covered", "hidden in part"),
    "mostly hidden": ("mostly hidden", "mostly covered", "more than half hidden"),
}
BORDERS = ("left", "right", "top", "bottom")
CUTS = {
    border: (f"cut off at the {border} edge", f"cut off by the {border} border")
    for border in BORDERS
}

TEMPLATES = (
    # a relation, and what is hidden
    "A S N is P , R O , and is H .",
    "P there is A S N R O , and it is H .",
    "R O there is A S N , H , P .",
    "R O is A S N that is H , P .",
    "there is A S N P ; it is R O and H .",
    "this is A S N , H , P and R O .",
    "H and R O , A S N is P .",
    "P is A N , S and H , R O .",
    "the image shows A S N P , R O and H .",
    "A S N , H , can be seen P , R O .",
    "seen P is A S N that is R O and H .",
    "you can see A S N R O ; it is P and H .",
    "the N R O is S , H and P .",
    "H , A S N that is R O is P .",
    # a relation alone
    "A S N is P , R O .",
    "P there is A S N R O .",
    "R O there is A S N , P .",
    "R O is A S N that is P .",
    "A N that is S is R O , P .",
    "there is A S N P that is R O .",
    "this is A S N R O , seen P .",
    "the image shows A S N P , R O .",
    "P , A S N is R O .",
    "A S N can be seen R O , P .",
    "seen P is A S N that is R O .",
    "you can see A S N R O ; it is P .",
    "the N R O is S and is P .",
    "the N P is S and is R O .",
    # what is hidden alone
    "A S N is P and is H .",
    "P there is A S N that is H .",
    "A S N that is H is P .",
    "H , A S N is seen P .",
    "there is A S N P , and it is H .",
    "this is A S N , H , seen P .",
    "the N P is S and is H .",
    "the image shows A S N that is H , P .",
    # neither
    "A S N can be seen P .",
    "P there is A S N to be seen .",
    "there is A S N to be seen P .",
    "this is A S N that is seen P .",
    "the image shows A S N P .",
    "the N to be seen P is S .",
    "P is A N , and it is S .",
)


def article(name: str) -> str:
    """Returns the indefinite article that stands before a word or a name."""
    if name.startswith(("uni", "ufo", "ewe", "eu", "one")):
        return "a"
    return "an" if name[0] in "aeiou" or name.startswith("hour") else "a"


def sentence(tokens) -> str:
    """Joins tokens to a sentence: a capital first, no space before a mark."""
    text = " ".join(tokens)
    for mark in ",;.":
        text = text.replace(f" {mark}", mark)
    return text[:1].upper() + text[1:]
