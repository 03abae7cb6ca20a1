"""What a user can get wrong: each failure says what was expected and what came."""

import numpy as np
import pytest
import torch
from perceptiondlm.generation_options import DiffusionOptions
from perceptiondlm.image_loading import load_image
from PIL import Image


@pytest.fixture
def pair(make):
    return make()


@pytest.fixture
def image(draw_image):
    return draw_image(61, 47)


@pytest.fixture
def masks(blobs):
    return blobs(61, 47, count=2)


@pytest.fixture
def generate(pair):
    model, processor = pair
    return lambda *args, **options: model.diffusion_generate(*args, processor=processor, **options)


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_lenght": 3}, "expected options among .* got .'caption_lenght'"),
        ({"steps": 0}, "steps to be an integer of at least 1, got 0"),
        ({"steps": -2}, "steps to be an integer of at least 1, got -2"),
        ({"steps": 2.5}, "steps to be an integer of at least 1, got 2.5"),
        ({"steps": True}, "steps to be an integer of at least 1, got True"),
        ({"caption_length": 0}, "caption_length to be an integer of at least 1, got 0"),
        ({"caption_length": None}, "caption_length to be an integer of at least 1, got None"),
        ({"max_new_tokens": 0}, "max_new_tokens to be an integer of at least 1, got 0"),
        ({"block_length": 0}, "block_length to be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size to be an integer of at least 1, got 0"),
        ({"top_k": 0}, "top_k to be an integer of at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p in \(0, 1\], got 1.5"),
        ({"temperature": -1}, "temperature to be a number of at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature to be a number of at least 0, got nan"),
        ({"cfg_scale": -0.5}, "cfg_scale to be a number of at least 0, got -0.5"),
        ({"cfg_scale": "1"}, "cfg_scale to be a number of at least 0, got '1'"),
        (
            {"prompt_refresh_interval": -1},
            "interval to be an integer of at least 0, got -1",
        ),
        ({"remasking": "lowest"}, "remasking among .* got 'lowest'"),
        (
            {"adaptive": "factor"},
            "threshold=, factor= or entropy_bound=, got adaptive",
        ),
        ({"threshold": 2}, "threshold to be a number of at least 0 and at most 1, got 2"),
        ({"factor": 1.0, "remasking": "random"}, "remasking 'low_confidence' with"),
        ({"factor": -1}, "factor to be a number of at least 0, got -1"),
        ({"factor": float("inf")}, "factor to be a number of at least 0"),
        ({"factor": 1.0, "remask_below": 2.0}, r"remask_below in \(0, 1\], got 2.0"),
        (
            {"factor": 1.0, "threshold": 0.5},
            "expected at most one of threshold, factor, entropy",
        ),
        ({"remask_below": 0.5}, "expected threshold, .* with remask_below"),
        ({"stop_strings": "end"}, "stop_strings as a list of texts, got 'end'"),
        ({"stop_strings": [3]}, "stop_strings as a list of texts"),
        ({"stop_strings": [""]}, "stop_strings as a list of texts"),
        ({"seed": 1, "generator": torch.Generator()}, "at most one of seed and generator"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionOptions.build({}, options)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": "0.5"},
        {"suppress_tokens": "abc"},
        {"suppress_tokens": [1.5]},
        {"seed": 1.5},
        {"factor": ["1"]},
        {"factor": 1.0, "remask_below": "1"},
    ],
)
def test_an_option_of_another_type_is_refused(options):
    with pytest.raises(ValueError):
        DiffusionOptions.build({}, options)


def test_a_checkpoints_unknown_default_is_refused():
    with pytest.raises(ValueError, match="got .'stepps'"):
        DiffusionOptions.build({"stepps": 3}, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 8, "block_length": 3}, "block_length to divide 8 new tokens, got 3"),
        ({"max_new_tokens": 8, "block_length": 16}, "block_length to divide 8 new tokens, got 16"),
        ({"max_new_tokens": 8, "block_length": 4, "steps": 3}, "divisible by the 2 blocks, got 3"),
        ({"max_new_tokens": 8, "steps": 1, "top_n": 1}, "expected options among"),
    ],
)
def test_a_schedule_that_does_not_divide_is_refused(generate, image, options, message):
    with pytest.raises(ValueError, match=message):
        generate(image, prompts="What?", **options)


