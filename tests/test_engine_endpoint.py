"""Captions, categories and verdicts by a played endpoint that answers well, badly or not at all."""

import base64
import copy
import io
import json
import pickle
import threading

import pytest
import torch
from engine_data import kept, record_of, rectangle, rules
from perceptiondlm.common.crops import png_data_url
from perceptiondlm.pipelines.captioners import (
    CaptionRegions,
    ChatCaptioner,
    PromptOptions,
    region_messages,
)
from perceptiondlm.pipelines.categories import (
    ChatExtractor,
    ChatVerifier,
    ExtractCategories,
    VerifyCategories,
    WordVerifier,
    checked_prompt,
    head_noun,
    same_noun,
)
from perceptiondlm.pipelines.endpoint import (
    AnswerCache,
    ChatModel,
    EndpointOptions,
    EngineStopped,
    Failure,
    image_part,
    text_part,
    visible_text,
)
from perceptiondlm.pipelines.transformers_chat import TransformersChat, TransformersOptions
from PIL import Image
from test_judge_server import Reply, completion, error, serving
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

SIZE = (60, 40)
MASKS = [rectangle(SIZE, 10 * i, 5, 10 * i + 8, 15) for i in range(4)]


def options(server, **changes) -> EndpointOptions:
    values = {"base_url": server.url, "model": "m", "attempts": 3, "first_delay": 0.01}
    return EndpointOptions(**{**values, **changes})


def question(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def said(body: dict) -> str:
    """The text of a request's message."""
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def echo(number, body) -> Reply:
    return completion(f"about {said(body)}")


# The client of a whole batch.


def test_answers_come_in_the_order_of_the_questions():
    with serving(echo) as server:
        answers = ChatModel(options(server))([question(text) for text in "dabc"])
    assert answers == ["about d", "about a", "about b", "about c"]


def test_calls_run_at_once_up_to_the_bound():
    barrier = threading.Barrier(3, timeout=5)  # which only three calls at once can pass

    def script(number, body):
        barrier.wait()
        return completion("x")

    with serving(script) as server:
        ChatModel(options(server, concurrency=3))([question(str(i)) for i in range(6)])
        assert server.most_under_way == 3


def test_equal_questions_are_asked_once():
    with serving(echo) as server:
        assert ChatModel(options(server))([question("a")] * 5) == ["about a"] * 5
        assert len(server.requests) == 1


def test_an_answer_is_asked_for_once_over_all_runs(tmp_path):
    cache = str(tmp_path / "answers.sqlite")
    with serving(echo) as server:
        ChatModel(options(server, cache=cache))([question("a"), question("b")])
        answers = ChatModel(options(server, cache=cache))([question("b"), question("c")])
        assert answers == ["about b", "about c"] and len(server.requests) == 3
        ChatModel(options(server, cache=cache, model="other"))([question("a")])
        assert len(server.requests) == 4  # another model, another answer


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    (tmp_path / "answers").write_text("no database" * 100)
    with pytest.raises(ValueError, match="expected a cache of answers at"):
        AnswerCache(tmp_path / "answers")


@pytest.mark.parametrize(
    "trouble",
    [
        error(429, Retry_After="0.05"),
        error(500),
        Reply({"choices": [{"message": {"content": "B"}}]}, cut=True),
        Reply(b"<html>"),
    ],
    ids=["429", "500", "cut", "no JSON"],
)
def test_trouble_that_passes_leaves_no_trace(trouble):
    def script(number, body):
        return trouble if number == 0 else echo(number, body)

    with serving(script) as server:
        assert ChatModel(options(server))([question("a")]) == ["about a"]


def test_an_answer_that_is_no_text_is_a_failure(tmp_path):
    body = b'{"choices": [{"message": {"content": "a \\ud800 cup"}}]}'
    with serving(lambda *_: Reply(body)) as server:
        model = ChatModel(options(server, cache=str(tmp_path / "answers")))
        (answer,) = model([question("a")])
    assert "expected text, got a lone surrogate" in answer.reason


def test_an_answer_cut_off_at_its_tokens_is_a_failure_and_no_reason_to_stop():
    choice = {"message": {"content": "A cup with"}, "finish_reason": "length"}
    with serving(lambda *_: Reply({"choices": [choice]})) as server:
        answers = ChatModel(options(server))([question(str(i)) for i in range(20)])
        assert len(server.requests) == 20  # once each
    assert all("cut off at max_tokens: 'A cup with'" in answer.reason for answer in answers)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("<think>Is it\na cup?</think>\n A cup. ", "A cup."),
        ("A <think> cup", "A <think> cup"),
        ("<think>Is it", None),
        ("  ", None),
    ],
)
def test_thoughts_are_no_part_of_an_answer(answer, text):
    found = visible_text(answer)
    assert found == text if text else isinstance(found, Failure)


