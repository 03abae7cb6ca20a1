"""Each rule about region masks, on both sides of its threshold, on masks counted by hand."""

import numpy as np
import pytest
from engine_data import kept, record_of, rectangle, rules
from perceptiondlm.pipelines.mask_filters import (
    RULES,
    MaskFilters,
    MaskOptions,
    areas_of,
    border_share,
    hull_covered,
    insides,
    main_piece,
)

SIZE = (100, 80)  # width, height
OPEN = MaskOptions(  # no rule drops anything
    min_area_share=0,
    min_pixels=0,
    max_area_share=1,
    min_stability=0,
    min_predicted_iou=0,
    max_border_share=1,
    min_duplicate_iou=1,
    min_part_inside=1,
    max_part_area=0,
    min_main_piece=0,
    max_hull_covered=1,
)


def filtered(*masks, fields=None, **options):
    record = record_of(*masks, **(fields or {}))
    values = {**vars(OPEN), **options}
    (same,) = MaskFilters(MaskOptions(**values))([record])
    assert same is record and len(record.regions) + len(record.dropped) == len(masks)
    return record


def box(x0, y0, x1, y1):
    return rectangle(SIZE, x0, y0, x1, y1)


def test_open_options_drop_nothing():
    whole = rectangle(SIZE, 0, 0, *SIZE)
    assert kept(filtered(box(10, 10, 11, 11), whole, box(20, 20, 30, 30))) == "abc"


@pytest.mark.parametrize(
    ("options", "dropped"),
    [({"min_pixels": 100}, {}), ({"min_pixels": 101}, {"a": "tiny"})],
)
def test_a_region_of_100_pixels_is_tiny_below_101(options, dropped):
    assert rules(filtered(box(10, 10, 20, 20), **options)) == dropped


@pytest.mark.parametrize(("share", "dropped"), [(0.0125, {}), (0.0126, {"a": "tiny"})])
def test_100_of_8000_pixels_are_tiny_above_that_share(share, dropped):
    assert rules(filtered(box(10, 10, 20, 20), min_area_share=share)) == dropped


@pytest.mark.parametrize(("share", "dropped"), [(0.5, {}), (0.49, {"a": "large"})])
def test_half_the_image_is_large_below_half(share, dropped):
    assert rules(filtered(box(0, 0, 50, 80), max_area_share=share)) == dropped


@pytest.mark.parametrize("name", ["stability", "predicted_iou"])
def test_scores_of_the_segmenter_are_compared_and_those_that_are_missing_pass(name):
    masks = [box(10 * i, 10, 10 * i + 5, 15) for i in range(3)]
    record = filtered(*masks, fields={name: [0.9, 0.89, None]}, **{f"min_{name}": 0.9})
    assert rules(record) == {"b": "unstable"} and kept(record) == "ac"


def test_the_share_of_the_outline_at_the_border_is_counted():
    # 10 x 10 in the corner: an outline of 36 pixels, 19 of them on the first row or column
    assert border_share(box(0, 0, 10, 10)) == pytest.approx(19 / 36)
    assert border_share(box(1, 1, 11, 11)) == 0
    assert border_share(box(90, 70, 100, 80)) == pytest.approx(19 / 36)
    assert border_share(rectangle(SIZE, 0, 0, *SIZE)) == 1
    assert border_share(np.zeros((80, 100), bool)) == 0


@pytest.mark.parametrize(("share", "dropped"), [(0.53, {}), (0.52, {"a": "border"})])
def test_a_region_in_the_corner_is_cut_off_below_its_share(share, dropped):
    assert rules(filtered(box(0, 0, 10, 10), max_border_share=share)) == dropped


def test_insides_are_shares_of_the_first_region():
    regions = record_of(box(0, 0, 10, 10), box(5, 0, 25, 10)).regions
    assert areas_of(regions) == [100, 200]
    assert insides(regions).tolist() == [[1, 0.5], [0.25, 1]]


@pytest.mark.parametrize(("iou", "dropped"), [(0.91, {}), (0.9, {"b": "duplicate"})])
def test_of_two_masks_of_one_thing_the_less_stable_goes(iou, dropped):
    masks = box(10, 10, 30, 30), box(10, 10, 30, 28)  # 400 and 360 pixels: IoU 0.9
    record = filtered(*masks, fields={"stability": [0.99, 0.95]}, min_duplicate_iou=iou)
    assert rules(record) == dropped


def test_of_equally_stable_duplicates_the_smaller_goes():
    masks = box(10, 10, 30, 28), box(10, 10, 30, 30)
    assert rules(filtered(*masks, min_duplicate_iou=0.9)) == {"a": "duplicate"}


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ({"min_part_inside": 0.8, "max_part_area": 0.25}, {"b": "part"}),
        ({"min_part_inside": 0.81, "max_part_area": 0.25}, {}),
        ({"min_part_inside": 0.8, "max_part_area": 0.24}, {}),
    ],
)
def test_four_fifths_inside_a_region_of_four_times_the_area_is_a_part(options, dropped):
    whole, part = box(10, 10, 30, 30), box(26, 10, 31, 30)  # 400, 100 of which 80 inside
    assert rules(filtered(whole, part, **options)) == dropped


