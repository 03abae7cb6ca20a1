"""The `perceptiondlm` command: a table of subcommands, each imported only when asked for."""

import argparse
import importlib
import sys

from ..common.extras import MissingExtra
from ..common.streams import escape_what_streams_lack, silence_stdout

INTERRUPTED = 130  # as a shell says of a command that Ctrl-C ended

# name: (module with `configure(parser)` and `run(args) -> exit code`, one line of help)
COMMANDS = {
    "caption": (
        "perceptiondlm.apps.captioning.command",
        "caption regions of images, or ask about images",
    ),
    "caption-dataset": (
        "perceptiondlm.pipelines.dataset_command",
        "caption data sets of any size, on this machine or a Ray cluster",
    ),
    "web": (
        "perceptiondlm.apps.web.command",
        "a web page: paint regions, caption them, watch it happen",
    ),
    "serve": (
        "perceptiondlm.apps.serving.command",
        "an OpenAI-compatible endpoint for captions and answers",
    ),
    "train": ("perceptiondlm.training.cli", "train or fine-tune a checkpoint from a YAML recipe"),
    "engine": (
        "perceptiondlm.pipelines.command",
        "make training data: filter masks, caption, verify and filter captions",
    ),
    "evaluate": ("perceptiondlm.evaluation.cli", "predict, judge, score and report benchmarks"),
    "publish": (
        "perceptiondlm.publishing.command",
        "put a checkpoint on the Hub, with a model card",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code (2 for a mistake on the command line)."""
    escape_what_streams_lack()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # nobody reads on
        silence_stdout()
        return 1
    except MissingExtra as error:
        print(f"perceptiondlm {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:  # whose message, if any, says what was kept
        from tqdm import tqdm  # which writes above a progress bar that is left

        line = f"perceptiondlm {arguments[0]}: {str(error) or 'interrupted'}"
        tqdm.write(line, file=sys.stderr)
        return INTERRUPTED


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="perceptiondlm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        if arguments[:1] == [name]:
            implementation = importlib.import_module(module)
            implementation.configure(command)
            command.set_defaults(run=implementation.run)
    args = parser.parse_args(arguments)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
