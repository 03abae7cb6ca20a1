import json

import numpy as np
import pytest
import torch
from perceptiondlm.evaluation.held_out import describe_scenes, held_out_scenes, measurements
from perceptiondlm.evaluation.scene_kinds import THINGS
from perceptiondlm.scenes import things as things_module
from perceptiondlm.scenes.concepts import CONCEPTS, concept_named
from perceptiondlm.scenes.language import GRID
from perceptiondlm.scenes.thing_facts import ThingFacts
from perceptiondlm.scenes.thing_language import LABEL_INSTRUCTION
from perceptiondlm.scenes.thing_questions import RegionQuestion
from perceptiondlm.scenes.things import SceneThing, ThingScene
from perceptiondlm.training import synthetic_things
from perceptiondlm.training.recipe_sections import MaskingRecipe, SyntheticData
from perceptiondlm.training.samples import DiffusionCollator
from PIL import Image


def played_scene(seed: int, split: str = "train", count: int | None = None) -> ThingScene:
    """Draws three gray squares that stand for things."""
    rng = np.random.default_rng(seed)
    pixels, things = np.zeros((60, 60, 3), np.uint8), []
    for k, number in enumerate(rng.permutation(len(CONCEPTS))[:3]):
        mask = np.zeros((60, 60), bool)
        mask[2 : 8 + 4 * k, 20 * k : 20 * k + 6 + 4 * k] = True
        pixels[mask] = 80 * (k + 1)
        center = (20 * k + 3 + 2 * k) / 60, (5 + 2 * k) / 60
        place = GRID[int(3 * center[1])][int(3 * center[0])]
        facts = ThingFacts(
            CONCEPTS[number].name, "small", place, "whole", None, None, None, center, mask.mean()
        )
        things.append(SceneThing(mask, facts, "played", 6.0 + 4 * k, 0.0))
    return ThingScene(Image.fromarray(pixels), things)


@pytest.fixture(autouse=True)
def played(monkeypatch):
    monkeypatch.setattr(synthetic_things, "render_thing_scene", played_scene)
    monkeypatch.setattr(things_module, "render_thing_scene", played_scene)


@pytest.fixture
def tree(make):
    return make(num_region_prompts=4, roi_convention="aligned", region_layout="independent")


def dataset(processor, **fields):
    data = SyntheticData(scene_kind="things", scenes=8, region_share=1.0, **fields)
    return synthetic_things.ThingDataset(processor, data)


def test_scenes_of_shapes_have_no_labels_and_no_questions_per_region():
    with pytest.raises(ValueError, match="scene_kind"):
        SyntheticData(label_share=0.2)
    with pytest.raises(ValueError, match="label_share"):
        SyntheticData(scene_kind="things", label_share=0.7, region_question_share=0.7)
    with pytest.raises(ValueError, match="scene_kind"):
        SyntheticData(scene_kind="pets")


def test_questions_per_region_need_the_independent_layout(make):
    processor = make(num_region_prompts=4, roi_convention="aligned")[1]
    with pytest.raises(ValueError, match="independent layout"):
        dataset(processor, region_question_share=0.5)


def test_a_sample_of_labels_is_asked_for_names(tree):
    sample = dataset(tree[1], label_share=1.0, caption_length=60)[0]
    assert LABEL_INSTRUCTION in tree[1].tokenizer.decode(sample.sequence.ids)


def test_every_region_of_a_sample_gets_a_question_of_its_own(tree):
    things = dataset(tree[1], region_question_share=1.0, caption_length=80)
    asked = [tree[1].tokenizer.decode(things[i].sequence.ids) for i in range(8)]
    assert all(text.count("?") >= 2 for text in asked)
    assert len(set(asked)) == 8


