"""The vision path learns names: samples, scores, runs, and what goes on from one."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from perceptiondlm.common.loading import load_model
from perceptiondlm.image_processing_perceptiondlm import normalize
from perceptiondlm.processing_sequence import IGNORED_LABEL
from perceptiondlm.scenes.concepts import CONCEPTS
from perceptiondlm.scenes.thing_examples import NAMES as EXAMPLES
from perceptiondlm.scenes.thing_examples import open_thing_example
from perceptiondlm.training import naming, synthetic_things
from perceptiondlm.training.recipe import build_recipe
from perceptiondlm.training.recipe_sections import SyntheticData
from perceptiondlm.training.run import arguments_of, build_trainer, train
from perceptiondlm.training.synthetic import encode_image
from test_thing_data import played_scene
from training_runs import losses_of, recipe_values, small_recipe, weights_of

NAMES = {"scene_kind": "things", "objective": "names", "scenes": 8}


@pytest.fixture(autouse=True)
def played(monkeypatch):
    asked = []

    def render(seed, split="train", *, count=None):
        asked.append(count)
        return played_scene(seed, split)

    monkeypatch.setattr(naming, "render_thing_scene", render)
    return asked


@pytest.fixture
def pair(make, monkeypatch):
    model, processor = make(num_region_prompts=2, region_layout="independent")
    monkeypatch.setattr(processor.image_processor, "max_tiles", 1)
    return model, processor


def names_of(processor, **fields):
    return naming.NameDataset(processor, SyntheticData(**{**NAMES, **fields}))


def test_every_thing_of_a_scene_has_its_name_and_as_many_as_there_are_prompts_have_one(pair):
    sample = names_of(pair[1])[0]
    things = sorted(played_scene(0).things, key=lambda thing: -thing.mask.sum())
    told = [CONCEPTS[k].name for k in sample["names"][0].tolist() if k != IGNORED_LABEL]
    assert told == [thing.facts.concept for thing in things]
    assert sample["region_patches"].any((2, 3)).tolist() == [[True, True]]
    named = {patches.numpy().tobytes() for patches in sample["named_patches"][0, :3]}
    assert {patches.numpy().tobytes() for patches in sample["region_patches"][0]} < named


def test_scenes_are_mirrored_with_their_masks(pair):
    things = names_of(pair[1])
    first = [things[8 * epoch] for epoch in range(12)]
    left = [sample["named_patches"][0, 0].float().mean(0).argmax().item() for sample in first]
    assert len(set(left)) == 2
    for sample, place in zip(first, left, strict=True):
        column = sample["pixel_values"][0].mean((0, 1)).argmax().item() // 4
        assert (column < 4) == (place < 4)  # of 8


def test_crowded_scenes_have_more_than_eight_things(pair, played):
    for things in (names_of(pair[1], crowded_share=1.0), names_of(pair[1])):
        for index in range(8):
            things[index]
    crowded, usual = played[:8], played[8:]
    assert all(9 <= count <= 24 for count in crowded) and set(usual) == {None}


def test_scores_are_the_mean_feature_of_a_mask_times_the_sum_of_a_names_embeddings(pair):
    model, processor = pair
    sample = names_of(processor)[0]
    tokens = naming.name_tokens(processor.tokenizer)
    pixels, prompted, named = (
        sample[name] for name in ("pixel_values", "region_patches", "named_patches")
    )
    with torch.no_grad():
        scores = naming.score_names(model, tokens, pixels, prompted, named)[0, :3].numpy()
        features = model.encode_images(pixels, prompted)[0].numpy()
    embeddings = model.get_input_embeddings().weight.detach().numpy()

    side, merge = int(len(features) ** 0.5), model.config.spatial_merge_size
    for k, mask in enumerate(named[0, :3].numpy()):
        total, weight = 0.0, 0
        for row, column in zip(*np.nonzero(mask), strict=True):
            total = total + features[row // merge * side + column // merge]
            weight += 1
        mean = total / weight
        mean = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-5)
        for n in (0, 7, len(CONCEPTS) - 1):
            name = CONCEPTS[n].name
            forms = processor.tokenizer([name, f" {name}"], add_special_tokens=False)["input_ids"]
            ids = [*forms[0], *forms[1]]
            assert scores[k, n] == pytest.approx(mean @ embeddings[ids].sum(0), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("section", "options"),
    [
        ("masking", {"t_low": 0.2}),
        ("distillation", {"checkpoint": "teacher"}),
        ("lora", {"r": 4}),
    ],
)
def test_sections_without_effect_on_names_are_refused(tmp_path, section, options):
    changed = {"data": NAMES, "masking": {"loss_weighting": "inverse_rate"}}
    small_recipe(tmp_path, **changed)
    changed[section] = changed.get(section, {}) | options
    with pytest.raises(ValueError, match=rf'{section}.*data.objective of "texts"'):
        small_recipe(tmp_path, **changed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scene_kind": "shapes"}, "scene_kind.*things"),
        ({"label_share": 0.5}, "data.label_share"),
        ({"eval_scenes": 4}, "data.eval_scenes"),
        ({"objective": "texts", "crowded_share": 0.5}, "data.crowded_share"),
        ({"objective": "labels"}, "data.objective"),
        ({"crowded_share": 1.5}, "data.crowded_share"),
    ],
)
def test_options_of_the_other_objective_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SyntheticData(**{**NAMES, **fields})


def test_images_of_several_tiles_are_refused(pair, monkeypatch):
    monkeypatch.setattr(pair[1].image_processor, "max_tiles", 2)
    with pytest.raises(ValueError, match="model.max_tiles of 1.*got 2"):
        names_of(pair[1])


VISION_PATH = ["vision_tower", "connector", "region_prompts", "language_model.model.embed_tokens"]


@pytest.fixture
def recipe_of(tmp_path):
    """Gives a function that makes a recipe of names, with a folder of its own in `tmp_path`."""

    def make(folder: str, **trainer):
        return small_recipe(
            tmp_path / folder,
            model={"max_tiles": 1},
            data={**NAMES, "caption_length": 14},
            masking={"loss_weighting": "inverse_rate"},
            parameters={"trainable": VISION_PATH},
            trainer={"max_steps": 12, "learning_rate": 2e-2, **trainer},
        )

    return make


def test_a_run_teaches_names_to_the_vision_path_and_leaves_the_decoder_alone(recipe_of):
    trainer = train(recipe_of("run"))
    losses = losses_of(trainer)
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    learned = {name for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert not any(name.startswith("language_model.model.layers") for name in learned)


def test_a_stopped_run_of_names_goes_on_as_if_it_had_not_been(recipe_of):
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole = train(recipe_of("whole", **saving))
    train(recipe_of("again", max_steps=5, **saving))
    again = train(recipe_of("again", **saving), resume=True)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_captions_are_learned_from_where_names_ended(recipe_of, tmp_path, monkeypatch):
    named = train(recipe_of("names"))
    model, processor = load_model(tmp_path / "names")
    assert processor.image_processor.max_tiles == 1
    monkeypatch.setattr(synthetic_things, "render_thing_scene", played_scene)
    texts = {"scene_kind": "things", "scenes": 8, "region_share": 1.0, "caption_length": 200}
    values = recipe_values(tmp_path / "texts", data=texts, trainer={"max_steps": 1})
    values["model"] = {"checkpoint": str(tmp_path / "names")}
    trainer = build_trainer(recipe := build_recipe(values), arguments_of(recipe))
    before = weights_of(named)
    assert all(torch.equal(w, before[n]) for n, w in trainer.model.state_dict().items())
    trainer.train()


@torch.no_grad()
def test_the_kept_first_stage_names_half_of_the_things_of_the_examples():
    folder = Path(__file__).parents[1] / "configs" / "tiny_names"
    model, processor = load_model(folder, dtype=torch.float32)
    tokens = naming.name_tokens(processor.tokenizer)
    roomy = copy.copy(processor.image_processor)
    prompts, roomy.num_region_prompts = roomy.num_region_prompts, naming.MAX_COUNT

    rights = []
    for seed in EXAMPLES:
        scene = open_thing_example(seed)
        pixels, features, order = encode_image(roomy, scene.image, scene.things)
        named = torch.from_numpy(features["region_patches"])
        prompted = named[:, :prompts]  # the largest first, fewer than there are prompts
        scores = naming.score_names(
            model, tokens, normalize(torch.from_numpy(pixels)), prompted, named
        )
        said = [CONCEPTS[k].name for k in scores[0, : len(order)].argmax(-1).tolist()]
        rights += [
            scene.things[k].facts.concept == name for k, name in zip(order, said, strict=True)
        ]
    assert len(rights) == 16 and sum(rights) >= 8