def test_a_slow_answer_is_asked_for_again():
    slow = completion("late")
    slow.delay = 1.0
    with serving(lambda number, body: slow if number == 0 else echo(number, body)) as server:
        assert ChatModel(options(server, timeout=0.3))([question("a")]) == ["about a"]


def test_trouble_that_stays_is_a_failure_of_that_question_alone(tmp_path):
    def script(number, body):
        return error(500, "broken") if said(body) == "b" else echo(number, body)

    cache = str(tmp_path / "answers.sqlite")
    with serving(script) as server:
        answers = ChatModel(options(server, cache=cache))([question(text) for text in "abc"])
        assert answers[::2] == ["about a", "about c"]
        assert "HTTP 500" in answers[1].reason and "3 attempts" in answers[1].reason
        before = len(server.requests)
        ChatModel(options(server, cache=cache))([question("b")])
        assert len(server.requests) == before + 3  # a failure is not kept: it is asked again


@pytest.mark.parametrize(
    ("reply", "message"),
    [(error(401, "bad key"), "HTTP 401"), (error(404, "no model"), "HTTP 404")],
)
def test_what_no_call_can_mend_stops_the_run(reply, message):
    with serving(lambda *_: reply) as server, pytest.raises(EngineStopped, match=message):
        ChatModel(options(server))([question(str(i)) for i in range(40)])
    assert len(server.requests) < 40


def test_an_endpoint_that_is_gone_stops_the_run():
    with serving(lambda *_: error(500)) as server, pytest.raises(EngineStopped, match="HTTP 500"):
        ChatModel(options(server, attempts=1))([question(str(i)) for i in range(60)])
    assert len(server.requests) < 60


def test_a_spent_budget_stops_the_run_and_the_next_one_goes_on(tmp_path):
    cache = str(tmp_path / "answers.sqlite")
    asked = [question(str(i)) for i in range(5)]
    with serving(echo) as server:
        with pytest.raises(EngineStopped, match="budget of 3 calls"):
            ChatModel(options(server, max_calls=3, cache=cache, concurrency=1))(asked)
        assert len(ChatModel(options(server, max_calls=2, cache=cache))(asked)) == 5
        assert len(server.requests) == 5


def test_request_fields_are_sent_and_none_removes_one():
    with serving(echo) as server:
        request = {"temperature": None, "max_tokens": 9, "top_p": 0.5}
        ChatModel(options(server, request=request))([question("a")])
    (body,) = server.requests
    assert {k: v for k, v in body.items() if k != "messages"} == {
        "model": "m",
        "max_tokens": 9,
        "top_p": 0.5,
    }


def test_a_model_that_has_asked_can_be_pickled_and_asks_on():
    with serving(echo) as server:
        model = ChatModel(options(server))
        model([question("a")])
        assert pickle.loads(pickle.dumps(model))([question("b")]) == ["about b"]


# Captions.


def test_a_region_is_shown_as_crop_and_mask():
    image = Image.new("RGB", (200, 200), "blue")
    mask = rectangle((200, 200), 100, 100, 160, 160)
    (message,) = region_messages(image, mask, PromptOptions(text="What?"))
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    assert message["content"][-1]["text"] == "What?"


