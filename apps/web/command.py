"""Runs `perceptiondlm web`: a page on which regions are painted and captioned all at once."""

import argparse
import sys

from ...common.extras import MissingExtra, extra
from ...regions.segmenters import Segmenter, load_segmenter

EPILOG = """\
The page works without any network and sends nothing anywhere. Listen on every interface with
--host 0.0.0.0; then whoever reaches the port can use it. As a Hugging Face Space: apps/space.
"""


def configure(parser: argparse.ArgumentParser):
    """Adds the arguments to the `web` parser."""
    from ..serving.arguments import add_engine_arguments, add_queue_arguments

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Opens a web page to caption regions and to ask about images."
    parser.epilog = EPILOG
    add_engine_arguments(parser)
    add_queue_arguments(parser, host_port=7860)
    parser.add_argument("--open", action="store_true", help="open a browser")
    parser.add_argument(
        "--segmenter",
        metavar="MODEL",
        help="folder or Hub id of a SAM, SAM 2 or SAM 3, which finds the regions of points, boxes"
        " and everything (default: offline, which needs no weights)",
    )


def _load_segmenter(name: str | None) -> Segmenter | None:
    """Loads a segmenter; none, and says so, where what the offline one needs is not installed."""
    try:
        segmenter = load_segmenter(name)
    except MissingExtra as error:
        if name is not None:
            raise
        print(f"perceptiondlm web: no outlines: {error}", file=sys.stderr)
        return None
    if segmenter.note:
        print(f"perceptiondlm web: {segmenter.note}", file=sys.stderr)
    return segmenter


def run(args: argparse.Namespace) -> int:
    """Serves the page until it is interrupted; returns an exit code."""
    with extra("apps"):
        from .launch import launch
    from ..serving.arguments import limits_of, load_engine, model_name
    from ..serving.pool import shared_pool

    # What a user may have mistaken: one line and exit code 2.
    try:
        limits = limits_of(args)
        shared_pool().warm_up()
        segmenter = _load_segmenter(args.segmenter)
        engine = load_engine(args)
    except (ValueError, OSError) as error:
        print(f"perceptiondlm web: {error}", file=sys.stderr)
        return 2

    with engine:
        try:
            launch(
                engine,
                model_name(args),
                limits=limits,
                segmenter=segmenter,
                host=args.host,
                port=args.port,
                open_browser=args.open,
            )
        except OSError as error:  # the port is taken
            print(f"perceptiondlm web: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            pass
    return 0
