"""Regions without weights: on scikit-image's photographs, on drawn shapes, and of bad input."""

import itertools

import numpy as np
import pytest

pytest.importorskip("cv2", reason="the offline segmenter needs the package's regions extra")
pytest.importorskip("skimage", reason="the offline segmenter needs the package's regions extra")

from perceptiondlm.regions.prompts import MAX_PROMPTS, Prompts
from perceptiondlm.regions.region_tree import RegionTree
from perceptiondlm.regions.segmenters import find_regions, load_segmenter
from photographs import FRONT, front_of, photograph
from PIL import Image, ImageDraw


@pytest.fixture(scope="module")
def segmenter():
    return load_segmenter()


@pytest.fixture
def shapes():
    """A red disc and a blue square on gray, and their masks."""
    image = Image.new("RGB", (300, 200), (150, 150, 150))
    masks = []
    for color, box, kind in (
        ((200, 30, 30), (40, 50, 120, 130), "ellipse"),
        ((30, 40, 200), (180, 80, 250, 150), "rectangle"),
    ):
        getattr(ImageDraw.Draw(image), kind)(box, fill=color)
        masks.append(np.asarray(image) == color)
    return image, [mask.all(-1) for mask in masks]


def overlap(one, other) -> float:
    return (one & other).sum() / (one | other).sum()


@pytest.mark.parametrize("name", FRONT)
def test_everything_covers_what_is_in_front_by_regions_of_its_own(segmenter, name):
    front = front_of(name)
    regions = segmenter(photograph(name))
    assert 5 <= len(regions) <= 40
    assert max(region.area for region in regions) <= 0.52 * front.size
    covered = np.any([region.mask for region in regions], axis=0)
    assert (covered & front).sum() >= 0.5 * front.sum()

    # not by the background's: of these regions most is in front
    own = [r.mask for r in regions if (r.mask & front).sum() >= 0.7 * r.area]
    least = 0.3 if name == "motorcycle_left.png" else 0.5  # one sees through it
    assert (np.any(own, axis=0) & front).sum() >= least * front.sum()
    for one, other in itertools.combinations(regions, 2):
        assert (one.mask & other.mask).sum() <= 0.01 * min(one.area, other.area)


def test_all_coins_are_found_each_as_one_region(segmenter):
    from scipy.ndimage import label

    coins, count = label(front_of("coins.png"))
    regions = segmenter(photograph("coins.png"))
    large = [coins == k for k in range(1, count + 1) if (coins == k).sum() > 500]
    found = [max(overlap(coin, r.mask) for r in regions) for coin in large]
    assert len(large) >= 20 and np.mean(np.array(found) > 0.7) > 0.9


def test_points_and_boxes_give_the_shapes_they_are_on_in_order(segmenter, shapes):
    image, (disc, square) = shapes
    regions = segmenter(
        image, points=[(215, 115), (80.5, 90)], boxes=np.array([[30, 40, 130, 140]])
    )
    assert [r.origin for r in regions] == ["point 215,115", "point 80.5,90", "box 30,40,130,140"]
    for region, expected in zip(regions, (square, disc, disc), strict=True):
        assert overlap(region.mask, expected) > 0.95
    again = segmenter(image, points=(215, 115))
    assert (again[0].mask == regions[0].mask).all()


def test_a_large_image_is_worked_on_small_and_comes_back_large(segmenter, shapes):
    image, (disc, square) = shapes
    large = image.resize((3000, 2000), Image.Resampling.NEAREST)
    regions = segmenter(large, points=[(800, 900)], boxes=[(1700, 700, 2600, 1600)])
    for region, mask in zip(regions, (disc, square), strict=True):
        expected = np.asarray(Image.fromarray(mask).resize(large.size, Image.Resampling.NEAREST))
        assert region.mask.shape == (2000, 3000) and overlap(region.mask, expected) > 0.95


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (1, 1), "red"),
        Image.new("L", (1, 50), 9),
        Image.new("RGBA", (60, 2), (1, 2, 3, 0)),
        Image.new("RGB", (400, 300), "white"),
        Image.new("CMYK", (3, 3)),
    ],
    ids=["a pixel", "a column", "two rows, transparent", "blank", "CMYK"],
)
def test_where_nothing_stands_out_everything_is_nothing_and_prompts_give_something(
    segmenter, image
):
    assert segmenter(image) == []
    with pytest.raises(ValueError, match="expected something that stands out.*found no region"):
        find_regions(image, segmenter, everything=True)
    (around, inside) = segmenter(image, points=[(0, 0)], boxes=[(0, 0, *image.size)])
    assert around.mask.shape == inside.mask.shape == image.size[::-1]
    assert around.mask.any() and inside.mask.any()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_the_mode_of_an_image_does_not_matter(segmenter, shapes, mode):
    image, (disc, _) = shapes
    if mode == "I;16":
        given = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        given = image.convert(mode)
    (region,) = segmenter(given, points=(80, 90))
    assert overlap(region.mask, disc) > 0.9


