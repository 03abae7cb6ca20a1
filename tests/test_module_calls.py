"""No module is called with nothing: a kernel may end the process over an empty tensor, as 4-bit
layers on a CPU do."""

import copy

import pytest
import torch
from perceptiondlm.generation_cache import ResponseNetwork
from test_offload import SETTINGS
from torch.utils._pytree import tree_leaves


@pytest.fixture
def watched(make):
    """A function: a setting's model, every part of which refuses an empty tensor, and the names of
    the modules called; and its processor."""

    def watch(setting: str):
        model, processor = make(**SETTINGS[setting])
        model, called = copy.deepcopy(model), []
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(refuse_empty(name, called), with_kwargs=True)
        return model, processor, called

    return watch


def refuse_empty(name: str, called: list):
    def check(module, args, kwargs):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert all(x.numel() for x in tensors), f"{name} got {[tuple(x.shape) for x in tensors]}"
        called.append(name)

    return check


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("interval", [None, 2, 0])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_no_generation_calls_a_module_with_nothing(
    watched, draw_image, blobs, setting, interval, cfg_scale
):
    model, processor, called = watched(setting)
    options = {
        "prompt_refresh_interval": interval,
        "cfg_scale": cfg_scale,
        "processor": processor,
    }
    images = [draw_image(61, 47), draw_image(20, 90)]
    if setting != "anyres":
        masks = [blobs(61, 47, count=3), blobs(20, 90, count=1)]
        model.diffusion_generate(images, masks, caption_length=3, steps=3, **options)
    for asked in (images, None):
        texts = ["what is there?", "a"]
        model.diffusion_generate(asked, prompts=texts, max_new_tokens=4, steps=3, **options)
    assert "language_model.model.layers.1.mlp" in called


@pytest.mark.parametrize("region_layout", ["released", "independent"])
def test_an_answer_without_a_prompt_calls_no_module_with_nothing(watched, region_layout):
    model, _, _ = watched(region_layout)
    ids = torch.full((1, 4), model.config.mask_token_id)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(4)[None],
        "region_ids": torch.zeros_like(ids),
        "role_ids": torch.full_like(ids, 2),
        "response_columns": torch.arange(4)[None, None],
        "response_start": torch.zeros(1, dtype=torch.int64),
        "task": "answers",
    }
    out = model.diffusion_generate(inputs=inputs, steps=2, prompt_refresh_interval=2, cfg_scale=1.0)
    assert len(out.token_ids[0][0]) == 4


def test_tree_attention_calls_no_module_with_nothing(watched, draw_image, blobs):
    model, processor, _ = watched("independent")
    model.language_model.config = copy.copy(model.language_model.config)
    model.language_model.config._attn_implementation = "tree"
    masks = blobs(61, 47, count=2)
    for layer in model.language_model.model.layers:
        layer.self_attn.config = model.language_model.config
    model.diffusion_generate(draw_image(61, 47), masks, processor=processor, caption_length=3)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("weighting", ["inverse_rate", "none"])
def test_a_batch_in_which_nothing_is_masked_runs_the_head_and_loses_nothing(
    watched, draw_image, blobs, setting, weighting
):
    """Under DDP and FSDP the head's gradient is waited for, so it must be there, and 0."""
    model, processor, called = watched(setting)
    asked = {"prompts": "what?", "answers": "a dog"}
    if setting != "anyres":
        asked = {"masks": blobs(61, 47, count=2), "captions": ["a red circle", "a person"]}
    inputs = processor(draw_image(61, 47), **asked)
    draws = {"timesteps": torch.tensor([0.5]), "noise": torch.ones(inputs["labels"].shape)}
    loss = model(**inputs, **draws, loss_weighting=weighting).loss
    loss.backward()
    assert float(loss.detach()) == 0 and called.count("language_model.lm_head") == 1
    gradient = model.language_model.lm_head.weight.grad
    assert gradient is not None and not gradient.any()
    with pytest.raises(ValueError, match="expected loss_weighting"):
        model(**inputs, **draws, loss_weighting="other")


def test_no_tiles_and_no_boxes_are_as_none_given(watched, draw_image, blobs):
    model, processor, called = watched("released")
    plain = processor(prompts="what?", max_new_tokens=3)
    nothing = {
        "pixel_values": torch.zeros(0, 3, 32, 32),
        "image_grids": torch.zeros(0, 2, dtype=torch.int64),
        "image_sizes": torch.zeros(0, 2, dtype=torch.int64),
        "region_patches": torch.zeros(0, 6, 8, 8, dtype=torch.bool),
    }
    none = {"boxes": torch.zeros(0, 4), "box_images": torch.zeros(0, dtype=torch.int64)}
    with torch.no_grad():
        expected = model(**plain).logits
        assert torch.equal(model(**plain, **nothing, **none).logits, expected)
        assert not any(name.startswith("vision_tower") for name in called)
        asked = processor(draw_image(61, 47), prompts="what?", max_new_tokens=3)
        assert torch.equal(model(**asked, **none).logits, model(**asked).logits)


def test_missing_boxes_for_roi_placeholders_are_refused(watched, draw_image, blobs):
    model, processor, _ = watched("released")
    inputs = processor(draw_image(61, 47), masks=blobs(61, 47, count=2), caption_length=3)
    inputs |= {"boxes": inputs["boxes"][:0], "box_images": inputs["box_images"][:0]}
    with pytest.raises(ValueError, match="expected 0 RoI placeholders"):
        model(**inputs)


def test_likelihoods_call_no_module_with_nothing(watched, draw_image):
    model, processor, _ = watched("released")
    scores = model.diffusion_score(
        draw_image(40, 40), texts="a red cat", prompts="what?", samples=3, processor=processor
    )
    assert scores[0][0] < 0


@pytest.mark.parametrize("shape", [(0, 5), (1, 0)])
def test_empty_input_ids_are_refused(watched, shape):
    model, _, _ = watched("released")
    with pytest.raises(ValueError, match="expected input_ids .* at least one position"):
        model(torch.zeros(shape, dtype=torch.int64))


def test_logits_of_no_position_are_refused(watched):
    model, _, _ = watched("released")
    with pytest.raises(ValueError, match="at least one position in logits_to_keep"):
        model(torch.ones(1, 5, dtype=torch.int64), logits_to_keep=torch.zeros(0, dtype=torch.int64))


def test_the_last_layer_makes_only_keys_and_values_of_a_prompt(watched, draw_image, blobs):
    """What is saved by it stays saved: no query, attention output or MLP for a cached prompt."""
    model, processor, called = watched("independent")
    inputs = processor(draw_image(61, 47), masks=blobs(61, 47, count=2), caption_length=3)
    with torch.no_grad():
        ResponseNetwork(model, inputs, refresh_interval=None, cfg_scale=0.0, compiled=False)
    counts = {
        part: [called.count(f"language_model.model.layers.{i}.{part}") for i in (0, 1)]
        for part in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "mlp")
    }
    assert counts["self_attn.k_proj"] == counts["self_attn.v_proj"] == [2, 2]  # trunk, branches
    assert counts["self_attn.q_proj"] == counts["mlp"] == [2, 0]
    assert called.count("language_model.model.norm") == 0
