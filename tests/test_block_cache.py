"""Answers in blocks: what is kept within a block, and where an answer is over."""

import json
import math

import llada_v_reference as plain
import pytest
import reference
import torch
from conftest import TEXT, VISION
from llada_v_models import maker
from perceptiondlm.apps.cli import main
from perceptiondlm.benchmarks import long_answers
from perceptiondlm.benchmarks.workload import LLAVA_LAYOUT, PRESETS
from perceptiondlm.generation_options import DiffusionOptions
from perceptiondlm.generation_rules import Blockwise
from shapes import ARGUMENTS, SCENE, shapes_captioner

INDEPENDENT = {"region_layout": "independent", "roi_convention": "aligned"}
QUESTION = "What is it?"


@pytest.fixture(scope="session")
def llava(load):
    """Makes tiny LLaDA-V models."""
    return maker(load)


# The algorithm of Fast-dLLM (arXiv:2505.22618), written out: keys and values by hand.


def states(network, kept, hidden, columns, allowed):
    """Runs some columns; their keys and values go into `kept`, the others' are taken from it."""
    config = network.config.text_config
    width, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    frequency = torch.tensor([theta ** (-2 * i / width) for i in range(width // 2)]).double()
    angles = torch.arange(len(allowed)).double()[:, None] * frequency
    for layer in range(config.num_hidden_layers):
        name = f"language_model.model.layers.{layer}."
        x = network.rms_norm(hidden, name + "input_layernorm")
        queries, keys, values = (network.linear(x, f"{name}self_attn.{c}_proj") for c in "qkv")
        for i, column in enumerate(columns):
            kept[layer, column] = keys[i], values[i]
        all_keys, all_values = (
            torch.stack([kept[layer, column][side] for column in range(len(allowed))])
            for side in (0, 1)
        )
        heads = []
        for head in range(config.num_attention_heads):
            own = slice(head // group * width, (head // group + 1) * width)
            query = queries[:, head * width : (head + 1) * width]
            query = reference.rotate(query, angles[columns])
            scores = query @ reference.rotate(all_keys[:, own], angles).T / math.sqrt(width)
            scores = scores.masked_fill(~allowed[columns], -math.inf)
            heads.append(scores.softmax(-1) @ all_values[:, own])
        hidden = hidden + network.linear(torch.cat(heads, -1), name + "self_attn.o_proj")
        x = network.rms_norm(hidden, name + "post_attention_layernorm")
        gate, up = (
            network.linear(x, name + "mlp.gate_proj"),
            network.linear(x, name + "mlp.up_proj"),
        )
        hidden = hidden + network.linear(gate * torch.sigmoid(gate) * up, name + "mlp.down_proj")
    hidden = network.rms_norm(hidden, "language_model.model.norm")
    return network.linear(hidden, "language_model.lm_head")


def decode(network, embed, allowed, columns, block, each, cache):
    """Decodes answer columns block by block, `each` steps a block; `embed(ids)` is (L, D)."""
    mask = network.config.mask_token_id
    ids, kept = [mask] * len(columns), {}
    for first in range(0, len(columns), block):
        for step in range(each):
            if step == 0 or cache is None:
                computed = list(range(len(allowed)))
            elif cache == "prefix":
                computed = list(range(columns[first], len(allowed)))
            else:
                computed = columns[first : first + block]
            hidden = embed(torch.tensor(ids))[computed]
            logits = states(network, kept, hidden, computed, allowed)
            logits[:, [*network.suppressed, mask]] = -math.inf
            probabilities = dict(zip(computed, logits.softmax(-1), strict=True))
            masked = [i for i in range(first, first + block) if ids[i] == mask]
            masked.sort(key=lambda i: -float(probabilities[columns[i]].max()))
            for i in masked[: block // each + (step < block % each)]:
                ids[i] = int(probabilities[columns[i]].argmax())
    return ids


LLAVA_CASES = [
    ((61, 47), 12, 12, 4, {"shape": "ragged", "seed": 1}),
    ((100, 30), 12, 6, 6, {"shape": "odd", "grouped": True}),
    (None, 8, 8, 4, {"seed": 3}),
]


@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
@pytest.mark.parametrize("case", LLAVA_CASES)
def test_answers_of_llada_v_are_those_of_keys_and_values_kept_by_hand(
    llava, draw_image, case, cache
):
    size, length, steps, block, changes = case
    model, processor = llava(**changes)
    images = [draw_image(*size)] if size else []
    text = plain.prompt_of([("user", "<image>\n" * len(images) + QUESTION)])
    network = reference.Network(model)
    told = plain.Conversation(network, processor.tokenizer, text, images)
    total = len(told.prompt) + length

    expected = decode(
        network,
        lambda ids: torch.cat([told.prompt, network.embed(ids)]),
        torch.ones(total, total, dtype=torch.bool),
        list(range(len(told.prompt), total)),
        block,
        steps * block // length,
        cache,
    )
    got = model.diffusion_generate(
        images or None,
        prompts=QUESTION,
        processor=processor,
        max_new_tokens=length,
        steps=steps,
        block_length=block,
        block_cache=cache,
    )
    assert got.token_ids == [[expected]]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("layout", [{}, INDEPENDENT], ids=["released", "independent"])
def test_answers_of_base_are_those_of_keys_and_values_kept_by_hand(make, draw_image, layout, cache):
    model, processor = make(seed=1, **layout)
    network, image = reference.Network(model), draw_image(61, 47)
    visual = reference.visual_tokens(network, [image])
    lengths, mask = [len(v) for v in visual], [network.config.mask_token_id] * 12
    told = reference.chat_sequence(processor.tokenizer, lengths, QUESTION, mask, bool(layout))
    columns = told.answers[0]

    def embed(ids):
        hidden = network.embed(told.ids).clone()
        hidden[told.images] = torch.cat(visual)
        hidden[columns] = network.embed(ids)
        return hidden

    expected = decode(network, embed, told.allowed, columns, 4, 4, cache)
    got = model.diffusion_generate(
        image,
        prompts=QUESTION,
        processor=processor,
        max_new_tokens=12,
        block_length=4,
        block_cache=cache,
    )
    assert got.token_ids == [[expected]]


# Equalities.


@pytest.fixture(params=["llada-v", "released", "independent"])
def ask(request, make, llava, draw_image):
    """Asks a model one question about each of two images, in four blocks of four tokens."""
    layout = INDEPENDENT if request.param == "independent" else {}
    pair = llava(seed=2) if request.param == "llada-v" else make(seed=1, **layout)

    def answer(images=(0, 1), **options):
        model, processor = pair
        drawn = [draw_image(*[(61, 47), (30, 170)][i], seed=i) for i in images]
        options = {"max_new_tokens": 16, "block_length": 4} | options
        prompts = [["What is it?", "Tell me all that there is to see."][i] for i in images]
        return model.diffusion_generate(drawn, prompts=prompts, processor=processor, **options)

    answer.model = pair[0]
    return answer


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_one_step_a_block_is_exact(ask, cache, guidance):
    options = {"steps": 4, "cfg_scale": guidance}
    exact = ask(**options)
    assert ask(**options, block_cache=cache).token_ids == exact.token_ids


@pytest.mark.parametrize("ask", ["llada-v", "released"], indirect=True)
def test_refreshing_at_every_step_is_exact(ask):
    assert ask(block_cache="dual", prompt_refresh_interval=1).token_ids == ask().token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"block_cache": "dual"},
        {"block_cache": "prefix", "cfg_scale": 1.0},
        {"block_cache": "dual", "threshold": 0.3},
        {"block_cache": "dual", "factor": 1.5, "steps": 8},
        {"block_cache": "dual", "temperature": 1.0, "seed": 3, "prompt_refresh_interval": 2},
        {"early_stop": True},
    ],
)
def test_answers_in_blocks_are_the_same_beside_others_and_alone(ask, options):
    together = ask(**options)
    apart = ask(**options, batch_size=1)
    assert together.token_ids == apart.token_ids
    assert together.num_forwards == apart.num_forwards
    assert together.texts == apart.texts


def test_within_a_block_only_its_positions_are_computed(ask, monkeypatch):
    widths, body = [], ask.model.language_model.model
    forward = body.forward

    def counting(embeds, *args, **kwargs):
        widths.append(embeds.shape[1])
        return forward(embeds, *args, **kwargs)

    monkeypatch.setattr(body, "forward", counting)
    ask(block_cache="dual")
    steps = widths[-16:]
    assert all(width == 4 for i, width in enumerate(steps) if i % 4)
    assert all(width >= 16 for width in steps[::4])
    widths.clear()
    ask(block_cache="prefix")
    assert [w for i, w in enumerate(widths[-16:]) if i % 4] == [
        16, 16, 16, 12, 12, 12, 8, 8, 8, 4, 4, 4,
    ]  # fmt: skip


def test_each_cache_changes_what_is_predicted(ask):
    """Else nothing here would tell an approximation from what is exact."""
    exact, *near = (
        torch.tensor(ask((0,), block_cache=cache, return_token_scores=True).token_scores)
        for cache in (None, "prefix", "dual")
    )
    assert all(float((one - exact).abs().max()) > 1e-4 for one in near)
    assert float((near[0] - near[1]).abs().max()) > 1e-4


# Where an answer is over.


@pytest.fixture
def ending(llava, draw_image):
    """Asks a model that likes to end; gives its answer and forward passes, and its end-of-turn."""
    model, processor = llava(seed=8, loud=("eot_token_id",))

    def answer(**options):
        # LLaDA-V's own defaults stop at the end of turn.
        options = {"max_new_tokens": 24, "block_length": 4, "stop_strings": None} | options
        out = model.diffusion_generate(prompts=QUESTION, processor=processor, **options)
        return out.token_ids[0][0], out.num_forwards, out.texts

    return answer, model.config.eot_token_id


@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
def test_an_answer_over_early_is_the_whole_one_up_to_its_end(ending, cache):
    """The end is seen between two blocks, when all before it has been committed for good."""
    answer, end = ending
    whole, all_steps, texts = answer(block_cache=cache)
    short, steps, same = answer(block_cache=cache, early_stop=True)
    first = whole.index(end)
    assert first < 16  # or nothing is saved
    assert same == texts
    decoded = first // 4 + 1
    assert steps == 4 * decoded < all_steps == 24
    assert short[: 4 * decoded] == whole[: 4 * decoded]
    assert set(short[4 * decoded :]) == {end}


def test_with_an_acceptance_an_answer_is_over_without_being_asked(ending):
    answer, end = ending
    short, steps, _ = answer(block_cache="dual", threshold=0.99)
    assert set(short[short.index(end) :]) == {end}
    assert steps < 24


def test_an_answer_in_cached_blocks_is_over_at_a_stop_string(ending, llava):
    answer, _ = ending
    tokenizer = llava(seed=8, loud=("eot_token_id",))[1].tokenizer
    whole, all_steps, _ = answer(block_cache="dual")
    stop = next(
        tokenizer.decode([i])
        for i in whole[:8]
        if tokenizer(tokenizer.decode([i]), add_special_tokens=False)["input_ids"] == [i]
    )
    short, steps, texts = answer(block_cache="dual", stop_strings=[stop])
    assert steps < all_steps
    assert short[:steps] == whole[:steps] and stop not in texts[0][0]


def test_steps_are_told_as_they_come(ask):
    heard = []
    out = ask(
        (0,), block_cache="dual", return_history=True, callback=lambda step, _: heard.append(step)
    )
    assert heard == list(range(16)) and len(out.history) == 16
    assert out.history[-1] == out.token_ids
    mask = ask.model.config.mask_token_id
    assert [ids[0][0].count(mask) for ids in out.history] == list(range(15, -1, -1))


def test_the_mask_token_is_no_answer_in_cached_blocks(llava):
    model, processor = llava(seed=7, loud=("eot_token_id", "mask_token_id"))
    options = {"max_new_tokens": 12, "block_length": 4, "suppress_tokens": []}
    options["stop_strings"] = None  # behind which masks are left
    out = model.diffusion_generate(
        prompts=QUESTION, processor=processor, block_cache="dual", **options
    )
    assert model.config.mask_token_id not in out.token_ids[0][0]


# What has no use is refused; every door takes the options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_cache": "dual"}, "expected block_length with block_cache, got block_cache alone"),
        ({"early_stop": True}, "expected block_length with early_stop, got early_stop alone"),
        ({"block_cache": "both", "block_length": 4}, r"block_cache among \('prefix', 'dual'\)"),
        (
            {"block_cache": "dual", "block_length": 4, "threshold": 0.5, "remask_below": 0.2},
            "expected no remask_below, which masks finished blocks again, with block_cache",
        ),
        (
            {"block_cache": "dual", "block_length": 4, "compile": True},
            "expected no compile with block_cache",
        ),
    ],
)
def test_what_has_no_use_beside_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionOptions(**options)


