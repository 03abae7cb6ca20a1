"""Templates, JSON schemas, prompts for regions, and scores, as the server's clients see them."""

import copy
import enum
import json
from concurrent.futures import CancelledError
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict

pytest.importorskip("fastapi", reason="the endpoint needs the package's apps extra")

from perceptiondlm.apps.captioning.captioner import RegionCaptioner  # noqa: E402
from perceptiondlm.apps.serving.engine import Engine  # noqa: E402
from perceptiondlm.apps.serving.errors import ApiError  # noqa: E402
from perceptiondlm.apps.serving.jobs import ChatJob, RegionJob  # noqa: E402
from perceptiondlm.apps.serving.limits import Limits  # noqa: E402
from perceptiondlm.apps.serving.schemas import template_of_schema  # noqa: E402
from perceptiondlm.generation_templates import Template  # noqa: E402
from serving import image_part, served, text_part, user  # noqa: E402

BOXES = [[5, 5, 30, 30], {"box": [20, 10, 60, 40]}]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "const": 'a "thing" {x}'},
        "color": {"type": "string", "enum": ["red", "light blue"]},
        "name": {"type": "string", "description": "what it is called"},
    },
    "required": ["kind", "color", "name"],
    "additionalProperties": False,
}
TEMPLATE = {"kind": 'a "thing" {{x}}', "color": ["red", "light blue"], "name": "{1-4}"}


@pytest.fixture(scope="module")
def tree(make):
    """A captioner whose own lengths are no business of templates."""
    options = {"caption_length": 4, "max_new_tokens": 4}
    return RegionCaptioner(*make(region_layout="independent"), **options)


