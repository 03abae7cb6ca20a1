"""Makes command-line arguments for the decoding options from their one declaration."""

import argparse
from collections.abc import Sequence

from ..generation_options import OPTIONS, RENAMED


class _Renamed(argparse.Action):
    """Refuses an option's old name and says the new one."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"expected {self.const}, got {option_string}, which is its old name")


def add_option_arguments(
    parser, only: Sequence[str] | None = None, without: Sequence[str] = ()
) -> None:
    """Adds an argument for each decoding option that a command line offers.

    Args:
        parser: a parser or a group of one.
        only: the options to add; None: all.
        without: options to leave out.
    """
    for name, declared in OPTIONS.items():
        kind, choices = declared.metadata["kind"], declared.metadata["choices"]
        if kind is None or name in without or (only is not None and name not in only):
            continue
        text = declared.metadata["text"].replace("%", "%%")
        if declared.default is not None and kind is not bool:
            text += f" (default: {declared.default})"

        how = {"action": "store_true", "default": None} if kind is bool else {"type": kind}
        if kind in (int, float):
            how["metavar"] = "N"
        if choices:
            how["choices"] = choices
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **how)

    for old, new in RENAMED.items():
        named = {"nargs": "?", "const": _as_flags(new), "help": argparse.SUPPRESS}
        parser.add_argument(f"--{old.replace('_', '-')}", action=_Renamed, **named)


def given_options(args: argparse.Namespace) -> dict:
    """Returns the decoding options that were given on a command line."""
    return {n: getattr(args, n) for n in OPTIONS if getattr(args, n, None) is not None}


def _as_flags(names: str) -> str:
    """Writes the names of options as a command line has them."""
    words = names.replace("=", "").replace(",", " ,").split()
    flags = (f"--{word.replace('_', '-')}" if word in OPTIONS else word for word in words)
    return " ".join(flags).replace(" ,", ",")
