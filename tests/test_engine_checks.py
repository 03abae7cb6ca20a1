"""Regions are kept when a segmenter finds their category where they are."""

import pickle

import pytest
from engine_data import Found, PlayedSegmenter, kept, record_of, rectangle, rules
from perceptiondlm.pipelines.mask_checks import CheckMasks, MaskCheckOptions, iou
from perceptiondlm.regions.segmenters import load_segmenter
from PIL import Image
from tiny_sams import save_tiny

SIZE = (60, 40)
LEFT, RIGHT = rectangle(SIZE, 0, 0, 20, 20), rectangle(SIZE, 30, 0, 50, 20)
HALF = rectangle(SIZE, 0, 0, 20, 10)  # of LEFT: an IoU of a half


def checked(tmp_path, cores, found, **options):
    path = tmp_path / "image.png"
    Image.new("RGB", SIZE).save(path)
    record = record_of(LEFT, RIGHT, core=cores)
    record.image = str(path)
    segmenter = PlayedSegmenter(found)
    CheckMasks(MaskCheckOptions(segmenter="played", **options), segmenter)([record])
    assert len(record.regions) + len(record.dropped) == 2
    return record, segmenter


@pytest.mark.parametrize(("threshold", "dropped"), [(0.5, {}), (0.51, {"a": "iou"})])
def test_half_the_mask_is_enough_up_to_a_half(tmp_path, threshold, dropped):
    found = {"cup": [Found(HALF)], "mug": [Found(RIGHT)]}
    record, _ = checked(tmp_path, ["cup", "mug"], found, min_iou=threshold)
    assert rules(record) == dropped
    assert record.regions[-1].mask_iou == 1


def test_the_likest_of_several_masks_counts_and_each_name_is_asked_for_once(tmp_path):
    record, segmenter = checked(tmp_path, ["cup", "cup"], {"cup": [Found(LEFT), Found(RIGHT)]})
    assert kept(record) == "ab" and segmenter.asked == ["cup"]


def test_what_is_found_elsewhere_or_nowhere_is_dropped(tmp_path):
    record, _ = checked(tmp_path, ["cup", "dog"], {"cup": [Found(RIGHT)]})
    assert rules(record) == {"a": "iou", "b": "not found"}
    reasons = [entry.reason for entry in record.dropped]
    assert reasons == [
        "expected 'dog' in the image, found none",
        "expected an IoU of 0.5 or more with 'cup', got 0.000 with the likest of 1",
    ]


@pytest.mark.parametrize(("score", "dropped"), [(0.4, {}), (0.39, {"a": "not found"})])
def test_masks_below_the_score_are_not_compared(tmp_path, score, dropped):
    found = {"cup": [Found(LEFT, score)], "mug": [Found(RIGHT, None)]}
    assert rules(checked(tmp_path, ["cup", "mug"], found, min_score=0.4)[0]) == dropped


def test_a_region_without_a_category_is_dropped(tmp_path):
    record, _ = checked(tmp_path, [None, "mug"], {"mug": [Found(RIGHT)]})
    assert rules(record) == {"a": "no category"} and kept(record) == "b"


def test_a_text_that_the_segmenter_refuses_drops_the_regions(tmp_path):
    record = record_of(LEFT, core=["cup"])
    record.image = str(tmp_path / "image.png")
    Image.new("RGB", SIZE).save(record.image)

    def refuse(image, text):
        raise ValueError("expected text of at most 32 tokens")

    CheckMasks(MaskCheckOptions(segmenter="played"), refuse)([record])
    assert rules(record) == {"a": "not found"} and "32 tokens" in record.dropped[0].reason


def test_a_tiny_sam_3_with_random_weights_is_asked_by_its_folder(tmp_path):
    """Its masks mean nothing: each region is kept or dropped by the IoU that is found by hand."""
    save_tiny("sam3", tmp_path / "sam3")
    regions = load_segmenter(tmp_path / "sam3", device="cpu")
    regions.min_text_score = 0.0  # whatever random weights believe
    stage = CheckMasks(MaskCheckOptions(segmenter=str(tmp_path / "sam3"), min_iou=0.1), regions)
    record = record_of(LEFT, RIGHT, core=["cup", "dog"])
    record.image = str(tmp_path / "image.png")
    Image.new("RGB", SIZE, "orange").save(record.image)
    stage([record])

    found = {name: regions(record.image, text=name) for name in ("cup", "dog")}
    expected = {}
    for key, own, name in (("a", LEFT, "cup"), ("b", RIGHT, "dog")):
        ious = [(own & each.mask).sum() / (own | each.mask).sum() for each in found[name]]
        if not ious or max(ious) < 0.1:
            expected[key] = "iou" if ious else "not found"
    assert rules(record) == expected


def test_a_segmenter_that_reads_no_text_ends_the_run(tmp_path):
    record = record_of(LEFT, core=["cup"])
    record.image = str(tmp_path / "image.png")
    Image.new("RGB", SIZE).save(record.image)
    with pytest.raises(ValueError, match="expected a segmenter that reads text.*got 'offline'"):
        CheckMasks(MaskCheckOptions(segmenter="offline"))([record])


def test_a_stage_is_pickled_without_what_it_loaded():
    stage = CheckMasks(MaskCheckOptions(segmenter="x"))
    stage.__dict__["segmenter"] = lambda: None  # as if it had been loaded: no pickle takes it
    assert "segmenter" not in vars(pickle.loads(pickle.dumps(stage)))


def test_ious_are_counted():
    assert iou(LEFT, HALF) == 0.5 and iou(LEFT, RIGHT) == 0
    assert iou(LEFT & RIGHT, LEFT & RIGHT) == 0
