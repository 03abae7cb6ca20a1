"""Arguments that the web page and the server share: the model, decoding, queue and limits."""

import argparse

from ...common.option_arguments import add_option_arguments, given_options
from .limits import Limits

BYTES_OF_MIB = 1 << 20


def add_model_arguments(parser: argparse.ArgumentParser):
    """The model and how it decodes unless a request says otherwise."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="folder or Hub id (default: the small embedded model)")
    model.add_argument("--subfolder", help="folder of the weights inside it")
    model.add_argument("--revision", help="branch, tag or commit on the Hub")
    model.add_argument("--device", help="say cpu or cuda:1 (default: a GPU if there is one)")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="default: as saved",
    )
    decoding = parser.add_argument_group("decoding, unless a request says otherwise")
    add_option_arguments(decoding, without=("batch_size", "compile"))


def port_number(text: str) -> int:
    """An argument from 0 to 65535."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def add_queue_arguments(parser: argparse.ArgumentParser, *, host_port: int):
    """Where to listen, how much to queue, how much one request may ask for."""
    default = Limits()
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
    queue = parser.add_argument_group("queue")
    queue.add_argument(
        "--max-queue",
        type=int,
        default=64,
        metavar="N",
        help="most requests waiting; more are refused (default: %(default)s)",
    )
    queue.add_argument(
        "--max-batch",
        type=int,
        default=8,
        metavar="N",
        help="most passes run together (default: %(default)s)",
    )
    queue.add_argument(
        "--window-ms",
        type=float,
        default=20,
        metavar="MS",
        help="how long a request waits for company (default: %(default)s)",
    )
    queue.add_argument(
        "--max-client-cost",
        type=int,
        default=8_000_000,
        metavar="N",
        help="work of all requests of one address that wait or run (default: %(default)s)",
    )
    limits = parser.add_argument_group("limits of a request")
    limits.add_argument(
        "--max-cost",
        type=int,
        default=2_000_000,
        metavar="N",
        help="work: tokens of prompt and response, times denoising steps, times two with cfg_scale"
        " (default: %(default)s)",
    )
    limits.add_argument(
        "--max-mib",
        type=float,
        default=default.body_bytes / BYTES_OF_MIB,
        metavar="MIB",
        help="size of what is uploaded (default: %(default)g)",
    )
    limits.add_argument(
        "--max-pixels",
        type=int,
        default=default.pixels,
        metavar="N",
        help="of a picture (default: %(default)s)",
    )
    limits.add_argument(
        "--max-decoded-mib",
        type=float,
        default=default.decoded_bytes / BYTES_OF_MIB,
        metavar="MIB",
        help="memory of its images (4 bytes a pixel) and masks (1) together (default: %(default)g)",
    )
    limits.add_argument(
        "--max-masks",
        type=int,
        default=default.masks,
        metavar="N",
        help="of a picture (default: %(default)s)",
    )
    limits.add_argument(
        "--max-caption-length",
        type=int,
        default=default.caption_length,
        metavar="N",
        help="tokens (default: %(default)s)",
    )
    limits.add_argument(
        "--max-answer-length",
        type=int,
        default=default.new_tokens,
        metavar="N",
        help="tokens (default: %(default)s)",
    )
    limits.add_argument(
        "--request-seconds",
        type=float,
        default=default.request_seconds,
        metavar="S",
        help="until it is given up (default: %(default)g)",
    )


def limits_of(args: argparse.Namespace) -> Limits:
    """The limits asked for; ValueError for one that is not above 0."""
    return Limits(
        body_bytes=int(args.max_mib * BYTES_OF_MIB),
        pixels=args.max_pixels,
        masks=args.max_masks,
        decoded_bytes=int(args.max_decoded_mib * BYTES_OF_MIB),
        caption_length=args.max_caption_length,
        new_tokens=args.max_answer_length,
        steps=max(args.max_caption_length, args.max_answer_length),
        request_seconds=args.request_seconds,
    )


def load_engine(args: argparse.Namespace):
    """The engine with the model asked for. Raises ValueError or OSError where there is none."""
    from ..captioning.captioner import RegionCaptioner
    from .engine import Engine

    options = given_options(args)
    captioner = RegionCaptioner.from_pretrained(
        args.model,
        subfolder=args.subfolder,
        revision=args.revision,
        device=args.device,
        dtype=args.dtype,
        **options,
    )
    return Engine(
        captioner,
        max_queue=args.max_queue,
        max_batch=args.max_batch,
        max_cost=args.max_cost,
        max_client_cost=args.max_client_cost,
        window=args.window_ms / 1000,
    )


def model_name(args: argparse.Namespace) -> str:
    """What the model is called: the Hub id, or the folder's name."""
    if args.model is None:
        return "perceptiondlm-tiny"
    name = args.model.rstrip("/")
    return (
        name
        if name.count("/") == 1 and not name.startswith((".", "/"))
        else name.rsplit("/", 1)[-1]
    )
