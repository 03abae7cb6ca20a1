"""Synthetic scenes: reproducible, exactly masked, evenly varied, truthfully described."""

import hashlib
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from perceptiondlm.scenes import shape_objects as scene_objects
from perceptiondlm.scenes import shapes as scenes
from perceptiondlm.scenes.language import (
    GRID,
    NUMBERS,
    VOCABULARY,
    answer_matches,
    ask,
    caption_of,
    named_values,
)
from perceptiondlm.scenes.shape_objects import COLORS
from perceptiondlm.scenes.shapes import iter_corpus, render_scene
from perceptiondlm.training.synthetic import draw_questions

COUNT = 300


def parse_caption(text: str) -> dict[str, str | None]:
    """The attributes that a text states; None for one of which it names no value, or several."""
    named = named_values(text)
    return {name: min(values) if len(values) == 1 else None for name, values in named.items()}


def digest(scene) -> str:
    """A hash of everything in a scene."""
    parts = [np.asarray(scene.image).tobytes(), repr(scene.questions).encode()]
    for thing in scene.objects:
        parts += [thing.mask.tobytes(), thing.caption.encode()]
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def pixels(scene) -> np.ndarray:
    return np.asarray(scene.image).astype(int)


def objects(many):
    return [thing for scene in many for thing in scene.objects]


@pytest.fixture(scope="module")
def many():
    return [render_scene(seed) for seed in range(COUNT)]


def arrangements(count: int):
    """The layers of some scenes, drawn as `render_scene` draws them."""
    for seed in range(count):
        rng = np.random.default_rng([0, seed])
        yield seed, scenes._arrange(rng, *scenes._canvas_size(rng, "train"), "train")


# ------------------------------------------------------------------ reproducible


@pytest.mark.slow
def test_a_fresh_process_renders_the_same_bits():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_scenes import digest, render_scene;"
        "print(*[digest(render_scene(seed, 'heldout')) for seed in range(5)])"
    )
    folder = __file__.rpartition("/")[0]
    command = [sys.executable, "-W", "ignore", "-c", code, folder]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert there == [digest(render_scene(seed, "heldout")) for seed in range(5)]


def test_rendering_does_not_touch_numpys_global_state():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    render_scene(0)
    assert (np.random.get_state()[1] == before).all()


def test_train_and_heldout_share_no_scene(many):
    heldout = {digest(render_scene(seed, "heldout")) for seed in range(COUNT)}
    train = {digest(scene) for scene in many}
    assert len(train) == len(heldout) == COUNT
    assert not train & heldout


@pytest.mark.parametrize("seed, split", [(-1, "train"), (0, "test")])
def test_a_bad_seed_or_split_raises(seed, split):
    with pytest.raises(ValueError, match="expected a s"):
        render_scene(seed, split)


# ------------------------------------------------------------------ exact masks

# whether a point (in units of the radius, unrotated) is inside, written without distances
INSIDE = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: (-0.86 <= x) & (x <= 0.86) & (-0.86 <= y) & (y <= 0.86),
    "triangle": lambda x, y: in_polygon(x, y, [(0, -0.87), (1, 0.87), (-1, 0.87)]),
    "star": lambda x, y: in_polygon(x, y, star_corners(1.08, 0.52)),
    "ring": lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= 0.42**2),
    "cross": lambda x, y: ((abs(x) <= 1) & (abs(y) <= 0.36)) | ((abs(x) <= 0.36) & (abs(y) <= 1)),
}


def star_corners(outer: float, inner: float):
    turns = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, inner, outer)
    return list(zip(radii * np.sin(turns), -radii * np.cos(turns), strict=True))


