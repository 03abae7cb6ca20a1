"""`perceptiondlm evaluate`: runs one of a table of steps, imported only when it is asked for."""

import argparse
import importlib
import logging
import os
import sys
from pathlib import Path

from ..common.files import only_run
from .environment import code_revision
from .files import run_record_path

# name: (module with `configure(parser)` and `run(args) -> exit code`, one line of help)
STEPS = {
    "predict": ("perceptiondlm.evaluation.predict", "caption a benchmark's regions"),
    "judge": ("perceptiondlm.evaluation.judge", "ask a judge the questions about the captions"),
    "score": ("perceptiondlm.evaluation.score", "score a judge's answers as published"),
    "report": ("perceptiondlm.evaluation.report", "write a report with figures"),
    "synthetic": ("perceptiondlm.evaluation.synthetic", "measure on drawn scenes, judged exactly"),
    "sweep": ("perceptiondlm.evaluation.sweep", "accuracy against forward passes, rule by rule"),
    "confidence": (
        "perceptiondlm.evaluation.confidence",
        "whether scores tell wrong captions, and find the region of a caption",
    ),
    "latency": ("perceptiondlm.evaluation.latency", "seconds against regions in an image"),
}


class _StepParser(argparse.ArgumentParser):
    """A parser that asks its step's module for the options when it is first used."""

    module: str | None = None

    def parse_known_args(self, args=None, namespace=None):
        if self.module is not None:
            implementation = importlib.import_module(self.module)
            self.module = None
            implementation.configure(self)
            self.set_defaults(run_step=implementation.run)
        return super().parse_known_args(args, namespace)


def configure(parser: argparse.ArgumentParser):
    """Adds the steps to the `evaluate` parser."""
    steps = parser.add_subparsers(
        dest="step", required=True, metavar="step", parser_class=_StepParser
    )
    for name, (module, help_text) in STEPS.items():
        steps.add_parser(name, help=help_text, description=help_text).module = module


def run(args: argparse.Namespace) -> int:
    """Runs the chosen step; a user's mistake is one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    code_revision()  # now, since the repository may change while a step runs
    try:
        with only_run(*_outputs(args)):
            return args.run_step(args)
    except (ValueError, OSError) as error:  # OSError: a checkpoint that is not there, among others
        print(f"perceptiondlm evaluate {args.step}: {error}", file=sys.stderr)
        return 2


def _outputs(args: argparse.Namespace) -> list[str | Path | None]:
    """Returns the paths that a step writes.

    Of several processes of one run the first alone locks them, so the others return none.
    """
    if os.environ.get("RANK", "0") != "0":
        return []
    outputs = [getattr(args, name, None) for name in ("output", "own_output", "texts")]
    files = [output for output in outputs if output is not None and Path(output).suffix]
    return outputs + [run_record_path(file) for file in files]
