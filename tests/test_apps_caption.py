"""`perceptiondlm caption` from the shell's side: what goes in, comes out, and is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from perceptiondlm.apps.captioning import command
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.apps.cli import main
from PIL import Image
from pycocotools import mask as coco_mask

LENGTH = 6


@pytest.fixture(scope="module")
def model(converted):
    return str(converted("released-region"))


@pytest.fixture
def run(model, monkeypatch):
    """Runs the command with the region model, loaded once for all tests."""
    load = _cached(RegionCaptioner.from_pretrained)
    monkeypatch.setattr(RegionCaptioner, "from_pretrained", load)

    def call(*arguments, base: str | None = None) -> int:
        length = [] if base else ["--caption-length", str(LENGTH)]
        return main(["caption", *map(str, arguments), "--model", base or model, *length])

    return call


PLACE = ("subfolder", "revision", "device", "dtype")
_loaded = {}


def _cached(load):
    def from_pretrained(source, **options):
        place = {n: options.pop(n) for n in list(options) if n in PLACE}
        if source not in _loaded:
            _loaded[source] = load(source, **place)
        return RegionCaptioner(_loaded[source].model, _loaded[source].processor, **options)

    return from_pretrained


@pytest.fixture
def scene(vectors, tmp_path):
    """An image and three masks in a folder of the test's own."""
    names = ["region_0.png", *(f"region_0_mask_{i}.png" for i in range(3))]
    for name in names:
        shutil.copy(vectors / name, tmp_path / name)
    return tmp_path / names[0], [tmp_path / name for name in names[1:]]


@pytest.fixture
def folders(vectors, tmp_path):
    """Three images and their masks by name."""
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    photos.mkdir(), masks.mkdir()
    for file in vectors.glob("region_?*.png"):
        shutil.copy(file, masks if "mask" in file.name else photos)
    return photos, masks


@pytest.fixture
def expected(model, scene):
    out = RegionCaptioner.from_pretrained(model)(*scene, caption_length=LENGTH)
    return out.captions


def test_captions_are_printed_by_number(run, scene, expected, capsys):
    assert run(scene[0], "--masks", *scene[1]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == str(scene[0])
    assert lines[1:4] == [f"  {i}  {text}" for i, text in enumerate(expected, 1)]


def test_boxes_polygons_and_masks_add_up(run, scene, capsys):
    code = run(
        scene[0],
        "--masks",
        scene[1][0],
        "--box",
        "5,5,60,60",
        "--polygon",
        "70,70,120,75,100,130",
        "--format",
        "json",
    )
    (record,) = json.loads(capsys.readouterr().out)
    assert code == 0
    assert [r["mask"] for r in record["regions"]] == ["region_0_mask_0.png", "box 1", "polygons 2"]
    assert record["regions"][1]["box"] == [5, 5, 60, 60]


def test_a_folder_is_captioned_with_a_line_of_json_each(run, folders, tmp_path):
    out = tmp_path / "captions.jsonl"
    assert run(folders[0], "--masks", folders[1], "--captions", out) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(record["regions"]) for record in records] == [3, 4, 6]


def test_coco_out_is_coco_in(run, folders, tmp_path):
    out, again = tmp_path / "out.coco.json", tmp_path / "again.coco.json"
    assert run(folders[0], "--masks", folders[1], "--captions", out) == 0
    assert run(folders[0], "--masks", out, "--captions", again) == 0
    first, second = json.loads(out.read_text()), json.loads(again.read_text())
    assert first == second
    mask = np.asarray(Image.open(folders[1] / "region_0_mask_1.png")) != 0
    decoded = coco_mask.decode(first["annotations"][1]["segmentation"])
    assert (decoded.astype(bool) == mask).all()
    assert (
        first["annotations"][1]["bbox"]
        == coco_mask.toBbox(first["annotations"][1]["segmentation"]).tolist()
    )


