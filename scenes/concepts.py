"""Lists the things that scenes can hold: what they are called, and what is true of each kind."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Concept:
    """A kind of thing that scenes can hold.

    Edible is what is sold to be eaten: food, neither a drink nor an animal nor a plant that lives.
    Alive is every animal, creatures of tales included, and every plant that grows.
    """

    name: str  # as captions call it: lower case, singular
    synonyms: tuple[str, ...]  # other right names; no other concept has one of them
    group: str  # "animal", "food", "vehicle", ...
    codepoints: str  # "1f692": the key into every emoji set, without variation selectors
    is_alive: bool
    is_edible: bool
    is_vehicle: bool


def _read(path: Path) -> tuple[Concept, ...]:
    """Reads the list of concepts, sorted by name."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    concepts = (Concept(**{**row, "synonyms": tuple(row["synonyms"])}) for row in rows)
    return tuple(sorted(concepts, key=lambda concept: concept.name))


CONCEPTS = _read(Path(__file__).with_name("concepts.json"))
_BY_NAME = {concept.name: concept for concept in CONCEPTS}


def concept_named(name: str) -> Concept:
    """Returns the concept of a name; ValueError where there is none (synonyms are not names)."""
    if name not in _BY_NAME:
        raise ValueError(f"expected the name of a concept, got {name!r}")
    return _BY_NAME[name]
