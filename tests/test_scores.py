"""How sure the model is: scores recomputed from the steps, candidates, and what scores tell."""

import math

import pytest
import torch
from perceptiondlm.generation_diffusion import DiffusionGenerationMixin
from perceptiondlm.generation_loop import Sampler

LAYOUTS = ["released", "independent"]
RULES = [
    {},
    {"steps": 2},
    {"steps": 12},
    {"threshold": 0.3},
    {"entropy_bound": 2.0, "steps": 4},
    {"threshold": 0.2, "remask_below": 0.3},
    {"remasking": "random", "seed": 3},
    {"temperature": 0.7, "seed": 3, "top_k": 20},
    {"suppress_tokens": list(range(0, 460, 3))},
]


@pytest.fixture(params=LAYOUTS)
def pair(request, make):
    return make(region_layout=request.param)


@pytest.fixture
def predictions(monkeypatch):
    """Everything that the sampler was shown and said, in the order of the steps."""
    seen = []
    plain = Sampler.__call__

    def watched(self, logits):
        prediction = plain(self, logits)
        shown = logits.double()
        if self.suppressed is not None:
            shown[..., self.suppressed] = -math.inf
        if self.top_k is not None:
            smallest = shown.topk(self.top_k).values[..., -1:]
            shown = shown.masked_fill(shown < smallest, -math.inf)
        seen.append((shown.log_softmax(-1), prediction.tokens))
        return prediction

    monkeypatch.setattr(Sampler, "__call__", watched)
    return seen


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_the_log_probabilities_at_the_steps_that_committed(
    pair, scene, predictions, rule
):
    model, processor = pair
    image, masks = scene((61, 47), 2)
    mask = model.config.mask_token_id
    steps = []
    out = model.diffusion_generate(
        image,
        masks,
        caption_length=6,
        processor=processor,
        callback=lambda step, nested: steps.append(nested[0]),
        return_token_scores=True,
        **rule,
    )
    if len(predictions) != len(steps):
        pytest.skip("some predictions were taken again")
    (order,) = processor(image, masks=masks)["region_orders"].tolist()
    eot = model.config.eot_token_id
    for k in range(2):
        ids, place = out.token_ids[0][k], order.index(k)
        length = out.lengths[0][k]
        expected = []
        for i, token in enumerate(ids[: length + 1]):
            # The last step before which the position was masked, and after which it no more is.
            masked = [True, *(step[k][i] == mask for step in steps)]
            last = max(
                (s for s in range(len(steps)) if masked[s] and not masked[s + 1]), default=None
            )
            if last is None or predictions[last][1][0, place, i] != token:
                pytest.skip("the mask token itself was committed")
            expected.append(float(predictions[last][0][0, place, i, token]))
        assert out.token_scores[0][k] == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert out.scores[0][k] == pytest.approx(sum(expected) / len(expected), rel=1e-6, abs=1e-9)
        assert eot in ids[: length + 1] or length == 6 or ids[length] in model._end_ids()


def test_candidates_come_the_likeliest_first(pair, scene):
    model, processor = pair
    image, masks = scene((61, 47), 2)
    options = {"temperature": 1.0, "seed": 4, "caption_length": 4, "processor": processor}
    out = model.diffusion_generate(image, masks, num_return_sequences=3, **options)
    single = model.diffusion_generate(image, masks, **options)
    for k, own in enumerate(out.candidates[0]):
        scores = [one.score for one in own]
        assert len(own) == 3 and scores == sorted(scores, reverse=True)
        assert out.texts[0][k] == own[0].text and out.scores[0][k] == own[0].score
        assert single.token_ids[0][k] in [one.token_ids for one in own]
    assert len({tuple(one.token_ids) for own in out.candidates[0] for one in own}) > 2
    again = model.diffusion_generate(image, masks, num_return_sequences=3, **options)
    assert again.candidates == out.candidates


def test_answers_have_candidates_too(pair, draw_image):
    model, processor = pair
    out = model.diffusion_generate(
        draw_image(40, 30),
        prompts=["a?", "b?"],
        max_new_tokens=3,
        temperature=1.0,
        num_return_sequences=2,
        seed=0,
        processor=processor,
    )
    assert [[len(own) for own in row] for row in out.candidates] == [[2], [2]]


def test_candidates_that_would_all_be_the_same_are_refused(pair, scene):
    model, processor = pair
    image, masks = scene((61, 47), 2)
    run = model.diffusion_generate
    with pytest.raises(ValueError, match="a temperature above 0 for several num_return_sequences"):
        run(image, masks, num_return_sequences=2, processor=processor)
    inputs = processor(image, masks=masks, caption_length=3)
    with pytest.raises(ValueError, match="num_return_sequences 1 with `inputs`"):
        run(inputs=inputs, num_return_sequences=2, temperature=1.0, processor=processor)
    with pytest.raises(ValueError, match="return_history False"):
        run(
            image,
            masks,
            num_return_sequences=2,
            temperature=1.0,
            return_history=True,
            processor=processor,
        )


def test_a_batch_scores_as_single_calls_do(pair, scene):
    model, processor = pair
    drawn = [scene((61, 47), 2, seed) for seed in range(2)]
    images, masks = [one for one, _ in drawn], [own for _, own in drawn]
    options = {"caption_length": 4, "processor": processor}
    together = model.diffusion_generate(images, masks, **options)
    for image, own, scores in zip(images, masks, together.scores, strict=True):
        alone = model.diffusion_generate(image, own, **options)
        assert alone.scores[0] == pytest.approx(scores, rel=1e-4)


def test_the_model_offers_it_all():
    for name in ("diffusion_generate", "diffusion_score", "see", "generate"):
        assert callable(getattr(DiffusionGenerationMixin, name))
    assert torch.is_grad_enabled()
