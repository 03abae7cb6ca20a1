"""A checkpoint's `generation_config.json`, and what goes before it, at every door."""

import shutil
from pathlib import Path

import pytest
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.convert_checkpoint import convert
from perceptiondlm.generation_options import merge_options
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration

PROBLEMS = {
    '{"caption_length": 1': "expected JSON in .*generation_config.json",
    "[1]": "expected a JSON object in .*generation_config.json",
    '{"adaptive": "threshold"}': "expected threshold=, factor= or entropy_bound=, got adaptive",
    '{"threshhold": 0.9}': "expected options among .* got .'threshhold'",
    '{"steps": "four"}': "expected steps to be an integer of at least 1, got 'four'",
    '{"threshold": 0.5, "factor": 1.0}': "expected at most one of threshold, factor",
}


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    """A copy of a checkpoint that a test may change."""
    return Path(shutil.copytree(converted("released-region"), tmp_path / "model"))


def load(folder: Path):
    return PerceptionDLMForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("text", PROBLEMS)
def test_a_file_that_cannot_be_meant_is_refused_at_loading(folder, text):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=PROBLEMS[text]):
        load(folder)


@pytest.mark.parametrize("text", PROBLEMS)
def test_the_converter_refuses_it_too(folder, tmp_path, text):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_the_file_decodes_as_its_config_says(folder):
    (folder / "generation_config.json").unlink()
    suppressed = load(folder).decoding_defaults["suppress_tokens"]
    assert load(folder).config.mask_token_id in suppressed


def test_a_file_that_transformers_wrote_is_taken_with_its_own_fields(folder):
    text = '{"_from_model_config": true, "eos_token_id": 2, "num_beams": 1, "caption_length": 7}'
    (folder / "generation_config.json").write_text(text)
    assert load(folder).decoding_defaults["caption_length"] == 7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"threshold": 0.9, "seed": 1}),
        ({"factor": 1.0}, {"factor": 1.0, "seed": 1}),
        ({"factor": None}, {"threshold": 0.9, "factor": None, "seed": 1}),
        ({"threshold": None}, {"threshold": None, "seed": 1}),
        ({"generator": "g"}, {"threshold": 0.9, "generator": "g"}),
    ],
)
def test_one_of_several_options_goes_before_all_that_it_excludes(options, expected):
    assert merge_options({"threshold": 0.9, "seed": 1}, options) == expected


def test_a_call_may_choose_another_acceptance_than_the_checkpoint(folder, draw_image, blobs):
    (folder / "generation_config.json").write_text('{"threshold": 0.9, "caption_length": 4}')
    model, masks = load(folder), blobs(61, 47, 2)
    plain = model.diffusion_generate(draw_image(61, 47), masks, threshold=None)
    assert model.diffusion_generate(draw_image(61, 47), masks, factor=1e-9).num_forwards == 4
    assert model.diffusion_generate(draw_image(61, 47), masks, factor=1e6).num_forwards == 1
    assert plain.num_forwards == 4


def test_a_captioners_call_may_choose_another_than_the_captioner(folder, draw_image, blobs):
    captioner = RegionCaptioner.from_pretrained(folder, threshold=1.0, caption_length=4)
    assert captioner(draw_image(61, 47), blobs(61, 47, 2), factor=1e6).num_forwards == 1
