"""LLaDA-V's answers: its schedule, where they stop, and the faster ways, against plain loops."""

import functools
import json
from pathlib import Path

import llada_v_reference as plain
import pytest
import reference
import torch
from llada_v_models import maker
from perceptiondlm.generation_loop import Sampler, denoise
from perceptiondlm.generation_options import DiffusionOptions
from perceptiondlm.generation_rules import (
    SemiAutoregressive,
    State,
    StopAt,
    before_end,
)
from perceptiondlm.processing_sequence import response_length
from safetensors.torch import load_file

STOP = ("eot_token_id",)
BOTH = ("eot_token_id", "mask_token_id")
# size, new tokens, steps, block, what differs from the tiny default
CASES = [
    ((100, 30), 12, 12, 12, {"shape": "odd", "grouped": True}),
    ((61, 47), 14, 10, 7, {"shape": "ragged", "seed": 1}),
    ((190, 185), 12, 8, 6, {"seed": 2, "grouped": True}),
    (None, 10, 4, 10, {"seed": 3}),
    *[(None, 12, 12, 12, {"seed": seed, "loud": STOP}) for seed in (7, 8)],
    *[((40, 40), 12, 6, 4, {"seed": seed, "loud": STOP, "grouped": True}) for seed in (5, 11)],
    *[(None, 12, 12, 12, {"seed": seed, "loud": BOTH}) for seed in (0, 7, 10)],
]


@pytest.fixture(scope="session")
def llava(load):
    """Makes tiny LLaDA-V models."""
    return maker(load)


@pytest.fixture(scope="session")
def expected(llava, draw_image):
    """The plain answer of a case, by its number: ids, and where they stop."""

    @functools.cache
    def compute(number):
        case = CASES[number]
        size, length, steps, block, changes = case
        model, processor = llava(**changes)
        config = model.config
        images = [draw_image(*size)] if size else []
        text = plain.prompt_of([("user", "<image>\n" * len(images) + "What is it?")])
        conversation = plain.Conversation(
            reference.Network(model), processor.tokenizer, text, images
        )
        return plain.answer(
            conversation.logits,
            length,
            steps,
            block,
            mask=config.mask_token_id,
            suppressed=model.decoding_defaults["suppress_tokens"],
            stops=[[config.eot_token_id]],
        )

    return compute


def generate(llava, draw_image, case, **options):
    size, length, steps, block, changes = case
    model, processor = llava(**changes)
    options = {"max_new_tokens": length, "steps": steps, "block_length": block} | options
    image = draw_image(*size) if size else None
    return model.diffusion_generate(image, prompts="What is it?", processor=processor, **options)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_answers_equal_the_plain_ones(llava, draw_image, expected, number):
    ids, stop = expected(number)
    out = generate(llava, draw_image, CASES[number])
    assert out.token_ids[0][0][:stop] == ids[:stop]
    tokenizer = llava(**CASES[number][4])[1].tokenizer
    kept = [token for token in ids[:stop] if token < len(tokenizer)]
    assert out.texts[0][0] == tokenizer.decode(kept, skip_special_tokens=True).strip()


def test_the_cases_above_stop_and_meet_the_mask_token(llava, draw_image, expected):
    """Else stopping before everything is decoded, and masks that are chosen, would go untested."""
    stops = [(expected(i)[1], case[1]) for i, case in enumerate(CASES)]
    assert sum(0 < stop < length for stop, length in stops) >= 2
    changed = 0
    for case in (case for case in CASES if case[4].get("loud") == BOTH):
        model = llava(**case[4])[0]
        banned = [*model.decoding_defaults["suppress_tokens"], model.config.mask_token_id]
        without = generate(llava, draw_image, case, suppress_tokens=banned)
        changed += generate(llava, draw_image, case).token_ids != without.token_ids
    assert changed


# Stopping, on made-up predictions.
MASK, LAST = 8, 7  # of nine tokens


