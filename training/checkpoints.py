"""Writes checkpoints whole or not at all, and checks one before a run goes on from it.

What is saved is written into the folder `.saving` of the output folder and moved from there when it
is whole. So a killed run leaves its last whole checkpoint, and a final folder that either is the
old one or the new one.
"""

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..common.files import replace_folder
from ..common.folders import sync_tree
from .stopping import is_distributed

logger = logging.getLogger(__name__)

SAVING, REPLACED = ".saving", "replaced-"
STATE = "trainer_state.json"
NAME = re.compile(r"checkpoint-(\d+)")
WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
SHARDED_WEIGHTS, SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
KEPT = ("README.md",)  # of a final folder: what is there may be the user's


# Writing.


@contextmanager
def saving_folder(output_dir: str, *, is_main: bool) -> Iterator[Path]:
    """Gives an empty folder to every process of a run; removes it afterwards, whatever happens."""
    folder = Path(output_dir) / SAVING
    if is_main:
        put_back_replaced(output_dir)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    wait_for_others()
    try:
        yield folder
    finally:
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)


def move_checkpoint(folder: Path, target: Path):
    """Moves a whole checkpoint to its place; an older one of the same step is replaced."""
    sync_tree(folder)
    if target.exists():
        replace_folder(folder, target, folder.parent / f"{REPLACED}{target.name}")
    else:
        folder.rename(target)


def put_back_replaced(output_dir: str | Path):
    """Puts back the checkpoints that a killed run had set aside and not replaced."""
    for aside in (Path(output_dir) / SAVING).glob(f"{REPLACED}*"):
        target = Path(output_dir) / aside.name.removeprefix(REPLACED)
        if not target.exists():
            with suppress(FileNotFoundError):  # another process of the run was first
                aside.rename(target)


def move_final(folder: Path, target: Path):
    """Moves the files of a whole final save into the output folder, the weights last.

    The weights stand for all: an interrupted move is seen by weights that are older than the last
    checkpoint.
    """
    sync_tree(folder)
    files = sorted(folder.iterdir(), key=lambda file: (bool(WEIGHTS.fullmatch(file.name)), file))
    new = {file.name for file in files}
    for file in files:
        if file.name in KEPT and (target / file.name).exists():
            continue
        if WEIGHTS.fullmatch(file.name):
            _remove_other_shards(target, new)
        os.replace(file, target / file.name)


def _remove_other_shards(folder: Path, new: set[str]):
    """Removes weights of the same model that are divided otherwise, and would be read instead."""
    kinds = {name.startswith("adapter_") for name in new if WEIGHTS.fullmatch(name)}
    for old in folder.iterdir():
        same = WEIGHTS.fullmatch(old.name) and old.name.startswith("adapter_") in kinds
        if same and old.name not in new:
            old.unlink()


def wait_for_others():
    """Waits for the other processes of a run."""
    if is_distributed():
        torch.distributed.barrier()


