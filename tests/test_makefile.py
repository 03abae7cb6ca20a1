"""Commands of the Makefile that run for hours name recipes and options that there are."""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from perceptiondlm.apps import cli
from perceptiondlm.evaluation.cli import STEPS
from perceptiondlm.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
TARGETS = ("tiny", "shapes", "report", "report-shapes")


def commands(target: str) -> list[list[str]]:
    """The words of each `perceptiondlm` command that a target would run, set-up left out."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [line.split()[1:] for line in lines if line.startswith(".venv/bin/perceptiondlm ")]


def recipes(target: str) -> list:
    """The recipes that a target trains, with its options."""
    trained = [words for words in commands(target) if words[0] == "train"]
    return [load_recipe(words[1], [*words[2:], "trainer.use_cpu=true"]) for words in trained]


def test_the_embedded_model_is_trained_in_two_stages_the_second_from_what_the_first_leaves():
    names, writing = recipes("tiny")
    assert Path(writing.model.checkpoint) == Path(names.trainer["output_dir"])
    assert names.data.objective == "names" and writing.data.scene_kind == "things"


def test_the_report_is_of_the_embedded_model_on_what_it_knows():
    *steps, _ = commands("report")
    assert [words[1] for words in steps] == ["synthetic", "sweep", "latency"]
    for words in steps:
        options = dict(itertools.pairwise(words))
        assert (options["--subfolder"], options["--scene-kind"]) == ("tiny", "things")


@pytest.mark.parametrize("target", ["report", "report-shapes"])
def test_reports_are_made_of_files_that_were_written_before(target):
    *steps, report = commands(target)
    written = {words[words.index("--output") + 1] for words in steps}
    read = {word for word in report if word.startswith("outputs/") and word.endswith(".json")}
    assert read and read <= written


@pytest.mark.parametrize("target", TARGETS)
def test_every_option_of_a_long_command_is_known(target, capsys):
    found = commands(target)
    assert found
    for words in found:
        own = [word for word in words[:3] if word in {*cli.COMMANDS, *STEPS, "write", "judge"}]
        with pytest.raises(SystemExit):
            cli.main([*own, "--help"])
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert {word for word in words if word.startswith("--")} <= known
