"""Templates: fixed text stays, fields keep their lengths, and the likeliest length is kept."""

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from perceptiondlm import generation_diffusion
from perceptiondlm.generation_templates import Field, Template, pair_templates

RULES = [
    {},
    {"steps": 2},
    {"threshold": 0.5},
    {"factor": 1.0},
    {"entropy_bound": 2.0},
    {"threshold": 0.3, "remask_below": 0.2},
    {"temperature": 1.0, "seed": 0},
    {"remasking": "random", "seed": 0},
    {"temperature": 1.0, "seed": 0, "num_return_sequences": 2},
    {"cfg_scale": 1.0},
]
LAYOUTS = ["released", "independent"]

fixed = st.text(alphabet=" abcdeé,.'\"\\<>|", max_size=8)
spec = st.one_of(
    st.just(""),
    st.integers(1, 3).map(str),
    st.tuples(st.integers(1, 2), st.integers(0, 1)).map(lambda p: f"{p[0]}-{p[0] + p[1]}"),
    st.just("red|light blue"),
)
templates = st.tuples(st.lists(st.tuples(fixed, spec), min_size=1, max_size=2), fixed)


@pytest.fixture(params=LAYOUTS)
def captioned(request, make, scene):
    """A function: captions of two regions by a template."""
    model, processor = make(region_layout=request.param)
    image, masks = scene((61, 47), 2)

    def run(template, **options):
        return model.diffusion_generate(
            image, masks, template=template, processor=processor, **options
        )

    run.model, run.processor = model, processor
    return run


def bounds(kind: str) -> tuple[int, int] | None:
    """The lengths that a field of this kind may have; None for one of texts."""
    if "|" in kind:
        return None
    low, _, high = (kind or "1-4").partition("-")
    return int(low), int(high or low)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(template=templates, rule=st.sampled_from(RULES), is_answer=st.booleans())
def test_any_template_keeps_its_text_and_its_lengths(
    make, scene, layout, template, rule, is_answer
):
    model, processor = make(region_layout=layout)
    image, masks = scene((61, 47), 2)
    pieces, last = template
    text = "".join(f"{before}{{{kind}}}" for before, kind in pieces) + last
    asked = {"prompts": "what?"} if is_answer else {"masks": masks}
    out = model.diffusion_generate(
        image, template=text, processor=processor, return_token_scores=True, **asked, **rule
    )
    for row, values_of in zip(out.texts, out.fields, strict=True):
        for text_of, values in zip(row, values_of, strict=True):
            parts = [
                part for (before, _), v in zip(pieces, values, strict=True) for part in (before, v)
            ]
            assert text_of == "".join([*parts, last])
            for (_, kind), value in zip(pieces, values, strict=True):
                assert bounds(kind) is not None or value in kind.split("|")
    # As many tokens were denoised as the fields may have.
    possible = [bounds(kind) or (0, 0) for _, kind in pieces]
    low, high = (sum(pair[i] for pair in possible) for i in (0, 1))
    for row in out.token_scores:
        for scores in row:
            assert low <= sum(s is not None for s in scores) <= high


def test_fixed_tokens_are_the_templates_own(captioned):
    tokenizer = captioned.processor.tokenizer
    out = captioned("a {2} of {1}")
    for ids in out.token_ids[0]:
        assert ids[:1] == tokenizer("a")["input_ids"]
        assert ids[3 : 3 + len(tokenizer(" of")["input_ids"])] == tokenizer(" of")["input_ids"]
        assert ids[-1] == captioned.processor.eot_token_id
    assert [out.lengths[0][k] == len(ids) - 1 for k, ids in enumerate(out.token_ids[0])] == [
        True
    ] * 2