def test_blocks_of_captions_are_refused(generate, image, masks):
    with pytest.raises(ValueError, match="expected no block_length for captions"):
        generate(image, masks, block_length=4)


# Images, masks and prompts.


def test_masks_without_an_image_are_refused(generate, masks):
    with pytest.raises(ValueError, match="expected an image for the masks, got none"):
        generate(masks=masks)


def test_neither_masks_nor_prompts_is_refused(generate, image):
    with pytest.raises(ValueError, match="expected masks to caption or prompts to answer"):
        generate(image)


def test_no_masks_are_refused(generate, image, masks):
    with pytest.raises(ValueError, match="expected at least one mask for image 0, got none"):
        generate(image, [])
    with pytest.raises(ValueError, match="expected at least one mask for image 1, got none"):
        generate([image, image], [masks, []])


def test_an_empty_mask_is_refused(generate, image, masks):
    with pytest.raises(ValueError, match="at least one non-zero pixel, got an empty region mask"):
        generate(image, [masks[0], np.zeros((47, 61))])


def test_a_mask_of_another_size_is_refused(generate, image, masks):
    with pytest.raises(ValueError, match="size 61x47 .width x height., got 47x61"):
        generate(image, [masks[0].T])


def test_lists_of_other_lengths_are_refused(generate, image, masks):
    with pytest.raises(ValueError, match="a list of masks for each of 2 images, got 1"):
        generate([image, image], [masks])
    with pytest.raises(ValueError, match="for each of 3 prompts, got 2"):
        generate([image, image], prompts=["a", "b", "c"])


def test_too_few_instructions_are_refused(generate, image, masks):
    with pytest.raises(ValueError, match="2 texts, one for each image, got 1"):
        generate([image, image], [masks, masks], ["only one"])


@pytest.mark.parametrize("token", ["<|reserved_token_0|>", "<|reserved_token_5|>", "<IMG_CONTEXT>"])
def test_a_placeholder_in_an_instruction_is_text(generate, image, masks, token):
    assert len(generate(image, masks, f"What is {token}?").texts[0]) == len(masks)


@pytest.mark.parametrize("form", ["pil", "rle", "int"])
def test_a_mask_that_is_no_list_is_refused(generate, image, masks, form):
    from pycocotools import mask as coco

    given = {
        "pil": Image.fromarray(masks[0]),
        "int": 5,
        "rle": coco.encode(np.asfortranarray(masks[0])),
    }[form]
    with pytest.raises(ValueError, match="expected a list of masks"):
        generate(image, given)


def test_regions_of_a_model_without_prompts_are_refused(make, image, masks):
    model, processor = make(num_region_prompts=0)
    with pytest.raises(ValueError, match="expected a checkpoint with region prompts for masks"):
        model.diffusion_generate(image, masks, processor=processor)


@pytest.mark.parametrize(
    "given", [{"image_size": 64}, {"region_layout": "independent"}, {"roi_output_size": 2}]
)
def test_a_processor_of_another_model_is_refused(make, make_config, image, masks, given):
    model, _ = make()
    vision = {"vision": given} if "image_size" in given else given
    _, other = make(**vision)
    (name,) = given
    with pytest.raises(ValueError, match=f"expected a processor with the model's {name}"):
        model.diffusion_generate(image, masks, processor=other)


def test_a_model_made_in_memory_needs_a_processor(pair, image, masks):
    model, _ = pair
    with pytest.raises(ValueError, match="expected `processor`: this model was not loaded"):
        model.diffusion_generate(image, masks)