def test_blocks_are_several_and_share_the_steps():
    options = DiffusionOptions(block_length=8, block_cache="dual")
    with pytest.raises(ValueError, match="block_length below the answer's 8 tokens .* got one"):
        options.answer_rule(8, None)
    few = DiffusionOptions(block_length=4, block_cache="dual", threshold=0.5, steps=3)
    with pytest.raises(ValueError, match="divisible by the 2 blocks, got 3"):
        few.answer_rule(8, None)
    assert isinstance(options.answer_rule(16, None), Blockwise)


@pytest.mark.parametrize("options", [{"block_cache": "dual"}, {"early_stop": True}])
def test_captions_and_templates_are_not_decoded_in_blocks(make, scene, draw_image, options):
    model, processor = make()
    image, masks = scene((61, 47), 2)
    [name] = options
    with pytest.raises(ValueError, match=f"expected no {name} for captions"):
        model.diffusion_generate(image, masks, processor=processor, **options)
    with pytest.raises(ValueError, match=f"expected no {name} with a template"):
        model.diffusion_generate(
            image, prompts=QUESTION, template="{4}", processor=processor, **options
        )


def test_the_command_line_decodes_in_cached_blocks(capsys):
    arguments = ["caption", str(SCENE), *ARGUMENTS, "--quiet"]
    arguments += ["--question", "How many objects are there?"]
    blocks = ["--max-new-tokens", "8", "--block-length", "4", "--block-cache", "dual"]
    assert main([*arguments, *blocks, "--early-stop"]) == 0
    in_blocks = capsys.readouterr().out
    assert main([*arguments, "--max-new-tokens", "8", "--block-length", "4"]) == 0
    assert in_blocks.strip() and in_blocks == capsys.readouterr().out


def test_a_captioner_keeps_block_options_for_questions_alone():
    captioner = shapes_captioner(block_length=4, block_cache="dual")
    captioner.check_options()
    assert captioner(SCENE, [{"box": [10, 10, 60, 60]}]).regions[0].caption


def test_the_benchmark_compares_the_ways_with_the_exact_one(monkeypatch, tmp_path):
    layout = {**LLAVA_LAYOUT, "vision_config": VISION, "text_config": TEXT | {"vocab_size": 512}}
    monkeypatch.setitem(PRESETS, "mini", (layout, torch.float32))
    output = tmp_path / "result.json"
    arguments = "--preset mini --tokens 8 --block-length 4 --ways exact;dual --scenes 0"
    arguments += f" --device cpu --output {output}"
    assert long_answers.main(arguments.split()) == 0
    exact, dual = json.loads(output.read_text())["rows"]
    assert (exact["way"], exact["ratio"], exact["equal_tokens"]) == ("exact", 1.0, 1.0)
    assert dual["way"] == "dual" and dual["forwards"] == exact["forwards"] == 8
    assert dual["ratio"] == exact["seconds"] / dual["seconds"] and 0 <= dual["equal_tokens"] <= 1
