"""What the documents say is so: tables are of the code, links lead somewhere, examples run."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
)
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


def test_the_first_example_of_the_readme_captions_as_the_checkpoint_prefers(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    example = {}
    exec(blocks(ROOT / "README.md")[0], example)
    first, answer = capsys.readouterr().out.strip().splitlines()
    assert "'a large dotted blue star at the top left'" in first
    # 11 tokens a caption and 2 an answer, as tiny/generation_config.json says
    assert first.split("] ")[1].split() == ["11", "2.0"]
    assert answer == "three" and example["out"].num_forwards == 2


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
    ids = model.diffusion_generate(image, masks).token_ids
    assert [algorithm["captions"].tolist()] == ids


def test_the_algorithm_stays_short():
    (block,) = blocks(ROOT / "docs" / "algorithm.md")
    assert len(block.strip().splitlines()) <= 45


def test_the_architecture_page_names_every_root_module_and_folder():
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = {path.name for path in ROOT.glob("*.py")} - {"__init__.py"}
    folders = {path.parent.name + "/" for path in ROOT.glob("*/__init__.py")}
    assert {name for name in modules | folders if f"`{name}" not in text} == set()
