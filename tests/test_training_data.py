"""Data files to samples: partitions, conversations, broken records, streams."""

import json
import logging
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from llada_v_models import maker
from perceptiondlm.scenes.shapes import render_scene
from perceptiondlm.training.broken import BrokenRecords, TooManyBroken
from perceptiondlm.training.conversations import ConversationSamples
from perceptiondlm.training.datasets import FileDataset, StreamDataset
from perceptiondlm.training.recipe_sections import ConversationData, MaskingRecipe, RegionData
from perceptiondlm.training.records import open_records
from perceptiondlm.training.regions import RegionSamples, partition
from perceptiondlm.training.sampler import EpochSampler
from perceptiondlm.training.samples import DiffusionCollator
from perceptiondlm.training.synthetic import encode_scene
from pycocotools import mask as coco
from torch.utils.data import DataLoader


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def processor(make):
    return make(num_region_prompts=3, roi_convention="aligned")[1]


def rle(mask: np.ndarray) -> dict:
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}


def test_polygons_of_a_record_are_cocos(processor, folder):
    polygon = [3.0, 4.0, 41.3, 7.2, 35.1, 40.9, 8.4, 30.0]
    (encoded,) = coco.frPyObjects([polygon], 48, 48)
    as_rle = {"size": [48, 48], "counts": encoded["counts"].decode("ascii")}
    boxes = []
    for mask in ([polygon], {"polygons": [polygon]}, as_rle):
        made = processor.image_processor([str(folder / "0.jpg")], [[mask]])
        boxes.append((made["boxes"].tolist(), made["region_patches"].tolist()))
    assert boxes[0] == boxes[1] == boxes[2]


def squares(count: int, size: int = 48) -> list[np.ndarray]:
    """Squares of distinct areas, the smallest first."""
    masks = []
    for k in range(count):
        mask = np.zeros((size, size), np.uint8)
        mask[k : 2 * k + 4, k : 2 * k + 4] = 1
        masks.append(mask)
    return masks


def region_record(name: str, count: int) -> dict:
    return {
        "image": name,
        "mask_rles": [rle(mask) for mask in squares(count)],
        "captions": [f"region {k}" for k in range(count)],
    }


@pytest.fixture
def folder(tmp_path, draw_image):
    for k in range(4):
        draw_image(48, 48, seed=k).save(tmp_path / f"{k}.jpg")
    return tmp_path


def write_lines(path, records) -> str:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def region_set(processor, files, seed=0, share=0.0, **options) -> FileDataset:
    data = RegionData(files=files, caption_length=6, **options)
    return FileDataset(files, RegionSamples(processor, data, seed=seed), share, seed)


def captions_of(processor, sample) -> list[str]:
    labels = np.array(sample.sequence.labels)
    regions = np.array(sample.sequence.regions)
    chosen = [labels[(regions == k) & (labels >= 0)] for k in range(max(regions) + 1)]
    return [
        processor.decode_answer([t for t in ids if t not in markers(processor)]) for ids in chosen
    ]


def markers(processor) -> list[int]:
    return [processor._token_id(processor.caption_token.format(k)) for k in range(6)]


