"""The page in headless Chromium: what a person does with it, from an image to captions."""

import base64
import io
import json
import os
import shutil
import socket
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("gradio", reason="the page needs the package's apps extra")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

from perceptiondlm.apps.captioning.captioner import RegionCaptioner  # noqa: E402
from perceptiondlm.apps.serving.engine import Engine  # noqa: E402
from perceptiondlm.apps.serving.limits import Limits  # noqa: E402
from perceptiondlm.apps.web.launch import launch  # noqa: E402
from perceptiondlm.generation_options import DiffusionOptions  # noqa: E402
from perceptiondlm.regions.segmenters import load_segmenter  # noqa: E402
from serving import counted  # noqa: E402

VECTORS = Path(__file__).parent / "fixtures" / "vectors"
IMAGE = VECTORS / "region_0.png"
MASKS = [VECTORS / f"region_0_mask_{i}.png" for i in range(3)]
SHORT = {"caption_length": 12, "steps": 12}
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # ms


@pytest.fixture(scope="module")
def captioner(load):
    return RegionCaptioner(*load("released-region"))


@pytest.fixture(scope="module")
def address(captioner):
    limits = Limits(body_bytes=1 << 20, pixels=1_000_000, masks=16)
    short = RegionCaptioner(captioner.model, captioner.processor, **SHORT)
    with Engine(short, window=0.05) as engine:
        demo = launch(engine, "tester", limits=limits, port=0, block=False)
        yield demo.local_url
        demo.close(verbose=False)
        with socket.socket() as probe:  # the port is free again
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", int(demo.local_url.rstrip("/").rpartition(":")[2])))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield opened(context, address)
    context.close()


def opened(context, address: str):
    """A page that is ready; what it asks the network for, and its errors, in lists on it."""
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.asked, page.broken = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.broken.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#pd-go")
    page.wait_for_function("window.pdPainter !== undefined")
    return page


def choose(page, file: Path = IMAGE):
    page.set_input_files(".pd-image", str(file))
    page.wait_for_selector(".pd-stage.pd-open")


def add_masks(page, files):
    page.evaluate("document.querySelector('.pd-exact').open = true")
    page.set_input_files(".pd-masks", list(map(str, files)))
    page.wait_for_selector(f".pd-chips [data-chip='{len(files)}']")


def describe(page) -> list[str]:
    page.click("#pd-go")
    page.wait_for_selector(".pd-facts a")
    return page.locator(".pd-captions .pd-text").all_inner_texts()


def alike(shown: list[str], captions: list[str]) -> bool:
    """Whether texts are the same but for white space, which a browser folds."""
    return [" ".join(s.split()) for s in shown] == [
        " ".join(c.split()) or "(nothing)" for c in captions
    ]


def toast(page) -> str:
    return page.wait_for_selector(".toast-body").inner_text()


def payload(page) -> dict:
    return json.loads(page.evaluate("window.pdPainter.payload()"))


