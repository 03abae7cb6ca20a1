"""The notebooks under examples/ are valid and run from top to bottom, in a process of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from perceptiondlm.scenes.example_scenes import open_example

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
RUN = """
import json, sys

cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
space = {}
for cell in cells:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
"""


def run(name: str, folder: Path) -> str:
    """Runs a notebook's code cells with `folder` as the working folder; returns what they print."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", RUN, str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_of_format_4_5_and_holds_no_outputs(path):
    book = json.loads(path.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert {"cells", "metadata", "nbformat", "nbformat_minor"} == set(book)

    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in book["cells"]:
        common = {"cell_type", "id", "metadata", "source"}
        is_code = cell["cell_type"] == "code"
        assert set(cell) == common | ({"execution_count", "outputs"} if is_code else set())
        assert not is_code or (cell["execution_count"], cell["outputs"]) == (None, [])


def test_the_first_notebook_captions_answers_and_draws(tmp_path):
    said = run("first_captions.ipynb", tmp_path)
    assert said.count(" truth: ") == 4 and "tokens a forward pass" in said
    for question in open_example().questions:
        assert f"{question.question}\n  " in said and f" | true: {question.answer}\n" in said
    for thing in open_example().objects:
        assert thing.question.question in said and thing.question.answer in said
    passes = re.search(r"(\d+) forward passes by default, (\d+) as released", said)
    by_default, released = map(int, passes.groups())
    assert 1 < by_default < released == 36
    assert len(re.findall(r"(?m)^\d+ \| ", said)) == len(range(0, by_default + 1, 3))
    assert (tmp_path / "captions.gif").read_bytes().startswith(b"GIF89a")


@pytest.mark.slow
def test_the_second_notebook_teaches_another_way_to_caption(tmp_path):
    said = run("finetune_on_your_masks.ipynb", tmp_path)
    rows = [line.split(" -> ")[1] for line in said.splitlines() if " truth: " in line]
    learned = [caption.split(" truth: ") for caption in rows]
    assert len(learned) == 4  # of a scene that it was not trained on
    # what it sees it knew before; the form is new
    forms = [re.fullmatch(r"([a-z -]+), (small|medium-sized|large)", c) for c, _ in learned]
    assert all(forms)
    names = [truth.split(", ")[0] for _, truth in learned]
    assert sum(form[1] == name for form, name in zip(forms, names, strict=True)) >= 2
    assert any(caption == truth for caption, truth in learned)
