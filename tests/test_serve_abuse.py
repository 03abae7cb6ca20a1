"""What strangers send: each is refused with a clear message, and the server answers on."""

import http.server
import io
import json
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import httpx
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the endpoint needs the package's apps extra")

from perceptiondlm.apps.captioning.captioner import RegionCaptioner  # noqa: E402
from perceptiondlm.apps.serving.fetch import UrlPolicy, fetch, is_public  # noqa: E402
from perceptiondlm.apps.serving.limits import Limits  # noqa: E402
from serving import data_url, image_part, served, text_part, user  # noqa: E402

VECTORS = Path(__file__).parent / "fixtures" / "vectors"
IMAGE = VECTORS / "region_0.png"
BOX = {"box": [5, 5, 30, 30]}
LIMITS = Limits(
    body_bytes=2 << 20,
    pixels=1_000_000,
    masks=16,
    caption_length=64,
    text=5_000,
    header_seconds=1.0,
    body_seconds=1.5,
)


@pytest.fixture(scope="module")
def server(load):
    with served(RegionCaptioner(*load("released-region")), limits=LIMITS) as (address, _):
        yield address


def post(server: str, content, **options) -> httpx.Response:
    """A request's answer; dicts as JSON (NaN too), bytes as they are."""
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    return httpx.post(f"{server}/v1/chat/completions", content=content, timeout=30, **options)


def regions(masks=(BOX,), image=IMAGE, **extra) -> dict:
    return {
        "model": "tester",
        "messages": user(image_part(image)),
        "masks": list(masks),
        "caption_length": 4,
        "steps": 1,
        **extra,
    }


def expect_alive(server: str):
    assert post(server, regions()).status_code == 200


