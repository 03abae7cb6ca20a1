"""Drawings: everything can be read, nothing overlaps, colors can be told apart."""

import io
import itertools

import numpy as np
import pytest
from perceptiondlm.apps.captioning.animation import MAX_FRAMES, draw_steps, encode_animation
from perceptiondlm.apps.captioning.captioner import MASKED
from perceptiondlm.apps.captioning.drawing import (
    draw_answers,
    draw_regions,
    encode_image,
    place_badges,
)
from perceptiondlm.apps.captioning.panel import (
    INK,
    PALETTE,
    PAPER,
    Style,
    add_panel,
    contrasting,
    has_glyph,
    lay_out,
    readable,
    wrap,
)
from PIL import Image, ImageChops

LONG = "a round red plate with a thin golden rim, half hidden behind a folded newspaper"


def overlap(one, other) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def disjoint(boxes) -> bool:
    return not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))


def mask(size, box) -> Image.Image:
    region = Image.new("L", size)
    region.paste(255, box)
    return region


def lightness(color) -> float:
    """WCAG's relative luminance, as the standard writes it."""
    parts = [c / 255 for c in color]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("size", [(64, 48), (480, 640), (3000, 2000), (2000, 3000), (1200, 90)])
def test_a_drawing_has_a_size_that_can_be_looked_at(size):
    drawing = draw_regions(Image.new("RGB", size), [[1, 1, 30, 30]], [LONG])
    assert 720 <= max(drawing.size) <= 4000


def test_captions_stand_beside_a_tall_image_and_below_a_wide_one():
    tall = draw_regions(Image.new("RGB", (600, 800)), [[0, 0, 99, 99]], [LONG])
    wide = draw_regions(Image.new("RGB", (800, 500)), [[0, 0, 99, 99]], [LONG])
    assert tall.height == 800 and tall.width > 900
    assert wide.width == 800 and wide.height > 500