@pytest.mark.parametrize("count, most", [(1, 6), (6, 6), (7, 6), (13, 4), (20, 3)])
def test_a_partition_holds_every_mask_once_in_as_few_groups_as_possible(count, most):
    groups = partition(count, most, np.random.default_rng(count))
    assert sorted(k for group in groups for k in group) == list(range(count))
    assert len(groups) == -(-count // most)
    assert max(map(len, groups)) <= most
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_an_epoch_captions_every_mask_of_every_image_once(folder, processor):
    records = [region_record("0.jpg", 7), region_record("1.jpg", 2)]
    files = [write_lines(folder / "a.jsonl", records)]
    dataset = region_set(processor, files)
    for epoch in (0, 1):
        samples = [dataset[epoch * len(dataset) + i] for i in range(len(dataset))]
        texts = [text for sample in samples for text in captions_of(processor, sample)]
        expected = [f"region {k}" for k in range(7)] + ["region 0", "region 1"]
        assert sorted(texts) == sorted(expected)


def test_the_partition_changes_with_the_epoch_and_the_seed(folder, processor):
    files = [write_lines(folder / "a.jsonl", [region_record("0.jpg", 9)])]

    def first_epochs(seed):
        dataset = region_set(processor, files, seed=seed)
        return [tuple(captions_of(processor, dataset[e * len(dataset)])) for e in range(4)]

    assert len(set(first_epochs(0))) > 1
    assert first_epochs(0) == first_epochs(0)
    assert first_epochs(0) != first_epochs(1)


def test_captions_follow_their_masks_in_area_order(folder, processor):
    files = [write_lines(folder / "a.jsonl", [region_record("0.jpg", 3)])]
    sample = region_set(processor, files)[0]
    assert captions_of(processor, sample) == ["region 2", "region 1", "region 0"]
    widths = sample.features["boxes"][:, 2] - sample.features["boxes"][:, 0]
    assert widths.tolist() == sorted(widths.tolist(), reverse=True)


def test_prompts_are_permuted_and_boxes_are_not(folder, processor):
    files = [write_lines(folder / "a.jsonl", [region_record("0.jpg", 3)])]
    dataset = region_set(processor, files)
    plain = RegionSamples(processor, RegionData(files=files), permute_prompts=False)
    dataset_in_order = FileDataset(files, plain, 0.0)
    fixed = dataset_in_order[0].features
    seen = set()
    for epoch in range(6):
        features = dataset[epoch].features
        assert torch.equal(features["boxes"], fixed["boxes"])
        order = tuple(
            next(
                p
                for p in range(3)
                if torch.equal(features["region_patches"][:, p], fixed["region_patches"][:, k])
            )
            for k in range(3)
        )
        seen.add(order)
    assert len(seen) > 1


def test_coco_annotations_make_the_same_samples_as_records(folder, processor):
    record = region_record("0.jpg", 3)
    content = {
        "images": [{"id": 5, "file_name": "0.jpg"}],
        "annotations": [
            {"image_id": 5, "segmentation": m, "caption": c}
            for m, c in zip(record["mask_rles"], record["captions"], strict=True)
        ],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    (folder / "list.json").write_text(json.dumps([record]))
    one = region_set(processor, [str(folder / "coco.json")])[0]
    other = region_set(processor, [str(folder / "list.json")])[0]
    assert one.sequence == other.sequence
    assert torch.equal(one.features["boxes"], other.features["boxes"])


BROKEN_ANNOTATIONS = {
    "no segmentation": {"image_id": 2, "caption": "x"},
    "an image there is none of": {"image_id": 77, "segmentation": [], "caption": "x"},
    "no image": {"segmentation": [], "caption": "x"},
    "a list as image": {"image_id": [2], "segmentation": [], "caption": "x"},
    "no object": "x",
    "no caption": {"image_id": 2, "segmentation": rle(squares(1)[0])},
}


@pytest.mark.parametrize("kind", BROKEN_ANNOTATIONS)
def test_a_broken_annotation_of_coco_breaks_its_image_alone(folder, processor, caplog, kind):
    mask = rle(squares(1)[0])
    good = [{"image_id": k, "segmentation": mask, "caption": f"region {k}"} for k in (0, 1, 2)]
    images = [{"id": k, "file_name": f"{k}.jpg"} for k in range(3)]
    content = {"images": images, "annotations": [*good, BROKEN_ANNOTATIONS[kind]]}
    (folder / "coco.json").write_text(json.dumps(content))
    dataset = region_set(processor, [str(folder / "coco.json")], share=0.5)
    texts = {text for i in range(len(dataset)) for text in captions_of(processor, dataset[i])}
    assert {"region 0", "region 1"} <= texts
    assert dataset.broken.count == 1
    (line,) = [r.getMessage() for r in caplog.records if "broken record" in r.getMessage()]
    assert "coco.json, record " in line
    assert "annotations[3]" in line or "a caption for each of 2 masks" in line


@pytest.mark.parametrize("image", [{}, {"id": 9}, {"file_name": "x.jpg"}, None, {"id": [1]}])
def test_a_broken_image_of_coco_is_a_broken_record(folder, processor, image):
    good = {"id": 0, "file_name": "0.jpg"}
    annotation = {"image_id": 0, "segmentation": rle(squares(1)[0]), "caption": "region 0"}
    content = {"images": [good, image], "annotations": [annotation]}
    (folder / "coco.json").write_text(json.dumps(content))
    dataset = region_set(processor, [str(folder / "coco.json")], share=0.5)
    assert [captions_of(processor, dataset[i]) for i in range(2)] == [["region 0"]] * 2
    assert dataset.broken.count == 1


def test_whatever_a_record_raises_is_its_own_fault(folder, processor, caplog, monkeypatch):
    file = write_lines(folder / "a.jsonl", [region_record(f"{k}.jpg", 1) for k in range(3)])
    dataset = region_set(processor, [file], share=0.5)
    make = dataset.maker.make

    def fail(record, *args):
        if record.key[1] == 2:
            raise ZeroDivisionError("division by zero")
        return make(record, *args)

    monkeypatch.setattr(dataset.maker, "make", fail)
    assert len([dataset[i] for i in range(3)]) == 3
    (line,) = [r.getMessage() for r in caplog.records if "broken record" in r.getMessage()]
    assert f"{file}, line 2: ZeroDivisionError: division by zero" in line


def test_a_damaged_table_is_named(folder, processor):
    (folder / "a.parquet").write_bytes(b"PAR1 not a table PAR1")
    with pytest.raises(ValueError, match="readable data files, got .*a.parquet"):
        region_set(processor, [str(folder / "a.parquet")])


def test_an_arrow_table_with_image_bytes_makes_the_same_samples(folder, processor):
    record = region_record("0.jpg", 3)
    files = [write_lines(folder / "a.jsonl", [record])]
    data = (folder / "0.jpg").read_bytes()
    row = {**record, "image": {"bytes": data, "path": None}}
    datasets.Dataset.from_list([row]).to_parquet(str(folder / "a.parquet"))
    one = region_set(processor, files)[0]
    other = region_set(processor, [str(folder / "a.parquet")])[0]
    assert one.sequence == other.sequence
    assert torch.equal(one.features["pixel_values"], other.features["pixel_values"])


BROKEN_REGIONS = {
    "a missing image": ({**region_record("none.jpg", 1)}, "no such file"),
    "a truncated image": (region_record("cut.jpg", 1), "readable image"),
    "an empty mask": (
        {**region_record("0.jpg", 1), "mask_rles": [rle(np.zeros((48, 48)))]},
        "empty region mask",
    ),
    "a mask of another size": (
        {**region_record("0.jpg", 1), "mask_rles": [rle(np.ones((20, 48)))]},
        "image's size",
    ),
    "fewer captions than masks": (
        {**region_record("0.jpg", 2), "captions": ["only one"]},
        "a caption for each of 2 masks",
    ),
    "a text too long": (
        {**region_record("0.jpg", 1), "captions": ["far too many words in here"]},
        "at most 6 tokens",
    ),
    "a caption without text": ({**region_record("0.jpg", 1), "captions": [" "]}, "with text in it"),
    "masks that are no list": ({"image": "0.jpg", "mask_rles": 3, "captions": []}, "as list"),
    "no masks": ({"image": "0.jpg", "captions": ["x"]}, "mask_rles or masks"),
    "malformed JSON": ('{"image": "0.jpg", ', "expected a JSON object"),
    "a damaged AVIF": (region_record("damaged.avif", 1), "damaged.avif"),
    "HEIC without its reader": (region_record("photo.heic", 1), "pip install pillow-heif"),
    "a folder as image": (region_record(".", 1), "'"),
    "masks that are numbers": ({**region_record("0.jpg", 1), "mask_rles": [7]}, "mask"),
    "a mask of nested lists": ({**region_record("0.jpg", 1), "mask_rles": [[[["x"]]]]}, "got"),
    "a caption that is a list": ({**region_record("0.jpg", 1), "captions": [["x"]]}, "with text"),
    "a size of words": (
        {**region_record("0.jpg", 1), "mask_rles": [{"size": ["a", None], "counts": "x"}]},
        "size",
    ),
    "JSON of great depth": ("[" * 100_000, "expected a JSON object"),
    "a record that is no object": ("[1, 2]", "got list"),
}


@pytest.mark.parametrize("kind", BROKEN_REGIONS)
def test_a_broken_record_is_reported_by_line_and_the_rest_trains(
    folder, processor, caplog, monkeypatch, kind
):
    broken, reason = BROKEN_REGIONS[kind]
    whole = (folder / "0.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    header = bytes.fromhex("0000001c66747970") + b"%s" + bytes(16)
    (folder / "damaged.avif").write_bytes(header % b"avif" + whole)
    (folder / "photo.heic").write_bytes(header % b"heic" + whole)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    good = [region_record(f"{k}.jpg", 1) for k in range(3)]
    file = write_lines(folder / "a.jsonl", [good[0], good[1], broken, good[2]])
    dataset = region_set(processor, [file], share=0.5)
    with caplog.at_level(logging.WARNING):
        samples = [dataset[i] for i in range(len(dataset)) for _ in range(2)]
    assert len(samples) == 2 * len(dataset)
    assert dataset.broken.count == 1
    (line,) = [r.getMessage() for r in caplog.records if "broken record" in r.getMessage()]
    assert f"{file}, line 3: " in line and reason in line


GOOD = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
BROKEN_TURNS = {
    "no turns": ({"image": "0.jpg"}, "conversations or messages"),
    "an unknown speaker": (
        {"conversations": [{"from": "robot", "value": "x"}, {"from": "gpt", "value": "y"}]},
        "got 'robot'",
    ),
    "no answer": ({"conversations": [{"from": "human", "value": "x"}]}, "assistant turn"),
    "an empty answer": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}]},
        "empty one",
    ),
    "placeholders without images": (
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "y"}]},
        "each of 0 images",
    ),
    "an assistant who begins": (
        {"conversations": [{"from": "gpt", "value": "y"}, {"from": "human", "value": "x"}]},
        "before the first of the assistant",
    ),
    "a list as role": (
        {"conversations": [{"from": ["human"], "value": "x"}, {"from": "gpt", "value": "y"}]},
        r"got ['human']",
    ),
    "a number as an image": ({"image": 3, "conversations": GOOD}, "as a path, got 3"),
    "a NUL in a path": ({"image": "a\0b.jpg", "conversations": GOOD}, "the name of a file"),
    "a text too long": (
        {"conversations": [{"from": "human", "value": "x" * 99}, {"from": "gpt", "value": "y"}]},
        "at most 60 text tokens",
    ),
}
GOOD_TURNS = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