def test_views_are_scaled_down_and_the_outline_is_red():
    image = Image.new("RGB", (200, 100), "blue")
    mask = rectangle((200, 100), 50, 20, 150, 80)
    prompt = PromptOptions(views=["outlined"], max_side=200)
    url = region_messages(image, mask, prompt)[0]["content"][1]["image_url"]["url"]
    shown = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")
    assert shown.getpixel((50, 50)) == (255, 0, 0)  # on the edge
    assert shown.getpixel((100, 50)) == shown.getpixel((10, 10)) == (0, 0, 255)

    small = PromptOptions(views=["image"], max_side=50)
    url = region_messages(image, mask, small)[0]["content"][1]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == (50, 25)


def captioned(tmp_path, captioner):
    record = record_of(*MASKS)
    Image.new("RGB", SIZE, "gray").save(tmp_path / "image.png")
    record.image = str(tmp_path / "image.png")
    CaptionRegions(captioner)([record])
    return record


def test_regions_get_captions_and_those_without_are_dropped(tmp_path):
    def script(number, body):
        # the requests come in any order: the third region is known by its crop
        url = json.dumps(body["messages"])
        return {urls[1]: completion("  "), urls[2]: error(400, "no")}.get(url, completion(" ok "))

    image = Image.new("RGB", SIZE, "gray")
    urls = [json.dumps(region_messages(image, mask, PromptOptions())) for mask in MASKS]
    with serving(script) as server:
        record = captioned(tmp_path, ChatCaptioner(ChatModel(options(server))))
    assert [region.caption for region in record.regions] == ["ok", "ok"] and kept(record) == "ad"
    assert rules(record) == {"b": "no caption", "c": "no caption"}
    reasons = [entry.reason for entry in record.dropped]
    assert "expected an answer, got" in reasons[0] and "HTTP 400" in reasons[1]


@pytest.mark.parametrize("trouble", ["none", "no image", "another size"])
def test_an_image_that_cannot_be_shown_drops_its_regions(tmp_path, trouble):
    record = record_of(*MASKS)
    record.image = str(tmp_path / "image.png")
    if trouble == "no image":
        (tmp_path / "image.png").write_text("text")
    if trouble == "another size":
        Image.new("RGB", (SIZE[0], SIZE[1] + 1)).save(record.image)
    CaptionRegions(lambda asked: pytest.fail("asked"))([record])
    assert set(rules(record).values()) == {"image"} and len(record.dropped) == 4


# Categories.


@pytest.mark.parametrize(
    ("caption", "noun"),
    [
        ("A red ceramic mug with a white handle on a table.", "mug"),
        ("a large dotted blue star at the top left", "star"),
        ("The two dogs, which are brown", "dogs"),
        ("A pair of old shoes standing on a mat", "shoes"),
        ("There is a bench in front of a house", "bench"),
        ("A close-up view of a cat's face", "face"),
        ("Of the with", None),
    ],
)
def test_the_head_of_the_first_phrase_is_the_category(caption, noun):
    assert head_noun(caption) == noun


def test_categories_are_read_from_answers_and_others_are_dropped():
    answers = iter(["Mug.", "The traffic light", "I think it may be some kind of a mug", "bus"])
    record = record_of(*MASKS, caption=list("wxyz"))
    ExtractCategories(ChatExtractor(lambda asked: [next(answers) for _ in asked]))([record])
    assert [region.core for region in record.regions] == ["mug", "traffic light", "bus"]
    assert rules(record) == {"c": "no category"}


@pytest.mark.parametrize(
    ("answer", "rule"), [("b c d e", None), ("The b c d e.", None), ("b c d e f", "no category")]
)
def test_a_category_has_four_words_at_most(answer, rule):
    record = record_of(MASKS[0], caption=["x"])
    ExtractCategories(ChatExtractor(lambda asked: [answer]))([record])
    assert rules(record).get("a") == rule


def test_the_extractor_is_told_the_caption_braces_and_all():
    asked = []
    ChatExtractor(lambda messages: asked.extend(messages) or ["x"], "Of {caption}:")(["{a} b"])
    assert asked == [[{"role": "user", "content": "Of {a} b:"}]]


def test_verdicts_keep_and_drop():
    answers = iter(["Yes", "no, it is a cup", "perhaps", Failure("HTTP 500")])
    categories = ["cup"] * 4
    record = record_of(*MASKS, caption=list("wxyz"), category=categories)
    VerifyCategories(ChatVerifier(lambda asked: [next(answers) for _ in asked]))([record])
    assert kept(record) == "a"
    assert rules(record) == {"b": "category", "c": "no answer", "d": "no answer"}


