"""`diffusion_generate`, against a plain implementation that computes everything at every step."""

import copy
import dataclasses

import numpy as np
import pytest
import reference
import torch
from perceptiondlm.generation_cache import ResponseNetwork
from perceptiondlm.generation_options import DiffusionOptions

GROUPED = {"num_key_value_heads": 2}
INDEPENDENT = {"region_layout": "independent"}
LAYOUTS = [{}, INDEPENDENT]
# size, regions, soft masks, caption length, steps, what differs from the tiny default
CASES = [
    ((40, 40), 1, False, 5, 5, {}),
    ((61, 47), 6, True, 3, 9, {"seed": 1}),
    ((100, 30), 3, False, 6, 4, {"text": GROUPED}),
    ((30, 170), 4, False, 4, 8, {"seed": 2, "roi_stride": 5}),
    ((90, 61), 2, True, 8, 3, {"seed": 3, "text": GROUPED, "roi_convention": "aligned"}),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["released", "independent"])
@pytest.mark.parametrize("case", CASES)
def test_captions_equal_the_plain_ones(make, draw_image, blobs, case, layout):
    """For the independent layout: each region alone, without any cache."""
    size, count, soft, length, steps, changes = case
    model, processor = make(**changes, **layout)
    image, masks = draw_image(*size), blobs(*size, count=count, soft=soft)
    regions = reference.Regions(reference.Network(model), image, masks)
    expected = reference.caption_regions(regions, processor.tokenizer, length, steps)
    out = model.diffusion_generate(
        image, masks, processor=processor, caption_length=length, steps=steps
    )
    assert out.token_ids == [expected]
    assert out.texts == [[processor.decode_answer(ids) for ids in expected]]
    ranked = length if layout == INDEPENDENT else count * length
    forwards = next(s + 1 for s in range(steps) if int(ranked * ((steps - 1 - s) / steps)) == 0)
    assert out.num_forwards <= forwards  # it stops when nothing is masked
    assert steps > ranked or out.num_forwards == forwards
    assert out.tokens_per_forward == count * length / out.num_forwards


def loving_masks(make, **changes):
    """A model that often finds the mask token the likeliest, and its processor."""
    model, processor = make(seed=4, **changes)
    model = copy.deepcopy(model)
    head = model.language_model.lm_head.weight.data
    head[model.config.mask_token_id] *= 4
    return model, processor


@pytest.mark.parametrize("layout", LAYOUTS, ids=["released", "independent"])
@pytest.mark.parametrize("steps", [2, 4, 6])
def test_captions_commit_the_mask_token_like_any_other(make, scene, layout, steps):
    model, processor = loving_masks(make, **layout)
    image, masks = scene((61, 47), 3)
    regions = reference.Regions(reference.Network(model), image, masks)
    expected = reference.caption_regions(regions, processor.tokenizer, 6, steps)
    out = model.diffusion_generate(image, masks, processor=processor, caption_length=6, steps=steps)
    assert model.config.mask_token_id in sum(expected, [])
    assert out.token_ids == [expected]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["released", "independent"])
@pytest.mark.parametrize("cache", [None, 3], ids=["exact", "cached"])
def test_steps_that_cannot_change_anything_cost_no_forward_pass(make, scene, layout, cache):
    """Every prediction taken again must be what the network would have said."""
    model, processor = make(seed=1, **layout)
    image, masks = scene((61, 47), 2)
    seen = []
    given = dict(processor=processor, caption_length=5, steps=100, prompt_refresh_interval=cache)
    out = model.diffusion_generate(image, masks, callback=lambda *now: seen.append(now), **given)
    if cache is None:
        regions = reference.Regions(reference.Network(model), image, masks)
        expected = reference.caption_regions(regions, processor.tokenizer, 5, 100)
        assert out.token_ids == [expected]
        assert out.num_forwards < 30
    assert seen[-1][1] == out.token_ids
    drawn = model.diffusion_generate(image, masks, temperature=0.1, seed=0, **given)
    assert drawn.num_forwards > 50  # a new draw may change it at any step