def test_ids_of_a_coco_file_come_back(run, scene, tmp_path):
    content = {
        "images": [{"id": 42, "file_name": "region_0.png"}],
        "annotations": [{"id": 77, "image_id": 42, "category_id": 9, "bbox": [5, 5, 40, 40]}],
        "categories": [{"id": 9, "name": "cup"}],
    }
    annotations, out = tmp_path / "in.json", tmp_path / "out.coco.json"
    annotations.write_text(json.dumps(content))
    assert run(scene[0], "--masks", annotations, "--captions", out) == 0
    result = json.loads(out.read_text())
    assert result["images"][0]["id"] == 42
    assert (result["annotations"][0]["id"], result["annotations"][0]["image_id"]) == (77, 42)
    assert result["categories"] == content["categories"]


def test_questions_are_answered(run, vectors, converted, capsys):
    code = run(
        vectors / "chat_0.png",
        "--question",
        "What?",
        "--question",
        "Where?",
        "--max-new-tokens",
        "4",
        base=str(converted("released-base")),
    )
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert (lines[1], lines[3]) == ("  What?", "  Where?")


def test_drawing_and_animation_are_written(run, scene, tmp_path):
    image, animation = tmp_path / "seen.png", tmp_path / "denoising.gif"
    assert run(scene[0], "--masks", *scene[1], "--output", image, "--animate", animation) == 0
    assert Image.open(image).width > 700
    assert Image.open(animation).n_frames == LENGTH + 1


def test_drawings_of_a_folder_go_to_a_folder_without_clashes(run, scene, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(scene[0], tmp_path / name / "cat.png")
    out = tmp_path / "drawn"
    code = run(tmp_path / "a", tmp_path / "b", "--box", "5,5,60,60", "--output", out)
    assert code == 0
    assert {p.name for p in out.iterdir()} == {"cat.png", "cat-2.png"}


@pytest.mark.parametrize("option", ["--steps 2", "--factor 99"])
def test_decoding_options_reach_the_model(run, scene, option, capsys):
    run(scene[0], "--masks", *scene[1], "--format", "json")
    usual = json.loads(capsys.readouterr().out)[0]["num_forwards"]
    run(scene[0], "--masks", *scene[1], "--format", "json", *option.split())
    assert json.loads(capsys.readouterr().out)[0]["num_forwards"] < usual


def test_an_instruction_changes_what_is_asked(run, scene, capsys):
    run(scene[0], "--masks", *scene[1])
    usual = capsys.readouterr().out
    run(scene[0], "--masks", *scene[1], "--instruction", "Say what each is made of, in one word.")
    assert capsys.readouterr().out != usual


def test_only_the_largest_regions_are_captioned(run, scene, capsys):
    run(scene[0], "--masks", *scene[1], "--max-regions", "1", "--format", "json")
    (record,) = json.loads(capsys.readouterr().out)
    areas = [int((np.asarray(Image.open(m)) != 0).sum()) for m in scene[1]]
    assert [r["area"] for r in record["regions"]] == [max(areas)]


# Failures.


def test_one_bad_file_is_reported_and_the_rest_goes_on(run, folders, tmp_path, capsys):
    (folders[0] / "broken.png").write_bytes(b"<html>")
    Image.new("L", (9, 9), 255).save(folders[1] / "region_1_mask_9.png")  # of another size
    out = tmp_path / "captions.jsonl"
    assert run(folders[0], "--masks", folders[1], "--captions", out) == 1
    errors = capsys.readouterr().err
    assert "broken.png: expected an image" in errors
    assert "region_1_mask_9.png to have the image's size" in errors
    assert "3 images done, 1 failed: broken.png; 1 regions left out" in errors
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(record["regions"]) for record in records] == [3, 4, 6]


def test_images_of_a_folder_without_masks_are_left_out(run, folders, scene, capsys):
    shutil.copy(scene[0], folders[0] / "unmasked.png")
    assert run(folders[0], "--masks", folders[1]) == 0
    assert "1 of 4 images have no masks" in capsys.readouterr().err


def test_an_image_named_without_masks_fails(run, folders, scene, capsys):
    assert run(scene[0], folders[0] / "region_1.png", "--masks", scene[0].parent) == 1
    assert "region_1.png: expected masks for this image" in capsys.readouterr().err


