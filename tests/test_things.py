"""Scenes of things: exact masks, facts without doubt, and what they are drawn from.

Nothing here is fetched: the sets are polygons that the tests draw themselves.
"""

import hashlib
import math
import sys
from collections import Counter

import numpy as np
import pytest
from perceptiondlm.common.extras import MissingExtra
from perceptiondlm.scenes import backgrounds, emoji_sets, thing_arrangement, things
from perceptiondlm.scenes.concepts import Concept
from perceptiondlm.scenes.language import GRID
from perceptiondlm.scenes.thing_arrangement import CUT, HIDDEN, NOT_ON, ON, SIZES, facts_of
from perceptiondlm.scenes.things import SPLITS, Sources, render_thing_scene
from PIL import Image, ImageDraw
from test_scenes import in_polygon

SIDE = emoji_sets.SPRITE_SIDE
POLYGONS = {  # corners in shares of the longer side
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 0.9), (0, 0.9)],
    "bar": [(0, 0), (1, 0), (1, 0.35), (0, 0.35)],
    "kite": [(0.4, 0), (0.8, 0.3), (0.4, 1), (0, 0.3)],
    "arrowhead": [(0, 0), (1, 0.4), (0, 0.8), (0.3, 0.4)],
}
SHADES = 6  # of every polygon; a scene of 24 things needs as many concepts


def played_concepts() -> list[Concept]:
    names = [f"{name} {k}" for name in POLYGONS for k in range(SHADES)]
    return [Concept(name, (), "toy", f"{k:x}", False, False, False) for k, name in enumerate(names)]


