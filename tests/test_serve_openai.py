"""The endpoint as OpenAI's own client sees it."""

import json
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the endpoint needs the package's apps extra")

from perceptiondlm.apps.captioning.captioner import RegionCaptioner  # noqa: E402
from perceptiondlm.apps.captioning.outputs import encode_mask  # noqa: E402
from perceptiondlm.apps.serving import events  # noqa: E402
from perceptiondlm.apps.serving.engine import Engine  # noqa: E402
from perceptiondlm.apps.serving.jobs import ChatJob  # noqa: E402
from perceptiondlm.apps.serving.limits import Limits  # noqa: E402
from perceptiondlm.apps.serving.pool import shared_pool  # noqa: E402
from serving import counted, data_url, image_part, mask_part, served, text_part, user  # noqa: E402
from shapes import shapes_captioner  # noqa: E402

VECTORS = Path(__file__).parent / "fixtures" / "vectors"
IMAGE = VECTORS / "region_0.png"
MASKS = [VECTORS / f"region_0_mask_{i}.png" for i in range(3)]
SHORT = {"caption_length": 8}
REGIONS = SHORT | {"task": "regions"}


@pytest.fixture(scope="module")
def captioner(load):
    return RegionCaptioner(*load("released-region"))


@pytest.fixture(scope="module")
def address(captioner):
    with served(captioner) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, messages, *, extra=SHORT, **options):
    return client.chat.completions.create(
        model="tester", messages=messages, extra_body=extra, **options
    )


def captions_of(answer) -> list[str]:
    return [region["caption"] for region in answer.choices[0].message.regions]


def mask_arrays() -> list[np.ndarray]:
    return [np.asarray(Image.open(mask).convert("L")) != 0 for mask in MASKS]


def with_alpha(mask: np.ndarray) -> Image.Image:
    image = Image.open(IMAGE).convert("RGB")
    image.putalpha(Image.fromarray(mask.astype(np.uint8) * 255))
    return image


MASK_FORMS = {
    "body_rle": lambda: (user(image_part(IMAGE)), [encode_mask(m) for m in mask_arrays()]),
    "body_data_urls": lambda: (user(image_part(IMAGE)), [data_url(m) for m in MASKS]),
    "message_json": lambda: (
        user(
            image_part(IMAGE),
            text_part(json.dumps({"masks": [encode_mask(m) for m in mask_arrays()]})),
        ),
        None,
    ),
    "mask_parts": lambda: (
        user(image_part(IMAGE), *(mask_part(data_url(m)) for m in MASKS)),
        None,
    ),
    "image_parts": lambda: (user(image_part(IMAGE), *map(image_part, MASKS)), "regions"),
    "alpha_parts": lambda: (
        user(image_part(IMAGE), *(image_part(with_alpha(m)) for m in mask_arrays())),
        "regions",
    ),
}


@pytest.mark.parametrize("form", MASK_FORMS)
def test_captions_equal_the_librarys_however_masks_are_sent(client, captioner, form):
    messages, said = MASK_FORMS[form]()
    extra = SHORT | ({} if said is None else {"task" if said == "regions" else "masks": said})
    answer = ask(client, messages, extra=extra)
    expected = captioner(IMAGE, MASKS, **SHORT)
    if form != "alpha_parts":  # a black pixel inside the region is none of its mask
        assert captions_of(answer) == expected.captions
    assert len(captions_of(answer)) == 3
    assert json.loads(answer.choices[0].message.content) == {
        "regions": answer.choices[0].message.regions
    }


def test_the_images_own_alpha_is_a_region_when_regions_are_asked_for(client, captioner):
    mask = mask_arrays()[0]
    answer = ask(client, user(image_part(with_alpha(mask))), extra=REGIONS)
    assert captions_of(answer) == captioner(IMAGE, [mask], **SHORT).captions


def test_boxes_and_polygons_are_regions(client, captioner):
    masks = [{"box": [10, 10, 60, 40]}, [[20, 20, 90, 30, 50, 80]], [5, 5, 30, 30]]
    answer = ask(client, user(image_part(IMAGE)), extra=SHORT | {"masks": masks})
    assert captions_of(answer) == captioner(IMAGE, masks, **SHORT).captions
    assert answer.choices[0].message.regions[0]["box"] == [10, 10, 60, 40]


def test_text_beside_masks_is_the_instruction(client, captioner):
    parts = [image_part(IMAGE), text_part("Name each region.")]
    answer = ask(client, user(*parts), extra=SHORT | {"masks": [[5, 5, 30, 30]]})
    expected = captioner(IMAGE, [[5, 5, 30, 30]], instruction="Name each region.", **SHORT)
    assert captions_of(answer) == expected.captions


def test_a_question_is_answered_as_text(client, captioner):
    parts = [image_part(IMAGE), text_part("What is it?")]
    answer = ask(client, user(*parts), extra=None, max_tokens=8)
    expected = captioner.ask(IMAGE, "What is it?", max_new_tokens=8)
    assert answer.choices[0].message.content == expected.answers[0]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.perceptiondlm["num_forwards"] == expected.num_forwards


