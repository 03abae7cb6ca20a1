"""Every kind of source gives each region once, with the very mask that was written."""

import json
import tarfile

import numpy as np
import pytest
import scale_data
from perceptiondlm.image_loading import load_mask
from perceptiondlm.pipelines.captioning_stage import decode_image, open_row
from perceptiondlm.pipelines.open_sources import open_source
from PIL import Image

pytest.importorskip("pyarrow")
KINDS = ("folder", "lines", "parquet", "tars", "coco", "sa1b", "saved", "glob", "url", "paths")


def make(kind: str, folder, drawn):
    """Writes the images as a kind of source, and opens it."""
    if kind == "folder":
        place = scale_data.write_folder(folder, drawn)
        return open_source(str(place), masks=[str(folder / "masks")])
    if kind == "glob":
        scale_data.write_lines(folder / "a", drawn)
        return open_source(f"{folder}/*/*.jsonl")
    if kind == "url":
        return open_source(f"file://{scale_data.write_lines(folder / 'a', drawn)}")
    if kind == "paths":
        return open_source(str(scale_data.write_parquet(folder / "a", drawn, with_bytes=False)))
    if kind == "saved":
        pytest.importorskip("datasets")
    place = getattr(scale_data, f"write_{kind}")(folder / "a", drawn)
    return open_source(str(place))


def rows_of(source, with_bytes: bool = False) -> list[dict]:
    listed = [row for part in source.parts(3) for row in source.rows(part)]
    plain = [{**row, "entry": json.dumps(row["entry"])} for row in listed]
    return [open_row(source, row, with_bytes) for row in plain]


def signature(image, masks) -> tuple:
    """What an image with masks looks like, whatever it is called."""
    pixels = np.asarray(image).tobytes()
    return pixels, tuple(np.asarray(load_mask(m, image.size)).astype(bool).tobytes() for m in masks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_has_each_image_and_each_region_once(kind, tmp_path):
    drawn = scale_data.draw(7)
    source = make(kind, tmp_path, drawn)
    rows = rows_of(source)
    assert not [row["problems"] for row in rows if row["problems"]]
    found = sorted(signature(decode_image(r["location"], r["data"]), r["masks"]) for r in rows)
    assert found == sorted(signature(decode_image(None, d), masks) for d, masks in drawn)
    assert len({row["id"] for row in rows}) == len(drawn)
    assert [row["id"] for row in rows_of(source)] == [row["id"] for row in rows]  # stable


def test_panoptic_segments_are_regions(tmp_path):
    drawn = scale_data.draw(5)
    rows = rows_of(open_source(str(scale_data.write_panoptic(tmp_path, drawn))))
    for row, (_, masks) in zip(rows, drawn, strict=True):
        covered = sum(np.asarray(load_mask(m, scale_data.SIZE)).astype(bool) for m in row["masks"])
        assert (covered == np.any(masks, axis=0)).all()  # each pixel in one segment
        assert set(row["labels"]) == {"box"}


def test_a_panoptic_png_that_is_none_of_colors_is_a_problem_of_its_image(tmp_path):
    place = scale_data.write_panoptic(tmp_path, scale_data.draw(2))
    deep = np.full(scale_data.SIZE[::-1], 300, np.uint16)
    Image.fromarray(deep).save(tmp_path / "panoptic/i0.png")  # 16 bits, which 8 would cut off
    broken, whole = rows_of(open_source(str(place)))
    assert [problem["kind"] for problem in broken["problems"]] == ["read"]
    assert "segment ids as colors in i0.png" in broken["problems"][0]["reason"]
    assert not whole["problems"]


def test_bytes_are_those_of_the_file(tmp_path):
    drawn = scale_data.draw(3)
    rows = rows_of(make("lines", tmp_path, drawn), with_bytes=True)
    assert [row["data"] for row in rows] == [data for data, _ in drawn]


def test_broken_rows_are_named_and_the_others_stay(tmp_path):
    path = scale_data.write_lines(tmp_path, scale_data.draw(3))
    good = path.read_text()
    bad = ["{", "[]", '{"image": "../../etc/passwd", "mask_rles": []}', '{"mask_rles": []}']
    path.write_text("\n".join(bad) + "\n" + good)
    rows = rows_of(open_source(str(path)))
    assert [bool(row["problems"]) for row in rows] == [True] * 4 + [False] * 3
    assert all("expected" in row["problems"][0]["reason"] for row in rows[:4])


def test_coco_annotations_of_no_image_are_named(tmp_path):
    path = scale_data.write_coco(tmp_path, scale_data.draw(2))
    content = json.loads(path.read_text())
    content["annotations"].append({"id": 9, "image_id": 999, "bbox": [1, 1, 4, 4]})
    path.write_text(json.dumps(content))
    rows = rows_of(open_source(str(path)))
    assert len(rows) == 3 and rows[-1]["problems"][0]["kind"] == "read"


def test_a_tar_that_has_no_image_for_a_sample_names_it(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        (tmp_path / "x.json").write_text("{}")
        tar.add(tmp_path / "x.json", "x.json")
    (row,) = rows_of(open_source(str(tmp_path / "a.tar")))
    assert "expected one image" in row["problems"][0]["reason"]


@pytest.mark.parametrize("other", ["rows.jsonl", "a.tar", "a.parquet", "sa_1.json"])
def test_a_folder_of_several_kinds_is_refused(other, tmp_path):
    scale_data.write_images(tmp_path, scale_data.draw(2))
    (tmp_path / other).write_text("{}")
    with pytest.raises(ValueError, match="expected one kind of source"):
        open_source(str(tmp_path))


def test_places_without_anything_are_refused(tmp_path):
    for place in (tmp_path, tmp_path / "not", tmp_path / "*.tar"):
        with pytest.raises(FileNotFoundError, match="expected"):
            open_source(str(place))
    with pytest.raises(ValueError, match="fsspec"):
        open_source("nowhere://bucket/a.tar")


def test_options_without_a_use_are_refused(tmp_path):
    scale_data.write_tars(tmp_path, scale_data.draw(2))
    with pytest.raises(ValueError, match="expected no --masks"):
        open_source(f"{tmp_path}/*.tar", masks=["m"])
