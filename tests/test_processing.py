"""Prompts, padding, targets and decoding."""

import copy
import re

import numpy as np
import pytest
import reference
import torch
from perceptiondlm.common.special_tokens import (
    CAPTION_TOKENS,
    IMAGE_TOKENS,
    MAX_REGIONS,
    NAMED_TOKENS,
    ROI_TOKENS,
)
from perceptiondlm.configuration_perceptiondlm import NO_REGION, ROLE_CAPTION
from perceptiondlm.processing_perceptiondlm import (
    CHAT_TEMPLATE,
    REGION_IMAGE,
    REGION_QUESTION,
    PerceptionDLMProcessor,
)

CAPTIONS = ["a red circle", "a person", "an orange ring"]


@pytest.fixture
def processor(make):
    return make()[1]


@pytest.fixture
def tree(make):
    return make(region_layout="independent")[1]


@pytest.fixture
def image(draw_image):
    return draw_image(61, 47)


@pytest.fixture
def masks(blobs):
    return blobs(61, 47, count=3)


def ids_of(processor, text):
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


# Regions.


def test_targets_stand_in_area_order_with_markers_and_an_end(processor, image, masks):
    inputs = processor(image, masks=masks, captions=CAPTIONS)
    labels = inputs["labels"][0]
    got = labels[labels != -100].tolist()
    order = reference.numbering(masks)
    expected = []
    for k, i in enumerate(order):
        expected += ids_of(processor, f"<|Mask_Cap_{k}|>{CAPTIONS[i]}")
        expected += ids_of(processor, "\n" if k < 2 else "<|eot_id|>")
    assert got == expected
    assert torch.equal(inputs["input_ids"][0][labels != -100], labels[labels != -100])


def test_targets_with_a_slot_are_closed_by_end_of_turn(processor, image, masks):
    inputs = processor(image, masks=masks, captions=CAPTIONS, caption_length=9)
    regions, labels = inputs["region_ids"][0], inputs["labels"][0]
    for k, i in enumerate(reference.numbering(masks)):
        own = labels[(regions == k) & (labels != -100)].tolist()[1:-1]
        text = ids_of(processor, CAPTIONS[i])
        assert own == text + [processor.eot_token_id] * (9 - len(text))


def test_targets_of_the_tree_are_captions_that_end_their_turn(tree, image, masks):
    inputs = tree(image, masks=masks, captions=CAPTIONS)
    regions, labels = inputs["region_ids"][0], inputs["labels"][0]
    for k, i in enumerate(reference.numbering(masks)):
        own = labels[(regions == k) & (labels != -100)].tolist()
        assert own == ids_of(tree, CAPTIONS[i]) + [tree.eot_token_id]


def test_a_caption_longer_than_its_slot_is_refused(processor, image, masks):
    with pytest.raises(ValueError, match="expected a text of at most 2 tokens, got"):
        processor(image, masks=masks, captions=CAPTIONS, caption_length=2)


def test_one_mask_has_nothing_between_regions(processor, image, masks):
    inputs = processor(image, masks=masks[:1], caption_length=3)
    assert not (inputs["region_ids"] == NO_REGION).any()


def test_caption_length_defaults_to_32(processor, image, masks):
    inputs = processor(image, masks=masks)
    assert int((inputs["input_ids"] == processor.mask_token_id).sum()) == 3 * 32


def test_an_instruction_for_each_image(processor, image, masks):
    inputs = processor([image, image], masks=[masks, masks], prompts=["Name it.", "Where is it?"])
    for row, text in enumerate(["Name it.", "Where is it?"]):
        assert text in processor.tokenizer.decode(inputs["input_ids"][row])


@pytest.mark.parametrize("layout", ["processor", "tree"])
def test_batches_pad_prompts_on_the_left_and_answers_on_the_right(
    request, draw_image, blobs, layout
):
    process = request.getfixturevalue(layout)
    sizes, counts = [(61, 47), (30, 170)], [1, 3]
    batch = process(
        [draw_image(*size) for size in sizes],
        masks=[blobs(*size, count=n) for size, n in zip(sizes, counts, strict=True)],
        caption_length=4,
    )
    starts = [(row == 2).nonzero()[0].item() for row in batch["role_ids"]]
    assert starts[0] == starts[1]
    mask = batch["attention_mask"]
    for row in mask.tolist():
        real = [i for i, kept in enumerate(row) if kept]
        assert real == list(range(real[0], real[-1] + 1))
    padding = mask == 0
    assert bool((batch["region_ids"][padding] == NO_REGION).all())
    assert bool((batch["input_ids"][padding] == process.tokenizer.pad_token_id).all())


