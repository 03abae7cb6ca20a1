"""Runs that end early: what is saved, what is said, and that a resumed run goes on."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from perceptiondlm.apps.cli import main
from perceptiondlm.common.files import only_run
from perceptiondlm.training import checkpoints
from perceptiondlm.training.checkpoints import check_whole, choose_checkpoint, newest_whole
from perceptiondlm.training.recipe import build_recipe
from perceptiondlm.training.run import train
from perceptiondlm.training.stopping import RunStopped, plain_message
from safetensors.torch import load_file
from test_common_files import die, kill_in
from training_runs import losses_of, recipe_values, small_recipe, weights_of

SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}


@pytest.fixture
def recipe_of(tmp_path):
    return functools.partial(small_recipe, tmp_path / "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its trainer and folder, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return train(small_recipe(folder, trainer=SAVING)), folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run's folder, without its last checkpoint and final files."""
    _, folder = finished
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoint-6")
    (copy / "model.safetensors").unlink()
    return copy


def no_float_is_strange(folder: Path) -> bool:
    files = list(folder.rglob("*.safetensors"))
    return bool(files) and all(
        bool(w.isfinite().all()) for f in files for w in load_file(f).values()
    )


# Broken records.


@pytest.fixture
def records(tmp_path, draw_image, monkeypatch):
    """Writes a data file of images with one mask each, some of them broken."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    draw_image(40, 40).save(tmp_path / "good.png")

    def write(count: int, broken: dict) -> str:
        good = {"image": "good.png", "masks": [{"box": [0, 0, 20, 30]}], "captions": ["a star"]}
        rows = [json.dumps(broken.get(k, good)) for k in range(count)]
        file = tmp_path / "data.jsonl"
        file.write_text("\n".join(rows))
        return str(file)

    return write


def on_records(folder: Path, file: str, data=None, **trainer):
    values = recipe_values(folder, trainer={"per_device_train_batch_size": 2, **trainer})
    values["data"] = {"kind": "regions", "files": [file], **(data or {})}
    return build_recipe(values)


MISSING = {"image": "none.png", "masks": [{"box": [0, 0, 9, 9]}], "captions": ["x"]}


def test_one_broken_record_of_fifty_stops_nothing(records, tmp_path):
    file = records(50, {7: MISSING})
    trainer = train(on_records(tmp_path / "run", file, max_steps=30))
    assert trainer.state.global_step == 30
    assert trainer.train_dataset.broken.count == 1


def test_no_broken_record_is_allowed_by_a_share_of_zero(records, tmp_path):
    data = {"max_broken_share": 0}
    recipe = on_records(tmp_path / "run", records(50, {7: MISSING}), data, max_steps=25)
    with pytest.raises(RunStopped, match="got 1 of 50"):
        train(recipe)


@pytest.mark.parametrize("workers, streaming", [(0, False), (0, True), (2, True)])
def test_too_many_broken_records_stop_a_run_that_is_saved_first(
    records, tmp_path, capsys, workers, streaming
):
    count = 300 if streaming else 12  # a stream's share counts from 100 records on
    file = records(count, dict.fromkeys(range(10, count), MISSING))
    values = recipe_values(tmp_path / "run")
    values["data"] = {"kind": "regions", "files": [file], "streaming": streaming}
    values["data"] |= {"shuffle_buffer": 1} if streaming else {}
    values["trainer"] |= {
        "per_device_train_batch_size": 2,
        "max_steps": 200,
        "dataloader_num_workers": workers,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    assert main(["train", str(recipe)]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("perceptiondlm train: expected at most 1.00% broken records")
    assert "data.max_broken_share" in line and "none.png" in line and "Traceback" not in line
    saved = newest_whole(tmp_path / "run")
    assert saved is None or str(saved) in line
    assert streaming or saved is not None
    if saved is not None:
        resumed = train(
            build_recipe(
                {
                    **values,
                    "data": {**values["data"], "max_broken_share": 1.0},
                    "trainer": {
                        **values["trainer"],
                        "max_steps": int(saved.name.split("-")[1]) + 1,
                    },
                }
            ),
            resume=True,
        )
        assert losses_of(resumed)


def test_a_workers_traceback_is_left_out_of_messages():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise ValueError("expected a b, got c")

    with pytest.raises(ValueError) as raised:
        next(iter(torch.utils.data.DataLoader(Rows(), num_workers=1)))
    assert "Traceback" in str(raised.value)
    assert plain_message(raised.value) == "expected a b, got c"


# Loss, gradients and weights that are not finite.


def test_a_rate_beyond_all_bounds_stops_the_run_with_its_finite_checkpoints(recipe_of, tmp_path):
    good = train(recipe_of(trainer={**SAVING, "max_steps": 4, "save_total_limit": 2}))
    wild = {**SAVING, "learning_rate": 1e25, "save_total_limit": 2, "max_grad_norm": 0}
    with pytest.raises(RunStopped, match="finite .*checkpoint-4, from which --resume"):
        train(recipe_of(trainer=wild))
    assert no_float_is_strange(tmp_path / "run")
    saved = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(weights_of(good)[name], saved[name]) for name in saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    recipe_of, tmp_path, monkeypatch, value
):
    from perceptiondlm.training.trainer import DiffusionTrainer

    compute = DiffusionTrainer.compute_loss

    def at_step_3(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * value if self.state.global_step == 3 else loss

    monkeypatch.setattr(DiffusionTrainer, "compute_loss", at_step_3)
    with pytest.raises(RunStopped, match="finite loss, got .* after step 3.*checkpoint-2"):
        train(recipe_of(trainer=SAVING))
    assert no_float_is_strange(tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_never_saved(recipe_of, tmp_path, monkeypatch):
    from perceptiondlm.training.muon import Muon

    def spoil(self, parameters, rate, decay):
        for parameter in parameters:
            parameter.fill_(float("inf"))

    monkeypatch.setattr(Muon, "_update", spoil)
    parameters = {"muon": ["language_model.model.layers"]}
    with pytest.raises(RunStopped, match="finite weights.*no checkpoint was saved"):
        train(recipe_of(parameters=parameters, trainer={**SAVING, "max_steps": 1}))
    assert not list((tmp_path / "run").rglob("*.safetensors"))


# Interrupted saves.


DAMAGE = {
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no scheduler": lambda folder: (folder / "scheduler.pt").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "no random state": lambda folder: (folder / "rng_state.pth").unlink(),
    "half an optimizer": lambda folder: cut(folder / "optimizer.pt"),
    "half of the weights": lambda folder: cut(folder / "model.safetensors"),
    "half a state": lambda folder: cut(folder / "trainer_state.json"),
    "a state that is a list": lambda folder: (folder / "trainer_state.json").write_text("[]"),
    "a flipped byte": lambda folder: flip(folder / "optimizer.pt"),
    "an empty scheduler": lambda folder: (folder / "scheduler.pt").write_bytes(b""),
    "nothing": lambda folder: [f.unlink() for f in folder.iterdir()],
}


def cut(file: Path):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(run, caplog, kind):
    DAMAGE[kind](run / "checkpoint-4")
    assert choose_checkpoint(str(run), True) == run / "checkpoint-2"
    (line,) = [r.getMessage() for r in caplog.records if "not whole" in r.getMessage()]
    assert str(run / "checkpoint-4") in line
    with pytest.raises(ValueError, match=r"checkpoint-4.*checkpoint-2 is whole"):
        choose_checkpoint(str(run), str(run / "checkpoint-4"))


@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_that_a_killed_run_had_set_aside_is_put_back(run, monkeypatch, named):
    monkeypatch.setattr("perceptiondlm.common.files._exchange", lambda *_: False)
    rename = Path.rename

    def once(self, target):
        rename(self, target)
        die()

    def replace():
        monkeypatch.setattr(Path, "rename", once)
        shutil.copytree(run / "checkpoint-4", run / ".saving" / "checkpoint-4")
        checkpoints.move_checkpoint(run / ".saving" / "checkpoint-4", run / "checkpoint-4")

    kill_in(replace)
    assert not (run / "checkpoint-4").exists()
    asked = str(run / "checkpoint-4") if named else True
    assert choose_checkpoint(str(run), asked) == run / "checkpoint-4"


def test_a_checkpoint_set_aside_outlives_the_next_save(run):
    (run / ".saving").mkdir()
    (run / "checkpoint-4").rename(run / ".saving" / "replaced-checkpoint-4")
    with checkpoints.saving_folder(str(run), is_main=True):
        check_whole(run / "checkpoint-4")


def test_a_checkpoint_is_moved_when_every_process_has_written_its_part(recipe_of, monkeypatch):
    from perceptiondlm.training import trainer

    events = []

    def noted(name, work):
        return lambda *given: (events.append(name), work(*given))[1]

    own = trainer.DiffusionTrainer
    monkeypatch.setattr(own, "_save_rng_state", noted("write", own._save_rng_state))
    monkeypatch.setattr(trainer, "wait_for_others", noted("wait", trainer.wait_for_others))
    monkeypatch.setattr(trainer, "move_checkpoint", noted("move", trainer.move_checkpoint))
    train(recipe_of(trainer={**SAVING, "max_steps": 2}))
    assert events[:4] == ["write", "wait", "move", "wait"]


def test_a_second_run_on_one_output_folder_is_refused(recipe_of, tmp_path):
    with only_run(tmp_path / "run"):
        with pytest.raises(ValueError, match="expected no other run to write .*run"):
            train(recipe_of(trainer=SAVING))
    assert not list((tmp_path / "run").iterdir())


def test_a_run_resumed_from_an_older_checkpoint_ends_as_the_uninterrupted_one(finished, run):
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    resumed = train(small_recipe(run, trainer=SAVING), resume=True)
    assert losses_of(resumed) == losses_of(finished[0])
    for name, weight in weights_of(finished[0]).items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    check_whole(run / "checkpoint-4")  # replaced


def test_no_whole_checkpoint_is_one_line(run, capsys):
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.rmtree(run / name)
    file = run.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_values(run, trainer=SAVING)))
    assert main(["train", str(file), "--resume"]) == 2
    assert "expected a whole checkpoint in" in capsys.readouterr().err.splitlines()[-1]
    assert main(["train", str(file), "--resume", str(run / "gone")]) == 2
    assert "no such folder" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_another_model_is_named_without_a_traceback(run, capsys):
    saved = torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)
    saved["param_groups"] = saved["param_groups"][:1]
    torch.save(saved, run / "checkpoint-4" / "optimizer.pt")
    file = run.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_values(run, trainer=SAVING)))
    assert main(["train", str(file), "--resume"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "optimizer and scheduler of this run in" in line and "checkpoint-4" in line


@pytest.mark.parametrize("name", ["save_pretrained", "rename"])
def test_a_save_that_fails_leaves_the_checkpoints_before_it(recipe_of, tmp_path, monkeypatch, name):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    train(recipe_of(trainer={**SAVING, "max_steps": 2}))
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        if name == "rename":
            patch.setattr(checkpoints, "move_checkpoint", full)
            patch.setattr("perceptiondlm.training.trainer.move_checkpoint", full)
        else:
            from perceptiondlm.modeling_perceptiondlm import (
                PerceptionDLMForConditionalGeneration as Model,
            )

            patch.setattr(Model, "save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            train(recipe_of(trainer=SAVING), resume=True)
    assert [f.name for f in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "run" / ".saving").exists()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert train(recipe_of(trainer=SAVING), resume=True).state.global_step == 6


def test_an_interrupted_final_save_is_finished(finished, tmp_path):
    trainer, folder = finished
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    for name in ("model.safetensors", "config.json"):
        (copy / name).unlink()
    resumed = train(small_recipe(copy, trainer=SAVING), resume=True)
    assert resumed.state.global_step == 6
    saved = load_file(copy / "model.safetensors")
    assert all(
        torch.equal(saved[name], w) for name, w in weights_of(trainer).items() if name in saved
    )
    assert (copy / "config.json").exists()


def test_final_weights_older_than_the_last_checkpoint_are_written_anew(finished, tmp_path):
    trainer, folder = finished
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.copy(copy / "checkpoint-2" / "model.safetensors", copy / "model.safetensors")
    os.utime(copy / "model.safetensors", (0, 0))
    train(small_recipe(copy, trainer=SAVING), resume=True)
    saved = load_file(copy / "model.safetensors")
    assert all(
        torch.equal(saved[name], w) for name, w in weights_of(trainer).items() if name in saved
    )


def test_a_final_save_keeps_what_it_did_not_make(recipe_of, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    mine = {"README.md": "mine", "notes.py": "mine = 1", "adapter_model.safetensors": "mine"}
    for name, text in mine.items():
        (folder / name).write_text(text)
    train(recipe_of(trainer={"max_steps": 1}, save_code=False))
    assert {name: (folder / name).read_text() for name in mine} == mine


# Interrupts and kills, of processes as a user starts them.


COMMAND = [sys.executable, "-m", "perceptiondlm.apps.cli", "train"]


def start(folder: Path, *arguments: str, **trainer) -> subprocess.Popen:
    file = folder.with_suffix(".yaml")
    values = recipe_values(folder, trainer={**SAVING, "max_steps": 5000, **trainer})
    file.write_text(yaml.safe_dump(values))
    return subprocess.Popen(
        [*COMMAND, str(file), *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts():
    """Heeds Ctrl-C as in a terminal: what a shell starts in the background inherits ignoring it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.time() < deadline, "it took too long"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_a_run_with_one_line_and_130(tmp_path, workers):
    process = start(tmp_path / "run", dataloader_num_workers=workers)
    wait_for(lambda: (tmp_path / "run" / "checkpoint-2").is_dir(), process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's reaches every process
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    *_, line = errors.strip().splitlines()
    assert line.startswith("perceptiondlm train: interrupted after step ")
    assert "--resume goes on" in line and "Traceback" not in errors
    assert newest_whole(tmp_path / "run") is not None


def test_every_command_ends_so(monkeypatch, capsys):
    from perceptiondlm.apps.captioning import command as caption
    from perceptiondlm.evaluation import cli as evaluate
    from perceptiondlm.training import cli as training

    def interrupt(args):
        raise KeyboardInterrupt

    for module, arguments in (
        (caption, ["caption", "a.png"]),
        (training, ["train", "a.yaml"]),
        (evaluate, ["evaluate", "report", "a.json"]),
    ):
        monkeypatch.setattr(module, "run", interrupt)
        monkeypatch.setattr(module, "configure", lambda p: p.add_argument("rest", nargs="*"))
        assert main(arguments) == 130
        assert capsys.readouterr().err == f"perceptiondlm {arguments[0]}: interrupted\n"


@pytest.mark.slow
def test_a_run_killed_at_any_moment_of_a_save_goes_on(tmp_path, monkeypatch):
    """Kills while files are being written: the slow part, the sync, is where it is caught."""
    process = start(tmp_path / "run", save_steps=1)
    saving = tmp_path / "run" / ".saving"
    wait_for(lambda: (tmp_path / "run" / "checkpoint-1").is_dir(), process)
    wait_for(saving.exists, process)
    process.kill()
    process.communicate(timeout=60)
    newest = newest_whole(tmp_path / "run")
    assert newest is not None
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        check_whole(folder)
    step = int(newest.name.split("-")[1])
    values = recipe_values(tmp_path / "run", trainer={**SAVING, "max_steps": step + 1})
    assert train(build_recipe(values), resume=True).state.global_step == step + 1
    assert not saving.exists()