def drag(page, *points):
    """Drags over the image; points are shares of its width and height."""
    box = page.locator(".pd-stage canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def test_from_an_image_and_mask_files_to_the_librarys_captions(page, captioner):
    choose(page)
    add_masks(page, MASKS)
    shown = describe(page)
    expected = captioner(IMAGE, MASKS, **SHORT)
    assert alike(shown, expected.captions)
    facts = page.locator(".pd-facts").inner_text()
    assert "3 regions" in facts and f"{expected.num_forwards} forward passes" in facts
    assert f"{expected.tokens_per_forward:.1f} tokens each" in facts
    assert page.get_attribute(".pd-facts a", "href").startswith("data:image/")
    page.locator("#pd-json button").first.click()
    page.wait_for_selector("#pd-json .cm-content >> text=regions")
    assert page.broken == []


def test_nothing_is_asked_of_the_outside(page, address):
    page.wait_for_load_state("networkidle")
    local = ("data:", "blob:", address.rstrip("/"))
    assert [url for url in page.asked if not url.startswith(local)] == []


def test_painted_regions_and_boxes_become_masks_and_can_be_taken_back(page):
    choose(page)
    drag(page, (0.1, 0.1), (0.4, 0.1))
    page.click("[data-act=more]")
    drag(page, (0.1, 0.8), (0.6, 0.8))
    page.click("[data-tool=box]")
    drag(page, (0.7, 0.2), (0.9, 0.6))
    page.evaluate("document.querySelector('.pd-exact').open = true")
    page.fill(".pd-exact textarea", "1, 2, 30, 40\n5 6 50 60")
    page.click("[data-act=boxes]")
    kinds = [next(iter(region)) for region in payload(page)["regions"]]
    assert kinds == ["painted", "painted", "box", "box", "box"]
    width, height = Image.open(IMAGE).size
    dragged = payload(page)["regions"][2]["box"]
    for got, share, side in zip(dragged, (0.7, 0.2, 0.9, 0.6), (width, height) * 2, strict=True):
        assert abs(got - share * side) <= 2
    assert payload(page)["regions"][3]["box"] == [1, 2, 30, 40]
    assert len(describe(page)) == 5
    page.click("[data-act=undo]")
    assert len(payload(page)["regions"]) == 3
    page.locator("[data-drop='0']").click()
    assert [next(iter(region)) for region in payload(page)["regions"]] == ["painted", "box"]
    page.click("[data-act=clear]")
    assert payload(page)["regions"] == []


def test_an_erased_mask_is_sent_as_painted(page):
    choose(page)
    add_masks(page, MASKS[:1])
    assert list(payload(page)["regions"][0]) == ["exact"]
    page.click("[data-tool=erase]")
    drag(page, (0.0, 0.5), (1.0, 0.5))
    assert list(payload(page)["regions"][0]) == ["painted"]
    page.keyboard.press("Control+z")
    assert list(payload(page)["regions"][0]) == ["exact"]


def test_a_caption_and_its_region_light_up_together(page):
    choose(page)
    page.click("[data-tool=box]")
    drag(page, (0.1, 0.1), (0.4, 0.4))
    drag(page, (0.6, 0.6), (0.9, 0.9))
    describe(page)
    page.hover(".pd-captions li:nth-child(2)")
    page.wait_for_selector(".pd-chips [data-chip='2'].pd-on")
    box = page.locator(".pd-stage canvas").bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
    page.wait_for_selector(".pd-captions li:nth-child(1).pd-on")
    page.click(".pd-captions li:nth-child(2)")
    page.mouse.move(2, 2)
    page.wait_for_selector(".pd-captions li:nth-child(2).pd-on")  # a click keeps it lit


def test_denoising_is_seen_step_by_step(page):
    page.evaluate("""() => {
      window.seen = new Set();
      new MutationObserver(() => {
        const step = document.querySelector('.pd-facts b');
        if (document.querySelector('.pd-captions .pd-mask') && step)
          window.seen.add(step.innerText);
      }).observe(document.querySelector('#pd-list'), {subtree: true, childList: true});
    }""")
    choose(page)
    add_masks(page, MASKS)
    describe(page)
    assert page.evaluate("window.seen.size") >= 2
    assert page.locator(".pd-captions .pd-mask").count() == 0


def test_an_example_is_described_with_two_clicks_and_brings_its_question(page):
    page.locator(".pd-examples button").first.click()
    page.wait_for_selector(".pd-chips [data-chip='2']")
    assert len(describe(page)) == page.locator(".pd-chips [data-chip]").count()
    page.get_by_role("tab", name="Ask a question").click()
    page.wait_for_function("document.querySelector('#pd-question textarea')?.value")
    page.click("#pd-ask")
    page.wait_for_selector("#pd-answer .pd-facts:has-text('forward passes')")
    assert page.locator("#pd-answer .pd-question").inner_text()


def test_a_question_is_answered_as_by_the_library(page, captioner):
    choose(page)
    page.get_by_role("tab", name="Ask a question").click()
    page.fill("#pd-question textarea", "What is it?")
    page.click("#pd-ask")
    page.wait_for_selector("#pd-answer .pd-facts:has-text('forward passes')")
    shown = page.locator("#pd-answer .pd-text").all_inner_texts()
    assert alike(shown, captioner.ask(IMAGE, "What is it?", steps=12).answers)


def test_a_chosen_region_is_asked_as_by_the_library(page, captioner):
    choose(page)
    add_masks(page, MASKS)
    page.get_by_role("tab", name="Ask a question").click()
    page.fill("#pd-question textarea", "What is it?")
    page.click("#pd-about input")
    page.get_by_role("option", name="region 2", exact=True).click()
    page.click("#pd-ask")
    page.wait_for_selector("#pd-answer .pd-facts:has-text('forward passes')")
    shown = page.locator("#pd-answer .pd-text").all_inner_texts()
    defaults = DiffusionOptions.build(captioner.model.decoding_defaults, {})
    length = max(defaults.caption_length, defaults.max_new_tokens)
    expected = captioner(
        IMAGE, MASKS, questions=[None, "What is it?", None], caption_length=length, steps=12
    )
    assert alike(shown, [expected.captions[1]])
    page.click("#pd-about input")
    page.get_by_role("option", name="region 9", exact=True).click()
    page.click("#pd-ask")
    page.get_by_text("Paint region 9 first").wait_for()


def test_captions_of_an_earlier_run_disappear_when_a_region_changes(page):
    choose(page)
    page.click("[data-tool=box]")
    drag(page, (0.1, 0.1), (0.4, 0.4))
    changes = [
        lambda: drag(page, (0.6, 0.6), (0.9, 0.9)),
        lambda: page.click("[data-act=undo]"),
        lambda: page.click("[data-act=redo]"),
        lambda: page.locator("[data-drop='1']").click(),
        lambda: page.click("[data-act=close]"),
    ]
    for change in changes:
        describe(page)
        change()
        page.wait_for_selector("#pd-list .pd-empty")
        assert page.locator(".pd-captions").count() == 0
    assert page.broken == []


def test_an_answer_disappears_with_its_image(page):
    choose(page)
    page.get_by_role("tab", name="Ask a question").click()
    page.fill("#pd-question textarea", "What is it?")
    page.press("#pd-question textarea", "Enter")  # asks
    page.wait_for_selector("#pd-answer .pd-facts:has-text('forward passes')")
    page.click("[data-act=close]")
    page.wait_for_function("!document.querySelector('#pd-answer .pd-answer')")


def test_regions_are_removed_with_the_keyboard(page):
    choose(page)
    page.click("[data-tool=box]")
    for x in (0.05, 0.35, 0.65):
        drag(page, (x, 0.1), (x + 0.2, 0.4))
    first, second, third = payload(page)["regions"]
    page.focus(".pd-chips [data-chip='2']")
    page.keyboard.press("Delete")
    assert payload(page)["regions"] == [first, third]
    assert page.evaluate("document.activeElement.dataset.chip") == "2"
    page.keyboard.press("Tab")  # to the cross beside it
    page.keyboard.press("Enter")
    assert payload(page)["regions"] == [first]
    drag(page, (0.35, 0.1), (0.55, 0.4))
    page.keyboard.press("Backspace")  # the chosen one, right after it was drawn
    assert payload(page)["regions"] == [first]
    page.evaluate("document.querySelector('.pd-exact').open = true")
    page.fill(".pd-exact textarea", "1, 2")
    page.press(".pd-exact textarea", "Backspace")  # who types means the text
    assert payload(page)["regions"] == [first]


def test_what_was_taken_back_can_be_done_again(page):
    choose(page)
    drag(page, (0.1, 0.1), (0.4, 0.1))
    once = payload(page)["regions"]
    drag(page, (0.1, 0.4), (0.4, 0.4))  # more of the same region
    twice = payload(page)["regions"]
    page.click("[data-act=undo]")
    page.keyboard.press("Control+z")
    assert payload(page)["regions"] == []
    page.click("[data-act=redo]")
    assert payload(page)["regions"] == once
    page.keyboard.press("Control+Shift+Z")
    assert payload(page)["regions"] == twice
    assert page.locator("[data-act=redo]").is_disabled()
    page.keyboard.press("Control+z")
    page.click("[data-tool=box]")
    drag(page, (0.6, 0.6), (0.9, 0.9))  # another way on: there is nothing to do again
    assert page.locator("[data-act=redo]").is_disabled()


def test_refusals_leave_no_traceback_in_the_servers_output(page, capfd):
    page.click("#pd-go")
    assert "Choose an image" in toast(page)
    choose(page)
    page.click("#pd-go")
    page.wait_for_selector(".toast-body:has-text('Paint at least one region')")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_nothing_can_be_uploaded_to_the_servers_disk(page, address, tmp_path, capfd):
    before = files_of_gradio()
    for route in ("gradio_api/upload", "upload", "gradio_api/upload/", "gradio_api//upload"):
        answer = httpx.post(f"{address}{route}", files={"files": ("a.png", b"a" * 1000)})
        assert answer.status_code in (404, 405), route
    choose(page)
    add_masks(page, MASKS)
    describe(page)
    assert files_of_gradio() == before
    assert "Traceback" not in "".join(capfd.readouterr())


def files_of_gradio() -> set[Path]:
    from gradio.utils import get_upload_folder

    return {path for path in Path(get_upload_folder()).rglob("*") if path.is_file()}


def test_a_visitor_who_goes_away_and_a_body_too_large_leave_no_traceback(address, capfd):
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    head = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=15) as client:
        client.sendall(head + b"Content-Length: 100000\r\n\r\n{")
    large = httpx.post(f"{address}gradio_api/queue/join", content=b"a" * (4 << 20), timeout=30)
    assert large.status_code == 413
    endless = (b"a" * (1 << 16) for _ in range(64))
    chunked = httpx.post(f"{address}gradio_api/queue/join", content=endless, timeout=30)
    assert chunked.status_code == 413
    time.sleep(0.5)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_without_an_image_or_a_region_the_page_says_so(page):
    page.click("#pd-go")
    assert "Choose an image" in toast(page)
    page.locator(".toast-close").first.click()
    choose(page)
    page.click("#pd-go")
    page.wait_for_selector(".toast-body:has-text('Paint at least one region')")