def test_padding_is_no_target(processor, draw_image, blobs):
    batch = processor(
        [draw_image(61, 47), draw_image(30, 170)],
        masks=[blobs(61, 47, 1), blobs(30, 170, 2)],
        captions=[["a ring"], ["a red circle", "a dog"]],
    )
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())


def test_every_input_is_a_tensor_of_the_kind_the_model_takes(processor, image, masks):
    inputs = processor(image, masks=masks)
    assert inputs.pop("task") == "captions"
    kinds = {name: value.dtype for name, value in inputs.items()}
    assert kinds == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "position_ids": torch.int64,
        "region_ids": torch.int64,
        "role_ids": torch.int64,
        "pixel_values": torch.float32,
        "image_grids": torch.int64,
        "image_sizes": torch.int64,
        "region_patches": torch.bool,
        "boxes": torch.float32,
        "box_images": torch.int64,
        "region_orders": torch.int64,
        "response_columns": torch.int64,
        "response_start": torch.int64,
    }
    assert {*kinds, "task"} == set(processor.model_input_names)


def test_region_orders_of_a_batch_are_padded_with_minus_one(processor, image, masks):
    both = processor([image, image], masks=[masks, masks[:1]])["region_orders"]
    alone = processor(image, masks=masks)["region_orders"]
    assert both.tolist() == [alone[0].tolist(), [0] + [-1] * (len(masks) - 1)]
    assert "region_orders" not in processor(image, masks=masks, return_region_orders=False)


# Questions and conversations.


def test_a_question_is_the_released_prompt(processor, image):
    inputs = processor(image, prompts="What is there?", max_new_tokens=3)
    visual = int((inputs["input_ids"] == processor.image_token_id).sum())
    sequence = reference.chat_sequence(
        processor.tokenizer, [visual], "What is there?", [processor.mask_token_id] * 3
    )
    assert inputs["input_ids"][0].tolist() == sequence.ids
    assert inputs["position_ids"][0].tolist() == sequence.positions
    assert inputs["role_ids"][0].tolist() == [0] * (len(sequence.ids) - 3) + [2] * 3


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_several_images_get_a_single_tile_each(processor, draw_image, count):
    images = [draw_image(100, 30, seed=i) for i in range(count)]
    inputs = processor([images], prompts=["What?"], max_new_tokens=3)
    grids = [[3, 1]] if count == 1 else [[1, 1]] * count
    assert inputs.get("image_grids", torch.zeros(0, 2)).tolist() == grids or count == 0
    assert ("pixel_values" in inputs) == (count > 0)
    tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert tokens == {0: 0, 1: 4 * 16}.get(count, count * 16)


def test_a_batch_mixes_numbers_of_images(processor, draw_image):
    images = [[], [draw_image(100, 30)], [draw_image(40, 40), draw_image(61, 47)]]
    batch = processor(images, prompts=["A", "B", "What color is it?"], max_new_tokens=4)
    placeholders = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert placeholders == [0, 64, 32]
    assert batch["image_grids"].tolist() == [[3, 1], [1, 1], [1, 1]]


def test_an_answer_is_a_target_closed_by_end_of_turn(processor, image):
    inputs = processor(image, prompts="What?", answers="a red circle")
    labels = inputs["labels"][0]
    expected = ids_of(processor, "a red circle") + [processor.eot_token_id]
    assert labels[labels != -100].tolist() == expected
    padded = processor(image, prompts="What?", answers="a red circle", max_new_tokens=9)["labels"][
        0
    ]
    assert padded[padded != -100].tolist() == expected + [processor.eot_token_id] * (
        9 - len(expected)
    )


def test_the_template_renders_every_turn(processor):
    text = processor.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
            {"role": "user", "content": "Sure?"},
        ],
        add_generation_prompt=True,
    )
    assert text == (
        "<|start_header_id|>system<|end_header_id|>\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n<img><IMG_CONTEXT></img>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\nA dog.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n"
    )


def test_conversations_are_tokenised_in_a_batch(processor, draw_image):
    def talk(question, *images):
        content = [{"type": "image", "image": p} for p in images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]

    talks = [
        talk("Hi"),
        talk("What?", draw_image(100, 30)),
        talk("How many?", draw_image(40, 40), draw_image(61, 47)),
    ]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(talks, **options, processor_kwargs={"max_new_tokens": 4})
    direct = processor(
        [[], [draw_image(100, 30)], [draw_image(40, 40), draw_image(61, 47)]],
        prompts=["Hi", "What?", "How many?"],
        max_new_tokens=4,
    )
    assert set(batch) == set(direct)
    assert batch.pop("task") == direct.pop("task") == "answers"
    assert all(torch.equal(batch[name], direct[name]) for name in direct)


