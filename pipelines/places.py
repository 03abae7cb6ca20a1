"""Lists, reads and writes files by local paths and by fsspec's URLs: s3://, gs://, file://, ..."""

import os
import re
from pathlib import Path, PurePosixPath

from ..common.files import write_bytes
from ..configuration_perceptiondlm import path_inside
from ..image_loading import fetch_image, is_url

MAX_IMAGE_BYTES = 256 << 20
DOWNLOAD_SECONDS = 30


def local_of(place: str) -> Path | None:
    """Returns the local path that a place names; None for one that is elsewhere."""
    if place.startswith(("file://", "local://")):
        return Path(place.split("://", 1)[1])
    return None if re.match(r"[a-z][a-z0-9+.-]*://", place) else Path(place)


def absolute(place: str) -> str:
    """Returns a place as it can be found from anywhere: a local path from the root."""
    local = local_of(place)
    return place.rstrip("/") if local is None else os.path.abspath(local)


def _file_system(place: str):
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(place)
    except (ImportError, ValueError) as error:  # a protocol's own package is not there, or unknown
        raise ValueError(f"expected a place that fsspec opens, got {place}: {error}") from error


def find_files(place: str, recursive: bool = False) -> list[str]:
    """Lists the files of a folder or a pattern, sorted; hidden ones are left out."""
    system, path = _file_system(place)
    if any(sign in path for sign in "*?[") and not system.exists(path):
        found = [name for name in system.glob(path) if system.isfile(name)]
    elif system.isfile(path):
        found = [path]
    else:
        found = system.find(path, maxdepth=None if recursive else 1)

    def shown(name: str) -> bool:
        return not any(part.startswith(".") for part in _below(path, name).split("/"))

    is_local = local_of(place) is not None
    return [
        name if is_local else system.unstrip_protocol(name) for name in sorted(filter(shown, found))
    ]


def _below(folder: str, name: str) -> str:
    return name[len(folder) :].strip("/") if name.startswith(folder) else PurePosixPath(name).name


def is_folder(place: str) -> bool:
    """Tells whether a place is a folder."""
    system, path = _file_system(place)
    return system.isdir(path)


def exists(place: str) -> bool:
    """Tells whether a file or folder is there."""
    system, path = _file_system(place)
    return system.exists(path)


def inside(folder: str, name) -> str:
    """Returns the place of a file that another file names, which has to lie inside a folder.

    Raises ValueError for a name that leads out of it.
    """
    local = local_of(folder)
    if local is not None:
        return str(path_inside(local, name, links=True))
    if not isinstance(name, str) or not name or name.startswith("/") or "\\" in name:
        raise ValueError(f"expected the name of a file in {folder}, got {name!r:.120}")
    if ".." in name.split("/") or "://" in name:
        raise ValueError(f"expected the name of a file inside {folder}, got {name!r:.120}")
    return f"{folder.rstrip('/')}/{name}"


def read_place(place: str) -> bytes:
    """Reads a file, or what is behind an http(s) URL."""
    if is_url(place):
        return fetch_image(place, MAX_IMAGE_BYTES, DOWNLOAD_SECONDS)
    local = local_of(place)
    if local is not None:
        return local.read_bytes()
    system, path = _file_system(place)
    return system.cat_file(path)


def open_place(place: str):
    """Opens a file for reading bytes, wherever it is."""
    system, path = _file_system(place)
    return system.open(path, "rb")


def write_place(place: str, data: bytes):
    """Writes a whole file or nothing, as object stores do of themselves."""
    local = local_of(place)
    if local is not None:
        return write_bytes(local, data)
    system, path = _file_system(place)
    system.pipe_file(path, data)


def remove_place(place: str):
    """Removes a file, if it is there."""
    system, path = _file_system(place)
    if system.exists(path):
        system.rm_file(path)


def make_folder(place: str):
    """Makes a folder, where the file system has such a thing."""
    system, path = _file_system(place)
    system.makedirs(path, exist_ok=True)
