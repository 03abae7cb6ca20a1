"""Serves an application on loopback, run by the real uvicorn in a thread."""

import base64
import contextlib
import io
import threading
import time

from perceptiondlm.apps.serving.app import create_app
from perceptiondlm.apps.serving.engine import Engine
from perceptiondlm.apps.serving.limits import Limits
from perceptiondlm.apps.serving.server import make_server


@contextlib.contextmanager
def served(
    captioner,
    *,
    limits: Limits | None = None,
    engine: dict | None = None,
    grace: float = 10,
    **options,
):
    """Serves a captioner; gives the address, http://127.0.0.1:port, and the engine."""
    limits = limits or Limits()
    own = Engine(captioner, **(engine or {}))
    app = create_app(own, name="tester", limits=limits, **options)
    server = make_server(
        app, host="127.0.0.1", port=0, limits=limits, grace=grace, log_level="error"
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", own
    finally:
        server.should_exit = True
        thread.join(20)
        own.close(drain=False, timeout=20)


def counted(engine: Engine, name: str) -> int:
    """A counter of an engine's metrics."""
    return engine.metrics.registry.get_sample_value(f"perceptiondlm_{name}_total")


def data_url(content, kind: str = "image/png") -> str:
    """Encodes an image, a path or bytes as a data URL."""
    if hasattr(content, "save"):
        buffer = io.BytesIO()
        content.save(buffer, "PNG")
        content = buffer.getvalue()
    elif hasattr(content, "read_bytes"):
        content = content.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_part(content, kind: str = "image/png") -> dict:
    """Makes the image part of a message."""
    url = content if isinstance(content, str) else data_url(content, kind)
    return {"type": "image_url", "image_url": {"url": url}}


def mask_part(mask) -> dict:
    """Makes a mask part of a message, this server's own extension."""
    return {"type": "mask", "mask": mask}


def text_part(text: str) -> dict:
    """Makes a text part of a message."""
    return {"type": "text", "text": text}


def user(*parts: dict) -> list[dict]:
    """Makes a conversation of one message."""
    return [{"role": "user", "content": list(parts)}]
