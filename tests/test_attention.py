"""Who sees whom: predicates against matrices drawn by hand, implementations against each other."""

import numpy as np
import pytest
import reference
import torch
from perceptiondlm.configuration_perceptiondlm import NO_REGION, SHARED_REGION
from perceptiondlm.modeling_attention import allowed_attention, attention_argument

S, R, C = 0, 1, 2  # roles: shared, RoI, caption

# A released prompt: two shared tokens, two regions of one RoI token with what stands between them,
# one shared token, then two captions of two tokens.
RELEASED = {
    "regions": [-1, -1, 0, NO_REGION, 1, -1, 0, 0, 1, 1],
    "roles": [S, S, R, R, R, S, C, C, C, C],
    "drawing": """
        ##########
        ##########
        ##########
        ##########
        ##########
        ##########
        ###..###..
        ###..###..
        ##..##..##
        ##..##..##
    """,
}
# A tree: two shared tokens, a fixed token of each of two branches, then captions of two tokens.
INDEPENDENT = {
    "regions": [-1, -1, 0, 1, 0, 0, 1, 1],
    "roles": [S, S, R, R, C, C, C, C],
    "drawing": """
        ##......
        ##......
        ###.....
        ##.#....
        ###.##..
        ###.##..
        ##.#..##
        ##.#..##
    """,
}
CASES = {"released": RELEASED, "independent": INDEPENDENT}


def matrix(drawing: str) -> torch.Tensor:
    return torch.tensor([[c == "#" for c in row] for row in drawing.split()])


def structure(case, padding=()):
    mask = [0 if i in padding else 1 for i in range(len(case["roles"]))]
    return [torch.tensor([values]) for values in (case["regions"], case["roles"], mask)]


@pytest.mark.parametrize("layout", CASES)
def test_the_predicate_equals_the_matrix_drawn_by_hand(layout):
    allowed = allowed_attention(layout, *structure(CASES[layout]))
    assert torch.equal(allowed[0], matrix(CASES[layout]["drawing"]))


@pytest.mark.parametrize("layout", CASES)
def test_padding_is_never_seen(layout):
    allowed = allowed_attention(layout, *structure(CASES[layout], padding=(1, 6)))
    drawn = matrix(CASES[layout]["drawing"])
    drawn[:, [1, 6]] = False
    assert torch.equal(allowed[0], drawn)


def test_the_full_layout_sees_everything():
    allowed = allowed_attention("full", *structure(RELEASED, padding=(1,)))
    assert torch.equal(allowed[0], torch.tensor([i != 1 for i in range(10)]).expand(10, 10))


@pytest.mark.parametrize("layout", CASES)
def test_a_range_of_queries_gives_those_rows(layout):
    whole = allowed_attention(layout, *structure(CASES[layout]))
    rows = allowed_attention(layout, *structure(CASES[layout]), slice(3, 6))
    assert torch.equal(rows, whole[:, 3:6])


def released_inputs(processor, draw_image, blobs, count, size=(61, 47), **options):
    return processor(draw_image(*size), masks=blobs(*size, count=count), **options)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_released_prompt_attends_as_drawn_from_its_description(
    make, tokenizer, draw_image, blobs, count
):
    model, processor = make()
    inputs = released_inputs(processor, draw_image, blobs, count, caption_length=4)
    allowed = allowed_attention(
        "released", inputs["region_ids"], inputs["role_ids"], inputs["attention_mask"]
    )
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    sequence = reference.released_sequence(tokenizer, visual, [[0] * 4] * count)
    assert torch.equal(allowed[0], sequence.allowed)


@pytest.mark.parametrize("layout", ["released", "independent"])
@torch.no_grad()
def test_eager_sdpa_and_flex_give_the_same_logits(make, draw_image, blobs, layout):
    """A padded batch, so that padding and structure meet; flex runs uncompiled."""
    model, processor = make(region_layout=layout)
    sizes = [(61, 47), (40, 90)]
    inputs = processor(
        [draw_image(*size) for size in sizes],
        masks=[blobs(*size, count=n) for size, n in zip(sizes, (3, 1), strict=True)],
        caption_length=5,
    )
    real = inputs["attention_mask"].bool()
    try:
        logits = {}
        torch.compiler.set_stance("force_eager")
        for implementation in ("eager", "sdpa", "flex_attention"):
            model.set_attn_implementation({"text_config": implementation})
            assert model.language_model.config._attn_implementation == implementation
            logits[implementation] = model(**inputs).logits[real]
    finally:
        torch.compiler.set_stance("default")
        model.set_attn_implementation("sdpa")
    largest = logits["eager"].abs().max()
    assert (logits["sdpa"] - logits["eager"]).abs().max() < 1e-5 * largest
    assert (logits["flex_attention"] - logits["eager"]).abs().max() < 1e-5 * largest


