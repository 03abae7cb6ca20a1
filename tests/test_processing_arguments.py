"""The processor takes transformers' `ProcessingKwargs`: neutral values, and those it honors."""

import typing

import pytest
import torch
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, TextKwargs

QUESTIONS = ["What?", "What is unusual in this picture, and why?"]

# A value of every text and image argument that asks for something else than is made.
MEANINGFUL = {
    "text_pair": "more",
    "text_target": "more",
    "text_pair_target": "more",
    "padding": "max_length",
    "max_length": 3,
    "stride": 2,
    "is_split_into_words": True,
    "return_token_type_ids": True,
    "return_attention_mask": False,
    "return_overflowing_tokens": True,
    "return_special_tokens_mask": True,
    "return_offsets_mapping": True,
    "return_length": True,
    "padding_side": "both",
    "pad_to_multiple_of": 0,
    "return_mm_token_type_ids": True,
    "return_text_replacement_offsets": True,
    "sanitize_control_tokens": True,
    "return_tensors": "np",
    "do_convert_rgb": False,
    "do_resize": False,
    "size": {"height": 7, "width": 7},
    "default_to_square": False,
    "crop_size": {"height": 7, "width": 7},
    "resample": 0,
    "do_rescale": False,
    "rescale_factor": 1.0,
    "do_normalize": False,
    "image_mean": [0.4, 0.4, 0.4],
    "image_std": [0.2, 0.2, 0.2],
    "do_pad": True,
    "pad_size": {"height": 7, "width": 7},
    "do_center_crop": True,
    "data_format": "channels_last",
    "input_data_format": "channels_last",
    "device": "cuda",
    "image_seq_length": 5,
}
NOT_REFUSED = {"add_special_tokens", "truncation", "verbose", "disable_grouping"}


@pytest.fixture
def processor(make):
    return make()[1]


@pytest.fixture
def ask(processor, draw_image):
    images = [[draw_image(40, 40)], [draw_image(90, 40)]]
    return lambda **options: processor(images, prompts=QUESTIONS, **options)


def same(batch, expected) -> bool:
    return batch.keys() == expected.keys() and all(
        map(torch.equal, batch.values(), expected.values())
    )


def test_every_argument_is_decided_on():
    names = {*typing.get_type_hints(TextKwargs), *typing.get_type_hints(ImagesKwargs)}
    assert names - NOT_REFUSED <= set(MEANINGFUL)  # an older transformers has fewer
    flat = set(ProcessingKwargs.__annotations__) - {f"{g}_kwargs" for g in GROUPS}
    assert flat <= set(MEANINGFUL)


GROUPS = ("text", "images", "videos", "audio")


@pytest.mark.parametrize("name", MEANINGFUL)
def test_what_cannot_be_honored_is_refused_by_name(ask, name):
    with pytest.raises(ValueError, match=name):
        ask(**{name: MEANINGFUL[name]})
    group = "images_kwargs" if name in typing.get_type_hints(ImagesKwargs) else "text_kwargs"
    with pytest.raises(ValueError, match=name):
        ask(**{group: {name: MEANINGFUL[name]}})


