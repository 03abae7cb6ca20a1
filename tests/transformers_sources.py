"""Fetches transformers' own common tests, from the source distribution of the installed version.

Run as a script this downloads them. What they import beside each other and the distribution lacks
is replaced: the tests of generation and of exporting by empty classes, the fetching of images from
the Hub by a drawn one.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import transformers
from PIL import Image

VERSION = transformers.__version__
FOLDER = Path(__file__).resolve().parents[1] / "outputs" / f"transformers-{VERSION}-tests"
PACKAGE = "transformers_common_tests"


def fetch():
    """Downloads the distribution and unpacks its tests to `FOLDER`."""
    with tempfile.TemporaryDirectory() as place:
        source = ["--no-deps", "--no-binary", ":all:", f"transformers=={VERSION}"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", *source, "--dest", place]
        subprocess.run(pip, check=True)
        with tarfile.open(next(Path(place).glob("*.tar.gz"))) as archive:
            FOLDER.mkdir(parents=True, exist_ok=True)
            for member in archive.getmembers():
                path = Path(member.name)
                if path.parts[1:2] == ("tests",) and path.suffix == ".py":
                    (FOLDER / path.name).write_bytes(archive.extractfile(member).read())


def load(name: str):
    """Imports a module of the tests by its file's name."""
    if PACKAGE not in sys.modules:
        _prepare()
    return importlib.import_module(f"{PACKAGE}.{name}")


def _prepare():
    image = FOLDER / "image.png"
    Image.radial_gradient("L").convert("RGB").save(image)
    stand_ins = {
        PACKAGE: {"__path__": [str(FOLDER)]},
        f"{PACKAGE}.generation": {"__path__": []},
        f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("Generation", (), {})},
        f"{PACKAGE}.exporters": {"__path__": []},
        f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("Export", (), {})},
        "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url, *_: str(image)},
    }
    for name, contents in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module


if __name__ == "__main__":
    fetch()
