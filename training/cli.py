"""Runs `perceptiondlm train RECIPE.yaml [section.key=value ...] [--resume [CHECKPOINT]]`."""

import argparse
import logging
import sys


def configure(parser: argparse.ArgumentParser):
    """Adds the recipe, its overrides and resuming."""
    parser.add_argument("recipe", help="YAML recipe; see configs/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="options that replace the recipe's, values in YAML",
    )

    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=None,
        metavar="CHECKPOINT",
        help="go on from a checkpoint (default: the last one of the output folder)",
    )


def run(args: argparse.Namespace) -> int:
    """Trains; says a user's mistake in one line on stderr and returns 2."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    from .recipe import load_recipe
    from .run import train
    from .sharding import leave_group
    from .stopping import plain_message

    try:
        train(load_recipe(args.recipe, args.overrides), resume=args.resume)
        leave_group()
    except (ValueError, OSError) as error:  # transformers' for a checkpoint that is not there
        print(f"perceptiondlm train: {plain_message(error)}", file=sys.stderr)
        return 2
    return 0