REFUSED = {
    "heavy.png": (lambda path: path.write_bytes(bytes(2 << 20)), "too large: 2.0 MiB"),
    "wide.png": (lambda path: Image.new("L", (2000, 2000)).save(path), "at most 1 megapixels"),
    "page.html": (lambda path: path.write_text("<html>"), "an image is needed"),
    "draw.svg": (lambda path: path.write_text("<svg/>"), "an image is needed"),
    "torn.png": (lambda path: path.write_bytes(IMAGE.read_bytes()[:40]), "cannot be read"),
}


def test_files_that_will_not_do_are_refused_and_nothing_is_sent(page, tmp_path):
    before = len(page.asked)
    for name, (make, message) in REFUSED.items():
        make(tmp_path / name)
        page.set_input_files(".pd-image", str(tmp_path / name))
        page.wait_for_selector(f".pd-alert:has-text('{message}')")
    assert [url for url in page.asked[before:] if "gradio_api" in url] == []
    choose(page)  # the next one will do
    assert page.locator(".pd-alert").is_hidden()


def test_a_mask_of_another_size_is_refused(page):
    choose(page)
    page.evaluate("document.querySelector('.pd-exact').open = true")
    page.set_input_files(".pd-masks", str(VECTORS / "region_1_mask_0.png"))
    page.wait_for_selector(".pd-alert:has-text('needs the image')")
    assert payload(page)["regions"] == []