@pytest.fixture(scope="module")
def client(tree):
    limits = Limits(template=600, caption_length=16, new_tokens=16)
    with (
        served(tree, limits=limits) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.fixture
def image(draw_image):
    return draw_image(64, 48)


def ask(client, image, *texts: str, extra=None, **options):
    parts = [image_part(image), *map(text_part, texts)]
    return client.chat.completions.create(
        model="tester", messages=user(*parts), extra_body=extra, **options
    )


def schema_format(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}


def changed(path: str, value) -> dict:
    """Returns `SCHEMA` with something at a path set; None deletes it."""
    schema = copy.deepcopy(SCHEMA)
    *keys, last = path.split(".")
    place = schema
    for key in keys:
        place = place[key]
    place[last] = value
    if value is None:
        del place[last]
    return schema


def test_a_json_schema_fills_an_answer(client, tree, image):
    answer = ask(client, image, "what?", response_format=schema_format(SCHEMA))
    message = answer.choices[0].message
    expected = tree.ask(image, "what?", template=TEMPLATE)
    assert message.content == expected.answers[0]
    fields = json.loads(message.content)
    assert fields == message.fields == expected.fields[0] and list(fields) == list(TEMPLATE)
    assert fields["kind"] == 'a "thing" {x}' and fields["color"] in ("red", "light blue")
    assert message.score == pytest.approx(expected.scores[0], abs=1e-3)
    assert answer.choices[0].finish_reason == "stop"
    again = [*user(image_part(image)), message.model_dump(), {"role": "user", "content": "sure?"}]
    assert client.chat.completions.create(model="tester", messages=again).choices  # as history


def test_a_json_schema_fills_each_region(client, tree, image):
    answer = ask(client, image, extra={"masks": BOXES}, response_format=schema_format(SCHEMA))
    regions = answer.choices[0].message.regions
    expected = tree(image, BOXES, template=TEMPLATE)
    assert [region["caption"] for region in regions] == expected.captions
    for region, own in zip(regions, expected.regions, strict=True):
        assert json.loads(region["caption"]) == region["fields"] == own.fields
    assert json.loads(answer.choices[0].message.content) == {"regions": regions}


@pytest.mark.parametrize("extra", [{}, {"masks": BOXES}], ids=["answer", "regions"])
def test_a_stream_ends_with_the_same_json(client, image, extra):
    options = {"extra": extra, "response_format": schema_format(SCHEMA)}
    whole = ask(client, image, "what?", **options).choices[0].message
    chunks = list(ask(client, image, "what?", stream=True, **options))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == whole.content
    assert all(
        text == "░" for c in chunks if hasattr(c, "denoising") for text in c.denoising["texts"]
    )


def test_openais_parse_takes_a_class_of_strings_enums_and_constants(client, image):
    class Size(enum.Enum):
        LARGE = "large"
        SMALL = "small"

    class Thing(BaseModel):
        model_config = ConfigDict(title="A thing")
        size: Size
        color: Literal["red", "blue"]
        kind: Literal["thing"]
        name: str

    answer = client.chat.completions.parse(
        model="tester", messages=user(image_part(image)), response_format=Thing
    )
    found = answer.choices[0].message.parsed
    assert isinstance(found, Thing) and found.kind == "thing" and found.name


def test_more_free_strings_have_fewer_tokens():
    for count, field in ((1, "{1-4}"), (3, "{1-4}"), (4, "{1-2}"), (6, "{1-2}")):
        names = [f"n{k}" for k in range(count)]
        schema = SCHEMA | {"required": names, "properties": {n: {"type": "string"} for n in names}}
        template = template_of_schema(schema)
        assert template == dict.fromkeys(names, field)
        assert Template.parse(template).num_lengths <= 64


SEVEN = {f"n{k}": {"type": "string"} for k in range(7)}
UNSUPPORTED = [
    (changed("type", "array"), "type", "expected 'object'"),
    (changed("properties", {}), "properties", "a schema for each field"),
    (changed("properties.name.type", "integer"), "properties.name.type", "expected 'string'"),
    (changed("properties.name.type", ["string", "null"]), "properties.name.type", "'string'"),
    (changed("properties.name", {"type": "object"}), "properties.name.type", "'string'"),
    (changed("properties.name", {}), "properties.name.type", "expected 'string', got None"),
    (changed("properties.name", True), "properties.name", "expected an object"),
    (changed("properties.name.maxLength", 5), "properties.name.maxLength", "only type, enum"),
    (changed("properties.name.pattern", "a+"), "properties.name.pattern", "only type, enum"),
    (changed("properties.name.anyOf", []), "properties.name.anyOf", "only type, enum"),
    (changed("properties.name", {"$ref": "#/$defs/A"}), "properties.name.$ref", "only type"),
    (changed("properties.color.enum", []), "properties.color.enum", "1 to 256 different strings"),
    (changed("properties.color.enum", ["a", 3]), "properties.color.enum", "1 to 256 different"),
    (changed("properties.color.enum", ["a", "a"]), "properties.color.enum", "1 to 256 different"),
    (changed("properties.kind.const", 3), "properties.kind.const", "expected a string"),
    (changed("required", ["kind", "color"]), "required", "expected all of"),
    (changed("required", None), "required", "expected all of"),
    (changed("additionalProperties", None), "additionalProperties", "expected false, got None"),
    (changed("additionalProperties", True), "additionalProperties", "expected false, got True"),
    (changed("oneOf", []), "oneOf", "expected only type, properties"),
    (SCHEMA | {"properties": SEVEN, "required": list(SEVEN)}, "properties", "at most 6 strings"),
]


@pytest.mark.parametrize(
    ("schema", "place", "message"),
    UNSUPPORTED,
    ids=[f"{p}-{k}" for k, (_, p, _) in enumerate(UNSUPPORTED)],
)
def test_another_schema_is_refused_by_its_place(schema, place, message):
    with pytest.raises(ApiError, match=message) as refusal:
        template_of_schema(schema)
    assert refusal.value.param == f"response_format.json_schema.schema.{place}"
    assert refusal.value.status == 400 and "flat objects of strings" in str(refusal.value)


def test_a_template_fills_answers_and_regions(client, tree, image):
    template = "a {color:red|light blue} {2}"
    answer = ask(client, image, "what?", extra={"template": template}).choices[0].message
    expected = tree.ask(image, "what?", template=template)
    assert answer.content == expected.answers[0] and answer.content.startswith("a ")
    assert answer.fields == {str(k): v for k, v in expected.fields[0].items()}
    extra = {"template": template, "masks": BOXES}
    regions = ask(client, image, extra=extra).choices[0].message.regions
    expected = tree(image, BOXES, template=template)
    assert [region["caption"] for region in regions] == expected.captions


def test_regions_have_prompts_of_their_own(client, tree, image):
    prompts = ["is it in front of <region 1>?", None]
    for texts in ((), ("name it",)):
        instruction = texts[0] if texts else None
        extra = {"masks": BOXES, "prompts": prompts}
        regions = ask(client, image, *texts, extra=extra).choices[0].message.regions
        expected = tree(image, BOXES, questions=prompts, instruction=instruction)
        assert [region["caption"] for region in regions] == expected.captions
        out = tree.model.diffusion_generate(
            image, BOXES, [prompts[0], instruction], processor=tree.processor, caption_length=4
        )
        assert expected.captions == out.texts[0]


def test_the_joint_layout_answers_each_regions_prompt(make, image):
    captioner = RegionCaptioner(*make(), caption_length=4)
    with Engine(captioner, window=0.0) as engine:
        for prompts in (["a?", None], ["a?", "a?"]):
            expected = captioner(image, BOXES, questions=prompts).captions
            for _ in range(2):
                done = engine.submit(RegionJob.build(image, BOXES, None, prompts)).result(60)
                assert done.result.captions == expected
        with pytest.raises(ValueError, match="'independent' for a prompt that names regions"):
            engine.submit(RegionJob.build(image, BOXES, None, ["<region 1>?", None]))


def test_scores_are_the_models_own(client, tree, image):
    regions = ask(client, image, extra={"masks": BOXES}).choices[0].message.regions
    out = tree.model.diffusion_generate(
        image, BOXES, processor=tree.processor, caption_length=4, return_token_scores=True
    )
    for region, ids, scores in zip(regions, out.lengths[0], out.token_scores[0], strict=True):
        mean = sum(scores[: ids + 1]) / len(scores[: ids + 1])
        assert region["score"] == pytest.approx(mean, abs=2e-4)
        assert region["score"] == round(region["score"], 4)
    answer = ask(client, image, "what?").choices[0].message
    assert answer.score == pytest.approx(tree.ask(image, "what?").scores[0], abs=2e-4)


REFUSED = [
    ({"template": "no field"}, "a template with a field"),
    ({"template": "{}" * 4}, "at most 64 combinations of lengths"),
    ({"template": "{17}"}, "tokens of a template's fields of at most 16, got 17"),
    ({"template": "a" * 600 + "{}"}, "characters of a template of at most 600"),
    ({"template": "{}", "caption_length": 3, "masks": BOXES}, "no caption_length with a template"),
    ({"template": "{}", "block_length": 3}, "no block_length with a template"),
    ({"template": "{}", "stop": ["a"]}, "no stop_strings with a template"),
    ({"template": "{3} a", "max_tokens": 3}, "max_tokens of at least the template's"),
    ({"template": "{}", "response_format": schema_format(SCHEMA)}, "got both"),
    ({"response_format": {"type": "json_object"}}, "expected type json_schema"),
    ({"response_format": {"type": "json_schema"}}, "json_schema: Field required"),
    ({"prompts": ["a", None]}, "expected prompts with masks"),
    ({"prompts": ["a"], "masks": BOXES}, "expected prompts for each of 2 masks, got 1"),
    ({"prompts": ["a", " "], "masks": BOXES}, "texts or null, got a blank one"),
    ({"prompts": ["a", 3], "masks": BOXES}, "prompts\\[1\\]: Input should be a valid string"),
    ({"prompts": ["<region 2>?", None], "masks": BOXES}, "expected regions 0 to 1"),
    ({"prompts": ["a" * 30_000, None], "masks": BOXES}, "text, in characters, of at most"),
]


@pytest.mark.parametrize(("extra", "message"), REFUSED)
def test_what_does_not_fit_is_refused_before_the_queue(client, image, extra, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, image, "what?", extra=extra)


def test_the_work_of_a_template_is_its_rows_and_the_texts_to_choose_from(tree, image):
    with Engine(tree, window=0.0) as engine:

        def cost(template, job=None) -> int:
            job = job or ChatJob.ask(image, "?", template)
            ticket = engine.submit(job, steps=2)
            ticket.result(60)
            return ticket.cost, ticket.prompt_tokens

        one, prompt = cost("{3}")
        assert one == (prompt + 3 + 1) * 2  # and the end of turn
        several, _ = cost("{1-3}")
        assert several == 3 * one
        longest = len(tree.processor.tokenizer("light blue")["input_ids"])
        choosing, _ = cost("{red|light blue}{3}")
        assert choosing == (prompt + 3 + 1 + longest) * (2 + 2)
        regions, prompt = cost(None, RegionJob.build(image, BOXES, template="{1-2}"))
        assert regions == (prompt + 2 * (2 + 1 + 1)) * 2 * 2
        engine.admission.max_cost = several - 1
        with pytest.raises(ValueError, match="lengths of a template's fields"):
            engine.submit(ChatJob.ask(image, "?", "{1-3}"), steps=2)


def test_rows_of_templates_that_run_together_stay_within_the_batch(tree, image, monkeypatch):
    rows = []
    forward = tree.model.language_model.model.forward
    monkeypatch.setattr(
        tree.model.language_model.model,
        "forward",
        lambda embeds, *args, **kw: rows.append(len(embeds)) or forward(embeds, *args, **kw),
    )
    expected = tree.ask(image, "?", template="{1-3} a {1-3}").answers
    assert max(rows) == 9
    rows.clear()
    with Engine(tree, window=0.2, max_batch=4) as engine:
        jobs = [ChatJob.ask(image, "?", "{1-3} a {1-3}") for _ in range(2)]
        done = [ticket.result(60) for ticket in [engine.submit(job) for job in jobs]]
    assert [one.result.answers for one in done] == [expected] * 2
    assert max(rows) <= 4 and [one.batch_size for one in done] == [1, 1]


def test_jobs_of_different_templates_do_not_share_a_batch(tree, image):
    templates = [None, "{2}", {"a": "{2}"}, "{2}"]
    expected = [tree.ask(image, "?", template=one).answers for one in templates]
    with Engine(tree, window=0.2) as engine:
        tickets = [engine.submit(ChatJob.ask(image, "?", one)) for one in templates]
        done = [ticket.result(60) for ticket in tickets]
    assert [one.result.answers for one in done] == expected
    assert [one.batch_size for one in done] == [1, 2, 1, 2]


def test_a_job_with_several_lengths_can_be_cancelled_while_it_runs(tree, image):
    with Engine(tree, window=0.0) as engine:
        steps = []

        def leave(step):
            steps.append(step)
            ticket.cancel()

        job = RegionJob.build(image, BOXES, template="{6-9}")
        with engine._changed:  # the job waits until the ticket has its name
            ticket = engine.submit(job, on_step=leave)
        with pytest.raises(CancelledError):
            ticket.result(60)
    assert len(steps) == 1 and steps[0].texts == ["░", "░"]
