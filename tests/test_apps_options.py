"""Options without a use are refused, not ignored: every subcommand of caption and evaluate."""

import shutil

import pytest
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.apps.cli import main

BOX = "--box 1,1,9,9"
ASK = "--question What?"


@pytest.fixture
def here(vectors, tmp_path, monkeypatch):
    """A folder with an image, in which no model may be loaded."""
    shutil.copy(vectors / "region_0.png", tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)

    def refused(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(RegionCaptioner, "from_pretrained", refused)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"{ASK} --caption-length 8", "expected --caption-length with regions alone"),
        (f"{ASK} --instruction Say.", "expected --instruction with regions alone"),
        (f"{ASK} --max-regions 2", "expected --max-regions with regions alone"),
        (f"{ASK} --box 1,1,9,9", "got both"),
        (f"{ASK} --captions a.coco.json", "got --format coco"),
        (f"{BOX} --max-new-tokens 8", "expected --max-new-tokens with a --question alone"),
        (f"{BOX} --block-length 8", "expected --block-length with a --question alone"),
        (f"{BOX} --font {__file__}", "expected --output or --animate with --font"),
        (f"{BOX} --subfolder tiny", "expected --model with --subfolder"),
        (f"{BOX} --revision main", "expected --model with --revision"),
        (f"{BOX} --revision main --model .", "expected a Hub id with --revision"),
        (f"{BOX} --recursive", "expected a folder of images with --recursive"),
    ],
)
def test_caption_refuses_an_option_without_a_use(here, options, message, capsys):
    assert main(["caption", "a.png", *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_cache_of_the_prompt_is_refused_where_the_prompt_is_cached_exactly(
    here, capsys, make, monkeypatch
):
    model, processor = make(region_layout="independent")

    def load(*_, subfolder, revision, device, dtype, **options):
        return RegionCaptioner(model, processor, **options)

    monkeypatch.setattr(RegionCaptioner, "from_pretrained", load)
    assert main(["caption", "a.png", *BOX.split(), "--prompt-refresh-interval", "8"]) == 2
    assert "expected no --prompt-refresh-interval with this checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("caption a.png --adaptive factor", "expected --threshold, --factor or --entropy-bound"),
        (
            "evaluate latency --adaptive-value 1",
            "--factor or --entropy-bound, got --adaptive-value",
        ),
        ("evaluate synthetic --prompt-cache 4", "expected --prompt-refresh-interval, got"),
        ("serve --adaptive-verify 0.5", "expected --remask-below, got --adaptive-verify"),
    ],
)
def test_an_option_by_its_old_name_is_told_the_new_one(here, command, message, capsys):
    with pytest.raises(SystemExit) as raised:
        main(command.split())
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


NOWHERE = "--model nowhere --output out.json"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("predict --benchmark b --option max_new_tokens=4", "got max_new_tokens, of answers"),
        ("predict --benchmark b --option block_length=4", "got block_length, of answers"),
        ("predict --benchmark b --steps 3 --option steps=4", "expected steps once"),
        ("predict --benchmark b --option seed=3 --option seed=4", "expected seed once"),
        ("predict --benchmark b --option images=3", "got --option images=..."),
        ("predict --benchmark b --limit 0", "expected limit of 1 or more, got 0"),
        ("predict --benchmark b --warmup -1", "expected warmup of 0 or more, got -1"),
        ("latency --option max_new_tokens=4", "got max_new_tokens, of answers"),
        ("sweep --option steps=3", "expected steps once"),
        ("sweep --option factor=1.0", "expected factor once"),
    ],
)
def test_evaluate_refuses_an_option_without_a_use(here, command, message, capsys):
    assert main(["evaluate", *command.split(), *NOWHERE.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["--model", "m"], "--model"),
        (["--scenes", "3"], "--scenes"),
        (["--output", "r.json"], "--output"),
        (["--texts", "t.json"], "--texts"),
        (["--steps", "3"], "--steps"),
        (["--batch-size", "3"], "--batch-size"),
    ],
)
@pytest.mark.parametrize(
    "action", ["write --output o --scenes 1", "judge --benchmark b --predictions p --output o"]
)
def test_options_of_measuring_are_refused_before_another_action(here, given, name, action, capsys):
    assert main(["evaluate", "synthetic", *given, *action.split()]) == 2
    expected = f"expected no {name} before {action.split()[0]}"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("spelled", ["<|eot_id|>", "<|mdm_mask|>", "<IMG_CONTEXT>", "<img>"])
@pytest.mark.parametrize("option", ["--question", "--instruction"])
def test_what_is_typed_is_text_and_never_a_control_token(
    vectors, converted, monkeypatch, capsys, spelled, option
):
    from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor

    seen, stack = [], PerceptionDLMProcessor.stack

    def spy(self, *given, **options):
        inputs = stack(self, *given, **options)
        control = self.tokenizer.convert_tokens_to_ids(spelled)
        seen.append(int((inputs["input_ids"] == control).sum()))
        return inputs

    monkeypatch.setattr(PerceptionDLMProcessor, "stack", spy)
    name = "released-base" if option == "--question" else "released-region"
    place = [str(vectors / "chat_0.png"), "--model", str(converted(name)), "--steps", "1"]
    shape = ["--max-new-tokens", "4"] if option == "--question" else [*BOX.split()]
    shape += [] if option == "--question" else ["--caption-length", "4"]
    for text in ("Say this.", f"Say {spelled} this."):
        assert main(["caption", *place, *shape, option, text]) == 0
    assert seen[0] == seen[1]