def test_text_is_taken_as_rendered(processor, image):
    rendered = "<img><IMG_CONTEXT></img> any prompt at all"
    inputs = processor(image, text=rendered)
    ids = inputs["input_ids"][0].tolist()
    assert [i for i in ids if i != processor.image_token_id] == [
        i for i in ids_of(processor, rendered) if i != processor.image_token_id
    ]
    assert ids.count(processor.image_token_id) == 7 * 16  # six tiles and the thumbnail


# Decoding.


def test_an_answer_is_cut_at_its_first_end_and_stripped(processor):
    ids = ids_of(processor, " a red circle \n")
    eot = processor.eot_token_id
    assert processor.decode_answer(ids + [eot] + ids) == "a red circle"
    assert processor.decode_answer(ids + [processor.tokenizer.eos_token_id] + ids) == "a red circle"
    assert processor.decode_answer([eot] * 5) == "" and processor.decode_answer([]) == ""


def test_ids_beyond_the_vocabulary_decode_to_nothing(processor):
    ids = ids_of(processor, "a dog")
    beyond = len(processor.tokenizer)
    assert processor.decode_answer([beyond, *ids, beyond + 1000]) == "a dog"
    assert processor.decode_answer(torch.tensor(ids)) == "a dog"
    assert processor.decode_answer(np.array([beyond])) == ""


def test_special_tokens_decode_to_nothing(processor):
    marker = processor.tokenizer.convert_tokens_to_ids("<|Mask_Cap_0|>")
    ids = [marker, *ids_of(processor, "a dog"), processor.mask_token_id]
    assert processor.decode_answer(ids) == "a dog"


