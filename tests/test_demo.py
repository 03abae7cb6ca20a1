"""The demo, on both kinds of scenes and with the embedded model."""

import io

import pytest
from perceptiondlm.apps import demo
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.scenes.example_scenes import open_example
from perceptiondlm.scenes.thing_examples import NAMES, open_thing_example
from perceptiondlm.scenes.thing_language import iter_thing_corpus
from perceptiondlm.training.build import build_model
from perceptiondlm.training.recipe import load_recipe
from perceptiondlm.training.tokenizer import train_tokenizer
from PIL import Image

# The shape of a model of things, with less of each.
SMALLER = (
    "model.config.vision_config.image_size=48",
    "model.config.vision_config.num_hidden_layers=1",
    "model.config.text_config.num_hidden_layers=1",
    "model.config.generation_defaults.caption_length=5",
    "model.local_layers=1",
    "model.vocab_size=512",  # the default: the tokenizer is made here
    "trainer.bf16=false",
    "trainer.use_cpu=true",
)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> str:
    """Gives the folder of an untrained model as `configs/tiny_names.yaml` builds them."""
    folder = tmp_path_factory.mktemp("untrained")
    facts = [[thing.facts for thing in open_thing_example(seed).things] for seed in NAMES]
    train_tokenizer(iter_thing_corpus(facts), 700).save_pretrained(folder / "tokenizer")
    own = f"model.tokenizer={folder / 'tokenizer'}"
    model, processor = build_model(load_recipe("configs/tiny_names.yaml", [*SMALLER, own]))
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.mark.parametrize(("kind", "more"), [("shapes", set()), ("things", {"region_answers.png"})])
def test_the_demo_prints_the_truth_and_draws_what_is_said(untrained, tmp_path, capsys, kind, more):
    output = tmp_path / "demo"
    asked = ["--scene-kind", kind, "--model", untrained, "--output", str(output)]
    assert demo.main(asked) == 0

    files = {"scene.png", "captions.png", "captions.gif", "answer.png"} | more
    assert {path.name for path in output.iterdir()} == files
    animation = Image.open(io.BytesIO((output / "captions.gif").read_bytes()))
    assert animation.format == "GIF" and animation.n_frames > 1

    said, scene = capsys.readouterr().out, open_example(kind)
    for thing in scene.objects:
        assert f"truth: {thing.caption}\n" in said
        assert ", ".join(f"{name}: {value}" for name, value in thing.fields.items()) in said
        if thing.question is not None:
            assert f"truth: {thing.question.answer}\n" in said
    assert f"(the truth: {scene.questions[0].answer})" in said


def test_regions_that_a_question_names_are_counted_from_one():
    assert demo._as_people_count("Is it larger than <region 0>?") == "Is it larger than <region 1>?"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scene-kind", "things", "--scene", "7"], "out of"),
        (["--model", "./no-such-folder"], "no-such-folder"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, capsys, arguments, message):
    assert demo.main([*arguments, "--output", str(tmp_path / "demo")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("demo: ") and message in said
    assert not (tmp_path / "demo").exists()


def test_the_embedded_model_knows_the_scenes_that_are_shown_by_default():
    """It names half of the things right or more; by chance it would be one of 446."""
    scene = open_example()
    captioner = RegionCaptioner.from_pretrained()
    masks = [thing.mask for thing in scene.objects]
    result = captioner(scene.image, masks, template=scene.template)
    names = [region.fields["name"] for region in result.regions]
    truth = [thing.fields["name"] for thing in scene.objects]
    assert sum(map(str.__eq__, names, truth)) >= len(truth) / 2
