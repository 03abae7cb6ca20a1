"""JSON and text files with a byte order mark, or in UTF-16, at every door that reads them."""

import json
import os

import pytest
from perceptiondlm.common.files import write_json
from perceptiondlm.common.json_text import (
    ascii_json,
    parse_json,
    read_json,
    read_optional_json,
    read_text,
)
from perceptiondlm.conversion.files import read_json as read_checkpoint_json
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.evaluation.judge_prompts import JudgePrompt
from perceptiondlm.training.recipe import load_recipe
from perceptiondlm.training.records import open_records, record_of
from test_evaluation_benchmarks import write_paradlc

ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
RECORDS = [{"image": "naïve.png", "captions": ["a\u2028b", "c"]}, {"image": "b.png"}]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("read", [read_json, read_checkpoint_json, read_optional_json])
def test_a_json_file_is_read_in_every_encoding(tmp_path, read, encoding):
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps({"ä": 1}, ensure_ascii=False).encode(encoding))
    assert read(path) == {"ä": 1}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_training_records_are_read_in_every_encoding(tmp_path, encoding, suffix, streaming):
    path = tmp_path / f"r{suffix}"
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    text = json.dumps(RECORDS) if suffix == ".json" else "\n".join(lines) + "\n\n"
    path.write_bytes(text.encode(encoding))
    rows = open_records([str(path)], lambda values: 1, streaming=streaming)
    assert [record_of(row, [str(path)]).values for row in rows] == RECORDS


def test_a_line_that_is_not_utf_8_spoils_no_other(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"b": "\xe9"}\n{"c": 3}\n')
    rows = list(open_records([str(path)], lambda values: 1, streaming=True))
    records = [record_of(row, [str(path)]) for row in rows]
    assert [record.values for record in records] == [{"a": 1}, None, {"c": 3}]
    assert "utf-8" in records[1].error


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_benchmark_is_read_in_every_encoding(tmp_path, encoding):
    folder = write_paradlc(tmp_path / "bench", 2, 1)
    expected = load_benchmark(folder)
    for file in folder.glob("*.json"):
        file.write_bytes(file.read_text().encode(encoding))
    assert load_benchmark(folder) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_lose_their_byte_order_mark(tmp_path, encoding):
    (tmp_path / "prompt.txt").write_bytes("Ü {caption} {question}".encode(encoding))
    assert JudgePrompt.from_file(tmp_path / "prompt.txt", "text").template.startswith("Ü ")
    recipe = "data: {kind: regions, files: [a.jsonl]}\nmodel: {checkpoint: ü}\n"
    recipe += "trainer: {output_dir: o}\n"
    (tmp_path / "r.yaml").write_bytes(recipe.encode(encoding))
    assert load_recipe(tmp_path / "r.yaml").model.checkpoint == "ü"


@pytest.mark.parametrize(
    "data", [b"{", b"\xff", b"", b"[" * 100_000, b"\xff\xfe{", b'{"a": "\xe9"}']
)
def test_what_is_no_json_is_named(tmp_path, data):
    (tmp_path / "bad.json").write_bytes(data)
    with pytest.raises(ValueError, match="expected JSON in .*bad.json, got: "):
        read_json(tmp_path / "bad.json")


def test_text_of_another_encoding_is_named(tmp_path):
    (tmp_path / "bad.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match="expected UTF-8 text in .*bad.txt"):
        read_text(tmp_path / "bad.txt")


def test_any_text_survives_being_written_as_json(tmp_path):
    content = {"name": os.fsdecode(b"caf\xe9"), "half": "\ud83d", "whole": "\U0001f600", "ü": 1}
    write_json(tmp_path / "a.json", content)
    data = (tmp_path / "a.json").read_bytes()
    assert json.loads(data.decode("utf-8")) == content
    assert "\U0001f600".encode() in data
    assert os.fsencode(json.loads(data)["name"]) == b"caf\xe9"


def test_json_for_ascii_streams_says_the_same():
    text = json.dumps({"ü": "\U0001f600\udce9\u2028"}, ensure_ascii=False)
    assert ascii_json(text).isascii()
    assert json.loads(ascii_json(text)) == json.loads(text)
    assert parse_json("\ufeff" + text, "here") == json.loads(text)
