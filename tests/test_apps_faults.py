"""What cannot be captioned costs nothing else: annotations, masks and images are named."""

# ruff: noqa: F401, F811  (fixtures of other modules)

import json

import numpy as np
import pytest
from perceptiondlm.apps.captioning.inputs import find_images
from perceptiondlm.regions import files
from perceptiondlm.regions.coco import AnnotationList, CocoFile
from perceptiondlm.regions.files import ImageSource
from perceptiondlm.regions.sources import gather_regions, open_sources
from PIL import Image
from test_apps_inputs import SIZE, block, image_files, save, write_json
from test_apps_streams import model, run

WIDTH, HEIGHT = SIZE
GOOD = {"id": 1, "image_id": 7, "bbox": [1, 2, 4, 5]}
ALSO_GOOD = {"id": 2, "image_id": 7, "segmentation": [[1, 1, 9, 1, 9, 9]]}
DEGENERATE = {
    "no segmentation": {},
    "an empty segmentation": {"segmentation": []},
    "a box of no area": {"bbox": [3, 3, 0, 0]},
    "a negative box": {"bbox": [9, 9, -4, -4]},
    "a box outside": {"bbox": [500, 500, 5, 5]},
    "a box of texts": {"bbox": ["1", "2", "3", "4"]},
    "a box of three": {"bbox": [1, 2, 3]},
    "an infinite box": {"bbox": [0, 0, float("inf"), 2]},
    "a polygon of two points": {"segmentation": [[1, 1, 5, 5]]},
    "a polygon of texts": {"segmentation": [["a"] * 6]},
    "polygons that are none": {"segmentation": "everything"},
    "an RLE of another size": {"segmentation": {"size": [WIDTH, HEIGHT], "counts": [0, 240]}},
    "an RLE without counts": {"segmentation": {"size": [HEIGHT, WIDTH]}},
    "an empty RLE": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [240]}},
    "a short RLE": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [10, 10]}},
    "a negative RLE": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [250, -10]}},
    "an RLE of texts": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": ["a", "b"]}},
    "an RLE of null": {"segmentation": {"size": None, "counts": None}},
    "an id that is a list": {"id": [5], "bbox": [1, 1, 4, 4]},
    "a category that is a list": {"category_id": [5], "bbox": [1, 1, 4, 4]},
    "an id that is taken": {"id": 1, "bbox": [1, 1, 4, 4]},
}


def coco(*annotations, **changes) -> dict:
    image = {"id": 7, "file_name": "cat.png", "width": WIDTH, "height": HEIGHT}
    return {"images": [image], "annotations": list(annotations), **changes}


@pytest.fixture
def cat(tmp_path):
    return image_files(tmp_path / "photos", "cat.png")[0]


def gather(path, *photos) -> tuple[list[str], list[str]]:
    """Origins of the first image's regions, and what was refused."""
    sources, refused = open_sources([str(path)], photos), []
    regions = gather_regions(sources, photos[0], SIZE, refused=refused)
    return [region.origin for region in regions], refused


@pytest.mark.parametrize("wrong", DEGENERATE.values(), ids=DEGENERATE)
def test_a_degenerate_annotation_is_named_and_the_others_are_used(tmp_path, cat, wrong):
    bad = {"id": 99, "image_id": 7} | wrong
    path = write_json(tmp_path / "c.json", coco(GOOD, bad, ALSO_GOOD))
    found, refused = gather(path, cat)
    assert found == ["c.json#1", "c.json#2"]
    assert len(refused) == 1 and refused[0].startswith(f"c.json#{bad['id']}: expected ")


@pytest.mark.parametrize("bad", [5, None, {}, {"bbox": [0, 0, 0, 0]}, "x", [1, 2, 3], [[0, 0]]])
def test_a_degenerate_mask_of_a_list_is_named_and_the_others_are_used(tmp_path, cat, bad):
    path = write_json(tmp_path / "sam.json", [{"bbox": [1, 1, 4, 4]}, bad, [2, 2, 9, 9]])
    found, refused = gather(path, cat)
    assert found == ["sam.json#0", "sam.json#2"]
    assert len(refused) == 1 and refused[0].startswith("sam.json#1: expected ")


@pytest.mark.parametrize(
    "bad", [5, {}, {"id": 3}, {"image_id": [7]}, {"image_id": True}, {"image_id": "7"}]
)
def test_an_annotation_of_no_image_is_named_and_the_others_are_used(tmp_path, cat, bad):
    path = write_json(tmp_path / "c.json", coco(GOOD, bad))
    assert gather(path, cat) == (["c.json#1"], [])
    (source,) = open_sources([path], [cat])
    assert len(source.refused) == 1 and "c.json: expected" in source.refused[0]


