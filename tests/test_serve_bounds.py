"""Nothing that a stranger sends makes the server work without bound, or others wait for it."""

import io
import json
import logging
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the endpoint needs the package's apps extra")

from perceptiondlm.apps.captioning.captioner import RegionCaptioner  # noqa: E402
from perceptiondlm.apps.cli import main  # noqa: E402
from perceptiondlm.apps.serving import pool  # noqa: E402
from perceptiondlm.apps.serving.chat import RequestReader  # noqa: E402
from perceptiondlm.apps.serving.decode import Decoder  # noqa: E402
from perceptiondlm.apps.serving.engine import Engine, QueueFull  # noqa: E402
from perceptiondlm.apps.serving.errors import ApiError  # noqa: E402
from perceptiondlm.apps.serving.jobs import ChatJob, RegionJob  # noqa: E402
from perceptiondlm.apps.serving.limits import Limits  # noqa: E402
from perceptiondlm.apps.serving.request import read_request  # noqa: E402
from serving import data_url, image_part, served, text_part, user  # noqa: E402

VECTORS = Path(__file__).parent / "fixtures" / "vectors"
IMAGE = VECTORS / "region_0.png"
MASKS = [VECTORS / f"region_0_mask_{i}.png" for i in range(3)]
WIDTH, HEIGHT = Image.open(IMAGE).size
BOX = {"box": [5, 5, 30, 30]}
SHORT = {"caption_length": 4, "steps": 1}


@pytest.fixture(scope="module")
def captioner(load):
    return RegionCaptioner(*load("released-region"))


