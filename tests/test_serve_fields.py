"""Every field that OpenAI documents: taken where it changes nothing, else refused by name."""

import json

import pytest

pytest.importorskip("fastapi", reason="the endpoint needs the package's apps extra")

from openai.types import chat  # noqa: E402
from openai.types.chat import completion_create_params as params  # noqa: E402
from perceptiondlm.apps.serving import request as own  # noqa: E402
from perceptiondlm.apps.serving.chat import _masks_of  # noqa: E402
from perceptiondlm.apps.serving.errors import ApiError  # noqa: E402
from perceptiondlm.generation_options import OPTIONS

MESSAGE = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "three"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TOOL = {"type": "function", "function": {"name": "look"}}
# What OpenAI documents, and whose every field has to be known here.
DOCUMENTED = {
    own.ChatRequest: (
        params.CompletionCreateParamsNonStreaming,
        params.CompletionCreateParamsStreaming,
    ),
    own.Message: (
        chat.ChatCompletionUserMessageParam,
        chat.ChatCompletionSystemMessageParam,
        chat.ChatCompletionDeveloperMessageParam,
        chat.ChatCompletionAssistantMessageParam,
    ),
    own.TextPart: (chat.ChatCompletionContentPartTextParam,),
    own.ImagePart: (chat.ChatCompletionContentPartImageParam,),
    own.StreamOptions: (chat.ChatCompletionStreamOptionsParam,),
}
NEUTRAL = {
    "store": [False],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "logit_bias": [{}],
    "top_logprobs": [0],
    "logprobs": [False],
    "service_tier": ["auto", "default"],
    "parallel_tool_calls": [True, False],
    "reasoning_effort": ["none", "low", "medium"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "frequency_penalty": [0, 0.0],
    "presence_penalty": [0, 0.0],
    "n": [1],
    "modalities": [["text"]],
    "user": ["a"],
    "metadata": [{"a": "b"}, {}],
    "response_format": [{"type": "text"}],
    "verbosity": ["medium"],
    "prompt_cache_key": ["a"],
    "prompt_cache_retention": ["24h", "in_memory"],
    "prompt_cache_options": [{"mode": "implicit"}],
    "safety_identifier": ["a"],
    "stream": [False],
    "stop": [[]],
    "stream_options": [{"include_usage": True}, {}],
    "temperature": [0],
    "top_p": [1],
    "seed": [3],
    "max_tokens": [5],
}
MEANINGFUL = {
    "store": True,
    "tools": [TOOL],
    "tool_choice": "required",
    "logit_bias": {"5": 100},
    "top_logprobs": 3,
    "logprobs": True,
    "service_tier": "flex",
    "reasoning_effort": "high",
    "functions": [{"name": "look"}],
    "function_call": {"name": "look"},
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "n": 2,
    "modalities": ["text", "audio"],
    "verbosity": "low",
    "audio": {"format": "wav", "voice": "a"},
    "response_format": {"type": "json_object"},
    "prediction": {"type": "content", "content": "a"},
    "web_search_options": {},
    "moderation": {"model": "omni-moderation-latest"},
    "max_tokens": 0,
    "color": None,
}


def read(**fields) -> own.ChatRequest:
    content = {"model": "tester", "messages": [MESSAGE]} | fields
    return own.read_request(json.dumps(content).encode())


@pytest.mark.parametrize("model", DOCUMENTED, ids=lambda model: model.__name__)
def test_every_documented_field_is_known(model):
    documented = {name for kind in DOCUMENTED[model] for name in kind.__annotations__}
    assert documented <= set(model.model_fields)


@pytest.mark.parametrize("name", sorted(set(own.ChatRequest.model_fields) - {"model", "messages"}))
def test_null_is_as_if_the_field_were_not_there(name):
    assert read(**{name: None}) == read()


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_value_is_taken(name):
    for value in NEUTRAL[name]:
        read(**{name: value})


@pytest.mark.parametrize("name", MEANINGFUL)
def test_a_meaningful_value_is_refused_by_name(name):
    with pytest.raises(ApiError, match=name) as refusal:
        read(**{name: MEANINGFUL[name]})
    assert refusal.value.status == 400 and refusal.value.param.startswith(name)


@pytest.mark.parametrize(
    "extra",
    [
        {"refusal": None},
        {"tool_calls": None},
        {"tool_calls": []},
        {"function_call": None},
        {"audio": None},
        {"annotations": []},
        {"name": "model"},
        {"regions": [{"region": 1}]},
    ],
    ids=str,
)
def test_an_earlier_answer_is_taken_with_its_neutral_fields(extra):
    read(messages=[MESSAGE, ANSWER | extra, MESSAGE])


@pytest.mark.parametrize(
    "extra", [{"refusal": "No."}, {"tool_calls": [{"id": "a"}]}, {"audio": {"id": "a"}}], ids=str
)
def test_an_earlier_answer_that_was_more_than_text_is_refused_by_name(extra):
    with pytest.raises(ApiError) as refusal:
        read(messages=[MESSAGE, ANSWER | extra, MESSAGE])
    assert refusal.value.param == f"messages[1].{next(iter(extra))}"


def test_hints_of_parts_are_taken_and_other_kinds_of_parts_refused():
    hint = {"prompt_cache_breakpoint": {"mode": "explicit"}}
    detailed = {"type": "image_url", "image_url": IMAGE["image_url"] | {"detail": "original"}}
    read(messages=[{"role": "user", "content": [IMAGE | hint, detailed]}])
    for part in (
        {"type": "input_audio", "input_audio": {}},
        {"type": "file", "file": {}},
        {"type": "refusal", "refusal": "No."},
    ):
        with pytest.raises(ApiError, match=part["type"]):
            read(messages=[{"role": "user", "content": [part]}])


def test_a_byte_order_mark_before_json_is_no_matter():
    content = {"model": "tester", "messages": [MESSAGE]}
    body = json.dumps(content).encode("utf-8-sig")
    assert own.read_request(bytearray(body)) == own.read_request(json.dumps(content).encode())
    masks = '\ufeff{"masks": [[1, 2, 3, 4]]}'
    message = {"role": "user", "content": [{"type": "text", "text": masks}]}
    request = own.read_request(json.dumps({"model": "tester", "messages": [message]}).encode())
    assert _masks_of(request) == [[1, 2, 3, 4]]


def test_an_error_names_the_fields_place_and_no_more():
    wrong = {"type": "image_url", "image_url": {"url": 3}}
    places = {
        "messages[0].content[1].image_url.url": [MESSAGE | {"content": [IMAGE, wrong]}],
        "messages[0].content[0].text": [MESSAGE | {"content": [{"type": "text", "text": 3}]}],
        "messages[0].role": [{"role": "tool", "content": "a"}],
    }
    for place, messages in places.items():
        with pytest.raises(ApiError) as refusal:
            read(messages=messages)
        assert refusal.value.param == place


def test_a_request_sets_every_decoding_option_that_is_a_number_or_a_choice():
    """Written out by hand: the fields are made of the options' one declaration."""
    names = {
        "steps", "caption_length", "block_length", "temperature", "top_k", "top_p", "cfg_scale",
        "remasking", "threshold", "factor", "entropy_bound", "remask_below",
        "prompt_refresh_interval", "seed", "block_cache", "early_stop", "fast",
    }  # fmt: skip
    assert set(OPTIONS) & set(own.request_schema()["properties"]) == names


def test_an_options_old_name_is_refused_with_the_new_one():
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "prompt_cache": 4}
    with pytest.raises(ApiError, match="expected prompt_refresh_interval, got prompt_cache"):
        own.read_request(json.dumps(body).encode())
