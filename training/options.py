"""Options from plain values, by name and type; an unknown name is told the nearest ones."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable

NEAREST = 3  # names that are shown for an unknown one


def build(cls, values: dict | None, where: str):
    """Builds an options dataclass from plain values, by name and type."""
    values = values or {}
    if not isinstance(values, dict):
        raise ValueError(f"expected options in section {where!r}, got {values!r}")
    expect_known(where, values, field_names(cls))
    hints = typing.get_type_hints(cls)
    return cls(**{k: coerce(v, hints[k], f"{where}.{k}") for k, v in values.items()})


def coerce(value, hint, name: str):
    """Returns the value as its type says: an int is a float too, nothing else changes."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        for option in options:
            if _fits(value, option):
                return coerce(value, option, name)
        raise ValueError(f"expected {name} as {_describe(hint)}, got {value!r}")
    if not _fits(value, hint):
        raise ValueError(f"expected {name} as {_describe(hint)}, got {value!r}")
    if hint is float:
        return float(value)
    items = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return [coerce(v, items[0], f"{name}[{i}]") for i, v in enumerate(value)]
    if typing.get_origin(hint) is dict:
        return {k: coerce(v, items[1], f"{name}.{k}") for k, v in value.items()}
    return value


def _fits(value, hint) -> bool:
    if hint is typing.Any:
        return True
    base = typing.get_origin(hint) or hint
    if base is typing.Literal:
        return value in typing.get_args(hint)
    if base is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    if base is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, base)


def _describe(hint) -> str:
    """Names a type as a reader of recipes would."""
    if hint is float:
        return "a finite number"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is not None:
        return str(hint)
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def field_names(cls) -> set[str]:
    """Names of a dataclass's options."""
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
    if value not in allowed:
        raise ValueError(f"expected {name} to be one of {', '.join(allowed)}, got {value!r}")


def expect_positive(name: str, value: int):
    if value < 1:
        raise ValueError(f"expected {name} of at least 1, got {value}")


def expect_share(name: str, value: float):
    if not 0 <= value <= 1:
        raise ValueError(f"expected {name} between 0 and 1, got {value}")
