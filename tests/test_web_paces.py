"""The paces that the web page offers are the acceptances of decoding."""

import pytest

pytest.importorskip("gradio", reason="the page needs the package's apps extra")

from perceptiondlm.apps.web.page import PACES, _pace_of, options_of_pace  # noqa: E402
from perceptiondlm.generation_options import DiffusionOptions, merge_options  # noqa: E402
from perceptiondlm.generation_rules import ACCEPT_RULES  # noqa: E402


@pytest.mark.parametrize("rule", ACCEPT_RULES)
def test_every_acceptance_is_offered_with_the_servers_own_value(rule):
    defaults = DiffusionOptions(**{rule: 0.25})
    pace = _pace_of(defaults)
    assert PACES[pace] == rule
    assert options_of_pace(pace, defaults) == {rule: 0.25}
    assert options_of_pace(pace, DiffusionOptions()) == {rule: ACCEPT_RULES[rule]().value}


def test_the_fixed_pace_is_fixed_whatever_the_server_prefers():
    defaults = {"threshold": 0.9, "remask_below": 0.5}
    chosen = merge_options(defaults, options_of_pace("fixed", DiffusionOptions(**defaults)))
    assert _pace_of(DiffusionOptions(**chosen)) == "fixed"