# Reading.


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """Lists the checkpoints in an output folder, whole or not, the newest first."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    found = [f for f in output_dir.iterdir() if NAME.fullmatch(f.name) and f.is_dir()]
    return sorted(found, key=lambda f: -int(NAME.fullmatch(f.name)[1]))


def newest_whole(output_dir: str | Path) -> Path | None:
    """Finds the newest checkpoint from which a run can go on; names those that are not whole."""
    for folder in checkpoint_folders(output_dir):
        try:
            check_whole(folder)
            return folder
        except ValueError as error:
            logger.warning("left out a checkpoint that is not whole: %s", error)
    return None


def choose_checkpoint(output_dir: str, resume: str | bool) -> Path:
    """Chooses the checkpoint to go on from: the one named, or the newest whole one of the folder.

    Raises ValueError for one that is not whole and where there is none, FileNotFoundError for a
    folder that is not there.
    """
    put_back_replaced(output_dir)
    if resume is True:
        newest = newest_whole(output_dir)
        if newest is None:
            raise ValueError(f"expected a whole checkpoint in {output_dir}, found none")
        return newest

    folder = Path(resume)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected a checkpoint folder, got {str(resume)!r}: no such folder"
        )
    try:
        check_whole(folder)
    except ValueError as error:
        other = newest_whole(folder.parent)
        hint = "" if other is None else f"; {other} is whole"
        raise ValueError(f"{error}{hint}") from error
    return folder


def check_whole(folder: Path):
    """Refuses a checkpoint that lacks a part, or has one that cannot be read; names the file."""
    state = read_state(folder)
    for name in ("global_step", "epoch"):
        if not isinstance(state.get(name), (int, float)):
            raise ValueError(f"expected a number {name} in {folder / STATE}, got {state.get(name)}")

    random_states = sorted(folder.glob("rng_state*.pth"))  # one of each process
    if not random_states:
        raise ValueError(f"expected rng_state.pth in {folder}, found none")
    if (folder / SHARDED_WEIGHTS).is_dir():
        _check_shards(folder / SHARDED_WEIGHTS, len(random_states))
        _check_shards(folder / SHARDED_OPTIMIZER, len(random_states))
    else:
        _check_weights(folder)
        _check_archive(folder / "optimizer.pt")

    _check_archive(folder / "scheduler.pt")
    for file in [*random_states, *folder.glob("scaler.pt")]:
        _check_archive(file)


def read_state(folder: Path) -> dict:
    """Reads the trainer's state in a checkpoint."""
    file = folder / STATE
    if not file.is_file():
        raise ValueError(f"expected {STATE} in {folder}, found none")
    try:
        state = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {file}, got: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"expected an object in {file}, got {type(state).__name__}")
    return state


def _check_weights(folder: Path):
    """Refuses weights that are not there, or shorter than their header says."""
    files = [f for f in folder.iterdir() if WEIGHTS.fullmatch(f.name)]
    if not files:
        raise ValueError(f"expected weights in {folder}, found none")
    for file in files:
        if file.suffix == ".json":
            _check_index(file)
            continue
        try:
            with safe_open(file, "pt"):  # compares the header with the file's length
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"expected whole weights in {file}, got: {error}") from error


def _check_index(file: Path):
    """Refuses an index that cannot be read, or names a file that is not there."""
    try:
        names = set(json.loads(file.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"expected an index of weights in {file}, got: {error}") from error
    for name in sorted(names):
        if not (file.parent / name).is_file():
            raise ValueError(f"expected {name}, which {file} names, found none")


def _check_archive(file: Path):
    """Reads what torch has saved, which is a ZIP file with check sums."""
    if not file.is_file():
        raise ValueError(f"expected {file}, found none; trainer.save_only_model saves none")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"expected a whole {file}, got: {error}") from error
    if damaged is not None:
        raise ValueError(f"expected a whole {file}, got damage in {damaged}")


def _check_shards(folder: Path, processes: int):
    """Refuses a sharded part that lacks a process's file."""
    if not folder.is_dir():
        raise ValueError(f"expected {folder}, found none; trainer.save_only_model saves none")
    for file in (folder / ".metadata", *folder.glob("*.distcp")):
        if not file.is_file() or not file.stat().st_size:
            raise ValueError(f"expected a whole {file}, found none or nothing in it")
    for rank in range(processes):
        if not any(folder.glob(f"__{rank}_*.distcp")):
            raise ValueError(f"expected the shard __{rank}_0.distcp in {folder}, found none")


def has_final(output_dir: str | Path, checkpoint: Path) -> bool:
    """Tells whether the output folder holds whole weights that were saved after a checkpoint."""
    output_dir = Path(output_dir)
    try:
        _check_weights(output_dir)
    except (ValueError, OSError):
        return False
    files = [f for f in output_dir.iterdir() if WEIGHTS.fullmatch(f.name)]
    saved = (checkpoint / STATE).stat().st_mtime_ns
    return all(file.stat().st_mtime_ns >= saved for file in files)
