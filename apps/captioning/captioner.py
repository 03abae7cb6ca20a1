"""A model and its processor in one object: caption regions, answer questions, watch it happen.

captioner = RegionCaptioner.from_pretrained("owner/name")
result = captioner("photo.jpg", masks=["cup.png", {"box": [10, 20, 200, 180]}])
print(result)                         # numbered captions
result.draw().save("captioned.png")   # colored regions and their captions
for step in captioner.stream("photo.jpg", masks=["cup.png"]):
    print(step)                       # captions as they appear
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from ...conversion.files import expect_checkpoint
from ...generation_options import DiffusionOptions, options_for
from ...image_processing_perceptiondlm import load_image, load_mask
from ...modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from ...processing_perceptiondlm import PerceptionDLMProcessor

MASKED = "░"  # stands for a position that is still to be filled
EMBEDDED = Path(os.path.abspath(__file__)).parents[2]  # the repository's or package's root
EMBEDDED_SUBFOLDER = "tiny"


@dataclass(frozen=True)
class Region:
    """One region and its caption.

    Attributes:
        number: 1, 2, ... in the order the masks were given.
        caption: what the model says about it.
        box: (x0, y0, x1, y1) in pixels, half-open.
        area: non-zero pixels of the mask.
        mask: 8-bit picture of the image's size, non-zero inside.
    """

    number: int
    caption: str
    box: tuple[int, int, int, int]
    area: int
    mask: Image.Image = field(repr=False, compare=False)

    def to_dict(self) -> dict:
        """Everything but the mask, ready for JSON."""
        return {
            "region": self.number,
            "caption": self.caption,
            "box": list(self.box),
            "area": self.area,
        }


@dataclass(frozen=True)
class RegionCaptions:
    """The captions of one picture's regions; prints as a numbered list.

    `num_forwards` counts denoising forward passes, `tokens_per_forward` is the caption tokens,
    padding counted, over them, `seconds` the time from pixels to text. `history` holds, on
    request, the captions after each step.
    """

    image: Image.Image = field(repr=False, compare=False)
    regions: list[Region]
    num_forwards: int
    tokens_per_forward: float
    seconds: float
    history: list[list[str]] = field(default_factory=list, repr=False)

    @property
    def captions(self) -> list[str]:
        """The captions in the order of the masks."""
        return [region.caption for region in self.regions]

    def __str__(self) -> str:
        width = len(str(len(self.regions)))
        return "\n".join(f"{r.number:>{width}}  {r.caption}" for r in self.regions)

    def draw(self, **options) -> Image.Image:
        """The picture with its regions and captions; options as for `draw_regions`."""
        from .drawing import draw_regions

        return draw_regions(self.image, [r.mask for r in self.regions], self.captions, **options)

    def to_dict(self) -> dict:
        """Size, regions and cost, ready for JSON."""
        return {
            "width": self.image.width,
            "height": self.image.height,
            "regions": [region.to_dict() for region in self.regions],
            **_cost(self),
        }


@dataclass(frozen=True)
class Answers:
    """The answers to questions about one picture; prints as questions and answers."""

    image: Image.Image = field(repr=False, compare=False)
    questions: list[str]
    answers: list[str]
    num_forwards: int
    tokens_per_forward: float
    seconds: float
    history: list[list[str]] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        pairs = zip(self.questions, self.answers, strict=True)
        return "\n".join(f"{question}\n  {answer}" for question, answer in pairs)

    def draw(self, **options) -> Image.Image:
        """The picture with questions and answers; options as for `draw_answers`."""
        from .drawing import draw_answers

        return draw_answers(self.image, self.questions, self.answers, **options)

    def to_dict(self) -> dict:
        """Size, answers and cost, ready for JSON."""
        pairs = zip(self.questions, self.answers, strict=True)
        return {
            "width": self.image.width,
            "height": self.image.height,
            "answers": [{"question": q, "answer": a} for q, a in pairs],
            **_cost(self),
        }


@dataclass(frozen=True)
class Step:
    """The texts after one denoising step, `MASKED` where a token is still to come.

    `number` counts from 1. A stream ends with one `Step` more that repeats the last one's number
    and carries the `result`.
    """

    number: int
    texts: list[str]
    result: RegionCaptions | Answers | None = field(default=None, repr=False)

    def __str__(self) -> str:
        lines = [f"{i:>4}  {text}" for i, text in enumerate(self.texts, 1)]
        return "\n".join([f"step {self.number}", *lines])

    def to_dict(self) -> dict:
        """Ready for JSON."""
        result = None if self.result is None else self.result.to_dict()
        return {"step": self.number, "texts": self.texts, "result": result}


class RegionCaptioner:
    """Captions regions of pictures and answers questions about them.

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
        **options,
    ) -> "RegionCaptioner":
        """Loads a checkpoint from a folder or the Hub; without `source`, the embedded one.

        The weights are loaded into this package's own classes: no code of the checkpoint's
        repository is run. `device` defaults to the first GPU, else the CPU.

        Raises as `expect_checkpoint`.
        """
        if source is None:
            source, subfolder = EMBEDDED, EMBEDDED_SUBFOLDER
            if not (source / subfolder / "config.json").is_file():
                raise FileNotFoundError(
                    f"expected the embedded checkpoint in {source / subfolder}, found none:"
                    " name a folder or a Hub id"
                )
        place = {"revision": revision, "token": token}
        if subfolder:
            place["subfolder"] = subfolder
        expect_checkpoint(source, **place)
        model = PerceptionDLMForConditionalGeneration.from_pretrained(source, dtype=dtype, **place)
        processor = PerceptionDLMProcessor.from_pretrained(source, **place)
        return cls(model.to(device or default_device()).eval(), processor, **options)

    def check_options(self):
        """Raises ValueError for decoding options that no picture could be decoded with."""
        DiffusionOptions.build(self.model.decoding_defaults, self.options)

    def __call__(
        self, image, masks: Sequence, *, instruction: str | None = None, callback=None, **options
    ) -> RegionCaptions:
        """Captions each masked region of one picture, all of them together.

        Args:
            image: a PIL image, path, URL, bytes, array or tensor (see `load_image`).
            masks: one for each region: PIL image, array, path, COCO RLE, `{"box": [x0, y0, x1,
                y1]}` or `{"polygons": [[x0, y0, ...], ...]}` in pixels (see `load_mask`).
            instruction: instead of the checkpoint's own.
            callback: called after each step with a `Step`.
            options: decoding options over those of the captioner (see `DiffusionOptions`);
                `return_history=True` keeps the captions after each step.

        Raises ValueError for a picture, mask or option that does not fit.
        """
        picture = load_image(image)
        regions = [load_mask(mask, picture.size) for mask in masks]
        output, seconds = self._generate(
            callback, len(regions), options, images=picture, masks=regions, prompts=instruction
        )
        return RegionCaptions(
            image=picture,
            regions=[
                Region(k + 1, text, mask.getbbox(), sum(mask.histogram()[1:]), mask)
                for k, (text, mask) in enumerate(zip(output.texts[0], regions, strict=True))
            ],
            num_forwards=output.num_forwards,
            tokens_per_forward=output.tokens_per_forward,
            seconds=seconds,
            history=[self._texts(row, len(regions)) for row in _first_rows(output.history)],
        )

    def ask(self, image, questions: str | Sequence[str], *, callback=None, **options) -> Answers:
        """Answers one question, or several at once, about one picture."""
        questions = [questions] if isinstance(questions, str) else list(questions)
        picture = load_image(image)
        pictures = [picture] if len(questions) == 1 else [[picture] for _ in questions]
        output, seconds = self._generate(
            callback, len(questions), options, images=pictures, prompts=questions
        )
        return Answers(
            image=picture,
            questions=questions,
            answers=[texts[0] for texts in output.texts],
            num_forwards=output.num_forwards,
            tokens_per_forward=output.tokens_per_forward,
            seconds=seconds,
            history=[self._texts(_flat(rows), len(questions)) for rows in output.history],
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
        if (masks is None) == (question is None):
            raise ValueError("expected either masks or a question to stream, got both or neither")
        if masks is not None:
            return _steps(lambda callback: self(image, masks, callback=callback, **options))
        return _steps(lambda callback: self.ask(image, question, callback=callback, **options))

    def _generate(self, callback, count: int, options: dict, **inputs):
        """The output of one run, and its seconds; `callback` gets a `Step` for each step."""
        steps = 0

        def on_step(_, token_ids: list):
            nonlocal steps
            steps += 1  # the model's own count starts again with each batch of passes
            rows = token_ids[0] if "masks" in inputs else _flat(token_ids)
            callback(Step(steps, self._texts(rows, count)))

        started = time.perf_counter()
        task = "captions" if "masks" in inputs else "answers"
        output = self.model.diffusion_generate(
            **inputs,
            processor=self.processor,
            callback=on_step if callback else None,
            **(options_for(task, self.options) | options),
        )
        return output, time.perf_counter() - started

    def _texts(self, rows: list, count: int) -> list[str]:
        """Texts of `count` answers; those not begun yet (None or absent) are one mark."""
        mask_id = self.model.config.mask_token_id
        rows = rows + [None] * (count - len(rows))
        return [
            MASKED if ids is None else partial_text(self.processor, ids, mask_id) for ids in rows
        ]


def partial_text(processor, ids: Sequence[int], mask_token_id: int) -> str:
    """Text of a half-denoised answer, up to its end-of-turn, `MASKED` for each masked position."""
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


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Closed(Exception):
    """The reader of a stream has gone."""


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


def _first_rows(history: list) -> list:
    return [step[0] for step in history]


def _flat(rows: list) -> list:
    """One answer for each question, of rows of one answer."""
    return [row[0] for row in rows]


def _cost(result) -> dict:
    return {
        "num_forwards": result.num_forwards,
        "tokens_per_forward": round(result.tokens_per_forward, 3),
        "seconds": round(result.seconds, 3),
    }
