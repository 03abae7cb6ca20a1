"""Reads weights that FSDP saved sharded (torch.distributed.checkpoint), without trusting them.

Their `.metadata` is a pickle, which torch loads as it is, so that it could run any code. Here only
what such metadata consists of is let through.
"""

import pickle
from pathlib import Path

import torch

from .files import DamagedFile, MissingFile, Tensors, inside

# Modules and the names in them that a checkpoint's metadata is made of.
METADATA_NAMES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
}
UNREADABLE = (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError)


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles a checkpoint's metadata; any other class or function is refused."""

    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in METADATA_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"expected metadata of tensors, got {module}.{name}")


def read_metadata(folder: Path):
    """Reads a sharded checkpoint's `.metadata`; DamagedFile says what is wrong with it."""
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        with open(folder / ".metadata", "rb") as file:
            metadata = MetadataUnpickler(file).load()
    except UNREADABLE as error:
        raise DamagedFile(f"expected metadata in {folder}, got: {error}") from error
    if not isinstance(metadata, Metadata):
        raise DamagedFile(f"expected metadata in {folder}, got a {type(metadata).__name__}")
    return metadata


class DistributedFiles(Tensors):
    """The tensors of a folder that FSDP saved sharded."""

    def __init__(self, folder: Path):
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.metadata = read_metadata(folder)
        entries = self.metadata.state_dict_metadata.items()
        self.entries = {k: v for k, v in entries if isinstance(v, TensorStorageMetadata)}
        super().__init__(folder, {k: tuple(v.size) for k, v in self.entries.items()})
        for file in sorted({info.relative_path for info in self.metadata.storage_data.values()}):
            if not inside(folder, file).exists():
                raise MissingFile(f"expected the shard {file} in {folder}, got no such file")

    def load(self, name: str) -> torch.Tensor:
        from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load

        metadata = self.metadata

        class Reader(FileSystemReader):
            """Takes the metadata that was read already, not the pickle again."""

            def read_metadata(self, *args, **kwargs):
                return metadata

        entry = self.entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            load({name: tensor}, storage_reader=Reader(self.place), no_dist=True)
        except CheckpointException as error:
            raise DamagedFile(f"expected {name!r} whole in {self.place}, got: {error}") from error
        return tensor