@pytest.mark.parametrize("bad", [5, {}, {"id": [1], "file_name": "a.png"}, {"id": 8}])
def test_an_image_entry_that_is_none_is_named_and_the_others_are_used(tmp_path, cat, bad):
    content = coco(GOOD)
    content["images"].append(bad)
    path = write_json(tmp_path / "c.json", content)
    assert gather(path, cat)[0] == ["c.json#1"]
    assert len(open_sources([path], [cat])[0].refused) == 1


def test_an_image_id_that_two_images_have_gives_neither_its_regions(tmp_path):
    cat, dog, owl = image_files(tmp_path, "cat.png", "dog.png", "owl.png")
    images = [{"id": 7, "file_name": "cat.png"}, {"id": 7, "file_name": "dog.png"}]
    images.append({"id": 8, "file_name": "owl.png"})
    content = coco(GOOD, GOOD | {"id": 3, "image_id": 8}, images=images)
    (source,) = open_sources([write_json(tmp_path / "c.json", content)], [cat, dog, owl])
    assert [len(source.regions(p, SIZE)) for p in (cat, dog, owl)] == [0, 0, 1]
    assert source.refused == [
        "c.json: expected one image with the id 7, got ['cat.png', 'dog.png']"
    ]


def test_an_image_that_stands_twice_has_the_regions_of_both(tmp_path, cat):
    image = {"id": 7, "file_name": "cat.png"}
    content = coco(GOOD, GOOD | {"id": 5, "image_id": 8}, images=[image, image, image | {"id": 8}])
    assert gather(write_json(tmp_path / "c.json", content), cat) == (["c.json#1", "c.json#5"], [])


@pytest.mark.parametrize("kind", [CocoFile, AnnotationList])
def test_annotations_of_an_image_of_another_size_are_refused(tmp_path, cat, kind):
    content = coco(GOOD)
    content["images"][0] |= {"width": 2 * WIDTH, "height": 2 * HEIGHT}
    if kind is AnnotationList:
        content = {"image": content["images"][0], "annotations": [GOOD]}
    found, refused = gather(write_json(tmp_path / "c.json", content), cat)
    assert found == []
    assert "20x12 pixels in c.json, got 40x24" in refused[0]


def test_one_source_that_fails_does_not_cost_the_others(tmp_path, cat):
    masks = write_json(tmp_path / "m.json", [[1, 1, 4, 4]])
    wrong = save(tmp_path / "small.png", block(0, 0, 5, 5)[:5, :5])
    sources, refused = open_sources([masks, str(wrong)], [cat]), []
    assert len(gather_regions(sources, cat, SIZE, refused=refused)) == 1
    assert len(refused) == 1 and "small.png" in refused[0]


def test_the_largest_regions_are_chosen_among_those_that_can_be_used(tmp_path, cat):
    boxes = [[0, 0, 3, 3], [0, 0, 0, 0], [0, 0, 9, 9]]
    sources, refused = open_sources([write_json(tmp_path / "m.json", boxes)], [cat]), []
    (kept,) = gather_regions(sources, cat, SIZE, max_regions=1, refused=refused)
    assert kept.mask == [0, 0, 9, 9] and len(refused) == 1


# Encodings of JSON.


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_may_have_a_byte_order_mark_or_be_utf_16(tmp_path, cat, encoding):
    path = tmp_path / "c.json"
    path.write_bytes(json.dumps(coco(GOOD)).encode(encoding))
    assert gather(path, cat) == (["c.json#1"], [])


# Masks by name.


def test_the_masks_of_one_image_have_any_names(tmp_path, cat):
    for name in ("mask_0", "coffee_cup", "cat_1", "mask_10", "mask_9"):
        save(tmp_path / "masks" / f"{name}.png", block(1, 1, 5, 5))
    names = ["cat_1.png", "coffee_cup.png", "mask_0.png", "mask_9.png", "mask_10.png"]
    assert gather(tmp_path / "masks", cat) == (names, [])


def test_a_mask_named_after_another_image_beside_is_that_images(tmp_path):
    cat, _ = image_files(tmp_path / "photos", "cat.png", "dog.png")
    for name in ("dog_0", "cat_0", "spoon"):
        save(tmp_path / "masks" / f"{name}.png", block(1, 1, 5, 5))
    assert gather(tmp_path / "masks", cat) == (["cat_0.png", "spoon.png"], [])