def test_a_batch_counts_forward_passes_as_its_rows_alone_do(make, scene):
    model, processor = make(seed=1)
    scenes = [scene((61, 47), 2), scene((40, 40), 3, seed=5)]
    given = dict(processor=processor, caption_length=4, steps=60)
    alone = [model.diffusion_generate(*one, **given) for one in scenes]
    both = model.diffusion_generate(*map(list, zip(*scenes, strict=True)), **given)
    assert both.token_ids == [out.token_ids[0] for out in alone]
    assert both.num_forwards == sum(out.num_forwards for out in alone)


def test_equal_areas_keep_the_given_order(make, draw_image):
    model, processor = make()
    masks = [np.zeros((47, 61), np.uint8) for _ in range(3)]
    masks[0][3:8, 3:20] = masks[1][20:25, 30:47] = masks[2][40:45, 5:22] = 1
    image = draw_image(61, 47)
    regions = reference.Regions(reference.Network(model), image, masks)
    expected = reference.caption_regions(regions, processor.tokenizer, 4, 4)
    out = model.diffusion_generate(image, masks, processor=processor, caption_length=4)
    assert out.token_ids == [expected]


ANYRES = {"image_layout": "anyres", "num_region_prompts": 0, "spatial_merge_size": 1}
CHATS = [
    ([(40, 40)], 6, 6, 6, 0.0, {}),
    ([(100, 30)], 12, 8, 6, 0.0, {"text": GROUPED}),
    ([(61, 47)], 10, 6, 5, 1.5, {"seed": 1}),
    ([(61, 47), (100, 30)], 8, 4, 8, 0.7, {"seed": 2}),
    ([], 8, 3, 8, 2.0, {"seed": 3}),
    ([(61, 47)], 8, 4, 4, 0.0, ANYRES),
    ([(30, 90), (100, 30)], 6, 6, 6, 0.5, ANYRES),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["released", "independent"])
@pytest.mark.parametrize("case", CHATS)
def test_answers_equal_the_plain_ones(make, draw_image, case, layout):
    """A question about whole images has no regions: both layouts differ by what the image may
    see, so the independent one is compared with its own tree."""
    sizes, length, steps, block, cfg, changes = case
    model, processor = make(**changes, **layout)
    images = [draw_image(*size, seed=i) for i, size in enumerate(sizes)]
    network = reference.Network(model)
    expected = reference.answer_question(
        network,
        processor.tokenizer,
        images,
        "What is there?",
        length=length,
        steps=steps,
        block=block,
        cfg=cfg,
        tree=bool(layout),
    )
    out = model.diffusion_generate(
        images or None,
        prompts="What is there?",
        processor=processor,
        max_new_tokens=length,
        steps=steps,
        block_length=block,
        cfg_scale=cfg,
    )
    assert out.token_ids == [[expected]]
    assert not set(expected) & set(model.decoding_defaults["suppress_tokens"])


# Order, batches, passes.


@pytest.mark.parametrize("layout", LAYOUTS, ids=["released", "independent"])
def test_captions_come_in_the_order_of_the_masks(make, scene, layout):
    model, processor = make(**layout)
    image, masks = scene((61, 47), 5)
    out = model.diffusion_generate(image, masks, processor=processor, caption_length=4)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        shuffled = [masks[k] for k in order]
        again = model.diffusion_generate(image, shuffled, processor=processor, caption_length=4)
        assert again.token_ids[0] == [out.token_ids[0][k] for k in order]
    assert len({tuple(ids) for ids in out.token_ids[0]}) > 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=["released", "independent"])
def test_a_batch_of_mixed_images_equals_one_at_a_time(make, scene, layout):
    model, processor = make(**layout)
    pairs = [scene((61, 47), 3), scene((40, 40), 1, 1), scene((30, 170), 6, 2), scene((9, 9), 2, 3)]
    options = {"processor": processor, "caption_length": 4, "steps": 4}
    images, masks = map(list, zip(*pairs, strict=True))
    together = model.diffusion_generate(images, masks, **options)
    apart = [model.diffusion_generate(image, own, **options) for image, own in pairs]
    assert together.token_ids == [out.token_ids[0] for out in apart]
    assert together.texts == [out.texts[0] for out in apart]
    assert together.num_forwards == sum(out.num_forwards for out in apart)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["released", "independent"])
