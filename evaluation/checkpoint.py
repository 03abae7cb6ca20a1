"""Declares options that several steps share: which checkpoint is measured, and how it decodes."""

import argparse
import json
from collections.abc import Sequence

from ..common.fingerprints import weights_fingerprint
from ..common.loading import default_device, load_model
from ..common.option_arguments import add_option_arguments, given_options
from ..common.quantization import add_quantize_argument
from ..generation_options import options_of
from ..generation_rules import ACCEPT_RULES

# arguments of `diffusion_generate` that a step itself gives
CALL_ARGUMENTS = ("images", "masks", "prompts", "inputs", "processor", "callback", "generator")


def parse_option(text: str) -> tuple[str, object]:
    """Parses NAME=VALUE: a value that is JSON as such (`steps=16`), any other as text."""
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def add_checkpoint_arguments(parser: argparse.ArgumentParser, *, required: bool = True):
    """Adds the options that say which checkpoint is loaded, and how."""
    add = parser.add_argument
    add("--model", required=required, help="checkpoint: folder or Hub id")
    add("--subfolder", default="", help="of the checkpoint, for weights and processor")
    add("--dtype", default="auto", help="auto, float32, bfloat16, ...")
    add("--device", help="default: the accelerator if there is one, else the CPU")
    add_quantize_argument(parser)


def load_checkpoint(args: argparse.Namespace, device: str | None = None):
    """Loads the model and processor that the options of `add_checkpoint_arguments` name.

    `device` is where to, unless an option says so.
    """
    if args.model is None:
        raise ValueError("expected --model PATH, a checkpoint's folder or Hub id, got none")
    device = args.device or device or default_device()
    return load_model(args.model, args.subfolder, args.dtype, device, quantize=args.quantize)


def checkpoint_record(args: argparse.Namespace, model) -> dict:
    """Returns what a report says of the checkpoint."""
    return {
        "model": args.model,
        "subfolder": args.subfolder,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": args.quantize,
        "device": str(model.device),
        "weights": weights_fingerprint(model),
    }


# decoding options that have an argument of their own
FLAGS = ("steps", "caption_length", *ACCEPT_RULES)


def add_option_argument(parser: argparse.ArgumentParser):
    """Adds `--option NAME=VALUE`, for any option of decoding."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        dest="options",
        type=parse_option,
        metavar="NAME=VALUE",
        help="of diffusion_generate, as steps=32; may be repeated",
    )


def add_decoding_arguments(parser: argparse.ArgumentParser):
    add_option_arguments(parser, only=FLAGS)
    add_option_argument(parser)


def decoding_options(args: argparse.Namespace, *, questions: bool = True) -> dict:
    """Returns the options of `diffusion_generate` that were given.

    Raises ValueError for one that is given twice or alone without a use, that is no option of
    decoding, or, unless `questions` are answered too, that captions have no use for.
    """
    flags = {name: value for name, value in given_options(args).items() if name in FLAGS}
    options = flags | named_options(args, reserved=list(flags))
    useless = [] if questions else sorted(set(options) & set(options_of("answers")))
    if useless:
        raise ValueError(f"expected options of captions, got {', '.join(useless)}, of answers")
    return options


def named_options(args: argparse.Namespace, reserved: Sequence[str] = ()) -> dict:
    """Returns what `--option` gave. Raises ValueError for a name given twice or `reserved`."""
    names = [name for name, _ in args.options]
    for name in names:
        if name in CALL_ARGUMENTS:
            raise ValueError(f"expected an option of decoding, got --option {name}=...")
        if names.count(name) > 1 or name in reserved:
            raise ValueError(f"expected {name} once, got it more often")
    return dict(args.options)
