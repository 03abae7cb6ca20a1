"""Attention over a tree as transformers' implementation "tree": on a CPU by its reference path."""

import pytest
import torch
from perceptiondlm.modeling_attention import TreeMask, allowed_attention, tree_attention
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration

INDEPENDENT = {"region_layout": "independent"}


@pytest.fixture
def tree():
    """Runs a call of a model with attention "tree"."""

    def run(model, *args, **options):
        config = model.language_model.config
        before, config._attn_implementation = config._attn_implementation, "tree"
        try:
            return model.diffusion_generate(*args, **options)
        finally:
            config._attn_implementation = before

    return run


@pytest.mark.parametrize("text", [{}, {"num_key_value_heads": 2}])
def test_regions_of_several_images_are_captioned_as_without(make, draw_image, blobs, tree, text):
    model, processor = make(text=text, **INDEPENDENT)
    sizes, counts = [(61, 47), (90, 30), (40, 40)], [3, 8, 1]
    images = [draw_image(*size) for size in sizes]
    masks = [blobs(*size, count=n) for size, n in zip(sizes, counts, strict=True)]
    options = {"processor": processor, "caption_length": 5}
    expected = model.diffusion_generate(images, masks, **options)
    assert tree(model, images, masks, **options).token_ids == expected.token_ids


def test_questions_of_several_lengths_are_answered_as_without(make, draw_image, tree):
    model, processor = make(**INDEPENDENT)
    images, questions = (
        [draw_image(40, 40), draw_image(90, 40)],
        ["What?", "What is this, and why?"],
    )
    options = {"prompts": questions, "processor": processor, "max_new_tokens": 6}
    for extra in ({}, {"cfg_scale": 1.0}):
        expected = model.diffusion_generate(images, **options, **extra)
        assert tree(model, images, **options, **extra).token_ids == expected.token_ids


@pytest.mark.parametrize("queries", [slice(0, 7), slice(4, 7), slice(0, 2)])
def test_merged_softmaxes_are_the_whole_one(queries):
    """Two rows, one padded on the left; a trunk and branches of RoI tokens and captions."""
    region_ids = torch.tensor([[-1, -1, 0, 1, 0, 0, 1], [-1, -1, -1, 0, 0, 0, -1]])
    role_ids = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 2, 2, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0]])
    allowed = allowed_attention("independent", region_ids, role_ids, mask)[:, queries]
    drawn = allowed & mask[:, queries, None].bool()  # padding attends to nothing
    query = torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(0))[:, :, queries]
    key, value = torch.randn(2, 2, 2, 7, 8, generator=torch.Generator().manual_seed(1))
    key4, value4 = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query @ key4.transpose(2, 3) * 0.3).masked_fill(~drawn[:, None], -torch.inf)
    expected = (scores.softmax(-1).nan_to_num() @ value4).transpose(1, 2)

    packed = TreeMask.of(region_ids, role_ids, mask, queries, None)
    got, _ = tree_attention(None, query, key, value, packed, scaling=0.3)
    assert torch.allclose(got, expected, atol=1e-6)


def test_a_model_is_loaded_and_trained_with_it(make, draw_image, blobs, tmp_path):
    model, processor = make(**INDEPENDENT)
    model.save_pretrained(tmp_path)
    load = PerceptionDLMForConditionalGeneration.from_pretrained
    inputs = processor(
        [draw_image(61, 47), draw_image(40, 40)],
        masks=[blobs(61, 47, 3), blobs(40, 40, 1)],
        captions=[["a", "b", "c"], ["d"]],
    )
    inputs |= {"timesteps": torch.tensor([0.3, 0.8]), "noise": torch.rand(inputs["labels"].shape)}
    losses, gradients = [], []
    for implementation in ("sdpa", "tree"):
        loaded = load(tmp_path, attn_implementation=implementation)
        loss = loaded(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(loaded.language_model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_the_joint_layout_has_no_tree(make, draw_image, blobs, tree):
    model, processor = make()
    with pytest.raises(ValueError, match="region_layout 'independent' for attn_implementation"):
        tree(model, draw_image(40, 40), blobs(40, 40, 2), processor=processor)