def color_of(name: str) -> tuple[int, int, int]:
    """One of 30 colors that are far apart."""
    k = [concept.name for concept in played_concepts()].index(name)
    return (40 + 100 * (k % 3), 40 + 100 * (k // 3 % 3), 45 + 55 * (k // 9))


def played_sprite(name: str) -> np.ndarray:
    corners = [(SIDE * x, SIDE * y) for x, y in POLYGONS[name.split()[0]]]
    width, height = (round(max(axis)) for axis in zip(*corners, strict=True))
    y, x = np.mgrid[:height, :width] + 0.5
    inside = in_polygon(x, y, corners)
    return np.dstack([np.full((height, width, 3), color_of(name), np.uint8), 255 * inside]).astype(
        np.uint8
    )


@pytest.fixture(scope="module")
def atlases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlases")
    concepts, loaded = played_concepts(), {}
    for name in emoji_sets.SETS:
        sprites = {concept.name: played_sprite(concept.name) for concept in concepts}
        emoji_sets.save_atlas(emoji_sets.Atlas(name, sprites), folder / f"{name}.npz")
        loaded[name] = emoji_sets.load_atlas(name, folder / f"{name}.npz", concepts)
    return loaded


def played_photographs() -> dict[str, Image.Image]:
    """Gradients: red grows from left to right, green from top to bottom."""
    ramp = np.linspace(0, 255, 300)
    image = np.zeros((200, 300, 3), np.uint8)
    image[..., 0], image[..., 1] = ramp, ramp[:200, None]
    names = backgrounds.SEEN_PHOTOGRAPHS | backgrounds.UNSEEN_PHOTOGRAPHS
    return {name: Image.fromarray(image) for name in names}


@pytest.fixture(scope="module")
def sources(atlases):
    return Sources(atlases, played_photographs())


def arranged(sources, seeds: int, count: int | None = None):
    """Placed layers of some scenes and the size of each image."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        size = things._canvas_size(rng)
        number = count or int(rng.integers(2, 9))
        yield things._arranged(rng, sources, SPLITS["train"], number, size), size


def outline(layer) -> np.ndarray:
    """The corners (x, y) of a layer's polygon on the image, from its pose alone."""
    pose = layer.pose
    x, y = np.array(POLYGONS[pose.concept.split()[0]]).T
    points = ((-x if pose.is_mirrored else x) + 1j * y) * np.exp(1j * pose.angle)
    points = np.stack([points.real, points.imag], 1)
    low, high = points.min(0), points.max(0)
    points = (points - (low + high) / 2) * pose.diameter / (high - low).max()
    rows, columns = layer.mask.shape
    return points + [layer.origin[1] + columns / 2, layer.origin[0] + rows / 2]


def distance_to_edge(shape, corners) -> np.ndarray:
    """(H, W) distances of pixel centers to a polygon's edge."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    nearest = np.full(shape, np.inf)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2)
        along = np.clip(along, 0, 1)
        gap = np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0))
        nearest = np.minimum(nearest, gap)
    return nearest


def whole(layer, size, margin: int = 0) -> np.ndarray:
    """The polygon of a layer, whatever lies over it, on the image grown by a margin."""
    height, width = size
    y, x = np.mgrid[-margin : height + margin, -margin : width + margin] + 0.5
    return in_polygon(x, y, [tuple(corner) for corner in outline(layer)])


def digest(scene) -> str:
    found = hashlib.sha256(scene.image.tobytes())
    for thing in scene.things:
        found.update(thing.mask.tobytes() + repr(thing.facts).encode())
    return found.hexdigest()


# ------------------------------------------------------------------ a function of its seed


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_depends_on_its_split_and_seed_alone(atlases, split):
    first = Sources(atlases, played_photographs())
    forward = [digest(render_thing_scene(seed, split, sources=first)) for seed in range(4)]
    again = Sources(atlases, played_photographs())
    backward = [digest(render_thing_scene(s, split, sources=again)) for s in (3, 2, 1, 0)]
    assert forward == backward[::-1] and len(set(forward)) == 4


def test_splits_share_no_scene(sources):
    digests = [
        digest(render_thing_scene(seed, split, sources=sources))
        for split in SPLITS
        for seed in range(5)
    ]
    assert len(set(digests)) == 5 * len(SPLITS)


def test_rendering_does_not_touch_numpys_global_state(sources):
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    render_thing_scene(0, sources=sources)
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize(
    "seed, split, count, said",
    [
        (-1, "train", None, "seed >= 0, got -1"),
        (0, "test", None, "split out of"),
        (0, "train", 0, "count from 1 to 24, got 0"),
        (0, "train", 25, "count from 1 to 24, got 25"),
    ],
)
def test_a_bad_seed_split_or_count_raises(sources, seed, split, count, said):
    with pytest.raises(ValueError, match=said):
        render_thing_scene(seed, split, count=count, sources=sources)


@pytest.mark.parametrize("count", [1, 2, 8, 13, 24])
def test_a_scene_holds_as_many_different_things_as_are_asked_for(sources, count):
    for seed in range(3):
        scene = render_thing_scene(seed, count=count, sources=sources)
        assert len({thing.facts.concept for thing in scene.things}) == count


# ------------------------------------------------------------------ exact masks


def test_masks_are_the_polygons_less_what_lies_above_them(sources):
    for layers, size in arranged(sources, 15):
        above, near = np.zeros(size, bool), np.zeros(size, bool)
        for layer in reversed(layers):
            polygon = whole(layer, size)
            near |= distance_to_edge(size, outline(layer)) < 1
            wrong = layer.visible ^ (polygon & ~above)
            assert not (wrong & ~near).any(), layer.pose
            assert wrong.sum() <= 0.6 * near.sum(), layer.pose
            above |= polygon


def test_masks_are_bool_of_the_images_size_and_disjoint(sources):
    for seed in range(20):
        scene = render_thing_scene(seed, sources=sources)
        masks = [thing.mask for thing in scene.things]
        assert {mask.dtype for mask in masks} == {np.dtype(bool)}
        assert {mask.shape for mask in masks} == {scene.image.size[::-1]}
        assert np.sum(masks, axis=0).max() == 1


def test_a_mask_shows_its_things_color(sources, monkeypatch):
    monkeypatch.setattr(things, "MAX_NOISE", 0.0)
    monkeypatch.setattr(things, "JPEG_SHARE", 0.0)
    monkeypatch.setattr(things, "_shade", lambda canvas, layer: None)
    for seed in range(15):
        scene = render_thing_scene(seed, "heldout", sources=sources)
        pixels = np.asarray(scene.image, float)
        for thing in scene.things:
            inner = ~_grown(_grown(~thing.mask))  # edges are soft
            if inner.sum() < 20:
                continue
            seen = pixels[inner] / color_of(thing.facts.concept)
            gains = np.median(seen, axis=0)  # one for a thing
            assert (0.7 < gains).all() and (gains < 1.2).all()
            assert np.mean(abs(seen - gains).max(1) < 0.05) > 0.97


def drawn(sources, **restyling) -> things.Layer:
    pose = things.Pose(
        "square 5", "noto", "small", 40, 0.0, False, (1, 1, 1), (0, 0, 0), **restyling
    )
    return things.Layer.of(pose, sources.sprite("noto", "square 5"))


def test_hues_are_turned_as_colors_are_on_the_wheel(sources):
    """By a third of it red goes to green, green to blue and blue to red, as bright as before."""
    inner, luma = (slice(10, -10), slice(10, -10)), np.array([0.299, 0.587, 0.114])
    plain = drawn(sources).color[inner][0, 0]
    swapped = plain[[2, 0, 1]]
    turned = drawn(sources, hue=math.radians(120)).color[inner]
    assert np.allclose(turned, np.clip(swapped + (plain - swapped) @ luma, 0, 1), atol=1e-3)
    gray = drawn(sources, saturation=0.0).color[inner]
    assert np.allclose(gray, plain @ luma, atol=1e-3)


def test_lines_darken_edges_alone_and_leave_the_mask(sources):
    plain, lined = drawn(sources), drawn(sources, line=1.0)
    assert np.array_equal(plain.mask, lined.mask) and np.array_equal(plain.alpha, lined.alpha)
    inner = ~_grown(_grown(~plain.mask))
    assert np.array_equal(plain.color[inner], lined.color[inner])
    edge = plain.mask & _grown(~plain.mask)
    assert lined.color[edge].mean() < 0.7 * plain.color[edge].mean()


def test_training_alone_draws_things_in_other_colors_and_lines(sources, monkeypatch):
    poses = {}
    of = things.Layer.of
    for split in SPLITS:
        seen = poses.setdefault(split, [])
        monkeypatch.setattr(
            things.Layer,
            "of",
            lambda pose, sprite, seen=seen: seen.append(pose) or of(pose, sprite),
        )
        for seed in range(40):
            render_thing_scene(seed, split, sources=sources)
    plain = (0.0, 1.0, 0.0)
    shares = {
        split: np.mean([(pose.hue, pose.saturation, pose.line) != plain for pose in seen])
        for split, seen in poses.items()
    }
    assert 0.2 < shares.pop("train") < 0.4 and set(shares.values()) == {0.0}


def _grown(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


# ------------------------------------------------------------------ facts


def test_positions_centers_and_areas_follow_from_the_masks(sources):
    for seed in range(30):
        for thing in render_thing_scene(seed, sources=sources).things:
            rows, columns = np.nonzero(thing.mask)
            height, width = thing.mask.shape
            y = (rows.min() + rows.max() + 1) / 2 / height
            x = (columns.min() + columns.max() + 1) / 2 / width
            row, column = (y > 1 / 3) + int(y > 2 / 3), (x > 1 / 3) + int(x > 2 / 3)
            assert thing.facts.position == GRID[int(row)][int(column)]
            assert min(abs(c - line) for c in (x, y) for line in (1 / 3, 2 / 3)) >= 0.0299
            assert thing.facts.center == pytest.approx((x, y))
            assert thing.facts.area == pytest.approx(thing.mask.mean())


def test_sizes_are_those_of_the_whole_polygon_and_never_between_two(sources):
    for layers, size in arranged(sources, 40):
        for k, layer in enumerate(layers):
            diameter = np.ptp(outline(layer), axis=0).max() / min(size)
            low, high = SIZES[facts_of(layers, k).size]
            assert low - 1e-6 <= diameter <= high + 1e-6
            box = [np.ptp(np.flatnonzero(layer.mask.any(axis))) + 1 for axis in (0, 1)]
            assert abs(max(box) - layer.pose.diameter) <= 2.5


def test_what_hides_a_thing_is_what_shows_most_in_its_place(sources):
    for layers, size in arranged(sources, 40):
        shown = np.full(size, -1)
        wholes = [whole(layer, size) for layer in layers]
        for k, polygon in enumerate(wholes):
            shown[polygon] = k

        for k, polygon in enumerate(wholes):
            facts = facts_of(layers, k)
            counts = Counter(shown[polygon].tolist())
            share = 1 - counts.pop(k) / polygon.sum()
            low, high = HIDDEN[facts.hidden]
            assert low - 0.04 <= share <= high + 0.04, facts  # edges are a pixel wide
            if facts.hidden == "whole":
                assert facts.hidden_by is None
                continue
            (hider, most), *others = counts.most_common()
            assert facts.hidden_by == hider
            # by half more than the next one, but for pixels of the edges
            assert not others or most + 25 >= 1.5 * others[0][1]


def test_a_thing_that_covers_what_hides_another_keeps_the_hider_clear(sources):
    """The uppermost would hide as much of the lowest as the middle one, in its place."""

    def square(left: int, top: int, side: int):
        pose = things.Pose("square 0", "noto", "small", side, 0.0, False, (1, 1, 1), (0, 0, 0))
        layer = things.Layer.of(pose, sources.sprite("noto", "square 0"))
        layer.place(top, left, (100, 100))
        return layer

    lowest, middle = square(38, 38, 40), square(26, 36, 24)
    assert thing_arrangement._fits([lowest]) and thing_arrangement._fits([lowest, middle])
    shown = lowest.visible.copy()
    assert not thing_arrangement._fits([lowest, middle, square(26, 25, 24)])
    assert (lowest.visible == shown).all()


def test_no_thing_loses_more_than_three_fifths_of_its_pixels(sources):
    shares = [
        thing.hidden_share
        for seed in range(30)
        for thing in render_thing_scene(seed, sources=sources).things
    ]
    assert max(shares) <= 0.6
    assert sum(share > 0.05 for share in shares) > 0.2 * len(shares)


def test_one_thing_lies_on_another_exactly_where_its_polygon_is_within_the_others(sources):
    found = 0
    for layers, size in arranged(sources, 40):
        wholes = [whole(layer, size) for layer in layers]
        for k in range(len(layers)):
            on = facts_of(layers, k).on
            found += on is not None
            for i in range(k):
                share = (wholes[k] & wholes[i]).sum() / wholes[k].sum()
                assert share >= ON - 0.06 if i == on else share <= NOT_ON + 0.06
    assert found > 10


def test_a_border_cuts_off_what_reaches_beyond_it(sources):
    found = Counter()
    for layers, size in arranged(sources, 40):
        height, width = size
        for k, layer in enumerate(layers):
            (left, top), (right, bottom) = outline(layer).min(0), outline(layer).max(0)
            beyond = {"left": -left, "right": right - width, "top": -top, "bottom": bottom - height}
            cut = facts_of(layers, k).cut
            found[cut] += 1
            assert all((gap > 1) if name == cut else (gap < 1) for name, gap in beyond.items())
            if cut:
                polygon, margin = whole(layer, size, 150), slice(150, -150)
                share = 1 - polygon[margin, margin].sum() / polygon.sum()
                assert CUT[0] - 0.05 <= share <= CUT[1] + 0.05
    assert all(found[name] for name in ("left", "right", "top", "bottom"))


def test_every_value_of_every_fact_occurs(sources):
    facts = [
        thing.facts
        for seed in range(80)
        for thing in render_thing_scene(seed, sources=sources).things
    ]
    for name, values in (("size", SIZES), ("hidden", HIDDEN), ("position", sum(GRID, ()))):
        counts = Counter(getattr(fact, name) for fact in facts)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.01 * len(facts), counts


def test_things_stand_nearly_upright(sources):
    angles = [layer.pose.angle for layers, _ in arranged(sources, 40) for layer in layers]
    assert max(map(abs, angles)) <= math.radians(25)
    assert np.std(angles) > math.radians(6)


def test_24_things_fit_where_no_arrangement_is_found(sources, monkeypatch):
    monkeypatch.setattr(things, "SCENE_TRIES", 0)
    for seed in range(10):
        scene = render_thing_scene(seed, count=24, sources=sources)
        for thing in scene.things:
            assert thing.facts.hidden == "whole" and thing.facts.cut is None
            center = thing.facts.center
            assert min(abs(c - line) for c in center for line in (1 / 3, 2 / 3)) >= 0.0299


# ------------------------------------------------------------------ splits and backgrounds


def test_splits_keep_styles_and_photographs_apart():
    train, held_out = SPLITS["train"], SPLITS["heldout"]
    assert held_out.styles == train.styles and held_out.photographs == train.photographs
    assert not set(SPLITS["unseen_style"].styles) & set(train.styles)
    assert not set(SPLITS["unseen_background"].photographs) & set(train.photographs)
    assert {train.part, held_out.part} == {"train", "heldout"}


def test_a_scenes_things_are_drawn_in_the_styles_of_its_split(sources):
    for split, expected in SPLITS.items():
        styles = {
            thing.style
            for seed in range(12)
            for thing in render_thing_scene(seed, split, sources=sources).things
        }
        assert styles == set(expected.styles)


def test_what_is_held_out_of_a_photograph_is_never_trained_on():
    image = next(iter(played_photographs().values()))  # red tells the column
    line = 255 * backgrounds.HELD_OUT_FROM
    for seed in range(60):
        for part in ("train", "heldout"):
            rng = np.random.default_rng(seed)
            red = np.asarray(backgrounds._photograph(rng, image, part, 120, 160))[..., 0]
            assert red.max() <= line + 2 if part == "train" else red.min() >= line - 2


def test_backgrounds_have_the_scenes_size_and_vary():
    photographs = played_photographs()
    names = tuple(backgrounds.SEEN_PHOTOGRAPHS)
    means = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        pixels = backgrounds.draw_background(rng, photographs, names, "train", (90, 130))
        assert pixels.shape == (90, 130, 3) and pixels.dtype == np.float32
        assert 0 <= pixels.min() and pixels.max() <= 255
        means.append(pixels.mean((0, 1)))
    assert np.std(means, axis=0).min() > 15


def test_the_photographs_come_from_the_packages_data():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    opened = backgrounds.open_photographs()
    assert set(opened) == set(backgrounds.SEEN_PHOTOGRAPHS | backgrounds.UNSEEN_PHOTOGRAPHS)
    assert all(image.mode == "RGB" and min(image.size) > 200 for image in opened.values())


def test_photographs_that_are_not_installed_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets.images", None)
    monkeypatch.setattr(backgrounds, "SEEN_PHOTOGRAPHS", {"a.jpg": "sklearn.datasets.images"})
    with pytest.raises(MissingExtra, match=r"perceptiondlm\[scenes\]"):
        backgrounds.open_photographs()


def test_played_polygons_are_drawn_as_pillow_draws_them():
    corners = [(SIDE * x, SIDE * y) for x, y in POLYGONS["kite"]]
    image = Image.new("L", (round(0.8 * SIDE), SIDE))
    ImageDraw.Draw(image).polygon(corners, fill=255)
    ours = played_sprite("kite 0")[:, : image.width, 3] > 0
    assert (ours ^ (np.asarray(image) > 0)).mean() < 0.03
