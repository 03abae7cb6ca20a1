"""Files that survive a kill: JSON written in one piece, and journals that only grow."""

import hashlib
import json
import os
import tempfile
import threading
from pathlib import Path


def read_json(path: str | Path):
    """Reads a JSON file; a file that is not JSON is a ValueError that names it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a JSON file at {path}, found none")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected JSON in {path}, got {error}") from error


def write_bytes(path: str | Path, data: bytes):
    """Writes a whole file or nothing: a temporary file beside it, synced, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)  # gone, if it has been renamed


def write_text(path: str | Path, text: str):
    """Writes a text as UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, content):
    """Writes JSON in one piece; floats keep every bit."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def run_record_path(output: str | Path) -> Path:
    """Where the record of the run that wrote `output` lies: `x.json` has `x.run.json`."""
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
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
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
    """The complete records of a journal, without changing the file."""
    lines = Path(path).read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
    return [_parse_line(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse_line(path: str | Path, number: int, line: bytes) -> dict:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected JSON in line {number} of {path}, got {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object in line {number} of {path}, got {line[:80]!r}")
    return record
