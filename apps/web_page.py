"""The page itself: what stands where, and what happens on each press of a button."""

import contextlib
import html
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr  # noqa: E402
from PIL import Image  # noqa: E402

from ..generation_diffusion import DiffusionOptions  # noqa: E402
from ..image_processing_perceptiondlm import load_image  # noqa: E402
from . import web_view as view  # noqa: E402
from .captioner import MASKED, Step  # noqa: E402
from .drawing import PALETTE  # noqa: E402
from .engine import Engine, EngineClosed, JobFailed, QueueFull, Ticket  # noqa: E402
from .serving_jobs import ChatJob, RegionJob  # noqa: E402
from .serving_limits import Limits, expect_at_most, expect_masks  # noqa: E402
from .web_regions import (  # noqa: E402
    PAINT,
    PaintedRegion,
    examples,
    painted_regions,
    uploaded_masks,
    with_colours,
    written_masks,
)

TITLE = "PerceptionDLM"
LEAD = "Paint regions of a picture: they are described together, in one denoising process."
PACES = {"fixed": None, "by threshold": "threshold", "by factor": "factor",
         "by entropy": "entropy_bound"}
CONCURRENT = 16  # people whose requests are with the engine at the same time
CACHE_SECONDS = 3600  # pictures that were uploaded or shown are deleted after so long
SESSIONS = 200  # whose state is kept
BLANK = " ".join([MASKED] * 8)  # a text of which nothing is known