def test_more_regions_than_prompts_are_split_into_passes(make, scene, layout):
    model, processor = make(num_region_prompts=3, **layout)
    image, masks = scene((61, 47), 8)
    options = {"processor": processor, "caption_length": 3, "steps": 3}
    out = model.diffusion_generate(image, masks, **options)
    parts = [model.diffusion_generate(image, masks[i : i + 3], **options) for i in (0, 3, 6)]
    assert out.token_ids[0] == [ids for part in parts for ids in part.token_ids[0]]
    assert out.num_forwards == 9 and out.tokens_per_forward == 8 * 3 / 9


def test_independent_captions_do_not_depend_on_their_neighbors(make, scene):
    """As long as their number, and so their prompt, is the same."""
    model, processor = make(**INDEPENDENT)
    image, masks = scene((61, 47), 4)
    masks.sort(key=lambda mask: -(mask > 0).sum())
    options = {"processor": processor, "caption_length": 4, "steps": 4}
    whole = model.diffusion_generate(image, masks, **options)
    again = model.diffusion_generate(image, masks, batch_size=1, **options)
    assert whole.token_ids == again.token_ids


@pytest.mark.parametrize("layout", LAYOUTS, ids=["released", "independent"])
def test_answers_of_a_batch_equal_one_at_a_time(make, draw_image, layout):
    """No image, one, and several, with questions of different lengths."""
    model, processor = make(**layout)
    images = [[], [draw_image(100, 30)], [draw_image(40, 40), draw_image(61, 47, seed=1)]]
    prompts = ["Hi", "What color shirt is the man in the picture wearing?", "How many?"]
    options = {"processor": processor, "max_new_tokens": 6, "cfg_scale": 0.5}
    together = model.diffusion_generate(images, prompts=prompts, **options)
    for own, prompt, answer in zip(images, prompts, together.token_ids, strict=True):
        alone = model.diffusion_generate(own or None, prompts=prompt, **options)
        assert alone.token_ids == [answer]


def test_one_image_serves_several_questions(make, draw_image):
    model, processor = make()
    options = {"processor": processor, "max_new_tokens": 4}
    image = draw_image(61, 47)
    out = model.diffusion_generate(image, prompts=["What?", "Where is it?"], **options)
    alone = [
        model.diffusion_generate(image, prompts=p, **options) for p in ("What?", "Where is it?")
    ]
    assert out.token_ids == [answer.token_ids[0] for answer in alone]


# Inputs made beforehand.


def test_a_conversation_made_by_the_chat_template_is_answered(make, draw_image):
    model, processor = make()
    image = draw_image(61, 47)
    turns = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": image},
                {"type": "text", "text": "What is there?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
    ]
    inputs = processor.apply_chat_template(
        turns,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"max_new_tokens": 5},
    )
    out = model.diffusion_generate(inputs=inputs, processor=processor, steps=5)
    ids = inputs["input_ids"][0].tolist()
    prompt = reference.Prompt(processor.tokenizer)
    prompt.text("<|start_header_id|>user<|end_header_id|>\n<img>")
    visual = ids.count(model.config.image_token_id)
    prompt.token("<IMG_CONTEXT>", visual)
    prompt.text(
        "</img>\nWhat is there?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"
        "a red circle<|eot_id|><|start_header_id|>user<|end_header_id|>\nWhere?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n"
    )
    assert ids == prompt.ids + [model.config.mask_token_id] * 5
    assert len(out.token_ids[0][0]) == 5 and out.texts == [
        [processor.decode_answer(out.token_ids[0][0])]
    ]


def test_prepared_questions_equal_prompts(make, draw_image):
    model, processor = make()
    inputs = processor(
        [[draw_image(61, 47)], [draw_image(40, 40)]],
        prompts=["What?", "Who is there?"],
        max_new_tokens=6,
    )
    prepared = model.diffusion_generate(inputs=inputs, processor=processor, steps=3, cfg_scale=1.0)
    direct = model.diffusion_generate(
        [draw_image(61, 47), draw_image(40, 40)],
        prompts=["What?", "Who is there?"],
        processor=processor,
        max_new_tokens=6,
        steps=3,
        cfg_scale=1.0,
    )
    assert prepared.token_ids == direct.token_ids


