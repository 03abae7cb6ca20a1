"""The captioning stage and the shards, without a scheduler."""

import io
import json

import numpy as np
import pytest
import scale_data
from perceptiondlm.common.loading import load_model
from perceptiondlm.image_loading import load_image, load_mask
from perceptiondlm.image_masks import encode_rle
from perceptiondlm.pipelines import writers
from perceptiondlm.pipelines.captioning_stage import CaptionImages, CaptionOptions, Decoded, pack
from perceptiondlm.pipelines.writers import ShardWriter, read_rows, read_tar, settle, shards
from shapes import ROOT, SHAPES

pytest.importorskip("pyarrow")
DECODING = {"caption_length": 6}


@pytest.fixture(scope="module")
def stage():
    options = CaptionOptions(str(ROOT), SHAPES, device="cpu", batch_regions=4, decoding=DECODING)
    return CaptionImages(options)


def row_of(name: str, data: bytes, masks: list) -> dict:
    row = {"id": name, "image": name, "location": None, "data": data, "masks": masks}
    return {**row, "labels": [None] * len(masks), "problems": [], "read_seconds": 0.0}


def rows_of(drawn) -> list[dict]:
    return [
        row_of(f"i{i}", data, [encode_rle(mask) for mask in masks])
        for i, (data, masks) in enumerate(drawn)
    ]


def test_captions_are_those_of_the_model_alone(stage):
    drawn = scale_data.draw(5)
    model, processor = load_model(ROOT, SHAPES, device="cpu")
    for row, (data, masks) in zip(stage(rows_of(drawn)), drawn, strict=True):
        alone = model.diffusion_generate(
            load_image(data),
            [load_mask(m, scale_data.SIZE) for m in masks],
            processor=processor,
            **DECODING,
        )
        assert row["captions"] == alone.texts[0]
        assert row["scores"] == pytest.approx(alone.scores[0], abs=1e-5)
        assert row["mask_rles"] == [encode_rle(mask) for mask in masks]
        assert row["problems"] == []


def test_what_is_broken_is_named_and_the_rest_captioned(stage):
    ((data, masks),) = scale_data.draw(1)
    good = encode_rle(masks[0])
    empty = encode_rle(np.zeros_like(masks[0]))
    rows = stage(
        [
            row_of("cut", data[:60], [good]),
            row_of("some", data, [empty, good, {"size": [1, 1], "counts": "1"}]),
            row_of("none", data, []),
            row_of("all", data, [empty]),
            row_of("fine", data, [good]),
        ]
    )
    kinds = [[(p["kind"], p["region"]) for p in row["problems"]] for row in rows]
    assert kinds[0] == [("image", None)]
    assert kinds[1] == [("mask", 0), ("mask", 2)]
    assert kinds[2] == [("no regions", None)]
    assert kinds[3] == [("mask", 0), ("regions", None)]
    assert [len(row["captions"]) for row in rows] == [0, 1, 0, 0, 1]
    assert rows[1]["mask_rles"] == [good]


def test_an_image_that_fails_in_a_batch_spoils_no_other(stage, monkeypatch):
    generate = stage.model.diffusion_generate

    def fail_on_three(images, masks, *rest, **options):
        if any(len(own) == 3 for own in masks):
            raise RuntimeError("out of\nmemory")
        return generate(images, masks, *rest, **options)

    monkeypatch.setattr(stage.model, "diffusion_generate", fail_on_three)
    rows = stage(rows_of(scale_data.draw(3)))
    assert [len(row["captions"]) for row in rows] == [1, 2, 0]
    assert rows[2]["problems"][0]["reason"] == "RuntimeError: out of memory"


def test_batches_hold_about_as_many_regions_as_asked():
    counts = [3, 1, 2, 9, 1, 4, 2, 1]
    decoded = [Decoded({}, None, [{}] * count) for count in counts]
    batches = [[len(one.rles) for one in batch] for batch in pack(decoded, 6)]
    assert sorted(sum(batches, [])) == sorted(counts)
    assert all(sum(batch) <= 6 or len(batch) == 1 for batch in batches)
    assert len(batches) <= 5


