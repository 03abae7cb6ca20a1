"""Sets up what a user has: a Hub cache in place of a folder, and few packages."""

import hashlib
import importlib.machinery
import importlib.metadata
import os
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

REQUIRED = {
    "torch", "transformers", "safetensors", "huggingface-hub", "tokenizers", "pillow", "numpy",
}  # fmt: skip
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_hub_cache(source: Path, home: Path, repo_id: str) -> Path:
    """Lays a folder out as huggingface_hub's cache under HF_HOME; returns the snapshot.

    Every file is a link into `blobs/`, where it is named by a hash.
    """
    repository = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        content = file.read_bytes()
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def hide_other_packages(kept: set[str] = REQUIRED):
    """Hides all distributions but those `kept`, and what they depend on, from here on.

    For a fresh process, before anything else is imported.
    """
    known = _with_dependencies(kept)
    modules = importlib.metadata.packages_distributions()
    hidden = {name for name, owners in modules.items() if not known & set(map(_plain, owners))}

    class Finder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            is_hidden = name.partition(".")[0] in hidden - {"perceptiondlm"}
            return None if is_hidden else super().find_spec(name, path, target)

        @classmethod
        def find_distributions(cls, *args, **kwargs):
            found = importlib.metadata.MetadataPathFinder.find_distributions(*args, **kwargs)
            return (one for one in found if _plain(one.metadata["Name"]) in known)

    place = sys.meta_path.index(importlib.machinery.PathFinder)
    sys.meta_path[place] = Finder


def _with_dependencies(names: set[str]) -> set[str]:
    known, new = set(), set(names)
    while new:
        known |= new
        needed = [Requirement(r) for n in new for r in importlib.metadata.requires(n) or ()]
        needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
        new = {_plain(r.name) for r in needed} - known
    return known


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