@pytest.mark.parametrize("rule", RULES[:6])
@pytest.mark.parametrize("template", ["{}", "a {1-3} of {1-2}", "{1-2}{2}{1-2}"])
def test_the_lengths_are_those_of_an_exhaustive_search(captioned, template, rule):
    chosen = captioned(template, **rule)
    kinds = re.findall(r"\{([^}]*)\}", template)
    ranges = [range(low, high + 1) for low, high in map(bounds, kinds)]
    best = [(-float("inf"), None)] * 2
    for lengths in itertools.product(*ranges):
        numbers = iter(lengths)
        exact = captioned(
            re.sub(r"\{[^}]*\}", lambda _, n=numbers: f"{{{next(n)}}}", template), **rule
        )
        for k in range(2):
            if exact.scores[0][k] > best[k][0]:
                best[k] = exact.scores[0][k], exact.token_ids[0][k]
    for k in range(2):
        assert chosen.token_ids[0][k] == best[k][1]
        assert chosen.scores[0][k] == pytest.approx(best[k][0], rel=1e-4)


def test_an_enumerated_field_is_the_likeliest_of_its_texts(captioned):
    labels = ["red", "light blue", "green star"]
    out = captioned("it is {" + "|".join(labels) + "}")
    tokenizer, model = captioned.processor.tokenizer, captioned.model
    means = {}
    for label in labels:
        # All of its tokens masked, the likelihood of each beside the others' masks.
        count = len(tokenizer(" " + label)["input_ids"])
        slot = [
            *tokenizer("it is")["input_ids"],
            *[model.config.mask_token_id] * count,
            captioned.processor.eot_token_id,
        ]
        means[label] = mean_log_probs(captioned, slot, tokenizer(" " + label)["input_ids"])
    for k in range(2):
        assert out.fields[0][k] == [max(labels, key=lambda label: means[label][k])]
        assert out.scores[0][k] == pytest.approx(max(means[label][k] for label in labels), rel=1e-4)
    assert out.num_forwards == 6 if captioned.model.config.region_layout == "independent" else True


def mean_log_probs(captioned, slot: list[int], target: list[int]) -> list[float]:
    """For each region the mean log-probability of what is masked in a slot, by a plain forward."""
    import torch

    model, processor = captioned.model, captioned.processor
    image, masks = captioned.__closure__[0].cell_contents, captioned.__closure__[1].cell_contents
    found = []
    for k in range(2):
        inputs = processor(image, masks=masks, caption_length=len(slot))
        (order,) = inputs["region_orders"].tolist()
        columns = inputs["response_columns"][0, order.index(k)]
        inputs["input_ids"][0, columns] = torch.tensor(slot)
        with torch.no_grad():
            logits = model(**{k: v for k, v in inputs.items()}).logits[0, columns].double()
        masked = [i for i, token in enumerate(slot) if token == model.config.mask_token_id]
        chosen = logits.log_softmax(-1)[masked, target]
        found.append(float(chosen.mean()))
    return found


def test_a_dict_is_a_json_object(captioned):
    template = {"color": "{1-2}", "kind": ["cup", 'a "big" one'], "note": "is {1} of\n{name:2}"}
    out = captioned(template)
    for text, fields in zip(out.texts[0], out.fields[0], strict=True):
        assert json.loads(text) == fields
        assert list(fields) == ["color", "kind", "note"] and fields["kind"] in template["kind"]
        assert fields["note"].startswith("is ") and " of\n" in fields["note"]


def test_named_fields_make_a_dict(captioned):
    out = captioned("a {color:1} {2} {kind:cup|bowl}")
    assert all(set(own) == {"color", 1, "kind"} for own in out.fields[0])
    assert all(isinstance(own, list) for own in captioned("{1} and {1}").fields[0])


def test_templates_nest_like_the_masks(captioned):
    out = captioned(["{1} one", {"k": "{2}"}])
    assert out.texts[0][0].endswith(" one") and set(json.loads(out.texts[0][1])) == {"k"}
    single = [captioned(one) for one in ("{1} one", {"k": "{2}"})]
    if captioned.model.config.region_layout == "independent":  # where regions do not meet
        assert [out.token_ids[0][k] for k in range(2)] == [
            single[k].token_ids[0][k] for k in range(2)
        ]


