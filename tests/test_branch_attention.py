"""Flash attention over branches, with flash-attn's packed kernel played by plain softmaxes."""

import pytest
import torch
from perceptiondlm import modeling_attention as branch_attention

INDEPENDENT = {"region_layout": "independent"}


def plain_varlen(query, key, value, starts_q, starts_k, longest_q, longest_k, scaling):
    """What flash-attn documents of its packed call: outputs, and log-sum-exps (H, N)."""
    assert longest_q == starts_q.diff().max() and longest_k == starts_k.diff().max()
    assert starts_q[-1] == len(query) and starts_k[-1] == len(key) == len(value)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output, log_sum = torch.zeros_like(query), query.new_zeros(query.shape[1], len(query))
    for g in range(len(starts_q) - 1):
        q, k = (slice(int(s[g]), int(s[g + 1])) for s in (starts_q, starts_k))
        scores = torch.einsum("nhd,mhd->hnm", query[q], key[k]) * scaling
        output[q] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), value[k])
        log_sum[:, q] = scores.logsumexp(-1)
    return output, log_sum


@pytest.fixture
def flash(monkeypatch):
    """Runs a call of a model with attention "flash_attention_2", whose kernel is the plain one."""
    monkeypatch.setattr(branch_attention, "flash_varlen", plain_varlen)

    def run(model, *args, **options):
        config = model.language_model.config
        before, config._attn_implementation = config._attn_implementation, "flash_attention_2"
        try:
            return model.diffusion_generate(*args, **options)
        finally:
            config._attn_implementation = before

    return run


@pytest.mark.parametrize("text", [{}, {"num_key_value_heads": 2}])
def test_regions_of_several_pictures_are_captioned_as_without(make, picture, blobs, flash, text):
    model, processor = make(text=text, **INDEPENDENT)
    sizes, counts = [(61, 47), (90, 30), (40, 40)], [3, 8, 1]
    pictures = [picture(*size) for size in sizes]
    masks = [blobs(*size, count=n) for size, n in zip(sizes, counts, strict=True)]
    options = {"processor": processor, "caption_length": 5}
    expected = model.diffusion_generate(pictures, masks, **options)
    assert flash(model, pictures, masks, **options).token_ids == expected.token_ids


def test_questions_of_several_lengths_are_answered_as_without(make, picture, flash):
    model, processor = make(**INDEPENDENT)
    pictures, questions = [picture(40, 40), picture(90, 40)], ["What?", "What is this, and why?"]
    options = {"prompts": questions, "processor": processor, "max_new_tokens": 6}
    for extra in ({}, {"cfg_scale": 1.0}):
        expected = model.diffusion_generate(pictures, **options, **extra)
        assert flash(model, pictures, **options, **extra).token_ids == expected.token_ids


def test_merged_softmaxes_are_the_whole_one(monkeypatch):
    """Two rows, one padded on the left; two branches and a trunk; against a drawn matrix."""
    monkeypatch.setattr(branch_attention, "flash_varlen", plain_varlen)
    region_ids = torch.tensor([[-1, -1, 0, 1, 0, 0, 1], [-1, -1, -1, 0, 0, 0, -1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0]])
    drawn = torch.tensor(
        [
            [[1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 0, 0, 1]],
            [[0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]],
        ]
    ).bool()
    query = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    key, value = torch.randn(2, 2, 2, 7, 8, generator=torch.Generator().manual_seed(1))
    attend = branch_attention.BranchAttention(region_ids, mask, slice(4, 7), None)
    key4, value4 = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query @ key4.transpose(2, 3) * 0.3).masked_fill(~drawn[:, None], -torch.inf)
    expected = (scores.softmax(-1).nan_to_num() @ value4).transpose(1, 2)
    assert torch.allclose(attend(query, key, value, 0.3), expected, atol=1e-6)
