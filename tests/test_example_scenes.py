"""Scenes that are shown: what is said of them is so, and the files of things are what was drawn."""

import numpy as np
import pytest
from perceptiondlm.evaluation.scene_kinds import KINDS
from perceptiondlm.generation_templates import Template
from perceptiondlm.regions.load import load_regions
from perceptiondlm.scenes import thing_examples
from perceptiondlm.scenes.concepts import concept_named
from perceptiondlm.scenes.emoji_sets import SEEN_SETS
from perceptiondlm.scenes.example_scenes import EXAMPLE_KINDS, open_example
from perceptiondlm.scenes.language import GRID
from perceptiondlm.scenes.thing_examples import NAMES, open_thing_example, save_thing_example
from perceptiondlm.scenes.thing_parser import read_caption
from perceptiondlm.scenes.things import render_thing_scene
from played_things import played_sources

SHOWN = [(kind, seed) for kind, own in EXAMPLE_KINDS.items() for seed in own.shown]
MAX_BYTES = 400_000  # of all examples: they are in every wheel


@pytest.mark.parametrize("seed", NAMES)
def test_the_facts_of_a_kept_scene_are_those_of_its_masks(seed):
    things = open_thing_example(seed).things
    assert 3 <= len(things) <= 6
    for thing in things:
        rows, columns = np.nonzero(thing.mask)
        height, width = thing.mask.shape
        y = (rows.min() + rows.max() + 1) / 2 / height
        x = (columns.min() + columns.max() + 1) / 2 / width
        assert thing.facts.center == pytest.approx((x, y))
        assert thing.facts.position == GRID[int(3 * y)][int(3 * x)]
        assert thing.facts.area == pytest.approx(thing.mask.mean())
        concept_named(thing.facts.concept)  # raises for none

        reached = {
            "left": columns.min() == 0,
            "top": rows.min() == 0,
            "right": columns.max() == width - 1,
            "bottom": rows.max() == height - 1,
        }
        assert thing.facts.cut is None or reached[thing.facts.cut]


@pytest.mark.parametrize("seed", NAMES)
def test_kept_scenes_show_no_drawing_that_has_to_be_shared_alike(seed):
    assert {thing.style for thing in open_thing_example(seed).things} <= set(SEEN_SETS)


@pytest.mark.parametrize("seed", NAMES)
def test_the_drawings_of_kept_scenes_are_attributed_to_their_sets(seed):
    text = (thing_examples.FOLDER.parent / "ATTRIBUTION.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith(f"| `{NAMES[seed]}.png`")]
    named = dict(zip(SEEN_SETS, row.split("|")[2:5], strict=True))
    for style, cell in named.items():
        drawn = {own.facts.concept for own in open_thing_example(seed).things if own.style == style}
        assert {name.strip() for name in cell.split(",")} - {""} == drawn


def test_the_files_of_examples_are_small_and_all_of_known_scenes():
    files = list(thing_examples.FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    assert len(files) == 3 * len(NAMES)


def test_a_scene_is_opened_as_it_was_saved(tmp_path):
    seed = next(iter(NAMES))
    drawn = render_thing_scene(seed, "heldout", sources=played_sources())
    save_thing_example(seed, drawn, tmp_path)
    opened = open_thing_example(seed, tmp_path)
    assert opened.image.tobytes() == drawn.image.tobytes()
    for found, true in zip(opened.things, drawn.things, strict=True):
        assert np.array_equal(found.mask, true.mask) and found.facts == true.facts
        assert (found.style, found.diameter, found.hidden_share) == (
            true.style, true.diameter, true.hidden_share
        )  # fmt: skip


def test_the_regions_file_is_a_label_map_of_the_command_line():
    seed, name = next(iter(NAMES.items()))
    scene = open_thing_example(seed)
    loaded = load_regions(thing_examples.FOLDER / f"{name}_regions.png", scene.image.size)
    assert len(loaded) == len(scene.things)
    for region, thing in zip(loaded, scene.things, strict=True):
        assert np.array_equal(np.asarray(region), thing.mask)


@pytest.mark.parametrize(("kind", "seed"), SHOWN)
def test_the_truth_fits_the_template_and_fills_it_to_a_right_caption(kind, seed):
    scene = open_example(kind, seed)
    template = Template.parse(scene.template)
    for thing in scene.objects:
        for field in template.fields:
            value = thing.fields[field.name]
            assert not field.choices or value in field.choices
        text = template.text([thing.fields[field.name] for field in template.fields])
        if kind == "shapes":
            assert text == thing.caption
        else:
            said = read_caption(text)
            assert said.is_grammatical and said.names == (thing.fields["name"],)
            assert thing.fields["place"] in text and said.sizes == (thing.fields["size"],)


def test_regions_of_things_are_asked_different_questions_that_have_answers():
    for seed in NAMES:
        asked = [thing.question for thing in open_example("things", seed).objects]
        assert all(question.is_right(question.answer) for question in asked)
        assert len({question.kind for question in asked}) == len(asked)


def test_shapes_have_no_questions_about_regions():
    assert all(thing.question is None for thing in open_example("shapes").objects)


def test_a_scene_is_the_first_that_is_shown_and_always_the_same():
    first = EXAMPLE_KINDS["things"].shown[0]
    one, other = open_example("things"), open_example("things", first)
    assert one.questions == other.questions and one.image.tobytes() == other.image.tobytes()
    assert [thing.caption for thing in one.objects] == [thing.caption for thing in other.objects]


def test_there_are_examples_of_every_kind_of_scenes_that_is_measured():
    assert set(EXAMPLE_KINDS) == set(KINDS)


@pytest.mark.parametrize("arguments", [("pets",), ("things", 7), ("shapes", -1)])
def test_kinds_and_seeds_without_a_scene_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        open_example(*arguments)