@pytest.mark.parametrize("layout", LAYOUTS, ids=["released", "independent"])
def test_prepared_regions_come_in_the_order_of_the_masks_unless_told_otherwise(make, scene, layout):
    model, processor = make(**layout)
    image, masks = scene((61, 47), 4)
    inputs = processor(image, masks=masks, caption_length=5)
    seen = []
    given = model.diffusion_generate(
        inputs=inputs,
        processor=processor,
        steps=5,
        callback=lambda step, ids: seen.append(ids),
    )
    (order,) = inputs["region_orders"].tolist()
    assert order == sorted(range(4), key=lambda k: -int((np.asarray(masks[k]) != 0).sum()))
    assert order != [0, 1, 2, 3]
    inputs = processor(image, masks=masks, caption_length=5, return_region_orders=False)
    prepared = model.diffusion_generate(inputs=inputs, processor=processor, steps=5)
    direct = model.diffusion_generate(image, masks, processor=processor, caption_length=5, steps=5)
    assert prepared.token_ids[0] == [direct.token_ids[0][k] for k in order]
    assert given.token_ids == direct.token_ids == seen[-1] and given.texts == direct.texts


def test_the_processors_tensors_as_keywords_are_named(make, scene):
    model, processor = make()
    image, masks = scene((61, 47), 2)
    inputs = processor(image, masks=masks, caption_length=5)
    with pytest.raises(ValueError, match="as `inputs=...`"):
        model.diffusion_generate(**inputs)
    with pytest.raises(ValueError, match="captions of regions .* by `diffusion_generate`"):
        model.generate(**inputs)


def test_an_answer_may_be_partly_given_and_have_a_fixed_suffix(make, draw_image):
    """Tokens among and after the masks stay as they are and are seen."""
    model, processor = make()
    inputs = processor(draw_image(40, 40), prompts="What?", max_new_tokens=6)
    start = inputs["input_ids"].shape[1] - 6
    inputs["input_ids"][0, start + 1] = 77
    inputs["input_ids"][0, start + 5] = 99
    out = model.diffusion_generate(inputs=inputs, processor=processor)
    (ids,) = out.token_ids[0]
    assert len(ids) == 6 and (ids[1], ids[5]) == (77, 99)
    other = copy.deepcopy(inputs)
    other["input_ids"][0, start + 5] = 100
    again = model.diffusion_generate(inputs=other, processor=processor)
    assert again.token_ids[0][0][:5] != ids[:5]


# Caches: what is exact and what is not.


def network_of(model, processor, image, masks, **options):
    inputs = processor(image, masks=masks, caption_length=4)
    arguments = {"refresh_interval": None, "cfg_scale": 0.0, "compiled": False} | options
    return ResponseNetwork(model, inputs, **arguments), inputs


@pytest.mark.parametrize("changes", [{}, {"text": GROUPED}, {"seed": 5}])
@torch.no_grad()
def test_cached_steps_give_the_logits_of_a_full_forward_pass(make, scene, changes):
    model, processor = make(**changes, **INDEPENDENT)
    image, masks = scene((61, 47), 4)
    network, inputs = network_of(model, processor, image, masks)
    for seed in range(3):
        answer = torch.randint(
            0, 400, network.response_ids.shape, generator=torch.Generator().manual_seed(seed)
        )
        columns = torch.arange(answer.shape[1])[None]
        got = network(answer, seed, columns)
        whole = dict(inputs)
        whole["input_ids"] = inputs["input_ids"].clone()
        whole["input_ids"][:, network.prompt_length :] = answer
        expected = model(**whole).logits[:, network.prompt_length :]
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_guidance_of_captions_blanks_the_whole_prompt(make, scene):
    """Images and RoI tokens included; logits are u + (w + 1)(c - u)."""
    model, processor = make()
    image, masks = scene((61, 47), 3)
    network, _ = network_of(model, processor, image, masks, cfg_scale=1.5)
    plain = reference.Network(model)
    regions = reference.Regions(plain, image, masks)
    mask = model.config.mask_token_id
    sequence = regions.sequence(processor.tokenizer, [[mask] * 4] * 3)
    start = sequence.answers[0][0] - 1
    hidden = plain.embed(sequence.ids).clone()
    hidden[:start] = plain.embed([mask])
    blank = plain.text(hidden, sequence.positions, sequence.allowed)[start:]
    seen = regions.logits(sequence)[start:]
    expected = blank + 2.5 * (seen - blank)
    columns = torch.arange(network.response_ids.shape[1])[None]
    got = network(network.response_ids, 0, columns)[0]
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["released", "independent"])
def test_refreshing_the_prompt_at_every_step_is_exact(make, scene, layout):
    model, processor = make(**layout)
    image, masks = scene((61, 47), 3)
    options = {"processor": processor, "caption_length": 6, "steps": 6}
    exact = model.diffusion_generate(image, masks, **options)
    assert model.diffusion_generate(
        image, masks, prompt_refresh_interval=1, **options
    ).token_ids == (exact.token_ids)


