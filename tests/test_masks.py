"""Region masks of every form to patches, boxes and numbers, against a plain implementation."""

import json

import numpy as np
import pytest
import reference
import torch
from perceptiondlm.image_loading import load_mask
from perceptiondlm.image_processing_perceptiondlm import PerceptionDLMImageProcessor
from PIL import Image
from pycocotools import mask as coco

SIDE, PATCH = 32, 4
SIZES = [(40, 40), (100, 30), (30, 100), (61, 47), (200, 190), (33, 180)]


@pytest.fixture
def process():
    return PerceptionDLMImageProcessor(image_size=SIDE, patch_size=PATCH)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_patches_boxes_and_order_equal_the_plain_ones(process, draw_image, blobs, size, soft):
    masks = blobs(*size, count=5, seed=size[0], soft=soft)
    out = process(draw_image(*size), masks)
    order = reference.numbering(masks)
    assert out["region_orders"] == [order]
    grid = reference.best_grid(*size, SIDE)
    for number, k in enumerate(order):
        expected = reference.members(masks[k], number, grid, SIDE, PATCH)
        assert np.array_equal(out["region_patches"][:, number], expected)
        assert out["boxes"][number].tolist() == pytest.approx(reference.box(masks[k], True))
    assert not out["region_patches"][:, 5:].any()


def test_a_speck_between_the_sampled_pixels_touches_no_patch_but_keeps_its_box(process, draw_image):
    mask = np.zeros((32, 32), np.uint8)
    mask[2, 2] = 1
    out = process(draw_image(32, 32), [mask])
    assert not out["region_patches"].any()
    assert out["boxes"].tolist() == [[2 / 32, 2 / 32, 2 / 32, 2 / 32]]


def test_the_aligned_convention_takes_half_open_boxes(draw_image, blobs):
    process = PerceptionDLMImageProcessor(
        image_size=SIDE, patch_size=PATCH, roi_convention="aligned"
    )
    masks = blobs(61, 47, count=3)
    boxes = process(draw_image(61, 47), masks)["boxes"]
    for corners, k in zip(boxes.tolist(), reference.numbering(masks), strict=True):
        assert corners == pytest.approx(reference.box(masks[k], False))


def test_equal_areas_keep_the_given_order(process, draw_image):
    masks = [np.zeros((40, 40), np.uint8) for _ in range(4)]
    masks[0][:2, :2] = masks[2][5:7, 5:7] = masks[3][9:11, 9:11] = 1
    masks[1][20:30] = 1
    assert process(draw_image(40, 40), masks)["region_orders"] == [[1, 0, 2, 3]]


def test_overlapping_masks_share_patches(process, draw_image):
    whole, half = np.ones((40, 40), bool), np.zeros((40, 40), bool)
    half[:, :20] = True
    patches = process(draw_image(40, 40), [half, whole])["region_patches"]
    assert bool(patches[:, 0].all())
    assert patches[0, 1].float().mean() == pytest.approx(0.5, abs=0.13)


def test_a_masks_values_do_not_matter(process, draw_image, blobs):
    (mask,) = blobs(61, 47, count=1, soft=True)
    soft, hard = process(draw_image(61, 47), [mask]), process(draw_image(61, 47), [mask > 0])
    assert torch.equal(soft["region_patches"], hard["region_patches"])
    assert torch.equal(soft["boxes"], hard["boxes"])


def test_boxes_of_several_images_name_their_image(process, draw_image, blobs):
    images = [draw_image(61, 47), draw_image(40, 90, seed=1)]
    out = process(images, [blobs(61, 47, count=2), blobs(40, 90, count=3, seed=1)])
    assert out["box_images"].tolist() == [0, 0, 1, 1, 1]
    apart = [
        process(images[0], blobs(61, 47, count=2)),
        process(images[1], blobs(40, 90, count=3, seed=1)),
    ]
    for name in ("region_patches", "boxes"):
        assert torch.equal(out[name], torch.cat([o[name] for o in apart]))


# Forms of masks: each equals the same region given as a bool array.


@pytest.fixture
def region(blobs):
    return blobs(23, 17, count=1, seed=4)[0] > 0


def same(mask, region) -> bool:
    return np.array_equal(np.asarray(load_mask(mask, (23, 17))) > 0, region)


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "float64"]
)
def test_arrays_and_tensors_of_any_kind_are_the_same_region(region, dtype):
    values = region.astype(dtype)
    assert same(values, region)
    assert same(values[..., None], region) and same(values[None], region)
    assert same(np.asfortranarray(values), region)
    assert same(torch.from_numpy(values), region)
    assert same(torch.from_numpy(values)[None], region)