def in_polygon(x, y, corners):
    """Even-odd rule."""
    inside = np.zeros(np.shape(x), bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            crossing = (y0 > y) != (y1 > y)
            inside ^= crossing & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def redrawn(layer) -> np.ndarray:
    """The whole silhouette of a layer on the canvas, from its plan alone."""
    height, width = layer.visible.shape
    plan, (x0, y0) = layer.plan, layer.center
    x = np.arange(width)[None, :] + 0.5 - x0 - plan.offset[0]
    y = np.arange(height)[:, None] + 0.5 - y0 - plan.offset[1]
    turned = (x + 1j * y) * np.exp(-1j * plan.angle) / (plan.diameter / 2)
    return INSIDE[plan.shape](turned.real, turned.imag)


def test_masks_are_the_redrawn_shapes_less_what_lies_above_them():
    for seed, layers in arrangements(60):
        above = np.zeros(layers[0].visible.shape, bool)
        for layer in reversed(layers):
            whole = redrawn(layer)
            # a pixel center exactly on an edge may fall either way
            assert (layer.visible ^ (whole & ~above)).sum() <= 1, (seed, layer.plan)
            above |= whole


def test_scene_masks_are_those_of_the_arrangement(many):
    for seed, layers in arrangements(20):
        for thing, layer in zip(many[seed].objects, layers, strict=True):
            assert np.array_equal(thing.mask, layer.visible)


def test_masks_are_bool_of_the_images_size_and_disjoint(many):
    for scene in many:
        assert {thing.mask.dtype for thing in scene.objects} == {np.dtype(bool)}
        assert sum(thing.mask.astype(int) for thing in scene.objects).max() == 1
        assert {thing.mask.shape for thing in scene.objects} == {scene.image.size[::-1]}


def test_some_objects_are_occluded_and_none_loses_more_than_an_eighth():
    shares = [
        layer.visible.sum() / redrawn(layer).sum() for _, ls in arrangements(80) for layer in ls
    ]
    assert min(shares) >= 0.875
    assert sum(share < 0.97 for share in shares) > 0.05 * len(shares)


def test_objects_lie_inside_the_image_and_are_32_pixels_across():
    for _, layers in arrangements(80):
        for layer in layers:
            whole = redrawn(layer)
            assert not (
                whole[0].any() or whole[-1].any() or whole[:, 0].any() or whole[:, -1].any()
            )
            assert layer.plan.diameter >= 32


def test_small_and_large_are_far_apart():
    assert scenes.SIZES["large"][0] > 1.4 * scenes.SIZES["small"][1]


# ------------------------------------------------------------------ what can be seen


def test_plain_objects_have_their_color_and_no_other(many):
    mains = {name: np.array(main) for name, (main, _) in COLORS.items()}
    for scene in many:
        for thing in scene.objects:
            if thing.attributes["pattern"] == "plain":
                seen = np.median(pixels(scene)[thing.mask], axis=0)
                distances = {name: np.linalg.norm(seen - main) for name, main in mains.items()}
                assert min(distances, key=distances.get) == thing.attributes["colour"]


def test_patterned_objects_show_both_tones_of_their_color(many):
    for scene in many:
        for thing in scene.objects:
            tones = np.array(COLORS[thing.attributes["colour"]])  # (2, 3)
            seen = pixels(scene)[thing.mask][:, None]  # (N, 1, 3)
            nearest = np.linalg.norm(seen - tones, axis=-1).argmin(1)
            second = nearest.mean()
            if thing.attributes["pattern"] != "plain":
                assert 0.12 < second < 0.65, thing.caption


def test_colors_are_far_apart_and_far_from_their_second_tones():
    tones = [np.array(main) for main, _ in COLORS.values()]
    for k, (_, second) in enumerate(COLORS.values()):
        others = tones[:k] + tones[k + 1 :]
        assert min(np.linalg.norm(tones[k] - other) for other in others) > 95
        assert np.linalg.norm(tones[k] - second) > 120


def test_objects_stand_out_from_the_background(many):
    for scene in many:
        ground = ~np.any([thing.mask for thing in scene.objects], axis=0)
        ground = pixels(scene)[ground].mean(0)
        for thing in scene.objects:
            main = np.array(COLORS[thing.attributes["colour"]][0])
            assert np.linalg.norm(main - ground) > 80, thing.caption


def test_like_colors_never_touch(many):
    for scene in many:
        things = scene.objects
        for k, one in enumerate(things):
            grown = one.mask.copy()
            grown[1:] |= one.mask[:-1]
            grown[:-1] |= one.mask[1:]
            grown[:, 1:] |= one.mask[:, :-1]
            grown[:, :-1] |= one.mask[:, 1:]
            for other in things[k + 1 :]:
                if one.attributes["colour"] == other.attributes["colour"]:
                    assert not (grown & other.mask).any()


def runs(line: np.ndarray) -> int:
    """How many runs of True a boolean line has."""
    return int(line[0]) + int((line[1:] & ~line[:-1]).sum())


@pytest.mark.parametrize("shape", VOCABULARY["shape"])
def test_the_smallest_objects_show_three_stripes_or_four_dots(shape):
    rng = np.random.default_rng(0)
    for pattern, least in (("striped", 3), ("dotted", 4)):
        plan = scenes._plan(rng, 112, 0.0, (1, 1))
        fields = {"shape": shape, "pattern": pattern, "diameter": 32.5, "angle": 0.0}
        plan = type(plan)(**{**vars(plan), **fields, "stripe_angle": 0.0, "offset": (0.0, 0.0)})
        layer = scene_objects.Layer.of(plan)
        tone = scene_objects.pattern_tone(plan, len(layer.distance) // 2)
        tone = tone * (layer.distance <= 0) > 0.5
        if pattern == "striped":
            assert runs(tone.any(0)) >= least
        else:
            assert sum(area >= 4 for area in islands(tone)) >= least


def islands(mask: np.ndarray) -> list[int]:
    """Areas of the 4-connected components of a mask."""
    left, areas = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        stack, area = [left.pop()], 0
        while stack:
            row, column = stack.pop()
            area += 1
            for near in (
                (row + 1, column),
                (row - 1, column),
                (row, column + 1),
                (row, column - 1),
            ):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        areas.append(area)
    return areas


# ------------------------------------------------------------------ variety


@pytest.mark.parametrize("name", VOCABULARY)
def test_the_values_of_every_attribute_are_about_as_frequent(name, many):
    counts = Counter(thing.attributes[name] for thing in objects(many))
    assert set(counts) == set(VOCABULARY[name])
    mean = sum(counts.values()) / len(counts)
    assert 0.7 * mean < min(counts.values()) and max(counts.values()) < 1.35 * mean


def test_scenes_hold_two_to_eight_objects_and_each_number_occurs(many):
    assert {len(scene.objects) for scene in many} == set(range(2, 9))


def test_sizes_and_aspects_vary_within_bounds(many):
    sizes = [scene.image.size for scene in many]
    assert all(96 <= min(size) <= 160 for size in sizes)
    assert all(0.49 < width / height < 2.01 for width, height in sizes)
    assert len({round(width / height, 1) for width, height in sizes}) >= 7


def test_a_scene_that_cannot_be_arranged_falls_back_to_two_objects(monkeypatch):
    monkeypatch.setattr(scenes, "SCENE_TRIES", 0)
    for seed in range(40):
        names = [thing.attributes["position"] for thing in render_scene(seed).objects]
        assert names == ["top left", "bottom right"]


# ------------------------------------------------------------------ language


def test_positions_follow_from_the_masks_and_keep_clear_of_the_grid(many):
    for scene in many:
        for thing in scene.objects:
            rows, columns = np.nonzero(thing.mask)
            height, width = thing.mask.shape
            y = (rows.min() + rows.max() + 1) / 2 / height
            x = (columns.min() + columns.max() + 1) / 2 / width
            row, column = int(y > 1 / 3) + int(y > 2 / 3), int(x > 1 / 3) + int(x > 2 / 3)
            assert thing.attributes["position"] == GRID[row][column]
            assert min(abs(c - line) for c in (x, y) for line in (1 / 3, 2 / 3)) >= 0.0499


def test_captions_parse_to_their_attributes(many):
    for thing in objects(many[:200]):
        assert parse_caption(thing.caption) == thing.attributes


def test_every_possible_caption_parses_back():
    values = [{name: VOCABULARY[name][0] for name in VOCABULARY}]
    for name in VOCABULARY:
        values += [{**values[0], name: value} for value in VOCABULARY[name]]
    for attributes in values:
        assert parse_caption(caption_of(attributes)) == attributes


def test_free_text_parses_whatever_its_case_order_and_punctuation():
    parsed = parse_caption("At the BOTTOM-right, there's a Star: white, dotted. Small!")
    assert list(parsed.values()) == ["star", "white", "small", "dotted", "bottom right"]


@pytest.mark.parametrize("text", ["", "a thing", "reddish circles, topmost, starry"])
def test_a_missing_attribute_is_none(text):
    assert set(parse_caption(text).values()) == {None}


def test_two_values_of_an_attribute_are_none_but_a_repeated_one_is_not():
    assert parse_caption("a red and blue star")["colour"] is None
    assert parse_caption("a red, really red star")["colour"] == "red"
    assert parse_caption("top left or top")["position"] is None


def facts(scene) -> list[dict[str, str]]:
    return [thing.attributes for thing in scene.objects]


def answer(question, things) -> str:
    """The answer worked out again from the words of the question."""
    said = {name: value for name, value in parse_caption(question.question).items() if value}
    found = [t for t in things if all(t[name] == value for name, value in said.items())]
    if question.question.startswith("How many"):
        return NUMBERS[len(found)]
    if question.question.startswith("Is there"):
        return "yes" if found else "no"
    assert len(found) == 1, question
    return found[0]["colour" if question.question.startswith("What colour") else "shape"]


def test_answers_are_true_of_the_scene(many):
    for scene in many:
        for question in scene.questions:
            assert question.answer == answer(question, facts(scene)), question


def test_every_kind_of_question_occurs_and_a_scene_has_three_to_six(many):
    kinds = Counter(question.kind for scene in many for question in scene.questions)
    assert len(kinds) == 6 and min(kinds.values()) > 0.8 * COUNT
    assert all(3 <= len(scene.questions) <= 6 for scene in many)


@pytest.mark.parametrize("most", [1, 4, 12])
def test_questions_drawn_for_training_differ_and_are_true(many, most):
    for seed, scene in enumerate(many[:40]):
        objects = [thing.attributes for thing in scene.objects]
        drawn = draw_questions(np.random.default_rng(seed), objects, most)
        assert len(drawn) <= most and len(drawn) >= min(most, 4)
        assert len({question.question for question in drawn}) == len(drawn)
        assert all(q.answer == answer(q, facts(scene)) for q in drawn)


def test_a_single_question_drawn_for_training_is_of_any_kind(many):
    random = np.random.default_rng(0)
    objects = [thing.attributes for thing in many[0].objects]
    kinds = Counter(draw_questions(random, objects, 1)[0].kind for _ in range(200))
    asked = {question.kind for question in many[0].questions}
    assert set(kinds) == asked and min(kinds.values()) > 15


def test_yes_and_no_are_balanced(many):
    marks = [q.answer for scene in many for q in scene.questions if q.kind == "exists"]
    assert 0.4 < marks.count("yes") / len(marks) < 0.6


def test_questions_survive_a_scene_with_all_the_colors():
    things = [{**parse_caption("a small plain star at the top"), "colour": c} for c in COLORS]
    for seed in range(20):
        for question in ask(np.random.default_rng(seed), things):
            assert question.answer == answer(question, things)


def test_answers_match_up_to_case_space_and_punctuation_only():
    assert answer_matches(" Red  star. ", "red star")
    assert not answer_matches("red", "red star")
    assert not answer_matches("a red star", "red star")


def test_the_corpus_holds_captions_questions_and_answers(many):
    texts = list(iter_corpus(2))
    expected = []
    for scene in many[:2]:
        expected += [thing.caption for thing in scene.objects]
        expected += [text for q in scene.questions for text in (q.question, q.answer)]
    assert texts == expected


def test_rendering_takes_milliseconds():
    start = time.process_time()
    for seed in range(100):
        render_scene(seed)
    assert time.process_time() - start < 5  # 50 ms a scene; about 5 on an idle core