# Shards.


def captioned(name: str, problems=(), count: int = 1) -> dict:
    ((data, masks),) = scale_data.draw(1)
    row = row_of(name, data, [])
    row |= {"mask_rles": [encode_rle(masks[0])] * count, "captions": ["a"] * count}
    row |= {"scores": [-0.5] * count, "labels": [None] * count, "weights": "w"}
    row |= {"decode_seconds": 0.0, "caption_seconds": 0.0}
    return {**row, "problems": [{"region": None, "reason": "r", **p} for p in problems]}


def writer(folder, kind: str, with_bytes: bool = True) -> ShardWriter:
    for name in ("captions", "errors"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return ShardWriter(str(folder), kind, with_bytes, {"model": "m", "options": "{}"})


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_what_stands_in_two_shards_is_left_in_one(kind, tmp_path):
    write = writer(tmp_path, kind)
    write([captioned("a"), captioned("b", count=2)])
    write([captioned("b", count=2), captioned("c")])
    write([captioned("c")])
    contents = settle(str(tmp_path))
    assert (contents.done, contents.images, contents.regions) == ({"a", "b", "c"}, 3, 4)
    read = read_rows if kind == "parquet" else read_tar
    rows = [row for place in shards(str(tmp_path), "captions") for row in read(place)]
    assert sorted(row["id"] for row in rows) == ["a", "b", "c"]
    assert all(load_image(row["image"]).size == scale_data.SIZE for row in rows)
    assert settle(str(tmp_path)) == contents


def test_a_task_that_runs_again_writes_the_same_shard(tmp_path):
    write = writer(tmp_path, "parquet")
    for _ in range(2):
        write([captioned("a"), captioned("b")])
    assert len(shards(str(tmp_path), "captions")) == 1


def test_errors_end_up_in_one_file_each_once(tmp_path):
    write = writer(tmp_path, "parquet", with_bytes=False)
    broken = captioned("b", [{"kind": "image"}], count=0)
    write([captioned("a", [{"kind": "mask", "region": 3}]), broken])
    write([broken])
    write([captioned("c", [{"kind": "caption"}], count=0)])
    write([captioned("c")])  # captioned after all
    contents = settle(str(tmp_path))
    assert contents.done == {"a", "b", "c"}
    assert contents.errors == {"mask": 1, "image": 1}
    rows = read_rows(f"{tmp_path}/errors.parquet")
    assert [(row["id"], row["region"]) for row in rows] == [("a", 3), ("b", None)] or len(rows) == 2
    assert shards(str(tmp_path), "errors") == []
    assert settle(str(tmp_path)).errors == contents.errors

    assert settle(str(tmp_path), retry_errors=True).done == {"a", "c"}


def test_a_region_of_an_image_that_is_not_done_is_tried_again_with_it(tmp_path):
    """A run was killed between the two files of a shard."""
    write = writer(tmp_path, "parquet", with_bytes=False)
    write([captioned("a", [{"kind": "mask", "region": 0}])])
    for place in shards(str(tmp_path), "captions"):
        writers.places.remove_place(place)
    contents = settle(str(tmp_path))
    assert contents.done == set() and contents.errors == {}


def test_a_tar_reads_as_webdataset_reads_it(tmp_path):
    """Members of one sample are neighbors, and begin with one key up to the first dot."""
    import tarfile

    writer(tmp_path, "webdataset")([captioned("x/a.b"), captioned("c")])
    (place,) = shards(str(tmp_path), "captions")
    with tarfile.open(place) as tar:
        names = [name for name in tar.getnames() if "." in name]
        texts = [json.loads(tar.extractfile(n).read()) for n in names if n.endswith(".json")]
        images = [load_image(io.BytesIO(tar.extractfile(n).read()).getvalue()) for n in names[::2]]
    assert [name.split(".")[1] for name in names] == ["png", "json"] * 2
    assert names[0].split(".")[0] == names[1].split(".")[0]
    assert [text["id"] for text in texts] == ["x/a.b", "c"]
    assert [image.size for image in images] == [scale_data.SIZE] * 2
