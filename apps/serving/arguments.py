"""Declares the arguments that the web page and the server share, and makes an engine of them."""

import argparse
import math

from ...common.option_arguments import add_option_arguments, given_options
from ..captioning.model_arguments import add_model_arguments, load_captioner
from .limits import Limits

MIB = 1 << 20
DEFAULT = Limits()

# Arguments whose values are numbers of their default's type: name, default, unit, help.
QUEUE = (
    ("--max-queue", 64, "N", "requests waiting; more are refused"),
    ("--max-batch", 8, "N", "region groups run together"),
    ("--window-ms", 20.0, "MS", "how long a request waits for company"),
    (
        "--max-client-cost",
        8_000_000,
        "N",
        "work of all requests of one address that wait or run",
    ),
    (
        "--seen-cache-mb",
        256,
        "MIB",
        "memory of images that were seen, kept for further requests about them; 0: none",
    ),
)
REQUEST_LIMITS = (
    (
        "--max-cost",
        2_000_000,
        "N",
        "work: tokens of prompt and response, times denoising steps, times two with cfg_scale",
    ),
    ("--max-mib", DEFAULT.body_bytes / MIB, "MIB", "size of what is uploaded"),
    ("--max-pixels", DEFAULT.pixels, "N", "of an image"),
    (
        "--max-decoded-mib",
        DEFAULT.decoded_bytes / MIB,
        "MIB",
        "memory of its images (4 bytes a pixel) and masks (1) together",
    ),
    ("--max-masks", DEFAULT.masks, "N", "of an image"),
    ("--max-caption-length", DEFAULT.caption_length, "N", "tokens of a caption"),
    ("--max-answer-length", DEFAULT.new_tokens, "N", "tokens of an answer"),
    ("--request-seconds", DEFAULT.request_seconds, "S", "until it is given up"),
)


def add_engine_arguments(parser: argparse.ArgumentParser):
    """Adds what says which model is run, and how it decodes unless a request says otherwise."""
    add_model_arguments(parser.add_argument_group("model"))
    _add_decoding_arguments(parser)


def _add_decoding_arguments(parser: argparse.ArgumentParser):
    decoding = parser.add_argument_group("decoding, unless a request says otherwise")
    add_option_arguments(decoding, without=("batch_size", "compile"))


def port_number(text: str) -> int:
    """Parses a port from 0 to 65535."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def add_queue_arguments(parser: argparse.ArgumentParser, *, host_port: int):
    """Adds where to listen, how much to queue, and how much one request may ask for."""
    place = parser.add_argument_group("where")
    place.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for every interface (default: %(default)s)"
    )
    place.add_argument(
        "--port",
        type=port_number,
        default=host_port,
        help="0 for any that is free (default: %(default)s)",
    )
    _add_numbers(parser.add_argument_group("queue"), QUEUE)
    _add_numbers(parser.add_argument_group("limits of a request"), REQUEST_LIMITS)


def _add_numbers(group, rows):
    for name, default, metavar, text in rows:
        kind = type(default)
        shown = "%(default)g" if kind is float else "%(default)s"
        help_text = f"{text} (default: {shown})"
        group.add_argument(name, type=kind, default=default, metavar=metavar, help=help_text)


def limits_of(args: argparse.Namespace) -> Limits:
    """Returns the limits asked for; raises ValueError for one that is not above 0."""
    return Limits(
        body_bytes=_bytes_of("--max-mib", args.max_mib),
        pixels=args.max_pixels,
        masks=args.max_masks,
        decoded_bytes=_bytes_of("--max-decoded-mib", args.max_decoded_mib),
        caption_length=args.max_caption_length,
        new_tokens=args.max_answer_length,
        steps=max(args.max_caption_length, args.max_answer_length),
        request_seconds=args.request_seconds,
    )


def _bytes_of(option: str, mib: float) -> int:
    if not math.isfinite(mib):
        raise ValueError(f"expected a finite number for {option}, got {mib}")
    return int(mib * MIB)


def load_engine(args: argparse.Namespace):
    """Loads the model asked for into an engine.

    Raises as `load_captioner`, and ValueError for options that nothing could be decoded with or
    a queue that could hold nothing.
    """
    from .engine import Engine

    return Engine(
        load_captioner(args, **given_options(args)),
        max_queue=args.max_queue,
        max_batch=args.max_batch,
        max_cost=args.max_cost,
        max_client_cost=args.max_client_cost,
        window=args.window_ms / 1000,
        seen_bytes=args.seen_cache_mb * MIB,
    )


def model_name(args: argparse.Namespace) -> str:
    """Returns what the model is called: its Hub id, or its folder's name."""
    if args.model is None:
        return "perceptiondlm-tiny"
    name = args.model.rstrip("/")
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/"))
    return name if is_hub_id else name.rsplit("/", 1)[-1]