def test_masks_of_no_image_are_named_with_the_rule(tmp_path):
    cat, dog = image_files(tmp_path / "photos", "cat.png", "dog.png")
    for name in ("dog_0", "mask_0", "coffee_cup"):
        save(tmp_path / "masks" / f"{name}.png", block(1, 1, 5, 5))
    (source,) = open_sources([str(tmp_path / "masks")], [cat, dog])
    note = source.unused_note()
    assert "2 masks in" in note and "coffee_cup.png, mask_0.png" in note
    assert "for cat.jpg cat.png, cat_0.png" in note


def test_masks_with_loss_alone_are_refused_and_named(tmp_path, cat):
    save(tmp_path / "masks" / "cat_0.jpg", block(1, 1, 5, 5))
    found, refused = gather(tmp_path / "masks", cat)
    assert found == [] and "without loss" in refused[0] and "cat_0.jpg" in refused[0]


def test_two_label_maps_for_one_image_are_refused(tmp_path, cat):
    from perceptiondlm.regions.sources import LabelMaps

    for suffix in ("png", "tif"):
        save(tmp_path / "labels" / f"cat.{suffix}", block(1, 1, 5, 5))
    with pytest.raises(ValueError, match="expected one label map for 'cat'.*cat.png, cat.tif"):
        LabelMaps(tmp_path / "labels").regions(cat, SIZE)


# Images of kinds that are not read.


@pytest.mark.parametrize("suffix", ["heic", "HEIF", "hif", "avif", "jxl", "jp2", "cr2", "svg"])
def test_an_image_of_any_kind_in_a_folder_is_not_passed_over(tmp_path, suffix):
    save(tmp_path / "a.png")
    (tmp_path / f"b.{suffix}").write_bytes(b"pixels")
    found = find_images([str(tmp_path)])
    assert [p.path.rsplit(".")[-1] for p in found] == ["png", suffix]


def test_heic_without_pillow_heif_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "readable_formats", lambda: ["PNG"])
    (tmp_path / "a.heic").write_bytes(b"pixels")
    with pytest.raises(ValueError, match="pip install pillow-heif"):
        files.open_image(str(tmp_path / "a.heic"))


def test_heic_is_read_with_pillow_heif(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 48), (200, 30, 40))
    heif.from_pillow(image).save(tmp_path / "a.heic", quality=100)
    read = files.open_image(str(tmp_path / "a.heic"))
    assert read.size == image.size
    assert np.abs(np.asarray(read, int) - np.asarray(image, int)).max() < 6


def test_whatever_a_decoder_raises_is_the_images_fault(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png")

    def broken(*_):
        raise IndexError("list index out of range")

    monkeypatch.setattr(files, "load_image", broken)
    with pytest.raises(ValueError, match="expected a readable image in .*a.png, got: IndexError"):
        files.open_image(str(path))


# The command as a whole.


def test_a_run_names_what_it_leaves_out_and_its_code_says_so(run, vectors, tmp_path, capsys):
    image = Image.open(vectors / "region_0.png")
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        image.save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "c.heic").write_bytes(b"no image")
    boxes = [[5, 5, 40, 40], [0, 0, 0, 0], [9, 9, 60, 60], [3, 3, 9, 9]]
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(["a.png", "b.png"])],
        "annotations": [{"id": k, "image_id": k % 2, "bbox": box} for k, box in enumerate(boxes)],
    }
    annotations, out = write_json(tmp_path / "in.json", content), tmp_path / "out.coco.json"
    assert run(tmp_path / "photos", "--masks", annotations, "--captions", out) == 1
    errors = capsys.readouterr().err
    assert "b.png: in.json#1: expected" in errors and "c.heic: expected" in errors
    assert "2 images done, 1 failed: c.heic; 1 regions left out" in errors
    assert [a["id"] for a in json.loads(out.read_text())["annotations"]] == [0, 2, 3]


def test_masks_that_match_no_image_are_explained(run, vectors, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        save(tmp_path / "photos" / name)
        save(tmp_path / "masks" / f"of_{name}", block(1, 1, 5, 5))
    assert run(tmp_path / "photos", "--masks", tmp_path / "masks") == 1
    errors = capsys.readouterr().err
    assert "of_a.png, of_b.png; masks are named after their image" in errors


def test_a_mask_of_the_unrotated_size_is_explained(run, tmp_path, capsys):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.new("RGB", SIZE, "red").save(tmp_path / "a.jpg", exif=exif)
    mask = save(tmp_path / "m.png", block(1, 1, 5, 5))
    assert run(tmp_path / "a.jpg", "--masks", mask) == 1
    assert "EXIF" in capsys.readouterr().err


def test_a_url_has_no_images_beside_it(tmp_path):
    save(tmp_path / "masks" / "cup.png", block(1, 1, 5, 5))
    web = ImageSource("https://example.com/cat.png", named=True)
    assert gather(tmp_path / "masks", web) == (["cup.png"], [])
