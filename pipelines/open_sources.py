"""Recognizes what the places that a user names are: folders, patterns, files, URLs."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from ..common.json_text import parse_json
from . import places
from .dataset_sources import (
    CocoAnnotations,
    ImageFolder,
    PanopticAnnotations,
    Sa1bFolder,
    Source,
    is_image,
)
from .stream_sources import JsonLines, ParquetFiles, SavedDataset, WebDataset

ROWS = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".parquet": ParquetFiles,
    ".tar": WebDataset,
    ".tgz": WebDataset,
}


def open_source(
    place: str,
    *,
    masks: Sequence[str] = (),
    image_root: str | None = None,
    recursive: bool = False,
) -> Source:
    """Recognizes a source by its files' names.

    Args:
        place: a folder, a pattern, a file or a URL of one.
        masks: region masks of a folder's images, as for `perceptiondlm caption`; the folder of a
            panoptic file's PNGs.
        image_root: the folder that images' paths start from, for files that name images.
        recursive: look into subfolders, too.

    Raises FileNotFoundError where nothing is there, ValueError for no known kind, for files of
    several kinds, and for options that the kind has no use for.
    """
    place = places.absolute(place)
    image_root = None if image_root is None else places.absolute(image_root)
    if places.exists(f"{place}/state.json") and places.exists(f"{place}/dataset_info.json"):
        _refuse(masks=masks)
        return SavedDataset(place, [], place, image_root)
    if place.endswith(".json") and places.exists(place):
        return _annotations(place, masks, image_root)

    files = places.find_files(place, recursive)
    kind = _kind_of(place, files)
    root = place if places.is_folder(place) else _folder_of(place)
    if kind in ("images", "SA-1B"):
        _refuse(image_root=image_root)
        if kind == "images":
            return ImageFolder(place, [file for file in files if is_image(file)], root, masks)
        _refuse(masks=masks)
        return Sa1bFolder(place, files, root)
    _refuse(masks=masks)
    own = [file for file in files if _suffix(file) in ROWS]
    return ROWS[kind](place, own, root, image_root)


def _suffix(file: str) -> str:
    name = file.removesuffix(".gz") if file.endswith(".tar.gz") else file
    return PurePosixPath(name).suffix.lower()


def _kind_of(place: str, files: Sequence[str]) -> str:
    """Returns "images", "SA-1B" or a suffix of `ROWS`."""
    # How many files of each kind there are.
    found = Counter(_suffix(file) for file in files if _suffix(file) in ROWS)
    images = [file for file in files if is_image(file)]
    stems = {PurePosixPath(file).stem for file in images}
    notes = [file for file in files if _suffix(file) == ".json"]
    pairs = [f for f in notes if PurePosixPath(f).name.startswith("sa_")]
    if images or pairs:
        kind = "SA-1B" if pairs else "images"
        found[kind] = len(images) or len(pairs)
    if not found:
        raise FileNotFoundError(
            f"expected images, JSON lines, Parquet, tars, SA-1B or a COCO file at {place},"
            " found none"
        )

    # They have to be of one kind; images of SA-1B all have their JSON.
    lonely = stems - {PurePosixPath(file).stem for file in pairs}
    if len({ROWS.get(name, name) for name in found}) > 1 or (pairs and lonely):
        got = " and ".join(sorted(found)) if len(found) > 1 else f"{min(lonely)} without JSON"
        raise ValueError(
            f"expected one kind of source at {place}, got {got}: name files by a pattern"
        )
    return next(iter(found))


def _annotations(place: str, masks: Sequence[str], image_root: str | None) -> Source:
    content = parse_json(places.read_place(place), place)
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise ValueError(f"expected COCO's images and annotations in {place}, got others")
    if not isinstance(content["images"], list) or not isinstance(content["annotations"], list):
        raise ValueError(f"expected lists of images and annotations in {place}, got others")

    # COCO's own form.
    root = image_root or _folder_of(place)
    first = next(iter(content["annotations"]), None)
    if not (isinstance(first, dict) and "segments_info" in first):
        _refuse(masks=masks)
        return CocoAnnotations(place, content, root)

    # The panoptic form, whose segments are in PNGs.
    if len(masks) > 1:
        raise ValueError(f"expected one folder of PNGs as --masks, got {json.dumps(masks)}")
    folder = masks[0] if masks else place.removesuffix(".json")
    if not places.is_folder(folder):
        raise FileNotFoundError(f"expected the PNGs of {place} in {folder}, or --masks FOLDER")
    return PanopticAnnotations(place, content, root, places.absolute(folder))


def _folder_of(place: str) -> str:
    """Returns the folder of a file, or the part of a pattern before its first sign."""
    parts = place.split("/")
    signs = [i for i, part in enumerate(parts) if any(sign in part for sign in "*?[")]
    return "/".join(parts[: signs[0] if signs else -1])


def _refuse(**options):
    for name, value in options.items():
        if value:
            flag = name.replace("_", "-")
            raise ValueError(f"expected no --{flag} for this kind of source, got {value}")
