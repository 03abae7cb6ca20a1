"""Likelihoods of given texts: against every mask counted out, on tiny random models."""

import itertools

import pytest
import torch
from perceptiondlm.generation_scoring import draw_masks, masked_counts

LAYOUTS = ["released", "independent"]
TEXTS = ["a red", "a blue cat"]


@pytest.fixture(params=LAYOUTS)
def pair(request, make):
    return make(region_layout=request.param)


def target_of(processor, text: str) -> list[int]:
    """A text's ids and the end-of-turn behind it."""
    return [*processor.tokenizer(text)["input_ids"], processor.eot_token_id]


def log_probs(model, inputs, columns, target, masked) -> float:
    """Sums the masked positions' log-probabilities, through the whole network."""
    ids = inputs["input_ids"].clone()
    shown = [i for i in range(len(target)) if i not in masked]
    ids[0, [columns[i] for i in shown]] = torch.tensor(
        [target[i] for i in shown], dtype=torch.int64
    )
    with torch.no_grad():
        logits = model(**{**inputs, "input_ids": ids}).logits[0].double().log_softmax(-1)
    return sum(float(logits[columns[i], target[i]]) for i in masked)


def enumerate_bound(model, inputs, columns, target) -> float:
    """Equation 6 of LLaDA with every count and every mask."""
    n, expected = len(target), 0.0
    for count in range(1, n + 1):
        choices = list(itertools.combinations(range(n), count))
        for masked in choices:
            found = log_probs(model, inputs, columns, target, masked)
            expected += n / count * found / (n * len(choices))
    return expected


def answer_inputs(processor, image, target):
    inputs = processor([image], prompts=["What is it?"], max_new_tokens=len(target))
    return dict(inputs), inputs["response_columns"][0, 0].tolist()


def region_inputs(processor, image, masks, k: int, target):
    """Inputs in which all regions' captions are masked, and the columns of region k's."""
    inputs = processor(image, masks=masks, caption_length=len(target))
    (order,) = inputs["region_orders"].tolist()
    return dict(inputs), inputs["response_columns"][0, order.index(k)].tolist()


def test_the_bound_of_an_answer_is_what_enumeration_gives(pair, draw_image):
    model, processor = pair
    image = draw_image(40, 30)
    target = target_of(processor, "a red")
    inputs, columns = answer_inputs(processor, image, target)
    exact = enumerate_bound(model, inputs, columns, target)
    estimates = torch.tensor(
        [
            model.diffusion_score(
                image,
                texts="a red",
                prompts="What is it?",
                samples=64,
                seed=seed,
                length=0,
                batch_size=64,
                processor=processor,
            )[0][0]
            for seed in range(12)
        ]
    )
    error = float(estimates.std() / len(estimates) ** 0.5)
    assert error < 0.05 * abs(exact)
    assert abs(float(estimates.mean()) - exact) < 4 * error


def test_one_pass_masks_all_of_a_regions_text(pair, scene):
    model, processor = pair
    image, masks = scene((61, 47), 3)
    given = [TEXTS[0], list(TEXTS), TEXTS[1]]
    found = model.diffusion_score(
        image, masks, given, method="one_pass", length=0, processor=processor
    )
    assert [isinstance(one, list) for one in found[0]] == [False, True, False]
    for k, (text, score) in enumerate(zip(given, found[0], strict=True)):
        texts, scores = ([text], [score]) if isinstance(text, str) else (text, score)
        for one, value in zip(texts, scores, strict=True):
            target = target_of(processor, one)
            inputs, columns = region_inputs(processor, image, masks, k, target)
            exact = log_probs(model, inputs, columns, target, range(len(target)))
            assert value == pytest.approx(exact, rel=1e-4)


def test_a_text_is_padded_with_end_of_turn(pair, scene):
    model, processor = pair
    image, masks = scene((61, 47), 2)
    options = {"method": "one_pass", "processor": processor}
    found = model.diffusion_score(image, masks, "a red", length=5, **options)
    target = target_of(processor, "a red")
    target += [processor.eot_token_id] * (5 - len(target))
    inputs, columns = region_inputs(processor, image, masks, 1, target)
    exact = log_probs(model, inputs, columns, target, range(5))
    assert found[0][1] == pytest.approx(exact, rel=1e-4)
    with pytest.raises(ValueError, match="a text of at most 1 tokens"):
        model.diffusion_score(image, masks, "a red", length=1, **options)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_neither_batch_size_nor_what_was_seen_before_changes_a_score(pair, scene, size):
    model, processor = pair
    image, masks = scene((61, 47), 2)
    options = {"samples": 5, "length": 0, "processor": processor}
    expected = model.diffusion_score(image, masks, [TEXTS, TEXTS[0]], **options)
    seen = model.see(image, masks, processor=processor)
    for given in ((image, masks), (seen, None), (seen, None)):
        found = model.diffusion_score(*given, [TEXTS, TEXTS[0]], batch_size=size, **options)
        assert found[0][0] == pytest.approx(expected[0][0], rel=1e-4)
        assert found[0][1] == pytest.approx(expected[0][1], rel=1e-4)


def test_counts_are_uniform_and_masks_have_them():
    generator = torch.Generator().manual_seed(0)
    counts = torch.cat([masked_counts(5, 10, generator) for _ in range(200)])
    assert torch.bincount(counts, minlength=6)[1:].tolist() == [400] * 5
    masks = draw_masks(counts, 5, generator)
    assert torch.equal(masks.sum(-1), counts)
    assert masks.float().mean(0).tolist() == pytest.approx([0.6] * 5, abs=0.05)


WRONG = [
    ({"texts": None}, "expected texts to score"),
    ({"texts": ["a"]}, "for each of 2 regions"),
    ({"texts": ["a", "b", "c"]}, "for each of 2 regions"),
    ({"texts": ["a", []]}, "a text or a list of texts"),
    ({"texts": ["a", 3]}, "a text or a list of texts"),
    ({"samples": 0}, "samples to be an integer of at least 1"),
    ({"batch_size": 0}, "batch_size to be an integer of at least 1"),
    ({"method": "exact"}, "method among"),
    ({"length": -1}, "length to be an integer"),
    ({"masks": None}, "expected masks, or prompts"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_cannot_be_scored_is_refused(make, scene, changes, message):
    model, processor = make()
    image, masks = scene((61, 47), 2)
    given = {"images": image, "masks": masks, "texts": "a", "length": 0} | changes
    with pytest.raises(ValueError, match=message):
        model.diffusion_score(**given, processor=processor)


@pytest.mark.parametrize("options", [{"caption_length": 2}, {"template": "a {red|blue} {1}"}])
def test_forward_passes_that_a_caller_runs_keep_no_gradients(pair, draw_image, options):
    model, processor = pair
    steps = model.diffusion_steps(
        draw_image(40, 30), [{"box": [2, 2, 20, 20]}], processor=processor, **options
    )
    with torch.enable_grad():
        logits = next(steps).run()
        assert not logits.requires_grad
        assert not steps.send(logits).run().requires_grad
