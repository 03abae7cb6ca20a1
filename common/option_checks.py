"""Checks of options: their names and types, and what others leave without effect."""

import dataclasses
import difflib
import math
from collections.abc import Iterable

from huggingface_hub.dataclasses import type_validator

NEAREST = 3  # names that are shown for an unknown one


def expect_type(name: str, value, hint):
    """Refuses a value of another type than `hint`, and a number that is not finite.

    A whole number is a float too; nothing else passes for what it is not.
    """
    try:
        type_validator(name, _as_floats(value) if "float" in str(hint) else value, hint)
    except TypeError as error:
        wanted = hint.__name__ if type(hint) is type else str(hint)
        wanted = wanted.replace("float", "a finite number")
        raise ValueError(f"expected {name} as {wanted}, got {value!r}") from error


def _as_floats(value):
    """Turns whole numbers, also in lists and objects, to floats, and what is not finite to text."""
    if isinstance(value, dict):
        return {key: _as_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_floats(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return float(value) if math.isfinite(value) else str(value)


def field_names(cls) -> set[str]:
    """Returns the names of a dataclass's options."""
    return {f.name for f in dataclasses.fields(cls) if f.init}


def expect_known(where: str, values: dict, known: Iterable[str], dotted: Iterable[str] = ()):
    """Refuses an unknown key, and names the known and `dotted` ones that are spelled most alike."""
    unknown = sorted(map(str, set(values) - set(known)))
    if unknown:
        found = "; ".join(f"{k!r} (nearest: {nearest(k, {*known, *dotted})})" for k in unknown)
        raise ValueError(f"expected a key of {where}, got {found}")


def nearest(key: str, known: Iterable[str]) -> str:
    """Lists the names that are spelled most like `key`; of a dotted name, its last part."""

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, key, name.rpartition(".")[2]).ratio()

    return ", ".join(sorted(sorted(known), key=likeness, reverse=True)[:NEAREST])


def expect_defaults(options, where: str, names: Iterable[str], needs: str):
    """Refuses options of a dataclass that have no effect, unless `needs` is given."""
    defaults = {f.name: f.default for f in dataclasses.fields(options)}
    factories = {f.name: f.default_factory for f in dataclasses.fields(options)}
    for name in names:
        default = defaults[name]
        default = factories[name]() if default is dataclasses.MISSING else default
        if (given := getattr(options, name)) != default:
            raise ValueError(f"expected {where}.{name} only {needs}; got {given!r}")


def expect_one_of(name: str, value, allowed: tuple):
    """Refuses a value that is not among the allowed ones."""
    if value not in allowed:
        raise ValueError(f"expected {name} to be one of {', '.join(allowed)}, got {value!r}")


def expect_positive(name: str, value: int):
    """Refuses a number under 1."""
    if value < 1:
        raise ValueError(f"expected {name} of at least 1, got {value}")


def expect_share(name: str, value: float):
    """Refuses a number that is not between 0 and 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"expected {name} between 0 and 1, got {value}")