@torch.no_grad()
def test_a_stale_prompt_is_what_the_first_step_left(make, scene):
    """An interval of 0 equals a plain pass whose prompt keys and values are those of all masks."""
    model, processor = make()
    image, masks = scene((61, 47), 3)
    never, inputs = network_of(model, processor, image, masks, refresh_interval=0)
    always, _ = network_of(model, processor, image, masks, refresh_interval=1)
    columns = torch.arange(never.response_ids.shape[1])[None]
    blank = never.response_ids
    other = torch.full_like(blank, 7)
    assert torch.allclose(never(blank, 0, columns), always(blank, 0, columns), atol=1e-4)
    assert torch.allclose(never(blank, 1, columns), always(blank, 1, columns), atol=1e-4)
    assert not torch.allclose(never(other, 2, columns), always(other, 2, columns), atol=1e-2)


@pytest.mark.parametrize("interval", [0, 2, 4])
def test_a_prompt_cache_changes_the_released_layout_but_not_the_independent_one(
    make, scene, interval
):
    image, masks = scene((61, 47), 4)
    changed = []
    for layout in LAYOUTS:
        model, processor = make(seed=1, **layout)
        options = {"processor": processor, "caption_length": 8, "steps": 8}
        exact = model.diffusion_generate(image, masks, **options)
        cached = model.diffusion_generate(image, masks, prompt_refresh_interval=interval, **options)
        changed.append(cached.token_ids != exact.token_ids)
        assert [len(ids) for ids in cached.token_ids[0]] == [8] * 4
    assert changed == [True, False]


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["released", "independent"])
def test_attention_implementations_caption_alike(make, scene, layout, implementation):
    model, processor = make(**layout)
    pairs = [scene((61, 47), 3), scene((40, 40), 1, 1)]
    images, masks = map(list, zip(*pairs, strict=True))
    options = {"processor": processor, "caption_length": 3, "steps": 3}
    expected = model.diffusion_generate(images, masks, **options)
    try:
        torch.compiler.set_stance("force_eager")  # flex would compile for seconds
        model.set_attn_implementation({"text_config": implementation})
        assert model.diffusion_generate(images, masks, **options).token_ids == expected.token_ids
    finally:
        torch.compiler.set_stance("default")
        model.set_attn_implementation("sdpa")


# Options: each changes something.


@pytest.fixture
def caption(make, scene):
    model, processor = make(seed=1)
    image, masks = scene((61, 47), 3)
    return lambda **options: model.diffusion_generate(
        image, masks, processor=processor, **({"caption_length": 8, "steps": 8} | options)
    )


@pytest.fixture
def answer(make, draw_image):
    model, processor = make(seed=1)
    return lambda **options: model.diffusion_generate(
        draw_image(61, 47),
        prompts="What?",
        processor=processor,
        **({"max_new_tokens": 8} | options),
    )


OPTIONS = [
    ("caption", {"steps": 2}),
    ("caption", {"caption_length": 5, "steps": 5}),
    ("caption", {"temperature": 1.0, "seed": 0}),
    ("caption", {"cfg_scale": 2.0}),
    ("caption", {"remasking": "random", "seed": 0}),
    ("caption", {"suppress_tokens": list(range(0, 460, 2))}),
    ("caption", {"threshold": 0.3}),
    ("caption", {"prompt_refresh_interval": 0}),
    ("answer", {"steps": 2}),
    ("answer", {"max_new_tokens": 4}),
    ("answer", {"block_length": 2}),
    ("answer", {"temperature": 1.0, "seed": 0}),
    ("answer", {"cfg_scale": 2.0}),
    ("answer", {"remasking": "random", "seed": 0}),
    ("answer", {"suppress_tokens": list(range(0, 460, 2))}),
    ("answer", {"factor": 3.0, "steps": 4}),
    ("answer", {"entropy_bound": 3.0, "steps": 4}),
]


