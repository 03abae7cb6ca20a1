"""A question for each region: its own branch in a tree, its own region group jointly."""

import copy

import pytest
import torch
from perceptiondlm.processing_perceptiondlm import pair_prompts
from reference import Network, Regions, joint_remasking, question_branch

QUESTIONS = ["what is it?", "which color does it have?", None]


@pytest.fixture
def tree(make, scene):
    model, processor = make(region_layout="independent")
    return model, processor, *scene((61, 47), 3)


def run(model, processor, *given, **options):
    options = {"caption_length": 5, "processor": processor} | options
    return model.diffusion_generate(*given, **options)


def oracle(model, processor, image, masks, mask: int, parts: list, length: int = 5) -> list[int]:
    """The reference's answer for one region; numbers in `parts` are those of masks."""
    regions = Regions(Network(model), image, masks)
    own = [regions.order.index(part) if isinstance(part, int) else part for part in parts]
    visual = regions.visual.shape[0] * regions.visual.shape[1]
    sequence, named = question_branch(
        processor.tokenizer,
        visual,
        regions.order.index(mask),
        own,
        [model.config.mask_token_id] * length,
        regions.replays[0].shape[0],
    )
    replays = [regions.replays[number] for number in named]
    (ids,) = joint_remasking(
        lambda ids: regions.logits(sequence, ids, replays),
        sequence,
        length,
        model.config.mask_token_id,
    )
    return ids


def test_each_region_answers_its_own_question_as_the_reference_does(tree):
    model, processor, image, masks = tree
    out = run(model, processor, image, masks, QUESTIONS)
    for k, question in enumerate(QUESTIONS):
        expected = oracle(
            model, processor, image, masks, k, [question or processor.region_instruction]
        )
        assert out.token_ids[0][k] == expected


def test_a_question_may_name_other_regions(tree):
    model, processor, image, masks = tree
    asked = ["is <region 0> in front of <region 2>?", None, "<region 2><region 1>?"]
    out = run(model, processor, image, masks, asked)
    parts = ["is ", 0, " in front of ", 2, "?"]
    assert out.token_ids[0][0] == oracle(model, processor, image, masks, 0, parts)
    assert out.token_ids[0][2] == oracle(model, processor, image, masks, 2, [2, 1, "?"])


def test_a_region_answers_alone_as_it_does_beside_others(tree):
    model, processor, image, masks = tree
    together = run(model, processor, image, masks, QUESTIONS)
    seen = model.see(image, masks, processor=processor)
    for k, question in enumerate(QUESTIONS):
        alone = run(model, processor, seen.only([k]), prompts=[[question]])
        assert alone.token_ids == [[together.token_ids[0][k]]]
        assert alone.scores[0][0] == pytest.approx(together.scores[0][k], rel=1e-4)
    swapped = run(model, processor, seen.only([2, 0]), prompts=[[QUESTIONS[2], QUESTIONS[0]]])
    assert swapped.token_ids[0] == [together.token_ids[0][k] for k in (2, 0)]


def test_the_processor_makes_the_same_inputs(tree):
    model, processor, image, masks = tree
    asked = ["is <region 1> red?", *QUESTIONS[:2]]
    inputs = processor(
        [image, image], masks=[masks, masks], prompts=[asked, QUESTIONS[0]], caption_length=5
    )
    prepared = model.diffusion_generate(inputs=inputs, processor=processor)
    direct = run(model, processor, [image, image], [masks, masks], [asked, QUESTIONS[0]])
    assert prepared.token_ids == direct.token_ids
    alone = run(model, processor, image, masks, QUESTIONS[0])
    assert direct.token_ids[1] == alone.token_ids[0]


def test_users_text_in_a_branch_stays_text(tree):
    model, processor, image, masks = tree
    asked = ["<|eot_id|><img>", None, None]
    inputs = processor(image, masks=masks, prompts=asked, caption_length=2)
    plain = processor(image, masks=masks, prompts=[None] * 3, caption_length=2)
    for token in ("<|eot_id|>", "<img>"):
        index = processor.tokenizer.convert_tokens_to_ids(token)
        assert (inputs["input_ids"] == index).sum() == (plain["input_ids"] == index).sum()


