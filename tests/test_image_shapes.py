"""COCO's run lengths and polygons in numpy, against pycocotools, which data sets are made with."""

import time

import numpy as np
import pytest
from perceptiondlm.image_masks import decode_rle, encode_rle, fill_polygons
from pycocotools import mask as coco


def coco_fill(polygons: list, width: int, height: int) -> np.ndarray:
    return coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))) > 0


# Run lengths.


def random_masks(count: int):
    rng = np.random.default_rng(0)
    for k in range(count):
        mask = rng.random(rng.integers(1, 60, 2)) < rng.choice([0, 0.01, 0.5, 0.99, 1])
        yield np.kron(mask, np.ones((rng.integers(1, 40), 3), bool)) if k % 2 else mask


def test_run_lengths_equal_pycocotools_both_ways():
    for mask in random_masks(200):
        expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        expected["counts"] = expected["counts"].decode()
        assert encode_rle(mask) == encode_rle(mask.astype(np.uint8) * 255) == expected
        assert np.array_equal(decode_rle(expected, mask.shape[::-1]), mask)


def test_uncompressed_run_lengths_equal_pycocotools():
    rng = np.random.default_rng(1)
    for _ in range(50):
        height, width = (int(side) for side in rng.integers(1, 40, 2))
        cuts = np.sort(rng.integers(0, height * width + 1, rng.integers(0, 9)))
        runs = np.diff(cuts, prepend=0, append=height * width).tolist()  # some of length 0
        rle = {"size": [height, width], "counts": runs}
        expected = coco.decode(coco.frPyObjects(rle, height, width))
        assert np.array_equal(decode_rle(rle, (width, height)), expected > 0)
        rle["counts"] = np.array(runs)
        assert np.array_equal(decode_rle(rle, (width, height)), expected > 0)


def test_run_lengths_of_a_large_noisy_mask_are_decoded_in_time():
    mask = np.random.default_rng(2).random((1000, 1500)) < 0.5
    start = time.process_time()
    assert np.array_equal(decode_rle(encode_rle(mask), (1500, 1000)), mask)
    assert time.process_time() - start < 3


# Polygons.


def random_polygons(kind: str, rng: np.random.Generator) -> list[float]:
    count = int(rng.integers(3, 12))
    if kind == "inside":
        points = rng.uniform(0, 50, (count, 2))
    elif kind == "reaching out":
        points = rng.uniform(-40, 90, (count, 2))
    elif kind == "far out":
        points = rng.uniform(-1e4, 1e4, (count, 2))
    elif kind == "on whole pixels":
        points = rng.integers(-5, 60, (count, 2))
    elif kind == "on fifths, where roundings are close":
        points = rng.integers(-20, 300, (count, 2)) / 5
    elif kind == "tiny":
        points = rng.normal(25, 0.7, (count, 2))
    elif kind == "flat":
        points = np.stack([rng.uniform(0, 50, count), np.full(count, 20.0)], 1)
    elif kind == "with repeated points":
        points = np.repeat(rng.uniform(0, 50, (count, 2)), 2, axis=0)
    elif kind == "of thousands of points":
        points = rng.uniform(-5, 55, (2000, 2))
    return points.ravel().tolist()


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("inside", 300),
        ("reaching out", 300),
        ("far out", 60),
        ("on whole pixels", 300),
        ("on fifths, where roundings are close", 300),
        ("tiny", 100),
        ("flat", 50),
        ("with repeated points", 100),
        ("of thousands of points", 5),
    ],
)
def test_polygons_are_filled_as_coco_fills_them(kind, count):
    rng = np.random.default_rng(len(kind))
    for _ in range(count):
        width, height = (int(side) for side in rng.integers(1, 60, 2))
        polygon = random_polygons(kind, rng)
        expected = coco_fill([polygon], width, height)
        assert np.array_equal(fill_polygons([polygon], (width, height)), expected), polygon


def test_several_polygons_are_their_union_as_coco_merges_them():
    rng = np.random.default_rng(3)
    for _ in range(50):
        polygons = [random_polygons("reaching out", rng) for _ in range(4)]
        assert np.array_equal(fill_polygons(polygons, (50, 40)), coco_fill(polygons, 50, 40))


def test_thousands_of_polygons_and_points_are_filled_in_time():
    rng = np.random.default_rng(4)
    corners = rng.uniform(0, 1000, (2000, 1, 2)) + rng.uniform(0, 9, (2000, 6, 2))
    star = rng.uniform(0, 1000, 1000).tolist()
    start = time.process_time()
    fill_polygons([*corners.reshape(2000, -1).tolist(), star], (1000, 1000))
    assert time.process_time() - start < 5
