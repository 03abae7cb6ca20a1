"""Draws `docs/web.png`: the web page with a captioned example, as headless Chromium shows it.

    python docs/figures/make_web_page.py

It needs playwright and a Chromium: that of `playwright install chromium`, `CHROMIUM`, or the
system's own.
"""

import os
import shutil
from pathlib import Path

from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.apps.serving.engine import Engine
from perceptiondlm.apps.web.launch import launch
from perceptiondlm.regions.segmenters import load_segmenter
from playwright.sync_api import Page, sync_playwright

OUTPUT = Path(__file__).parents[1] / "web.png"
SIZE = {"width": 1360, "height": 900}  # pixels
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")


def main():
    """Serves the embedded model and takes the screenshot of its page."""
    with Engine(RegionCaptioner.from_pretrained()) as engine:
        segmenter = load_segmenter()
        demo = launch(engine, "perceptiondlm-tiny", segmenter=segmenter, port=0, block=False)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE)
            page.goto(demo.local_url)
            describe_example(page)
            page.screenshot(path=OUTPUT)
            browser.close()
        demo.close(verbose=False)
    print(f"{OUTPUT}: {OUTPUT.stat().st_size / 1e6:.2f} MB")


def describe_example(page: Page):
    """Describes the first example and points at the second of its captions."""
    page.locator(".pd-examples button").first.click()
    page.wait_for_selector(".pd-chips [data-chip='2']")
    page.click("#pd-go")
    page.wait_for_selector(".pd-facts a")

    page.hover(".pd-captions li:nth-child(2)")
    page.wait_for_selector(".pd-chips [data-chip='2'].pd-on")
    page.wait_for_timeout(500)  # until what has lit up no longer changes


if __name__ == "__main__":
    main()
