"""No file of a stranger's makes this package run code: canaries that must stay silent."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed
from conversion_sources import copy_source, edit_json
from perceptiondlm.common.loading import CheckpointError
from perceptiondlm.conversion.files import DamagedFile
from perceptiondlm.convert_checkpoint import convert
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer

EVIL = "import pathlib, os\npathlib.Path(os.environ['CANARY']).touch()\n"


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """A file that any foreign code would make."""
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists(), "foreign code was run"


class Bomb:
    """Makes the canary when it is unpickled."""

    def __reduce__(self):
        return os.system, ('touch "$CANARY"',)


def test_the_bomb_goes_off_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("beside", ["alone", "beside weights"])
def test_a_pickled_metadata_is_not_run(canary, converted, tmp_path, beside):
    source = tmp_path / "source"
    if beside == "alone":
        source.mkdir()
    else:
        shutil.copytree(converted("released-region"), source)
    (source / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DamagedFile, match="expected metadata of tensors, got posix.system"):
        convert(source, tmp_path / "out", base=converted("released-region"))
    assert not (tmp_path / "out").exists()


def test_a_sharded_checkpoint_is_read_bit_for_bit(converted, tmp_path):
    own = converted("released-region")
    tensors = load_file(own / "model.safetensors")
    shard = tmp_path / "checkpoint" / "pytorch_model_fsdp_0"
    distributed.save(dict(tensors), checkpoint_id=shard, no_dist=True)
    again = convert(tmp_path / "checkpoint", tmp_path / "out", base=own)
    got = load_file(again / "model.safetensors")
    assert all(torch.equal(got[name], tensors[name]) for name in tensors | got)


def test_a_foreign_tokenizers_code_is_neither_run_nor_carried_on(canary, tmp_path):
    source = copy_source("released-region", tmp_path / "source")
    foreign = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"], "AutoProcessor": "evil.P"}
    edit_json(source / "tokenizer_config.json", auto_map=foreign, tokenizer_class="Tokenizer")
    for name in ("evil", "modeling_dmllm"):
        (source / f"{name}.py").write_text(EVIL)
    out = convert(source, tmp_path / "out", verify=True)
    assert "evil" not in "".join(p.read_text() for p in out.glob("*.json"))
    AutoModel.from_pretrained(out, trust_remote_code=True)
    AutoProcessor.from_pretrained(out, trust_remote_code=True)
    AutoTokenizer.from_pretrained(out, trust_remote_code=True)


def test_a_foreign_processors_code_is_not_carried_on(canary, converted, tmp_path):
    source = Path(shutil.copytree(converted("released-region"), tmp_path / "source"))
    settings = json.loads((source / "processor_config.json").read_text())
    settings["auto_map"] = {"AutoProcessor": "evil.Processor"}
    settings["image_processor"]["auto_map"] = {"AutoVideoProcessor": "evil.Images"}
    (source / "processor_config.json").write_text(json.dumps(settings))
    (source / "evil.py").write_text(EVIL)
    out = convert(source, tmp_path / "out", verify=True)
    assert "evil" not in "".join(p.read_text() for p in out.glob("*.json"))
    assert not (out / "evil.py").exists()
    AutoProcessor.from_pretrained(out, trust_remote_code=True)


def test_commands_run_no_code_of_a_checkpoint(canary, converted, tmp_path):
    folder = Path(shutil.copytree(converted("released-region"), tmp_path / "folder"))
    for module in folder.glob("*.py"):
        module.write_text(EVIL)
    program = (
        "import sys\n"
        "from perceptiondlm.common.loading import load_model\n"
        "from perceptiondlm.apps.captioning.captioner import RegionCaptioner\n"
        "load_model(sys.argv[1], '', 'auto', 'cpu')\n"
        "RegionCaptioner.from_pretrained(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, timeout=120)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors"])
def test_an_index_names_only_files_of_its_folder(converted, tmp_path, name):
    source = copy_source("released-region", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    shutil.move(source / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(weights, name)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected only files of .*source"):
        convert(source, tmp_path / "out")


def test_a_pickle_among_weights_is_not_run(canary, tmp_path):
    source = copy_source("released-region", tmp_path / "source")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Bomb()}))
    with pytest.raises(DamagedFile):
        convert(source, tmp_path / "out")
    with pytest.raises(ValueError):
        PerceptionDLMForConditionalGeneration.from_pretrained(source)
