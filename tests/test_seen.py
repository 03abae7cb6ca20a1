"""Images that were seen are not encoded again, and answer as they do when given anew."""

import copy
import gc
import pickle

import pytest
import torch

LAYOUTS = ["released", "independent"]
QUESTIONS = ["what is it?", "which color?", "is it alive, or not?"]


@pytest.fixture(params=LAYOUTS)
def pair(request, make):
    return make(region_layout=request.param)


@pytest.fixture
def counted(monkeypatch):
    """A function: makes a model count its runs of the vision tower and the decoder's positions."""

    def watch(model) -> dict:
        counts = {"tiles": 0, "positions": 0}
        hooks = [
            model.vision_tower.register_forward_pre_hook(
                lambda _, given: counts.update(tiles=counts["tiles"] + len(given[0]))
            ),
            model.language_model.model.register_forward_pre_hook(
                lambda _, given: counts.update(
                    positions=counts["positions"] + given[0].shape[0] * given[0].shape[1]
                )
            ),
        ]
        counts["stop"] = lambda: [hook.remove() for hook in hooks]
        return counts

    return watch


def test_questions_about_what_was_seen_are_answered_as_alone(pair, draw_image):
    model, processor = pair
    image = draw_image(90, 40)
    options = {"max_new_tokens": 4, "processor": processor}
    seen = model.see(image, processor=processor)
    together = model.diffusion_generate(seen, prompts=QUESTIONS, **options)
    for question, ids in zip(QUESTIONS, together.token_ids, strict=True):
        alone = model.diffusion_generate(image, prompts=question, **options)
        assert alone.token_ids == [ids]
        assert model.diffusion_generate(seen, prompts=question, **options).token_ids == [ids]
    assert together.image_forwards == [4] * 3 and together.num_forwards == 12


def test_captions_of_what_was_seen_are_those_of_the_image(pair, scene):
    model, processor = pair
    image, masks = scene((90, 47), 8)  # two region groups
    options = {"caption_length": 4, "processor": processor}
    seen = model.see(image, masks, processor=processor)
    expected = model.diffusion_generate(image, masks, **options)
    for _ in range(2):
        out = model.diffusion_generate(seen, **options)
        assert out.token_ids == expected.token_ids and out.texts == expected.texts
    asked = model.diffusion_generate(seen, prompts="what?", **options)
    assert asked.token_ids == model.diffusion_generate(image, masks, "what?", **options).token_ids


def test_nothing_is_encoded_or_prefilled_twice(make, counted, scene):
    model, processor = make(region_layout="independent")
    image, masks = scene((90, 47), 3)
    options = {"caption_length": 4, "steps": 1, "processor": processor}
    counts = counted(model)
    try:
        seen = model.see(image, masks, processor=processor)
        tiles = counts["tiles"]
        model.diffusion_generate(seen, **options)
        first = counts["positions"]
        model.diffusion_generate(seen, **options)
        again = counts["positions"] - first
    finally:
        counts["stop"]()
    (trunk,) = seen.groups[0].trunks
    assert counts["tiles"] == tiles and first - again == len(trunk)


def test_questions_of_different_lengths_share_a_trunk(make, counted, draw_image):
    model, processor = make(region_layout="independent")
    images = [draw_image(90, 40), draw_image(40, 40, 1)]
    options = {"max_new_tokens": 4, "steps": 1, "processor": processor}
    seen = model.see(images[0], processor=processor)
    counts = counted(model)
    try:
        together = model.diffusion_generate(seen, prompts=QUESTIONS, **options)
    finally:
        counts["stop"]()
    (trunk,) = seen.groups[0].trunks
    slots, asked = 4 * len(QUESTIONS), 0
    for question in QUESTIONS:
        text = processor.render_questions([[None]], [question])[0].partition("</img>")[2]
        asked = max(asked, len(processor.tokenizer(text)["input_ids"]) + 1)  # and </img>
    assert counts["positions"] == len(trunk) + len(QUESTIONS) * asked + slots
    for question, ids in zip(QUESTIONS, together.token_ids, strict=True):
        alone = model.diffusion_generate(images[0], prompts=question, **options)
        assert alone.token_ids == [ids]

    # Images of different sizes in one batch: each with its own trunk.
    mixed = model.diffusion_generate(images, prompts=QUESTIONS[1:], **options)
    for image, question, ids in zip(images, QUESTIONS[1:], mixed.token_ids, strict=True):
        alone = model.diffusion_generate(image, prompts=question, **options)
        assert alone.token_ids == [ids]


def test_several_images_are_seen_together(pair, scene):
    model, processor = pair
    drawn = [scene((61, 47), 2, seed) for seed in range(2)]
    images, masks = [one for one, _ in drawn], [own for _, own in drawn]
    options = {"caption_length": 3, "processor": processor}
    seen = model.see(images, masks, processor=processor)
    out = model.diffusion_generate(seen, prompts=["a?", "b?"], **options)
    expected = model.diffusion_generate(images, masks, ["a?", "b?"], **options)
    assert out.token_ids == expected.token_ids and seen.num_images == 2
    whole = model.see(images, processor=processor)
    out = model.diffusion_generate(
        whole, prompts=["a?", "b?"], max_new_tokens=3, processor=processor
    )
    expected = model.diffusion_generate(
        images, prompts=["a?", "b?"], max_new_tokens=3, processor=processor
    )
    assert out.token_ids == expected.token_ids


