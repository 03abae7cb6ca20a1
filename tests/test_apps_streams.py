"""`perceptiondlm caption` with names, arguments and streams that are not UTF-8, or closed."""

import io
import json
import os
import shutil
import sys

import pytest
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.apps.cli import main

BOX = ("--box", "5,5,60,60")
NAMES = [b"caf\xe9.png", "naïve.png".encode(), b'"quoted".png', b"two\nlines.png"]


@pytest.fixture(scope="module")
def model(converted):
    return str(converted("released-region"))


@pytest.fixture
def run(model, monkeypatch):
    """Runs the command with the region model, loaded once."""
    loaded = RegionCaptioner.from_pretrained(model)

    def from_pretrained(*_, subfolder, revision, device, dtype, **options):
        return RegionCaptioner(loaded.model, loaded.processor, **options)

    monkeypatch.setattr(RegionCaptioner, "from_pretrained", from_pretrained)
    return lambda *given: main(["caption", *map(os.fspath, given), "--caption-length", "4"])


@pytest.fixture
def photos(vectors, tmp_path):
    """The same image under names of every kind."""
    (tmp_path / "photos").mkdir()
    for name in NAMES:
        shutil.copy(vectors / "region_0.png", tmp_path / "photos" / os.fsdecode(name))
    return tmp_path / "photos"


def stream(monkeypatch, encoding: str) -> io.BytesIO:
    """Puts a stdout of this encoding in place, strict as Python's own."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    return raw


def names_in(records) -> set[bytes]:
    return {os.path.basename(os.fsencode(record)) for record in records}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "utf-16"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "coco"])
def test_names_of_any_bytes_come_back_from_json_in_any_encoding(
    run, photos, monkeypatch, encoding, kind
):
    raw = stream(monkeypatch, encoding)
    assert run(photos, *BOX, "--format", kind) == 0
    text = raw.getvalue().decode(encoding)
    if kind == "coco":
        names = [image["file_name"] for image in json.loads(text)["images"]]
    elif kind == "json":
        names = [record["image"] for record in json.loads(text)]
    else:
        names = [json.loads(line)["image"] for line in text.split("\n")[:-1]]
    assert names_in(names) == set(NAMES)


@pytest.mark.parametrize("kind", ["json", "jsonl", "coco.json"])
def test_a_file_of_captions_is_utf_8_whatever_the_names(run, photos, tmp_path, kind):
    out = tmp_path / os.fsdecode(b"out\xff." + kind.encode())
    assert run(photos, *BOX, "--captions", out) == 0
    assert r"caf\udce9.png" in out.read_bytes().decode("utf-8")


def test_drawings_have_the_images_names_whatever_they_are(run, photos, tmp_path):
    assert run(photos, *BOX, "--output", tmp_path / "drawn") == 0
    drawn = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert drawn == {os.fsdecode(name) for name in NAMES}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_text_shows_a_name_as_it_is_or_as_a_json_string(run, photos, monkeypatch, encoding):
    raw = stream(monkeypatch, encoding)
    assert run(photos, *BOX) == 0
    lines = raw.getvalue().decode(encoding).split("\n\n")
    names = [block.split("\n")[0] for block in lines]
    read = [json.loads(name) if name.startswith('"') else name for name in names]
    if encoding == "ascii":
        read = [name.replace("\\xef", "ï") for name in read]
    assert names_in(read) == set(NAMES)


def test_coco_annotations_find_an_image_by_such_a_name(run, photos, tmp_path):
    first, second = tmp_path / "1.coco.json", tmp_path / "2.coco.json"
    assert run(photos, *BOX, "--captions", first) == 0
    assert run(photos, "--masks", first, "--captions", second) == 0
    assert json.loads(first.read_text()) == json.loads(second.read_text())


@pytest.mark.parametrize("option", ["--question", "--instruction"])
def test_a_text_that_is_not_utf_8_is_refused_and_named(run, photos, option, capsys):
    regions = BOX if option == "--instruction" else ()
    given = ["caption", str(photos), *regions, option, os.fsdecode(b"caf\xe9?")]
    assert main(given) == 2
    assert f"expected UTF-8 text for {option}, got 'caf\\udce9?'" in capsys.readouterr().err


def test_a_closed_stdout_ends_the_run_quietly(run, photos, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", open(write, "w", encoding="utf-8"))
    assert run(photos, *BOX, "--quiet") == 1
    sys.stdout.close()  # as at the end of the process: nothing is left to complain about
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_full_stdout_ends_the_run_and_is_said(run, photos, monkeypatch, capsys, kind):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w", encoding="utf-8"))
    assert run(photos, *BOX, "--format", kind) == 1
    sys.stdout.close()
    assert "cannot write captions" in capsys.readouterr().err


def test_every_command_ends_quietly_when_nobody_reads_on(tmp_path, monkeypatch, capsys):
    def write(*given):
        return main(["evaluate", "synthetic", "write", "--scenes", "1", "--output", *given])

    read, write_end = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", open(write_end, "w", encoding="utf-8"))
    assert write(str(tmp_path / os.fsdecode(b"caf\xe9"))) == 1
    sys.stdout.close()
    assert "Traceback" not in capsys.readouterr().err


def test_no_stdout_at_all_is_refused_before_anything_is_done(run, photos, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert run(photos, *BOX) == 2
    assert "expected --captions FILE or an open stdout" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file/captions.json", "folder"])
def test_an_unwritable_output_is_refused_before_anything_is_done(
    run, photos, tmp_path, capsys, place
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    assert run(photos, *BOX, "--captions", tmp_path / place, "--format", "json") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_captions_that_no_file_takes_are_printed(run, photos, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run(photos, *BOX, "--captions", tmp_path / "captions.jsonl") == 1
    printed = capsys.readouterr()
    assert "cannot write captions" in printed.err
    assert len([json.loads(line) for line in printed.out.splitlines()]) == len(NAMES)
