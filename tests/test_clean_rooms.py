"""Loading by Hub id, with the packages that loading needs and no others."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from clean_rooms import REQUIRED, write_hub_cache
from perceptiondlm.convert_checkpoint import convert
from transformers.dynamic_module_utils import get_imports

ROOT = Path(__file__).parent.parent
VECTORS = Path(__file__).parent / "fixtures" / "vectors"
REPO = "somebody/captioner"
# modules as they are imported
PACKAGES = (REQUIRED - {"huggingface-hub", "pillow"}) | {"huggingface_hub", "PIL"}

# A reader's program, which knows nothing of this package; RLE: the left half of 4 x 6 pixels, as
# uncompressed and as COCO's compressed counts.
READER = """
import json
from PIL import Image
from transformers import AutoModel, AutoProcessor

image = Image.new("RGB", (6, 4), "red")
masks = [{"size": [4, 6], "counts": [0, 12, 12]}, {"size": [4, 6], "counts": "<<"}]

def captions(name):
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    out = model.diffusion_generate(image, masks, processor=processor, caption_length=4)
    return model, processor, out.token_ids[0]

model, processor, first = captions("somebody/captioner")
model.save_pretrained("saved")
processor.save_pretrained("saved")
print("RESULT", json.dumps([first, captions("./saved")[2]]))
"""
HIDING = "from clean_rooms import hide_other_packages; hide_other_packages()\n"


@pytest.mark.parametrize("module", sorted(path.name for path in ROOT.glob("*.py")))
def test_what_transformers_demands_of_a_loader_is_what_the_readme_says(module):
    demanded = set(get_imports(ROOT / module))
    assert demanded <= PACKAGES | sys.stdlib_module_names


def environment_of(home: Path) -> dict:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    return kept | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}


def run(python: str, program: str, home: Path) -> str:
    done = subprocess.run(
        [python, "-c", program],
        cwd=home,
        env=environment_of(home),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory, converted):
    """HF_HOME with a converted checkpoint as the Hub's cache holds it."""
    home = tmp_path_factory.mktemp("home")
    write_hub_cache(converted("released-region"), home, REPO)
    return home


def expect_captions(printed: str):
    first, saved = json.loads(printed.split("RESULT")[1])
    assert len(first) == 2 and [len(ids) for ids in first] == [4, 4]
    assert saved == first


def test_a_hub_id_loads_and_captions_rle_masks_with_seven_packages(cache):
    expect_captions(run(sys.executable, HIDING + READER, cache))


@pytest.mark.slow
def test_a_hub_id_loads_and_captions_in_an_environment_of_seven_packages(cache, tmp_path):
    venv.create(tmp_path / "seven", with_pip=True)
    python = str(tmp_path / "seven" / "bin" / "python")
    lines = (ROOT / "requirements.txt").read_text().splitlines() + ["pillow==13.0.0"]
    pins = [pin for pin in lines if pin.partition("==")[0].replace("_", "-") in REQUIRED]
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *(p for p in pins if p.startswith("torch=="))], check=True)
    subprocess.run([*install, *pins], check=True)
    expect_captions(run(python, READER, cache))


def test_the_converter_runs_from_a_hub_snapshot_of_the_repository(cache, converted, tmp_path):
    repository = tmp_path / "repository"
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), ROOT / "LICENSE", ROOT / "config.json"]:
        (repository / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, repository / path.relative_to(ROOT))
    script = write_hub_cache(repository, tmp_path, "somebody/code") / "convert_checkpoint.py"
    assert script.is_symlink()
    (source,) = cache.glob("hub/models--*/snapshots/*/")
    output = tmp_path / "again"
    arguments = ["--source", str(source), "--output", str(output)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    modules = {path.name for path in converted("released-region").glob("*.py")}
    assert {path.name for path in output.glob("*.py")} == modules
    assert (output / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_a_conversion_of_a_hub_id_is_of_its_snapshot(cache, converted, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    output = convert(REPO, tmp_path / "output")
    assert json.loads((output / "config.json").read_text())["model_type"] == "perceptiondlm"
