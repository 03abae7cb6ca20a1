"""Runs `perceptiondlm publish`, and declares the options of publishing after a conversion."""

import argparse
import shlex
import sys
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from ..common.json_text import read_json
from .card import LICENSE
from .provenance import is_hub_id
from .upload import push_folder


def hub_id(text: str) -> str:
    """Returns an argument of the form owner/name."""
    if not is_hub_id(text):
        raise argparse.ArgumentTypeError(f"expected owner/name, got {text!r}")
    return text


def add_push_options(parser):
    """Adds the options of publishing after a conversion; `parser` may be a group."""
    parser.add_argument(
        "--push-to-hub", type=hub_id, metavar="OWNER/NAME", help="publish the output on the Hub"
    )
    _add_card_options(parser)


def _add_card_options(parser):
    """Adds the options of the repository and of its card."""
    parser.add_argument("--private", action="store_true", default=None, help="make it private")
    parser.add_argument("--revision", help="branch to publish on (default: main)")
    parser.add_argument(
        "--report", type=Path, help="report.json of `perceptiondlm evaluate report`, for the card"
    )
    parser.add_argument("--base-model", action="append", help="Hub id it derives from; repeatable")
    parser.add_argument("--license", default=LICENSE, help="default: %(default)s")


def configure(parser: argparse.ArgumentParser):
    """Adds the arguments to the `publish` parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Publishes a converted or trained checkpoint on the Hub, with a generated model card, in"
        "\none commit. Log in first with `hf auth login`, or set HF_TOKEN. If it fails, run it"
        "\nagain: what is uploaded already is not sent twice."
    )
    parser.epilog = "exit codes: 0 published, 1 the Hub refused or was out of reach, 2 usage"
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("repo_id", type=hub_id, metavar="owner/name", help="repository on the Hub")
    _add_card_options(parser)


def run(args: argparse.Namespace) -> int:
    """Publishes, and prints the address of the commit."""
    return push_from(args, args.folder, args.repo_id)


def push_from(args: argparse.Namespace, folder: Path, repo_id: str) -> int:
    """Publishes as the options of `add_push_options` say; returns an exit code."""
    try:
        report = None if args.report is None else read_json(args.report)
        commit = push_folder(
            folder,
            repo_id,
            private=args.private,
            revision=args.revision,
            report=report,
            base_model=args.base_model,
            license=args.license,
        )
    except HfHubHTTPError as error:  # an OSError too, but not the user's mistake
        return _fail(1, error, publish_command(args, folder, repo_id))
    except (ValueError, FileNotFoundError) as error:
        return _fail(2, error)
    except (OSError, RuntimeError, httpx.HTTPError) as error:  # the last: out of reach
        return _fail(1, error, publish_command(args, folder, repo_id))

    print(commit.commit_url)
    return 0


def publish_command(args: argparse.Namespace, folder: Path, repo_id: str) -> str:
    """Returns the command that publishes `folder` with the same options."""
    words = ["perceptiondlm", "publish", str(folder), repo_id]
    if args.private:
        words.append("--private")
    for option, default in (("revision", None), ("report", None), ("license", LICENSE)):
        if getattr(args, option) != default:
            words += [f"--{option}", str(getattr(args, option))]
    for name in args.base_model or ():
        words += ["--base-model", name]
    return shlex.join(words)


def _fail(code: int, error: Exception, retry: str | None = None) -> int:
    """Prints an error and, where trying again may help, a command; returns the exit code."""
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    print(f"error: {error}{cause}", file=sys.stderr)
    if retry is not None:
        print(f"to go on: {retry}", file=sys.stderr)
    return code
