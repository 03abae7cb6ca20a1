"""Paths that files name: an index its shards, a data file its images."""

import json
import os
import re
from pathlib import Path


def path_inside(folder: str | Path, name: object, links: bool = False) -> Path:
    """Returns the path of a file that another file names, which has to lie inside a folder.

    Raises ValueError for a name that leads out of it: absolute, by `..`, or, unless `links` are
    taken for the owner's own, by a symbolic link; those of a Hub cache always lead to the files of
    the same repository.
    """
    folder = Path(folder)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"expected the name of a file in {folder}, got {name!r:.120}")
    path = folder / name
    is_elsewhere = bool(re.match(r"[A-Za-z]:[\\/]", name)) or not _is_below(
        os.path.normpath(path), os.path.normpath(folder)
    )
    roots = [folder.resolve(), *_blobs(folder)]
    is_linked = not any(_is_below(path.resolve(), root) for root in roots)
    if is_elsewhere or (is_linked and not links):
        raise ValueError(f"expected the name of a file inside {folder}, got {name!r:.120}")
    return path


def expect_shards_inside(folder: str | Path):
    """Refuses a folder of weights whose index names files elsewhere, which would be read."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = Path(folder) / name
        if index.is_file():
            shards = json.loads(index.read_bytes()).get("weight_map", {})
            for shard in set(shards.values()):
                path_inside(folder, shard, links=True)


def _is_below(path: str | Path, folder: str | Path) -> bool:
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return path != folder and path.is_relative_to(folder)


def _blobs(folder: Path) -> list[Path]:
    """Where the files of a Hub cache's snapshot are kept; nothing for any other folder."""
    place = Path(os.path.abspath(folder))
    snapshots = [p for p in (place, *place.parents) if p.parent.name == "snapshots"]
    return [snapshot.parent.parent.resolve() / "blobs" for snapshot in snapshots]