@pytest.mark.parametrize(("task", "options"), OPTIONS)
def test_an_option_changes_what_is_decoded(request, task, options):
    run = request.getfixturevalue(task)
    assert run(**options).token_ids != run().token_ids


def test_every_option_has_a_test_here():
    tested = {name for _, options in OPTIONS for name in options}
    elsewhere = {
        "top_k",
        "top_p",
        "stop_strings",
        "remask_below",
        "compile",
        "batch_size",
        "generator",
        "return_history",
        "return_token_scores",
        "num_return_sequences",
        "block_cache",
        "early_stop",
        "fast",
    }
    assert tested | elsewhere == {f.name for f in dataclasses.fields(DiffusionOptions)}


def test_top_k_and_top_p_narrow_the_choice(caption):
    once = {"steps": 1}
    greedy = caption(**once).token_ids
    hot = {"temperature": 5.0, "seed": 0, **once}
    assert caption(**hot).token_ids != greedy
    assert caption(**hot, top_k=1).token_ids == greedy
    assert caption(**hot, top_p=1e-6).token_ids == greedy
    assert caption(**hot, top_k=3).token_ids != caption(**hot).token_ids
    assert caption(**hot, top_p=0.5).token_ids != caption(**hot).token_ids


def test_an_answer_ends_at_its_stop_string(make, draw_image):
    model, processor = make(seed=1)
    tokenizer = processor.tokenizer
    words = [tokenizer.decode([i]) for i in range(468)]
    unclear = [
        i
        for i, word in enumerate(words)
        if tokenizer(word, add_special_tokens=False)["input_ids"] != [i]
    ]
    options = {"processor": processor, "max_new_tokens": 8, "block_length": 2}
    options["suppress_tokens"] = unclear
    plain = model.diffusion_generate(draw_image(61, 47), prompts="What?", **options)
    ids = plain.token_ids[0][0]
    place = ids.index(ids[3])
    stop = words[ids[place]]
    stopped = model.diffusion_generate(
        draw_image(61, 47), prompts="What?", stop_strings=[stop], **options
    )
    assert stop not in stopped.texts[0][0]
    assert plain.texts[0][0].startswith(stopped.texts[0][0])
    assert stopped.token_ids[0][0][: place + 1] == ids[: place + 1]
    assert stopped.num_forwards <= 4 < plain.num_forwards == 8


def test_verify_doubts_what_was_committed(caption):
    adaptive = {"threshold": 0.1, "steps": 12}
    assert caption(**adaptive, remask_below=0.9).num_forwards > caption(**adaptive).num_forwards


def test_adaptive_decoding_keeps_its_budget_and_counts_its_passes(caption):
    for steps in (1, 3, 6):
        out = caption(threshold=0.9, steps=steps)
        assert out.num_forwards <= steps
    assert caption(threshold=0.0, steps=32).num_forwards == 1


def test_a_batch_size_splits_the_batch_and_changes_nothing_else(make, scene, monkeypatch):
    model, processor = make()
    pairs = [scene((61, 47), 3), scene((40, 40), 1, 1), scene((30, 170), 2, 2)]
    images, masks = map(list, zip(*pairs, strict=True))
    options = {"processor": processor, "caption_length": 4, "steps": 4}
    whole = model.diffusion_generate(images, masks, **options)
    rows = []
    encode = type(model).embed_inputs
    monkeypatch.setattr(
        type(model),
        "embed_inputs",
        lambda self, ids, *a, **k: rows.append(len(ids)) or encode(self, ids, *a, **k),
    )
    split = model.diffusion_generate(images, masks, batch_size=2, **options)
    assert rows == [2, 1]
    assert split.token_ids == whole.token_ids and split.num_forwards == whole.num_forwards


def test_compile_compiles_the_step(caption, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(f) or f)
    assert caption(compile=True).token_ids == caption().token_ids
    assert len(compiled) == 1