def conversation_set(processor, files, share=0.0, **options) -> FileDataset:
    data = ConversationData(files=files, **{"max_text_tokens": 60, **options})
    return FileDataset(files, ConversationSamples(processor, data), share)


@pytest.mark.parametrize("kind", BROKEN_TURNS)
def test_a_broken_conversation_is_reported_by_line(folder, processor, caplog, kind):
    broken, reason = BROKEN_TURNS[kind]
    file = write_lines(folder / "a.jsonl", [GOOD_TURNS, broken])
    dataset = conversation_set(processor, [file], share=0.5)
    with caplog.at_level(logging.WARNING):
        [dataset[i] for i in range(len(dataset))]
    (line,) = [r.getMessage() for r in caplog.records if "broken record" in r.getMessage()]
    assert f"{file}, line 2: " in line and reason in line


def test_more_broken_records_than_the_share_stop_the_run(folder, processor):
    records = [
        region_record("none.jpg", 1) if k < 2 else region_record("0.jpg", 1) for k in range(10)
    ]
    file = write_lines(folder / "a.jsonl", records)
    enough = region_set(processor, [file], share=0.2)
    assert [enough[i] for i in range(10)]
    few = region_set(processor, [file], share=0.1)
    with pytest.raises(TooManyBroken, match="2 of 10.*line 2"):
        [few[i] for i in range(10)]


