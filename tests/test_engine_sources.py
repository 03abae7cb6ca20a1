"""Records out of SA-1B's, COCO panoptic's and ParaCaption's files, and what is broken in them."""

import json
import pickle
import re

import numpy as np
import pytest
from engine_data import record_of, rectangle, rules, write_panoptic, write_sa1b
from perceptiondlm.image_masks import encode_rle
from perceptiondlm.pipelines.records import Record, mask_of
from perceptiondlm.pipelines.row_sources import LinesSource
from perceptiondlm.pipelines.sources import PanopticSource, Sa1bSource, plain_rle
from perceptiondlm.scenes.shapes import render_scene
from PIL import Image
from pycocotools import mask as coco


def read_all(source) -> list[Record]:
    return [source.read(item) for item in source.items()]


def edited(path, change):
    """Changes a JSON file's content in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_sa1b_gives_every_annotation_with_its_scores(tmp_path):
    write_sa1b(tmp_path / "deep", [0, 1])
    records = read_all(Sa1bSource(str(tmp_path)))
    assert [record.key for record in records] == ["deep/sa_0", "deep/sa_1"]
    for seed, record in enumerate(records):
        scene = render_scene(seed)
        assert record.name == f"deep/sa_{seed}.jpg" and tuple(record.size) == scene.image.size
        assert all(region.stability == 0.98 for region in record.regions)
        for region, thing in zip(record.regions, scene.objects, strict=True):
            assert (mask_of(region) == thing.mask).all()


def test_panoptic_gives_every_segment_with_its_category(tmp_path):
    count = write_panoptic(tmp_path, [0, 1, 2])
    source = PanopticSource(
        str(tmp_path / "panoptic.json"), str(tmp_path / "masks"), str(tmp_path / "images")
    )
    records = read_all(pickle.loads(pickle.dumps(source)))
    assert sum(len(record.regions) for record in records) == count
    for seed, record in enumerate(records):
        things = render_scene(seed).objects
        shapes = [thing.attributes["shape"] for thing in things]
        assert [region.category for region in record.regions] == shapes
        assert all(
            (mask_of(region) == thing.mask).all()
            for region, thing in zip(record.regions, things, strict=True)
        )


def test_crowds_and_if_not_wanted_stuff_are_dropped(tmp_path):
    write_panoptic(tmp_path, [0])

    def change(content):
        content["annotations"][0]["segments_info"][0]["iscrowd"] = 1
        used = content["annotations"][0]["segments_info"][1]["category_id"]
        content["categories"][used - 1]["isthing"] = 0
        content["annotations"][0]["segments_info"].append({"id": 5, "category_id": 1})

    edited(tmp_path / "panoptic.json", change)
    folders = [str(tmp_path / name) for name in ("panoptic.json", "masks", "images")]
    (record,) = read_all(PanopticSource(*folders))
    assert set(rules(record).values()) == {"crowd", "broken region"}  # the last one is empty
    (record,) = read_all(PanopticSource(*folders, stuff=False))
    assert "stuff" in rules(record).values()


def test_lines_give_captions_categories_and_scores(tmp_path):
    masks = [encode_rle(rectangle((9, 7), k, k, k + 2, k + 2)) for k in range(2)]
    values = {"image": "a.png", "mask_rles": masks, "captions": ["x", None], "scores": [1, None]}
    (tmp_path / "data.jsonl").write_text(json.dumps(values) + "\n")
    (record,) = read_all(LinesSource(str(tmp_path / "data.jsonl")))
    assert (record.key, record.size) == ("data.jsonl:1", [9, 7])
    assert [(r.caption, r.score, r.category) for r in record.regions] == [
        ("x", 1, None),
        (None, None, None),
    ]


def break_mask(content):
    content["annotations"][0]["segmentation"]["counts"] = "zzz"


def break_size(content):
    content["annotations"][0]["segmentation"]["size"] = [3, 3]


def break_polygon(content):
    content["annotations"][0]["segmentation"] = [[0, 0, 1, 1, 2, 2]]


def break_score(content):
    content["annotations"][0]["stability_score"] = "high"


def break_id(content):
    content["annotations"][0]["id"] = content["annotations"][1]["id"]


def break_entry(content):
    content["annotations"][0] = 7


@pytest.mark.parametrize(
    "change", [break_mask, break_size, break_polygon, break_score, break_id, break_entry]
)
def test_a_broken_annotation_is_dropped_and_the_others_stay(tmp_path, change):
    count = write_sa1b(tmp_path, [0])["sa_0"]
    edited(tmp_path / "sa_0.json", change)
    (record,) = read_all(Sa1bSource(str(tmp_path)))
    (entry,) = record.dropped
    assert (entry.stage, entry.rule) == ("read", "broken region") and "expected" in entry.reason
    assert len(record.regions) == count - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("image"), "expected a field 'image', got none"),
        (lambda c: c["image"].update(width=0), "expected width as a number of pixels, got 0"),
        (lambda c: c["image"].update(file_name="../x.jpg"), "name of a file inside"),
        (lambda c: c.update(annotations={}), "expected a list of annotations, got dict"),
    ],
)
def test_a_broken_file_is_one_dropped_region_and_names_the_file(tmp_path, change, message):
    write_sa1b(tmp_path, [0])
    edited(tmp_path / "sa_0.json", change)
    (record,) = read_all(Sa1bSource(str(tmp_path)))
    (entry,) = record.dropped
    assert entry.rule == "broken record" and record.regions == []
    assert message in entry.reason and "sa_0.json" in entry.reason


def test_a_torn_line_is_named_and_the_next_one_is_read(tmp_path):
    good = json.dumps({"image": "a", "mask_rles": [encode_rle(np.ones((2, 2)))]})
    (tmp_path / "data.jsonl").write_text('{"image": "a"\n' + good + "\n")
    first, second = read_all(LinesSource(str(tmp_path / "data.jsonl")))
    assert "line 1" in first.dropped[0].reason and len(second.regions) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"].clear(), "expected the image of an annotation"),
        (lambda c: c["annotations"][0].pop("segments_info"), "expected a field 'segments_info'"),
        (lambda c: c["images"][0].update(width=5), "expected segments of 5x"),
        (lambda c: c["annotations"][0].update(file_name="x.png"), "x.png"),
    ],
)
def test_a_broken_panoptic_entry_is_named(tmp_path, change, message):
    write_panoptic(tmp_path, [0])
    edited(tmp_path / "panoptic.json", change)
    folders = [str(tmp_path / name) for name in ("panoptic.json", "masks", "images")]
    (record,) = read_all(PanopticSource(*folders))
    assert re.search(message, record.dropped[0].reason)


def test_run_lengths_of_every_form_become_text():
    mask = rectangle((5, 4), 1, 1, 3, 3)
    plain = encode_rle(mask)
    counted = {"size": [4, 5], "counts": [5, 2, 2, 2, 9]}
    as_bytes = {"size": [4, 5], "counts": plain["counts"].encode()}
    for rle in (plain, counted, as_bytes):
        assert plain_rle(rle, [5, 4]) == plain
    found = {**plain, "counts": plain["counts"].encode()}
    assert (coco.decode(found) == mask).all()


def test_records_survive_as_plain_values_and_pickled():
    mask = rectangle((9, 9), 1, 1, 5, 5)
    record = record_of(mask, mask, caption=["x", "y"])
    record.drop("texts", "short", {"b": "why"})
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert pickle.loads(pickle.dumps(record)) == record


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Sa1bSource(str(p / "none")), "expected a folder as source.path"),
        (lambda p: LinesSource(str(p / "none")), "expected a file of JSON lines"),
        (lambda p: PanopticSource("x", str(p), str(p)), "expected a panoptic JSON file"),
        (
            lambda p: list(Sa1bSource(str(p)).items()),
            r"expected sa_\*.json files in .*, found none",
        ),
    ],
)
def test_sources_that_are_not_there_are_refused(tmp_path, make, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        make(tmp_path)


def test_an_image_of_16_bits_is_no_panoptic_file(tmp_path):
    """Its ids would be cut to 8 bits without a word."""
    write_panoptic(tmp_path, [0])
    size = Image.open(tmp_path / "masks" / "0.png").size
    Image.new("I;16", size).save(tmp_path / "masks" / "0.png")
    folders = [str(tmp_path / name) for name in ("panoptic.json", "masks", "images")]
    (record,) = read_all(PanopticSource(*folders))
    assert "expected segment ids as colors" in record.dropped[0].reason