def test_weights_without_a_processor_beside_them_say_so(pair, image, masks, tmp_path):
    model, _ = pair
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a processor beside the weights in"):
        loaded.diffusion_generate(image, masks)


def test_both_inputs_and_images_are_refused(pair, image):
    model, processor = pair
    inputs = processor(image, prompts="What?", max_new_tokens=3)
    with pytest.raises(
        ValueError, match="expected `inputs` or images, masks, prompts and template"
    ):
        model.diffusion_generate(image, inputs=inputs)


def test_inputs_without_masked_positions_are_refused(pair, image):
    model, processor = pair
    inputs = processor(image, prompts="What?")
    with pytest.raises(ValueError, match="expected inputs with a response to denoise"):
        model.diffusion_generate(inputs=inputs)


def test_a_caption_that_is_partly_given_is_filled_up(pair, image, masks):
    model, processor = pair
    inputs = processor(image, masks=masks, caption_length=4)
    last = int((inputs["input_ids"][0] == model.config.mask_token_id).nonzero()[-1])
    inputs["input_ids"][0, last] = 5
    out = model.diffusion_generate(inputs=inputs, processor=processor, return_token_scores=True)
    smallest = int(inputs["region_orders"][0, -1])
    ids, scores = out.token_ids[0][smallest], out.token_scores[0][smallest]
    assert len(ids) == 4 and ids[3] == 5 and scores[3:] in ([], [None])
    assert all(len(own) == 4 for own in out.token_ids[0])


# Images that are none.


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "expected an image as PIL image, path, URL, bytes"),
        (7, "expected an image as PIL image, path, URL, bytes"),
        ([[1]], "expected an image as PIL image, path, URL, bytes"),
        (b"", "expected a readable image"),
        (b"no image", "expected a readable image"),
        (np.zeros((4, 4, 2), np.uint8), "C of 1, 3 or 4"),
        (np.zeros((0, 4, 3), np.uint8), "C of 1, 3 or 4"),
        (np.zeros(4, np.uint8), "C of 1, 3 or 4"),
        (np.zeros((2, 4, 4, 3), np.uint8), "C of 1, 3 or 4"),
        (np.zeros((3, 4, 5), np.uint8), "C of 1, 3 or 4"),
        (np.full((4, 4, 3), 300), "uint8, uint16 or floats in .0, 1., got int64 in .300, 300."),
        (np.full((4, 4, 3), 1.5), "got float64 in .1.5, 1.5."),
        (np.full((4, 4, 3), -0.5), "got float64"),
        (np.full((4, 4, 3), np.nan), "got float64"),
        (np.full((4, 4, 3), "a"), "expected image values as uint8"),
        (np.full((4, 4, 3), None), "expected image values as uint8"),
        (torch.zeros(5, 4, 4), "C of 1, 3 or 4"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "expected image values as uint8"),
        (Image.fromarray(np.full((4, 4), -3, np.int32)), "16-bit gray values, got .-3, -3."),
        (Image.fromarray(np.full((4, 4), 7.0, np.float32)), "floats in .0, 1."),
        (Image.new("RGB", (0, 4)), "at least one pixel, got size .0, 4."),
    ],
)
def test_an_image_that_is_none_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        load_image(image)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected an image file, got .*none.png"):
        load_image(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_image(tmp_path)


def test_a_damaged_file_is_refused(tmp_path, draw_image):
    draw_image(61, 47).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for size in (0, 1, 20, 60, len(whole) // 2):
        (tmp_path / "cut.png").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="expected a readable image"):
            load_image(tmp_path / "cut.png")


def test_an_image_too_large_to_be_meant_is_refused(monkeypatch, draw_image, tmp_path):
    draw_image(61, 47).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="expected a readable image"):
        load_image(tmp_path / "a.png")


def test_a_list_of_images_that_holds_none_is_refused(pair):
    _, processor = pair
    with pytest.raises(ValueError, match="for each of 0 images, got 1"):
        processor([[None]], prompts=["What?"])