def test_what_a_question_names_is_replayed_with_its_own_box(tree):
    model, processor = tree
    things = dataset(processor, region_question_share=1.0, caption_length=80)
    named = 0
    for i in range(16):
        sample = things[i]
        ids, cells = sample.sequence.ids, processor.roi_output_size**2
        tokens = [
            processor.tokenizer.convert_tokens_to_ids(processor.roi_token.format(k))
            for k in range(4)
        ]
        assert None not in tokens and processor.tokenizer.unk_token_id not in tokens
        runs = [token for token in ids if token in tokens][::cells]
        boxes = {}
        for token, box in zip(runs, sample.features["boxes"].tolist(), strict=True):
            assert boxes.setdefault(token, box) == box
        assert len({tuple(box) for box in boxes.values()}) == 3
        named += len(runs) > 3

        batch = DiffusionCollator(processor, MaskingRecipe(), seed=0)([sample])
        assert torch.isfinite(model(**batch).loss)
    assert named > 3


def test_labels_and_answers_have_slots_of_their_own(tree):
    things = dataset(tree[1], label_share=0.5, region_question_share=0.5, caption_length=80,
                     label_length=60, region_answer_length=70)  # fmt: skip
    lengths = {len(slot) for i in range(40) for slot in things[i].sequence.slots}
    assert lengths == {60, 70, 80}


def test_texts_are_drawn_again_until_they_fit(tree, monkeypatch):
    drawn = iter(["one that is too long for four slots", "a"] * 3)
    monkeypatch.setattr(synthetic_things, "caption_of", lambda rng, things, k: next(drawn))
    short = dataset(tree[1], caption_length=4)
    slots = short[0].sequence.slots
    assert [len(slot) for slot in slots] == [4] * 3 and next(drawn, None) is None

    monkeypatch.setattr(synthetic_things, "caption_of", lambda *about: "one that is too long")
    with pytest.raises(ValueError, match="at most 4 tokens"):
        short[0]


def test_answers_of_questions_are_drawn_again_until_they_fit(tree, monkeypatch):
    facts = ("What is it?", "what", frozenset(["a"]))
    texts = iter(["too long for four slots", "a"] * 3)

    def asked(rng, things, k):
        return [RegionQuestion(facts[0], next(texts), *facts[1:])]

    monkeypatch.setattr(synthetic_things, "ask_about_region", asked)
    dataset(tree[1], region_question_share=1.0, caption_length=4)[0]
    assert next(texts, None) is None


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"label_share": 0.5, "label_length": 3}, "label_length"),
        ({"first_label_share": 0.5, "caption_length": 3}, "label_length"),
        ({"region_share": 0.5, "max_new_tokens": 3}, "max_new_tokens"),
        ({"first_region_share": 0.5, "max_new_tokens": 3}, "max_new_tokens"),
    ],
)
def test_slots_too_short_for_a_name_are_refused_before_anything_is_rendered(tree, fields, option):
    with pytest.raises(ValueError, match=rf"data.{option} of \d+ or more.*got 3"):
        data = {"scene_kind": "things", "scenes": 8, "region_share": 1.0, "cache": True} | fields
        synthetic_things.ThingDataset(tree[1], SyntheticData(**data))


def test_the_first_epoch_may_have_more_labels(tree):
    shares = {"label_share": 0.0, "first_label_share": 1.0, "caption_length": 120}
    things = dataset(tree[1], **shares)
    texts = [tree[1].tokenizer.decode(things[i].sequence.ids) for i in (*range(8), *range(8, 16))]
    assert [LABEL_INSTRUCTION in text for text in texts] == [True] * 8 + [False] * 8


def test_captions_are_drawn_anew_every_epoch(tree):
    things = dataset(tree[1], caption_length=120)
    assert things[0].sequence.ids == things[0].sequence.ids
    assert things[0].sequence.ids != things[8].sequence.ids


def test_a_checkpoint_is_measured_on_scenes_of_things(tree):
    model, processor = tree
    scenes = held_out_scenes(0, 2, THINGS, progress=False)
    said = describe_scenes(model, processor, scenes, progress=False, options={"steps": 1})
    measured = measurements(scenes, said, THINGS)
    assert measured["regions"] == 6 and measured["mixture_rate"] <= 1
    json.dumps(measured)

    said.captions[:] = [[thing.caption for thing in scene.objects] for scene in scenes]
    right = measurements(scenes, said, THINGS)
    keys = ("name_accuracy", "attribute_accuracy", "relation_accuracy", "grammatical")
    assert [right[key] for key in keys] == [1.0] * 4
    assert all(concept_named(thing.facts.concept) for scene in scenes for thing in scene.objects)
