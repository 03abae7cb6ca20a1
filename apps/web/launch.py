"""Serves the page: where it listens, how much it takes, and what of gradio stays closed."""

import socket

from starlette.middleware import Middleware

from ...regions.segmenters import Segmenter
from ..serving.engine import Engine
from ..serving.http import MaxBody
from ..serving.limits import Limits
from .assets import read_style
from .page import CONCURRENT, Page, build, theme

SESSIONS = 200  # whose state is kept
QUEUE_BYTES = 1 << 30  # of all that is sent and waits
UPLOADS = r"/upload(_progress)?/?$"  # routes of gradio's by which files come to its disk
# Nothing of gradio's that shares the page, watches its visitors or is not needed.
GRADIO_OPTIONS = {
    "share": False,
    "footer_links": [],
    "enable_monitoring": False,
    "ssr_mode": False,
    "state_session_capacity": SESSIONS,
    "show_error": True,
    "strict_cors": True,
}


def launch(
    engine: Engine,
    name: str,
    *,
    limits: Limits | None = None,
    segmenter: Segmenter | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    block: bool = True,
):
    """Serves the page; with `block`, until it is interrupted.

    Args:
        engine, name, limits, segmenter: as for `Page`.
        host, port: where to listen; port 0 is any that is free.
        open_browser: opens the page in this machine's browser.
        block: returns only after an interruption, the page closed.

    Returns gradio's `Blocks`. Raises OSError where the port is taken.
    """
    limits = limits or Limits()
    demo = build(Page(engine, name, limits, segmenter))

    # All that waits has to fit in memory.
    max_body = body_limit(limits)
    max_waiting = max(1, min(engine.max_queue, QUEUE_BYTES // max_body))
    demo.queue(max_size=max_waiting, default_concurrency_limit=CONCURRENT)

    demo.launch(
        server_name=host,
        server_port=port or free_port(host),
        inbrowser=open_browser,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=limits.body_bytes,
        theme=theme(),
        css=read_style(),
        app_kwargs={"middleware": [Middleware(MaxBody, max_bytes=max_body, refused=UPLOADS)]},
        **GRADIO_OPTIONS,
    )

    # gradio's server runs in a thread of its own.
    if block:
        try:
            print(f"perceptiondlm web: {demo.local_url} (Ctrl-C ends it)")
            demo.block_thread()
        finally:
            demo.close(verbose=False)
    return demo


def body_limit(limits: Limits) -> int:
    """Returns the most bytes of one event: an image and half as much of masks, in base64."""
    return 2 * limits.body_bytes + (1 << 20)


def free_port(host: str) -> int:
    """Returns a port that nothing listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
