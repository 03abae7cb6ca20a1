"""Checkpoints that do not fit are refused when they are loaded, at every door."""

import json
import shutil

import pytest
import torch
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.apps.cli import main
from perceptiondlm.common import loading
from perceptiondlm.common.loading import load_model
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from safetensors.torch import load_file, save_file
from transformers import AutoModel


@pytest.fixture(scope="module")
def saved(make, tmp_path_factory):
    model, processor = make()
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def damage(saved, tmp_path):
    """A copy of the saved folder whose tensors `change` has changed in place."""

    def copy(change=lambda tensors: None):
        folder = shutil.copytree(saved, tmp_path / "damaged")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


LAYER = "language_model.model.layers.0.mlp.up_proj.weight"
DAMAGES = [
    (drop(LAYER), f"1 missing .{LAYER}"),
    (drop("region_prompts.weight"), "1 missing .region_prompts.weight"),
    (put("stranger", torch.ones(2)), "1 unknown .stranger"),
    (put(LAYER, torch.ones(2, 3)), f"1 of another shape .{LAYER} .2, 3. instead of .48, 32."),
]
DOORS = [
    PerceptionDLMForConditionalGeneration.from_pretrained,
    lambda folder: AutoModel.from_pretrained(folder, trust_remote_code=True),
    RegionCaptioner.from_pretrained,
]


@pytest.mark.parametrize(("change", "message"), DAMAGES)
@pytest.mark.parametrize("load", DOORS, ids=["class", "auto", "captioner"])
def test_weights_that_do_not_fit_the_config_are_refused(damage, load, change, message):
    with pytest.raises(ValueError, match=message):
        load(damage(change))


@pytest.mark.parametrize("load", DOORS, ids=["class", "auto", "captioner"])
def test_truncated_weights_are_refused(damage, load):
    path = damage() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="expected readable weights in .*damaged"):
        load(path.parent)


def test_a_whole_checkpoint_loads_and_says_what_it_found(saved):
    _, info = PerceptionDLMForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_other_shapes_may_be_asked_for(damage):
    folder = damage(put(LAYER, torch.ones(2, 3)))
    model = PerceptionDLMForConditionalGeneration.from_pretrained(
        folder, ignore_mismatched_sizes=True
    )
    assert model.language_model.model.layers[0].mlp.up_proj.weight.shape == (48, 32)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_region_prompts", "six"), ("text_config", {"hidden_size": [1]}), ("vision_config", 3)],
)
def test_a_config_of_wrong_types_is_refused(damage, name, value):
    path = damage() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match="expected a valid PerceptionDLM"):
        PerceptionDLMForConditionalGeneration.from_pretrained(path.parent)


@pytest.mark.parametrize("device", ["abacus", "0.5", "", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused_at_every_door(converted, device, tmp_path, capsys):
    folder = str(converted("released-region"))
    with pytest.raises(ValueError, match="expected a device"):
        load_model(folder, device=device)
    if device:  # an empty one is none at all on the command line
        assert main(["serve", "--model", folder, "--device", device]) == 2
        given = ["--model", folder, "--device", device, "--output", str(tmp_path / "a.json")]
        assert main(["evaluate", "synthetic", *given]) == 2
        said = capsys.readouterr().err
        assert "serve: expected a device" in said and "synthetic: expected a device" in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("emulated", [True, False])
def test_sixteen_bits_load_as_float32_where_the_processor_emulates_them(
    saved, tmp_path, monkeypatch, caplog, dtype, emulated
):
    folder = tmp_path / "saved"
    shutil.copytree(saved, folder)
    model = PerceptionDLMForConditionalGeneration.from_pretrained(
        saved, dtype=getattr(torch, dtype)
    )
    model.save_pretrained(folder)
    monkeypatch.setattr(loading, "emulates", lambda device: emulated)

    changes = emulated and dtype != "float32"
    expected = torch.float32 if changes else getattr(torch, dtype)
    assert RegionCaptioner.from_pretrained(folder, device="cpu").model.dtype == expected
    assert (f"dtype={dtype} keeps them" in caplog.text) == changes

    # What is asked for stays, and so does what is only copied.
    kept = RegionCaptioner.from_pretrained(folder, device="cpu", dtype=dtype).model
    assert kept.dtype == load_model(folder)[0].dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    "x86, bf16, amx, emulated",
    [(True, False, False, True), (True, True, False, False), (True, False, True, False)]
    + [(False, False, False, False)],
)
def test_only_x86_without_its_instructions_emulates_bfloat16(monkeypatch, x86, bf16, amx, emulated):
    for name, value in (("avx2", x86), ("avx512_bf16", bf16), ("amx_tile", amx)):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda value=value: value)
    assert loading.emulates(torch.device("cpu")) == emulated
    assert not loading.emulates(torch.device("cuda"))
