"""Files of an evaluation: those of `common.files`, and journals that only grow."""

import json
import os
import threading
from pathlib import Path

from ..common.files import file_sha256, write_bytes, write_json, write_text
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
    """Returns where the record of the run that wrote `output` lies: `x.json` has `x.run.json`."""
    return Path(output).with_suffix(".run.json")


class Journal:
    """An append-only file of JSON lines, each synced to disk before `append` returns.

    A last line torn by a kill is cut off on opening, since whatever it recorded was never
    acknowledged; a broken line before the last is a ValueError.

    Attributes:
        records: every record in the file, in order, those appended here included.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = open(self.path, "ab+")
        self._cut_torn_line()
        self.records = read_journal(self.path)

    def append(self, record: dict):
        """Adds one record; safe to call from several threads."""
        line = encode_json(json.dumps(record, ensure_ascii=False) + "\n")
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self.records.append(record)

    def close(self):
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _cut_torn_line(self):
        self._file.seek(0)
        content = self._file.read()
        if not content.endswith(b"\n"):
            self._file.truncate(content.rfind(b"\n") + 1)
        self._file.seek(0, os.SEEK_END)


def read_journal(path: str | Path) -> list[dict]:
    """Reads the complete records of a journal, without changing the file."""
    lines = Path(path).read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
    return [_parse_line(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse_line(path: str | Path, number: int, line: bytes) -> dict:
    record = parse_json(line, f"line {number} of {path}")
    if not isinstance(record, dict):
        raise ValueError(f"expected an object in line {number} of {path}, got {line[:80]!r}")
    return record