# Misuse.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masks": 1}, "expected an image for the masks, got none"),
        (
            {"images": 1, "masks": 0},
            "expected 1 to 6 masks for an image in one region group, got 0",
        ),
        (
            {"images": 1, "masks": 7},
            "expected 1 to 6 masks for an image in one region group, got 7",
        ),
        ({"images": 2, "masks": 1}, "a list of masks for each of 2 images, got 1"),
        ({"images": 1, "masks": 2, "captions": ["a"]}, "a caption for each of 2 masks, got 1"),
        ({"images": 1, "masks": 2, "captions": "ab"}, "captions for each of 1 images, got list"),
        ({"images": 1, "masks": 1, "caption_length": 0}, "caption_length of at least 1, got 0"),
        ({"images": 1, "masks": 1, "caption_length": 2.0}, "caption_length of at least 1, got 2.0"),
        ({"images": 1, "masks": 1, "text": "a"}, "expected no text for this kind of input"),
        ({"images": 1, "masks": 1, "answers": "a"}, "expected no answers for this kind"),
        ({"images": 1, "masks": 1, "max_new_tokens": 3}, "expected no max_new_tokens"),
        (
            {"images": 1, "masks": 1, "prompts": ["a", "b"]},
            "expected a prompt for each of 1 masks|expected 1 texts, one for each sample",
        ),
        ({"images": 1, "masks": 1, "return_tensors": "np"}, "return_tensors 'pt', got 'np'"),
        ({"images": 1, "masks": 1, "padding": "max_length"}, "or 'longest', got 'max_length'"),
        ({"images": 1}, "exactly one of `text` and `prompts`"),
        ({"images": 1, "text": "a", "prompts": "b"}, "exactly one of `text` and `prompts`"),
        ({"images": 1, "text": "no placeholder"}, "for each of 1 images, got 0"),
        ({"text": "<IMG_CONTEXT>"}, "for each of 0 images, got 1"),
        ({"images": 2, "prompts": ["a", "b", "c"]}, "for each of 3 prompts, got 2"),
        ({"prompts": "a", "max_new_tokens": 0}, "max_new_tokens of at least 1, got 0"),
        ({"prompts": "a", "caption_length": 3}, "expected no caption_length"),
        ({"images": 1, "prompts": "a", "caption_length": 3}, "expected no caption_length"),
        ({"prompts": "a", "captions": ["x"]}, "expected no captions"),
        ({"prompts": "a", "return_region_orders": False}, "return_region_orders True without"),
        ({"images": 1, "text": "<IMG_CONTEXT>", "return_region_orders": False}, "region_orders"),
        ({"images": 1, "masks": 1, "add_special_tokens": True}, "add_special_tokens False with"),
        ({"images": 2, "prompts": "a", "max_tiles": 2}, "where a text has several images, got 2"),
        ({"prompts": "a", "max_tiles": 2}, "expected no max_tiles without images, got 2"),
        (
            {"images": 2, "masks": 1, "per_image": True, "captions": [["a"]]},
            "a list of captions for each of 2 images, got list",
        ),
        (
            {"prompts": "a", "answers": ["x", "y"]},
            "expected a prompt for each of 1 masks|expected 1 texts, one for each sample, got 2",
        ),
        ({"prompts": "a", "videos": [1]}, "expected no videos"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(processor, image, masks, arguments, message):
    given = dict(arguments)
    if "images" in given:
        given["images"] = image if given["images"] == 1 else [image] * given["images"]
    if "masks" in given:
        many = (masks * 3)[: given["masks"]]
        given["masks"] = [many] if isinstance(given.get("images"), list) else many
        if given.pop("per_image", False):
            given["masks"] *= len(given["images"])
    with pytest.raises(ValueError, match=message):
        processor(**given)


def test_several_images_of_a_question_have_one_tile_each(processor, draw_image):
    images = [draw_image(90, 40), draw_image(40, 90, seed=1)]
    plain = processor(images, prompts="Which?", max_new_tokens=2)
    assert plain["image_grids"].tolist() == [[1, 1], [1, 1]]
    limited = processor(images, prompts="Which?", max_new_tokens=2, max_tiles=1)
    assert torch.equal(limited["input_ids"], plain["input_ids"])


def test_the_processors_tokens_are_those_of_the_table(processor):
    fields = {"image_token_id": "image_token", "mask_token_id": "mask_token"}
    fields |= {"eot_token_id": "eot_token"}
    table = {**NAMED_TOKENS, **IMAGE_TOKENS}
    assert {f: getattr(processor, name) for f, name in fields.items()} == {
        f: table[f] for f in fields
    }
    assert [processor.roi_token.format(k) for k in range(MAX_REGIONS)] == ROI_TOKENS
    assert [processor.caption_token.format(k) for k in range(MAX_REGIONS)] == CAPTION_TOKENS
    for template in (CHAT_TEMPLATE, REGION_IMAGE + REGION_QUESTION):
        named = set(re.findall(r"</?\w+>|<\|\w+\|>", template))
        assert len(named) >= 4 and named <= set(table.values())


def test_an_unknown_option_is_refused(processor, image, masks):
    with pytest.raises(TypeError, match="caption_lenght"):
        processor(image, masks=masks, caption_lenght=3)


def test_a_tokenizer_without_a_needed_token_is_refused(processor, image, masks):
    other = PerceptionDLMProcessor(
        processor.image_processor, processor.tokenizer, mask_token="<|no_such_token|>"
    )
    with pytest.raises(ValueError, match="special token '<|no_such_token|>', got one without"):
        other(image, masks=masks)


@pytest.mark.parametrize("layout", ["released", "independent"])
def test_the_responses_stand_where_a_search_for_mask_tokens_finds_them(
    processor, image, masks, layout
):
    processor = copy.copy(processor)
    processor.region_layout = layout
    pair = processor([image, image], masks=[masks, masks[:1]], caption_length=3)
    asked = processor(image, prompts=["What?", "What is it?"], max_new_tokens=4)
    for inputs, task in ((pair, "captions"), (asked.to("cpu"), "answers")):
        start = int((inputs["role_ids"] != ROLE_CAPTION).all(0).sum())
        assert inputs["response_start"].tolist() == [start, start] and inputs["task"] == task
        is_open = inputs["input_ids"] == processor.mask_token_id
        for row, groups in enumerate(inputs["response_columns"].tolist()):
            for k, given in enumerate(groups):
                found = is_open[row] & (inputs["region_ids"][row] == k)
                assert [i for i in given if i >= 0] == found.nonzero().flatten().tolist()


def test_a_prompt_without_a_response_has_no_response_columns(processor, image):
    inputs = processor(image, prompts="What?")
    assert not {"response_columns", "response_start", "task"} & set(inputs)


def test_one_image_belongs_to_each_of_several_questions(processor, image):
    once = processor(image, prompts=["What?", "Where is it?"], max_new_tokens=2)
    twice = processor([image, image], prompts=["What?", "Where is it?"], max_new_tokens=2)
    assert torch.equal(once["input_ids"], twice["input_ids"])
    assert torch.equal(once["pixel_values"], twice["pixel_values"])
