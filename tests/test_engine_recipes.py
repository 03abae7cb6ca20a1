"""Recipes of the data engine: the one that comes with the package, and bad ones."""

import pickle
from pathlib import Path

import pytest
import yaml
from perceptiondlm.apps.cli import main
from perceptiondlm.pipelines.recipe import build_recipe, load_recipe
from perceptiondlm.pipelines.stages import make_stages

ROOT = Path(__file__).parent.parent
MODEL = {"kind": "model", "checkpoint": "x"}
CHAT = {"kind": "endpoint", "model": "x"}


@pytest.fixture
def values(tmp_path):
    """Gives a function that makes a recipe's values; None takes a section out."""
    (tmp_path / "lines.jsonl").write_text("")

    def make(**sections):
        values = {
            "branch": "sa1b",
            "source": {"kind": "sa1b", "path": str(tmp_path)},
            "captioner": MODEL,
            "output": {"folder": str(tmp_path / "out")},
            **sections,
        }
        return {name: options for name, options in values.items() if options is not None}

    return make


def test_the_packages_own_recipe_is_valid_and_its_stages_travel(tmp_path):
    recipe = load_recipe(ROOT / "configs" / "engine.yaml", [f"source.path={tmp_path}"])
    stages = make_stages(recipe)
    names = ["masks", "caption", "categories", "mask_check", "texts"]
    assert [stage.name for stage in stages] == names
    assert [stage.name for stage in pickle.loads(pickle.dumps(stages))] == names
    assert build_recipe(recipe.to_dict()) == recipe


def test_a_stage_without_its_section_is_left_out(values):
    assert [stage.name for stage in make_stages(build_recipe(values()))] == ["caption"]
    both = build_recipe(values(masks={}, texts={}))
    assert [stage.name for stage in make_stages(both)] == ["masks", "caption", "texts"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"branch": "x"}, "branch to be one of sa1b, coconut, got 'x'"),
        ({"source": None}, "expected a section 'source'"),
        ({"output": None}, "expected a section 'output'"),
        ({"output": {}}, "expected output.folder, got none"),
        ({"mask": {}}, "expected a key of the recipe, got 'mask'.*masks"),
        ({"masks": {"min_pixel": 3}}, "expected a key of masks, got 'min_pixel'.*min_pixels"),
        ({"masks": {"min_pixels": "3"}}, "expected masks.min_pixels as int, got '3'"),
        ({"masks": {"min_pixels": True}}, "expected masks.min_pixels as int, got True"),
        ({"masks": 3}, "expected options in section 'masks', got 3"),
        ({"masks": {"max_border_share": 2}}, "masks.max_border_share between 0 and 1"),
        ({"captioner": None}, "expected a captioner, or source.kind lines or rows"),
        ({"captioner": {"kind": "x"}}, "captioner.kind to be one of model, endpoint, transf"),
        ({"captioner": {"kind": "model"}}, "captioner.checkpoint, a folder or Hub id, got none"),
        ({"captioner": {"kind": "endpoint"}}, "model's name at its endpoint, got none.*captioner"),
        ({"captioner": {**CHAT, "concurrency": 0}}, "concurrency of at least 1.*captioner"),
        ({"captioner": {**CHAT, "timeout": 0}}, "timeout above 0.*captioner"),
        ({"prompt": {}}, "expected prompt only with captioner.kind endpoint or transformers"),
        ({"captioner": CHAT, "prompt": {"views": ["x"]}}, "prompt.views among outlined, crop"),
        ({"captioner": CHAT, "prompt": {"views": []}}, "prompt.views among outlined, crop"),
        ({"mask_check": {"segmenter": "x"}}, "expected categories with mask_check"),
        ({"mask_check": {}, "categories": {"kind": "words"}}, "expected mask_check.segmenter"),
        ({"categories": {**CHAT, "prompt": "x"}}, r"expected \{caption\} in the prompt"),
        ({"verifier": {"kind": "words"}}, "expected verifier only with branch coconut"),
        ({"branch": "coconut"}, "source with categories for branch coconut"),
        ({"texts": {"min_words": 0}}, "texts.min_words of at least 1"),
        ({"output": {"folder": "x", "images": "bytes"}}, "output.images to be one of link, path"),
        ({"output": {"folder": "x", "max_regions": 0}}, "output.max_regions of at least 1"),
        ({"source": {"kind": "sa1b", "path": "/none"}}, "expected a folder as source.path"),
    ],
)
def test_a_bad_recipe_is_refused_with_what_was_expected(values, sections, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_recipe(values(**sections))


def test_what_coconut_has_no_use_for_is_refused(values, tmp_path):
    source = {"kind": "lines", "path": str(tmp_path / "lines.jsonl")}
    given = values(branch="coconut", source=source, categories={"kind": "words"})
    with pytest.raises(ValueError, match="expected categories only with branch sa1b"):
        build_recipe(given)
    synonyms = {"kind": "words", "synonyms": {"car": "sedan"}}
    given = values(branch="coconut", source=source, verifier=synonyms)
    with pytest.raises(ValueError, match="verifier.synonyms.car as a list of names"):
        build_recipe(given)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "expected YAML in"), ("[1]", "expected sections in"), ("", "branch to be one of")],
)
def test_the_command_says_what_is_wrong_in_a_line(tmp_path, capsys, content, message):
    (tmp_path / "recipe.yaml").write_text(content)
    assert main(["engine", str(tmp_path / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert main(["engine", str(tmp_path / "none.yaml")]) == 2
    assert "expected a recipe file" in capsys.readouterr().err


def test_overrides_replace_options(values, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values()))
    recipe = load_recipe(tmp_path / "recipe.yaml", ["masks.min_pixels=7", "output.max_regions=3"])
    assert (recipe.masks.min_pixels, recipe.output.max_regions) == (7, 3)


def test_an_output_that_cannot_be_written_is_named(values, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    given = values(output={"folder": str(tmp_path / "file")})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    assert main(["engine", str(tmp_path / "recipe.yaml")]) == 2
    assert "file" in capsys.readouterr().err
