"""`import perceptiondlm` offers what users want, and loads nothing heavy until it is used."""

import subprocess
import sys

import perceptiondlm
import pytest


@pytest.mark.parametrize("name", perceptiondlm.__all__)
def test_a_public_name_is_the_modules_own(name):
    assert getattr(perceptiondlm, name).__name__ == name
    assert name in dir(perceptiondlm)


def test_importing_the_package_imports_no_torch():
    code = "import sys, perceptiondlm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'Captioner'"):
        perceptiondlm.Captioner  # noqa: B018