def test_two_people_at_once_each_get_their_own(browser, address, captioner):
    people = []
    for index in (0, 1):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = opened(context, address)
        choose(page, VECTORS / f"region_{index}.png")
        masks = [VECTORS / f"region_{index}_mask_{k}.png" for k in range(2 + index)]
        add_masks(page, masks)
        people.append((context, page, VECTORS / f"region_{index}.png", masks))
    for _, page, *_ in people:
        page.click("#pd-go")
    for context, page, image, masks in people:
        page.wait_for_selector(".pd-facts a")
        shown = page.locator(".pd-captions .pd-text").all_inner_texts()
        assert alike(shown, captioner(image, masks, **SHORT).captions)
        context.close()


def test_stopping_ends_the_run(browser, captioner):
    slow = RegionCaptioner(captioner.model, captioner.processor, caption_length=128, steps=128)
    head = slow.model.language_model.lm_head
    brake = head.register_forward_hook(lambda *_: time.sleep(0.2))  # half a minute in all
    with Engine(slow) as engine:
        demo = launch(engine, "tester", port=0, block=False)
        context = browser.new_context()
        page = opened(context, demo.local_url)
        choose(page, VECTORS / "region_2.png")
        add_masks(page, [VECTORS / f"region_2_mask_{k}.png" for k in range(6)])
        page.click("#pd-go")
        page.wait_for_selector(".pd-captions")
        page.click("#pd-stop")
        page.wait_for_timeout(300)
        for _ in range(100):
            if counted(engine, "cancelled"):
                break
            page.wait_for_timeout(100)
        assert counted(engine, "cancelled") == 1
        assert engine.running == engine.queue_length == 0
        context.close()
        demo.close(verbose=False)
    brake.remove()