def test_a_region_without_a_category_is_not_asked_about():
    record = record_of(*MASKS[:2], caption=["a cup", "a cup"], category=["cup", None])
    VerifyCategories(WordVerifier())([record])
    assert kept(record) == "a" and rules(record) == {"b": "no category"}


@pytest.mark.parametrize(
    ("caption", "category", "is_right"),
    [
        ("Two small dogs on grass", "dog", True),
        ("A dog", "hot dog", False),
        ("A hot dog in a bun", "hot dog", True),
        ("A cargo ship", "car", False),
        ("A wall of bricks", "wall-other-merged", True),
        ("A deck of playing cards", "playing_card", True),
        ("A sedan on a road", "car", True),  # by a synonym
        ("A bus on a road", "car", False),
    ],
)
def test_words_tell_a_category(caption, category, is_right):
    assert WordVerifier({"car": ["sedan"]})([(caption, category)]) == [is_right]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("dogs", "dog", True),
        ("boxes", "box", True),
        ("buses", "bus", True),
        ("vase", "vases", True),
        ("berries", "berry", True),
        ("people", "person", True),
        ("glass", "glasses", True),
        ("bus", "bug", False),
        ("gas", "ga", False),
        ("car", "cart", False),
    ],
)
def test_nouns_are_compared_in_the_singular_and_the_plural(one, other, same):
    assert same_noun(one, other) is same


def test_a_prompt_without_its_field_is_refused():
    with pytest.raises(ValueError, match=r"expected \{caption\} in the prompt, got none"):
        checked_prompt("What is it?", "caption")
    with pytest.raises(ValueError, match="expected a prompt with fields in braces"):
        checked_prompt("{caption", "caption")


# transformers' chat models: tiny ones with random weights, in its own pipelines.

CHAT_TEMPLATE = """
{%- for message in messages -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<IMG_CONTEXT>{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endfor -%}"""
SIDES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


@pytest.fixture
def chat_folder(tokenizer, tmp_path):
    """Gives the folder of a chat model for text ("text-generation") or for images and text."""
    text = LlamaConfig(**SIDES, vocab_size=len(tokenizer), num_hidden_layers=1)
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHAT_TEMPLATE

    def make(task: str) -> str:
        torch.manual_seed(0)
        own.save_pretrained(tmp_path)
        if task == "text-generation":
            LlamaForCausalLM(text).save_pretrained(tmp_path)
            return str(tmp_path)
        vision = CLIPVisionConfig(**SIDES, num_hidden_layers=2, image_size=16, patch_size=8)
        token = own.convert_tokens_to_ids("<IMG_CONTEXT>")
        parts = {"vision_config": vision, "text_config": text, "vision_feature_layer": -1}
        config = LlavaConfig(**parts, image_token_index=token)
        LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
        own.image_token = "<IMG_CONTEXT>"
        sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        LlavaProcessor(
            CLIPImageProcessor(**sizes),
            own,
            patch_size=8,
            vision_feature_select_strategy="default",
            image_token="<IMG_CONTEXT>",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        ).save_pretrained(tmp_path)
        return str(tmp_path)

    return make


@pytest.mark.parametrize("task", ["image-text-to-text", "text-generation"])
def test_transformers_answers_each_question_in_its_own_pipeline(chat_folder, task, caplog):
    generate = {"max_new_tokens": 3, "do_sample": False}
    options = TransformersOptions(chat_folder(task), device="cpu", batch_size=1, generate=generate)
    chat = TransformersChat(options, task)
    asked = [question("a cup"), question("a blue star at the top")]
    if task == "image-text-to-text":
        image = image_part(png_data_url(Image.new("RGB", (20, 20), "red")))
        asked = [[{"role": "user", "content": [image, text_part(m[0]["content"])]}] for m in asked]
    answers = chat(asked)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    assert answers == chat(asked[:1]) + chat(asked[1:])
    assert "will be ignored" not in caplog.text
    assert chat([]) == []
    assert "_pipeline" not in vars(pickle.loads(pickle.dumps(chat)))
