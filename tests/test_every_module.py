"""Every module of the package can be imported: a name that moved leaves none behind."""

import importlib
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OUTSIDE = ("tests/", "docs/", "apps/space/")
OTHERS = {  # packages that a module stands beside, not in any extra that the tests install
    "perceptiondlm.evaluation.lmms_eval_plugin",
    "perceptiondlm.evaluation.vlmevalkit_adapter",
    "perceptiondlm.training.sft",
}


def modules() -> list[str]:
    files = subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()
    paths = [Path(file) for file in files if not file.startswith(OUTSIDE)]
    names = [".".join(["perceptiondlm", *path.with_suffix("").parts]) for path in paths]
    return [name for name in names if not name.endswith("__init__")]


@pytest.mark.parametrize("name", modules())
def test_a_module_can_be_imported(name):
    if name in OTHERS:
        pytest.skip("needs a package of its own")
    importlib.import_module(name)
