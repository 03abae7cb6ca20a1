"""Lays out the page and does what its buttons ask for."""

import contextlib
import html
import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import gradio as gr
from PIL import Image

from ...generation_options import DiffusionOptions
from ...regions.segmenters import Segmenter, find_regions
from ..captioning.results import MASKED, Step
from ..serving.engine import Engine, EngineClosed, JobFailed, QueueFull, Ticket
from ..serving.errors import ApiError
from ..serving.http import client_of
from ..serving.jobs import ChatJob, RegionJob
from ..serving.limits import Limits, expect_at_most
from ..serving.pool import shared_pool
from . import painter, view
from .assets import read_script
from .decoding import option_slider, options_of_pace, pace_choice
from .input import data_url, examples

TITLE = "PerceptionDLM"
LEAD = "Paint regions of an image: they are described together, in one denoising process."
CONCURRENT = 16  # people whose requests are with the engine at the same time
# Of every event that runs the model.
SHARED_QUEUE = {
    "concurrency_limit": CONCURRENT,
    "concurrency_id": "model",
    "api_visibility": "private",
}
# Puts what is painted in the place of an event's first input.
HAND_OVER = "(sent, ...others) => [window.pdPainter.payload(), ...others]"
SUGGEST = "(typed) => window.pdPainter.question(typed)"
BLANK = " ".join([MASKED] * 8)  # a text of which nothing is known

log = logging.getLogger(__name__)


