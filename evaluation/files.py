"""Reads and writes an evaluation's files: those of `common.files`, and journals that only grow."""

import contextlib
import json
import os
import threading
from pathlib import Path

from ..common.files import file_sha256, locked, try_lock, write_bytes, write_json, write_text
from ..common.json_text import encode_json, parse_json, read_json

__all__ = [
    "Journal",
    "file_sha256",
    "read_journal",
    "read_json",
    "run_record_path",
    "write_bytes",
    "write_json",
    "write_text",
]


def run_record_path(output: str | Path) -> Path:
    """Returns the path of the record of the run that wrote `output`: `x.run.json` for `x.json`."""
    return Path(output).with_suffix(".run.json")


class Journal:
    """An append-only file of JSON lines, each synced to disk before `append` returns.

    Several processes may append to the same file. A last line torn by a kill is cut off, since
    whatever it recorded was never acknowledged. Raises ValueError for a broken line before it.

    Attributes:
        records: the records in the file, in order: all that were appended here, and what other
            processes had appended at the last `append` or `refresh`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[dict] = []
        self._end = 0  # of the lines that were read, in bytes
        self._lock = threading.Lock()
        self._file = open(self.path, "ab+")
        with locked(self._file):
            self._read_on()
            self._file.truncate(self._end)

    def append(self, record: dict):
        """Adds one record. Several threads and processes may call it at once."""
        line = encode_json(json.dumps(record, ensure_ascii=False) + "\n")
        with self._lock, locked(self._file):
            self._read_on()
            self._file.truncate(self._end)  # cuts off what a killed process had begun to write
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._end += len(line)
            self.records.append(record)

    def refresh(self):
        """Adds to `records` what other processes have appended since."""
        with self._lock:
            self._read_on()

    def claim(self, key: str):
        """Claims the work named `key`, unless another process or journal holds it.

        Returns a context manager that gives whether the claim was granted. The claim ends with the
        context, or with the death of the process.
        """
        return try_lock(self._claims / key)

    @property
    def _claims(self) -> Path:
        return self.path.with_name(f".{self.path.name}.claims")

    def close(self):
        """Closes the file, and removes the claims of processes that died."""
        self._file.close()
        for path in self._claims.iterdir() if self._claims.is_dir() else ():
            with try_lock(path):  # which removes the file once it is free
                pass
        with contextlib.suppress(OSError):  # the folder is not there, or others have claims in it
            self._claims.rmdir()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _read_on(self):
        self._file.seek(self._end)
        data = self._file.read()
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        first = len(self.records) + 1
        found = [_parse_line(self.path, first + i, line) for i, line in enumerate(lines)]
        self._end += sum(map(len, lines))
        self.records += found


def read_journal(path: str | Path) -> list[dict]:
    """Reads the complete records of a journal without changing the file."""
    lines = Path(path).read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
    return [_parse_line(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse_line(path: str | Path, number: int, line: bytes) -> dict:
    record = parse_json(line, f"line {number} of {path}")
    if not isinstance(record, dict):
        raise ValueError(f"expected an object in line {number} of {path}, got {line[:80]!r}")
    return record