def test_a_question_has_a_template_of_its_own(make, draw_image):
    model, processor = make(region_layout="independent")
    image = draw_image(40, 40)
    options = {"processor": processor}
    prompts = ["is it?", "what?"]
    out = model.diffusion_generate(
        image, prompts=prompts, template=["{yes|no}", "a {2}"], **options
    )
    assert out.texts[0][0] in ("yes", "no") and out.texts[1][0].startswith("a ")
    alone = model.diffusion_generate(image, prompts="what?", template="a {2}", **options)
    assert alone.texts == [out.texts[1]]


def test_steps_can_be_watched_where_there_is_one_length(captioned):
    steps = []
    out = captioned("a {3} b", callback=lambda step, ids: steps.append(ids), return_history=True)
    assert steps[-1] == out.token_ids and len(out.history) == len(steps) == 3
    with pytest.raises(ValueError, match="one candidate for each response"):
        captioned("a {1-3} b", return_history=True)


WRONG = [
    ("no field", "expected a template with a field"),
    ("a {", "braces in pairs"),
    ("a }", "braces in pairs"),
    ("{0}", "lengths from 1 to"),
    ("{3-2}", "lengths from 1 to"),
    ("{1-2000}", "lengths from 1 to"),
    ("{1-100}", "at most 64 combinations"),
    ("{}{}{}{}", "at most 64 combinations"),
    ("{a:x}", "expected a field as"),
    ("{a b}", "expected a field as"),
    ("{1:3}", "a field's name as an identifier"),
    ("{a|}", "none blank"),
    ("{a:1}{a:2}", "a name for each field"),
    ("{red|red}", "different texts to choose"),
    ("{red| }", "different texts to choose"),
    (3, "expected a template as text or dict"),
    ({}, "a dict with texts as keys"),
    ({1: "{}"}, "a dict with texts as keys"),
    ({"a": 3}, "a template or a list of texts for 'a'"),
    ({"a": "b"}, "expected a template with a field"),
    ({"a": []}, "different texts to choose"),
    (["{1}"], "a template for each of 2 regions|templates of"),
    ([["{1}"] * 2] * 2, "templates of 1 images"),
]


@pytest.mark.parametrize(("template", "message"), WRONG)
def test_what_is_no_template_is_refused(captioned, template, message):
    with pytest.raises(ValueError, match=message):
        captioned(template)


@pytest.mark.parametrize(
    "name", ["caption_length", "max_new_tokens", "block_length", "stop_strings"]
)
def test_options_that_a_template_has_no_use_for_are_refused(captioned, name):
    value = ["x"] if name == "stop_strings" else 4
    with pytest.raises(ValueError, match=f"no {name} with a template"):
        captioned("{1}", **{name: value})


def test_braces_of_the_text_are_written_twice():
    template = Template.parse("{{a}} {1} }}")
    assert template.texts == ("{a} ", " }") and template.text(["x"]) == "{a} x }"


def test_fields_are_read():
    assert Field.parse("") == Field(None) and Field.parse("name") == Field("name")
    assert Field.parse("n:2") == Field("n", 2, 2) and Field.parse("2-3") == Field(None, 2, 3)
    assert Field.parse("größe:2").name == "größe"
    assert Template.parse({"größe": "{1}"}).texts[0] == '{"größe": "'
    assert Field.parse("n:a|b c") == Field("n", choices=("a", "b c"))
    paired = pair_templates(["{1}", ["{2}", "{3}"]], [1, 2])
    assert [[one.fields[0].max_length for one in own] for own in paired] == [[1], [2, 3]]


@pytest.mark.parametrize("template", ["a {1-3} {}", {"k": "{1-2}", "c": ["a", "b"]}])
def test_the_batch_size_bounds_the_rows_and_changes_nothing(captioned, monkeypatch, template):
    expected = captioned(template)
    sizes = []
    plain = generation_diffusion.ResponseNetwork

    def watched(model, inputs, *given, **named):
        sizes.append(len(inputs["input_ids"]))
        return plain(model, inputs, *given, **named)

    monkeypatch.setattr(generation_diffusion, "ResponseNetwork", watched)
    out = captioned(template, batch_size=2)
    assert out.token_ids == expected.token_ids and out.fields == expected.fields
    assert max(sizes) <= 2
