"""The noise of training samples, the recorded losses, and which positions learn."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from perceptiondlm.modeling_loss import MINIMUM_MASK_RATE, draw_masked, mask_rate
from perceptiondlm.processing_sequence import pad_sequences
from perceptiondlm.training.recipe_sections import MaskingRecipe
from perceptiondlm.training.samples import (
    DiffusionCollator,
    Sample,
    choose_regions,
    draw_prompts,
    share_trunk,
)
from safetensors.torch import load_file


@pytest.fixture
def samples(make, draw_image, blobs):
    """Region samples and questions of different lengths, and their processor."""
    _, processor = make(num_region_prompts=3)
    built = []
    for i in range(6):
        if i % 3 == 2:
            features = dict(processor.image_processor([draw_image(40, 60, seed=i)]))
            text = "<img><IMG_CONTEXT></img>\nwhat?<|eot_id|>"
            sequence = processor.chat_sequence(text, features, answer="a" * (i + 1))
        else:
            masks = blobs(60, 40, 1 + i % 3, seed=i)
            features = dict(processor.image_processor([draw_image(60, 40, seed=i)], [masks]))
            features.pop("region_orders")
            slots = processor.caption_slots([f"region {k}" for k in range(len(masks))], 0, 8)
            sequence = processor.region_sequence(features, 0, slots)
        built.append(Sample(sequence, features, (0, i)))
    return built, processor


def drawn(batch: dict) -> list[list[bool]]:
    """Which label positions of each row are masked, without padding."""
    masked = draw_masked(batch["labels"], mask_rate(batch["timesteps"], None), batch["noise"])
    return [
        row[row_labels >= 0].tolist()
        for row, row_labels in zip(masked, batch["labels"], strict=True)
    ]


def test_a_sample_has_the_same_noise_in_every_batch(samples):
    samples, processor = samples
    collate = DiffusionCollator(processor, MaskingRecipe(), seed=1)
    together = drawn(collate(samples))
    assert together == [drawn(collate([sample]))[0] for sample in samples]


def test_padding_to_a_multiple_changes_neither_the_noise_nor_the_loss(samples, make):
    samples, processor = samples
    model, _ = make(num_region_prompts=3)
    exact = DiffusionCollator(processor, MaskingRecipe(), seed=1)(samples)
    padded = DiffusionCollator(processor, MaskingRecipe(), seed=1, pad_to_multiple_of=32)(samples)
    length = exact["input_ids"].shape[1]
    assert length % 32 and padded["input_ids"].shape[1] == -(-length // 32) * 32
    assert drawn(padded) == drawn(exact)
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in (exact, padded)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_noise_changes_with_the_seed_and_the_key(samples):
    samples, processor = samples
    one = DiffusionCollator(processor, MaskingRecipe(), seed=1)(samples)
    other = DiffusionCollator(processor, MaskingRecipe(), seed=2)(samples)
    assert not torch.equal(one["noise"], other["noise"])
    assert len(set(one["timesteps"].tolist())) == len(samples)


def test_a_mixed_batch_predicts_what_its_samples_predict_alone(samples, make):
    samples, processor = samples
    model, _ = make(num_region_prompts=3)
    collate = DiffusionCollator(processor, MaskingRecipe(), seed=1)
    with torch.no_grad():
        together = model(**collate(samples)).loss
        alone = [model(**collate([sample])).loss for sample in samples]
    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)


def test_complementary_twins_mask_every_label_once(samples):
    samples, processor = samples
    collate = DiffusionCollator(processor, MaskingRecipe(complementary=True), seed=1)
    batch = collate(samples)
    assert len(batch["labels"]) == 2 * len(samples)
    masked = drawn(batch)
    for one, other in zip(masked[::2], masked[1::2], strict=True):
        assert [not value for value in one] == other


def test_complementary_timesteps_give_complementary_rates(samples):
    samples, processor = samples
    collate = DiffusionCollator(processor, MaskingRecipe(complementary=True), seed=1)
    rates = mask_rate(collate(samples)["timesteps"], None)
    assert torch.allclose(rates[::2] + rates[1::2], torch.ones(len(samples)), atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_fully_masked_samples_is_as_asked(samples, share):
    samples, processor = samples
    collate = DiffusionCollator(processor, MaskingRecipe(full_mask_share=share))
    many = [Sample(samples[0].sequence, {}, (0, i)) for i in range(400)]
    full = (collate(many)["timesteps"] == 1).float().mean().item()
    assert full == pytest.approx(share, abs=0.08)


def test_t_is_uniform_between_its_limits(samples):
    samples, processor = samples
    collate = DiffusionCollator(processor, MaskingRecipe(t_low=0.2, t_high=0.6))
    many = [Sample(samples[0].sequence, {}, (0, i)) for i in range(400)]
    t = np.sort(collate(many)["timesteps"].numpy())
    assert 0.2 <= t[0] and t[-1] <= 0.6
    assert max(b - a for a, b in pairwise(t)) < 0.02


def test_an_evaluation_level_fixes_t_and_keeps_the_draws(samples):
    samples, processor = samples
    quarter = DiffusionCollator(processor, MaskingRecipe(), level=0.25)(samples)
    whole = DiffusionCollator(processor, MaskingRecipe(), level=1.0)(samples)
    assert set(quarter["timesteps"].tolist()) == {0.25}
    assert torch.equal(quarter["noise"], whole["noise"])
    assert all(all(row) for row in drawn(whole))


def test_images_without_regions_have_no_patches(samples):
    samples, processor = samples
    batch = DiffusionCollator(processor, MaskingRecipe())(samples)
    tiles = [len(sample.features["pixel_values"]) for sample in samples]
    with_regions = ["boxes" in sample.features for sample in samples]
    parts = batch["region_patches"].split(tiles)
    assert [bool(part.any()) for part in parts] == with_regions
    assert batch["box_images"].tolist() == [0, 1, 1, 3, 4, 4]


def test_chosen_regions_take_their_prompts_along(samples):
    samples, _ = samples
    features = samples[1].features
    chosen = choose_regions(features, [1], [2])
    assert torch.equal(chosen["region_patches"][:, 2], features["region_patches"][:, 1])
    assert not chosen["region_patches"][:, :2].any()
    assert torch.equal(chosen["boxes"], features["boxes"][1:])


def test_prompts_are_distinct_and_all_are_used():
    rng = np.random.default_rng(0)
    draws = [draw_prompts(rng, 4, 6, permute=True) for _ in range(50)]
    assert all(len(set(draw)) == 4 for draw in draws)
    assert {k for draw in draws for k in draw} == set(range(6))
    assert draw_prompts(rng, 4, 6, permute=False) == [0, 1, 2, 3]


def test_the_collator_and_model_give_the_recorded_training_losses(vectors, load):
    manifest = json.loads((vectors / "manifest.json").read_text())
    model, processor = load("released-region")
    model.config.roi_stride = 28  # the released training's
    try:
        for case in manifest["train_cases"]:
            loss, recorded = recorded_loss(vectors, manifest, case, model, processor)
            assert loss == pytest.approx(recorded, rel=1e-6)
    finally:
        model.config.roi_stride = 32


def recorded_loss(vectors, manifest, case, model, processor) -> tuple[float, float]:
    """The loss of a recorded sample made as training makes it, with the recorded noise."""
    recorded = load_file(vectors / f"{case['name']}.safetensors")
    region_case = next(c for c in manifest["region_cases"] if c["name"] == case["region_case"])
    masks = [vectors / name for name in region_case["masks"]]
    image = vectors / f"{region_case['name']}.png"
    features = dict(processor.image_processor([image], [masks]))
    assert features.pop("region_orders") == [region_case["area_order"]]
    slots = processor.caption_slots(case["captions"], len(masks), None)  # in area order
    sample = Sample(processor.region_sequence(features, 0, slots), features, (0, 0))
    batch = DiffusionCollator(processor, MaskingRecipe())([sample])
    batch |= {"timesteps": recorded["t"], "noise": recorded["u"]}
    with torch.no_grad():
        return model(**batch).loss.item(), recorded["loss"].item()


def test_the_least_masking_rate_is_the_published_one():
    assert MINIMUM_MASK_RATE == 1e-3


def test_questions_that_share_an_image_are_predicted_as_each_alone(make, draw_image):
    model, processor = make(region_layout="independent")
    features = dict(processor.image_processor([draw_image(90, 40)]))
    questions = ["What?", "Is there a red object, or none at all?", "How many?"]
    sequences = [
        processor.chat_sequence(
            f"<img><IMG_CONTEXT></img>\n{question}<|eot_id|>", features, max_new_tokens=3
        )
        for question in questions
    ]

    def answers(sequence):
        batch = pad_sequences([sequence], processor.tokenizer.pad_token_id, with_labels=False)
        with torch.no_grad():
            return model(**batch, **features).logits[0, sequence.prompt_length :]

    shared = share_trunk(sequences)
    assert shared.labels[: shared.prompt_length] == [-100] * shared.prompt_length
    together, apart = answers(shared), torch.cat([answers(s) for s in sequences])
    assert (together - apart).abs().max() < 1e-5 * apart.abs().max()


def test_other_trunks_are_not_shared(make, draw_image):
    _, processor = make(region_layout="independent")
    texts = [f"{word} <img><IMG_CONTEXT></img>\nwhat?" for word in ("one", "two")]
    features = dict(processor.image_processor([draw_image(40, 40)]))
    with pytest.raises(ValueError, match="the same trunk"):
        share_trunk([processor.chat_sequence(text, features, max_new_tokens=2) for text in texts])
