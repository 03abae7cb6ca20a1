"""Runs the command `convert_checkpoint.py`: its options, exit codes and publishing."""

import argparse
import errno
import inspect
import sys
from pathlib import Path

from ..common.extras import MissingExtra
from ..common.folders import OutputExists
from ..common.loading import UnrecognizedCheckpoint
from ..common.streams import escape_what_streams_lack
from ..publishing.command import add_push_options, push_from
from ..publishing.provenance import write_provenance
from .convert import DTYPES, VerificationFailed, convert
from .files import DamagedFile, MissingFile, MissingTensor, UnknownTensor, WrongShape, fetch

DESCRIPTION = "Turns a checkpoint of any known layout into a self-contained folder of this package."
FAILED, FULL_DISK, NOT_PUBLISHED = 1, 9, 12
ERROR_CODES = {
    UnrecognizedCheckpoint: 3,
    MissingFile: 4,
    DamagedFile: 5,
    UnknownTensor: 6,
    MissingTensor: 7,
    WrongShape: 8,
    OutputExists: 10,
    VerificationFailed: 11,
}
EXIT_CODES = """exit codes:
  0  converted
  1  any other failure
  2  wrong arguments
  3  the source is not there, or is no known checkpoint
  4  a shard or another needed file is missing
  5  a file is truncated or unreadable
  6  a tensor that no rule, or no part of the model, has a place for
  7  a rule or a part of the model without its tensor
  8  a tensor of another shape than the config says
  9  the disk is full
  10 the output exists (see --force)
  11 what was written does not equal the source (--verify)
  12 converted, but not published (--push-to-hub): `perceptiondlm publish` goes on
"""


def argument_parser() -> argparse.ArgumentParser:
    """Builds the command's parser: options of `convert`, and those of publishing."""
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    add = parser.add_argument
    add("--source", required=True, help="checkpoint folder or Hub id")
    add("--output", required=True, type=Path, help="folder to make")
    add("--dtype", choices=DTYPES, help="of the weights written (default: the source's)")
    add("--max-shard-size", default="5GB", help="of a weight file (default: %(default)s)")
    add("--vision-source", help="SigLIP-2 for a Base from LLaDA, or the SigLIP config of LLaDA-V")
    add("--base", help="model of an adapter; config and processor of a training checkpoint")
    add("--force", action="store_true", help="replace the output")
    add("--verify", action="store_true", help="reload, compare with the source, run once")

    add_push_options(parser.add_argument_group("publishing"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    escape_what_streams_lack()
    args = argument_parser().parse_args(argv)
    parameters = inspect.signature(convert).parameters
    try:
        output = convert(**{name: getattr(args, name) for name in parameters})
    except (ValueError, OSError, MissingExtra) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    print(output)

    # the folder tells from now on where it comes from
    command = ["python", "convert_checkpoint.py", *(sys.argv[1:] if argv is None else argv)]
    write_provenance(args.output, args.source, fetch(args.source), command)
    if args.push_to_hub is None:
        return 0
    return NOT_PUBLISHED if push_from(args, args.output, args.push_to_hub) else 0


def exit_code(error: Exception) -> int:
    """Returns the command's code for a failure (see `EXIT_CODES`)."""
    for kind, code in ERROR_CODES.items():
        if isinstance(error, kind):
            return code
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return FULL_DISK if is_full else FAILED
