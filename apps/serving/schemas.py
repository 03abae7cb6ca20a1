"""Turns a request's `template`, or the JSON schema of its `response_format`, into a template.

A schema is one of a flat object: each property a string, free or one of some texts. What it demands
beyond that could not be honored, so it is refused by the place where it stands.
"""

import json

from ...generation_templates import MAX_CHOICES, MAX_LENGTHS, Template
from .errors import ApiError
from .limits import Limits, expect_at_most
from .request import ChatRequest

ROOT = "response_format.json_schema.schema"
NOTES = ("title", "description", "examples", "$schema", "$id", "$comment")  # which demand nothing
OBJECT = ("type", "properties", "required", "additionalProperties", "$defs", "definitions")
STRING = ("type", "enum", "const")
SUPPORTED = "supported are flat objects of strings, with enum or const where they are known"
# The most tokens of each free string, and how many of them there may be.
STRING_LENGTHS = {4: 3, 2: 6}
assert all(length**count <= MAX_LENGTHS for length, count in STRING_LENGTHS.items())

TemplateForm = str | dict[str, str | list[str]]


def template_of(request: ChatRequest, limits: Limits, max_tokens: int) -> TemplateForm | None:
    """Returns the template that a request asks for, checked; None where it asks for none.

    Raises ApiError or ValueError for one that is none, or larger than the limits and `max_tokens`.
    """
    template = request.template
    if request.response_format is not None and request.response_format.type == "json_schema":
        if template is not None:
            raise ApiError(
                400,
                "expected a template or a response_format of type json_schema, got both",
                code="invalid_input",
                param="template",
            )
        template = template_of_schema(request.response_format.json_schema.object_schema)
    if template is None:
        return None

    expect_at_most("characters of a template", len(json.dumps(template)), limits.template)
    fields = Template.parse(template).fields
    tokens = sum(own.max_length for own in fields if not own.choices)
    expect_at_most("tokens of a template's fields", tokens, max_tokens)
    return template


def template_of_schema(schema: dict) -> dict[str, str | list[str]]:
    """Returns the template of a JSON schema; raises ApiError, which names the place, for others."""
    _expect_keys(schema, OBJECT, ROOT)
    if schema.get("type") != "object":
        raise _refusal(f"{ROOT}.type", "'object'", schema.get("type"))
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not properties:
        raise _refusal(f"{ROOT}.properties", "an object with a schema for each field", properties)

    # As OpenAI's strict mode demands: nothing is left open.
    if schema.get("additionalProperties") is not False:
        place = f"{ROOT}.additionalProperties"
        raise _refusal(place, "false", schema.get("additionalProperties"))
    required = schema.get("required")
    if not isinstance(required, list) or sorted(map(str, required)) != sorted(properties):
        raise _refusal(f"{ROOT}.required", f"all of {sorted(properties)}", required)

    definitions = {
        f"#/{name}/{key}": value
        for name in ("$defs", "definitions")
        if isinstance(schema.get(name), dict)
        for key, value in schema[name].items()
    }
    values = {
        key: _value_of(definitions.get(_reference(own), own), f"{ROOT}.properties.{key}")
        for key, own in properties.items()
    }
    return _with_lengths(values)


def _reference(schema) -> str | None:
    """Returns the place that a property refers to, as an Enum of pydantic's does."""
    found = schema.get("$ref") if isinstance(schema, dict) else None
    return found if isinstance(found, str) else None


def _value_of(schema, place: str) -> str | list[str] | None:
    """Returns a property's template: a fixed text, a list to choose from, None for a free one."""
    if not isinstance(schema, dict):
        raise _refusal(place, "an object", schema)
    _expect_keys(schema, STRING, place)
    if schema.get("type", "string" if "enum" in schema or "const" in schema else None) != "string":
        raise _refusal(f"{place}.type", "'string'", schema.get("type"))

    if "const" in schema:
        const = schema["const"]
        if not isinstance(const, str) or const not in schema.get("enum", [const]):
            raise _refusal(f"{place}.const", "a string, one of enum if there is one", const)
        return const.replace("{", "{{").replace("}", "}}")
    if "enum" not in schema:
        return None
    choices = schema["enum"]
    are_texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if not are_texts or not 0 < len(choices) <= MAX_CHOICES or len(set(choices)) < len(choices):
        expected = f"1 to {MAX_CHOICES} different strings that are not blank"
        raise _refusal(f"{place}.enum", expected, choices)
    return choices


def _with_lengths(values: dict[str, str | list[str] | None]) -> dict[str, str | list[str]]:
    """Gives the free strings as many tokens as can be tried, each length of each with the others'.

    Raises ApiError for more of them than that.
    """
    free = sum(value is None for value in values.values())
    lengths = [length for length, count in STRING_LENGTHS.items() if free <= count]
    if not lengths:
        raise _refusal(
            f"{ROOT}.properties",
            f"at most {max(STRING_LENGTHS.values())} strings without enum or const",
            free,
        )
    field = f"{{1-{max(lengths)}}}"
    return {key: field if value is None else value for key, value in values.items()}


def _expect_keys(schema: dict, known: tuple[str, ...], place: str):
    for key in schema:
        if key not in known and key not in NOTES:
            raise _refusal(f"{place}.{key}", f"only {', '.join(known)}", key)


def _refusal(place: str, expected: str, got) -> ApiError:
    message = f"{place}: expected {expected}, got {got!r:.120}; {SUPPORTED}"
    return ApiError(400, message, code="invalid_input", param=place)