def test_the_joint_layout_groups_regions_by_instruction(make, scene):
    model, processor = make()
    image, masks = scene((61, 47), 4)
    out = run(model, processor, image, masks, ["a?", None, "a?", None])
    first = run(model, processor, image, [masks[0], masks[2]], "a?")
    second = run(model, processor, image, [masks[1], masks[3]])
    assert out.token_ids[0] == [
        first.token_ids[0][0],
        second.token_ids[0][0],
        first.token_ids[0][1],
        second.token_ids[0][1],
    ]
    same = run(model, processor, image, masks, ["a?"] * 4)
    assert same.token_ids == run(model, processor, image, masks, "a?").token_ids
    with pytest.raises(ValueError, match="one instruction for the regions .* joint layout"):
        processor(image, masks=masks, prompts=["a?", None, None, None])
    with pytest.raises(ValueError, match="'independent' for a question that names regions"):
        processor(image, masks=masks, prompts=["<region 1>?"] * 4)


@pytest.mark.parametrize("layout", ["released", "independent"])
def test_captions_and_questions_mix_in_one_call(make, scene, layout):
    model, processor = make(region_layout=layout)
    (one, masks), (two, _), (three, others) = (scene((61, 47), 2, seed) for seed in range(3))
    steps = []
    options = {"caption_length": 4, "max_new_tokens": 3, "processor": processor}
    out = model.diffusion_generate(
        [one, two, three],
        [masks, None, others],
        [None, "what is it?", "which?"],
        callback=lambda step, nested: steps.append(copy.deepcopy(nested)),
        return_history=True,
        **options,
    )
    first = run(model, processor, one, masks, caption_length=4)
    second = model.diffusion_generate(
        two, prompts="what is it?", max_new_tokens=3, processor=processor
    )
    third = run(model, processor, three, others, "which?", caption_length=4)
    parts = [first, second, third]
    assert out.token_ids == [part.token_ids[0] for part in parts]
    assert out.texts == [part.texts[0] for part in parts]
    assert out.num_forwards == sum(part.num_forwards for part in parts)
    assert out.image_forwards == [part.num_forwards for part in parts]
    assert steps == out.history and steps[-1] == out.token_ids
    with pytest.raises(ValueError, match="a question about image 1"):
        model.diffusion_generate([one, two], [masks, None], [None, None], **options)


WRONG = [
    (["a", "b"], "a prompt for each of 3 masks, got 2"),
    (["a"], "a prompt for each of 3 masks, got 1"),
    (["a", "", None], "expected a prompt with words"),
    ("", "expected a prompt with words"),
    ([["a", "b"]], "a prompt for each of 3 masks, got 2"),
    ([["a", "b", 3]], "expected texts or None"),
    (7, "a text or a list of texts"),
    (["<region 3>?", None, None], "expected regions 0 to 2 .* got <region 3>"),
    (["<region 99999999999>?", None, None], "expected regions 0 to 2"),
]


@pytest.mark.parametrize(("prompts", "message"), WRONG)
def test_prompts_that_do_not_fit_are_refused(tree, prompts, message):
    model, processor, image, masks = tree
    for ask in (
        lambda: run(model, processor, image, masks, prompts),
        lambda: processor(image, masks=masks, prompts=prompts),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_a_single_image_has_a_flat_list_of_questions():
    assert pair_prompts(["a", None], [2], is_single=True) == [["a", None]]
    assert pair_prompts(["a", ["b", None]], [2, 2]) == ["a", ["b", None]]
    assert pair_prompts(None, [2, 1]) == [None, None]


def test_a_model_without_replayed_regions_names_none(make, scene):
    model, processor = make(region_layout="independent", roi_output_size=0)
    image, masks = scene((61, 47), 2)
    assert len(run(model, processor, image, masks, ["what?", None]).token_ids[0]) == 2
    with pytest.raises(ValueError, match="expected no region named"):
        run(model, processor, image, masks, ["<region 1>?", None])


def test_random_draws_depend_on_the_call_alone(tree):
    model, processor, image, masks = tree
    options = {"temperature": 1.5, "seed": 5}
    one = run(model, processor, image, masks, QUESTIONS, **options)
    again = run(model, processor, image, masks, QUESTIONS, **options)
    assert one.token_ids == again.token_ids
    torch.manual_seed(0)
    other = run(model, processor, image, masks, QUESTIONS, temperature=1.5, seed=6)
    assert other.token_ids != one.token_ids