class Page:
    """Does what the page's buttons ask for, over one engine.

    Args:
        engine: runs the model.
        name: of the model, which the page shows.
        limits: of one request.
        segmenter: finds regions; None hides the tools that need one.
    """

    def __init__(
        self, engine: Engine, name: str, limits: Limits, segmenter: Segmenter | None = None
    ):
        self.engine = engine
        self.name = name
        self.limits = limits
        self.segmenter = segmenter
        self.segmenting = threading.Lock()  # one at a time: it may take all cores
        self.pool = shared_pool()

    def caption(
        self, payload: str, length: int, steps: int, pace: str, request: gr.Request
    ) -> Iterator[tuple]:
        """Yields (progress and captions, JSON) until all regions are described."""
        with shown_errors():
            image, masks = self._read(payload)
            if not masks:
                raise refusal("Paint at least one region, drag a box, or add a mask.", "No region")
            options = {"caption_length": int(length), "steps": int(steps)}
            options |= options_of_pace(pace, self.defaults)
            job = RegionJob(image, tuple(masks))
            ticket = self._submit(job, request, **options)

        # Captions appear region by region while they are denoised; the JSON comes at the end.
        waiting = view.waiting_view(self.engine.queue_length)
        yield waiting + view.captions_view([BLANK] * len(masks)), ""
        for step, seconds in self._follow(ticket):
            progress = view.progress_view(step, int(steps) * self._rounds(job), seconds)
            yield progress + view.captions_view(step.texts), gr.skip()

        with shown_errors():
            result = ticket.result().result
        facts = view.facts_view(result, view.drawing_link(result))
        yield facts + view.captions_view(result.captions), view.as_json(result)

    def answer(
        self, payload: str, question: str, about: int, length: int, request: gr.Request
    ) -> Iterator[str]:
        """Yields progress and answer until the question is answered.

        `about` is the number of the region that is asked about, 0 for the whole image.
        """
        question = question.strip()
        with shown_errors():
            image, masks = self._read(payload)
            if not question:
                raise refusal("Write a question first.", "No question")
            expect_at_most("characters", len(question), self.limits.text)
            ticket = self._ask(image, masks, question, int(about or 0), int(length), request)
        place = int(about or 1) - 1  # of the answer among the job's

        waiting = view.waiting_view(self.engine.queue_length)
        yield waiting + view.answer_view(question, BLANK)
        for step, seconds in self._follow(ticket):
            progress = view.progress_view(step, int(length), seconds)
            yield progress + view.answer_view(question, step.texts[place])

        with shown_errors():
            result = ticket.result().result
        texts = result.captions if about else result.answers
        yield view.facts_view(result) + view.answer_view(question, texts[place])

    def _ask(
        self, image, masks: list, question: str, about: int, length: int, request: gr.Request
    ) -> Ticket:
        """Asks about the whole image, or about one of its regions beside the others."""
        if not about:
            return self._submit(ChatJob.ask(image, question), request, max_new_tokens=length)
        if about > len(masks):
            raise refusal(
                f"Paint region {about} first, or ask about another: there are {len(masks)}.",
                "No such region",
            )
        prompts = [question if k + 1 == about else None for k in range(len(masks))]
        job = RegionJob.build(image, masks, prompts=prompts)
        return self._submit(job, request, caption_length=max(length, self.defaults.caption_length))

    def outline(self, sent: dict) -> dict:
        """Returns the masks of what lies at points or in boxes of an image, else of everything.

        Args:
            sent: `image`, a data URL; `points` and `boxes`, lists as a `Segmenter` takes them, or
                null.

        The masks are data URLs, `urls`, one more than a request may have at most; or `problem` says
        why there are none.
        """
        try:
            if not isinstance(sent, dict) or set(sent) != {"image", "points", "boxes"}:
                raise ValueError("expected image, points and boxes from the page")

            # Check what the page sent before a segmenter works on it.
            points, boxes = sent["points"], sent["boxes"]
            image_only = json.dumps({"image": sent["image"], "regions": []})
            image, _ = self.pool.read_page(image_only, self.limits)
            if image is None:
                raise ValueError("expected an image, got none")
            counts = [len(each) for each in (points, boxes) if isinstance(each, list)]
            expect_at_most("regions", sum(counts), self.limits.masks)

            everything = points is None and boxes is None
            prompts = {"everything": everything, "points": points, "boxes": boxes}
            with self.segmenting:
                regions = find_regions(image, self.segmenter, **prompts)
        except (ApiError, ValueError, TypeError) as error:
            return {"problem": str(error)}
        masks = [Image.fromarray(region.mask) for region in regions[: self.limits.masks + 1]]
        return {"urls": [data_url(mask) for mask in masks]}

    def _submit(self, job, request: gr.Request, **options) -> Ticket:
        return self.engine.submit(job, follow=True, client=client_of(request), **options)

    def _read(self, payload: str) -> tuple[Image.Image, list[Image.Image]]:
        image, masks = self.pool.read_page(payload or "", self.limits)
        if image is None:
            raise refusal("Choose an image or one of the examples first.", "No image")
        return image, masks

    def _rounds(self, job: RegionJob) -> int:
        """Returns how many runs, one after another, a job of many regions takes."""
        groups = job.num_groups(self.engine.captioner.model.config.num_region_prompts or 1)
        return -(-groups // self.engine.max_batch)

    def _follow(self, ticket: Ticket) -> Iterator[tuple[Step, float]]:
        """Yields steps, each with the seconds since the start.

        Gives the job up when its reader has gone, or its time is over.
        """
        timer = threading.Timer(self.limits.request_seconds, ticket.cancel)
        timer.start()
        try:
            for step in ticket.follow():
                yield step, time.monotonic() - ticket.started
        finally:
            timer.cancel()
            ticket.cancel()  # nothing, once it is done

    @property
    def defaults(self) -> DiffusionOptions:
        """Returns how the checkpoint decodes unless a visitor says otherwise."""
        captioner = self.engine.captioner
        return DiffusionOptions.build(captioner.model.decoding_defaults, captioner.options)


def refusal(message: str, title: str) -> gr.Error:
    """Returns an error that the visitor sees, and of which nothing goes to the server's log."""
    return gr.Error(html.escape(message, quote=False), title=title, print_exception=False)


@contextlib.contextmanager
def shown_errors():
    """Shows the errors that a visitor can do something about as messages on the page."""
    try:
        yield
    except gr.Error:  # a ValueError of gradio's, to be shown as it is
        raise

    # The engine takes or gives nothing now: trying again later helps.
    except QueueFull as error:
        raise refusal(f"{error}.", "Too many at once") from error
    except EngineClosed as error:
        raise refusal("The server is shutting down.", "Closing") from error
    except CancelledError as error:
        raise refusal("It took too long, or the server is shutting down.", "Given up") from error

    # What was asked for cannot be done.
    except JobFailed as error:
        log.error("a request failed: %s", error)
        raise refusal(f"{error}.", "That does not work") from error
    except (ApiError, ValueError) as error:
        raise refusal(f"{error}.", "That does not work") from error


def build(page: Page) -> gr.Blocks:
    """Lays the page out."""
    has_regions = page.engine.captioner.model.config.num_region_prompts > 0
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as demo:
        gr.HTML(
            f"<h1>{TITLE}</h1><p>{LEAD} Model: <code>{html.escape(page.name)}</code></p>",
            elem_id="pd-head",
        )

        # The image with its regions beside what is said about it.
        sent = gr.Textbox(visible=False)  # takes what the painter's script hands over
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=360):
                _painter(page, has_regions)
            with gr.Column(scale=1, min_width=360), gr.Tabs():
                if has_regions:
                    with gr.Tab("Describe regions"):
                        _region_tab(page, sent)
                with gr.Tab("Ask a question") as asking:
                    question = _question_tab(page, sent)

        # An example brings its question, which is put in when the tab is opened.
        asking.select(None, question, question, js=SUGGEST, api_visibility="private")
    return demo