def png(width: int, height: int) -> bytes:
    """A PNG that claims this size and holds next to nothing of its pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def read(limits: Limits | None = None, *, masks=(BOX,), image=IMAGE, **extra):
    content = {"model": "tester", "messages": user(image_part(image)), "masks": list(masks)}
    request = read_request(json.dumps(content | extra).encode())
    return RequestReader(limits or Limits(), lambda url: pytest.fail(url))(request)


# Decoding.


def test_a_masks_size_is_compared_before_its_pixels_are_looked_for():
    with pytest.raises(ValueError, match="mask 1: expected a region mask with the image's size"):
        read(masks=[data_url(png(6324, 6324))])


def test_all_images_and_masks_of_a_request_share_one_budget_of_bytes():
    pixels = WIDTH * HEIGHT
    assert len(read(Limits(decoded_bytes=6 * pixels), masks=[BOX] * 2).masks) == 2
    for masks in ([BOX] * 3, [data_url(mask) for mask in MASKS]):
        with pytest.raises(ValueError, match="bytes of decoded images and masks"):
            read(Limits(decoded_bytes=6 * pixels), masks=masks)
    parts = [image_part(IMAGE), image_part(IMAGE)]
    content = {"model": "tester", "messages": user(*parts)}
    with pytest.raises(ValueError, match="image 2: .*bytes of decoded"):
        RequestReader(Limits(decoded_bytes=7 * pixels), None)(
            read_request(json.dumps(content).encode())
        )


def test_many_large_masks_of_a_small_image_are_refused_at_once(captioner):
    huge = io.BytesIO()
    Image.new("L", (4000, 4000), 255).save(huge, "WEBP", lossless=True)
    with served(captioner) as (address, _):
        assert post(address).status_code == 200  # a worker is there
        started = time.monotonic()
        masks = [data_url(huge.getvalue(), "image/webp")] * 62
        refused = post(address, image=data_url(Image.new("RGB", (1, 1))), masks=masks)
    assert refused.status_code == 400 and "image's size" in refused.text
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("size", "points"), [((2, 40_000), 20_000), ((40_000, 2), 20_000), ((100, 100), 300_000)]
)
def test_a_polygon_of_many_points_is_refused_at_once(size, points):
    rng = np.random.default_rng(0)
    polygon = (rng.random((points, 2)) * size).ravel().tolist()
    started = time.monotonic()
    with pytest.raises(ValueError, match="pixels of outline|numbers"):
        Decoder(Limits()).mask({"polygons": [polygon]}, size)
    assert time.monotonic() - started < 2


def test_run_lengths_of_a_request_share_one_budget_of_numbers():
    rle = {"size": [HEIGHT, WIDTH], "counts": [1] * (WIDTH * HEIGHT)}
    with pytest.raises(ValueError, match="mask 2: .*numbers in the masks"):
        read(Limits(numbers=WIDTH * HEIGHT + 100), masks=[rle, rle])


def test_an_ordinary_detailed_polygon_is_a_mask():
    angles = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    points = np.stack([2000 + 1500 * np.cos(angles), 1500 + 1200 * np.sin(angles)], 1)
    mask = Decoder(Limits()).mask({"polygons": [points.ravel().tolist()]}, (4000, 3000))
    assert np.count_nonzero(mask) == pytest.approx(np.pi * 1500 * 1200, rel=0.01)


def test_a_jpeg_of_thousands_of_scans_is_refused_and_a_progressive_one_is_not():
    progressive = io.BytesIO()
    Image.open(IMAGE).convert("RGB").save(progressive, "JPEG", progressive=True)
    data = progressive.getvalue()
    assert data.count(b"\xff\xda") > 1
    Decoder(Limits()).image(data, "the image")
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match="scans"):
        Decoder(Limits()).image(data[:-2] + data[last:-2] * 6000 + data[-2:], "the image")


def test_the_scans_of_all_images_of_an_mpo_file_count():
    file, image = io.BytesIO(), Image.open(IMAGE).convert("RGB")
    image.save(file, "MPO", save_all=True, append_images=[image, image])
    assert Image.open(io.BytesIO(file.getvalue())).format == "MPO"
    Decoder(Limits(scans=3)).image(file.getvalue(), "the image")
    with pytest.raises(ValueError, match="at most 2 scans"):
        Decoder(Limits(scans=2)).image(file.getvalue(), "the image")


def test_an_image_with_an_endless_side_is_refused():
    for size in ((39_000_000, 1), (1, 39_000_000)):
        with pytest.raises(ValueError, match="along a side"):
            Decoder(Limits()).image(png(*size), "the image")


def test_stop_strings_have_a_length_and_a_number():
    for stop, message in (("a" * 501, "characters in a stop"), (["a"] * 5, "at most 4")):
        content = {"model": "tester", "messages": user(text_part("?")), "stop": stop}
        with pytest.raises(ValueError, match=message):
            RequestReader(Limits(), None)(read_request(json.dumps(content).encode()))


def test_the_text_of_all_messages_together_is_bounded():
    messages = [{"role": "user", "content": "a" * 900}] * 30
    content = {"model": "tester", "messages": messages}
    with pytest.raises(ValueError, match="at most 20000"):
        RequestReader(Limits(), None)(read_request(json.dumps(content).encode()))


# The work of the model.


def post(address: str, *, image=IMAGE, masks=(BOX,), **extra) -> httpx.Response:
    body = {"model": "tester", "messages": user(image_part(image)), "masks": list(masks)}
    return httpx.post(f"{address}/v1/chat/completions", json=body | SHORT | extra, timeout=60)


def test_work_beyond_the_bound_is_refused_at_the_door(captioner):
    with Engine(captioner) as engine:
        job = RegionJob.build(IMAGE, [BOX] * 64)
        with pytest.raises(ValueError, match="2,000,000 positions"):
            engine.submit(job, caption_length=256, steps=256, cfg_scale=1.0)
        with pytest.raises(ValueError, match="positions"):
            engine.submit(ChatJob.ask(IMAGE, "?"), max_new_tokens=1024, cfg_scale=1.0)
        assert engine.queue_length == engine.running == 0


def test_guidance_steps_and_regions_all_cost(captioner):
    with Engine(captioner, max_queue=100, window=30) as engine:

        def cost(count=1, **options):
            options = {"caption_length": 8, "steps": 8} | options
            return engine.submit(RegionJob.build(IMAGE, [BOX] * count), **options).cost

        once = cost()
        assert cost(cfg_scale=1.0) == 2 * once
        assert cost(steps=4) == once / 2
        assert cost(count=17) > 2 * once  # two passes, each with a prompt


def test_an_upper_bound_is_lowered_to_what_work_is_allowed(captioner):
    with Engine(captioner, max_cost=20_000, window=30) as engine:
        ticket = engine.submit(
            ChatJob.ask(IMAGE, "?"), shorten="max_new_tokens", max_new_tokens=1000
        )
        length = ticket.options["max_new_tokens"]
        assert ticket.cost <= 20_000 < (ticket.prompt_tokens + length + 1) * (length + 1)


def test_one_clients_work_is_bounded_and_anothers_is_taken(captioner):
    job = RegionJob.build(IMAGE, [BOX])
    with Engine(captioner, window=30) as engine:
        cost = engine.submit(job, client="a", **SHORT).cost
    with Engine(captioner, max_client_cost=2 * cost, window=30) as engine:
        first = [engine.submit(job, client="a", **SHORT) for _ in range(2)]
        with pytest.raises(QueueFull, match="of yours"):
            engine.submit(job, client="a", **SHORT)
        engine.submit(job, client="b", **SHORT)
        first[0].cancel()
        engine.submit(job, client="a", **SHORT)  # there is room again


def test_a_short_job_does_not_wait_for_the_end_of_a_long_one(captioner):
    with Engine(captioner) as engine:
        begun = threading.Event()
        long = engine.submit(
            RegionJob.build(IMAGE, MASKS), caption_length=64, on_step=lambda _: begun.set()
        )
        assert begun.wait(30)
        short = engine.submit(RegionJob.build(IMAGE, MASKS), **SHORT)
        completion = short.result(30)
        assert not long.future.done()
        held_up = long.result(60).result.captions
    assert completion.result.captions == captioner(IMAGE, MASKS, **SHORT).captions
    assert held_up == captioner(IMAGE, MASKS, caption_length=64).captions


def test_a_long_job_is_not_starved_by_short_ones(captioner):
    with Engine(captioner, max_queue=1000) as engine:
        long = engine.submit(RegionJob.build(IMAGE, MASKS), caption_length=32)
        stop = threading.Event()

        def press():
            job = RegionJob.build(IMAGE, [BOX])
            while not stop.is_set():
                engine.submit(job, **SHORT)
                time.sleep(0.002)

        thread = threading.Thread(target=press)
        thread.start()
        try:
            assert long.result(30).result.captions
        finally:
            stop.set()
            thread.join()


# Time.


def test_a_request_whose_reading_takes_too_long_ends_and_the_next_is_answered(captioner):
    big = np.zeros((1500, 1500, 3), np.uint8)
    big[::7] = 255
    slow = {"image": data_url(Image.fromarray(big))}
    with served(captioner, limits=Limits(decode_seconds=0.001)) as (address, _):
        refused = post(address, **slow)
    assert refused.status_code == 400 and "decoded within" in refused.text
    with served(captioner) as (address, _):
        assert post(address).status_code == 200


def test_the_deadline_covers_the_wait_for_a_reader(captioner):
    with served(captioner, limits=Limits(request_seconds=1.0)) as (address, engine):
        readers = engine_pool()
        taken = [readers._idle.get() for _ in range(readers.count)]  # all are busy
        try:
            started = time.monotonic()
            answer = post(address)
            assert answer.status_code == 504 and time.monotonic() - started < 5
        finally:
            for worker in taken:
                readers._idle.put(worker)


class SlowWorker:
    """A worker process that takes a while to start, and reads whatever it is given as nothing."""

    started = 0

    def __init__(self):
        time.sleep(1.0)
        type(self).started += 1

    def ask(self, header, blob, seconds):
        return {"images": []}, []


def test_a_reader_that_starts_too_late_for_a_request_is_there_for_the_next(monkeypatch):
    monkeypatch.setattr(pool, "Worker", SlowWorker)
    readers, started = pool.WorkerPool(1), time.monotonic()
    with pytest.raises(ApiError) as refused:
        readers.read_page("", Limits(request_seconds=0.1))
    assert refused.value.status == 504 and time.monotonic() - started < 0.9
    assert readers.read_page("", Limits(request_seconds=20)) == (None, [])
    assert SlowWorker.started == 1


def test_a_reader_that_does_not_start_leaves_its_place_to_another(monkeypatch):
    def broken():
        raise RuntimeError("a worker process ended before it was ready")

    readers = pool.WorkerPool(1)
    monkeypatch.setattr(pool, "Worker", broken)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="before it was ready"):
            readers.read_page("", Limits(request_seconds=20))
    monkeypatch.setattr(pool, "Worker", SlowWorker)
    assert readers.read_page("", Limits(request_seconds=20)) == (None, [])


def engine_pool():
    from perceptiondlm.apps.serving.pool import shared_pool

    return shared_pool()


# Those who go away, and those who take nothing.


def connection(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=15)


def test_a_client_that_goes_away_is_one_line_of_the_log(captioner, caplog):
    caplog.set_level(logging.INFO)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    body = {"model": "tester", "messages": user(image_part(IMAGE)), "masks": [BOX], **SHORT}
    whole = json.dumps(body).encode()
    streamed = json.dumps(body | {"stream": True}).encode()
    with served(captioner, engine={"window": 30.0}) as (address, engine):
        with connection(address) as client:  # half of a body
            client.sendall(head % 1000 + b"{")
        for content in (whole, streamed):
            with connection(address) as client:
                client.sendall(head % len(content) + content)
                wait_for(lambda: engine.queue_length)
            wait_for(lambda: not engine.queue_length)
        wait_for(lambda: len(lines(caplog, "went away")) >= 3)
    assert len(lines(caplog, "went away")) == 3
    assert [record for record in caplog.records if record.exc_info] == []


def test_a_client_that_takes_nothing_is_given_up_in_one_line(captioner, caplog):
    caplog.set_level(logging.INFO)
    with served(captioner, limits=Limits(send_seconds=0.5)) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(15)
            client.connect((host, int(port)))
            with pytest.raises(OSError):
                while True:
                    client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 50)
        wait_for(lambda: lines(caplog, "took nothing"))
        assert post(address).status_code == 200
    assert len(lines(caplog, "took nothing")) == 1
    assert [record for record in caplog.records if record.exc_info] == []


def lines(caplog, text: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def wait_for(condition, seconds: float = 60):  # a worker process may have to start first
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.parametrize("option", ["--max-mib", "--max-decoded-mib"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_a_number_of_mib_that_makes_no_sense_is_refused(option, value, capsys):
    assert main(["serve", option, value]) == 2
    assert "perceptiondlm serve: expected" in capsys.readouterr().err
