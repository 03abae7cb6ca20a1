"""The engine on what `caption-dataset` reads and writes: every region once, in every form."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scale_data
from perceptiondlm.image_loading import load_image
from perceptiondlm.image_masks import decode_rle, encode_rle
from perceptiondlm.pipelines import row_sources
from perceptiondlm.pipelines.captioners import Caption, CaptionRegions
from perceptiondlm.pipelines.engine import run_engine
from perceptiondlm.pipelines.recipe import build_recipe
from perceptiondlm.pipelines.records import mask_of
from perceptiondlm.pipelines.row_sources import LinesSource, RowsSource
from perceptiondlm.pipelines.writers import read_rows, read_tar, shards
from perceptiondlm.training.recipe import build_recipe as build_training_recipe
from perceptiondlm.training.run import train
from test_engine_runs import expect_counts, lines
from training_runs import losses_of, recipe_values

DRAWN = scale_data.draw(5)  # with 1, 2, 3, 1 and 2 regions
TOTAL = 9
FORMS = {
    "lines": lambda folder: {"path": scale_data.write_lines(folder, DRAWN)},
    "parquet, bytes": lambda folder: {"path": scale_data.write_parquet(folder, DRAWN)},
    "parquet, paths": lambda folder: {"path": scale_data.write_parquet(folder, DRAWN, False)},
    "webdataset": lambda folder: {"path": scale_data.write_tars(folder, DRAWN)},
    "coco": lambda folder: {"path": scale_data.write_coco(folder, DRAWN)},
    "datasets": lambda folder: {"path": scale_data.write_saved(folder, DRAWN)},
    "folder": lambda folder: {
        "path": scale_data.write_folder(folder, DRAWN),
        "masks": [str(folder / "masks")],
    },
}


def source_values(form: str, folder) -> dict:
    values = FORMS[form](folder)
    return {**values, "path": str(values["path"]), "kind": "rows"}


def recipe_of(folder, source: dict, **sections):
    output = {"folder": str(folder / "out"), "part_images": 2, "batch_images": 2, "card": False}
    values = {"branch": "sa1b", "captioner": {"kind": "model", "checkpoint": "played"}, **sections}
    values["output"] = {**output, **sections.get("output", {})}
    values = {name: options for name, options in values.items() if options is not None}
    return build_recipe({**values, "source": source})


def by_place(asked):
    """Captions a region by where it is, so that it says the same whenever it is asked about."""
    return [
        [Caption(f"A box from {where(mask)} on a ground of colors", -0.25) for mask in masks]
        for _, masks in asked
    ]


def where(mask) -> str:
    rows, columns = np.nonzero(mask)
    return f"{rows.min()} {columns.min()} to {rows.max()} {columns.max()}"


def truth() -> list[tuple[bytes, list[str]]]:
    """The pixels of each image, and where its regions are, in any order."""
    return sorted(
        (load_image(data).tobytes(), sorted(where(mask) for mask in masks)) for data, masks in DRAWN
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_region_of_every_form_goes_through_once(tmp_path, form):
    recipe = recipe_of(tmp_path, source_values(form, tmp_path / "data"))
    summary = run_engine(recipe, stages=[CaptionRegions(by_place)])
    expect_counts(summary, tmp_path / "out", TOTAL)
    assert summary["dropped"] == 0

    found = []
    for line in lines(tmp_path / "out" / "records.jsonl"):
        image = load_image(str(tmp_path / "out" / line["image"]))
        places = [where(decode_rle(rle, image.size)) for rle in line["mask_rles"]]
        captions = [f"A box from {place} on a ground of colors" for place in places]
        assert line["captions"] == captions
        found.append((image.tobytes(), sorted(places)))
    assert sorted(found) == truth()


@pytest.mark.parametrize("form", ["webdataset", "parquet, bytes"])
def test_a_run_over_files_of_many_images_goes_on(tmp_path, form):
    recipe = recipe_of(tmp_path, source_values(form, tmp_path / "data"))
    run_engine(recipe, stages=[CaptionRegions(by_place)])
    first = (tmp_path / "out" / "records.jsonl").read_bytes()
    (tmp_path / "out" / "parts" / "000001.json").unlink()
    asked = []
    stage = CaptionRegions(lambda images: asked.extend(images) or by_place(images))
    summary = run_engine(recipe, stages=[stage])
    assert len(asked) == 2  # of five
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == first
    expect_counts(summary, tmp_path / "out", TOTAL)


def test_equal_names_in_several_files_are_several_images(tmp_path):
    """Parquet's structs call images as their makers did: by names that are theirs alone."""
    rows = [
        {"image": {"bytes": data, "path": "0.png"}, "mask_rles": [encode_rle(m) for m in masks]}
        for data, masks in DRAWN
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    recipe = recipe_of(tmp_path, {"kind": "rows", "path": str(tmp_path / "rows.parquet")})
    run_engine(recipe, stages=[CaptionRegions(by_place)])
    names = [line["image"] for line in lines(tmp_path / "out" / "records.jsonl")]
    assert len(set(names)) == 5 and all(name.endswith(".png") for name in names)


# What rows say beside their masks.


def said_rows(folder, **changes) -> list[dict]:
    names = scale_data.write_images(folder, DRAWN[:2])
    return [
        {
            "image": name,
            "mask_rles": [encode_rle(m) for m in masks],
            "captions": [f"caption {k} of {name}" for k in range(len(masks))],
            "scores": [-0.5] * len(masks),
            "categories": ["box"] * len(masks),
            **changes,
        }
        for name, (_, masks) in zip(names, DRAWN, strict=False)
    ]


def write_jsonl(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_table(folder, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def write_saved(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("write", [write_jsonl, write_table, write_saved])
def test_captions_scores_and_categories_of_every_form_go_along(tmp_path, write):
    path = write(tmp_path, said_rows(tmp_path))
    images = str(tmp_path)
    source = RowsSource(str(path), images=images)
    records = [source.read(item) for item in source.items()]
    regions = [region for record in records for region in record.regions]
    assert [region.caption for region in regions] == [
        "caption 0 of i0.png",
        "caption 0 of i1.png",
        "caption 1 of i1.png",
    ]
    assert {(region.score, region.category) for region in regions} == {(-0.5, "box")}
    masks = [mask for _, own in DRAWN[:2] for mask in own]
    assert all((mask_of(r) == m).all() for r, m in zip(regions, masks, strict=True))


@pytest.mark.parametrize("name", ["captions", "scores", "categories"])
def test_a_row_with_too_few_values_is_broken(tmp_path, name):
    path = write_jsonl(tmp_path, said_rows(tmp_path, **{name: []}))
    source = RowsSource(str(path))
    dropped = [entry for item in source.items() for entry in source.read(item).dropped]
    assert {entry.rule for entry in dropped} == {"broken record"}
    assert f"expected {name} for each of 1 masks, got 0" in dropped[0].reason


def test_boxes_and_polygons_are_masks_and_what_is_wrong_is_named(tmp_path):
    scale_data.write_images(tmp_path, DRAWN[:1])
    masks = [{"box": [2, 3, 12, 9]}, {"polygons": [[1, 1, 9, 1, 9, 9]]}, {"box": [5, 5, 5, 5]}, 7]
    path = write_jsonl(tmp_path, [{"image": "i0.png", "masks": masks}])
    source = LinesSource(str(path))
    (record,) = [source.read(item) for item in source.items()]
    assert record.size == list(scale_data.SIZE)
    expected = np.zeros(scale_data.SIZE[::-1], bool)
    expected[3:9, 2:12] = True
    assert (mask_of(record.regions[0]) == expected).all() and len(record.regions) == 2
    assert {(e.region.key, e.rule) for e in record.dropped} == {
        ("2", "broken region"),
        ("3", "broken region"),
    }
    assert all(entry.reason.startswith("expected") for entry in record.dropped)


def test_crowds_of_coco_and_images_without_regions_are_dropped_by_name(tmp_path):
    path = scale_data.write_coco(tmp_path, DRAWN[:3])
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1  # the one of the first image
    content["annotations"] = content["annotations"][:3]  # none of the third
    path.write_text(json.dumps(content))
    recipe = recipe_of(tmp_path, {"kind": "rows", "path": str(path)})
    summary = run_engine(recipe, stages=[CaptionRegions(by_place)])
    expect_counts(summary, tmp_path / "out", 4)
    assert summary["stages"]["read"]["dropped"] == {"crowd": 1, "no regions": 1}
    assert summary["broken_images"] == 0


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (scale_data.write_lines, {"path": ""}, "expected source.path, got none"),
        (scale_data.write_lines, {"path": "none"}, "none"),
        (scale_data.write_images, {}, "expected source.masks with the images of"),
        (scale_data.write_sa1b, {}, "expected source.kind sa1b for"),
    ],
)
def test_sources_of_no_use_are_refused(tmp_path, write, options, message):
    write(tmp_path, DRAWN)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        RowsSource(**{"path": str(tmp_path), **options})


def test_a_panoptic_file_is_read_by_the_source_that_knows_crowds(tmp_path):
    path = scale_data.write_panoptic(tmp_path, DRAWN)
    with pytest.raises(ValueError, match="expected source.kind panoptic"):
        RowsSource(str(path))


def test_an_image_that_cannot_be_fetched_now_is_fetched_by_the_next_run(tmp_path, monkeypatch):
    rows = said_rows(tmp_path)
    rows[0]["image"] = "http://images.test/i0.png"
    recipe = recipe_of(
        tmp_path, {"kind": "rows", "path": str(write_jsonl(tmp_path, rows))}, captioner=None
    )

    def fetch(place):
        raise TimeoutError("no answer")

    monkeypatch.setattr(row_sources.places, "read_place", fetch)
    summary = run_engine(recipe)
    expect_counts(summary, tmp_path / "out", 3)
    assert summary["stages"]["read"]["dropped"] == {"call failed": 1}

    monkeypatch.setattr(row_sources.places, "read_place", lambda place: DRAWN[0][0])
    summary = run_engine(recipe)
    expect_counts(summary, tmp_path / "out", 3)
    assert summary["regions"] == 3


# Shards.


@pytest.mark.parametrize(
    ("form", "images"), [("parquet", "path"), ("parquet", "bytes"), ("webdataset", "bytes")]
)
def test_shards_hold_the_records_and_are_a_source_again(tmp_path, form, images):
    source = source_values("lines", tmp_path / "data")
    output = {"shards": form, "shard_images": images, "max_regions": 2}
    recipe = recipe_of(tmp_path, source, output=output)
    run_engine(recipe, stages=[CaptionRegions(by_place)])
    run_engine(recipe, stages=[CaptionRegions(by_place)])  # writes the same ones again

    records = lines(tmp_path / "out" / "records.jsonl")
    places = shards(str(tmp_path / "out"), "captions")
    assert len(places) == 3  # parts of 2, 2 and 1 images
    read = read_rows if form == "parquet" else read_tar
    rows = sorted((row for place in places for row in read(place)), key=lambda row: row["id"])
    assert [row["id"] for row in rows] == [
        *("rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:3#1"),
        *("rows.jsonl:4", "rows.jsonl:5"),
    ]
    for row, line in zip(rows, records, strict=True):
        assert row["captions"] == line["captions"] and row["scores"] == line["scores"]
        assert row["mask_rles"] == line["mask_rles"] and row["labels"] == line["categories"]
        own = (tmp_path / "out" / line["image"]).read_bytes()
        assert row["image"] == (own if images == "bytes" else line["image"])
        assert row["provenance"]["model"] == "played"

    again = {
        "kind": "rows",
        "path": str(tmp_path / "out" / "captions"),
        "images": str(tmp_path / "out"),
    }
    output = {"folder": str(tmp_path / "again"), "card": False}
    second = recipe_of(tmp_path, again, captioner=None, output=output)
    summary = run_engine(second)
    expect_counts(summary, tmp_path / "again", TOTAL)
    assert summary["regions"] == TOTAL
    captions = {text for line in records for text in line["captions"]}
    kept = lines(tmp_path / "again" / "records.jsonl")
    assert {text for line in kept for text in line["captions"]} == captions


def test_training_reads_the_shards_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    output = {"shards": "parquet", "shard_images": "bytes", "part_images": 9}
    recipe = recipe_of(tmp_path, source_values("lines", tmp_path / "data"), output=output)
    run_engine(recipe, stages=[CaptionRegions(by_place)])
    values = recipe_values(tmp_path / "run", trainer={"max_steps": 2})
    (shard,) = shards(str(tmp_path / "out"), "captions")
    values["data"] = {"kind": "regions", "files": [shard], "max_broken_share": 0.0}
    assert len(losses_of(train(build_training_recipe(values)))) == 2


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"shards": "csv"}, "output.shards to be one of parquet, webdataset"),
        ({"shards": "parquet", "shard_images": "link"}, "output.shard_images to be one of"),
        ({"shards": "webdataset"}, "expected output.shard_images bytes with webdataset"),
        ({"shard_images": "bytes"}, "expected output.shard_images only with output.shards"),
    ],
)
def test_shards_of_no_form_are_refused(tmp_path, output, message):
    source = source_values("lines", tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        recipe_of(tmp_path, source, output=output)


def test_bytes_have_no_path_to_train_from(tmp_path):
    source = source_values("parquet, bytes", tmp_path / "data")
    recipe = recipe_of(tmp_path, source, output={"images": "path"})
    with pytest.raises(ValueError, match="expected images with paths of their own"):
        run_engine(recipe, stages=[CaptionRegions(by_place)])
