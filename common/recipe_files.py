"""Reads recipes: a YAML file and `key=value` overrides, merged by OmegaConf into typed sections."""

import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .json_text import read_text
from .option_checks import expect_known, expect_type, field_names

CONFIGS = Path(os.path.abspath(__file__)).parents[1] / "configs"


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """Reads a YAML recipe as nested plain values; each override is `section.key=value`, in YAML.

    A recipe of this package, `configs/NAME.yaml`, is found from any folder that has none of that
    name. Raises FileNotFoundError for no such file, ValueError for one that holds no sections.
    """
    file = path = Path(path)
    if path.parts[:1] == (CONFIGS.name,) and not path.exists():
        file = CONFIGS.parent / path
    if not file.is_file():
        raise FileNotFoundError(f"expected a recipe file, got {str(path)!r}: no such file")
    values = _parse(read_text(file), str(path)) or {}
    if not isinstance(values, dict):
        raise ValueError(f"expected sections in {path}, got {type(values).__name__}")

    try:
        config = OmegaConf.create(values)
        for override in overrides:
            _override(config, override)
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:  # say, of a reference to nothing
        message = str(error).splitlines()[0]
        raise ValueError(
            f"expected values of {error.full_key} in {path}, got: {message}"
        ) from error


def _override(config: DictConfig, override: str):
    """Sets one value of a recipe, by its dotted name."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"expected an override section.key=value, got {override!r}")
    OmegaConf.update(config, name, _parse(text, override), merge=False)


def typed_sections(classes: dict[str, type], values: dict) -> dict:
    """Builds each section, by its class, of plain values over the class's defaults.

    Raises ValueError, which names the key, for an unknown one or a value of another type.
    """
    types = option_types(classes)
    given = {section: values.get(section, {}) for section in classes}
    for section, options in given.items():
        expect_known(section, options, field_names(classes[section]))
        for name, value in options.items():
            # OmegaConf would make True of 1, texts of numbers, and take objects in lists of texts
            expect_type(f"{section}.{name}", value, types[f"{section}.{name}"])
    merged = OmegaConf.merge(classes, given)
    return {section: OmegaConf.to_object(merged[section]) for section in classes}


def option_types(classes: dict[str, type]) -> dict:
    """Returns the type of every key of some sections, by its dotted name."""
    hints = {section: typing.get_type_hints(cls) for section, cls in classes.items()}
    return {
        f"{section}.{name}": hints[section][name]
        for section, cls in classes.items()
        for name in field_names(cls)
    }


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2's plain values, as everyone expects: 1e-3 is a number, `no` is a word.

    OmegaConf's own reader takes `trainer.eval_strategy=no` for a false.
    """


_PLAIN_VALUES = {  # tag: what it looks like; asked in this order
    "int": r"[-+]?\d+",
    "float": r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?|[-+]?\.inf|\.nan",
    "bool": r"true|false|True|False",
    "null": r"null|~|",
}
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in _PLAIN_VALUES.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None
    )


def _parse(text: str, where: str):
    """Parses YAML; ValueError says where it stood."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"expected YAML in {where}, got: {error}") from error
