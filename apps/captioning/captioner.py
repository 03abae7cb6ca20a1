"""Puts a model and its processor into one object that captions regions and answers questions.

captioner = RegionCaptioner.from_pretrained("owner/name")
result = captioner("photo.jpg", masks=["cup.png", {"box": [10, 20, 200, 180]}])
print(result)                         # numbered captions
result.draw().save("captioned.png")   # outlined regions and their captions
for step in captioner.stream("photo.jpg", masks=["cup.png"]):
    print(step)                       # captions as they appear
captioner("photo.jpg", points=[(120, 80)])   # or everything=True, boxes=..., text=...
"""

import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ...common.loading import default_device, load_model
from ...generation_options import TEMPLATE_DECIDES, DiffusionOptions, merge_options, options_for
from ...image_processing_perceptiondlm import load_image, load_mask
from ...regions.load import image_name, load_regions
from ...regions.region_mask import RegionMask
from ...regions.segmenters import Segmenter, find_regions
from .results import MASKED, Answers, Region, RegionCaptions, Step

EMBEDDED = Path(os.path.abspath(__file__)).parents[2]  # the repository's or package's root
EMBEDDED_SUBFOLDER = "tiny"
REGION_PROMPTS = ("everything", "points", "boxes", "text")  # of a segmenter
# What `diffusion_generate` can return beside, and results here have no place for.
UNHELD = {"num_return_sequences": 1, "return_token_scores": False}


class RegionCaptioner:
    """Captions regions of images and answers questions about them.

    Args:
        model: a `PerceptionDLMForConditionalGeneration`.
        processor: its processor.
        options: decoding options (see `DiffusionOptions`) for every call.
    """

    def __init__(self, model, processor, **options):
        self.model = model
        self.processor = processor
        self.options = options

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        quantize: str | None = None,
        **options,
    ) -> "RegionCaptioner":
        """Loads a checkpoint from a folder or the Hub; without `source`, the embedded one.

        The weights are loaded into this package's own classes: no code of the checkpoint's
        repository is run. `device` defaults to the accelerator, else the CPU; `quantize` is as
        for `load_model`.

        Raises as `load_model`.
        """
        if source is None:
            source, subfolder = EMBEDDED, EMBEDDED_SUBFOLDER
            if not (source / subfolder / "config.json").is_file():
                raise FileNotFoundError(
                    f"expected the embedded checkpoint in {source / subfolder}, found none:"
                    " name a folder or a Hub id"
                )
        place = {"subfolder": subfolder, "revision": revision, "token": token}
        how = {"dtype": dtype, "device": device or default_device(), "quantize": quantize}
        return cls(*load_model(source, **how, **place), **options)

    def check_options(self):
        """Raises ValueError for decoding options that nothing could be decoded with."""
        DiffusionOptions.build(self.model.decoding_defaults, self.options)

    def defaults_for(self, task: str, has_template: bool = False) -> dict:
        """Returns those of the captioner's options that a task, and a template, has a use for."""
        known = options_for(task, self.options)
        return {k: v for k, v in known.items() if not (has_template and k in TEMPLATE_DECIDES)}

    def __call__(
        self,
        image,
        masks=None,
        *,
        everything: bool = False,
        points=None,
        boxes=None,
        text: str | Sequence[str] | None = None,
        segmenter: Segmenter | str | None = None,
        instruction: str | None = None,
        questions: Sequence[str | None] | None = None,
        template=None,
        callback=None,
        **options,
    ) -> RegionCaptions:
        """Captions each region of one image, all of them together.

        Args:
            image: a PIL image, path, URL, bytes, array or tensor (see `load_image`).
            masks: one for each region: PIL image, array, path, COCO RLE, `{"box": [x0, y0, x1,
                y1]}` or `{"polygons": [[x0, y0, ...], ...]}` in pixels (see `load_mask`); or
                whatever `load_regions` takes, a file or what a segmenter returned.
            everything, points, boxes, text: instead of masks, what a segmenter is asked for (see
                `find_regions`).
            segmenter: one, or the name that `load_segmenter` takes (default: the offline one).
            instruction: instead of the checkpoint's own.
            questions: one for each region, None for the instruction.
            template: fixed text with fields to be filled, for all regions or a list with one for
                each (see `diffusion_generate`).
            callback: called after each step with a `Step`.
            options: decoding options over those of the captioner (see `DiffusionOptions`);
                `return_history=True` keeps the captions after each step.

        Raises ValueError for an image, mask or option that does not fit.
        """
        name, image = image_name(image), load_image(image)
        asked = {"everything": everything, "points": points, "boxes": boxes, "text": text}
        sources = _regions_of(image, name, masks, segmenter, asked)
        masks = [load_mask(region, image.size) for region in sources]

        # What each region is asked, and the text it fills, as lists of one image.
        prompts = instruction
        if questions is not None:
            if isinstance(questions, str):
                raise ValueError("expected a list of questions, one for each region, got a text")
            prompts = [[instruction if one is None else one for one in questions]]
        if isinstance(template, (list, tuple)):
            template = [list(template)]

        output, seconds = self._generate(
            callback,
            len(masks),
            options,
            images=image,
            masks=masks,
            prompts=prompts,
            template=template,
        )

        return RegionCaptions(
            image=image,
            regions=Region.each(
                output.texts[0],
                masks,
                output.scores[0],
                output.fields and output.fields[0],
                sources,
            ),
            num_forwards=output.num_forwards,
            tokens_per_forward=output.tokens_per_forward,
            seconds=seconds,
            history=[self.partial_texts(step[0], len(masks)) for step in output.history],
        )

    def ask(
        self,
        image,
        questions: str | Sequence[str],
        *,
        template=None,
        callback=None,
        **options,
    ) -> Answers:
        """Answers one question, or several at once, about one image.

        Args:
            image, callback: as for captions.
            questions: one text, or a list of them.
            template: as for captions; a list has one for each question.
            options: decoding options over those of the captioner.
        """
        questions = [questions] if isinstance(questions, str) else list(questions)
        image = load_image(image)

        images = [image] if len(questions) == 1 else [[image] for _ in questions]
        output, seconds = self._generate(
            callback,
            len(questions),
            options,
            images=images,
            prompts=questions,
            template=template,
        )
        return Answers(
            image=image,
            questions=questions,
            answers=[texts[0] for texts in output.texts],
            num_forwards=output.num_forwards,
            tokens_per_forward=output.tokens_per_forward,
            seconds=seconds,
            history=[self.partial_texts(_flat(rows), len(questions)) for rows in output.history],
            scores=_flat(output.scores),
            fields=output.fields and _flat(output.fields),
        )

    def stream(
        self,
        image,
        masks: Sequence | None = None,
        question: str | Sequence[str] | None = None,
        **options,
    ) -> Iterator[Step]:
        """Yields a `Step` after each denoising step, then one that carries the result.

        Denoising waits for the reader, and ends when the iterator is closed.
        """
        has_regions = masks is not None or any(name in options for name in REGION_PROMPTS)
        if has_regions == (question is not None):
            raise ValueError("expected either masks or a question to stream, got both or neither")
        if has_regions:
            return _steps(lambda callback: self(image, masks, callback=callback, **options))
        return _steps(lambda callback: self.ask(image, question, callback=callback, **options))

    def _generate(self, callback, count: int, options: dict, **inputs):
        """Returns the output of one run and its seconds; `callback` gets a `Step` for each step."""
        for name, neutral in UNHELD.items():
            if options.get(name, self.options.get(name)) not in (None, neutral):
                raise ValueError(
                    f"expected no {name}, which results of RegionCaptioner do not hold, got"
                    f" {options.get(name)!r}: model.diffusion_generate gives it"
                )
        numbers = itertools.count(1)  # the model's own start again with each batch of groups

        def on_step(_, token_ids: list):
            rows = token_ids[0] if "masks" in inputs else _flat(token_ids)
            callback(Step(next(numbers), self.partial_texts(rows, count)))

        started = time.perf_counter()
        task = "captions" if "masks" in inputs else "answers"
        defaults = self.defaults_for(task, inputs.get("template") is not None)
        output = self.model.diffusion_generate(
            **inputs,
            processor=self.processor,
            callback=on_step if callback else None,
            **merge_options(defaults, options, task),
        )
        return output, time.perf_counter() - started

    def partial_texts(self, rows: list, count: int) -> list[str]:
        """Returns the texts of `count` half-denoised responses.

        `rows` are their token ids; one not begun yet (None or absent) is a single `MASKED`.
        """
        mask_id = self.model.config.mask_token_id
        rows = rows + [None] * (count - len(rows))
        return [
            MASKED if ids is None else partial_text(self.processor, ids, mask_id) for ids in rows
        ]


