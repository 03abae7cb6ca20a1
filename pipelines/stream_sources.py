"""Reads rows from files that hold many: JSON lines, Parquet, WebDataset's tars, `datasets` on disk.

A row's id is the file and the row's number in it, or the tar's own key: nothing has to be unique
but where it stands.
"""

import base64
import json
import re
import tarfile
from collections.abc import Iterator

from ..common.extras import extra
from ..common.json_text import parse_json
from ..image_loading import decode_data_url, is_data_url, is_url
from . import places
from .dataset_sources import Opened, Source, add_masks, relative

MASK_FIELDS = ("mask_rles", "masks")
LABEL_FIELDS = ("labels", "categories")
TEXT_FIELDS = ("captions", "scores")  # which the data engine reads
TEXT_MEMBER = ("json",)
IMAGE_MEMBERS = frozenset("jpg jpeg png webp bmp tif tiff gif avif".split())


class FileRows(Source):
    """A source of files with many rows, each of them a part.

    Args:
        place: what the user named.
        files: its files.
        root: the folder that ids begin at.
        image_root: the folder that images' paths start from; None: that of the file.
    """

    def __init__(self, place: str, files: list[str], root: str, image_root: str | None = None):
        self.place, self.files, self.root, self.image_root = place, files, root, image_root

    def parts(self, size: int) -> list:
        return self.files

    def open(self, entry: dict, data: bytes | None) -> Opened:
        if "problem" in entry:
            raise ValueError(entry["problem"])
        opened = self._open_image(entry, data)
        name = next((name for name in MASK_FIELDS if entry.get(name) is not None), None)
        if name is not None:
            add_masks(opened, entry[name], entry["file"], labels_of(entry, len(entry[name])))
        return opened

    def _open_image(self, entry: dict, data: bytes | None) -> Opened:
        image = entry.get("image")
        if isinstance(image, dict):  # as `datasets` writes them
            data = data or _decoded(image.get("bytes"))
            image = image.get("path")
        if data is not None:
            return Opened(image if isinstance(image, str) else entry["id"], data=data)
        if not isinstance(image, str):
            raise ValueError(f"expected an image's path or bytes in image, got {image!r:.80}")
        if is_data_url(image):
            return Opened(entry["id"], data=decode_data_url(image))
        if is_url(image):
            return Opened(image, location=image)
        folder = self.image_root or entry["file"].rsplit("/", 1)[0]
        return Opened(image, location=places.inside(folder, image))

    def identity(self) -> dict:
        return {**super().identity(), "images": self.image_root}


def labels_of(entry: dict, count: int) -> list | None:
    """Returns what a row calls its regions, where it has a text for each."""
    labels = next((entry[name] for name in LABEL_FIELDS if entry.get(name) is not None), None)
    is_whole = isinstance(labels, list) and len(labels) == count
    return [x if isinstance(x, str) else None for x in labels] if is_whole else None


def _decoded(data) -> bytes | None:
    return base64.b64decode(data, validate=True) if isinstance(data, str) else data


class JsonLines(FileRows):
    """Lines of JSON with `image` and `mask_rles` (or `masks`), as ParaCaption's."""

    kind = "JSON lines"

    def rows(self, part: str) -> Iterator[dict]:
        with places.open_place(part) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                key = f"{relative(part, self.root)}:{number}"
                try:
                    values = parse_json(line, f"line {number} of {part}")
                    if not isinstance(values, dict):
                        raise ValueError(f"expected a JSON object in line {number} of {part}")
                except ValueError as error:
                    values = {"problem": str(error)}
                yield {"id": key, "entry": {**values, "id": key, "file": part}, "data": None}


