"""Runs `perceptiondlm serve`: an OpenAI-compatible endpoint for region captions and questions."""

import argparse
import contextlib
import logging
import os
import sys

from ...common.extras import extra

EPILOG = """\
a request, with OpenAI's own client:
  client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  answer = client.chat.completions.create(
      model=client.models.list().data[0].id,
      messages=[{"role": "user", "content": [
          {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}]}],
      extra_body={"masks": [{"box": [40, 60, 220, 300]}, {"size": [480, 640], "counts": "..."}]},
  )
  answer.choices[0].message.regions     # [{"region": 1, "caption": "...", "box": [...], ...}]

regions, where a request says so:
  masks in the body: COCO RLE, {"box": [x0, y0, x1, y1]}, {"polygons": [[x, y, ...]]}, data URLs
  parts {"type": "mask", "mask": ...} of the message, or a text part {"masks": [...]}
  "task": "regions": further image parts are masks, or the image's alpha channel is one
Every other request is a question, whatever images it holds. "prompts" asks each region, and
"template" or a response_format of type json_schema says what responses look like. max_tokens is an
upper bound: it is lowered to the limits. /docs and /openapi.json list the fields; see also
docs/serving.md.

PERCEPTIONDLM_API_KEY in the environment asks clients for that key. GET /health, /metrics
(Prometheus), /v1/models.
"""

API_KEY = "PERCEPTIONDLM_API_KEY"


def configure(parser: argparse.ArgumentParser):
    """Adds the arguments to the `serve` parser."""
    from .arguments import add_engine_arguments, add_queue_arguments
    from .replicas import add_replica_arguments

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Serves region captions and answers to OpenAI's clients."
    parser.epilog = EPILOG
    add_engine_arguments(parser)
    add_queue_arguments(parser, host_port=8000)
    parser.add_argument("--name", help="what the model is called (default: by its folder or id)")
    parser.add_argument(
        "--grace-seconds",
        type=float,
        default=25.0,
        metavar="S",
        help="from SIGTERM to the end, for what is under way (default: %(default)g)",
    )

    add_replica_arguments(parser)

    urls = parser.add_argument_group("images behind URLs, which are refused by default")
    urls.add_argument(
        "--allow-url-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch from this host, host:port, or '*' for every host; repeatable",
    )
    urls.add_argument(
        "--allow-private-urls", action="store_true", help="also from loopback and private addresses"
    )


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to stop; returns an exit code."""
    with extra("apps"):
        from .server import make_server
    from .arguments import limits_of

    with contextlib.ExitStack() as ends:
        # What a user may have mistaken: one line and exit code 2.
        try:
            limits = limits_of(args)
            app = _app(args, limits, ends)
        except (ValueError, OSError) as error:
            print(f"perceptiondlm serve: {error}", file=sys.stderr)
            return 2

        logging.basicConfig(format="%(levelname)s:     %(message)s")
        logging.getLogger(__package__).setLevel(logging.INFO)
        server = make_server(
            app, host=args.host, port=args.port, limits=limits, grace=args.grace_seconds
        )
        try:
            server.run()
        except KeyboardInterrupt:  # Ctrl-C ends it as SIGTERM does
            pass
    return 0


def _app(args: argparse.Namespace, limits, ends: contextlib.ExitStack):
    """Returns the application over an engine in this process, or over replicas on Ray."""
    with extra("apps"):
        from .app import app_of, create_app
        from .pool import shared_pool
    from .arguments import load_engine, model_name
    from .fetch import UrlPolicy
    from .replicas import running_relay, wants_ray

    api_key = os.environ.get(API_KEY)
    if wants_ray(args):
        return app_of(ends.enter_context(running_relay(args, limits)), api_key)

    policy = UrlPolicy(frozenset(args.allow_url_host), args.allow_private_urls)
    shared_pool().warm_up()
    return create_app(
        load_engine(args),
        name=args.name or model_name(args),
        limits=limits,
        policy=policy,
        api_key=api_key,
    )
