"""`perceptiondlm evaluate sweep`: measures accuracy against forward passes, rule by rule.

Every row measures the same held-out scenes under another rule, value or budget of steps.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.files import GrowingFile, json_bytes
from ..common.option_arguments import add_option_arguments
from ..generation_options import FIXED_SCHEDULE, DiffusionOptions
from ..generation_rules import ACCEPT_RULES
from .checkpoint import (
    add_checkpoint_arguments,
    add_option_argument,
    load_checkpoint,
    named_options,
)
from .files import write_text
from .held_out import describe_scenes, held_out_scenes, measurements, resolved_options
from .report import markdown_table
from .scene_kinds import COSTS, KINDS, SceneKind
from .synthetic import add_scene_arguments, scene_record, summary_line

FIXED = "fixed"  # the schedule that takes all its steps
DEFAULT_RULES = "fixed,threshold:0.9,threshold:0.7,factor:1.0,entropy_bound:0.1"
RULED = ("steps", *FIXED_SCHEDULE)  # of each row's rule
NO_SHARES = (*COSTS, "seconds")  # of what a row has, the rest being in per cent


@dataclass(frozen=True)
class SweepRule:
    """A rule of the sweep: "fixed", or an adaptive one with its numbers."""

    name: str
    value: float | None = None  # the threshold, factor or bound
    verify: float | None = None  # the probability below which committed tokens are masked again

    @classmethod
    def parse(cls, text: str) -> "SweepRule":
        """Parses NAME[:VALUE][+VERIFY]; an adaptive rule without a value takes its default."""
        rule, _, verify = text.strip().partition("+")
        name, _, value = rule.partition(":")
        if name not in (FIXED, *ACCEPT_RULES) or (name == FIXED and (value or verify)):
            known = ", ".join((FIXED, *(f"{rule}[:VALUE][+VERIFY]" for rule in ACCEPT_RULES)))
            raise argparse.ArgumentTypeError(f"expected a rule out of {known}, got {text!r}")
        if name == FIXED:
            return cls(name)
        try:
            number = float(value) if value else ACCEPT_RULES[name]().value
            parsed = cls(name, number, float(verify) if verify else None)

            # The options know which numbers make sense.
            DiffusionOptions(**parsed.options(None))
            return parsed
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"expected a rule with a number of 0 or more, got {text!r}"
            ) from error

    def options(self, steps: int | None) -> dict:
        """Returns the rule as options of `diffusion_generate`; `steps` None for the default."""
        rule = {} if self.name == FIXED else {self.name: self.value, "remask_below": self.verify}
        budget = {} if steps is None else {"steps": steps}
        return FIXED_SCHEDULE | rule | budget


def parse_rules(text: str) -> list[SweepRule]:
    """Parses rules, comma-separated."""
    return [SweepRule.parse(part) for part in text.split(",")]


def parse_steps(text: str) -> list[int | None]:
    """Parses budgets, comma-separated; "full" (None) is a step for each position of a caption."""
    try:
        return [None if part.strip() == "full" else int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers or 'full', got {text!r}") from error


def sweep_row(rule: SweepRule, steps: int, measured: Mapping, kind: SceneKind) -> dict:
    """Makes one row: what was asked for, then what was measured on scenes of a kind."""
    asked = {"rule": rule.name, "value": rule.value, "verify": rule.verify, "steps": steps}
    return asked | {name: measured[name] for name in kind.swept}


def render_sweep(rows: Sequence[Mapping]) -> str:
    """Renders the rows as a Markdown table, shares in per cent."""
    header = [name.replace("_", " ") + (" %" if _is_share(name) else "") for name in rows[0]]
    return markdown_table(header, [[_cell(name, row[name]) for name in row] for row in rows]) + "\n"


def _is_share(name: str) -> bool:
    """Tells whether a field of a row is a share of regions or questions."""
    return name not in ("rule", "value", "verify", "steps", *NO_SHARES)


def _cell(name: str, value) -> str:
    if value is None:
        return ""
    if _is_share(name):
        return f"{100 * value:.2f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def configure(parser: argparse.ArgumentParser):
    """Adds the options of this step."""
    add_checkpoint_arguments(parser)
    add_scene_arguments(parser)
    add_option_arguments(parser, only=("caption_length",))
    add_option_argument(parser)
    add = parser.add_argument
    add("--rules", type=parse_rules, default=DEFAULT_RULES, help=f"default: {DEFAULT_RULES}")
    help_text = "budgets of every rule, as 2,4,full (default: full)"
    add("--steps", type=parse_steps, default="full", help=help_text)


def run(args: argparse.Namespace) -> int:
    """Measures every rule under every budget; the rows are saved as they come."""
    if args.output is None:
        raise ValueError("expected --output SWEEP.json, got none")

    # Every mistake in the options is found before any work.
    common, kind = _common_options(args), KINDS[args.scene_kind]
    model, processor = load_checkpoint(args)
    plan = [(rule, rule.options(steps)) for rule in args.rules for steps in args.steps]
    resolved = [resolved_options(model, common | own) for _, own in plan]

    scenes = held_out_scenes(args.seed, args.scenes, kind)
    record = scene_record(args, model, kind) | {"options": common}

    rows, report = [], GrowingFile(args.output)
    for (rule, own), chosen in zip(plan, resolved, strict=True):
        said = describe_scenes(
            model, processor, scenes, batch_size=args.batch_size, options=common | own
        )
        measured = measurements(scenes, said, kind)
        rows.append(sweep_row(rule, chosen["steps"], measured, kind))
        report.save(json_bytes({"rows": rows} | record))
        print(f"{rule.name} {'' if rule.value is None else rule.value}: {summary_line(measured)}")
    report.finish(json_bytes({"rows": rows} | record))

    table = Path(args.output).with_suffix(".md")
    write_text(table, render_sweep(rows))
    print(f"{args.output}, {table}")
    return 0


def _common_options(args: argparse.Namespace) -> dict:
    """Returns the options of every row."""
    length = {} if args.caption_length is None else {"caption_length": args.caption_length}
    return length | named_options(args, reserved=(*RULED, *length))
