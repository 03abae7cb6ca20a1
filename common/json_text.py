"""Reads and writes JSON and other text: UTF-8, with or without a byte order mark, or UTF-16.

File names may hold bytes that are not UTF-8. Python carries each as a lone surrogate; JSON written
here holds it as an escape (`\\udcff`), so `os.fsencode(json.loads(...))` gives the bytes back.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

BYTE_ORDER_MARK = "\ufeff"


def parse_json(text: bytes | str, name: str | Path):
    """Parses JSON text of any Unicode encoding; `name` says in errors where it stood.

    Raises ValueError for what is not JSON.
    """
    try:
        return json.loads(without_mark(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {name}, got: {error}") from error


def without_mark(text: bytes | bytearray | str) -> bytes | bytearray | str:
    """Drops the byte order mark that UTF-8 text may begin with, for parsers that take none."""
    mark = BYTE_ORDER_MARK if isinstance(text, str) else codecs.BOM_UTF8
    return text.removeprefix(mark) if text.startswith(mark) else text


def read_json(path: str | Path):
    """Reads a JSON file; ValueError names one that is not JSON, FileNotFoundError none at all."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a JSON file at {path}, found none")
    return parse_json(path.read_bytes(), path)


def read_optional_json(path: str | Path):
    """Reads a JSON file as `read_json`; returns {} where there is no such file."""
    return read_json(path) if Path(path).is_file() else {}


def read_json_lines(path: str | Path) -> Iterator[tuple[int, bytes | str]]:
    """Yields number (from 1) and text, for `parse_json`, of each line that is not blank."""
    with open(path, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
    is_utf8 = encoding.startswith("utf-8")  # decoded line by line: one bad line spoils no other
    try:
        with open(path, "rb") if is_utf8 else open(path, encoding=encoding) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip(b" \t\r\n" + codecs.BOM_UTF8 if is_utf8 else None):
                    yield number, line
    except UnicodeDecodeError as error:
        raise ValueError(f"expected JSON lines in {path}, got: {error}") from error


def read_text(path: str | Path) -> str:
    """Reads a text file; ValueError names one that is neither UTF-8 nor marked as UTF-16."""
    data = Path(path).read_bytes()
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text in {path}, got: {error}") from error


def encode_json(text: str) -> bytes:
    """Encodes JSON text as UTF-8; lone surrogates, which UTF-8 has no bytes for, as escapes."""
    return text.encode("utf-8", "backslashreplace")


def ascii_json(text: str) -> str:
    """Escapes whatever is not ASCII in JSON text, for streams that take nothing else."""
    return "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in text)
