"""Without the extras: every command that needs one names it in a line, and the rest works."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from perceptiondlm.common.extras import MissingExtra, extra
from perceptiondlm.evaluation.files import write_json
from training_runs import recipe_values

VECTORS = Path(__file__).parent / "fixtures" / "vectors"
IMAGE = VECTORS / "region_0.png"

# Runs commands one after another and prints, of each, the exit code and what it said.
PROGRAM = """
from clean_rooms import hide_other_packages
hide_other_packages()
import contextlib, importlib, io, json, sys
results = {}
for name, (module, arguments) in json.loads(sys.argv[1]).items():
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = importlib.import_module(module).main(arguments)
        except BaseException as error:
            code = repr(error)
    results[name] = code, said.getvalue()
print("RESULT", json.dumps(results))
"""
COMMAND, CONVERTER = "perceptiondlm.apps.cli", "perceptiondlm.convert_checkpoint"
SCORES = {
    "summary": dict.fromkeys(("average", "average_positive", "average_negative"), 1.0),
    "regions": {},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory, converted):
    """What each command did in a process that has the required packages alone."""
    folder = tmp_path_factory.mktemp("extras")
    region = str(converted("released-region"))
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(folder / "run")))
    write_json(folder / "scores.json", SCORES)
    write_json(
        folder / "rows.json",
        [{"label": "a", "regions": 2, "latency": 1.0, "tokens_per_second": 1.0}],
    )
    write_json(folder / "captions.json", {"1592437_0": "a cup"})
    caption = ["caption", str(IMAGE), "--box", "1,1,30,30", "--caption-length", "4"]
    report = ["evaluate", "report", "--scores", str(folder / "scores.json")]
    judge = ["--predictions", str(folder / "captions.json"), "--model", "m"]
    judge += ["--benchmark", str(VECTORS.parent / "paradlc"), "--base-url", "http://127.0.0.1:1"]
    judge += ["--mode", "text"]
    out = ["--output", str(folder / "out")]
    commands = {
        "caption": (COMMAND, caption + ["--model", region]),
        "caption coco": (COMMAND, caption + ["--model", region, "--format", "coco"]),
        "everything": (COMMAND, ["caption", str(IMAGE), "--everything", "--model", region]),
        "caption-dataset": (COMMAND, ["caption-dataset", str(folder), *out]),
        "web": (COMMAND, ["web"]),
        "serve": (COMMAND, ["serve"]),
        "train": (COMMAND, ["train", str(recipe)]),
        "engine": (COMMAND, ["engine", "configs/engine.yaml"]),
        "judge": (COMMAND, ["evaluate", "judge", *judge, *out]),
        "report": (COMMAND, [*report, "--rows", str(folder / "rows.json"), *out]),
        "adapter": (
            CONVERTER,
            ["--source", str(adapter), "--base", region, "--output", str(folder / "merged")],
        ),
    }
    path = os.pathsep.join(filter(None, [str(VECTORS.parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.parametrize("command", ["caption", "caption coco"])
def test_captioning_needs_no_extra(results, command):
    assert results[command] == [0, ""]


@pytest.mark.parametrize(
    ("command", "package", "name", "code"),
    [
        ("everything", "cv2|skimage", "regions", 2),
        ("caption-dataset", "ray|pyarrow", "scale", 2),
        ("web", "gradio|starlette", "apps", 2),
        ("serve", "fastapi|uvicorn", "apps", 2),
        ("train", "accelerate|datasets|omegaconf", "train", 2),
        ("engine", "omegaconf|yaml", "engine", 2),
        ("judge", "openai", "eval", 2),
        ("report", "matplotlib", "eval", 2),
        ("adapter", "peft", "train", 1),
    ],
)
def test_a_missing_extra_is_named_in_one_line(results, command, package, name, code):
    got, said = results[command]
    assert got == code, said
    (line,) = said.splitlines()
    named = rf"""No module named '({package})': pip install "perceptiondlm\[{name}\]\"$"""
    assert re.search(named, line)


@pytest.mark.parametrize(
    ("module", "package", "name"),
    [
        ("perceptiondlm.training.records", "datasets", "train"),
        ("perceptiondlm.training.sharding", "accelerate", "train"),
        ("perceptiondlm.evaluation.lmms_eval_plugin", "lmms_eval", "lmms"),
    ],
)
def test_a_module_that_is_nothing_without_an_extra_names_it(monkeypatch, module, package, name):
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf'pip install "perceptiondlm\[{name}\]"'):
        __import__(module)


def test_the_first_extra_that_is_missing_is_the_one_named():
    with pytest.raises(MissingExtra, match=r"inner\]\"$"):
        with extra("outer"), extra("inner"):
            raise ImportError("No module named 'a'")