def test_values_that_do_not_fit_eight_bits_still_count(region):
    assert same(region.astype(np.int32) * 256, region)
    assert same(region.astype(np.int32) * 2**30, region)
    assert same(region.astype(np.float32) * 256, region)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "I", "F", "CMYK", "I;16"])
def test_pil_masks_of_any_mode_are_the_same_region(region, mode):
    gray = Image.fromarray(region.astype(np.uint8) * 255)
    if mode == "P":
        image = Image.fromarray(region.astype(np.uint8), "L")
        image.putpalette([0, 0, 0, 200, 30, 30])
    elif mode == "I;16":
        image = Image.fromarray(region.astype(np.uint16) * 256)
    elif mode == "CMYK":
        image = gray.convert("RGB").convert("CMYK")
    elif mode in ("LA", "RGBA"):
        image = Image.new(mode, gray.size, 255 if mode == "L" else None)
        image.putalpha(gray)
        image = Image.merge(mode, [gray] * len(mode))
    else:
        image = gray.convert(mode)
    assert image.mode == mode
    assert same(image, region)


def test_transparent_pixels_are_outside(region):
    opaque = np.where(region, 255, 0).astype(np.uint8)
    white = np.full_like(opaque, 255)
    assert same(Image.merge("LA", [Image.fromarray(white), Image.fromarray(opaque)]), region)


def test_any_coloured_channel_counts(region):
    blue = np.zeros((*region.shape, 3), np.uint8)
    blue[..., 2] = region
    assert same(Image.fromarray(blue), region)


def test_files_are_read(region, tmp_path):
    Image.fromarray(region.astype(np.uint8)).save(tmp_path / "mask.png")
    assert same(tmp_path / "mask.png", region) and same(str(tmp_path / "mask.png"), region)