def test_the_image_outside_the_regions_is_left_as_it_is():
    noise = np.random.default_rng(0).integers(0, 256, (500, 900, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    drawing = draw_regions(image, [[600, 100, 800, 300]], [LONG])
    window = (0, 0, 560, 500)
    assert ImageChops.difference(drawing.crop(window), image.crop(window)).getbbox() is None


def test_a_region_keeps_its_colors_unless_a_fill_is_asked_for():
    image = Image.new("RGB", (900, 600), "yellow")
    region = [[100, 100, 800, 500]]
    assert draw_regions(image, region).getpixel((300, 200)) == (255, 255, 0)
    assert draw_regions(image, region, fill=True).getpixel((300, 200)) != (255, 255, 0)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_captions_never_overlap_and_stay_within_the_panel(count, beside):
    style = Style.fitting(900, None)
    texts = [LONG * (1 + i % 3) for i in range(count)]
    (entries,) = lay_out([texts], (100, 200), 900, style, 1 if beside else 2, True)
    assert disjoint([entry.box for entry in entries])
    assert all(100 <= e.box[0] and e.box[2] <= 1000 and e.box[1] >= 200 for e in entries)
    for entry in entries:
        assert [word for line in entry.lines for word in line] == texts[entry.number - 1].split()
        assert style.badge + style.line * (len(entry.lines) - 1) <= entry.box[3] - entry.box[1]


def test_no_ink_leaves_the_box_of_its_caption():
    style = Style.fitting(1000, None)
    image = Image.new("RGB", (1000, 400), PAPER)
    texts = [LONG, "short", LONG + " " + LONG]
    (frame,) = add_panel(image, [texts], style, numbered=True)
    (entries,) = lay_out([texts], (0, 400), 1000, style, 1, True)
    for entry in entries:
        frame.paste(PAPER, entry.box)
    assert ImageChops.invert(frame).getbbox() is None


@pytest.mark.parametrize("word", ["w" * 400, "https://" + "a-b/" * 90])
def test_a_word_wider_than_the_panel_is_broken_not_cut(word):
    style = Style.fitting(900, None)
    lines = wrap(f"before {word} after", 300, style)
    assert all(style.font.getlength(" ".join(line)) <= 300 for line in lines)
    assert "".join(piece for line in lines for piece in line) == f"before{word}after"


def test_marks_that_the_bundled_font_lacks_are_written_otherwise():
    font = Style.fitting(900, None).font
    assert not has_glyph(font, "—") and has_glyph(font, "a")
    assert readable("a — \N{LATIN SMALL LETTER G WITH BREVE}", font) == "a - g"


@pytest.mark.parametrize("count", [2, 12, 60])
def test_numbers_never_cover_each_other(count):
    size = (900, 600)
    rng = np.random.default_rng(count)
    corners = rng.integers(0, 500, (count, 2))
    masks = [mask(size, (x, y, x + 90, y + 90)) for x, y in corners.tolist()]
    style = Style.fitting(900, None)
    boxes = [box for box, _ in place_badges(masks, style, size)]
    assert disjoint(boxes)
    assert all(b[0] >= 0 and b[1] >= 0 and b[2] <= 900 and b[3] <= 600 for b in boxes)


def test_regions_on_the_same_place_get_numbers_side_by_side():
    size = (400, 400)
    masks = [mask(size, (150, 150, 250, 250))] * 5
    assert disjoint([box for box, _ in place_badges(masks, Style.fitting(900, None), size)])


def test_a_number_stands_on_its_region_and_beside_the_smaller_one_inside():
    size = (600, 600)
    outer, inner = mask(size, (50, 50, 550, 550)), mask(size, (200, 200, 400, 400))
    places = place_badges([outer, inner], Style.fitting(600, None), size)
    (outer_box, anchor), (inner_box, _) = places
    assert outer.getpixel(anchor) and not inner.getpixel(anchor)
    assert not overlap(outer_box, (200, 200, 400, 400))
    assert overlap(inner_box, (200, 200, 400, 400))


def test_a_region_of_one_pixel_is_still_marked():
    image = Image.new("RGB", (3000, 2000), "white")
    with_region = draw_regions(image, [mask(image.size, (1500, 1000, 1501, 1001))])
    assert with_region.getcolors(1 << 20) != [(with_region.width * with_region.height, PAPER)]


@pytest.mark.parametrize("color", PALETTE)
def test_a_number_can_be_read_on_its_color(color):
    light, dark = sorted([lightness(color), lightness(contrasting(color))], reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_ink_can_be_read_on_the_paper():
    assert (lightness(PAPER) + 0.05) / (lightness(INK) + 0.05) >= 7


# Machado et al. (2009), severity 1.0: linear RGB as the three kinds of color blindness see it.
BLINDNESS = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colors_are_told_apart_without_full_color_vision(kind):
    linear = (np.array(PALETTE) / 255) ** 2.2
    seen = np.clip(linear @ np.array(BLINDNESS[kind]).T, 0, 1) ** (1 / 2.2)
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 0.1


def test_a_caption_for_each_mask_is_expected():
    with pytest.raises(ValueError, match="each of 2 masks, got 1"):
        draw_regions(Image.new("RGB", (90, 90)), [[0, 0, 9, 9], [9, 9, 20, 20]], ["one"])


def test_an_empty_caption_leaves_a_note():
    empty = draw_regions(Image.new("RGB", (90, 90)), [[0, 0, 9, 9]], [""])
    noted = draw_regions(Image.new("RGB", (90, 90)), [[0, 0, 9, 9]], ["(nothing)"])
    assert empty.tobytes() == noted.tobytes()


def test_answers_are_drawn_in_full():
    short = draw_answers(Image.new("RGB", (800, 500)), ["What?"], ["A cup."])
    long = draw_answers(Image.new("RGB", (800, 500)), ["What?"], [LONG * 4])
    assert long.height > short.height > 500


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_drawing_is_written_as_its_name_says(suffix):
    data = encode_image(Image.new("RGB", (40, 30)), suffix)
    assert Image.open(io.BytesIO(data)).format in {"PNG", "JPEG", "WEBP"}


def steps_of(text: str) -> list[list[str]]:
    words = text.split()
    return [[" ".join(words[:n] + [MASKED] * (len(words) - n))] for n in range(len(words) + 1)]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_has_a_frame_for_each_step_and_holds_the_last(suffix):
    frames = draw_steps(Image.new("RGB", (120, 90)), [[0, 0, 60, 60]], steps_of("a red cup"))
    moving = Image.open(io.BytesIO(encode_animation(frames, suffix)))
    durations = []
    for index in range(moving.n_frames):
        moving.seek(index)
        moving.load()
        durations.append(moving.info["duration"])
    assert len(durations) == 4
    assert durations[-1] > 2000 > durations[1]


def test_frames_have_one_size_and_captions_stay_in_place():
    steps = [[MASKED, f"{MASKED} {LONG * 3}"], [LONG, "short"], [LONG * 2, "b"]]
    regions = [[0, 0, 60, 60], [60, 0, 90, 60]]
    frames = draw_steps(Image.new("RGB", (120, 90)), regions, steps)
    assert len({frame.size for frame in frames}) == 1
    style = Style.fitting(640, None)
    layouts = lay_out(steps, (0, 0), 640, style, 1, True)
    assert len({tuple(entry.box for entry in entries) for entries in layouts}) == 1


def test_masked_positions_are_drawn_as_blocks_not_letters():
    steps = [[MASKED], ["x"]]
    blank, letter = draw_steps(Image.new("RGB", (120, 90)), [[0, 0, 60, 60]], steps)
    assert ImageChops.difference(blank, letter).getbbox() is not None
    assert (214, 214, 220) in {color for _, color in blank.getcolors(1 << 20)}


def test_a_gif_keeps_the_colors_of_panel_and_badges():
    frames = draw_steps(Image.new("RGB", (120, 90), "grey"), [[0, 0, 60, 60]], steps_of("a cup"))
    moving = Image.open(io.BytesIO(encode_animation(frames, ".gif"))).convert("RGB")
    colors = {color for _, color in moving.getcolors(1 << 20)}
    assert {PAPER, PALETTE[0]} <= colors


def test_long_runs_are_thinned_for_an_animation():
    from perceptiondlm.apps.captioning.animation import _thin

    thinned = _thin(list(range(500)))
    assert (len(thinned), thinned[0], thinned[-1]) == (MAX_FRAMES, 0, 499)
