"""Makes the page's controls of decoding, as `DiffusionOptions` declares the options."""

import gradio as gr

from ...generation_options import FIXED_SCHEDULE, OPTIONS, DiffusionOptions
from ...generation_rules import ACCEPT_RULES
from ..serving.limits import Limits

# As far as a slider reaches, where neither the server's limits nor its own value say otherwise.
SLIDER_MAX = {"caption_length": 128, "steps": 128, "max_new_tokens": 512}
PACES = {"fixed": None, **{f"by {rule.replace('_', ' ')}": rule for rule in ACCEPT_RULES}}


def option_slider(name: str, defaults: DiffusionOptions, limits: Limits) -> gr.Slider:
    """Makes the slider of an option that counts steps or tokens.

    It stands at the server's own value and, within the limits, always reaches as far as that.
    """
    limit = getattr(limits, name.removeprefix("max_"))
    own = getattr(defaults, name) or defaults.caption_length  # steps: one for each token
    value = min(own, limit)
    reach = min(max(own, SLIDER_MAX[name]), limit)
    label = name.replace("_", " ").capitalize()
    minimum = min(1, reach - 1)  # gradio wants some room; 0 is refused when it is asked for
    text = OPTIONS[name].metadata["text"]
    return gr.Slider(minimum, reach, value, step=1, label=label, info=text)


def pace_choice(defaults: DiffusionOptions) -> gr.Dropdown:
    """Makes the choice of how many tokens a step commits: a fixed number or by a rule."""
    pace = pace_of(defaults)
    return gr.Dropdown(list(PACES), value=pace, label="Pace", info="tokens committed at a step")


def pace_of(defaults: DiffusionOptions) -> str:
    """Returns the name of the pace that a checkpoint's defaults ask for."""
    rules = (n for n in ACCEPT_RULES if getattr(defaults, n) is not None)
    rule = next(rules, None)
    return next(name for name, value in PACES.items() if value == rule)


def options_of_pace(pace: str, defaults: DiffusionOptions) -> dict:
    """Returns the decoding options of a pace: the server's own value of its rule, if it has one."""
    rule = PACES[pace]
    if rule is None:
        return dict(FIXED_SCHEDULE)
    own = getattr(defaults, rule)
    return {rule: ACCEPT_RULES[rule]().value if own is None else own}