def test_a_seed_repeats_a_run(caption):
    hot = {"temperature": 1.0}
    assert caption(**hot, seed=7).token_ids == caption(**hot, seed=7).token_ids
    assert caption(**hot, seed=7).token_ids != caption(**hot, seed=8).token_ids


def test_a_generator_is_drawn_from_and_the_global_one_is_not(caption):
    hot = {"temperature": 1.0}
    before = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(7)
    first, second = caption(**hot, generator=generator), caption(**hot, generator=generator)
    assert first.token_ids == caption(**hot, seed=7).token_ids
    assert second.token_ids != first.token_ids
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("hot", [{"temperature": 1.0}, {"remasking": "random"}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["released", "independent"])
def test_what_an_image_draws_does_not_depend_on_its_batch(make, scene, layout, hot):
    model, processor = make(num_region_prompts=2, **layout)
    scenes = [scene((61, 47), 3), scene((40, 40), 1, seed=5), scene((90, 61), 2, seed=6)]
    images, masks = map(list, zip(*scenes, strict=True))
    given = dict(processor=processor, caption_length=4, seed=3, **hot)
    whole = model.diffusion_generate(images, masks, **given).token_ids
    for size in (1, 2, 3):
        again = model.diffusion_generate(images, masks, batch_size=size, **given)
        assert again.token_ids == whole
    alone = model.diffusion_generate(images[:1], masks[:1], **given)
    assert alone.token_ids == whole[:1]
    same = model.diffusion_generate(images[:1] * 6, masks[:1] * 6, **given).token_ids
    assert len(set(map(str, same))) > 1  # each place in the call draws for itself
    asked = dict(processor=processor, prompts=["What?", "Who?", "Where?"], max_new_tokens=4)
    answers = model.diffusion_generate([[i] for i in images], seed=3, **asked, **hot).token_ids
    for size in (1, 2):
        again = model.diffusion_generate(
            [[i] for i in images], seed=3, batch_size=size, **asked, **hot
        )
        assert again.token_ids == answers


def test_history_and_callback_see_every_step_in_the_order_of_the_masks(make, scene):
    model, processor = make(num_region_prompts=2)
    image, masks = scene((61, 47), 3)
    seen = []
    out = model.diffusion_generate(
        image,
        masks,
        processor=processor,
        caption_length=4,
        steps=4,
        return_history=True,
        callback=lambda step, ids: seen.append((step, ids)),
    )
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert [ids for _, ids in seen] == out.history
    assert out.history[-1] == out.token_ids
    mask = model.config.mask_token_id
    left = [sum(ids.count(mask) for ids in step[0]) for step in out.history]
    assert left == [6 + 3, 4 + 2, 2 + 1, 0]  # 8 positions in the first pass, 4 in the second


def test_no_history_is_kept_unasked(caption):
    assert caption().history == []


def test_generation_defaults_of_a_checkpoint_are_used_and_overridden(make, scene):
    image, masks = scene((61, 47), 2)
    model, processor = make(generation_defaults={"caption_length": 3, "steps": 2})
    out = model.diffusion_generate(image, masks, processor=processor)
    assert [len(ids) for ids in out.token_ids[0]] == [3, 3] and out.num_forwards == 2
    assert model.diffusion_generate(image, masks, processor=processor, steps=3).num_forwards == 3


def test_the_output_is_plain_data(caption):
    out = caption(return_history=True)
    data = out.to_dict()
    assert set(data) == {
        *("texts", "token_ids", "num_forwards", "history", "tokens_per_forward"),
        *("lengths", "forward_passes", "image_forwards", "scores", "token_scores"),
        *("fields", "candidates"),
    }
    assert all(isinstance(token, int) for ids in out.token_ids[0] for token in ids)


def test_generating_leaves_model_and_inputs_as_they_were(make, scene):
    model, processor = make()
    image, masks = scene((61, 47), 2)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    inputs = processor(image, masks=masks, caption_length=3)
    kept = {k: v.clone() for k, v in inputs.items() if k != "task"}
    model.diffusion_generate(inputs=inputs, processor=processor)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in weights.items())
    assert all(torch.equal(v, inputs[k]) for k, v in kept.items())


