"""FSDP2 on two CPU processes, launched as a user would."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from perceptiondlm.convert_checkpoint import convert
from perceptiondlm.training.checkpoints import check_whole
from perceptiondlm.training.run import train
from safetensors.torch import load_file
from training_runs import losses_of, recipe_values, small_recipe
from transformers import AutoModel, AutoProcessor

pytestmark = pytest.mark.sharded
CONFIG = Path(__file__).parent.parent / "configs" / "accelerate" / "fsdp_cpu.yaml"
STEPS = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10}


def launch(folder: Path, *arguments: str, **sections) -> list[float]:
    """Trains in two processes and gives the losses."""
    done = start(folder, *arguments, **sections)
    assert done.returncode == 0, done.stderr[-3000:]
    return recorded(folder)


def start(folder: Path, *arguments: str, **sections) -> subprocess.CompletedProcess:
    """Trains in two processes."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe_values(folder, **sections)))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIG),
        "--main_process_port",
        "0",
        "-m",
        "perceptiondlm.apps.cli",
        "train",
        str(file),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)


def recorded(folder: Path) -> list[float]:
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def sharded(**options) -> dict:
    return {"trainer": {**STEPS, "per_device_train_batch_size": 2, **options}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process's run: its trainer and folder."""
    folder = tmp_path_factory.mktemp("whole")
    return train(small_recipe(folder, trainer=STEPS)), folder


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """The same with two processes: losses and folder."""
    folder = tmp_path_factory.mktemp("split") / "run"
    return launch(folder, **sharded()), folder


def test_two_processes_have_the_losses_of_one(whole, split):
    losses, folder = split
    assert len(losses) == 20
    assert losses == pytest.approx(losses_of(whole[0]), abs=1e-4)
    assert (folder / "checkpoint-10" / "pytorch_model_fsdp_0" / "__1_0.distcp").exists()


def test_a_resumed_sharded_run_equals_an_uninterrupted_one(split, tmp_path):
    losses, folder = split
    checkpoint = folder / "checkpoint-10"
    assert launch(tmp_path / "run", "--resume", str(checkpoint), **sharded()) == losses
    one, other = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_sharded_run_goes_on_from_the_newest_whole_checkpoint(split, tmp_path, caplog):
    losses, folder = split
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "checkpoint-20" / "optimizer_0" / "__1_0.distcp").unlink()
    assert launch(copy, "--resume", **sharded()) == losses
    check_whole(copy / "checkpoint-20")


def test_an_interrupted_final_save_of_a_sharded_run_is_finished(split, tmp_path):
    _, folder = split
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").unlink()
    launch(copy, "--resume", **sharded())
    one, other = (load_file(f / "model.safetensors") for f in (folder, copy))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_rate_beyond_all_bounds_stops_every_process(tmp_path):
    folder = tmp_path / "run"
    done = start(folder, **sharded(learning_rate=1e25, save_steps=1))
    assert done.returncode != 0
    assert "expected a finite" in done.stderr or "expected finite weights" in done.stderr
    files = list(folder.rglob("*.safetensors"))
    assert all(bool(w.isfinite().all()) for file in files for w in load_file(file).values())
    assert not (folder / "model.safetensors").exists()


def captions_of(folder: Path, image, masks) -> list:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    return model.diffusion_generate(image, masks, steps=4).token_ids


def test_an_exported_sharded_checkpoint_generates_what_the_final_folder_does(
    split, tmp_path, draw_image, blobs
):
    _, folder = split
    exported = convert(folder / "checkpoint-20", tmp_path / "exported")
    scene = draw_image(40, 60), blobs(40, 60, 3)
    assert captions_of(folder, *scene) == captions_of(exported, *scene)


def test_half_precision_casts_neither_noise_nor_the_loss(tmp_path):
    # a higher rate amplifies bfloat16's rounding, which differs between one process and two
    steps = {"max_steps": 8, "save_steps": 8, "bf16": True, "learning_rate": 1e-3}
    losses = launch(tmp_path / "split", **sharded(**steps))
    one = losses_of(train(small_recipe(tmp_path / "one", trainer={**STEPS, **steps})))
    assert losses == pytest.approx(one, abs=2e-3)
    assert any(loss != float(torch.tensor(loss).bfloat16()) for loss in losses[:2])


@pytest.fixture(scope="module")
def lora(whole):
    """Sections of a recipe that adapts the run's model, and its steps."""
    _, base = whole
    sections = {
        "model": {"checkpoint": str(base), "config": {}, "tokenizer": None},
        "lora": {"r": 4},
    }
    return sections, {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}


@pytest.fixture(scope="module")
def lora_split(lora, tmp_path_factory):
    """The same with two processes: losses and folder."""
    sections, steps = lora
    folder = tmp_path_factory.mktemp("lora") / "split"
    return launch(folder, **sections, **sharded(**steps)), folder


def test_lora_under_fsdp_has_the_losses_of_one_process(lora, lora_split, tmp_path):
    sections, steps = lora
    losses, folder = lora_split
    one = train(small_recipe(tmp_path / "one", **sections, trainer=steps))
    assert losses == pytest.approx(losses_of(one), abs=1e-4)
    saved = [load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "one")]
    assert saved[0].keys() == saved[1].keys()
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def test_a_sharded_checkpoint_of_lora_resumes_and_is_exported(
    lora, lora_split, tmp_path, draw_image, blobs
):
    sections, steps = lora
    losses, folder = lora_split
    resume = ("--resume", str(folder / "checkpoint-4"))
    assert launch(tmp_path / "run", *resume, **sections, **sharded(**steps)) == losses
    scene = draw_image(40, 60), blobs(40, 60, 3)
    exported = convert(folder / "checkpoint-8", tmp_path / "exported")
    final = convert(folder, tmp_path / "final")
    assert captions_of(exported, *scene) == captions_of(final, *scene)
    halfway = convert(folder / "checkpoint-4", tmp_path / "halfway")
    one, other = (load_file(f / "model.safetensors") for f in (exported, halfway))
    assert any(not torch.equal(one[name], other[name]) for name in one)