def _painter(page: Page, has_regions: bool):
    outlines = page.segmenter is not None
    shown = [example.to_dict() for example in examples()]

    def outline(sent: dict) -> dict:
        return page.outline(sent)  # gradio marks what it serves, which no method can be

    gr.HTML(
        painter.markup(page.limits, shown, regions=has_regions, outlines=outlines),
        js_on_load=read_script(),
        elem_id="pd-painter",
        server_functions=[outline] if outlines else None,
    )


def _region_tab(page: Page, sent: gr.Textbox):
    with gr.Row(equal_height=True):
        go = gr.Button("Describe regions", variant="primary", elem_id="pd-go", scale=4)
        stop = gr.Button("Stop", elem_id="pd-stop", scale=1, min_width=80)
    captions = gr.HTML(view.EMPTY, elem_id="pd-list")
    with gr.Accordion("JSON", open=False, elem_id="pd-json"):
        code = gr.Code(
            language="json", buttons=["copy", "download"], max_lines=18, show_label=False
        )
    controls = _caption_controls(page)

    running = go.click(
        page.caption,
        [sent, *controls],
        [captions, code],
        js=HAND_OVER,
        show_progress="hidden",
        **SHARED_QUEUE,
    )
    stop.click(None, cancels=[running], api_visibility="private")
    forgets("captions", {captions: view.EMPTY, code: ""}, running)


def _caption_controls(page: Page) -> list:
    """Lays out the decoding options of captions, in the order that `Page.caption` takes them in."""
    with gr.Accordion("Decoding", open=False):
        length = option_slider("caption_length", page.defaults, page.limits)
        steps = option_slider("steps", page.defaults, page.limits)
        return [length, steps, pace_choice(page.defaults)]


def _question_tab(page: Page, sent: gr.Textbox) -> gr.Textbox:
    # one line at first, so that Enter asks; Shift+Enter begins another
    question = gr.Textbox(
        label="Question",
        lines=1,
        max_lines=6,
        placeholder="What is in the image?",
        elem_id="pd-question",
        max_length=page.limits.text,
    )
    about = gr.State(0)
    if page.engine.captioner.model.config.num_region_prompts:
        regions = [f"region {k}" for k in range(1, page.limits.masks + 1)]
        about = gr.Dropdown(
            ["the whole image", *regions],
            value="the whole image",
            type="index",
            label="About",
            elem_id="pd-about",
        )
    ask = gr.Button("Ask", variant="primary", elem_id="pd-ask")
    answer = gr.HTML(elem_id="pd-answer")
    with gr.Accordion("Decoding", open=False):
        length = option_slider("max_new_tokens", page.defaults, page.limits)

    running = gr.on(
        [ask.click, question.submit],
        page.answer,
        [sent, question, about, length],
        answer,
        js=HAND_OVER,
        show_progress="hidden",
        **SHARED_QUEUE,
    )
    forgets("answer", {answer: ""}, running)
    return question


def forgets(kind: str, blank: dict, running):
    """Adds a hidden button by which the painter's script ends a run and blanks what it has shown.

    Args:
        kind: what is forgotten; the button's id is `pd-forget-` and this.
        blank: what each component shows afterwards.
        running: the event whose run ends.
    """
    button = gr.Button(elem_id=f"pd-forget-{kind}", visible="hidden")
    values = json.dumps(list(blank.values()))
    button.click(
        None, None, list(blank), js=f"() => {values}", cancels=[running], api_visibility="private"
    )


def theme() -> gr.Theme:
    """Returns a theme with fonts of the reader's own machine, so that nothing is fetched."""
    return gr.themes.Soft(
        primary_hue="blue",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "monospace"],
    )