def test_a_conversation_goes_through_the_chat_template(client, captioner):
    processor = captioner.processor
    turns = [("user", "What is it?"), ("assistant", "A cup."), ("user", "Sure?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, max_new_tokens=8)
    expected = captioner.model.diffusion_generate(inputs=inputs, processor=processor)
    answer = ask(client, messages, extra=None, max_tokens=8)
    assert answer.choices[0].message.content == expected.texts[0][0]
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1] - 8


def test_a_question_about_an_image_with_one_transparent_pixel_is_a_question(client, captioner):
    mask = np.ones(Image.open(IMAGE).size[::-1], bool)
    mask[0, 0] = False
    parts = [image_part(with_alpha(mask)), text_part("What is it?")]
    answer = ask(client, user(*parts), extra=None, max_tokens=8)
    expected = captioner.ask(with_alpha(mask), "What is it?", max_new_tokens=8)
    assert answer.choices[0].message.content == expected.answers[0]


def test_a_question_about_two_images_is_a_question(client, captioner):
    files = [IMAGE, VECTORS / "region_1.png"]
    images = [Image.open(file).convert("RGB") for file in files]
    output = captioner.model.diffusion_generate(
        images=[images], prompts=["Which is it?"], processor=captioner.processor, max_new_tokens=8
    )
    parts = [*map(image_part, files), text_part("Which is it?")]
    answer = ask(client, user(*parts), extra=None, max_tokens=8)
    assert answer.choices[0].message.content == output.texts[0][0]


def test_an_answer_of_the_servers_own_is_taken_as_history(client):
    parts = [image_part(IMAGE), text_part("What is it?")]
    first = ask(client, user(*parts), extra=None, max_tokens=4).choices[0].message
    masks = [mask_part({"box": [5, 5, 30, 30]})]
    captions = ask(client, user(image_part(IMAGE), *masks)).choices[0].message
    for asked, own in ((user(*parts), first), (user(image_part(IMAGE), *masks), captions)):
        for said in (own, own.model_dump(), own.model_dump(exclude_none=True)):
            messages = [*asked, said, {"role": "user", "content": "Sure?"}]
            assert ask(client, messages, extra=None, max_tokens=2).choices[0].message.content


def test_a_max_tokens_beyond_the_limit_is_the_limit_and_the_reason_says_length(captioner):
    limits = Limits(new_tokens=8, caption_length=4)
    with (
        served(captioner, limits=limits) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        parts = [image_part(IMAGE), text_part("What is it?")]
        answer = ask(client, user(*parts), extra=None, max_tokens=2048)
        expected = captioner.ask(IMAGE, "What is it?", max_new_tokens=8)
        assert answer.choices[0].message.content == expected.answers[0]
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 8)
        masks = {"masks": [[5, 5, 30, 30]]}
        answer = ask(client, user(image_part(IMAGE)), extra=masks, max_completion_tokens=10**9)
        assert captions_of(answer) == captioner(IMAGE, **masks, caption_length=4).captions


def test_a_max_tokens_beyond_the_models_positions_is_what_they_leave(captioner):
    with Engine(captioner) as engine:
        job = ChatJob.ask(IMAGE, "What is it?")
        options = {"steps": 1, "max_new_tokens": 10**6}
        with pytest.raises(ValueError, match="at most 4096 tokens"):
            engine.submit(job, **options)
        ticket = engine.submit(job, shorten="max_new_tokens", **options)
        assert ticket.prompt_tokens + ticket.options["max_new_tokens"] == 4096
        ticket.cancel()


def test_an_answer_with_far_more_room_than_it_needs_costs_few_forward_passes():
    with Engine(shapes_captioner()) as engine:  # its own answers are short
        job = ChatJob.ask(IMAGE, "What color is it?")
        done = engine.submit(job, shorten="max_new_tokens", max_new_tokens=256).result(60)
    assert done.ended and done.result.num_forwards < 32
    assert len(done.result.answers[0].split()) == done.completion_tokens == 1


def test_the_endpoint_describes_itself(address):
    assert "openapi.json" in httpx.get(f"{address}/docs").text
    described = httpx.get(f"{address}/openapi.json").json()["paths"]["/v1/chat/completions"]
    schema = described["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "masks", "task", "tools"} <= set(schema["properties"])
    assert "$ref" not in json.dumps(schema)


def test_decoding_options_change_the_result_as_in_the_library(client, captioner):
    for options in ({"steps": 2}, {"temperature": 1.0, "seed": 5}, {"factor": 1.0}):
        masks = [{"box": [10, 10, 60, 40]}]
        extra = SHORT | {"masks": masks} | options
        answer = ask(client, user(image_part(IMAGE)), extra=extra)
        expected = captioner(IMAGE, masks, **SHORT, **options)
        assert captions_of(answer) == expected.captions
        assert answer.perceptiondlm["num_forwards"] == expected.num_forwards


def test_usage_counts_the_processors_tokens(client, captioner):
    answer = ask(client, user(image_part(IMAGE), *map(image_part, MASKS)), extra=REGIONS)
    inputs = captioner.processor(IMAGE, masks=MASKS, **SHORT)
    markers = 3 + 2 + 1  # one a caption, newlines between, the end of turn
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1] - 3 * 8 - markers


def test_a_stream_shows_states_and_ends_with_the_whole_text(client, captioner):
    stream = ask(
        client,
        user(image_part(IMAGE), *map(image_part, MASKS)),
        extra=REGIONS,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    expected = captioner(IMAGE, MASKS, **SHORT)
    assert [r["caption"] for r in json.loads(content)["regions"]] == expected.captions
    steps = [c.denoising["step"] for c in chunks if hasattr(c, "denoising")]
    assert steps == sorted(set(steps)) and steps[-1] <= 8
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.total_tokens > 0


def test_a_streamed_question_adds_up_to_the_answer(client, captioner):
    parts = [image_part(IMAGE), text_part("What is it?")]
    stream = ask(client, user(*parts), extra=None, max_tokens=8, stream=True)
    content = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert content == captioner.ask(IMAGE, "What is it?", max_new_tokens=8).answers[0]


def test_a_stream_that_waits_shows_signs_of_life(captioner, monkeypatch):
    monkeypatch.setattr(events, "PING_SECONDS", 0.05)
    body = {"model": "tester", "messages": user(image_part(IMAGE)), "stream": True, **SHORT}
    with served(captioner, engine={"window": 0.5}) as (address, _):
        answer = httpx.post(
            f"{address}/v1/chat/completions", json=body | {"masks": [[5, 5, 30, 30]]}, timeout=30
        )
    blocks = answer.text.removesuffix("\n\n").split("\n\n")
    assert blocks.count(": waiting") >= 2 and blocks[-1] == "data: [DONE]"
    assert {block[:6] for block in blocks} == {"data: ", ": wait"}
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert "connection" not in answer.headers  # which only a server that stops says


def test_the_model_is_listed_and_another_one_is_unknown(client):
    assert [model.id for model in client.models.list()] == ["tester"]
    assert client.models.retrieve("tester").owned_by == "perceptiondlm"
    with pytest.raises(openai.NotFoundError) as refusal:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "?"}])
    assert refusal.value.code == "model_not_found"


