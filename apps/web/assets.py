"""Reads the page's script, style and markup, which are files beside this module."""

import os
from pathlib import Path

FOLDER = Path(os.path.abspath(__file__)).parent
SCRIPTS = ("regions.js", "drawing.js", "events.js")  # in this order: they are one function's body
STYLES = ("page.css", "painter.css")


def read_script() -> str:
    """Returns the painter's JavaScript, to run with `element` and `server` in scope."""
    return _joined(SCRIPTS)


def read_style() -> str:
    """Returns the CSS of the page and the painter."""
    return _joined(STYLES)


def read_markup() -> str:
    """Returns the painter's HTML, a template for `string.Template`."""
    return _joined(["painter.html"])


def _joined(names) -> str:
    return "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in names)
