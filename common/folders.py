"""Makes folders that are whole or not there, however the run ends."""

import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .files import fcntl, lock_handle, replace_folder, sync_folder

REPLACED = "replaced"  # what was there, until its successor is


class OutputExists(ValueError, FileExistsError):
    """The output is there already, or being made, and would be lost."""


@contextmanager
def new_folder(output: Path, force: bool) -> Iterator[Path]:
    """Gives a temporary folder that takes the place of `output` if all goes well, or disappears.

    Raises OutputExists where another run is making the same.
    """
    target = Path(os.path.realpath(output))
    target.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    with _locked(holder):
        try:
            clear_unfinished(output, own=holder)
            unfinished = holder / target.name
            unfinished.mkdir()
            yield unfinished

            # only what is whole and on the disk takes the name
            sync_tree(unfinished)
            _put_in_place(unfinished, target, holder / REPLACED, force)
        finally:
            shutil.rmtree(holder, ignore_errors=True)


def clear_unfinished(output: Path, own: Path | None = None):
    """Removes what killed runs left beside `output`, and puts back what they had moved away.

    Raises OutputExists where a run that makes `output` is alive; `own` is this run's folder.
    """
    target = Path(os.path.realpath(output))
    for holder in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        if holder == own or not holder.is_dir():
            continue
        with _locked(holder) as is_dead:
            if not is_dead:
                raise OutputExists(f"expected no other run that makes {output}, got one under way")

            # killed between two renamings: what was moved away goes back
            if (holder / REPLACED).exists() and not os.path.lexists(target):
                (holder / REPLACED).rename(target)
            shutil.rmtree(holder, ignore_errors=True)


def expect_folder(output: Path):
    """Refuses to replace what is no folder: a file, a device, a pipe."""
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.stat(output).st_mode):
            raise OutputExists(f"expected a folder or a new name as output, got {output}")


def sync_tree(folder: Path):
    """Waits until all files of a folder are on the disk, so that its renaming comes after them."""
    for place, _, names in os.walk(folder):
        for name in names:
            with open(Path(place, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def _put_in_place(unfinished: Path, target: Path, replaced: Path, force: bool):
    """Renames a finished folder; what it replaces is back in its place if that fails."""
    if force and target.exists():
        shutil.copymode(target, unfinished)
        replace_folder(unfinished, target, replaced)
    else:
        unfinished.rename(target)
    sync_folder(target.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds a folder's lock, which its owner's death releases; gives False if another has it."""
    if fcntl is None:  # Windows opens no folder, and nothing keeps two runs apart there
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield lock_handle(handle)
    finally:
        os.close(handle)


def _prefix(target: Path) -> str:
    return f".{target.name}.converting-"
