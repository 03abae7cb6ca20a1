"""Records where a run took place: hardware, versions, git revision."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = (
    "perceptiondlm",
    "torch",
    "transformers",
    "accelerate",
    "openai",
    "numpy",
    "pillow",
)


def run_environment() -> dict:
    """Returns hardware, versions and git revision, for the record of a run."""
    return {"hardware": hardware(), "versions": versions(), "git_revision": code_revision()}


@functools.cache
def code_revision() -> str | None:
    """Returns this package's revision at the first call, when a run has just loaded its code."""
    return git_revision()


def hardware() -> dict:
    """Returns the names of the processor and of the accelerators."""
    import torch

    record = {"cpu": cpu_name(), "cpu_cores": os.cpu_count(), "accelerators": []}
    if torch.cuda.is_available():
        record["accelerators"] = [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ]
    elif torch.accelerator.is_available():
        record["accelerators"] = [str(torch.accelerator.current_accelerator())]
    return record


def cpu_name() -> str:
    """Returns the processor's name, which Linux tells in /proc alone."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict:
    """Returns the versions of Python and of the packages that results may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_revision(folder: str | Path | None = None) -> str | None:
    """Returns the commit that a folder is at, with "+changes" if its files were edited since.

    The default folder is this package's. Returns None for one that is not the root of a git
    repository, as when the package is installed somewhere inside another repository.
    """
    folder = Path(folder or Path(__file__).parent.parent).resolve()
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None or Path(_git(folder, "rev-parse", "--show-toplevel")).resolve() != folder:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changed else "")


def _git(folder: str | Path, *arguments: str) -> str | None:
    # Without a lock on the index, which a killed run would leave behind
    command = ["git", "--no-optional-locks", *arguments]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return result.stdout.strip() if result.returncode == 0 else None
