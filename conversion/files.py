"""Reads the weight files of a checkpoint tensor by tensor, and says what is wrong with them."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..common.loading import CheckpointError, UnrecognizedCheckpoint, local_path
from ..configuration_perceptiondlm import path_inside


class MissingFile(CheckpointError, FileNotFoundError):
    """A shard that the index names, or another needed file, is not there."""


class DamagedFile(CheckpointError):
    """A truncated or unreadable file."""


class UnknownTensor(CheckpointError):
    """A tensor that no rule, or no part of the model, has a place for."""


class MissingTensor(CheckpointError):
    """A rule without a tensor, or a part of the model without one."""


class WrongShape(CheckpointError):
    """A tensor of another shape than the config says."""


FETCHED = ["*.json", "*.jinja", "*.safetensors", "*.bin"]


def fetch(source: str | Path, patterns: Sequence[str] = FETCHED) -> Path:
    """Returns a local path as it is, or the snapshot of a Hub id."""
    path = local_path(source)
    if path is not None:
        return path
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UnrecognizedCheckpoint(
            f"expected a folder or the id of a Hub repository, got {str(source)!r}: {error}"
        ) from error


class Settings(dict):
    """A JSON object of a checkpoint; asking for a key that is not there says so."""

    def __missing__(self, key):
        raise CheckpointError(f"expected a config with {key!r}, got only {', '.join(self)}")


def read_json(path: Path) -> Settings:
    """Reads a JSON object; MissingFile or DamagedFile says why there is none."""
    try:
        content = json.loads(path.read_bytes(), object_hook=Settings)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFile(f"expected {path.name} in {path.parent}, got no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFile(f"expected JSON in {path}, got: {error}") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"expected a JSON object in {path}, got a {type(content).__name__}")
    return content


class Tensors:
    """Named tensors of a checkpoint, loaded one at a time; each kind of file is a subclass.

    Attributes:
        place: the file or folder, for messages.
        shapes: by name, in the order in which they are best read.
    """

    def __init__(self, place: Path, shapes: dict[str, tuple[int, ...]]):
        self.place = place
        self.shapes = shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor; MissingTensor if there is none of that name."""
        if name not in self.shapes:
            raise MissingTensor(f"expected a tensor {name!r} in {self.place}, got none")
        return self.shapes[name]

    def load(self, name: str) -> torch.Tensor:
        """Loads one tensor."""
        raise NotImplementedError


class StateDict(Tensors):
    """Tensors that are in memory already, or mapped from a torch file."""

    def __init__(self, place: Path, tensors: dict[str, torch.Tensor]):
        super().__init__(place, {name: tuple(t.shape) for name, t in tensors.items()})
        self.tensors = tensors

    def load(self, name: str) -> torch.Tensor:
        return self.tensors[name]


class SafetensorsFile(Tensors):
    """One safetensors file, mapped for each tensor anew: what was read does not stay mapped."""

    def __init__(self, path: Path):
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except SafetensorError as error:
            raise DamagedFile(f"expected a whole safetensors file, got {path}: {error}") from error
        super().__init__(path, shapes)

    def load(self, name: str) -> torch.Tensor:
        with safe_open(self.place, framework="pt") as file:
            return file.get_tensor(name)


def open_weight_file(path: Path) -> Tensors:
    """Opens a safetensors or torch file, memory-mapped."""
    if not path.exists():
        raise MissingFile(f"expected the shard {path.name} in {path.parent}, got no such file")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    try:
        return StateDict(path, torch.load(path, "cpu", mmap=True, weights_only=True))
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise DamagedFile(f"expected a whole torch file, got {path}: {error}") from error


class WeightFiles(Tensors):
    """The weights of a folder as transformers saves them: one file, or shards and an index."""

    def __init__(self, folder: Path):
        files = [open_weight_file(path) for path in weight_files(folder)]
        self.files = {name: file for file in files for name in file.shapes}
        super().__init__(folder, {name: file.shapes[name] for name, file in self.files.items()})

    def load(self, name: str) -> torch.Tensor:
        return self.files[name].load(name)


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file that an index names, which may be none outside its folder.

    Raises DamagedFile for a name that leads elsewhere; a link in the folder is the owner's own.
    """
    try:
        return path_inside(folder, name, links=True)
    except ValueError as error:
        raise DamagedFile(f"expected only files of {folder} in its index, got {name!r}") from error


WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in WEIGHT_FILES)


def weight_files(folder: Path) -> list[Path]:
    """Lists the weight files of a folder, shards in the order of their names."""
    for single, index in zip(WEIGHT_FILES, INDEX_FILES, strict=True):
        if (folder / single).exists():
            return [folder / single]
        if (folder / index).exists():
            shards = read_json(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise DamagedFile(f"expected a weight_map in {folder / index}, got {shards!r}")
            return [inside(folder, name) for name in sorted(set(map(str, shards.values())))]
    wanted = ", ".join(WEIGHT_FILES + INDEX_FILES)
    raise MissingFile(f"expected one of {wanted} in {folder}, got none of them")
