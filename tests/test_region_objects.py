"""Regions are read from what segmenters return: arrays, dicts, and objects of other packages."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from perceptiondlm import RegionMask, load_regions
from perceptiondlm.apps.captioning.results import Region
from perceptiondlm.image_processing_perceptiondlm import load_mask
from PIL import Image
from shapes import shapes_captioner

SIZE = WIDTH, HEIGHT = 24, 16


@pytest.fixture(scope="module")
def captioner():
    return shapes_captioner()


def drawn(left, top, right, bottom) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


CUP, SPOON = drawn(2, 3, 10, 9), drawn(12, 5, 22, 14)
BOXES = np.array([[2.0, 3, 10, 9], [12, 5, 22, 14]])
STACK = np.stack([CUP, SPOON])
OUTLINES = [np.array([[2, 3], [10, 3], [10, 9], [2, 9]], np.float32)] + [
    np.array([[12, 5], [22, 5], [22, 14], [12, 14]], np.float32)
]
SEGMENTS = torch.tensor(np.where(CUP, 1, np.where(SPOON, 2, 0)))


def ultralytics(masks=None) -> SimpleNamespace:
    boxes = SimpleNamespace(
        xyxy=torch.tensor(BOXES), conf=torch.tensor([0.9, 0.5]), cls=torch.tensor([0.0, 1.0])
    )
    names = {0: "cup", 1: "spoon"}
    return SimpleNamespace(orig_shape=(HEIGHT, WIDTH), boxes=boxes, masks=masks, names=names)


def detections(mask) -> SimpleNamespace:
    return SimpleNamespace(
        xyxy=BOXES,
        mask=mask,
        confidence=np.array([0.9, 0.5]),
        class_id=np.array([0, 1]),
        data={"class_name": np.array(["cup", "spoon"])},
    )


NAMED, SCORED = ["cup", "spoon"], [0.9, 0.5]
SMALL = SimpleNamespace(data=torch.zeros(2, 8, 12), xy=OUTLINES)  # of the network's size
LARGE = SimpleNamespace(data=torch.tensor(STACK).float(), xy=[])
PIPELINE = [
    {"mask": Image.fromarray(m.astype(np.uint8) * 255), "label": label, "score": score}
    for m, label, score in zip(STACK, NAMED, SCORED, strict=True)
]
SAM = [
    {"segmentation": m, "area": 1, "bbox": [0, 0, 1, 1], "predicted_iou": score}
    for m, score in zip(STACK, SCORED, strict=True)
]
INFOS = [{"id": 1, "label_id": 4, "score": 0.9}, {"id": 2, "label_id": 7, "score": 0.5}]
KINDS = {  # source, labels, scores
    "bool masks": (STACK, None, None),
    "8-bit masks": (STACK.astype(np.uint8) * 255, None, None),
    "float masks": (STACK * 0.7, None, None),
    "masks of one channel": (torch.tensor(STACK[:, None]).to(torch.bfloat16), None, None),
    "a list of masks": ([CUP, torch.tensor(SPOON)], None, None),
    "boxes": (BOXES, None, None),
    "whole boxes": (torch.tensor(BOXES).long(), None, None),
    "a label map of wide integers": (SEGMENTS, ["1", "2"], None),
    "SAM's generator": (SAM, None, SCORED),
    "SAM's predictor": ((STACK, np.array(SCORED), np.zeros((2, 4, 4))), None, SCORED),
    "mask generation": ({"masks": list(STACK), "scores": torch.tensor(SCORED)}, None, SCORED),
    "torchvision's": (
        {
            "boxes": torch.tensor(BOXES),
            "masks": torch.tensor(STACK[:, None] * 0.8),
            "scores": torch.tensor(SCORED),
            "labels": torch.tensor([4, 7]),
        },
        ["4", "7"],
        SCORED,
    ),
    "image segmentation": (PIPELINE, NAMED, SCORED),
    "segments": ({"segmentation": SEGMENTS, "segments_info": INFOS}, ["4", "7"], SCORED),
    "binary maps": (
        {"segmentation": torch.tensor(STACK).int(), "segments_info": INFOS},
        ["4", "7"],
        SCORED,
    ),
    "supervision's masks": (detections(STACK), NAMED, SCORED),
    "supervision's boxes": (detections(None), NAMED, SCORED),
    "ultralytics' boxes": (ultralytics(), NAMED, SCORED),
    "ultralytics' outlines": (ultralytics(SMALL), NAMED, SCORED),
    "ultralytics' pixels": ([ultralytics(LARGE)], NAMED, SCORED),
    "region masks": ([RegionMask(CUP, "cup", 0.9), RegionMask(SPOON, "spoon", 0.5)], NAMED, SCORED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_segmenter_returns_is_taken_as_it_is(kind):
    source, labels, scores = KINDS[kind]
    regions = load_regions(source, SIZE)
    assert [np.asarray(region).tolist() for region in regions] == [CUP.tolist(), SPOON.tolist()]
    assert [region.label for region in regions] == (labels or [None, None])
    assert [region.score for region in regions] == pytest.approx(scores or [None, None])


def test_supervisions_own_class_is_read():
    supervision = pytest.importorskip("supervision", exc_type=ImportError)
    found = supervision.Detections(**vars(detections(STACK)))
    regions = load_regions(found, SIZE)
    assert [np.asarray(region).tolist() for region in regions] == [CUP.tolist(), SPOON.tolist()]
    assert [region.label for region in regions] == NAMED


def test_points_are_one_polygon():
    (region,) = load_regions(OUTLINES[0], SIZE)
    assert np.array_equal(region, CUP)


def test_the_threshold_decides_which_pixels_of_a_float_mask_are_inside():
    soft = np.where(CUP, 0.4, np.where(SPOON, 0.2, 0))[None]
    assert np.array_equal(load_regions(soft, SIZE, threshold=0.3)[0], CUP)
    assert np.array_equal(load_regions(soft, SIZE, threshold=0.1)[0], CUP | SPOON)


def test_masks_of_another_size_are_resized_by_nearest_neighbor_on_request():
    small = STACK[:, ::2, ::2]
    with pytest.raises(ValueError, match="24x16.*got 12x8"):
        load_regions(small, SIZE)
    expected = np.kron(small, np.ones((2, 2), bool))
    assert np.array_equal(np.stack(load_regions(small, SIZE, resize_masks=True)), expected)


WRONG = {
    "logits": (STACK * 8.0 - 4, "float masks in .0, 1. .*from -4 to 4: for logits"),
    "not a number": (np.where(STACK, np.nan, 0), "float masks in"),
    "masks along the last axis": (STACK.transpose(1, 2, 0), "moveaxis"),
    "three masks a prompt": (np.zeros((2, 3, HEIGHT, WIDTH)), "several masks for each prompt"),
    "complex numbers": (np.zeros((2, HEIGHT, WIDTH), complex), "got complex128"),
    "an empty mask": (np.stack([CUP, CUP & False]), "array 1: .*empty"),
    "too many masks": (np.zeros((1001, HEIGHT, WIDTH), bool), "at most 1000 regions"),
    "boxes as x, y, width, height": (np.array([[12, 5, 10, 9]]), "x0 < x1"),
    "two points": (np.array([[1, 2], [3, 4]]), "three points or more"),
    "bytes of several values": (SEGMENTS.numpy().astype(np.uint8), "one region.*label map"),
    "one score for two": ({"masks": STACK, "scores": [0.9]}, "scores for each of 2 .*got 1"),
    "an id for no segment": (
        {"segmentation": SEGMENTS, "segments_info": [{"id": 5}]},
        "segment 0: .*empty",
    ),
    "results of two images": ([ultralytics(), ultralytics()], "results of one image"),
    "results of another image": (
        SimpleNamespace(orig_shape=(9, 9), boxes=None, masks=None),
        "24x16.*got 9x9",
    ),
    "a number": (5, "region 0: expected a region mask"),
    "a path in a dict": ({"mask": "secret.png"}, "expected a segmentation or bbox"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_value_is_said(what):
    source, message = WRONG[what]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_regions(source, SIZE)


@pytest.mark.parametrize("width", [2, 4])
def test_an_array_that_could_be_a_mask_or_boxes_is_refused(width):
    with pytest.raises(ValueError, match="either a mask or boxes or a polygon.*as bools"):
        load_regions(np.ones((6, width), int), (width, 6))
    (mask,) = load_regions(np.ones((6, width), bool), (width, 6))
    assert mask.area == 6 * width


@pytest.mark.parametrize("threshold", [-0.1, 1, 5])
def test_a_threshold_that_leaves_nothing_is_refused(threshold):
    with pytest.raises(ValueError, match="expected a threshold from 0"):
        load_regions(STACK, SIZE, threshold=threshold)


def test_a_region_stands_wherever_a_mask_does():
    (region, _) = load_regions(STACK, SIZE)
    assert load_mask(region, SIZE).getbbox() == (2, 3, 10, 9)


def test_labels_and_scores_travel_with_the_captions():
    regions = load_regions(PIPELINE, SIZE)
    masks = [load_mask(region, SIZE) for region in regions]
    captioned = Region.each(["a cup", "a spoon"], masks, sources=regions)
    assert [(r.label, r.source_score) for r in captioned] == [("cup", 0.9), ("spoon", 0.5)]
    assert captioned[0].to_dict()["label"] == "cup"
    assert "label" not in Region.each(["a cup"], masks[:1])[0].to_dict()


@pytest.mark.parametrize("kind", ["SAM's predictor", "supervision's masks", "image segmentation"])
def test_a_captioner_takes_what_a_segmenter_returns(captioner, kind):
    image = Image.effect_noise(SIZE, 50).convert("RGB")
    source, labels, scores = KINDS[kind]
    result = captioner(image, source, steps=2)
    assert [region.label for region in result.regions] == (labels or [None] * 2)
    assert [region.source_score for region in result.regions] == pytest.approx(scores)
    assert [np.asarray(r.mask).astype(bool).tolist() for r in result.regions] == STACK.tolist()


def test_a_model_takes_loaded_regions_as_masks(captioner):
    image = Image.effect_noise(SIZE, 50).convert("RGB")
    options = {"processor": captioner.processor, "steps": 2}
    given = captioner.model.diffusion_generate(image, masks=load_regions(STACK, SIZE), **options)
    plain = captioner.model.diffusion_generate(image, masks=list(STACK), **options)
    assert given.texts == plain.texts
