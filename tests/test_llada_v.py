"""LLaDA-V: its images, prompts and network, against a plain implementation."""

import ast
from pathlib import Path

import llada_v_reference as plain
import numpy as np
import pytest
import reference
import torch
from conversion_sources import case_names, replay_in_fresh_process
from llada_v_models import deviation, maker
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.conversion.layouts import (
    PENULTIMATE_LAYER,
    SIGLIP2_SO400M_PATCH14_384,
    vision_settings,
)
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.modeling_vision import anyres_tokens
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_relative_import_files

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def llava(load):
    """Makes tiny LLaDA-V models."""
    return maker(load)


def levels(inputs) -> np.ndarray:
    """Pixel values back as (T, side, side, 3) of 0 to 255."""
    return ((inputs["pixel_values"].permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()


@torch.no_grad()
def tokens_of(model, inputs) -> torch.Tensor:
    """What replaces the images."""
    grids = [tuple(grid) for grid in inputs["image_grids"].tolist()]
    features = model.encode_images(inputs["pixel_values"])
    return model.image_tokens(features, grids, inputs["image_sizes"].tolist())


# Images. Sizes with maps of every kind: cropped above or at the sides, shrunk or not, one tile.
SIZES = [(64, 64), (100, 30), (31, 99), (150, 120), (61, 47), (200, 7), (9, 170), (190, 185)]
SHAPES = [
    {},
    {"shape": "odd", "grouped": True, "most": 2},
    {"shape": "ragged", "seed": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=["even", "odd", "ragged"])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_and_visual_tokens_equal_the_plain_ones(llava, draw_image, size, shape):
    model, processor = llava(**shape)
    inputs = processor.image_processor(draw_image(*size))
    side = model.config.vision_config.image_size
    canvas = plain.best_canvas(*size, side)
    assert inputs["image_grids"].tolist() == [list(canvas)]
    assert np.array_equal(levels(inputs), plain.cut(draw_image(*size), canvas, side))
    [expected] = plain.visual_tokens(reference.Network(model), [draw_image(*size)])
    tokens = tokens_of(model, inputs)
    assert deviation(tokens, expected) < 1e-4
    assert processor.image_processor.num_image_tokens(size, canvas) == len(expected)


def test_the_sizes_above_reach_every_kind_of_map(llava):
    """Else shrinking, cropping or an empty map would go untested."""
    kinds = set()
    for width, height in SIZES:
        across, down = plain.best_canvas(width, height, 32)
        kinds.add("wide" if width / height > across / down else "tall")
        kinds.add("shrunk" if across * down > 5 else "whole")
    assert kinds == {"wide", "tall", "shrunk", "whole"}


@pytest.mark.parametrize("count", [(i, j) for i in range(1, 7) for j in range(1, 7)])
def test_one_to_36_tiles(llava, draw_image, count):
    model, processor = llava()
    size = (32 * count[0], 32 * count[1])
    inputs = processor.image_processor(draw_image(*size))
    assert inputs["image_grids"].tolist() == [list(count)]
    assert len(inputs["pixel_values"]) == count[0] * count[1] + 1
    features = torch.randn(len(inputs["pixel_values"]), 64, 32, dtype=torch.float64)
    newline = torch.randn(32, dtype=torch.float64)
    tokens = anyres_tokens(features, count, size[::-1], newline, model.config)
    expected = plain.rows_with_newlines(features, count, size, newline, 4)
    assert deviation(tokens, expected) < 1e-6
    assert len(tokens) == processor.image_processor.num_image_tokens(size, count)


@pytest.mark.parametrize(
    "size", [(600, 30), (30, 600), (2000, 100), (1, 1), (1, 20), (500, 1), (3, 2)]
)
def test_extreme_images_are_answered(llava, draw_image, size):
    """Of 1:20 and beyond, and of a single pixel; very flat ones may keep no row of their map."""
    model, processor = llava(seed=2)
    inputs = processor(draw_image(*size), prompts="What?", max_new_tokens=3)
    [expected] = plain.visual_tokens(reference.Network(model), [draw_image(*size)])
    assert deviation(tokens_of(model, inputs), expected) < 1e-4
    out = model.diffusion_generate(
        draw_image(*size), prompts="What?", processor=processor, max_new_tokens=3
    )
    assert len(out.token_ids[0][0]) == 3


def test_a_map_so_flat_that_none_of_it_is_left_is_the_squeezed_tile_alone(llava):
    _, processor = llava()
    grid = processor.image_processor.choose_grid((1000, 3))
    assert processor.image_processor.num_image_tokens((1000, 3), grid) == 8 * 8


# Prompts and logits.


def logits_equal(model, processor, text, images, inputs):
    conversation = plain.Conversation(reference.Network(model), processor.tokenizer, text, images)
    length = len(conversation.ids)
    image = model.config.image_token_id
    ids = [None if i == image else i for i in inputs["input_ids"][0, :length].tolist()]
    assert ids == conversation.ids
    answer = inputs["input_ids"][0, length:].tolist()
    with torch.no_grad():
        logits = model(**inputs).logits[0, length:]
    return deviation(logits, conversation.logits(answer).float())


@pytest.mark.parametrize("shape", SHAPES, ids=["even", "odd", "ragged"])
@pytest.mark.parametrize("size", [(100, 30), (190, 185)])
def test_first_step_logits_equal_the_plain_ones(llava, draw_image, size, shape):
    model, processor = llava(**shape)
    inputs = processor(draw_image(*size), prompts="What is there?", max_new_tokens=5)
    text = plain.prompt_of([("user", "<image>\nWhat is there?")])
    assert logits_equal(model, processor, text, [draw_image(*size)], inputs) < 1e-4


def test_a_question_without_an_image_equals_the_plain_one(llava):
    model, processor = llava(grouped=True)
    inputs = processor(prompts="What is LLaDA?", max_new_tokens=4)
    assert "pixel_values" not in inputs
    text = plain.prompt_of([("user", "What is LLaDA?")])
    assert logits_equal(model, processor, text, [], inputs) < 1e-4


def test_several_images_of_a_prompt_are_a_padded_tile_and_a_newline_each(llava, draw_image):
    """As LLaVA's training and evaluation code has them."""
    model, processor = llava()
    images = [draw_image(100, 30), draw_image(31, 99, seed=1), draw_image(40, 40, seed=2)]
    inputs = processor([images], prompts=["Compare."], max_new_tokens=4)
    side = model.config.vision_config.image_size
    tiles = np.concatenate([plain.cut_padded(p, side) for p in images])
    assert np.array_equal(levels(inputs), tiles)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 3 * 65
    text = plain.prompt_of([("user", "<image>\n<image>\n<image>\nCompare.")])
    assert logits_equal(model, processor, text, images, inputs) < 1e-4
    out = model.diffusion_generate(inputs=inputs, processor=processor)
    assert [len(ids) for ids in out.token_ids[0]] == [4]


def test_only_one_tile_can_be_asked_of_an_anyres_image(llava, draw_image):
    _, processor = llava()
    with pytest.raises(ValueError, match="expected max_tiles of None or 1 with anyres, got 4"):
        processor.image_processor(draw_image(40, 40), max_tiles=4)


def test_a_conversation_of_several_turns_is_prompted_as_released_and_answered(llava, draw_image):
    model, processor = llava()
    image = draw_image(61, 47)
    turns = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": image},
                {"type": "text", "text": "What is there?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
    ]
    inputs = processor.apply_chat_template(
        turns,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"max_new_tokens": 6},
    )
    text = plain.prompt_of(
        [("user", "<image>\nWhat is there?"), ("assistant", "a red circle"), ("user", "Where?")]
    )
    assert logits_equal(model, processor, text, [image], inputs) < 1e-4
    out = model.diffusion_generate(inputs=inputs, processor=processor, steps=3)
    assert len(out.token_ids[0][0]) == 6 and out.num_forwards <= 3
    assert out.texts[0][0] == processor.decode_answer(out.token_ids[0][0])


def test_a_conversation_may_bring_its_own_system_turn(llava):
    _, processor = llava()
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    rendered = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert rendered == plain.prompt_of([("system", "Be brief."), ("user", "Why?")])


# Batches.


def test_a_batch_of_different_images_equals_one_at_a_time(llava, draw_image):
    model, processor = llava(grouped=True)
    images = [
        draw_image(100, 30),
        [],
        draw_image(190, 185, seed=1),
        [draw_image(40, 40), draw_image(9, 30)],
    ]
    prompts = ["What?", "Who wrote this?", "Where is the red circle?", "Which?"]
    inputs = processor(images, prompts=prompts, max_new_tokens=6)
    with torch.no_grad():
        together = model(**inputs, logits_to_keep=6).logits
    options = {"processor": processor, "max_new_tokens": 6, "steps": 6}
    out = model.diffusion_generate(images, prompts=prompts, **options)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        own = [image] if isinstance(image, list) else image
        alone = processor(own, prompts=[prompt], max_new_tokens=6)
        with torch.no_grad():
            logits = model(**alone, logits_to_keep=6).logits
        assert deviation(together[i], logits[0]) < 1e-5
        single = model.diffusion_generate(own, prompts=[prompt], **options)
        assert out.token_ids[i] == single.token_ids[0]


# What a checkpoint is.
NAMES = ("name_or_path", "model_type", "architectures", "llava", "llada")


def test_the_published_vision_tower_has_the_released_shapes():
    """SigLIP-2 so400m patch 14 at 384, the default where a checkpoint brings no vision config."""
    vision, layers = vision_settings(SIGLIP2_SO400M_PATCH14_384, PENULTIMATE_LAYER)
    config = PerceptionDLMConfig(
        vision_config=vision, image_layout="anyres", spatial_merge_size=1, num_region_prompts=0
    )
    with torch.device("meta"):
        model = PerceptionDLMForConditionalGeneration(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert layers == 27 and config.cells_per_side == 27
    assert shapes["vision_tower.embeddings.patch_embedding.weight"] == (1152, 3, 14, 14)
    assert shapes["vision_tower.embeddings.position_embedding.weight"] == (729, 1152)
    assert shapes["vision_tower.encoder.layers.25.mlp.fc1.weight"] == (4304, 1152)
    assert not any(name.startswith("vision_tower.encoder.layers.26.") for name in shapes)
    assert shapes["connector.linear_1.weight"] == (4096, 1152)
    assert shapes["connector.linear_2.weight"] == (4096, 4096)
    assert shapes["image_newline"] == (4096,)
    assert shapes["language_model.lm_head.weight"] == (126464, 4096)
    assert not any(name.startswith("region_prompts") for name in shapes)


@pytest.mark.slow
def test_a_saved_model_answers_alike_where_the_package_cannot_be_imported(converted, tmp_path):
    folder = tmp_path / "saved"
    for auto in (AutoModel, AutoProcessor):
        auto.from_pretrained(converted("released-llava"), trust_remote_code=True).save_pretrained(
            folder
        )
    results = replay_in_fresh_process({"llava": folder}, tmp_path)["llava"]
    assert sorted(results) == sorted(case_names("llava"))
    for result in results.values():
        assert result.pop("features") < 1e-4 and result.pop("logits") < 1e-4
        assert all(result.values()), result


def test_no_module_of_the_model_branches_on_a_models_name():
    """The layout is a property of the config; names are read by the conversion alone."""
    entries = ["modeling_perceptiondlm.py", "processing_perceptiondlm.py"]
    paths = {ROOT / name for name in entries}
    paths |= {Path(path) for name in entries for path in get_relative_import_files(ROOT / name)}
    assert len(paths) >= 9
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.If, ast.IfExp, ast.Compare, ast.Match)):
                continue
            condition = ast.unparse(getattr(node, "test", node)).lower()
            condition = condition.replace("pretrained_model_name_or_path", "")
            assert not any(name in condition for name in NAMES), (path.name, condition)
