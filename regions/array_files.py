"""Reads NumPy's .npy and .npz files: masks, boxes or a polygon, with scores and labels."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .arrays import regions_of_array
from .files import MAX_ARRAY_BYTES, ImageSource, check_file
from .region_source import Maker, Source

MAX_ARRAYS = 100  # in one file
WHAT = ("masks", "boxes")  # what an .npz calls its regions
BESIDE = ("scores", "labels")  # and what it may say about each


class ArrayFile(Source):
    """The regions of one image; the file goes with the image that it is named like.

    An .npz has one array, or one called `masks` or `boxes`, and perhaps `scores` and `labels`.
    Pickled objects are never loaded.
    """

    def __init__(self, path: Path, only: bool, threshold: float = 0.5):
        check_file(path, MAX_ARRAY_BYTES, "an array")
        self.path = path
        self.only = only
        self.threshold = threshold

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterator[Maker]:
        if not (self.only or source.stem == self.path.stem):
            return
        arrays = _read(self.path)
        found = regions_of_array(
            arrays["regions"],
            size,
            threshold=self.threshold,
            scores=arrays.get("scores"),
            labels=arrays.get("labels"),
            name=self.path.name,
        )
        for region in found:
            yield region.origin, lambda region=region: [region]


def _read(path: Path) -> dict[str, np.ndarray]:
    """Reads the array of a file under `regions`, and what an .npz says beside it."""
    with _reading(path):
        if path.suffix.lower() == ".npy":
            return {"regions": np.load(path, mmap_mode="r", allow_pickle=False)}

        # An archive says how large it is before anything of it is unpacked.
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            count = len(archive.infolist())
        if unpacked > MAX_ARRAY_BYTES or count > MAX_ARRAYS:
            raise ValueError(f"{count} arrays of {unpacked:,} bytes")

        # The array of regions is the one with a known name, or the only one.
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name not in BESIDE]
            name = next((name for name in WHAT if name in names), names[0] if names else None)
            if name is None or (name not in WHAT and len(names) > 1):
                raise ValueError(f"arrays {', '.join(arrays.files)[:200]}, none called masks")
            beside = {key: arrays[key] for key in BESIDE if key in arrays.files}
            return {"regions": arrays[name], **beside}


@contextmanager
def _reading(path: Path):
    """Says what is wrong with a damaged file, which makes NumPy raise in many ways."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"expected an array, or an .npz of one called masks, in {path} (no pickled objects),"
            f" got: {type(error).__name__}: {error}"
        ) from error