class Page:
    """What the page does, over one engine.

    Args:
        engine: an `Engine`; name: of the model, shown; limits: of one request.
        sam: makes a mask of a click, a `ClickMasks`; None hides that.
    """

    def __init__(self, engine: Engine, name: str, limits: Limits, sam=None):
        self.engine = engine
        self.name = name
        self.limits = limits
        self.sam = sam
        self.examples = examples()

    def caption(
        self, editor, written: str, files, length: int, steps: int, pace: str
    ) -> Iterator[tuple]:
        """Yields (picture, captions, progress, JSON) until all regions are described."""
        with shown_errors():
            picture = self._picture(editor)
            regions = self._regions(picture, editor, written, files)
            job = RegionJob.build(picture, [region.mask for region in regions])
            options = {"caption_length": int(length), "steps": int(steps)}
            if PACES[pace] is not None:
                options["adaptive"] = PACES[pace]
            ticket = self.engine.submit(job, follow=True, **options)
        waiting = view.waiting_view(self.engine.queue_length)
        captions = view.captions_view([BLANK] * len(regions), regions)
        yield view.picture_view(picture, regions), captions, waiting, ""
        for step, seconds in self._follow(ticket):
            progress = view.progress_view(step, int(steps) * self._rounds(job), seconds)
            yield gr.skip(), view.captions_view(step.texts, regions), progress, gr.skip()
        with shown_errors():
            result = ticket.result().result
        captions = view.captions_view(result.captions, regions)
        facts = view.facts_view(result, view.drawing_link(result))
        yield gr.skip(), captions, facts, view.as_json(result)

    def answer(self, editor, question: str, length: int) -> Iterator[tuple]:
        """Yields (answer, progress) until the question is answered."""
        question = question.strip()
        with shown_errors():
            picture = self._picture(editor)
            if not question:
                raise gr.Error("Write a question first.", title="No question")
            expect_at_most("characters", len(question), self.limits.text)
            job = ChatJob.ask(picture, question)
            ticket = self.engine.submit(job, follow=True, max_new_tokens=int(length))
        waiting = view.waiting_view(self.engine.queue_length)
        yield view.answer_view(question, BLANK), waiting
        for step, seconds in self._follow(ticket):
            progress = view.progress_view(step, int(length), seconds)
            yield view.answer_view(question, step.texts[0]), progress
        with shown_errors():
            result = ticket.result().result
        yield view.answer_view(question, result.answers[0]), view.facts_view(result)

    def start_from(self, event: gr.SelectData):
        """The example that was clicked on: editor, question and cleared results."""
        chosen = self.examples[event.index]
        return editor_value(chosen.image, chosen.layers()), chosen.question

    def click(self, editor, event: gr.SelectData):
        """The editor's value with what lies under a click as one region more."""
        picture = self._picture(editor)
        layers = [layer for layer in editor["layers"] if layer is not None]
        with shown_errors():
            mask = self.sam(picture, *event.index)
            if mask.getbbox() is None:
                raise ValueError("nothing found under this point: try another one")
        taken = {region.colour for region in painted_regions(layers)}
        free = [colour for colour in PALETTE if colour not in taken] or list(PALETTE)
        layer = Image.new("RGBA", picture.size)
        layer.paste((*free[0], round(255 * PAINT)), (0, 0), mask)
        return editor_value(picture, [*layers, layer])

    def shown_picture(self, editor) -> Image.Image | None:
        """The picture to click on."""
        return None if editor is None else editor["background"]

    def _picture(self, editor) -> Image.Image:
        if editor is None or editor["background"] is None:
            raise gr.Error("Choose a picture or one of the examples first.", title="No picture")
        picture = editor["background"]
        if picture.width * picture.height > self.limits.pixels:
            raise gr.Error(
                f"At most {self.limits.pixels / 1e6:g} megapixels, this picture has"
                f" {picture.width}x{picture.height}.", title="Picture too large",
            )
        return load_image(picture)

    def _regions(self, picture: Image.Image, editor, written: str, files) -> list[PaintedRegion]:
        painted = painted_regions(editor["layers"])
        others = written_masks(written or "", picture.size, self.limits)
        others += uploaded_masks(files or [], picture.size, self.limits)
        if not painted and not others:
            raise gr.Error(
                "Paint at least one region with the brush, write a box, or upload a mask.",
                title="No region",
            )
        expect_masks(len(painted) + len(others), picture.size, self.limits)
        return with_colours(painted, others)

    def _rounds(self, job: RegionJob) -> int:
        """Runs, one after another, that a job of many regions takes."""
        passes = job.passes(self.engine.captioner.model.config.num_region_prompts or 1)
        return -(-passes // self.engine.max_batch)

    def _follow(self, ticket: Ticket) -> Iterator[tuple[Step, float]]:
        """Steps and seconds; gives the job up when its reader has gone."""
        try:
            for step in ticket.follow():
                yield step, time.monotonic() - ticket.started
        finally:
            ticket.cancel()  # nothing, once it is done

    @property
    def defaults(self) -> DiffusionOptions:
        """How the checkpoint decodes unless told otherwise."""
        captioner = self.engine.captioner
        return DiffusionOptions.build(
            captioner.model.config.generation_defaults, captioner.options
        )


@contextlib.contextmanager
def shown_errors():
    """Shows what a person can do something about as a message on the page."""
    try:
        yield
    except gr.Error:  # a ValueError of gradio's, to be shown as it is
        raise
    except QueueFull as error:
        raise gr.Error(f"{error}.", title="Too many at once") from error
    except (EngineClosed, CancelledError) as error:
        raise gr.Error("The server is shutting down.", title="Closing") from error
    except (ValueError, JobFailed) as error:
        raise gr.Error(f"{html.escape(str(error), quote=False)}.", title="That does not work") from error


def editor_value(picture: Image.Image, layers: list[Image.Image]) -> dict:
    """What an `ImageEditor` shows."""
    composite = picture.convert("RGBA")
    for layer in layers:
        composite = Image.alpha_composite(composite, layer)
    return {"background": picture, "layers": layers, "composite": composite}


def build(page: Page) -> gr.Blocks:
    """Lays the page out."""
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True,
        delete_cache=(CACHE_SECONDS, CACHE_SECONDS),
    ) as demo:
        gr.HTML(f"<h1>{TITLE}</h1><p>{LEAD} Model: <code>{html.escape(page.name)}</code></p>",
                elem_id="pd-head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=380):
                editor = _picture_side(page)
                below = gr.Column()
            with gr.Column(scale=1, min_width=380):
                question = _result_side(page, editor)
        with below:
            if page.examples:
                _example_row(page, editor, question)
    return demo


def _picture_side(page: Page) -> gr.ImageEditor:
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in PALETTE]
    editor = gr.ImageEditor(
        label="Picture: paint each region in a colour of its own",
        type="pil",
        image_mode="RGBA",
        format="png",
        sources=["upload", "clipboard"],
        transforms=[],
        brush=gr.Brush(default_size=18, colors=[(colour, PAINT) for colour in colours],
                       default_color=(colours[0], PAINT), color_mode="fixed"),
        eraser=gr.Eraser(default_size=24),
        layers=gr.LayerOptions(allow_additional_layers=True),
        canvas_size=(800, 600),
        buttons=["fullscreen"],
        elem_id="pd-editor",
    )
    if page.sam is not None:
        with gr.Accordion("Outline an object with a click", open=False):
            clickable = gr.Image(type="pil", interactive=False, show_label=False, buttons=[],
                                 elem_id="pd-click")
        private = {"api_visibility": "private"}
        editor.change(page.shown_picture, editor, clickable, show_progress="hidden", **private)
        clickable.select(page.click, editor, editor, **private)
    return editor


def _result_side(page: Page, editor: gr.ImageEditor) -> gr.Textbox:
    with gr.Tabs():
        if page.engine.captioner.model.config.num_region_prompts:
            with gr.Tab("Describe regions"):
                _region_tab(page, editor)
        with gr.Tab("Ask a question"):
            return _question_tab(page, editor)