@pytest.fixture(scope="module")
def outlining(captioner):
    """The address of a page with the offline segmenter."""
    pytest.importorskip("cv2", reason="the offline segmenter needs the package's regions extra")
    short = RegionCaptioner(captioner.model, captioner.processor, **SHORT)
    with Engine(short, window=0.05) as engine:
        segmenter = load_segmenter()
        demo = launch(engine, "tester", segmenter=segmenter, port=0, block=False)
        yield demo.local_url
        demo.close(verbose=False)


@pytest.fixture
def outliner(browser, outlining):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield opened(context, outlining)
    context.close()


@pytest.fixture
def shapes(tmp_path):
    """A file with a red disc and a blue square on gray, and what `drag` calls their places."""
    image = Image.new("RGB", (400, 300), (150, 150, 150))
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 60, 160, 180), fill=(200, 30, 30))
    draw.rectangle((240, 100, 350, 210), fill=(30, 40, 200))
    image.save(tmp_path / "shapes.png")
    return tmp_path / "shapes.png"


def overlaps(page, image: Path) -> list[tuple[float, float]]:
    """Of each region, its overlap with the disc and with the square."""
    pixels = np.asarray(Image.open(image).convert("RGB"))
    shapes = [(pixels == color).all(-1) for color in ((200, 30, 30), (30, 40, 200))]
    masks = []
    for region in payload(page)["regions"]:
        data = base64.b64decode(region["exact"].partition(",")[2])
        masks.append(np.asarray(Image.open(io.BytesIO(data))) != 0)
    return [tuple((m & s).sum() / (m | s).sum() for s in shapes) for m in masks]


def test_a_click_outlines_what_lies_there_and_a_dragged_box_what_it_holds(outliner, shapes):
    page = outliner
    choose(page, shapes)
    page.click("[data-tool=outline]")
    drag(page, (0.25, 0.4))  # presses and lets go
    page.wait_for_selector(".pd-chips [data-chip='1']")
    drag(page, (0.55, 0.25), (0.92, 0.8))
    page.wait_for_selector(".pd-chips [data-chip='2']")
    disc, square = overlaps(page, shapes)
    assert disc[0] > 0.95 and square[1] > 0.95
    assert page.locator(".pd-alert").is_hidden()
    page.click("[data-act=undo]")
    assert len(payload(page)["regions"]) == 1
    page.click("[data-act=redo]")
    assert len(describe(page)) == 2 and page.broken == []


def test_everything_becomes_regions_that_one_undo_takes_back(outliner, shapes):
    page = outliner
    choose(page, shapes)
    page.click("[data-act=everything]")
    page.wait_for_selector(".pd-chips [data-chip='2']")
    found = overlaps(page, shapes)
    assert max(each[0] for each in found) > 0.95 and max(each[1] for each in found) > 0.95
    page.click("[data-act=undo]")
    assert payload(page)["regions"] == []
    assert page.broken == []


def test_where_nothing_stands_out_the_page_says_so(outliner, tmp_path):
    page = outliner
    Image.new("RGB", (200, 200), "white").save(tmp_path / "blank.png")
    choose(page, tmp_path / "blank.png")
    page.click("[data-act=everything]")
    page.wait_for_selector(".pd-alert:has-text('found no region')")
    assert payload(page)["regions"] == [] and page.broken == []


def test_without_a_segmenter_nothing_offers_outlines(page):
    choose(page)
    assert page.locator("[data-tool=outline]").is_hidden()
    assert page.locator("[data-act=everything]").is_hidden()