def test_a_path_that_leaves_the_folder_fails_and_the_rest_is_done(run, scene, tmp_path, capsys):
    content = {
        "images": [{"id": 1, "file_name": "region_0.png"}, {"id": 2, "file_name": "../../x.png"}],
        "annotations": [{"id": 1, "image_id": 1, "bbox": [5, 5, 40, 40]}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    assert run(scene[0], "--masks", tmp_path / "coco.json") == 1
    printed = capsys.readouterr()
    assert "../../x.png" in printed.err
    assert "  1  " in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected regions (--masks"),
        (["--box", "1,1,9,9", "--question", "What?"], "got both"),
        (["--masks", "nowhere"], "expected masks at nowhere"),
        (["--box", "1,1,9,9", "--output", "seen.txt"], "--output to end in .png"),
        (["--box", "1,1,9,9", "--animate", "seen.jpg"], "--animate to end in .gif"),
        (["--box", "1,1,9,9", "--captions", "captions.xml"], "ending in .txt"),
        (["--box", "1,1,9,9", "--output", "region_0.png"], "one of them"),
        (["--box", "1,1,9,9", "--output", "x.png", "--animate", "x.png"], "one file for two"),
        (["--box", "1,1,9,9", "--steps", "0"], "expected steps"),
        (["--question", "What?", "--format", "coco"], "got --format coco"),
        (["--box", "1,1,9,9", "--font", "no.ttf"], "TrueType font at no.ttf"),
    ],
)
def test_a_mistake_on_the_command_line_is_code_2(
    run, scene, arguments, message, capsys, monkeypatch
):
    monkeypatch.chdir(scene[0].parent)
    assert run("region_0.png", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("box", ["1,2,3", "a,b,c,d", ""])
def test_a_box_that_is_none_is_refused_by_the_parser(run, scene, box):
    with pytest.raises(SystemExit) as stop:
        run(scene[0], "--box", box)
    assert stop.value.code == 2


def test_a_checkpoint_that_is_not_there_is_code_2(scene, tmp_path, capsys):
    nowhere = str(tmp_path / "no")
    assert main(["caption", str(scene[0]), "--box", "1,1,9,9", "--model", nowhere]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_device_that_torch_does_not_know_is_code_2(scene, model, capsys):
    arguments = ["--box", "1,1,9,9", "--model", model, "--device", "abacus"]
    assert main(["caption", str(scene[0]), *arguments]) == 2
    assert "abacus" in capsys.readouterr().err


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="for a PyTorch without CUDA")
def test_a_device_that_torch_was_not_built_for_is_code_2(scene, model, capsys):
    arguments = ["--box", "1,1,9,9", "--model", model, "--device", "cuda"]
    assert main(["caption", str(scene[0]), *arguments]) == 2
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["99999", "-1", "http"])
def test_a_port_that_there_is_none_of_is_a_usage_error(port, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["web", f"--port={port}"])
    assert stopped.value.code == 2
    assert f"from 0 to 65535, got '{port}'" in capsys.readouterr().err


def test_help_teaches_by_examples_without_loading_a_model(capsys):
    with pytest.raises(SystemExit):
        main(["caption", "--help"])
    printed = capsys.readouterr().out
    assert "examples:" in printed and "exit codes:" in printed
    for line in command.EPILOG.splitlines():
        assert len(line) <= 100


def test_a_failing_write_leaves_the_old_file_whole(run, scene, tmp_path, monkeypatch, capsys):
    out = tmp_path / "seen.png"
    out.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", _refuse)
    assert run(scene[0], "--masks", *scene[1], "--output", out) == 1
    assert out.read_bytes() == b"old"
    assert not list(tmp_path.glob(".seen*"))


def _refuse(*_):
    raise OSError("disk full")


def test_ctrl_c_keeps_what_was_done(model, folders, tmp_path):
    out = tmp_path / "captions.jsonl"
    for i in range(40):
        shutil.copy(folders[0] / "region_0.png", folders[0] / f"more_{i}.png")
    # as from a terminal: a shell's background job would ignore Ctrl-C, and so would its children
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from perceptiondlm.apps.cli import main; exit(main())"
    )
    arguments = [
        sys.executable,
        "-c",
        program,
        "caption",
        str(folders[0]),
        "--box",
        "5,5,60,60",
        "--model",
        model,
        "--caption-length",
        "64",
        "--captions",
        str(out),
        "--output",
        str(tmp_path / "drawn"),
    ]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    while not list(Path(tmp_path).glob("drawn/*.png")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    assert 1 <= len(out.read_text().splitlines()) < 43