def test_broken_records_are_counted_over_all_workers(folder, processor):
    records = [region_record("none.jpg" if k % 4 == 0 else "0.jpg", 1) for k in range(16)]
    dataset = region_set(processor, [write_lines(folder / "a.jsonl", records)], share=0.5)
    loader = DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=list)
    assert len([sample for batch in loader for sample in batch]) == 16
    assert dataset.broken.count == 4


def test_a_stream_stops_too_when_its_share_is_passed():
    broken = BrokenRecords(0.01, None)
    for _ in range(300):
        broken.see()
    for k in range(3):
        broken.report(k, "here", "why")
    with pytest.raises(TooManyBroken, match="4 of 300"):
        broken.report(3, "here", "why")


def test_every_assistant_turn_is_a_target_after_the_turns_before_it(folder, processor):
    record = {
        "image": "0.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\none"},
            {"from": "gpt", "value": "two"},
            {"from": "human", "value": "three"},
            {"from": "gpt", "value": "four"},
        ],
    }
    dataset = conversation_set(processor, [write_lines(folder / "a.jsonl", [record])])
    assert len(dataset) == 2
    header = "<|start_header_id|>{}<|end_header_id|>\n"
    image = "<img>{}</img>\n"
    first = header.format("user") + image + "one<|eot_id|>" + header.format("assistant")
    second = (
        first
        + "two<|eot_id|>"
        + header.format("user")
        + "three<|eot_id|>"
        + header.format("assistant")
    )
    for sample, context, answer in zip(
        (dataset[0], dataset[1]), (first, second), ("two", "four"), strict=True
    ):
        tokens = sample.sequence.ids.count(processor.image_token_id)
        context = context.format(processor.image_token * tokens)
        assert processor.tokenizer.decode(sample.sequence.ids) == context + answer + "<|eot_id|>"
        target = [t for t in sample.sequence.labels if t >= 0]
        assert processor.tokenizer.decode(target) == answer + "<|eot_id|>"


