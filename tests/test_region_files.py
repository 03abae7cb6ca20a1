"""Regions are read from the files that data sets and labelling tools write.

The fixtures are of an image of 24x16 pixels with a cup and a spoon (see their make_fixtures.py).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from perceptiondlm import load_regions
from perceptiondlm.regions.files import ImageSource
from perceptiondlm.regions.sources import gather_regions, open_sources
from PIL import Image

FIXTURES = Path(__file__).parent / "fixtures" / "regions"
SIZE = WIDTH, HEIGHT = 24, 16


def drawn(left, top, right, bottom) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


CUP, SPOON = drawn(2, 3, 10, 9), drawn(12, 5, 22, 14)
BALL = np.array([[np.hypot(x - 5, y - 6) <= 2 for x in range(WIDTH)] for y in range(HEIGHT)])

KINDS = {  # file: masks, labels, scores
    "coco.json": ([CUP, SPOON, CUP], ["cup", "spoon", "cup"], [None] * 3),
    "panoptic.json": ([CUP, SPOON], ["cup", "spoon"], [None] * 2),
    "sa_1.json": ([CUP, SPOON], [None] * 2, [0.98, 0.75]),
    "labelme.json": (
        [CUP, SPOON, CUP, BALL, CUP | SPOON],
        ["cup", "spoon", "cup", "ball", "pair"],
        [None] * 5,
    ),
    "label_studio.json": (
        [CUP, CUP, CUP, SPOON],
        ["cup", "cup", "cup", "spoon"],
        [None] * 4,
    ),
    "cat.txt": ([CUP, SPOON, CUP], ["41", "44", "41"], [None, 0.75, None]),
    "voc.png": ([CUP, SPOON], ["8", "15"], [None] * 2),
    "masks.npy": ([CUP, SPOON], [None] * 2, [None] * 2),
    "masks.npz": ([CUP, SPOON], [None] * 2, [0.9, 0.6]),
}


def masks_of(regions) -> list[list]:
    return [np.asarray(region).tolist() for region in regions]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_each_kind_gives_its_masks_labels_and_scores(name):
    masks, labels, scores = KINDS[name]
    regions = load_regions(FIXTURES / name, SIZE, name="cat.jpg")
    assert masks_of(regions) == [mask.tolist() for mask in masks]
    assert [region.label for region in regions] == labels
    assert [region.score for region in regions] == pytest.approx(scores)


def test_cvat_gives_polygons_boxes_turned_ones_masks_and_ellipses():
    *regions, ball = load_regions(FIXTURES / "cvat.xml", SIZE, name="cat.jpg")
    assert masks_of(regions) == [mask.tolist() for mask in (CUP, CUP, CUP, SPOON)]
    assert [region.label for region in regions] == ["cup", "cup", "cup", "spoon"]
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inside = ((columns - 8) / 5) ** 2 + ((rows - 8) / 3) ** 2
    assert (ball.mask[inside < 0.8]).all() and not ball.mask[inside > 1.4].any()


def test_coco_is_filled_as_pycocotools_fills_it(tmp_path):
    coco_mask = pytest.importorskip("pycocotools.mask")
    outline = [3.5, 2.2, 20.1, 4.7, 14.3, 13.9, 5.0, 11.5]
    expected = coco_mask.decode(coco_mask.frPyObjects([outline], HEIGHT, WIDTH))[..., 0]
    rle = coco_mask.encode(np.asfortranarray(SPOON.astype(np.uint8)))
    compressed = {"size": rle["size"], "counts": rle["counts"].decode()}
    content = json.loads((FIXTURES / "coco.json").read_text())
    content["annotations"] = [
        {"id": 1, "image_id": 7, "segmentation": [outline]},
        {"id": 2, "image_id": 7, "segmentation": compressed},
    ]
    path = tmp_path / "c.json"
    path.write_text(json.dumps(content))
    polygon, spoon = load_regions(path, SIZE, name="cat.jpg")
    assert np.array_equal(polygon, expected.astype(bool)) and np.array_equal(spoon, SPOON)


@pytest.mark.parametrize("name", [*KINDS, "cvat.xml"])
def test_the_command_line_reads_the_same_regions(name):
    (source,) = open_sources([str(FIXTURES / name)], [ImageSource("photos/cat.jpg", True)])
    found = source.regions(ImageSource("photos/cat.jpg", True), SIZE)
    expected = load_regions(FIXTURES / name, SIZE, name="cat.jpg")
    assert masks_of(region.opened(SIZE) for region in found) == masks_of(expected)


def test_the_images_path_says_which_of_a_files_images_is_meant(tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "dog.jpg")
    (box,) = load_regions(FIXTURES / "coco.json", tmp_path / "dog.jpg")
    assert box.box == (1, 1, 6, 6) and box.origin == "coco.json#4"


@pytest.mark.parametrize("name", ["coco.json", "label_studio.json", "cvat.xml", "panoptic.json"])
def test_an_image_without_a_name_is_asked_for_it_by_a_file_of_several(name):
    with pytest.raises(ValueError, match="expected the image's name.*cat.jpg, dog.jpg.*name="):
        load_regions(FIXTURES / name, SIZE)


def test_an_image_that_is_not_in_a_file_is_named():
    with pytest.raises(ValueError, match="expected regions of cow.jpg in .*coco.json, found none"):
        load_regions(FIXTURES / "coco.json", SIZE, name="cow.jpg")


def test_a_folder_gives_each_image_the_annotations_named_like_it(tmp_path):
    shutil.copy(FIXTURES / "cat.txt", tmp_path / "cat.txt")
    shutil.copy(FIXTURES / "masks.npy", tmp_path / "dog.npy")
    images = [ImageSource(name, True) for name in ("cat.jpg", "dog.jpg", "cow.jpg")]
    sources = open_sources([str(tmp_path)], images)
    assert [len(gather_regions(sources, image, SIZE)) for image in images] == [3, 2, 0]


# Masks of another size.


@pytest.mark.parametrize("name", [n for n in [*KINDS, "cvat.xml"] if n != "cat.txt"])
def test_another_size_is_refused_or_resized_by_nearest_neighbor(name):
    double = (2 * WIDTH, 2 * HEIGHT)
    with pytest.raises(ValueError, match="48x32.*got 24x16"):
        load_regions(FIXTURES / name, double, name="cat.jpg")
    small = masks_of(load_regions(FIXTURES / name, SIZE, name="cat.jpg"))
    large = load_regions(FIXTURES / name, double, name="cat.jpg", resize_masks=True)
    repeated = [np.kron(mask, np.ones((2, 2), bool)).tolist() for mask in map(np.array, small)]
    assert masks_of(large) == repeated


# Palettes.


def palette_image(path, indices, *colors):
    image = Image.fromarray(np.asarray(indices, np.uint8)).convert("P")
    image.putpalette([value for color in colors for value in color])
    image.save(path)
    return path


def test_a_palette_of_two_colors_means_its_colors(tmp_path):
    path = palette_image(tmp_path / "m.png", ~CUP, (255, 255, 255), (0, 0, 0))  # index 0 inside
    (region,) = load_regions(path, SIZE)
    assert np.array_equal(region, CUP)


def test_a_palette_in_which_no_color_is_outside_is_refused_with_what_to_do(tmp_path):
    path = palette_image(tmp_path / "m.png", CUP, (0, 0, 255), (255, 0, 0))
    with pytest.raises(ValueError, match="m.png, got the colors #0000ff, #ff0000.*label_map=True"):
        load_regions(path, SIZE)
    (region,) = load_regions(path, SIZE, label_map=True)
    assert np.array_equal(region, CUP)


def test_a_gray_image_of_several_values_is_a_label_map_only_when_told(tmp_path):
    Image.fromarray((3 * CUP + 9 * SPOON).astype(np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="one region.*label map"):
        load_regions(tmp_path / "m.png", SIZE)
    regions = load_regions(tmp_path / "m.png", SIZE, label_map=True)
    assert masks_of(regions) == [CUP.tolist(), SPOON.tolist()]
    assert [region.label for region in regions] == ["3", "9"]


# What is wrong is said.


def changed(name: str, old: str, new: str) -> bytes:
    text = (FIXTURES / name).read_text()
    assert old in text
    return text.replace(old, new, 1).encode()


LAUGHS = b"""<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>
<annotations><image name="cat.jpg">&b;</image></annotations>"""
SHARES = " ".join(["0.5"] * 6)
WRONG = {
    "an XML that declares entities": ("x.xml", LAUGHS, "without a DOCTYPE"),
    "a deep XML": ("x.xml", b"<a>" * 99 + b"</a>" * 99, "at most 32 levels"),
    "another XML": ("x.xml", b"<svg/>", "'CVAT for images 1.1' in .*<svg>"),
    "CVAT's tracks": ("x.xml", b"<annotations><track/></annotations>", "tracks of a video"),
    "a broken XML": ("x.xml", b"<annotations>", "expected readable XML in .*x.xml, got"),
    "CVAT's cuboid": ("x.xml", changed("cvat.xml", "<ellipse", "<cuboid"), "got <cuboid>"),
    "CVAT's short runs": (
        "x.xml",
        changed("cvat.xml", "0, 90, 10", "0, 90"),
        "10x10 pixels, got 90",
    ),
    "CVAT's mask outside": ("x.xml", changed("cvat.xml", 'top="5"', 'top="9"'), "inside 24x16"),
    "CVAT's words": ("x.xml", changed("cvat.xml", "2.00,3.00", "a,3.00"), "numbers in points.*'a'"),
    "LabelMe's line": ("x.json", changed("labelme.json", '"polygon"', '"line"'), "got 'line' of 4"),
    "LabelMe's points": (
        "x.json",
        changed("labelme.json", '"points": [', '"points": ["x", '),
        "x, y",
    ),
    "LabelMe's mask": ("x.json", changed("labelme.json", '"mask": "iVB', '"mask": "xxx'), "mask"),
    "LabelMe without shapes": ("x.json", b'{"shapes": 5}', "list of shapes in"),
    "a turned image": (
        "x.json",
        changed("label_studio.json", '"image_rotation": 0', '"image_rotation": 90'),
        "not turned, got image_rotation 90",
    ),
    "a cut brush": ("x.json", changed("label_studio.json", "251,", ""), "cut off|values"),
    "a brush of words": ("x.json", changed("label_studio.json", "251,", '"a",'), "from 0 to 255"),
    "YOLO's pixels": ("cat.txt", b"0 12 30 40 50 60 70\n", "which is no share of an image"),
    "YOLO's words": ("cat.txt", b"cup 0.1 0.1 0.2 0.2\n", "expected a line of a class"),
    "YOLO's two points": ("cat.txt", b"0 0.1 0.2 0.3\n", "three points or more"),
    "an empty YOLO": ("cat.txt", b"", "found none"),
    "a pickle": ("x.npy", b"\x80\x04K\x05.", "no pickled objects"),
    "a broken npz": ("x.npz", b"PK\x03\x04", "expected an array, or an .npz"),
    "COCO's results of two images": (
        "x.json",
        b'[{"image_id": 1, "bbox": [1, 1, 2, 2]}, {"image_id": 2, "bbox": [1, 1, 2, 2]}]',
        "regions of one image in the list x.json, got those of 2",
    ),
    "a panoptic file without PNGs": (
        "x.json",
        (FIXTURES / "panoptic.json").read_bytes(),
        "expected the PNG 'cat.png' of x.json in",
    ),
    "a panoptic path that leads out": (
        "x.json",
        changed("panoptic.json", '"cat.png"', '"../cat.png"'),
        "expected the PNG '../cat.png'",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_file_is_said(tmp_path, what):
    name, content, message = WRONG[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_regions(tmp_path / name, SIZE, name="cat.jpg")


def test_two_annotators_of_one_task_are_not_mixed(tmp_path):
    tasks = json.loads((FIXTURES / "label_studio.json").read_text())
    tasks[0]["annotations"] *= 2
    (tmp_path / "x.json").write_text(json.dumps(tasks))
    with pytest.raises(ValueError, match="one annotation of each task in x.json, got 2 of task 1"):
        load_regions(tmp_path / "x.json", SIZE, name="cat.jpg")


def test_one_broken_shape_costs_no_other(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(changed("labelme.json", '"polygon"', '"line"'))
    image, refused = ImageSource("cat.jpg", True), []
    found = gather_regions(open_sources([str(path)], [image]), image, SIZE, refused=refused)
    assert len(found) == 4 and len(refused) == 1 and "x.json#0" in refused[0]


def test_a_million_polygons_are_refused_unfilled(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([[[1, 1, 2, 2, 3, 1]] * 20_000]))
    with pytest.raises(ValueError, match="at most 10,000 polygons.*got 20,000"):
        load_regions(tmp_path / "x.json", SIZE)


def test_an_object_array_is_never_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="no pickled objects"):
        load_regions(tmp_path / "x.npy", SIZE)


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        load_regions(tmp_path / "nothing.json", SIZE)


def test_the_command_line_resizes_masks_when_told(tmp_path, capsys):
    from perceptiondlm.apps.cli import main

    Image.new("RGB", (48, 32)).save(tmp_path / "cat.jpg")
    command = ["caption", str(tmp_path / "cat.jpg"), "--masks", str(FIXTURES / "masks.npy")]
    assert main([*command, "--steps", "2"]) == 1
    assert "48x32" in capsys.readouterr().err
    assert main([*command, "--steps", "2", "--resize-masks", "--format", "json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert [region["box"] for region in record["regions"]] == [[4, 6, 20, 18], [24, 10, 44, 28]]