def test_each_implementation_gets_what_it_takes():
    allowed = torch.tensor([[[True, False], [True, True]]])
    assert attention_argument(torch.ones_like(allowed), "sdpa", torch.float32) is None
    bias = attention_argument(allowed, "sdpa", torch.float32)
    assert bias.tolist() == [[[[0, -torch.inf], [0, 0]]]]
    bias = attention_argument(allowed, "eager", torch.bfloat16)
    assert bias.dtype == torch.bfloat16 and bias.shape == (1, 1, 2, 2)
    assert torch.equal(bias[0, 0] == 0, allowed[0])


def test_flash_attention_takes_padding_but_no_structure():
    padding = torch.tensor([[False, True, True]]).expand(3, 3)[None]
    got = attention_argument(padding, "flash_attention_2", torch.bfloat16)
    assert got.tolist() == [[0, 1, 1]]
    tree = allowed_attention("independent", *structure(INDEPENDENT))
    with pytest.raises(ValueError, match="without region structure for flash_attention_2"):
        attention_argument(tree, "flash_attention_2", torch.bfloat16)


def test_flash_attention_with_regions_fails_clearly_in_the_model(make, draw_image, blobs):
    model, processor = make()
    inputs = released_inputs(processor, draw_image, blobs, 2, caption_length=3)
    config = model.language_model.config
    try:
        config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="load with attn_implementation 'tree'"):
            model(**inputs)
    finally:
        config._attn_implementation = "sdpa"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_another_regions_caption_changes_no_bit_in_the_independent_layout(
    make, draw_image, blobs, implementation
):
    model, processor = make(region_layout="independent")
    inputs = released_inputs(processor, draw_image, blobs, 3, caption_length=6)
    other = dict(inputs)
    caption = (inputs["region_ids"] == 1) & (inputs["role_ids"] == C)
    noise = np.random.default_rng(0).integers(0, 400, int(caption.sum()))
    other["input_ids"] = inputs["input_ids"].clone()
    other["input_ids"][caption] = torch.from_numpy(noise)
    try:
        model.set_attn_implementation({"text_config": implementation})
        before, after = model(**inputs).logits, model(**other).logits
    finally:
        model.set_attn_implementation("sdpa")
    assert torch.equal(before[~caption], after[~caption])
    assert not torch.equal(before[caption], after[caption])


@torch.no_grad()
def test_in_the_released_layout_captions_reach_each_other_through_the_prompt(
    make, draw_image, blobs
):
    """So a cached prompt is only an approximation there."""
    model, processor = make()
    inputs = released_inputs(processor, draw_image, blobs, 3, caption_length=6)
    other = dict(inputs)
    other["input_ids"] = inputs["input_ids"].clone()
    caption = (inputs["region_ids"] == 1) & (inputs["role_ids"] == C)
    other["input_ids"][caption] = 7
    before, after = model(**inputs).logits, model(**other).logits
    trunk = inputs["region_ids"] == SHARED_REGION
    assert not torch.equal(before[trunk], after[trunk])
    assert not torch.equal(before[~caption & ~trunk], after[~caption & ~trunk])


def test_every_branch_of_the_independent_layout_has_the_same_positions(make, draw_image, blobs):
    _, processor = make(region_layout="independent")
    inputs = released_inputs(processor, draw_image, blobs, 3, caption_length=4)
    regions, positions = inputs["region_ids"][0], inputs["position_ids"][0]
    trunk = positions[regions == SHARED_REGION]
    assert trunk.tolist() == list(range(len(trunk)))
    for k in range(3):
        branch = positions[regions == k].tolist()
        assert branch == list(range(len(trunk), len(trunk) + 16 + 1 + 4))