def _region_tab(page: Page, editor: gr.ImageEditor):
    defaults, limits = page.defaults, page.limits
    with gr.Row(equal_height=True):
        go = gr.Button("Describe regions", variant="primary", elem_id="pd-go", scale=4)
        stop = gr.Button("Stop", elem_id="pd-stop", scale=1, min_width=80)
    with gr.Accordion("Boxes, mask files, decoding", open=False, elem_id="pd-more"):
        written = gr.Textbox(
            label="Regions as text, beside those painted",
            placeholder="40, 60, 220, 300      a box in pixels (x0, y0, x1, y1) on each line,"
            "\nor JSON: COCO RLE, polygons, boxes",
            lines=2, max_lines=8, elem_id="pd-boxes",
        )
        files = gr.File(label="Mask pictures (PNG of the picture's size, not black inside)",
                        file_count="multiple", file_types=["image"], height=120,
                        elem_id="pd-files")
        with gr.Row():
            length = gr.Slider(1, min(128, limits.caption_length), defaults.caption_length,
                               step=1, label="Tokens of a caption")
            steps = gr.Slider(1, min(128, limits.steps),
                              defaults.steps or defaults.caption_length, step=1,
                              label="Denoising steps", info="fewer are faster")
            pace = gr.Dropdown(list(PACES), value=_pace_of(defaults.adaptive), label="Pace",
                               info="tokens committed at each step")
    shown = gr.HTML(view.EMPTY, elem_id="pd-shown")
    progress = gr.HTML(elem_id="pd-progress")
    captions = gr.HTML(elem_id="pd-list")
    with gr.Accordion("JSON", open=False):
        code = gr.Code(language="json", buttons=["copy", "download"], max_lines=18,
                       show_label=False, elem_id="pd-json")
    results = [shown, captions, progress, code]
    running = go.click(
        page.caption, [editor, written, files, length, steps, pace], results,
        show_progress="hidden", concurrency_limit=CONCURRENT, concurrency_id="model",
        api_visibility="private",
    )
    stop.click(None, cancels=[running], api_visibility="private")


def _pace_of(adaptive: str | None) -> str:
    return next(name for name, value in PACES.items() if value == adaptive)


def _question_tab(page: Page, editor: gr.ImageEditor) -> gr.Textbox:
    defaults = page.defaults
    question = gr.Textbox(label="Question about the whole picture", lines=2, max_lines=6,
                          placeholder="What is in the picture?", elem_id="pd-question",
                          max_length=page.limits.text)
    length = gr.Slider(1, min(512, page.limits.new_tokens), defaults.max_new_tokens, step=1,
                       label="Tokens of the answer")
    ask = gr.Button("Ask", variant="primary", elem_id="pd-ask")
    answer = gr.HTML(elem_id="pd-answer")
    progress = gr.HTML()
    gr.on([ask.click, question.submit], page.answer, [editor, question, length],
          [answer, progress], show_progress="hidden", concurrency_limit=CONCURRENT,
          concurrency_id="model", api_visibility="private")
    return question


def _example_row(page: Page, editor: gr.ImageEditor, question: gr.Textbox):
    gallery = gr.Gallery(
        [example.image for example in page.examples], label="Examples", columns=len(page.examples),
        rows=1, height=128, allow_preview=False, object_fit="contain", format="png", buttons=[],
        interactive=False, elem_id="pd-examples",
    )
    gallery.select(page.start_from, None, [editor, question], show_progress="hidden",
                   api_visibility="private")


def theme() -> gr.Theme:
    """Fonts that are on the reader's machine: nothing is fetched."""
    return gr.themes.Soft(
        primary_hue="blue", neutral_hue="slate", radius_size="lg",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "monospace"],
    )


def launch(
    engine: Engine,
    name: str,
    *,
    limits: Limits | None = None,
    sam=None,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    block: bool = True,
) -> gr.Blocks:
    """Serves the page; with `block`, until it is interrupted. Closes what it opened.

    Raises OSError where the port is taken.
    """
    limits = limits or Limits()
    Image.MAX_IMAGE_PIXELS = limits.pixels  # Pillow refuses twice as many before it decodes
    demo = build(Page(engine, name, limits, sam))
    demo.queue(max_size=engine.max_queue, default_concurrency_limit=CONCURRENT)
    demo.launch(
        server_name=host, server_port=port or free_port(host), inbrowser=open_browser, share=False,
        quiet=True, prevent_thread_lock=True, max_file_size=limits.body_bytes, theme=theme(),
        css=view.CSS, js=view.SCRIPT, footer_links=[], enable_monitoring=False, ssr_mode=False,
        state_session_capacity=SESSIONS, show_error=True, favicon_path=None, strict_cors=True,
    )
    if block:
        try:
            print(f"perceptiondlm web: {demo.local_url} (Ctrl-C ends it)")
            demo.block_thread()
        finally:
            demo.close(verbose=False)
    return demo


def free_port(host: str) -> int:
    """A port that nothing listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
