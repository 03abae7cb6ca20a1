"""Weight files of a checkpoint, read tensor by tensor, and what can be wrong with them."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from ..configuration_perceptiondlm import PerceptionDLMConfig
from ..image_loading import path_inside


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; `exit_code` is the command's."""

    exit_code = 1


class UnrecognisedSource(ConversionError):
    """Not a checkpoint of a known layout, or not there at all."""

    exit_code = 3


class MissingSource(UnrecognisedSource, FileNotFoundError):
    """A path at which nothing is."""


class MissingFile(ConversionError, FileNotFoundError):
    """A shard that the index names, or another needed file, is not there."""

    exit_code = 4


class DamagedFile(ConversionError):
    """A truncated or unreadable file."""

    exit_code = 5


class UnknownTensor(ConversionError):
    """A tensor that no rule, or no part of the model, has a place for."""

    exit_code = 6


class MissingTensor(ConversionError):
    """A rule without a tensor, or a part of the model without one."""

    exit_code = 7


class WrongShape(ConversionError):
    """A tensor of another shape than the config says."""

    exit_code = 8


# Places


def local_path(source: str | Path) -> Path | None:
    """The folder or file that a source names, or None for a Hub id, which is not looked up.

    Raises MissingSource where nothing is there and it cannot be, or was hardly meant as, a Hub id:
    for all but "owner/name", and for that too if a folder "owner" is there.
    """
    path, text = Path(source), str(source)
    if text and path.exists():
        return path
    is_id = text.count("/") == 1 and "\\" not in text and not text.startswith((".", "/", "~"))
    if isinstance(source, Path) or not is_id or path.parent.exists():
        raise MissingSource(
            f"expected a folder or the id of a Hub repository (owner/name), got {text!r}: no such"
            " file or folder"
        )
    return None


def expect_checkpoint(source: str | Path, subfolder: str | None = None, **place):
    """Refuses what is no checkpoint of this package's layout, before anything else is loaded.

    Args:
        source: a folder or a Hub id.
        subfolder: of it.
        place: `revision` and `token`, of a Hub repository.

    Raises FileNotFoundError for a path that is not there or has no config, ValueError for a
    checkpoint of another kind, OSError where the Hub has, or gives, none.
    """
    place |= {"subfolder": subfolder or ""}
    path = local_path(source)
    where = source if path is None else path / place["subfolder"]
    if path is not None and not where.is_dir():
        raise MissingSource(f"expected a checkpoint's folder, got {where}, which is none")
    # A cached adapter is known without a network; one on the Hub once its config was looked for.
    if cached_file(source, ADAPTER_FILE, local_files_only=True, **NO_ERRORS, **place):
        raise adapter_error(where)
    settings, _ = PreTrainedConfig.get_config_dict(source, **place)
    if cached_file(source, ADAPTER_FILE, **NO_ERRORS, **place):
        raise adapter_error(where)

    if not settings:
        raise MissingFile(f"expected a checkpoint with a config.json in {where}, got none")
    if settings.get("model_type") != PerceptionDLMConfig.model_type:
        raise UnrecognisedSource(
            f"expected a checkpoint with model_type {PerceptionDLMConfig.model_type!r} in {where},"
            f" got {settings.get('model_type')!r}: convert other layouts with convert_checkpoint.py"
        )


def adapter_error(place: str | Path) -> ConversionError:
    """What to do with an adapter where a whole checkpoint is needed."""
    return UnrecognisedSource(
        f"expected a whole checkpoint, got the adapter in {place}: merge it into its model with"
        f" convert_checkpoint.py --source {place} --base MODEL --output FOLDER"
    )


ADAPTER_FILE = "adapter_config.json"
NO_ERRORS = {  # of `cached_file`: None for whatever cannot be had
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


# Files


FETCHED = ["*.json", "*.jinja", "*.safetensors", "*.bin"]


def fetch(source: str | Path, patterns: Sequence[str] = FETCHED) -> Path:
    """A local path as it is, or the snapshot of a Hub id."""
    path = local_path(source)
    if path is not None:
        return path
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UnrecognisedSource(
            f"expected a folder or the id of a Hub repository, got {str(source)!r}: {error}"
        ) from error


class Settings(dict):
    """A JSON object of a checkpoint; asking for a key that is not there says so."""

    def __missing__(self, key):
        raise ConversionError(f"expected a config with {key!r}, got only {', '.join(self)}")


def read_json(path: Path) -> Settings:
    """A JSON object; MissingFile or DamagedFile says why there is none."""
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
        """Shape of a tensor; MissingTensor if there is none of that name."""
        if name not in self.shapes:
            raise MissingTensor(f"expected a tensor {name!r} in {self.place}, got none")
        return self.shapes[name]

    def load(self, name: str) -> torch.Tensor:
        """The tensor itself."""
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
    """A safetensors or torch file, memory-mapped."""
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
    """The path of a file that an index names, which may be no other than a file of its folder.

    Raises DamagedFile for a name that leads elsewhere; a link in the folder is the owner's own.
    """
    try:
        return path_inside(folder, name, links=True)
    except ValueError as error:
        raise DamagedFile(f"expected only files of {folder} in its index, got {name!r}") from error


WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in WEIGHT_FILES)


def weight_files(folder: Path) -> list[Path]:
    """Paths of the weights of a folder, shards in the order of their names."""
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