def _regions_of(image, name: str, masks, segmenter, asked: dict) -> list[RegionMask]:
    """Returns the regions that were given, or that a segmenter finds for what is asked."""
    given = [
        name for name in REGION_PROMPTS if asked[name] is not None and asked[name] is not False
    ]
    if masks is not None and (given or segmenter is not None):
        names = " and ".join(given or ["a segmenter"])
        raise ValueError(f"expected masks or {names}, got both")
    if masks is None and not given:
        raise ValueError(f"expected masks, or one of {', '.join(REGION_PROMPTS)}, got none")
    if masks is None:
        return list(find_regions(image, segmenter, **asked))
    return load_regions(masks, image.size, name=name)


def partial_text(processor, ids: Sequence[int], mask_token_id: int) -> str:
    """Returns a half-denoised response's text up to its end of turn.

    `MASKED` stands for each masked position.
    """
    stops = {processor.eot_token_id, processor.tokenizer.eos_token_id}
    words, run = [], []
    for token in ids:
        if token in stops:
            break
        if token == mask_token_id:
            words += [processor.decode_answer(run), MASKED]
            run = []
        else:
            run.append(token)
    return " ".join(filter(None, [*words, processor.decode_answer(run)]))


class _Closed(Exception):
    """Ends a run whose reader has gone."""


def _steps(run: Callable[[Callable[[Step], None]], RegionCaptions | Answers]) -> Iterator[Step]:
    """Turns a run that calls back into an iterator over its steps.

    The run has a thread of its own and is one step ahead of the reader at most.
    """
    items: queue.Queue = queue.Queue(maxsize=1)
    closed = threading.Event()

    def put(item):
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return items.put(item, timeout=0.05)
        raise _Closed

    def work():
        with contextlib.suppress(_Closed):
            try:
                outcome = run(put)
            except Exception as error:
                outcome = error
            put(outcome)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        number = 0
        while isinstance(item := items.get(), Step):
            number = item.number
            yield item
        if isinstance(item, Exception):
            raise item
        texts = item.captions if isinstance(item, RegionCaptions) else item.answers
        yield Step(number, texts, item)
    finally:
        closed.set()
        thread.join()


def _flat(rows: list) -> list:
    """Returns one answer for each question, of rows of one answer."""
    return [row[0] for row in rows]