def test_coco_rle_of_any_kind_is_the_same_region(region):
    rle = coco.encode(np.asfortranarray(region.astype(np.uint8)))
    as_text = {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = region.flatten(order="F").astype(int)
    runs, value = [], 0
    while len(flat):
        length = int((flat != value).argmax()) if (flat != value).any() else len(flat)
        runs.append(length)
        flat, value = flat[length:], 1 - value
    assert same(rle, region)
    assert same(as_text, region)
    assert same(json.loads(json.dumps(as_text)), region)
    assert same({"size": [17, 23], "counts": runs}, region)
    assert same({"size": (17, 23), "counts": tuple(np.int64(r) for r in runs)}, region)
    assert same(as_text | {"extra": 1}, region)


def test_boxes_are_half_open_and_rounded():
    expected = np.zeros((17, 23), bool)
    expected[2:5, 3:9] = True
    for box in (
        [3, 2, 9, 5],
        (3.2, 1.8, 8.9, 5.1),
        {"box": [3, 2, 9, 5]},
        {"box": np.array([3.0, 2.0, 9.0, 5.0])},
    ):
        assert same(box, expected)


def test_a_box_reaching_out_of_the_image_is_clipped():
    expected = np.zeros((17, 23), bool)
    expected[:5, 20:] = True
    assert same([20, -100, 1e9, 5], expected)


def test_a_thin_box_keeps_a_pixel():
    expected = np.zeros((17, 23), bool)
    expected[3, 4] = True
    assert same([4.1, 3.1, 4.2, 3.2], expected)


def test_polygons_add_up():
    expected = np.zeros((17, 23), bool)
    expected[2:5, 3:7] = True
    expected[10:12, 12:14] = True
    squares = [[3, 2, 7, 2, 7, 5, 3, 5], [12, 10, 14, 10, 14, 12, 12, 12]]
    assert same(squares, expected) and same({"polygons": squares}, expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((17, 23), bool), "at least one non-zero pixel, got an empty region mask"),
        (Image.new("L", (23, 17)), "at least one non-zero pixel, got an empty region mask"),
        (np.ones((23, 17), bool), "image's size 23x17 .width x height., got 17x23"),
        (Image.new("L", (22, 17), 1), "image's size 23x17 .width x height., got 22x17"),
        (np.ones((17, 23, 3)), r"shape \(H, W\), got \(17, 23, 3\)"),
        (np.ones(23), r"shape \(H, W\), got \(23,\)"),
        (np.ones((0, 23)), r"shape \(H, W\), got \(0, 23\)"),
        (np.full((17, 23), np.nan), "mask values of 0 or more, got a minimum of nan"),
        (np.full((17, 23), -1), "mask values of 0 or more, got a minimum of -1"),
        (np.full((17, 23), 1j), "bool, integer or float region mask, got complex128"),
        (np.full((17, 23), "a"), "bool, integer or float region mask, got <U1"),
        ("", "FileNotFound"),
        (b"1234", "expected a readable region mask"),
        (7, "expected a region mask as PIL image, path"),
        (None, "expected a region mask as PIL image, path"),
        ({}, "expected a region mask as PIL image, path"),
        ([], "expected a region mask as PIL image, path"),
        ([1, 2, 3], "expected a region mask as PIL image, path"),
        ([5, 2, 5, 9], "x0 < x1 and y0 < y1"),
        ([9, 2, 5, 9], "x0 < x1 and y0 < y1"),
        ([30, 2, 40, 9], "a box inside the 23x17 image"),
        ([-9, 2, -5, 9], "a box inside the 23x17 image"),
        ({"box": [0, 0, float("nan"), 5]}, "4 finite numbers"),
        ({"box": [0, 0, float("inf"), 5]}, "4 finite numbers"),
        ({"box": [0, 0, 5]}, "4 finite numbers"),
        ({"box": "1234"}, "4 finite numbers"),
        ([[1, 2, 3, 4]], "three points or more"),
        ([[1, 2, 3, 4, 5, 6, 7]], "three points or more"),
        ([[1, 2, 3, 4, 5, float("nan")]], "6 finite numbers"),
        ([[1, 2, 3, 4, 5, 2**33]], "points near the image"),
        ([[1, 2, 3, 4, 5, 10**400]], "6 finite numbers"),
        ({"polygons": [3]}, "three points or more"),
        ({"polygons": None}, "expected a list of polygons, got NoneType"),
        ({"polygons": []}, "an empty region mask"),
        ({"size": [17, 23], "counts": "0"}, "add up to 391 pixels, got 0"),
        ({"size": [17, 23], "counts": ""}, "add up to 391 pixels, got 0"),
        ({"size": [17, 23], "counts": [1, 2]}, "add up to 391 pixels, got 3"),
        ({"size": [17, 23], "counts": [-1, 392]}, "add up to 391 pixels"),
        ({"size": [17, 23], "counts": [1.5, 389.5]}, "whole numbers"),
        ({"size": [17, 23], "counts": ["a"]}, "finite numbers"),
        ({"size": [17, 23], "counts": None}, "as str, bytes or list, got NoneType"),
        ({"size": [17, 23], "counts": "\x00"}, "COCO RLE counts, got"),
        ({"size": [17, 23], "counts": "é"}, "COCO RLE counts, got"),
        ({"size": [17, 23], "counts": "o" * 100_000}, "COCO RLE counts, got"),
        ({"size": [17, 23], "counts": "oo"}, "cut off"),
        ({"size": [23, 17], "counts": [391]}, "image's size 23x17"),
        ({"size": [17.5, 23], "counts": [391]}, "whole numbers"),
        ({"size": [17], "counts": [391]}, "2 finite numbers"),
        ({"size": None, "counts": [391]}, "2 finite numbers"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, "image's size 23x17"),
    ],
)
def test_a_mask_that_is_none_is_refused(mask, message):
    expected = FileNotFoundError if message == "FileNotFound" else ValueError
    with pytest.raises(expected, match=None if expected is FileNotFoundError else message):
        load_mask(mask, (23, 17))


def test_a_damaged_mask_file_is_refused(region, tmp_path):
    Image.fromarray(region.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    data = (tmp_path / "mask.png").read_bytes()
    for name, content in {"cut.png": data[:40], "text.png": b"no image"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="expected a readable region mask"):
            load_mask(tmp_path / name, (23, 17))


@pytest.mark.parametrize("box", [[0.1, 0.1, 0.5, 0.5], [0, 0, 0.5, 1], [0.0, 0.2, 1.0, 1.0]])
def test_a_box_in_shares_of_the_sides_is_refused(box):
    with pytest.raises(ValueError, match="expected a box in pixels, got shares of the sides"):
        load_mask({"box": box}, (40, 30))
    assert load_mask({"box": [0, 0, 1, 1]}, (40, 30)).getbbox() == (0, 0, 1, 1)