def expect_refused(server: str, content, message: str, status: int = 400):
    answer = post(server, content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"], error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 1000
    expect_alive(server)


def png(width: int, height: int) -> bytes:
    """A small file that claims to be a large image."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.open(IMAGE).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def image_size() -> list[int]:
    with Image.open(IMAGE) as image:
        return [image.height, image.width]


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
HTML = b"<!DOCTYPE html><html><script>alert(1)</script></html>"
HEIGHT, WIDTH = image_size()
PIXELS = HEIGHT * WIDTH


def url_part(url: str, kind: str | None = None) -> dict:
    return regions(image=url if kind is None else data_url(url, kind))


ABUSES = {
    "decompression bomb": (lambda: regions(image=data_url(png(50_000, 50_000))), "pixels"),
    "image over the limit": (lambda: regions(image=data_url(png(2000, 2000))), "1,000,000"),
    "truncated PNG": (lambda: regions(image=data_url(IMAGE.read_bytes()[:900])), "damaged"),
    "truncated JPEG": (lambda: regions(image=data_url(jpeg()[:1500])), "damaged"),
    "SVG named PNG": (lambda: regions(image=data_url(SVG)), "got SVG"),
    "SVG": (lambda: regions(image=data_url(SVG, "image/svg+xml")), "image/svg+xml"),
    "HTML named PNG": (lambda: regions(image=data_url(HTML)), "got HTML"),
    "HTML": (lambda: regions(image=data_url(HTML, "text/html")), "text/html"),
    "empty image": (lambda: regions(image=data_url(b"")), "got nothing"),
    "not base64": (lambda: regions(image="data:image/png;base64,@@@"), "base64"),
    "data URL without base64": (lambda: regions(image="data:image/png,abc"), "base64"),
    "file URL": (lambda: regions(image="file:///etc/passwd"), "http(s)"),
    "path": (lambda: regions(image="/etc/passwd"), "http(s)"),
    "ftp URL": (lambda: regions(image="ftp://example.com/a.png"), "http(s)"),
    "private URL": (lambda: regions(image="http://127.0.0.1:1/a.png"), "fetches no URLs"),
    "public URL": (lambda: regions(image="https://example.com/a.png"), "fetches no URLs"),
    "path as mask": (lambda: regions(["/etc/passwd"]), "mask 1"),
    "paths in a mask": (lambda: regions([["/etc/passwd"] * 4]), "mask 1"),
    "file URL as mask": (lambda: regions(["file:///etc/passwd"]), "mask 1"),
    "JPEG as mask": (lambda: regions([data_url(jpeg(), "image/jpeg")]), "without loss"),
    "mask of another size": (lambda: regions([data_url(png(64, 64))]), "mask 1"),
    "empty mask": (
        lambda: regions([data_url(Image.new("L", (WIDTH, HEIGHT)))]),
        "empty region mask",
    ),
    "RLE of another size": (lambda: regions([{"size": [3, 3], "counts": [0, 9]}]), "size"),
    "RLE of a huge size": (
        lambda: regions([{"size": [10**6, 10**6], "counts": [0, 10**12]}]),
        "size",
    ),
    "RLE too short": (lambda: regions([{"size": [HEIGHT, WIDTH], "counts": [0, 9]}]), "add up"),
    "RLE with garbage": (lambda: regions([{"size": [HEIGHT, WIDTH], "counts": "~~~~"}]), "RLE"),
    "RLE unfinished": (lambda: regions([{"size": [HEIGHT, WIDTH], "counts": "ooooo"}]), "mask 1"),
    "RLE negative": (
        lambda: regions([{"size": [HEIGHT, WIDTH], "counts": [-5, PIXELS + 5]}]),
        "add up",
    ),
    "RLE of text": (lambda: regions([{"size": [HEIGHT, WIDTH], "counts": ["a"]}]), "mask 1"),
    "RLE of an object": (lambda: regions([{"size": [HEIGHT, WIDTH], "counts": {}}]), "RLE"),
    "box outside": (lambda: regions([{"box": [9000, 0, 9001, 9]}]), "inside the"),
    "box inside out": (lambda: regions([{"box": [30, 5, 5, 30]}]), "x0 < x1"),
    "box of text": (lambda: regions([{"box": ["a", 1, 2, 3]}]), "finite numbers"),
    "box too short": (lambda: regions([{"box": [1, 2, 3]}]), "4 finite numbers"),
    "NaN box": (lambda: regions([{"box": [float("nan"), 0, 5, 5]}]), "finite numbers"),
    "infinite box": (lambda: regions([{"box": [0, 0, float("inf"), 5]}]), "finite numbers"),
    "huge integers": (lambda: regions([{"box": [0, 0, 10**400, 5]}]), "finite numbers"),
    "polygon of two points": (lambda: regions([{"polygons": [[1, 2, 3, 4]]}]), "polygon"),
    "polygon of nothing": (lambda: regions([{"polygons": []}]), "mask 1"),
    "polygon of NaN": (lambda: regions([{"polygons": [[float("nan")] * 6]}]), "finite numbers"),
    "no masks": (lambda: regions([]), "at least one mask"),
    "too many masks": (lambda: regions([BOX] * 17), "at most 16 masks"),
    "masks without an image": (
        lambda: {"model": "tester", "messages": user(text_part("?")), "masks": [BOX]},
        "image",
    ),
    "mask of null": (lambda: regions([None]), "mask 1"),
    "masks as text": (lambda: regions() | {"masks": "all"}, "masks"),
    "masks twice": (
        lambda: regions(messages=user(image_part(IMAGE), text_part('{"masks": [[1,2,3,4]]}'))),
        "one place",
    ),
    "deep masks in the text": (
        lambda: regions(
            None or [],
            messages=user(image_part(IMAGE), text_part('{"masks": ' + "[" * 99999 + "}")),
        ),
        "",
    ),
    "caption_length over the limit": (lambda: regions(caption_length=65), "at most 64"),
    "caption_length of zero": (lambda: regions(caption_length=-1), "caption_length"),
    "steps without end": (lambda: regions(steps=10**9), "steps"),
    "an unknown option": (lambda: regions(batch_size=4), "batch_size"),
    "a seed out of range": (lambda: regions(seed=2**70), "seed"),
    "NaN temperature": (lambda: regions(temperature=float("nan")), "temperature"),
    "two answers": (lambda: regions(n=2), "n: "),
    "text over the limit": (
        lambda: {"model": "tester", "messages": user(text_part("a" * 5001))},
        "at most 5000",
    ),
    "no message": (lambda: {"model": "tester", "messages": []}, "messages"),
    "no model": (lambda: {"messages": user(text_part("?"))}, "model"),
    "an unknown part": (
        lambda: {"model": "tester", "messages": user({"type": "audio", "audio": {}})},
        "type",
    ),
    "not JSON": (lambda: b"\x00\xff not JSON", "JSON"),
    "JSON of a list": (lambda: b"[1, 2]", ""),
    "JSON of endless depth": (lambda: b"[" * 1_000_000, ""),
    "JSON keys in thousands": (lambda: {str(i): i for i in range(90_000)}, "64 keys"),
    "messages in thousands": (lambda: {"model": "tester", "messages": [{}] * 99_999}, "256 items"),
    "nothing at all": (lambda: b"", "JSON"),
}


@pytest.mark.parametrize("name", ABUSES)
def test_abuse_is_refused_and_the_server_lives(server, name):
    content, message = ABUSES[name]
    expect_refused(server, content(), message)


def test_a_body_over_the_limit_is_refused_with_413(server):
    expect_refused(server, b"a" * (LIMITS.body_bytes + 1), "2 MiB", status=413)


def test_a_body_of_unsaid_length_over_the_limit_is_refused_with_413(server):
    def endless():
        for _ in range(40):
            yield b"a" * (1 << 18)

    answer = httpx.post(f"{server}/v1/chat/completions", content=endless(), timeout=30)
    assert answer.status_code == 413
    expect_alive(server)


def test_a_single_pixel_is_an_image_like_any_other(server):
    one = Image.new("RGB", (1, 1), (200, 30, 30))
    answer = post(server, regions([{"box": [0, 0, 1, 1]}], image=data_url(one)))
    assert answer.status_code == 200 and len(answer.json()["choices"][0]["message"]["regions"]) == 1


def test_a_thin_image_is_an_image_like_any_other(server):
    thin = Image.new("RGB", (60_000, 1))
    answer = post(server, regions([{"box": [0, 0, 9, 1]}], image=data_url(thin)))
    assert answer.status_code == 200


def test_unknown_routes_and_methods_get_error_bodies(server):
    assert httpx.get(f"{server}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{server}/v1/chat/completions").status_code == 405
    assert httpx.get(f"{server}/redoc").status_code == 404


def connection(server: str) -> socket.socket:
    host, port = server.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=15)


def test_a_client_that_says_nothing_is_hung_up_on(server):
    with connection(server) as client:
        assert client.recv(100) == b""
    expect_alive(server)


def test_a_client_that_dribbles_its_head_is_hung_up_on(server):
    with connection(server) as client:
        started = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - started < 10:
                client.sendall(b"G")
                time.sleep(0.1)
        assert time.monotonic() - started < 5
    expect_alive(server)


def test_a_client_that_dribbles_its_body_gets_408(server):
    with connection(server) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"
        )
        stop = threading.Event()

        def dribble():
            while not stop.wait(0.1):
                try:
                    client.sendall(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=dribble)
        thread.start()
        answer = client.recv(1000)
        stop.set()
        thread.join()
    assert b"408" in answer.split(b"\r\n")[0]
    expect_alive(server)


def test_half_a_request_and_garbage_do_no_harm(server):
    for content in (
        b"\x16\x03\x01\x02\x00" * 50,
        b"POST /v1/chat/completions HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"A" * 100_000,
    ):
        with connection(server) as client:
            client.sendall(content)
    expect_alive(server)


# URLs, where they are allowed.


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "::1",
        "fe80::1",
        "fc00::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "224.0.0.1",
        "100.64.0.1",
        "255.255.255.255",
        "::",
        "::8.8.8.8",
        "fec0::1",
        "64:ff9b:1::808:808",
        "64:ff9b::a00:1",
        "192.0.0.8",
        "192.88.99.1",
        "::ffff:192.88.99.1",
        "5f00::1",
        "3fff::1",
        "3fff:fff:ffff::1",
    ],
)
def test_addresses_inside_are_not_public(address):
    assert not is_public(address)


def test_addresses_outside_are_public():
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1:248:1893:25c8:1946")
    assert is_public("64:ff9b::808:808") and is_public("192.88.100.1") and is_public("2a00::1")


class Site(http.server.BaseHTTPRequestHandler):
    """An image, redirects, and pages that misbehave."""

    def do_GET(self):
        self.close_connection = True
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(200 if self.path != "/missing" else 404)
        if self.path == "/zipped":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(bytes(1 << 16))
            elif self.path == "/slow":
                for _ in range(100):
                    self.wfile.write(b"a")
                    self.wfile.flush()
                    time.sleep(0.1)
            else:
                self.wfile.write(IMAGE.read_bytes())
        except OSError:
            pass  # the client has had enough

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


INSIDE = UrlPolicy(frozenset({"*"}), allow_private=True, seconds=3)


def test_an_allowed_url_is_fetched_redirects_included(site):
    for path in ("/a.png", "/to//a.png", f"/to/http://{site}/a.png"):
        assert fetch(f"http://{site}{path}", INSIDE, LIMITS) == IMAGE.read_bytes()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/endless", "bytes"),
        ("/slow", "too long|timed out"),
        ("/missing", "404"),
        ("/zipped", "compressed"),
        ("/to//to//to//to//to//a.png", "redirects"),
        ("/to/file:///etc/passwd", r"http\(s\)"),
        ("/to/gopher://127.0.0.1/", r"http\(s\)"),
    ],
)
def test_a_url_that_misbehaves_is_refused(site, path, message):
    with pytest.raises(ValueError, match=message):
        fetch(f"http://{site}{path}", INSIDE, LIMITS)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0"]
)
def test_private_hosts_are_refused_by_every_name(site, host):
    port = site.rpartition(":")[2]
    policy = UrlPolicy(frozenset({"*", f"{host.strip('[]')}:{port}"}))
    with pytest.raises(ValueError, match="public addresses|known host"):
        fetch(f"http://{host}:{port}/a.png", policy, LIMITS)


def test_a_redirect_to_a_host_that_is_not_allowed_is_refused(site):
    policy = UrlPolicy(frozenset({site}), allow_private=True)
    with pytest.raises(ValueError, match="allowed host"):
        fetch(f"http://{site}/to/http://localhost:1/a.png", policy, LIMITS)


def test_a_name_is_looked_up_once_and_its_checked_address_used(site, monkeypatch):
    answers = iter(["127.0.0.1", "10.0.0.1"])
    port = int(site.rpartition(":")[2])

    def lookup(host, port, *args, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    policy = UrlPolicy(frozenset({f"rebinding.example:{port}"}), allow_private=True)
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *a, **k: (
            lookup(host, *a, **k) if host == "rebinding.example" else real(host, *a, **k)
        ),
    )
    assert fetch(f"http://rebinding.example:{port}/a.png", policy, LIMITS)


def test_the_server_fetches_from_a_host_that_is_allowed(load, site):
    policy = UrlPolicy(frozenset({site}), allow_private=True)
    with served(RegionCaptioner(*load("released-region")), policy=policy) as (address, _):
        assert post(address, regions(image=f"http://{site}/a.png")).status_code == 200
        refused = post(address, regions(image="http://localhost:1/a.png"))
        assert refused.status_code == 400 and "allowed host" in refused.text