def test_messages_with_embedded_images_equal_conversations_with_paths(folder, processor):
    turns = [("user", "<image>\nwhat?"), ("assistant", "this")]
    named = {
        "image": "1.jpg",
        "conversations": [
            {"from": "human" if r == "user" else "gpt", "value": t} for r, t in turns
        ],
    }
    embedded = {
        "images": [{"bytes": (folder / "1.jpg").read_bytes(), "path": None}],
        "messages": [{"role": r, "content": t} for r, t in turns],
    }
    datasets.Dataset.from_list([embedded]).to_parquet(str(folder / "a.parquet"))
    one = conversation_set(processor, [write_lines(folder / "a.jsonl", [named])])[0]
    other = conversation_set(processor, [str(folder / "a.parquet")])[0]
    assert one.sequence == other.sequence
    assert torch.equal(one.features["pixel_values"], other.features["pixel_values"])


def test_a_placeholder_that_is_the_image_token_itself_is_an_image(folder, load):
    processor = maker(load)()[1]
    assert processor.image_token == "<image>"
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "b"}]
    record = {"image": "0.jpg", "conversations": turns}
    file = write_lines(folder / "a.jsonl", [record])
    sample = conversation_set(processor, [file], max_text_tokens=200)[0]
    features = processor.image_processor([str(folder / "0.jpg")])
    count = processor.count_image_tokens(features, 0)
    assert sample.sequence.ids.count(processor.image_token_id) == count


def test_several_images_get_a_single_tile_each(folder, processor):
    record = {"images": ["0.jpg", "1.jpg"], **GOOD_TURNS}
    sample = conversation_set(processor, [write_lines(folder / "a.jsonl", [record])])[0]
    assert sample.features["image_grids"].tolist() == [[1, 1], [1, 1]]


def test_an_answer_is_padded_to_its_slot_when_asked(folder, processor):
    file = write_lines(folder / "a.jsonl", [GOOD_TURNS])
    plain = conversation_set(processor, [file])[0].sequence.labels
    padded = conversation_set(processor, [file], answer_length=9)[0].sequence.labels
    assert sum(t >= 0 for t in plain) == 2
    assert sum(t >= 0 for t in padded) == 9


