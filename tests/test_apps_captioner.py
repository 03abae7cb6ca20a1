"""The captioner: results, partial texts, streams."""

import json
import threading

import pytest
from perceptiondlm.apps.captioning.captioner import (
    MASKED,
    Answers,
    RegionCaptioner,
    RegionCaptions,
    partial_text,
)
from PIL import Image, ImageChops

LENGTH = 8


@pytest.fixture(scope="module")
def captioner(converted):
    return RegionCaptioner.from_pretrained(converted("released-region"), caption_length=LENGTH)


@pytest.fixture(scope="module")
def base(converted):
    return RegionCaptioner.from_pretrained(converted("released-base"), max_new_tokens=LENGTH)


@pytest.fixture
def scene(vectors):
    """An image and three masks, as paths."""
    return vectors / "region_0.png", [vectors / f"region_0_mask_{i}.png" for i in range(3)]


def test_captions_are_the_models_own(captioner, scene):
    image, masks = scene
    out = captioner.model.diffusion_generate(
        image, masks, processor=captioner.processor, caption_length=LENGTH
    )
    result = captioner(image, masks)
    assert result.captions == out.texts[0]
    assert (result.num_forwards, result.tokens_per_forward) == (LENGTH, 3.0)


def test_a_result_prints_as_a_numbered_list(captioner, scene):
    image, masks = scene
    result = captioner(image, masks)
    assert str(result) == "\n".join(f"{i}  {c}" for i, c in enumerate(result.captions, 1))


def test_a_result_turns_into_json_with_box_and_area(captioner, scene):
    image, masks = scene
    content = json.loads(json.dumps(captioner(image, masks).to_dict()))
    mask = Image.open(masks[1])
    assert content["regions"][1]["box"] == list(mask.getbbox())
    assert content["regions"][1]["area"] == sum(mask.histogram()[1:])
    assert (content["width"], content["height"]) == mask.size


def test_a_result_draws_itself(captioner, scene):
    image, masks = scene
    assert captioner(image, masks).draw().width > 700


def test_an_option_of_a_call_comes_before_the_captioners(captioner, scene):
    assert captioner(*scene, steps=2).num_forwards == 2


@pytest.mark.parametrize("options", [{"stepz": 2}, {"steps": 0}])
def test_an_option_there_is_none_of_is_refused(captioner, scene, options):
    with pytest.raises(ValueError):
        captioner(*scene, **options)
    with pytest.raises(ValueError):
        RegionCaptioner(captioner.model, captioner.processor, **options).check_options()


def test_several_questions_are_answered_as_one_by_one(base, vectors):
    image = vectors / "chat_0.png"
    together = base.ask(image, ["What?", "Where is the cup?"])
    alone = [base.ask(image, q).answers[0] for q in together.questions]
    assert together.answers == alone
    assert str(together).startswith("What?\n  ")
    assert json.dumps(together.to_dict())


def test_history_ends_in_the_captions(captioner, scene):
    result = captioner(*scene, return_history=True)
    assert len(result.history) == LENGTH
    assert result.history[-1] == result.captions
    assert MASKED in result.history[0][0]


def test_a_stream_yields_every_step_and_then_the_result(captioner, scene):
    steps = list(captioner.stream(*scene))
    assert [step.number for step in steps] == [*range(1, LENGTH + 1), LENGTH]
    assert isinstance(steps[-1].result, RegionCaptions)
    assert steps[-1].texts == captioner(*scene).captions
    assert all(step.result is None for step in steps[:-1])


def test_a_streams_steps_are_the_history(captioner, scene):
    history = captioner(*scene, return_history=True).history
    assert [step.texts for step in captioner.stream(*scene)][:-1] == history


def test_an_answer_streams_too(base, vectors):
    *_, last = base.stream(vectors / "chat_0.png", question="What?")
    assert isinstance(last.result, Answers)


def test_masked_positions_only_ever_get_fewer_in_an_adaptive_stream(base, vectors):
    steps = base.stream(vectors / "chat_0.png", question="What?", threshold=0.9)
    counts = [step.texts[0].split().count(MASKED) for step in steps]
    assert counts == sorted(counts, reverse=True)


def test_a_closed_stream_ends_denoising(captioner, scene):
    before = threading.active_count()
    stream = captioner.stream(*scene, caption_length=64)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_a_streams_failure_is_the_readers(captioner, scene):
    with pytest.raises(ValueError, match="empty region mask"):
        list(captioner.stream(scene[0], [Image.new("L", (150, 140))]))


@pytest.mark.parametrize("given", [{}, {"masks": [[0, 0, 9, 9]], "question": "What?"}])
def test_a_stream_has_either_masks_or_a_question(captioner, scene, given):
    with pytest.raises(ValueError, match="either masks or a question"):
        next(captioner.stream(scene[0], **given))


def test_more_regions_than_prompts_stream_as_one_list(captioner, scene):
    masks = [[x, 10, x + 20, 60] for x in range(0, 140, 20)]
    steps = list(captioner.stream(scene[0], masks, batch_size=1))
    assert {len(step.texts) for step in steps} == {7}
    assert steps[0].texts[6] == MASKED
    assert [step.number for step in steps[:-1]] == list(range(1, 2 * LENGTH + 1))


def test_partial_text_marks_what_is_masked_and_ends_at_the_end_of_turn(captioner):
    processor, mask = captioner.processor, captioner.model.config.mask_token_id
    ids = processor.tokenizer("You are", add_special_tokens=False)["input_ids"]
    row = [*ids, mask, mask, *ids, processor.eot_token_id, mask]
    text = processor.decode_answer(ids)
    assert partial_text(processor, row, mask) == f"{text} {MASKED} {MASKED} {text}"


def test_a_checkpoint_of_another_kind_is_refused(vectors):
    with pytest.raises(ValueError, match="model_type 'perceptiondlm'.*'pdmllm'"):
        RegionCaptioner.from_pretrained(vectors / "released-region")


def test_no_code_of_the_checkpoint_is_run(converted, tmp_path):
    for file in converted("released-region").iterdir():
        data = b"raise SystemExit('run')" if file.suffix == ".py" else file.read_bytes()
        (tmp_path / file.name).write_bytes(data)
    assert RegionCaptioner.from_pretrained(tmp_path)


def test_the_mask_of_a_result_is_the_one_given(captioner, scene):
    image, masks = scene
    result = captioner(image, masks)
    given = Image.open(masks[2]).convert("L")
    assert ImageChops.difference(result.regions[2].mask, given).getbbox() is None