def test_health_and_metrics(address, client):
    ask(client, user(image_part(IMAGE)), extra=SHORT | {"masks": [[5, 5, 30, 30]]})
    health = httpx.get(f"{address}/health").json()
    assert health["status"] == "ok" and health["model"] == "tester"
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    values = dict(line.split(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["perceptiondlm_completed_total"]) >= 1
    assert float(values["perceptiondlm_up"]) == 1


def test_a_key_is_asked_for_when_there_is_one(captioner):
    with served(captioner, api_key="secret") as (address, _):
        for key, allowed in (("wrong", False), ("secret", True)):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
                if allowed:
                    assert client.models.list().data
                else:
                    with pytest.raises(openai.AuthenticationError):
                        client.models.list()
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_client_that_leaves_frees_its_place(captioner):
    with served(captioner, engine={"window": 30.0}) as (address, engine):
        body = {"model": "tester", "messages": user(image_part(IMAGE)), "masks": [[5, 5, 30, 30]]}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/chat/completions", json=body, timeout=1.0)
        stream = body | {"stream": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=stream) as response:
            next(response.iter_lines())
        give_up = time.monotonic() + 10
        while counted(engine, "cancelled") < 2 and time.monotonic() < give_up:
            time.sleep(0.05)
        assert counted(engine, "cancelled") == 2
        assert engine.queue_length == 0


def test_a_full_queue_answers_429_with_retry_after(captioner):
    with served(captioner, engine={"window": 1.0, "max_queue": 1}) as (address, engine):
        body = {
            "model": "tester",
            "messages": user(image_part(IMAGE)),
            "masks": [[5, 5, 30, 30]],
            **SHORT,
        }
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30)
            )
        )
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            thread.start()
            while engine.queue_length == 0:
                time.sleep(0.02)
            with pytest.raises(openai.RateLimitError) as refusal:
                ask(client, user(image_part(IMAGE)), extra=SHORT | {"masks": [[5, 5, 30, 30]]})
        assert int(refusal.value.response.headers["retry-after"]) >= 1
        assert refusal.value.code == "queue_full"
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=5) as client:
            assert captions_of(
                ask(client, user(image_part(IMAGE)), extra=SHORT | {"masks": [[5, 5, 30, 30]]})
            )
        thread.join(30)
        assert answers[0].status_code == 200


def test_a_request_that_takes_too_long_is_given_up(captioner):
    # A worker process is there.
    shared_pool().read_page('{"image": null, "regions": []}', Limits())
    limits = Limits(request_seconds=0.5)
    with served(captioner, limits=limits, engine={"window": 20.0}) as (address, engine):
        body = {"model": "tester", "messages": user(image_part(IMAGE)), "masks": [[5, 5, 30, 30]]}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        streamed = httpx.post(f"{address}/v1/chat/completions", json=body | {"stream": True})
        assert '"code": "timeout"' in streamed.text and streamed.text.endswith("[DONE]\n\n")
        assert engine.queue_length == 0
