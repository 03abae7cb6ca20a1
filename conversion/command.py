"""The command line of `convert_checkpoint.py`: its options, exit codes and publishing."""

import argparse
import errno
import inspect
import sys
from pathlib import Path

from ..common.extras import MissingExtra
from ..publishing.command import add_push_options, push_from, write_provenance
from .convert import DTYPES, VerificationFailed, convert
from .files import (
    ConversionError,
    DamagedFile,
    MissingFile,
    MissingTensor,
    UnknownTensor,
    UnrecognisedSource,
    WrongShape,
    fetch,
)
from .output import OutputExists

DESCRIPTION = "Turns a checkpoint of any known layout into a self-contained folder of this package."
FULL_DISK_CODE, NOT_PUBLISHED_CODE = 9, 12
EXIT_CODES = f"""exit codes:
  0  converted
  1  any other failure
  2  wrong arguments
  {UnrecognisedSource.exit_code}  the source is not there, or is no known checkpoint
  {MissingFile.exit_code}  a shard or another needed file is missing
  {DamagedFile.exit_code}  a file is truncated or unreadable
  {UnknownTensor.exit_code}  a tensor that no rule, or no part of the model, has a place for
  {MissingTensor.exit_code}  a rule or a part of the model without its tensor
  {WrongShape.exit_code}  a tensor of another shape than the config says
  {FULL_DISK_CODE}  the disk is full
  {OutputExists.exit_code} the output exists (see --force)
  {VerificationFailed.exit_code} what was written does not equal the source (--verify)
  {NOT_PUBLISHED_CODE} converted, but not published (--push-to-hub): `perceptiondlm publish` goes on
"""


def argument_parser() -> argparse.ArgumentParser:
    """The command's options: `convert`'s, and those of publishing."""
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
    args = argument_parser().parse_args(argv)
    parameters = inspect.signature(convert).parameters
    try:
        output = convert(**{name: getattr(args, name) for name in parameters})
    except (ValueError, OSError, MissingExtra) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    print(output)
    return publish(args, sys.argv[1:] if argv is None else argv)


def publish(args: argparse.Namespace, argv: list[str]) -> int:
    """Records where the output comes from and, when asked, puts it on the Hub."""
    command = ["python", "convert_checkpoint.py", *argv]
    write_provenance(args.output, args.source, fetch(args.source), command)
    if args.push_to_hub is None:
        return 0
    failed = push_from(args, args.output, args.push_to_hub)
    return NOT_PUBLISHED_CODE if failed else 0


def exit_code(error: Exception) -> int:
    """The command's code for a failure (see `EXIT_CODES`)."""
    if isinstance(error, ConversionError):
        return error.exit_code
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return FULL_DISK_CODE if is_full else 1
