"""Where an image's bytes come from: URLs, data URLs and base64, each against a whole PNG."""

import base64
import contextlib
import io
import socket
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from perceptiondlm.image_loading import (
    decode_base64,
    decode_data_url,
    fetch_image,
    load_image,
    load_mask,
)
from PIL import Image

# Data URLs and base64.


@pytest.fixture
def image(draw_image):
    return draw_image(23, 17)


@pytest.fixture
def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ways(data: bytes) -> dict[str, str]:
    """Data URLs and base64 texts of the same bytes."""
    plain = base64.b64encode(data).decode()
    safe = base64.urlsafe_b64encode(data).decode()
    wrapped = base64.encodebytes(data).decode()
    return {
        "plain": f"data:image/png;base64,{plain}",
        "capitals": f"DATA:IMAGE/PNG;BASE64,{plain}",
        "with a parameter": f"data:image/png;charset=utf-8;base64,{plain}",
        "with a name": f'data:image/png;name="a b.png";base64,{plain}',
        "without a type": f"data:;base64,{plain}",
        "of no type at all": f"data:base64;base64,{plain}",
        "wrapped": f"data:image/png;base64,{wrapped}",
        "wrapped with CR": "data:image/png;base64,\r\n" + wrapped.replace("\n", "\r\n"),
        "indented": "  data:image/png;base64,\n\t" + wrapped.replace("\n", "\n\t"),
        "without padding": f"data:image/png;base64,{plain.rstrip('=')}",
        "URL-safe": f"data:image/png;base64,{safe}",
        "URL-safe without padding": f"data:image/png;base64,{safe.rstrip('=')}",
        "percent-encoded base64": f"data:image/png;base64,{urllib.parse.quote(plain, safe='')}",
        "percent-encoded bytes": f"data:image/png,{urllib.parse.quote_from_bytes(data)}",
        "percent-encoded with a parameter": "data:image/png;charset=x,"
        + urllib.parse.quote_from_bytes(data, safe=""),
        "bare base64": plain,
        "bare base64, wrapped": wrapped,
        "bare base64, URL-safe without padding": safe.rstrip("="),
    }


@pytest.mark.parametrize("way", ways(b""))
def test_every_way_to_write_a_data_url_is_the_same_image(image, png, way):
    assert load_image(ways(png)[way]).tobytes() == image.tobytes()


@pytest.mark.parametrize("way", ways(b""))
def test_every_way_to_write_a_data_url_is_the_same_mask(blobs, way):
    (mask,) = blobs(23, 17, count=1)
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    assert load_mask(ways(buffer.getvalue())[way], (23, 17)).tobytes() == mask.tobytes()


@pytest.mark.parametrize("length", range(9))
def test_base64_of_any_length_is_decoded(length):
    data = bytes(range(250, 250 - length, -1))
    for text in (base64.b64encode(data), base64.urlsafe_b64encode(data).rstrip(b"=")):
        assert decode_base64(text) == decode_base64(text.decode()) == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("QUJD+-8=", "both of its alphabets"),
        ("QUJDR", "in base64, got"),
        ("QU=JD", "in base64, got"),
        ("QUJD=", "wrong padding"),
        ("QUJDRA===", "wrong padding"),
        ("QU*D", "in base64, got"),
        ("QUJé", "in base64, got"),
    ],
)
def test_what_is_no_base64_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        decode_base64(text)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64", "as data:image/...;base64,"),
        ("data:image/png,abc", "in base64 or percent-encoded"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "of pixels, got image/svg"),
        ("data:Text/HTML,%3Chtml%3E", "of pixels, got text/html"),
        ("data:image/png;base64,@@@@", "in base64"),
        ("http://127.0.0.1/a.png", "as data:image/...;base64,"),
    ],
)
def test_what_is_no_data_url_of_pixels_is_refused(url, message):
    with pytest.raises(ValueError, match=f"expected the mask .*{message}"):
        decode_data_url(url, "the mask")


def test_base64_of_something_else_is_said_not_to_be_an_image():
    text = base64.b64encode(b"no image " * 1000).decode()
    with pytest.raises(ValueError, match="as path, URL or base64, got str"):
        load_image(text)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_image(text[:40])


# URLs, from a server of this machine.


class Images(BaseHTTPRequestHandler):
    """Serves a PNG and much that is none."""

    png = b""

    def do_GET(self):
        path = urllib.parse.unquote(self.path)
        if path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/red.png")
        else:
            self.send_response({"/missing": 404, "/broken": 500}.get(path, 200))
        self.end_headers()
        with contextlib.suppress(OSError):
            if path == "/slow":
                threading.Event().wait(1.0)
            elif path in ("/red.png", "/größe 1.png", "/broken"):
                self.wfile.write(self.png)
            elif path == "/half":
                self.wfile.write(self.png[: len(self.png) // 2])
            elif path == "/page":
                self.wfile.write(b"<!doctype html><html></html>")

    def log_message(self, *_):
        pass


@pytest.fixture
def address(png):
    Images.png = png
    server = ThreadingHTTPServer(("127.0.0.1", 0), Images)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "url",
    ["http://{}/red.png", "HTTP://{}/red.png#part", "http://{}/moved", "http://{}/größe 1.png"],
)
def test_an_image_behind_a_url_is_the_image(image, address, url):
    assert load_image(url.format(address)).tobytes() == image.tobytes()


def test_a_mask_behind_a_url_is_not_converted_on_its_way(blobs, address):
    """As RGB its transparent pixels would be white."""
    (mask,) = blobs(23, 17, count=1)
    white = Image.new("L", (23, 17), 255)
    buffer = io.BytesIO()
    Image.merge("LA", [white, Image.fromarray(mask)]).save(buffer, "PNG")
    Images.png = buffer.getvalue()
    assert load_mask(f"http://{address}/red.png", (23, 17)).tobytes() == mask.tobytes()


@pytest.mark.parametrize("path", ["missing", "broken", "page", "half", "empty"])
def test_a_url_without_an_image_is_a_value_error_that_names_it(address, path):
    with pytest.raises(ValueError, match=f"http://{address}/{path}"):
        load_image(f"http://{address}/{path}")


def closed_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{closed_port}/x.png",
        "https://127.0.0.1:1/x.png",
        "http://nothing.invalid/x.png",
        "http://",
        "http:///x.png",
        "http://127.0.0.1:port/x.png",
        "http://127.0.0.1:99999/x.png",
        "http://[::1/x.png",
        "http://" + "a" * 300 + ".invalid/",
    ],
)
def test_a_url_that_leads_nowhere_is_a_value_error_that_names_it(url):
    url = url.replace("{closed_port}", str(closed_port()))
    for load in (load_image, lambda url: load_mask(url, (4, 4))):
        with pytest.raises(ValueError, match="expected an image at http"):
            load(url)


def test_a_host_that_says_nothing_is_a_value_error(address):
    with pytest.raises(ValueError, match="timed out"):
        fetch_image(f"http://{address}/slow", timeout=0.1)


def test_a_download_beyond_the_limit_is_a_value_error(address):
    with pytest.raises(ValueError, match="at most 0 MiB at http"):
        fetch_image(f"http://{address}/red.png", max_bytes=20)
    assert len(fetch_image(f"http://{address}/red.png", max_bytes=len(Images.png)))


def test_the_hub_being_offline_does_not_matter_to_other_hosts(image, address, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert np.array_equal(load_image(f"http://{address}/red.png"), image)