def stream(processor, files, **options) -> StreamDataset:
    data = RegionData(files=files, caption_length=6)
    maker = RegionSamples(processor, data)
    return StreamDataset(files, maker, 0.5, **{"buffer": 4, **options})


def test_a_stream_gives_every_mask_once_an_epoch_and_goes_on(folder, processor):
    files = [write_lines(folder / "a.jsonl", [region_record(f"{k}.jpg", 4) for k in range(3)])]
    samples = iter(stream(processor, files))
    for epoch in range(2):
        found = [next(samples) for _ in range(6)]
        assert {sample.key[0] for sample in found} == {epoch}
        texts = [text for sample in found for text in captions_of(processor, sample)]
        assert sorted(texts) == sorted(f"region {k}" for _ in range(3) for k in range(4))


def test_processes_divide_a_stream_among_them(folder, processor):
    files = [write_lines(folder / "a.jsonl", [region_record(f"{k}.jpg", 1) for k in range(4)])]
    shares = []
    for rank in range(2):
        samples = iter(stream(processor, files, rank=rank, world_size=2))
        shares.append({next(samples).key[1:] for _ in range(2)})
    assert len(shares[0] | shares[1]) == 4


def test_a_stream_of_fewer_files_than_workers_goes_on(folder, processor):
    files = [write_lines(folder / "a.jsonl", [region_record(f"{k}.jpg", 1) for k in range(4)])]
    loader = DataLoader(stream(processor, files), batch_size=None, num_workers=3)
    samples = iter(loader)
    keys = [next(samples).key for _ in range(8)]
    assert {epoch for epoch, *_ in keys} == {0, 1} and len(set(keys)) == 8


def test_a_batch_does_not_depend_on_the_workers(folder, processor):
    files = [write_lines(folder / "a.jsonl", [region_record(f"{k}.jpg", k + 2) for k in range(4)])]
    dataset = region_set(processor, files)
    collate = DiffusionCollator(processor, MaskingRecipe(), seed=3)
    sampler = EpochSampler(dataset, seed=5, batch_size=2, group=True)
    runs = [
        list(DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=collate, num_workers=n))
        for n in (0, 2)
    ]
    for one, other in zip(*runs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", [region_set, stream])
def test_a_pattern_is_all_files_that_match_it_in_order(folder, processor, kind):
    for name in ("part-b", "part-a", "other"):
        write_lines(folder / f"{name}.jsonl", [region_record("0.jpg", 1)])
    data = kind(processor, [str(folder / "part-*.jsonl"), str(folder / "other.jsonl")])
    names = [Path(file).name for file in data.files]
    assert names == ["part-a.jsonl", "part-b.jsonl", "other.jsonl"]
    with pytest.raises(FileNotFoundError, match="match .*none-\\*.jsonl.*, found none"):
        kind(processor, [str(folder / "none-*.jsonl")])


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(folder, processor):
    path = write_lines(folder / "a[1].jsonl", [region_record("0.jpg", 1)])
    write_lines(folder / "a1.jsonl", [region_record("0.jpg", 1)])
    assert region_set(processor, [str(path)]).files == [str(path)]


def test_an_unreadable_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_records([str(tmp_path / "none.jsonl")], len, streaming=False)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="got .*a.txt"):
        open_records([str(tmp_path / "a.txt")], len, streaming=False)


@pytest.mark.parametrize("seed", range(3))
def test_a_scene_that_is_kept_as_bytes_gives_the_image_processors_tensors(processor, seed):
    images = processor.image_processor
    scene = render_scene(seed, "train")
    masks = [thing.mask for thing in scene.objects[: images.num_region_prompts]]
    expected = images([scene.image], [masks])

    kept = encode_scene(images, seed, "train")
    assert kept.pixels.dtype == np.uint8
    for _ in range(2):  # what is kept is not changed by its use
        tensors = kept.tensors()
        assert tensors.keys() == expected.keys() - {"region_orders"}
        for name, tensor in tensors.items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