def test_another_instruction_is_used(make, scene):
    model, processor = make()
    image, masks = scene((61, 47), 2)
    options = {"processor": processor, "caption_length": 4}
    default = model.diffusion_generate(image, masks, **options)
    same = model.diffusion_generate(
        image, masks, "Describe each masked region in detail.", **options
    )
    other = model.diffusion_generate(image, masks, "What color is it?", **options)
    assert same.token_ids == default.token_ids != other.token_ids
    pair = model.diffusion_generate(
        [image, image],
        [masks, masks],
        [None, "What color is it?"],
        **options,
    )
    assert pair.token_ids == [default.token_ids[0], other.token_ids[0]]


def test_prepared_inputs_are_decoded_by_the_saved_processor(make, draw_image, tmp_path):
    model, processor = make()
    inputs = processor(draw_image(40, 40), prompts="What?", max_new_tokens=3)
    expected = model.diffusion_generate(inputs=inputs, processor=processor)
    assert model.diffusion_generate(inputs=inputs).texts is None
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.diffusion_generate(inputs=inputs).texts is None
    processor.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.diffusion_generate(inputs=inputs).texts == expected.texts


def test_the_processor_is_found_from_another_folder_than_the_model_was_loaded_in(
    make, draw_image, tmp_path, monkeypatch
):
    model, processor = make()
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    loaded = type(model).from_pretrained("saved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert loaded.diffusion_generate(draw_image(40, 40), prompts="What?", max_new_tokens=2).texts


def test_a_model_loaded_by_its_class_runs_no_code_of_the_folder(make, draw_image, tmp_path):
    model, processor = make()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for module in tmp_path.glob("*.py"):
        module.write_text("raise SystemExit('code of the folder was run')")
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.diffusion_generate(draw_image(40, 40), prompts="What?", max_new_tokens=2).texts
    assert type(type(processor).from_pretrained(tmp_path)) is type(processor)


@pytest.mark.parametrize(
    ("images", "options"),
    [
        ("masks", {"max_new_tokens": 4}),
        ("masks", {"block_length": 4}),
        ("masks", {"block_length": 4, "caption_length": 4}),
        ("question", {"caption_length": 4}),
        ("inputs", {"max_new_tokens": 4}),
        ("inputs", {"caption_length": 9}),
        ("inputs", {"batch_size": 1}),
    ],
)
def test_an_option_of_the_other_task_is_refused(make, scene, images, options):
    model, processor = make()
    image, masks = scene((61, 47), 2)
    given = {
        "masks": {"images": image, "masks": masks},
        "question": {"images": image, "prompts": "What?"},
        "inputs": {"inputs": processor(image, masks=masks, caption_length=4)},
    }[images]
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"expected no {name}"):
        model.diffusion_generate(**given, processor=processor, **options)


def test_a_checkpoints_defaults_for_the_other_task_are_left_out(make, scene):
    model, processor = make(
        generation_defaults={"caption_length": 4, "max_new_tokens": 6, "block_length": 3}
    )
    image, masks = scene((61, 47), 2)
    caption = model.diffusion_generate(image, masks, processor=processor)
    answer = model.diffusion_generate(image, prompts="What?", processor=processor)
    assert len(caption.token_ids[0][0]) == 4 and len(answer.token_ids[0][0]) == 6


@pytest.mark.parametrize("flag", ["output_hidden_states", "return_dict"])
def test_a_flag_that_is_no_flag_is_refused(make, scene, flag):
    model, processor = make()
    inputs = processor(scene((61, 47), 1)[0], prompts="What?", max_new_tokens=2)
    with pytest.raises(ValueError, match=f"expected {flag} True or False"):
        model(**inputs, **{flag: [0, 2]})


def test_a_released_region_model_captions_a_photograph(load):
    import skimage.data
    from PIL import Image

    model, processor = load("wide/released-region")
    photo = Image.fromarray(skimage.data.coffee()).resize((1200, 900))
    gray = np.asarray(photo.convert("L"))
    masks = [gray < 60, (gray >= 60) & (gray < 140), gray > 220]
    out = model.diffusion_generate(photo, masks, processor=processor, caption_length=4, steps=2)
    assert [len(ids) for ids in out.token_ids[0]] == [4, 4, 4]
