"""The page itself: what stands where, and what happens on each press of a button."""

import os
from collections.abc import Iterator

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr  # noqa: E402
from PIL import Image  # noqa: E402

from . import web_view as view  # noqa: E402
from .captioner import MASKED  # noqa: E402
from .drawing import PALETTE  # noqa: E402
from .engine import Engine, EngineClosed, JobFailed, QueueFull, Ticket  # noqa: E402
from .serving_jobs import ChatJob, RegionJob  # noqa: E402
from .serving_limits import Limits, expect_at_most, expect_masks  # noqa: E402
from .web_regions import (  # noqa: E402
    PaintedRegion,
    examples,
    painted_regions,
    uploaded_masks,
    with_colours,
    written_masks,
)

TITLE = "PerceptionDLM"
LEAD = "Paint regions of a picture. They are described together, in one denoising process."
ADAPTIVE = {"fixed schedule": None, "by threshold": "threshold", "by factor": "factor",
            "by entropy": "entropy_bound"}
CACHE_SECONDS = 3600  # pictures that were uploaded or shown are deleted after so long
SESSIONS = 200  # whose state is kept


class Page:
    """Handlers over one engine.

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
        self, editor, boxes: str, files, length: int, steps: int, pace: str, temperature: float
    ) -> Iterator[tuple]:
        """Yields (picture, captions, progress, JSON) until all regions are described."""
        picture, regions = self._read_regions(editor, boxes, files)
        shown = view.picture_view(picture, regions)
        options = {"caption_length": int(length), "steps": int(steps), "temperature": temperature}
        if ADAPTIVE[pace] is not None:
            options["adaptive"] = ADAPTIVE[pace]
        self._expect_cheap(options)
        job = RegionJob.build(picture, [region.mask for region in regions])
        ticket = self._submit(job, options)
        blank = [" ".join([MASKED] * 8)] * len(regions)
        waiting = view.waiting_view(self.engine.queue_length)
        yield shown, view.captions_view(blank, regions), waiting, ""
        for step in self._follow(ticket):
            progress = view.progress_view(step, options["steps"] * self._rounds(job), step.seconds)
            yield gr.skip(), view.captions_view(step.texts, regions), progress, gr.skip()
        result = self._result(ticket).result
        facts = view.facts_view(result, view.drawing_link(result))
        captions = view.captions_view(result.captions, regions)
        yield gr.skip(), captions, facts, view.as_json(result)

    def answer(self, editor, question: str, length: int) -> Iterator[tuple]:
        """Yields (answer, progress) until the question is answered."""
        picture = self._picture(editor)
        question = question.strip()
        if not question:
            raise gr.Error("Write a question first.", title="No question")
        expect_at_most("characters in a question", len(question), self.limits.text)
        options = {"max_new_tokens": int(length)}
        self._expect_cheap(options)
        ticket = self._submit(ChatJob.ask(picture, question), options)
        yield view.answer_view(question, " ".join([MASKED] * 8)), view.waiting_view(
            self.engine.queue_length
        )
        for step in self._follow(ticket):
            progress = view.progress_view(step, int(length), step.seconds)
            yield view.answer_view(question, step.texts[0]), progress
        result = self._result(ticket).result
        yield view.answer_view(question, result.answers[0]), view.facts_view(result)
