"""Captions of regions that a segmenter finds: from the command line and in Python."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2", reason="the offline segmenter needs the package's regions extra")
pytest.importorskip("skimage", reason="the offline segmenter needs the package's regions extra")

from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.apps.cli import main
from perceptiondlm.regions.region_mask import RegionMask
from perceptiondlm.regions.segmenters import load_segmenter
from PIL import Image
from tiny_sams import save_tiny

IMAGE = Path(__file__).parent / "fixtures" / "vectors" / "region_0.png"  # 150x140
SHORT = {"caption_length": 4}


@pytest.fixture(scope="module")
def captioner(load):
    return RegionCaptioner(*load("released-region"), **SHORT)


@pytest.fixture
def run(captioner, monkeypatch, capsys):
    """Runs the command with a loaded model; returns code, records and what is on stderr."""

    def from_pretrained(source, **options):
        return captioner

    monkeypatch.setattr(RegionCaptioner, "from_pretrained", from_pretrained)

    def call(*arguments):
        code = main(["caption", *map(str, arguments), "--format", "json"])
        said = capsys.readouterr()
        return code, json.loads(said.out or "[]"), said.err

    return call


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam")
    save_tiny("sam", folder)
    return folder


@pytest.fixture(scope="module")
def sam3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam3")
    save_tiny("sam3", folder)
    return folder


class TwoHalves:
    """A segmenter that knows what it is asked."""

    note, reads_text = None, True

    def __call__(self, image, *, points=None, boxes=None, text=None):
        self.asked = {"points": points, "boxes": boxes, "text": text}
        left = np.zeros(image.size[::-1], bool)
        left[:, : image.width // 2] = True
        return [RegionMask(left, text), RegionMask(~left, text)]


def test_python_captions_what_a_segmenter_finds(captioner):
    segmenter = TwoHalves()
    halves = [region.mask for region in segmenter(Image.open(IMAGE))]
    expected = captioner(IMAGE, halves).captions
    assert captioner(IMAGE, text="half", segmenter=segmenter).captions == expected
    assert segmenter.asked == {"points": None, "boxes": None, "text": "half"}
    assert captioner(IMAGE, everything=True, segmenter=segmenter).captions == expected
    assert segmenter.asked == {"points": None, "boxes": None, "text": None}
    captioner(IMAGE, points=[(1, 2)], boxes=[(1, 2, 3, 4)], segmenter=segmenter)
    assert segmenter.asked == {"points": [(1, 2)], "boxes": [(1, 2, 3, 4)], "text": None}
    *_, last = captioner.stream(IMAGE, everything=True, segmenter=segmenter)
    assert last.result.captions == expected


def test_the_offline_segmenter_is_the_default(captioner):
    result = captioner(IMAGE, points=[(75, 70)])
    (region,) = load_segmenter()(Image.open(IMAGE), points=[(75, 70)])
    assert (np.asarray(result.regions[0].mask) != 0).sum() == region.area
    assert result.captions == captioner(IMAGE, [region]).captions  # it stands for its mask


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected masks, or one of everything, points, boxes, text, got none"),
        ({"masks": [], "everything": True}, "expected masks or everything, got both"),
        ({"masks": [], "segmenter": "offline"}, "expected masks or a segmenter, got both"),
        ({"everything": True, "points": [(1, 1)]}, "everything or points, got both"),
        ({"points": [(999, 1)]}, "a point inside the image of 150x140 pixels, got 999,1"),
        ({"text": "mug"}, "reads text"),
        ({"everything": True, "segmenter": "/nowhere"}, "no such file or folder"),
    ],
)
def test_python_refuses_what_cannot_be_found(captioner, given, message):
    with pytest.raises(ValueError, match=message):
        captioner(IMAGE, **given)


def test_everything_is_captioned_with_a_word_about_the_segmenter(run):
    code, (record,), said = run(IMAGE, "--everything")
    expected = load_segmenter()(Image.open(IMAGE))
    assert code == 0
    assert [(r["mask"], r["area"]) for r in record["regions"]] == [
        (region.origin, region.area) for region in expected
    ]
    (line,) = said.splitlines()
    assert "offline segmenter" in line and "facebook/sam2.1-hiera-small" in line
    assert run(IMAGE, "--everything", "--quiet")[2] == ""


def test_a_box_is_the_region_itself_unless_a_segmenter_is_named(run):
    _, (record,), said = run(IMAGE, "--box", "10,20,90,110")
    assert record["regions"][0]["area"] == 80 * 90 and said == ""
    _, (record,), _ = run(IMAGE, "--box", "10,20,90,110", "--segmenter", "offline")
    (region,) = load_segmenter()(Image.open(IMAGE), boxes=[(10, 20, 90, 110)])
    assert [(r["mask"], r["area"]) for r in record["regions"]] == [(region.origin, region.area)]
    _, (record,), _ = run(IMAGE, "--box", "10,20,90,110", "--point", "75,70")
    assert [r["mask"] for r in record["regions"]] == ["box 1", "point 75,70"]


def test_points_add_up_and_weights_are_named_by_their_folder(run, sam):
    code, (record,), said = run(
        IMAGE, "--point", "20,30", "--point", "75.5,70", "--segmenter", sam, "--device", "cpu"
    )
    assert code == 0
    assert {r["mask"] for r in record["regions"]} == {"point 20,30", "point 75.5,70"}
    assert "offline" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--text mug", "a segmenter that reads text, say facebook/sam3, got text 'mug'"),
        ("--everything --point 1,1", "--everything or prompts for its regions, got --point with"),
        ("--everything --box 1,1,9,9 --segmenter offline", "got --box with it"),
        ("--segmenter offline", "got neither"),
        ("--segmenter offline --masks x.png", "or --text with --segmenter, got it alone"),
        ("--everything --segmenter /nowhere", "no such file or folder"),
        ("--everything --segmenter {image}", "a checkpoint of SAM, SAM 2 or SAM 3"),
        ("--everything --question What?", "got both"),
        ("--question What? --segmenter offline", "--segmenter"),
    ],
)
def test_what_is_wrong_with_the_command_line_ends_it_before_the_model(run, arguments, message):
    code, records, said = run(IMAGE, *arguments.format(image=IMAGE).split())
    assert (code, records) == (2, []) and message in said


@pytest.mark.parametrize("argument", ["1", "1,2,3", "a,b", "1;2"])
def test_a_point_is_two_numbers(run, argument):
    with pytest.raises(SystemExit):
        run(IMAGE, "--point", argument)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--point 150,1", "a point inside the image of 150x140 pixels, got 150,1"),
        ("--point nan,1", "not finite"),
        ("--box 9,9,9,9 --segmenter offline", "x0 < x1"),
    ],
)
def test_an_image_in_which_nothing_can_be_found_fails(run, arguments, message):
    code, records, said = run(IMAGE, *arguments.split())
    assert (code, records) == (1, []) and message in said


def test_an_image_in_which_nothing_stands_out_fails_and_the_others_are_done(run, tmp_path):
    Image.new("RGB", (150, 140), "white").save(tmp_path / "blank.png")
    code, (record,), said = run(tmp_path / "blank.png", IMAGE, "--everything")
    assert code == 1 and record["image"] == str(IMAGE)
    assert "blank.png: expected something that stands out in the image, found no region" in said


def test_text_goes_to_weights_that_read_it(run, sam3):
    code, records, said = run(IMAGE, "--text", "a mug", "--segmenter", sam3, "--device", "cpu")
    assert code == 1 and "expected ['a mug'] in the image, found no region" in said


def test_of_everything_the_largest_are_kept(run):
    _, (record,), _ = run(IMAGE, "--everything", "--max-regions", "2")
    areas = sorted(region.area for region in load_segmenter()(Image.open(IMAGE)))
    assert sorted(r["area"] for r in record["regions"]) == areas[-2:]