def decoded(tokens: list[int], confidence: list[float], block: int = 6) -> tuple[list[int], int]:
    """Where a network leads that always predicts the same, a position a step, and its passes."""
    rest = (1 - torch.tensor(confidence, dtype=torch.float64)) / 8
    logits = rest.log()[:, None].repeat(1, 9)
    logits[range(len(tokens)), tokens] = torch.tensor(confidence, dtype=torch.float64).log()
    n = len(tokens)
    blank = torch.ones(1, 1, n, dtype=torch.bool)
    state, forwards, _ = denoise(
        lambda current, step: logits[None, None],
        State(torch.full((1, 1, n), MASK), blank, blank),
        StopAt(SemiAutoregressive(n, block, n // block), ((LAST,),)),
        Sampler(),
        MASK,
    )
    return state.tokens[0, 0].tolist(), int(forwards)


def test_a_stop_that_comes_first_leaves_what_is_before_it_to_be_decoded():
    """The stop is the surest; positions 0 to 2 are then decoded, and what follows never is."""
    ids, forwards = decoded([1, 2, 3, LAST, 4, 5], [0.3, 0.5, 0.4, 0.9, 0.8, 0.7])
    assert ids == [1, 2, 3, LAST, MASK, MASK]
    assert forwards == 4


def test_what_was_committed_behind_a_stop_stays_but_is_not_answered():
    ids, forwards = decoded([1, 2, LAST, 4, 5, 6], [0.3, 0.5, 0.8, 0.9, 0.4, 0.2])
    assert ids == [1, 2, LAST, 4, MASK, MASK]
    assert forwards == 4
    assert response_length(ids, [(LAST,)]) == 2


def test_a_stop_found_later_but_standing_earlier_counts():
    ids, _ = decoded([1, LAST, 3, LAST, 4, 5], [0.3, 0.5, 0.4, 0.9, 0.8, 0.7])
    assert ids == [1, LAST, MASK, LAST, MASK, MASK]


def test_blocks_behind_a_stop_are_not_begun():
    ids, forwards = decoded([1, LAST, 3, 4, 5, 6], [0.3, 0.9, 0.5, 0.9, 0.9, 0.9], block=2)
    assert ids == [1, LAST, MASK, MASK, MASK, MASK] and forwards == 2


@pytest.mark.parametrize("seed", range(40))
def test_stopping_equals_the_plain_loop(seed):
    """Random networks of nine tokens, of which one is the mask, and stops of one or two."""
    shape = torch.Generator().manual_seed(seed)
    blocks, block, each = (int(torch.randint(1, 5, (), generator=shape)) for _ in range(3))
    length, steps, stop = blocks * block, blocks * each, [[LAST], [3, LAST]][seed % 2]

    def logits(ids):
        generator = torch.Generator().manual_seed(hash((seed, *ids)) % 2**31)
        return torch.randn(length, 9, generator=generator, dtype=torch.float64) * 2

    ids, end = plain.answer(logits, length, steps, block, mask=MASK, suppressed=[0], stops=[stop])
    blank = torch.ones(1, 1, length, dtype=torch.bool)
    rule = StopAt(SemiAutoregressive(steps, block, blocks), (tuple(stop),))
    state, _, _ = denoise(
        lambda tokens, step: logits(tokens[0, 0].tolist())[None, None],
        State(torch.full((1, 1, length), MASK), blank, blank),
        rule,
        Sampler(suppressed=torch.tensor([0])),
        MASK,
    )
    got = state.tokens[0, 0].tolist()
    assert int(before_end(state, rule.sequences).sum()) == end
    if end < length:  # positions that the mask token was chosen for are left there, decoded here
        got = [MASK if theirs == MASK else ours for ours, theirs in zip(got, ids, strict=True)]
    assert got[:end] == ids[:end]


def test_text_is_cut_by_the_stops_ids_and_by_its_letters(llava, draw_image):
    """A stop may stand at the very start, and need not be split as it is alone."""
    model, processor = llava(seed=5)
    out = generate(llava, draw_image, CASES[0])
    words = [processor.tokenizer.decode([i]) for i in range(420)]
    clear = [
        i
        for i, word in enumerate(words)
        if processor.tokenizer(word, add_special_tokens=False)["input_ids"] == [i]
    ]
    banned = sorted(set(range(512)) - set(clear))
    options = {"suppress_tokens": banned, "stop_strings": None}
    whole = generate(llava, draw_image, CASES[0], **options)
    first = words[whole.token_ids[0][0][0]]
    stopped = generate(llava, draw_image, CASES[0], **options | {"stop_strings": [first]})
    assert stopped.texts == [[""]] and whole.texts[0][0]
    assert len(out.texts[0]) == 1
    assert response_length([1, 2, 3, 1, 2], [(2, 3), (3,)]) == 1
    assert response_length([1, 2], [(2, 3)]) == 2


@pytest.mark.parametrize("stops", ["<|eot_id|>", [""], [3]])
def test_stop_strings_are_a_list_of_texts(stops):
    with pytest.raises(ValueError, match="expected stop_strings as a list of texts"):
        DiffusionOptions(stop_strings=stops)


# The faster ways, on the recorded checkpoint.


@pytest.fixture(params=["llava_0", "llava_1", "llava_2"])
def recorded(request, vectors, load):
    """A function that answers a recorded case with further options, and the recorded ids."""
    entries = json.loads((vectors / "manifest.json").read_text())["llava_cases"]
    [entry] = [case for case in entries if case["name"] == request.param]
    options = dict(entry["generation"])
    options["max_new_tokens"] = options.pop("gen_length")
    model, processor = load("released-llava")

    def answer(**changes):
        return model.diffusion_generate(
            Path(vectors) / f"{request.param}.png",
            prompts=entry["prompt"],
            processor=processor,
            **options | changes,
        )

    return answer, load_file(vectors / f"{request.param}.safetensors")["generated_ids"][0].tolist()


def test_refreshing_the_prompt_at_every_step_is_exact(recorded):
    answer, ids = recorded
    assert answer(prompt_refresh_interval=1).token_ids == [[ids]]


@pytest.mark.parametrize("interval", [2, 4, 8, 0])
def test_an_older_prompt_is_near(recorded, interval):
    """The prompt of the first step is exact, and later ones are not far off: of the 44 recorded
    tokens 40, 31, 31 and 31 stay the same at these intervals."""
    answer, ids = recorded
    got = answer(prompt_refresh_interval=interval, return_history=True)
    assert got.history[0] == answer(return_history=True).history[0]
    assert sum(a == b for a, b in zip(got.token_ids[0][0], ids, strict=True)) >= len(ids) / 2


@pytest.mark.parametrize("adaptive", [{"threshold": 0.9}, {"factor": 1.0}, {"entropy_bound": 0.1}])
def test_adaptive_decoding_keeps_its_budget_and_its_stop(llava, draw_image, adaptive):
    for case in CASES[4:8]:
        out = generate(llava, draw_image, case, steps=5, **adaptive, block_length=6)
        model = llava(**case[4])[0]
        ids = out.token_ids[0][0]
        before = ids[: response_length(ids, [(model.config.eot_token_id,)])]
        assert 1 <= out.num_forwards <= 5
        assert all(token not in before for token in model.decoding_defaults["suppress_tokens"])


def test_accepting_nothing_early_is_the_released_schedule(recorded):
    answer, ids = recorded
    out = answer(threshold=1.0)
    assert out.token_ids == [[ids]]


@pytest.mark.parametrize("recorded", ["llava_1"], indirect=True)
def test_the_compiled_step_gives_the_recorded_answer(recorded, monkeypatch):
    """Traced as for compilation, run without generating code, which would take a minute."""
    answer, ids = recorded
    compile_step = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **_: compile_step(step, backend="eager"))
    assert answer(compile=True).token_ids == [[ids]]