class ParquetFiles(FileRows):
    """Tables with columns `image` (path, bytes, or a struct of them) and `mask_rles`."""

    kind = "Parquet"

    def rows(self, part: str) -> Iterator[dict]:
        with extra("scale"):
            import pyarrow.parquet as parquet

        with places.open_place(part) as file:
            number = 0
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=64):
                for values in batch.to_pylist():
                    number += 1
                    key = f"{relative(part, self.root)}:{number}"
                    yield {"id": key, **table_entry(values, key, part)}

    @property
    def has_bytes(self) -> bool:
        """Tells by the first file's columns."""
        with extra("scale"):
            import pyarrow
            import pyarrow.parquet as parquet

        with places.open_place(self.files[0]) as file:
            schema = parquet.ParquetFile(file).schema_arrow
        kind = schema.field("image").type if "image" in schema.names else None
        return kind is not None and not pyarrow.types.is_string(kind)


def table_entry(values: dict, key: str, file: str) -> dict:
    """Returns entry and data of a row of a table."""
    image, data = values.get("image"), None
    if isinstance(image, dict):
        data, image = image.get("bytes"), image.get("path")
    elif isinstance(image, bytes):
        data, image = image, None
    names = (*MASK_FIELDS, *LABEL_FIELDS, *TEXT_FIELDS)
    kept = {name: values[name] for name in names if values.get(name) is not None}
    for name in MASK_FIELDS:
        if isinstance(kept.get(name), str):  # tables of other makers have them as JSON
            kept[name] = parse_json(kept[name], f"{name} of {key}")
    entry = {"image": image, "id": key, "file": file, **json.loads(json.dumps(kept, default=_text))}
    return {"entry": entry, "data": data}


def _text(value) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)


class SavedDataset(FileRows):
    """A data set that `datasets` saved with `save_to_disk`."""

    kind = "datasets"
    has_bytes = True
    rows_at_once = 1000

    def _load(self):
        with extra("scale"):
            import datasets

        found = datasets.load_from_disk(self.place)
        if not isinstance(found, datasets.Dataset):
            raise ValueError(f"expected one split in {self.place}, got {', '.join(found)}: name it")
        if isinstance(found.features.get("image"), datasets.Image):
            found = found.cast_column("image", datasets.Image(decode=False))
        return found

    def __len__(self) -> int:
        return len(self._load())

    def parts(self, size: int) -> list:
        return list(range(0, len(self), self.rows_at_once))

    def rows(self, part: int) -> Iterator[dict]:
        found = self._load()
        for number in range(part, min(part + self.rows_at_once, len(found))):
            key = str(number)
            entry = table_entry(found[number], key, f"{self.place}/data.arrow")
            yield {"id": key, **entry}


class WebDataset(FileRows):
    """Tars in which `a.jpg` and `a.json` are one sample, whose JSON has `mask_rles`."""

    kind = "WebDataset"
    has_bytes = True

    def rows(self, part: str) -> Iterator[dict]:
        seen: dict[str, int] = {}
        for key, members in _samples(part):
            seen[key] = seen.get(key, 0) + 1
            again = f"#{seen[key]}" if seen[key] > 1 else ""
            own = f"{relative(part, self.root)}/{key}{again}"
            yield {"id": own, **self._row(own, members, part)}

    def _row(self, key: str, members: dict[str, bytes], part: str) -> dict:
        images = [name for name in members if name.lower() in IMAGE_MEMBERS]
        entry = {"id": key, "file": part}
        try:
            if len(images) != 1:
                got = ", ".join(members) or "none"
                raise ValueError(f"expected one image for {key} in {part}, got {got}")
            if "json" in members:
                values = parse_json(members["json"], f"{key}.json of {part}")
                if not isinstance(values, dict):
                    raise ValueError(f"expected a JSON object in {key}.json of {part}")
                entry = {**values, **entry}
            entry["image"] = f"{key}.{images[0]}"
        except ValueError as error:
            entry = {"id": key, "file": part, "problem": str(error)}
        return {"entry": entry, "data": members[images[0]] if images else None}


def _samples(part: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields the samples of a tar: neighbors of one name up to the first dot."""
    key, members = None, {}
    with places.open_place(part) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            found = re.match(r"((?:.*/)?[^./][^./]*)\.([^/]+)$", member.name)
            if not member.isfile() or found is None:
                continue
            if found[1] != key and members:
                yield key, members
                members = {}
            key = found[1]
            members[found[2]] = tar.extractfile(member).read()
    if members:
        yield key, members
