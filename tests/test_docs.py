"""What the documents say is so: tables are of the code, links lead somewhere, examples run."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest
import yaml
from perceptiondlm.apps import cli
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.generation_options import RENAMED

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
)
STEPS = {*cli.COMMANDS, *"synthetic sweep latency predict judge score report write".split()}
MAX_BYTES = 10e6  # what the Hub takes in plain git


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_readme_has_the_decoding_options_as_they_are_declared():
    tables = runpy.run_path(ROOT / "docs" / "make_tables.py")
    text = (ROOT / "README.md").read_text()
    table = text.partition(tables["START"])[2].partition(tables["END"])[0]
    assert table.strip() == tables["options_table"](), "run: python docs/make_tables.py"


def test_the_options_table_says_name_default_task_and_meaning():
    """Compared with one row written by hand."""
    table = runpy.run_path(ROOT / "docs" / "make_tables.py")["options_table"]()
    row = next(line for line in table.splitlines() if "`caption_length`" in line)
    assert row.startswith("| `caption_length` | `32` | captions | ")


def test_a_readme_without_markers_is_refused():
    tables = runpy.run_path(ROOT / "docs" / "make_tables.py")
    with pytest.raises(ValueError, match="expected <!-- decoding options"):
        tables["with_table"]("no markers")


# The embedded model may be trained anew: what a model says is in tests/test_shapes_model.py.


def test_the_first_example_of_the_readme_captions_as_the_checkpoint_prefers(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    example = {}
    exec(blocks(ROOT / "README.md")[0], example)
    captions, num_forwards, tokens_per_forward, answer = re.fullmatch(
        r"(\[.*\]) (\d+) ([\d.]+)\n(.*)\n", capsys.readouterr().out, re.DOTALL
    ).groups()
    same = RegionCaptioner.from_pretrained(device="cpu", dtype=example["model"].dtype)
    assert ast.literal_eval(captions) == same(example["image"], example["masks"]).captions
    assert answer == same.ask(example["image"], "How many things are there?").answers[0]
    # captions of the checkpoint's own length, of both regions at once, by its own threshold
    preferred = json.loads((ROOT / "tiny" / "generation_config.json").read_text())
    length = preferred["caption_length"]
    assert 1 < int(num_forwards) < length
    assert float(tokens_per_forward) == pytest.approx(2 * length / int(num_forwards))
    assert example["out"].num_forwards <= preferred["max_new_tokens"]


def test_the_examples_of_the_page_on_prompting_run(monkeypatch, capsys):
    """They go on from the README's, whose next example they are in more words."""
    monkeypatch.chdir(ROOT)
    example = {}
    readme = blocks(ROOT / "README.md")
    asked = next(block for block in readme if "diffusion_score" in block)
    for block in [readme[0], asked, *blocks(ROOT / "docs" / "prompting.md")]:
        exec(block, example)
    said = capsys.readouterr().out
    assert [len(row) for row in example["labels"]] == [2]
    assert len(example["out"].texts) == 2
    assert re.search(r"'size': '(large|small)'", said)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_documents_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_no_document_or_figure_is_too_large_for_the_hub():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs").rglob("*")}
    assert [name for name, size in sizes.items() if size > MAX_BYTES] == []


@pytest.fixture(scope="module")
def algorithm() -> dict:
    """Gives what the code block of docs/algorithm.md has computed, run from the root."""
    (block,) = blocks(ROOT / "docs" / "algorithm.md")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        exec(block, found)
    return found


def test_the_algorithm_in_forty_lines_decodes_as_diffusion_generate_does(algorithm, monkeypatch):
    model, image, masks = (algorithm[name] for name in ("model", "image", "masks"))
    assert model.config.region_layout == "independent"
    monkeypatch.chdir(ROOT)  # where the processor is looked for
    ids = model.diffusion_generate(image, masks, threshold=None).token_ids
    assert [algorithm["captions"].tolist()] == ids


def test_the_algorithm_stays_short():
    (block,) = blocks(ROOT / "docs" / "algorithm.md")
    assert len(block.strip().splitlines()) <= 45


def test_the_architecture_page_names_every_root_module_and_folder():
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = {path.name for path in ROOT.glob("*.py")} - {"__init__.py"}
    folders = {path.parent.name + "/" for path in ROOT.glob("*/__init__.py")}
    assert {name for name in modules | folders if f"`{name}" not in text} == set()


def test_the_changelog_has_every_option_that_was_renamed():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert [name for name in RENAMED if f"`{name}=" not in text and f"{name}=0" not in text] == []


def test_the_citation_names_the_version_the_license_and_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project
    assert f'license = "{citation["license"]}"' in project
    papers = {one["url"].split("/")[-1] for one in citation["references"]}
    assert papers == {"2606.19534", "2502.09992", "2505.16933"}


def test_the_commit_hooks_run_the_ruff_that_is_pinned():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"ruff=={repo['rev'][1:]}\n" in (ROOT / "requirements.txt").read_text()


@pytest.mark.parametrize("name", ["ACCEPT_RULES", "READERS", "DATA_KINDS"])
def test_the_tables_that_contributors_extend_are_where_they_are_told(name):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (line,) = [
        part for part in re.findall(r"\n\d\. .*?(?=\n\d\. |\n\n)", text, re.DOTALL) if name in part
    ]
    files = re.findall(r"`([\w/]+\.py)`", text[: text.index(line) + len(line)])
    assert any(f"\n{name}" in (ROOT / file).read_text() for file in files)


def test_tests_that_contributors_are_told_of_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in code] == []
    assert [f for f in re.findall(r"`(tests/[\w/.]+)`", text) if not (ROOT / f).exists()] == []


def commands() -> set[tuple[str, str]]:
    """Finds each option that a documented command line has: ("evaluate sweep", "--rules")."""
    texts = [page.read_text() for page in PAGES]
    fenced = [
        block for text in texts for block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    ]
    found = set()
    for block in [block for language, block in fenced if language in ("", "shell")]:
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].split()
            if words[:1] == ["perceptiondlm"]:
                # `evaluate` has steps, and one of them has steps of its own.
                command = [word for word in words[1:4] if word in STEPS]
                found |= {(" ".join(command), word) for word in words if word.startswith("--")}
    return found


@pytest.mark.parametrize("command", sorted({command for command, _ in commands()}))
def test_documented_command_lines_name_options_that_there_are(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {option for name, option in commands() if name == command} <= known


def test_the_reader_of_documented_commands_finds_those_that_are_known():
    assert {
        ("caption", "--animate"),
        ("evaluate sweep", "--rules"),
        ("serve", "--port"),
    } <= commands()
