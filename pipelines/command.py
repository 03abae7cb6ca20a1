"""Runs `perceptiondlm engine RECIPE.yaml [section.key=value ...] [--restart]`."""

import argparse
import sys


def configure(parser: argparse.ArgumentParser):
    """Adds the recipe, its overrides and beginning anew."""
    parser.add_argument("recipe", help="YAML recipe; see configs/engine.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="options that replace the recipe's, values in YAML",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="begin anew in an output folder that is there (default: go on)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the engine; says a user's mistake in one line on stderr and returns 2.

    Returns 1 where an endpoint answers no more: the same command goes on from there.
    """
    from .endpoint import EngineStopped
    from .engine import run_engine
    from .recipe import load_recipe

    try:
        recipe = load_recipe(args.recipe, args.overrides)
        summary = run_engine(recipe, restart=args.restart)
    except (ValueError, OSError) as error:
        print(f"perceptiondlm engine: {error}", file=sys.stderr)
        return 2
    except EngineStopped as error:
        message = f"stopped: {error}; the same command goes on from there"
        print(f"perceptiondlm engine: {message}", file=sys.stderr)
        return 1
    print("\n".join(report_lines(summary, recipe.output.folder)))
    return 0


def report_lines(summary: dict, folder: str) -> list[str]:
    """Returns what a run has to say at its end: what each stage dropped, and what is there."""
    lines = [f"{'stage':<12}{'in':>9}{'out':>9}{'seconds':>10}  dropped"]
    for name, count in summary["stages"].items():
        dropped = ", ".join(f"{rule} {number}" for rule, number in count["dropped"].items())
        row = f"{name:<12}{count['regions_in']:>9}{count['regions_out']:>9}"
        lines.append(f"{row}{count['seconds']:>10.1f}  {dropped or '-'}")

    broken = f", {summary['broken_images']} broken" if summary["broken_images"] else ""
    lines.append(
        f"{folder}: {summary['regions']} regions in {summary['records']} records of"
        f" {summary['images']} images{broken}"
    )
    if summary["failed_calls"]:
        again = f"{summary['failed_calls']} regions were dropped because calls failed"
        lines.append(f"{again}: the same command asks about them again")
    if "train_with" in summary:
        lines.append(f"train on them with {summary['train_with']}")
    return lines
