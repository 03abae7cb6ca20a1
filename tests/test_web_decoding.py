"""What the web page offers of decoding: its sliders and paces."""

import pytest

pytest.importorskip("gradio", reason="the page needs the package's apps extra")

from perceptiondlm.apps.serving.limits import Limits  # noqa: E402
from perceptiondlm.apps.web.decoding import (  # noqa: E402
    PACES,
    SLIDER_MAX,
    option_slider,
    options_of_pace,
    pace_of,
)
from perceptiondlm.generation_options import OPTIONS, DiffusionOptions, merge_options  # noqa: E402
from perceptiondlm.generation_rules import ACCEPT_RULES  # noqa: E402


@pytest.mark.parametrize("rule", ACCEPT_RULES)
def test_every_acceptance_is_offered_with_the_servers_own_value(rule):
    defaults = DiffusionOptions(**{rule: 0.25})
    pace = pace_of(defaults)
    assert PACES[pace] == rule
    assert options_of_pace(pace, defaults) == {rule: 0.25}
    assert options_of_pace(pace, DiffusionOptions()) == {rule: ACCEPT_RULES[rule]().value}


@pytest.mark.parametrize("defaults", [{"threshold": 0.9, "remask_below": 0.5}, {"fast": True}])
def test_the_fixed_pace_is_fixed_whatever_the_server_prefers(defaults):
    chosen = merge_options(defaults, options_of_pace("fixed", DiffusionOptions.build(defaults, {})))
    assert pace_of(DiffusionOptions(**chosen)) == "fixed"


@pytest.mark.parametrize("name", SLIDER_MAX)
def test_a_slider_says_what_its_option_does_and_stands_at_the_servers_value(name):
    slider = option_slider(name, DiffusionOptions(**{name: 77}), Limits())
    assert (slider.minimum, slider.value) == (1, 77)
    assert slider.label.lower().replace(" ", "_") == name
    assert slider.info == OPTIONS[name].metadata["text"]


@pytest.mark.parametrize(
    ("own", "limit", "value", "maximum"),
    [(32, 256, 32, 128), (200, 256, 200, 200), (32, 50, 32, 50), (200, 50, 50, 50), (3, 1, 1, 1)],
)
def test_a_slider_reaches_the_servers_value_but_not_beyond_its_limit(own, limit, value, maximum):
    slider = option_slider("steps", DiffusionOptions(steps=own), Limits(steps=limit))
    assert (slider.value, slider.maximum) == (value, maximum)


def test_unless_it_is_said_there_is_a_step_for_each_token():
    assert option_slider("steps", DiffusionOptions(caption_length=12), Limits()).value == 12
