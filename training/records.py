"""Reads records of data files through `datasets`: one row a record, whatever the file's form.

A row holds the record as JSON text (images' bytes apart), how many samples it makes, and where
it stands, so that a malformed line is a row too and every complaint names a file and a line.
"""

import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..common.extras import extra

with extra("train"):
    import datasets

from ..common.json_text import parse_json, read_json, read_json_lines

TABLES = (".parquet", ".arrow")
LINES = (".jsonl", ".ndjson")
IMAGE_FIELDS = ("image", "images")
ASSISTANT_ROLES = ("gpt", "assistant")

FEATURES = datasets.Features(
    {
        "record": datasets.Value("large_string"),
        "error": datasets.Value("string"),
        "images": datasets.List(datasets.Value("large_binary")),
        "file": datasets.Value("int32"),
        "number": datasets.Value("int64"),
        "count": datasets.Value("int32"),
    }
)


def count_masks(values: dict) -> int:
    """Counts the masks of a region record; 1 where that cannot be told."""
    masks = values.get("mask_rles", values.get("masks"))
    return len(masks) if isinstance(masks, list) and masks else 1


def count_answers(values: dict) -> int:
    """Counts the assistant turns of a conversation; 1 where that cannot be told."""
    turns = values.get("conversations", values.get("messages"))
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    roles = [turn.get("from", turn.get("role")) for turn in turns]
    return max(sum(role in ASSISTANT_ROLES for role in roles), 1)


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        values: its fields, or None where `error` says why it could not be read.
        images: embedded images, in the order of the record's image fields.
        where: file, and line or record number.
        key: (file, record number), for seeding.
        folder: of its file.
    """

    values: dict | None
    error: str | None
    images: list[bytes]
    where: str
    key: tuple[int, int]
    folder: Path = field(default=Path("."))

    def get(self, *names: str, kind: type = list):
        """Returns the first of the fields that is there; ValueError for none or another type."""
        found = next((name for name in names if self.values.get(name) is not None), None)
        if found is None:
            raise ValueError(f"expected a field {' or '.join(names)}, got {sorted(self.values)}")
        if not isinstance(self.values[found], kind):
            raise ValueError(
                f"expected {found} as {kind.__name__}, got {type(self.values[found]).__name__}"
            )
        return self.values[found]


def open_records(files: list[str], count: Callable[[dict], int], streaming: bool):
    """Opens all records of `files` as rows of a `datasets` data set, or of an iterable one.

    `count` says how many items (masks, answers) a record holds. Raises FileNotFoundError for a
    file that is not there and ValueError for one of no known form.
    """
    paths = [_check_path(name) for name in files]
    if streaming:
        shards = {"paths": [(i, str(path)) for i, path in enumerate(paths)]}
        return datasets.IterableDataset.from_generator(
            _rows, features=FEATURES, gen_kwargs={**shards, "count": count}
        )

    # the stamps make a changed file another data set: `datasets` caches by these arguments
    stamps = [(path.stat().st_mtime_ns, path.stat().st_size) for path in paths]

    try:
        return datasets.Dataset.from_generator(
            _rows,
            features=FEATURES,
            gen_kwargs={
                "paths": [(i, str(path)) for i, path in enumerate(paths)],
                "count": count,
                "stamps": tuple(stamps),
            },
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if type(cause) is ValueError:  # a file of another form than its name says
            raise cause from error
        names = ", ".join(files)
        raise ValueError(f"expected readable data files, got {names}: {cause}") from error


def record_of(row: dict, files: list[str]) -> Record:
    """Reads the record of a row."""
    path = Path(files[row["file"]])
    unit = "line" if path.suffix in LINES else "record"
    values = None if row["record"] is None else json.loads(row["record"])
    key = (row["file"], row["number"])
    where = f"{path}, {unit} {row['number']}"
    return Record(values, row["error"], row["images"] or [], where, key, path.parent)


def expand_files(names: list[str]) -> list[str]:
    """Replaces each pattern ("data/part-*.parquet") by the files that match it, sorted.

    Raises FileNotFoundError for a pattern that no file matches.
    """
    files = []
    for name in names:
        if Path(name).exists() or not glob.has_magic(name):
            files.append(name)
            continue
        found = sorted(glob.glob(name, recursive=True))
        if not found:
            raise FileNotFoundError(f"expected data files that match {name!r}, found none")
        files += found
    return files


def _check_path(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"expected a data file, got {name!r}: no such file")
    if path.suffix not in (*TABLES, *LINES, ".json"):
        raise ValueError(
            f"expected a data file as .json, {', '.join((*LINES, *TABLES))}, got {name!r}"
        )
    return path


def _rows(paths: list[tuple[int, str]], count: Callable, stamps: tuple = ()) -> Iterator[dict]:
    """Yields the rows of all files."""
    for file, name in paths:
        for number, values, error, images in _read(Path(name)):
            text, items = None, 1
            if values is not None:
                try:
                    text, items = json.dumps(values), count(values)
                except Exception as problem:  # a record holds anything
                    text, error = None, f"{type(problem).__name__}: {problem}"

            yield {
                "record": text,
                "error": error,
                "images": images,
                "file": file,
                "number": number,
                "count": items,
            }


def _read(path: Path) -> Iterator[tuple]:
    """Yields number (from 1), values, error and images of each record of a file."""
    if path.suffix in TABLES:
        yield from _read_table(path)
    elif path.suffix in LINES:
        yield from _read_lines(path)
    else:
        yield from _read_json(path)


def _read_lines(path: Path) -> Iterator[tuple]:
    for number, line in read_json_lines(path):
        try:
            values = parse_json(line, path)
        except ValueError as error:  # malformed JSON or not UTF-8
            yield number, None, f"expected a JSON object, got: {error.__cause__}", []
            continue
        yield number, *_checked(values), []


def _checked(values) -> tuple[dict | None, str | None]:
    if isinstance(values, dict):
        return values, None
    return None, f"expected a JSON object, got {type(values).__name__}"


def _read_json(path: Path) -> Iterator[tuple]:
    content = read_json(path)
    if isinstance(content, dict) and "annotations" in content:
        try:
            records = coco_records(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        for number, (values, error) in enumerate(records, 1):
            yield number, values, error, []
        return

    if not isinstance(content, list):
        raise ValueError(
            f"expected a list of records, or COCO's images and annotations, in {path},"
            f" got {type(content).__name__}"
        )
    for number, values in enumerate(content, 1):
        yield number, *_checked(values), []


def _read_table(path: Path) -> Iterator[tuple]:
    kind = path.suffix.removeprefix(".")
    table = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    names = [n for n in IMAGE_FIELDS if n in (table.features or {})]
    for name in names:
        table = _undecoded(table, name)
    for number, row in enumerate(table, 1):
        try:
            values, images = _row(row, names)
        except Exception as error:  # a row holds anything
            yield number, None, f"expected plain values in a row, got: {error}", []
            continue
        yield number, values, None, images


def _row(row: dict, names: list[str]) -> tuple[dict, list[bytes]]:
    """Returns a row's plain values, and the images in the fields that are named."""
    images = []
    for name in names:
        value = row[name]
        for image in value if isinstance(value, list) else [value]:
            data = image.get("bytes") if isinstance(image, dict) else image
            if isinstance(data, bytes):
                images.append(data)
        if images:
            row = {k: v for k, v in row.items() if k != name}
    return json.loads(json.dumps(row, default=_plain)), images


