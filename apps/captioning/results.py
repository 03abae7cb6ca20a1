"""Holds what captioning gives: regions with captions, answers, and the steps on the way there."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ...regions.region_mask import RegionMask

MASKED = "░"  # stands for a position that is still to be filled


@dataclass(frozen=True)
class Region:
    """One region and its caption.

    Attributes:
        number: 1, 2, ... in the order the masks were given.
        caption: what the model says about it.
        box: (x0, y0, x1, y1) in pixels, half-open.
        area: non-zero pixels of the mask.
        mask: 8-bit image of the image's size, non-zero inside.
        score: how sure the model is: the mean log-probability of the caption's tokens, in nats;
            None where no token was denoised.
        fields: the values of a template's fields; None without one.
        label, source_score: what the region's source says about it, None where it says nothing.
    """

    number: int
    caption: str
    box: tuple[int, int, int, int]
    area: int
    mask: Image.Image = field(repr=False, compare=False)
    score: float | None = field(default=None, compare=False)
    fields: list | dict | None = None
    label: str | None = None
    source_score: float | None = None

    @classmethod
    def each(
        cls,
        captions: Sequence[str],
        masks: Sequence[Image.Image],
        scores: Sequence[float | None] | None = None,
        fields: Sequence[list | dict] | None = None,
        sources: Sequence[RegionMask] | None = None,
    ) -> "list[Region]":
        """Returns the regions of masks, as `load_mask` gives them, with their captions.

        What `sources` say about them, their labels and scores, is kept.
        """
        nothing = [None] * len(masks)
        said = [(one.label, one.score) for one in sources or ()] or [(None, None)] * len(masks)
        found = zip(captions, masks, scores or nothing, fields or nothing, said, strict=True)
        return [
            cls(k, text, mask.getbbox(), mask_area(mask), mask, score, own, *labeled)
            for k, (text, mask, score, own, labeled) in enumerate(found, 1)
        ]

    def to_dict(self) -> dict:
        """Returns everything but the mask, ready for JSON; a label and score if it has them."""
        said = {"label": self.label, "source_score": self.source_score}
        return {
            "region": self.number,
            "caption": self.caption,
            "box": list(self.box),
            "area": self.area,
            **_sureness(self.score, self.fields),
            **{name: value for name, value in said.items() if value is not None},
        }


@dataclass(frozen=True)
class RegionCaptions:
    """The captions of one image's regions; prints as a numbered list.

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
        """Draws the image with its regions and captions; options as for `draw_regions`."""
        from .drawing import draw_regions

        return draw_regions(self.image, [r.mask for r in self.regions], self.captions, **options)

    def _repr_html_(self) -> str:
        """Shows the image and the texts in a notebook."""
        from .notebook import captions_html

        return captions_html(self)

    def _repr_png_(self) -> bytes:
        """Shows the drawing where there is no HTML."""
        from .drawing import encode_image

        return encode_image(self.draw(), ".png")

    def to_dict(self) -> dict:
        """Returns size, regions and cost, ready for JSON."""
        return {
            "width": self.image.width,
            "height": self.image.height,
            "regions": [region.to_dict() for region in self.regions],
            **_cost(self),
        }


@dataclass(frozen=True)
class Answers:
    """The answers to questions about one image; prints as questions and answers.

    `scores` and `fields` are those of each answer, as a `Region` has them; None where unknown.
    """

    image: Image.Image = field(repr=False, compare=False)
    questions: list[str]
    answers: list[str]
    num_forwards: int
    tokens_per_forward: float
    seconds: float
    history: list[list[str]] = field(default_factory=list, repr=False)
    scores: list[float | None] | None = field(default=None, compare=False)
    fields: list[list | dict] | None = None

    def __str__(self) -> str:
        pairs = zip(self.questions, self.answers, strict=True)
        return "\n".join(f"{question}\n  {answer}" for question, answer in pairs)

    def draw(self, **options) -> Image.Image:
        """Draws the image with questions and answers; options as for `draw_answers`."""
        from .drawing import draw_answers

        return draw_answers(self.image, self.questions, self.answers, **options)

    def _repr_html_(self) -> str:
        """Shows the image and the texts in a notebook."""
        from .notebook import answers_html

        return answers_html(self)

    def _repr_png_(self) -> bytes:
        """Shows the drawing where there is no HTML."""
        from .drawing import encode_image

        return encode_image(self.draw(), ".png")

    def entries(self) -> list[dict]:
        """Returns each question with its answer, score and fields, ready for JSON."""
        nothing = [None] * len(self.answers)
        found = zip(
            self.questions,
            self.answers,
            self.scores or nothing,
            self.fields or nothing,
            strict=True,
        )
        return [{"question": q, "answer": a, **_sureness(s, own)} for q, a, s, own in found]

    def to_dict(self) -> dict:
        """Returns size, answers and cost, ready for JSON."""
        return {
            "width": self.image.width,
            "height": self.image.height,
            "answers": self.entries(),
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
        """Returns all of it, ready for JSON."""
        result = None if self.result is None else self.result.to_dict()
        return {"step": self.number, "texts": self.texts, "result": result}


def mask_area(mask: Image.Image) -> int:
    """Returns how many pixels of an 8-bit mask are not zero."""
    return int(np.count_nonzero(np.asarray(mask)))  # a tenth of the time of PIL's histogram


def _sureness(score: float | None, fields: list | dict | None) -> dict:
    """Returns a response's score and, with a template, its fields, ready for JSON."""
    said: dict = {"score": None if score is None else round(score, 4)}
    return said if fields is None else said | {"fields": fields}


def _cost(result) -> dict:
    return {
        "num_forwards": result.num_forwards,
        "tokens_per_forward": round(result.tokens_per_forward, 3),
        "seconds": round(result.seconds, 3),
    }
