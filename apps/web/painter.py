"""Fills in the painter's markup: an image on which regions are painted, in the reader's browser.

The markup, script and style are files beside this module (see `assets`). What the script sends,
`input.read_payload` reads.
"""

import html
import json
from string import Template

from ..captioning.drawing import PALETTE, contrasting
from ..serving.limits import Limits
from .assets import read_markup
from .view import css_color


def markup(limits: Limits, examples: list[dict], *, regions: bool, outlines: bool) -> str:
    """Returns the painter's HTML.

    Args:
        limits: what the browser refuses before it sends anything.
        examples: as `Example.to_dict` gives them.
        regions: whether the model describes regions; else the image is only shown.
        outlines: whether regions can be found.
    """
    setup = {
        "bytes": limits.body_bytes,
        "pixels": limits.pixels,
        "masks": limits.masks,
        "regions": regions,
        "palette": [{"fill": css_color(c), "ink": css_color(contrasting(c))} for c in PALETTE],
        "examples": examples,
    }
    return Template(read_markup()).substitute(
        setup=html.escape(json.dumps(setup)),
        outline="" if outlines else "hidden",
        examples="" if examples else "hidden",
    )