def _undecoded(table, name: str):
    """Returns a table whose images of one field stay bytes."""
    feature = table.features[name]
    inner = getattr(feature, "feature", None)
    if isinstance(feature, datasets.Image):
        return table.cast_column(name, datasets.Image(decode=False))
    if isinstance(inner, datasets.Image):
        return table.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return table


def _plain(value):
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


def coco_records(content: dict) -> list[tuple[dict | None, str | None]]:
    """Turns COCO's images and annotations into records of one image each, in their order.

    Each comes as (record, None), or as (None, what is wrong) if it is broken; an image without
    annotations makes none. Raises ValueError for content that holds no lists of them.
    """
    images, annotations = content.get("images", []), content["annotations"]
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise ValueError("expected COCO's images and annotations as lists, got others")

    records: dict[object, dict] = {}
    errors: dict[object, str] = {}
    for i, image in enumerate(images):
        key = _coco_id(image, "id")
        if key is None or not isinstance(image.get("file_name"), str):
            key = ("images", i) if key is None else key
            errors[key] = f"expected images[{i}] with id and file_name, got {str(image)[:80]}"
            records[key] = {}
        else:
            records[key] = {"image": image["file_name"], "mask_rles": [], "captions": []}

    for i, annotation in enumerate(annotations):
        key, problem = _coco_id(annotation, "image_id"), None
        if key not in records:
            key = ("annotations", i) if key is None else key
            problem = "with the id of an image"
        elif "segmentation" not in annotation:
            problem = "with a segmentation"
        if problem is not None:
            records.setdefault(key, {})
            where = f"annotations[{i}] {problem}"
            errors.setdefault(key, f"expected {where}, got {str(annotation)[:80]}")
        elif key not in errors:
            records[key]["mask_rles"].append(annotation["segmentation"])
            records[key]["captions"] += [annotation["caption"]] if "caption" in annotation else []

    return [
        (None, errors[key]) if key in errors else (record, None)
        for key, record in records.items()
        if key in errors or record["mask_rles"]
    ]


def _coco_id(item, name: str):
    """Returns the id in an image or annotation; None where there is none."""
    found = item.get(name) if isinstance(item, dict) else None
    return found if isinstance(found, (int, str)) else None
