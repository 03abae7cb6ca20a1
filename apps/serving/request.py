"""Reads OpenAI's chat completion request: every documented field, and this server's own.

Fields that mean something here are read. Every other documented field of the request, its messages
and their parts is taken where it changes nothing (null, an empty list of tools, `store: false`, a
label of the caller's own) and refused by name where it asks for something that is not done here.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
)
from pydantic_core import from_json

from ...common.json_text import without_mark
from ...generation_options import OPTIONS, RENAMED
from .errors import ApiError

MAX_KEYS, MAX_ITEMS = 64, 256  # of an object and a list in a request, masks apart
SHOWN = 200  # characters of a client's input that an error repeats
UNION_MEMBERS = (
    "str",
    "text",
    "image_url",
    "mask",
    "json_schema",
)  # in pydantic's places, not in the request's

# Decoding options that a request sets by their own names: not an answer's length, which OpenAI
# calls max_tokens, nor what concerns the whole batch.
NOT_ASKED = ("max_new_tokens", "batch_size", "compile")
DECODING = {
    name: declared
    for name, declared in OPTIONS.items()
    if declared.metadata["kind"] is not None and name not in NOT_ASKED
}

# Types of fields that change nothing here: what they may be.
Nothing = None
NoItems = Annotated[list[Any], Field(max_length=0)] | None
NoKeys = Annotated[dict[str, Any], Field(max_length=0)] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None
Label = str | None  # the caller's own bookkeeping
Hint = Any  # of how OpenAI should cache: nothing is cached between requests here


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class TextPart(Model):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Hint = None


class ImageUrl(Model):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None  # all images are seen alike


class ImagePart(Model):
    type: Literal["image_url"]
    image_url: ImageUrl
    prompt_cache_breakpoint: Hint = None


class MaskPart(Model):
    """This server's own: one region mask of the message's image, as in the `masks` field."""

    type: Literal["mask"]
    mask: Any


Part = Annotated[TextPart | ImagePart | MaskPart, Field(discriminator="type")]


class Message(Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: Label = None
    refusal: Nothing = None
    annotations: NoItems = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: NoItems = None
    # beside this server's own answers, whose text says the same
    regions: list[Any] | None = None
    score: float | None = None
    fields: Any = None


class StreamOptions(Model):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Model):
    type: Literal["text"]


class JsonSchema(Model):
    name: Label = None
    description: Label = None
    strict: bool | None = None  # a schema is always kept to
    object_schema: dict[str, Any] = Field(alias="schema")


class SchemaFormat(Model):
    type: Literal["json_schema"]
    json_schema: JsonSchema


def _expect_schema(value):
    if isinstance(value, dict) and value.get("type") == "json_object":
        raise ValueError("expected type json_schema, whose schema names the object's fields")
    return value


ResponseFormat = Annotated[
    Annotated[TextFormat | SchemaFormat, Field(discriminator="type")],
    BeforeValidator(_expect_schema),
]


class _Fields(Model):
    """The fields of a request but for the decoding options."""

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    # this server's own
    task: Literal["regions", "question"] | None = None
    masks: list[Any] | None = None
    prompts: list[str | None] | None = None  # of each region mask; null: as the message says
    template: str | None = None
    # OpenAI's, taken where they change nothing
    audio: Nothing = None
    frequency_penalty: Zero = None
    function_call: Literal["none", "auto"] | None = None  # there are no functions to call
    functions: NoItems = None
    logit_bias: NoKeys = None
    logprobs: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1)] | None = None
    moderation: Nothing = None
    n: Literal[1] | None = None
    parallel_tool_calls: bool | None = None
    prediction: Nothing = None
    presence_penalty: Zero = None
    prompt_cache_key: Label = None
    prompt_cache_options: Hint = None
    prompt_cache_retention: Hint = None
    reasoning_effort: Literal["none", "minimal", "low", "medium"] | None = None  # at most so much
    response_format: ResponseFormat | None = None
    safety_identifier: Label = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: NoItems = None
    top_logprobs: Zero = None
    user: Label = None
    verbosity: Literal["medium"] | None = None
    web_search_options: Nothing = None


# OpenAI's temperature, top_p and seed are among the decoding options and mean the same.
ChatRequest = create_model(
    "ChatRequest",
    __base__=_Fields,
    __doc__="A request for a chat completion.",
    **{
        name: (declared.metadata["kind"] | None, Field(None, description=declared.metadata["text"]))
        for name, declared in DECODING.items()
    },
)


def expect_model(known: str, name: str):
    """Raises ApiError 404 for another model's name."""
    if name != known:
        raise ApiError(
            404,
            f"expected the model {known!r}, got {name[:200]!r}",
            code="model_not_found",
            param="model",
        )


def read_request(body: bytes | bytearray) -> ChatRequest:
    """Parses a body; raises ApiError 400, which says what field is wrong."""
    try:
        content = from_json(without_mark(body))
    except ValueError as error:
        raise ApiError(400, f"expected JSON, got: {error}", code="invalid_request") from error
    _expect_small(content)
    try:
        return ChatRequest.model_validate(content)
    except ValidationError as error:
        raise _refusal(error) from error


def request_schema() -> dict:
    """Returns the JSON schema of a request, without references, for the OpenAPI document."""
    schema = ChatRequest.model_json_schema()
    return _inlined(schema, schema.pop("$defs"))


def _inlined(schema, definitions: dict):
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    kept = {k: v for k, v in schema.items() if k != "discriminator"}  # it names references
    return {key: _inlined(value, definitions) for key, value in kept.items()}


def _refusal(error: ValidationError) -> ApiError:
    errors = error.errors(include_url=False, include_context=False)
    same = [other for other in errors if other["loc"][:1] == errors[0]["loc"][:1]]
    first = max(same, key=lambda other: len(other["loc"]))  # of a union's members, the likeliest
    place = _place(first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    message = f"{place}: {said}" if place else said
    if place in RENAMED:
        message = f"expected {RENAMED[place]}, got {place}, which is its old name"
    elif first["type"] != "missing":
        message += f", got {first['input']!r:.{SHOWN}}"
    return ApiError(400, message, code="invalid_request", param=place or None)


def _expect_small(value, depth: int = 6):
    """Refuses objects and lists so large that there would be an error for each of millions."""
    # Masks are lists of numbers, which have a limit of their own.
    if isinstance(value, dict):
        if len(value) > MAX_KEYS:
            raise ApiError(
                400,
                f"expected objects of at most {MAX_KEYS} keys, got {len(value)}",
                code="invalid_request",
            )
        value = [item for key, item in value.items() if key not in ("masks", "mask")]

    elif isinstance(value, list) and len(value) > MAX_ITEMS:
        raise ApiError(
            400,
            f"expected lists of at most {MAX_ITEMS} items, got {len(value)}",
            code="invalid_request",
        )

    if isinstance(value, list) and depth:
        for item in value:
            _expect_small(item, depth - 1)


def _place(loc: tuple) -> str:
    """Returns `messages[0].content[1].image_url.url`, without the names of union members."""
    text, in_union = "", False
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and not (in_union and part in UNION_MEMBERS):
            text += f".{part}" if text else part
        # a union's member is named behind the field or the item that it belongs to
        in_union = isinstance(part, int) or part in ("content", "stop", "response_format")
    return text
