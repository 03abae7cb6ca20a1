"""The benchmark of the joint layout: which commands it runs, what it keeps and what it writes."""

import json
from pathlib import Path

import pytest

pytest.importorskip("omegaconf")

from perceptiondlm.benchmarks import joint_layout  # noqa: E402

SHARES = {"attribute_accuracy": 0.5, "exact_caption_rate": 0.25, "interference_rate": 0.125}
ROW = {"rule": "fixed", "value": None, "verify": None, "steps": 4, "forwards_per_pass": 4.0}


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Gives a function that runs the benchmark with pretended commands, which it returns."""
    calls = []

    def pretend(*command):
        calls.append(command)
        if command[0] == "train":
            (folder,) = (c.split("=")[1] for c in command if c.startswith("trainer.output_dir="))
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "model.safetensors").touch()
            (Path(folder) / "generation_config.json").write_text('{"caption_length": 7}')
            return
        output = Path(command[command.index("--output") + 1])
        if command[0] == "caption-dataset":
            output.mkdir()
            (output / "summary.json").touch()
        elif command[1] == "sweep":
            output.write_text(json.dumps({"rows": [ROW | SHARES | {"seconds": 1.0}] * 2}))
            output.with_suffix(".md").touch()
        else:
            output.write_text(json.dumps(SHARES | {"forwards": 3, "seconds": 2.0}))

    def run(*arguments) -> list[tuple]:
        before, places = len(calls), ["--runs", str(tmp_path / "runs")]
        places += ["--output", str(tmp_path / "result.json")]
        command = ["joint_layout", "shapes.yaml", "--steps", "20", *places, *arguments]
        monkeypatch.setattr("sys.argv", command)
        joint_layout.main()
        return calls[before:]

    monkeypatch.setattr(joint_layout, "run_command", pretend)
    monkeypatch.setattr(joint_layout, "switch", lambda joint, arguments: joint.parent / "switched")
    return run


def test_every_refresh_interval_is_swept_and_three_models_are_measured(measure, tmp_path):
    calls = measure()
    kinds = [call[0] if call[0] != "evaluate" else call[1] for call in calls]
    assert kinds == ["train", *["sweep"] * 4, "caption-dataset", "train", *["synthetic"] * 3]
    refreshed = [call[call.index("--option") + 1] for call in calls if "--option" in call]
    assert refreshed == [f"prompt_refresh_interval={k}" for k in (0, 4, 8)]

    tree = calls[6]
    assert tree[1] == "configs/regions_to_tree.yaml" and "trainer.max_steps=2" in tree
    assert "data.caption_length=7" in tree  # as the joint model's

    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["model"] for row in result["models"]] == ["joint", "switched", "tree"]
    lines = (tmp_path / "result.md").read_text().splitlines()
    assert "| refresh-0 | fixed |  |  | 4 | 4.0 | 50.00 | 25.00 | 12.50 | 1.0 |" in lines
    assert "| tree | 50.00 | 25.00 | 12.50 | 2.0 |" in lines


def test_what_is_done_is_kept_and_a_training_that_stopped_goes_on(measure, tmp_path):
    measure()
    assert measure() == []
    (tmp_path / "runs" / "joint" / "model.safetensors").unlink()
    (tmp_path / "runs" / "joint" / "checkpoint-5").mkdir()
    (tmp_path / "runs" / "refresh-4.md").unlink()  # a sweep that did not come to its end
    trained, swept = measure()
    assert trained[0] == "train" and trained[-1] == "--resume"
    assert "prompt_refresh_interval=4" in swept


def test_what_was_made_with_other_sizes_is_refused(measure):
    measure("--scenes", "3")
    with pytest.raises(ValueError, match="expected scenes 4 in .*sizes.json, got 3"):
        measure("--scenes", "4")