WRONG = [
    ({"points": [(300, 10)]}, "a point inside the image of 300x200 pixels, got 300,10"),
    ({"points": [(-1, 10)]}, "a point inside"),
    ({"points": []}, r"points as \(x, y\)"),
    ({"points": [(1, 2, 3)]}, r"points as .*got shape \(1, 3\)"),
    ({"points": [(1, 2), (3,)]}, "points as"),
    ({"points": [(float("nan"), 2)]}, "not finite"),
    ({"points": [(float("inf"), 2)]}, "not finite"),
    ({"points": "1,2"}, "points as"),
    ({"points": [("1", "2")]}, "points as"),
    ({"points": True}, "points as"),
    ({"points": [[[1, 2]]]}, "points as"),
    ({"boxes": [(10, 10, 10, 20)]}, "x0 < x1 and y0 < y1"),
    ({"boxes": [(20, 10, 10, 20)]}, "x0 < x1 and y0 < y1"),
    ({"boxes": [(300, 0, 320, 10)]}, "meets the image"),
    ({"boxes": [(0, 0, 1)]}, r"boxes as .*got shape \(1, 3\)"),
    ({"boxes": {"box": [0, 0, 9, 9]}}, "boxes as"),
    ({"boxes": np.zeros((0, 4))}, "boxes as"),
    ({"points": [(1, 1)] * (MAX_PROMPTS + 1)}, "at most 1000 prompts"),
    ({"text": "mug"}, "a segmenter that reads text, say facebook/sam3, got text 'mug'"),
    ({"text": ""}, "text that names things"),
    ({"text": []}, "text that names things"),
    ({"text": [3]}, "text that names things"),
]


@pytest.mark.parametrize(("prompts", "message"), WRONG)
def test_prompts_that_make_no_sense_are_refused(segmenter, shapes, prompts, message):
    with pytest.raises(ValueError, match=message):
        segmenter(shapes[0], **prompts)
    with pytest.raises(ValueError, match=message):
        find_regions(shapes[0], segmenter, **prompts)


def test_everything_or_prompts_but_not_both_or_neither(segmenter, shapes):
    with pytest.raises(ValueError, match="everything or points and text, got both"):
        find_regions(shapes[0], segmenter, everything=True, points=[(1, 1)], text="mug")
    with pytest.raises(ValueError, match="expected everything, points, boxes or text"):
        find_regions(shapes[0], segmenter)


def test_a_box_is_cut_off_at_the_images_edges():
    assert Prompts.read((30, 20), boxes=[-5, 3, 99, 8]).boxes == ((0, 3, 30, 8),)


def test_a_tree_merges_what_is_alike_first():
    pieces = np.repeat(np.arange(4), 10)[None].repeat(20, 0)  # four stripes
    gray = np.array([50, 60, 200, 205], np.uint8)[pieces]
    lab = np.stack([gray, np.full_like(gray, 128), np.full_like(gray, 128)], -1)
    tree = RegionTree(pieces, lab, np.zeros(pieces.shape))
    assert sorted(map(sorted, tree.parts[:2])) == [[0, 1], [2, 3]]
    assert sorted(tree.parts[2]) == [4, 5] and tree.area.tolist() == [200] * 4 + [400] * 2 + [800]
    assert (np.diff(tree.birth[4:]) >= 0).all() and (tree.death >= tree.birth).all()
    (halves,) = [n for n in (4, 5) if tree.mask(n)[0, 0]]
    assert tree.path(0, 0) == [0, halves, 6] and tree.mask(halves).sum() == 400


def test_the_best_cut_is_the_best_of_all_cuts():
    rng = np.random.default_rng(3)
    pieces = np.arange(7)[None].repeat(3, 0)
    lab = rng.integers(0, 256, (3, 7, 3), dtype=np.uint8)
    tree = RegionTree(pieces, lab, rng.random((3, 7)))
    worth = rng.random(len(tree)) * tree.area

    def cuts(node):  # every set of nodes below one of which none is in another
        yield [node]
        yield []
        if node >= tree.num_pieces:
            left, right = tree.parts[node - tree.num_pieces]
            for one, other in itertools.product(cuts(left), cuts(right)):
                yield one + other

    best = max(sum(worth[cut]) for cut in cuts(len(tree) - 1))
    assert sum(worth[tree.best_cut(worth)]) == pytest.approx(best)
