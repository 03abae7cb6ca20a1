"""The likelihood bound against every mask counted out, on a tiny random model."""

import itertools

import pytest
import torch
from perceptiondlm.evaluation.likelihood import (
    AnswerLogits,
    draw_masks,
    log_likelihood_bound,
    masked_counts,
)


@pytest.fixture(params=["released", "independent"])
def question(request, make, picture):
    """Logits of a question's answer, its prompt's inputs, the model and an answer of 4 tokens."""
    model, processor = make(region_layout=request.param)
    inputs = processor([picture(40, 30)], prompts=["What is it?"], max_new_tokens=4)
    target = torch.tensor([40, 41, 60, model.config.eot_token_id])
    return AnswerLogits(model, dict(inputs)), inputs, model, target


def enumerate_bound(model, inputs, target) -> float:
    """Equation 6 of LLaDA with every count and every mask, through the whole network."""
    n, expected = len(target), 0.0
    for count in range(1, n + 1):
        choices = list(itertools.combinations(range(n), count))
        for choice in choices:
            answer = target.clone()
            answer[list(choice)] = model.config.mask_token_id
            ids = inputs["input_ids"].clone()
            ids[0, -n:] = answer
            with torch.no_grad():
                logits = model(**{**inputs, "input_ids": ids}).logits[0, -n:].double()
            found = logits.log_softmax(-1)[torch.arange(n), target]
            expected += n / count * float(found[list(choice)].sum()) / (n * len(choices))
    return expected


def test_the_bound_is_what_enumeration_gives(question):
    logits, inputs, model, target = question
    generator = torch.Generator().manual_seed(0)
    exact = enumerate_bound(model, dict(inputs), target)
    estimates = torch.tensor(
        [
            log_likelihood_bound(
                logits,
                target,
                model.config.mask_token_id,
                samples=64,
                batch_size=32,
                generator=generator,
            )
            for _ in range(25)
        ]
    )
    error = float(estimates.std() / len(estimates) ** 0.5)
    assert error < 0.02 * abs(exact)
    assert abs(float(estimates.mean()) - exact) < 4 * error


def test_one_token_needs_no_luck(question):
    logits, inputs, model, target = question
    single = AnswerLogits(model, one_position(inputs))
    bounds = [
        log_likelihood_bound(single, target[:1], model.config.mask_token_id, samples=n)
        for n in (1, 3)
    ]
    logit = single(torch.tensor([[model.config.mask_token_id]]))[0, 0].double()
    exact = float(logit.log_softmax(-1)[target[0]])
    assert bounds == pytest.approx([exact] * 2, rel=1e-6)


def one_position(inputs) -> dict:
    """The same prompt with one answer position instead of four."""
    names = {"input_ids", "attention_mask", "position_ids", "region_ids", "role_ids"}
    cut = {k: v[:, :-3] if k in names else v for k, v in inputs.items()}
    return cut | {"response_columns": inputs["response_columns"][..., :-3]}


def test_the_batch_size_changes_nothing(question):
    logits, _, model, target = question
    bounds = [
        log_likelihood_bound(
            logits,
            target,
            model.config.mask_token_id,
            samples=10,
            batch_size=size,
            generator=torch.Generator().manual_seed(3),
        )
        for size in (1, 4, 10)
    ]
    assert bounds == pytest.approx([bounds[0]] * 3, rel=1e-5)


def test_counts_are_uniform_and_masks_have_them():
    generator = torch.Generator().manual_seed(0)
    counts = torch.cat([masked_counts(5, 10, generator) for _ in range(200)])
    assert torch.bincount(counts, minlength=6)[1:].tolist() == [400] * 5
    masks = draw_masks(counts, 5, generator)
    assert torch.equal(masks.sum(-1), counts)
    assert masks.float().mean(0).tolist() == pytest.approx([0.6] * 5, abs=0.05)


@pytest.mark.parametrize("options", [{"samples": 0}, {"batch_size": 0}])
def test_no_samples_are_refused(question, options):
    logits, _, model, target = question
    with pytest.raises(ValueError, match="of 1 or more, got"):
        log_likelihood_bound(logits, target, model.config.mask_token_id, **options)
