"""Writes captioned rows as shards, each whole or not there, and settles what is in a folder.

captions/part-NAME.parquet (or .tar)   rows that have captions
errors/part-NAME.parquet               what has none, and why, until the run ends
errors.parquet                         all of those, then

A shard is named after the ids in it, so a task that is run again writes the same files again. The
shards are the record of what is done: there is no other that could contradict them. Where a task
that was run again got other neighbors, an id stands in two shards; `settle` leaves one.
"""

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from ..common.extras import extra
from . import places
from .dataset_sources import MASK, NO_REGIONS

FORMATS = {"parquet": ".parquet", "webdataset": ".tar"}
INDEX = "__ids__"  # the first member of a tar; without a dot in its name it belongs to no sample
CAPTIONS, ERRORS = "captions", "errors"
PROVENANCE = ("model", "weights", "options", "version")


def _arrow():
    with extra("scale"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow


def caption_schema(with_bytes: bool):
    """Returns the columns of the Parquet shards."""
    pa = _arrow()
    rle = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
    return pa.schema(
        [
            ("id", pa.string()),
            ("image", pa.binary() if with_bytes else pa.string()),
            ("mask_rles", pa.list_(rle)),
            ("captions", pa.list_(pa.string())),
            ("scores", pa.list_(pa.float64())),
            ("labels", pa.list_(pa.string())),
            ("provenance", pa.struct([(name, pa.string()) for name in PROVENANCE])),
        ]
    )


def error_schema():
    """Returns the columns of the errors: `region` is none for what concerns the whole image."""
    pa = _arrow()
    return pa.schema(
        [
            ("id", pa.string()),
            ("image", pa.string()),
            ("region", pa.int32()),
            ("kind", pa.string()),
            ("reason", pa.string()),
        ]
    )


def _parquet(rows: Sequence[dict], schema) -> bytes:
    pa = _arrow()
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class ShardWriter:
    """Writes batches of captioned rows.

    Attributes:
        output: the folder.
        format: one of `FORMATS`.
        with_bytes: images themselves instead of their paths.
        provenance: of the rows; the weights' name comes from the rows themselves.
    """

    output: str
    format: str
    with_bytes: bool
    provenance: dict

    def __call__(self, rows: Sequence[dict]) -> dict:
        """Writes a shard; returns what is in it, and the seconds of each stage."""
        started = time.perf_counter()
        name = _name_of(row["id"] for row in rows)
        problems = [entry for row in rows for entry in problems_of(row)]
        captioned = [self._row(row) for row in rows if row["captions"]]
        if problems:
            place = f"{self.output}/{ERRORS}/part-{name}.parquet"
            places.write_place(place, _parquet(problems, error_schema()))
        if captioned:
            self._write(f"{self.output}/{CAPTIONS}/part-{name}{FORMATS[self.format]}", captioned)

        stages = ("read", "decode", "caption")
        seconds = {stage: sum(row[f"{stage}_seconds"] for row in rows) for stage in stages}
        failed = {row["id"] for row in problems if row["kind"] != NO_REGIONS}
        return {
            "rows": len(rows),
            "images": len(captioned),
            "regions": sum(len(row["captions"]) for row in captioned),
            "failed": len(failed),
            "seconds": {**seconds, "write": time.perf_counter() - started},
        }

    def _row(self, row: dict) -> dict:
        names = ("id", "mask_rles", "captions", "scores", "labels")
        kept = {name: row[name] for name in names}
        provenance = {**self.provenance, "weights": row["weights"]}
        image = row["data"] if self.with_bytes else row["image"]
        return {**kept, "image": image, "provenance": provenance}

    def _write(self, place: str, rows: Sequence[dict]):
        if self.format == "parquet":
            data = _parquet(rows, caption_schema(self.with_bytes))
        else:
            data = tar_of(rows)
        places.write_place(place, data)


def _name_of(ids: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()[:24]


def problems_of(row: dict) -> list[dict]:
    """Returns a row of the errors for each problem of a captioned row."""
    where = {"id": row["id"], "image": row["image"]}
    return [{**where, **problem} for problem in row["problems"]]


def tar_of(rows: Sequence[dict]) -> bytes:
    """Returns a WebDataset shard: an index of the ids, then an image and a JSON for each row."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        index = {"ids": [r["id"] for r in rows], "regions": [len(r["captions"]) for r in rows]}
        _add(tar, INDEX, json.dumps(index).encode())
        for row in rows:
            key = hashlib.sha256(row["id"].encode("utf-8", "surrogatepass")).hexdigest()[:20]
            values = {name: value for name, value in row.items() if name != "image"}
            if isinstance(row["image"], bytes):
                _add(tar, f"{key}.{_suffix(row['image'])}", row["image"])
            else:
                values["image"] = row["image"]
            _add(tar, f"{key}.json", json.dumps(values).encode())
    return buffer.getvalue()


def _suffix(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return {"JPEG": "jpg", "MPO": "jpg"}.get(image.format, image.format.lower())


def _add(tar: tarfile.TarFile, name: str, data: bytes):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


# What is in a folder.


@dataclass
class Contents:
    """Says what a folder holds.

    Attributes:
        done: ids that need not be captioned again.
        images, regions: that have captions.
        errors: of each kind.
    """

    done: set[str]
    images: int = 0
    regions: int = 0
    errors: dict[str, int] | None = None


def settle(output: str, retry_errors: bool = False) -> Contents:
    """Removes what stands twice, joins the errors in one file, and says what is there.

    Every file is whole before, after and in between. `retry_errors` forgets images without
    captions, so that they are tried again.
    """
    contents = Contents(done=set())
    for place in shards(output, CAPTIONS):
        index = read_index(place)
        kept = [i for i, key in enumerate(index["ids"]) if key not in contents.done]
        if len(kept) < len(index["ids"]):
            _rewrite(place, {index["ids"][i] for i in kept})
        contents.done.update(index["ids"])
        contents.images += len(kept)
        contents.regions += sum(index["regions"][i] for i in kept)
    _settle_errors(output, contents, retry_errors)
    return contents


def _settle_errors(output: str, contents: Contents, retry: bool):
    whole = f"{output}/errors.parquet"
    parts = shards(output, ERRORS)
    found: dict[tuple, dict] = {}
    for place in [whole, *parts] if places.exists(whole) else parts:
        for row in read_rows(place):
            of_image = row["kind"] != MASK
            # An image that was captioned after all, or is to be tried again.
            if of_image and (row["id"] in contents.done or (retry and row["kind"] != NO_REGIONS)):
                continue
            found.setdefault((row["id"], row["region"], row["kind"], row["reason"]), row)

    gone = {row["id"] for row in found.values() if row["kind"] != MASK}
    # Of an image that will be tried again, its regions are too.
    known = gone | contents.done
    rows = [row for row in found.values() if row["id"] in known]
    places.write_place(whole, _parquet(rows, error_schema()))
    for place in parts:
        places.remove_place(place)

    contents.done = known
    contents.errors = {}
    for row in rows:
        contents.errors[row["kind"]] = contents.errors.get(row["kind"], 0) + 1


def holds_rows(output: str) -> bool:
    """Tells whether anything was captioned, or tried, in an output folder."""
    whole = f"{output}/errors.parquet"
    return bool(
        shards(output, CAPTIONS)
        or shards(output, ERRORS)
        or (places.exists(whole) and read_rows(whole))
    )


def shards(output: str, folder: str) -> list[str]:
    """Lists the shards of a folder of the output."""
    return places.find_files(f"{output}/{folder}")


def read_rows(place: str, columns: list[str] | None = None) -> list[dict]:
    """Reads the rows of a Parquet file."""
    with places.open_place(place) as file:
        return _arrow().parquet.read_table(file, columns=columns).to_pylist()


def read_index(place: str) -> dict:
    """Returns the ids in a shard, and the number of regions of each."""
    if place.endswith(".tar"):
        with places.open_place(place) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            return json.loads(tar.extractfile(next(iter(tar))).read())
    rows = read_rows(place, ["id", "captions"])
    return {"ids": [r["id"] for r in rows], "regions": [len(r["captions"]) for r in rows]}


def read_tar(place: str) -> list[dict]:
    """Reads the rows of a WebDataset shard."""
    rows, images = [], {}
    with places.open_place(place) as file, tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            data = tar.extractfile(member).read()
            if suffix == "json":
                rows.append({"image": images.get(key), **json.loads(data)})
            elif suffix:
                images[key] = data
    return rows


def _rewrite(place: str, ids: set[str]):
    """Leaves the rows with some ids alone in a shard; removes one that has none left."""
    if not ids:
        return places.remove_place(place)
    if place.endswith(".tar"):
        rows = [row for row in read_tar(place) if row["id"] in ids]
        return places.write_place(place, tar_of(rows))
    rows = [row for row in read_rows(place) if row["id"] in ids]
    with_bytes = any(isinstance(row["image"], bytes) for row in rows)
    places.write_place(place, _parquet(rows, caption_schema(with_bytes)))
