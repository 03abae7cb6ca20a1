"""Finds the images that a command line names."""

import glob
from collections.abc import Sequence
from pathlib import Path

from ...image_loading import is_url
from ...regions.files import IMAGE_SUFFIXES, ImageSource


def find_images(arguments: Sequence[str], recursive: bool = False) -> list[ImageSource]:
    """Finds the images of files, folders, patterns and URLs, each once, in order.

    Raises FileNotFoundError for an argument that names nothing.
    """
    found: dict[str, ImageSource] = {}
    for argument in arguments:
        for image in _expand(argument, recursive):
            found.setdefault(image.path, image)
    return list(found.values())


def _expand(argument: str, recursive: bool) -> list[ImageSource]:
    path = Path(argument)
    if is_url(argument) or path.is_file():
        return [ImageSource(argument, named=True)]
    if path.is_dir():
        files = path.rglob("*") if recursive else path.iterdir()
        origin = "folder"
    else:
        files = map(Path, glob.glob(argument, recursive=True))
        origin = "pattern" if glob.has_magic(argument) else "file or folder"
    images = sorted(f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not images:
        what = "expected images in the" if origin == "folder" else "expected images for the"
        raise FileNotFoundError(f"{what} {origin} {argument!r}, found none")
    return [ImageSource(str(f), named=False) for f in images]