def test_what_was_seen_in_several_calls_is_asked_in_one(pair, scene):
    model, processor = pair
    drawn = [scene((61, 47), count, seed) for seed, count in enumerate((2, 1))]
    parts = [model.see(*one, processor=processor) for one in drawn]
    options = {"caption_length": 3, "processor": processor}
    joined = type(parts[0]).joined(parts)
    out = model.diffusion_generate(joined, prompts=["a?", "b?"], **options)
    images, masks = zip(*drawn, strict=True)
    expected = model.diffusion_generate(list(images), list(masks), ["a?", "b?"], **options)
    assert out.token_ids == expected.token_ids
    whole = [model.see(image, processor=processor) for image in images]
    assert type(parts[0]).joined(whole).num_images == 2
    for wrong in ([], [parts[0], whole[0]]):
        with pytest.raises(ValueError, match="expected something|all without, got both"):
            type(parts[0]).joined(wrong)


def test_a_conversation_is_answered_as_its_inputs_are(pair, draw_image):
    model, processor = pair
    image = draw_image(40, 30)
    turns = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "which color?"},
    ]
    options = {"max_new_tokens": 3, "processor": processor}
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor([image], text=[text], max_new_tokens=3)
    expected = model.diffusion_generate(inputs=inputs, processor=processor)
    seen = model.see(image, processor=processor)
    for images in (image, seen):
        for prompts in (turns, [turns]):
            out = model.diffusion_generate(images, prompts=prompts, **options)
            assert out.token_ids == expected.token_ids
    with pytest.raises(ValueError, match="image placeholders"):
        model.diffusion_generate(seen, prompts=[turns[2:]], **options)


def test_what_is_kept_is_counted_and_freed(make, scene):
    model, processor = make(region_layout="independent")
    image, masks = scene((61, 47), 2)
    seen = model.see(image, masks, processor=processor)
    encoded = seen.nbytes
    group = seen.groups[0]
    assert encoded == group.image_features.nbytes + group.region_features.nbytes
    model.diffusion_generate(seen, caption_length=3, processor=processor)
    (trunk,) = group.trunks
    config = model.config.text_config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert seen.nbytes == encoded + len(trunk) * per_token
    pieces = list(group.tensors())
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in pieces[2:])


def test_another_model_refuses_what_was_seen(make, scene):
    model, processor = make()
    other = copy.deepcopy(model)
    seen = model.see(*scene((61, 47), 2), processor=processor)
    with pytest.raises(ValueError, match="this model has seen, got those of another"):
        other.diffusion_generate(seen, processor=processor)
    with pytest.raises(ValueError, match="this model has seen, got those of another"):
        other.diffusion_score(seen, texts="a", processor=processor)


def test_guidance_and_refreshed_prompts_work_on_what_was_seen(pair, scene):
    model, processor = pair
    image, masks = scene((61, 47), 2)
    seen = model.see(image, masks, processor=processor)
    for extra in (
        {"cfg_scale": 1.0},
        {"prompt_refresh_interval": 2},
        {"temperature": 1.0, "seed": 3},
    ):
        options = {"caption_length": 4, "processor": processor} | extra
        expected = model.diffusion_generate(image, masks, **options)
        assert model.diffusion_generate(seen, **options).token_ids == expected.token_ids


WRONG = [
    (lambda seen: seen.only([2]), "different masks from 0 to 1, got"),
    (lambda seen: seen.only([0, 0]), "different masks from 0 to 1"),
    (lambda seen: seen.only([]), "at least one mask"),
    (lambda seen: seen.only([True]), "different masks from 0 to 1"),
    (lambda seen: seen.only([[0], [1]]), "masks of 1 images, got 2"),
]


@pytest.mark.parametrize(("ask", "message"), WRONG)
def test_regions_that_are_not_there_are_refused(make, scene, ask, message):
    model, processor = make(region_layout="independent")
    seen = model.see(*scene((61, 47), 2), processor=processor)
    with pytest.raises(ValueError, match=message):
        ask(seen)


def test_what_does_not_fit_what_was_seen_is_refused(make, scene):
    model, processor = make()
    image, masks = scene((61, 47), 2)
    seen = model.see(image, masks, processor=processor)
    whole = model.see(image, processor=processor)
    with pytest.raises(ValueError, match="expected no masks for images that were seen"):
        model.diffusion_generate(seen, masks, processor=processor)
    with pytest.raises(ValueError, match="some of the regions that were seen"):
        model.diffusion_generate(seen.only([1]), processor=processor)
    with pytest.raises(ValueError, match="seen with region masks, got one without"):
        whole.only([0])
    with pytest.raises(ValueError, match="masks to caption or prompts to answer"):
        model.diffusion_generate(whole, processor=processor)
    for nothing in (None, [], [None]):
        with pytest.raises(ValueError, match="an image or a list of them to see"):
            model.see(nothing, processor=processor)
    gc.collect()
    assert torch.is_tensor(seen.groups[0].image_features)
    with pytest.raises(TypeError):
        pickle.dumps(seen)  # it belongs to a model of this process


def test_several_images_are_asked_about_together(pair, draw_image):
    model, processor = pair
    images = [draw_image(40, 30), draw_image(30, 50, 1)]
    options = {"prompts": ["which is larger?"], "max_new_tokens": 3, "processor": processor}
    seen = model.see([images], processor=processor)
    expected = model.diffusion_generate([images], **options)
    assert model.diffusion_generate(seen, **options).token_ids == expected.token_ids