def test_a_region_inside_one_that_was_dropped_before_is_no_part():
    whole, part = box(10, 10, 60, 60), box(20, 20, 30, 30)
    fields = {"stability": [0.5, 0.99]}
    options = {"min_part_inside": 0.9, "max_part_area": 0.8}
    assert rules(filtered(whole, part, fields=fields, **options)) == {"b": "part"}
    record = filtered(whole, part, fields=fields, min_stability=0.9, **options)
    assert rules(record) == {"a": "unstable"} and kept(record) == "b"


@pytest.mark.parametrize(("share", "dropped"), [(0.75, {}), (0.76, {"a": "fragments"})])
def test_a_region_in_two_pieces_is_measured_by_the_larger(share, dropped):
    pieces = box(10, 10, 40, 20) | box(60, 10, 70, 20)  # 300 and 100 pixels
    assert main_piece(pieces) == 0.75
    assert rules(filtered(pieces, min_main_piece=share)) == dropped


def test_pieces_that_touch_at_a_corner_are_one():
    assert main_piece(box(10, 10, 20, 20) | box(20, 20, 30, 30)) == 1


@pytest.mark.parametrize(("share", "dropped"), [(0.26, {}), (0.24, {"a": "occluded"})])
def test_a_region_whose_hull_another_one_fills_is_occluded(share, dropped):
    """A square of 20 x 20 with a notch of 10 x 10 in which another region stands."""
    notch = box(30, 10, 40, 20)
    square = box(20, 10, 40, 30) & ~notch
    hull = hull_covered(square[10:30, 20:40], [notch[10:30, 20:40]])
    # the hull leaves out half of the notch but its diagonal: 45 to 55 of 345 to 355 pixels
    assert 0.12 < hull < 0.16
    wide = box(20, 10, 60, 30) & ~box(30, 10, 50, 20)  # a U, whose whole notch is in the hull
    filler = box(30, 10, 50, 20)
    assert hull_covered(wide, [filler]) == pytest.approx(200 / 800)
    assert rules(filtered(wide, filler, max_hull_covered=share)) == dropped


@pytest.mark.parametrize(("bottom", "dropped"), [(29, {"a": "occluded"}), (30, {})])
def test_a_region_that_is_half_inside_another_one_is_not_beside_it(bottom, dropped):
    """200 pixels of the second region fill the notch; 180 or 200 more are inside the first."""
    wide = box(20, 10, 60, 30) & ~box(30, 10, 50, 20)
    assert rules(filtered(wide, box(30, 10, 50, bottom), max_hull_covered=0.24)) == dropped


def test_the_hull_of_a_large_region_is_that_of_every_other_pixel():
    size = (600, 400)
    wide = rectangle(size, 100, 100, 500, 300) & ~rectangle(size, 200, 100, 400, 200)
    record = record_of(wide, rectangle(size, 200, 100, 400, 200))
    MaskFilters(MaskOptions(**{**vars(OPEN), "max_hull_covered": 0.2}))([record])
    (entry,) = record.dropped  # 200 x 100 of 400 x 200 pixels
    assert entry.rule == "occluded" and 0.245 < float(entry.reason.split()[-1]) < 0.255


@pytest.mark.filterwarnings("error")
def test_lines_points_and_nothing_have_hulls_too():
    line, other = np.eye(9, dtype=bool), np.zeros((9, 9), bool)
    other[0, 8] = True
    assert hull_covered(line, [other]) == 0
    assert hull_covered(other, [line]) == 0
    assert hull_covered(np.zeros((9, 9), bool), [line]) == 0
    assert hull_covered(np.ones((1, 5), bool), [np.ones((1, 5), bool)]) == 0


def test_a_notch_that_nothing_fills_is_the_regions_own_form():
    wide = box(20, 10, 60, 30) & ~box(30, 10, 50, 20)
    assert kept(filtered(wide, box(70, 50, 80, 60), max_hull_covered=0)) == "ab"


def test_rules_are_dropped_by_in_their_order_and_with_reasons():
    record = filtered(box(0, 0, 10, 10), min_pixels=500, max_border_share=0)
    (entry,) = record.dropped
    assert list(RULES).index("tiny") < list(RULES).index("border")
    assert (entry.stage, entry.rule) == ("masks", "tiny")
    assert entry.reason == "expected an area of 500 pixels or more, got 100"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_area_share": 2.0}, "masks.min_area_share between 0 and 1, got 2.0"),
        ({"min_pixels": -1}, "masks.min_pixels of 0 or more, got -1"),
        ({"max_area_share": 0.0}, "masks.min_area_share of at most masks.max_area_share"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskOptions(**options)