def test_neutral_values_change_nothing(ask, processor):
    plain = ask()
    side = processor.image_processor.image_size
    neutral = [
        dict.fromkeys(MEANINGFUL),
        {"padding": True, "truncation": True, "max_length": 1024, "return_tensors": "pt"},
        {"padding": "longest", "padding_side": "left", "pad_to_multiple_of": None},
        {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
        {"image_mean": (0.5, 0.5, 0.5), "image_std": [0.5, 0.5, 0.5], "resample": 3},
        {"size": {"height": side, "width": side}, "device": "cpu", "disable_grouping": True},
        {"text_kwargs": {"padding": True}, "images_kwargs": {"do_pad": False}},
        {"common_kwargs": {"return_tensors": "pt"}, "videos_kwargs": {}, "audio_kwargs": None},
        {"return_tensors": "pt", "common_kwargs": {"return_tensors": "pt"}},
        {"do_sample_frames": False, "fps": 2, "sampling_rate": None, "verbose": True},
        {"return_attention_mask": True, "return_offsets_mapping": False, "verbose": False},
    ]
    for options in neutral:
        assert same(ask(**options), plain), options


def test_an_argument_by_name_and_in_a_group_is_refused(ask):
    with pytest.raises(ValueError, match="by name or in text_kwargs, got both"):
        ask(padding=True, text_kwargs={"padding": True})


def test_padding_on_the_right_is_what_the_tokenizer_does(processor):
    tokenizer = processor.tokenizer
    longest = max(len(tokenizer(q)["input_ids"]) for q in QUESTIONS)
    right = processor(text=QUESTIONS, padding_side="right")
    for row, mask, question in zip(
        right["input_ids"], right["attention_mask"], QUESTIONS, strict=True
    ):
        ids = tokenizer(question)["input_ids"]
        count = longest - len(ids)
        assert row.tolist() == ids + [tokenizer.pad_token_id] * count
        assert mask.tolist() == [1] * len(ids) + [0] * count
    with pytest.raises(ValueError, match="expected padding_side 'left' with answers, got 'right'"):
        processor(text=QUESTIONS, max_new_tokens=3, padding_side="right")


def test_padding_either_side_gives_the_same_logits(make, processor):
    model, _ = make()
    left = processor(text=QUESTIONS)
    right = processor(text=QUESTIONS, padding_side="right")
    with torch.no_grad():
        logits = [model(**batch).logits[batch["attention_mask"].bool()] for batch in (left, right)]
    assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_to_a_multiple(processor, side):
    plain = processor(text=QUESTIONS, padding_side=side)["input_ids"]
    batch = processor(text=QUESTIONS, padding_side=side, pad_to_multiple_of=16)
    width = batch["input_ids"].shape[1]
    assert width % 16 == 0 and 0 < width - plain.shape[1] < 16
    start = width - plain.shape[1] if side == "left" else 0
    assert torch.equal(batch["input_ids"][:, start : start + plain.shape[1]], plain)
    assert all(tensor.shape[1] == width for tensor in batch.values())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_to_a_length(processor, side):
    plain = processor(text=QUESTIONS, padding_side=side)["input_ids"]
    batch = processor(text=QUESTIONS, padding_side=side, padding="max_length", max_length=90)
    start = 90 - plain.shape[1] if side == "left" else 0
    assert all(tensor.shape == (2, 90) for tensor in batch.values())
    assert torch.equal(batch["input_ids"][:, start : start + plain.shape[1]], plain)


def test_an_answer_still_starts_in_one_column_when_padded_to_a_multiple(processor):
    batch = processor(text=QUESTIONS, max_new_tokens=3, pad_to_multiple_of=16)
    assert batch["input_ids"].shape[1] % 16 == 0
    masked = batch["input_ids"] == processor.mask_token_id
    assert masked.sum(1).tolist() == [3, 3] and bool(masked[:, -3:].all())


def test_nothing_is_cut(processor):
    length = len(processor.tokenizer(QUESTIONS[1])["input_ids"])
    plain = processor(text=QUESTIONS)
    assert same(processor(text=QUESTIONS, truncation=True, max_length=length), plain)
    assert same(processor(text=QUESTIONS, truncation=False, max_length=3), plain)
    with pytest.raises(ValueError, match=f"of at most max_length 5 tokens, got {length}"):
        processor(text=QUESTIONS, truncation=True, max_length=5)


def test_without_padding_lengths_have_to_be_equal(processor):
    alone = processor(text=QUESTIONS[0])
    assert same(processor(text=QUESTIONS[0], padding=False), alone)
    with pytest.raises(ValueError, match="expected padding True or 'longest' for lengths"):
        processor(text=QUESTIONS, padding=False)


def test_a_call_can_bound_the_tiles(processor, draw_image):
    wide = draw_image(200, 60)
    assert processor(wide, prompts="What?")["image_grids"].tolist() == [[3, 1]]
    for options in ({"max_tiles": 1}, {"images_kwargs": {"max_tiles": 1}}):
        assert processor(wide, prompts="What?", **options)["image_grids"].tolist() == [[1, 1]]


def test_a_chat_template_passes_arguments_on(processor, draw_image):
    content = [{"type": "image", "image": draw_image(40, 40)}, {"type": "text", "text": "What?"}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    message = [{"role": "user", "content": content}]
    plain = processor.apply_chat_template(message, **options)
    padded = processor.apply_chat_template(
        message, **options, processor_kwargs={"pad_to_multiple_of": 64, "padding_side": "left"}
    )
    assert padded["input_ids"].shape[1] % 64 == 0
    assert torch.equal(padded["input_ids"][:, -plain["input_ids"].shape[1] :], plain["input_ids"])


def test_an_image_processor_takes_neutral_values_too(processor, draw_image):
    images = processor.image_processor
    plain = images(draw_image(40, 40))["pixel_values"]
    neutral = {"do_resize": True, "do_rescale": True, "do_normalize": True, "return_tensors": "pt"}
    assert torch.equal(images(draw_image(40, 40), **neutral)["pixel_values"], plain)
    with pytest.raises(ValueError, match="expected do_rescale True, got False"):
        images(draw_image(40, 40), do_rescale=False)
