"""Models that are not where, or not what, the user said: the same words at every door, at once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from clean_rooms import write_hub_cache
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.apps.cli import main
from perceptiondlm.common.loading import load_model, local_path
from perceptiondlm.conversion import command as convert_checkpoint
from perceptiondlm.convert_checkpoint import convert
from perceptiondlm.publishing.upload import push_folder
from perceptiondlm.regions.segmenters import load_segmenter
from perceptiondlm.training.run import train
from training_runs import recipe_values, small_recipe

VECTORS = Path(__file__).parent / "fixtures" / "vectors"
REGION = VECTORS / "released-region"
IMAGE = VECTORS / "region_0.png"


def train_from(checkpoint, folder: Path):
    train(
        small_recipe(folder, model={"checkpoint": str(checkpoint), "config": {}, "tokenizer": None})
    )


def train_with_tokenizer(tokenizer, folder: Path):
    train(small_recipe(folder, model={"tokenizer": str(tokenizer)}))


# Each is called with a model and a folder to write to.
MODEL_DOORS = {
    "RegionCaptioner": lambda model, folder: RegionCaptioner.from_pretrained(model),
    "evaluation": lambda model, folder: load_model(model, "", "auto", "cpu"),
    "training": train_from,
    "publishing": lambda model, folder: push_folder(model, "owner/name"),
}
DOORS = MODEL_DOORS | {
    "source": lambda model, folder: convert(model, folder / "out"),
    "base": lambda model, folder: convert(adapter_in(folder), folder / "out", base=model),
    "vision source": lambda model, folder: convert(
        VECTORS / "released-llava", folder / "out", vision_source=model
    ),
    "tokenizer": train_with_tokenizer,
    "segmenter": lambda model, folder: load_segmenter(str(model)),
}


def adapter_in(folder: Path, name: str = "adapter") -> Path:
    (folder / name).mkdir()
    (folder / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    return folder / name


@pytest.mark.parametrize("door", DOORS)
def test_a_path_that_is_not_there_is_a_missing_file_at_every_door(door, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        DOORS[door](str(tmp_path / "nowhere"), tmp_path)


@pytest.mark.parametrize(
    "source",
    ["/no/where", "./nowhere", "../nowhere", "~/nowhere", "a\\b", "C:\\a\\b", "a/b/c", "nowhere",
     "", "here/nowhere", Path("owner/name")],
)  # fmt: skip
def test_what_looks_like_a_path_is_not_looked_up_on_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match="a folder or the id of a Hub repository"):
        local_path(source)


def test_an_owner_and_a_name_are_a_hub_id_unless_they_are_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path("owner/name") is None
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert local_path("owner/name") == Path("owner/name")


def commands(model: str, folder: Path) -> dict[str, list[str]]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(folder / "run", model={"config": {}})))
    return {
        "caption": ["caption", str(IMAGE), "--box", "1,1,9,9", "--model", model],
        "web": ["web", "--model", model],
        "serve": ["serve", "--model", model],
        "evaluate": ["evaluate", "latency", "--model", model, "--output", str(folder / "o.json")],
        "train": ["train", str(recipe), f"model.checkpoint={model}", "model.tokenizer=null"],
        "publish": ["publish", model, "owner/name"],
    }


@pytest.mark.parametrize("command", ["caption", "web", "serve", "evaluate", "train", "publish"])
@pytest.mark.parametrize("kind", ["nowhere", "adapter"])
def test_every_command_names_a_path_that_is_not_there_and_an_adapter(
    command, kind, tmp_path, capsys
):
    if command in ("web", "serve"):
        pytest.importorskip({"web": "gradio", "serve": "fastapi"}[command])
    adapter_in(tmp_path)
    model = str(tmp_path / kind)
    assert main(commands(model, tmp_path)[command]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and model in said
    if kind == "adapter":
        assert f"the adapter in {model}" in said and "--base" in said


@pytest.mark.parametrize("door", MODEL_DOORS)
def test_an_adapter_is_named_as_one_also_with_a_config_beside_it(door, tmp_path, converted):
    adapter = adapter_in(tmp_path)
    shutil.copy(converted("released-region") / "config.json", adapter)
    with pytest.raises(ValueError, match="the adapter in .*adapter: .*--base"):
        MODEL_DOORS[door](adapter, tmp_path)


@pytest.mark.parametrize("door", sorted(MODEL_DOORS.keys() - {"publishing"}))
def test_a_released_checkpoint_is_to_be_converted_first(door, tmp_path):
    with pytest.raises(ValueError, match="got 'pdmllm': convert other layouts"):
        MODEL_DOORS[door](REGION, tmp_path)


@pytest.mark.parametrize("door", sorted(MODEL_DOORS.keys() - {"publishing"}))
def test_a_folder_without_a_config_is_said_to_have_none(door, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="with a config.json in .*empty, got none"):
        MODEL_DOORS[door](tmp_path / "empty", tmp_path)


@pytest.mark.parametrize("subfolder", ["nowhere", "config.json"])
def test_a_subfolder_that_is_none_is_named(subfolder, converted):
    with pytest.raises(FileNotFoundError, match=f"{subfolder}, which is none"):
        RegionCaptioner.from_pretrained(converted("released-region"), subfolder=subfolder)


def test_an_adapter_on_the_hub_is_named_as_one_and_a_checkpoint_is_taken(
    tmp_path, converted, monkeypatch
):
    write_hub_cache(adapter_in(tmp_path), tmp_path, "owner/adapter")
    write_hub_cache(converted("released-region"), tmp_path, "owner/whole")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="the adapter in owner/adapter: .*--base"):
        RegionCaptioner.from_pretrained("owner/adapter")
    assert RegionCaptioner.from_pretrained("owner/whole").model.config.num_region_prompts


def test_a_checkpoint_is_loaded_with_the_dtype_attention_and_config_asked_for(converted):
    model, processor = load_model(
        converted("released-region"),
        dtype=torch.bfloat16,
        attn_implementation="eager",
        config_fields={"region_layout": "independent"},
    )
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config._attn_implementation == "eager"
    assert model.config.region_layout == processor.region_layout == "independent"


def test_the_converter_ends_with_its_code_for_a_source_that_is_not_there(tmp_path, capsys):
    arguments = ["--source", "no/such/folder", "--output", str(tmp_path / "out")]
    assert convert_checkpoint.main(arguments) == 3
    assert "'no/such/folder': no such file or folder" in capsys.readouterr().err
