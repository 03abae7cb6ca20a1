"""Tells with our own model, shown the region itself, whether a caption is of a given category."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..common.option_checks import expect_share
from .captioners import Asked, load_own
from .categories import VerifyCategories, checked_prompt
from .endpoint import Failure
from .records import Record, mask_of, open_images, without_loaded

QUESTION = """\
This object was described so: {caption}

Is that likely the description of an object of the category "{category}", or of a part or kind of \
it? Answer Yes or No alone."""


@dataclass(frozen=True)
class ModelVerification:
    """Captions and categories compared by a checkpoint of this package, which sees the region."""

    checkpoint: str = ""  # folder or Hub id
    subfolder: str | None = None
    device: str | None = None  # none: the accelerator, else the CPU
    dtype: str = "auto"
    quantize: str | None = None
    prompt: str = QUESTION  # with {caption} and {category}
    answers: list[str] = field(default_factory=lambda: ["Yes", "No"])  # that are compared
    min_yes: float = 0.5  # probability of the first answer, of the two

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("expected verifier.checkpoint, a folder or Hub id, got none")
        checked_prompt(self.prompt, "caption", "category")
        if len(set(self.answers)) != 2 or not all(isinstance(a, str) for a in self.answers):
            raise ValueError(f"expected verifier.answers as two texts, got {self.answers}")
        expect_share("verifier.min_yes", self.min_yes)


Pairs = list[tuple[str, str]]  # caption and category


class ModelVerifier:
    """Asks each region its own question, and compares how likely the answers Yes and No are.

    So there is always an answer, and it depends on nothing drawn at random.
    """

    def __init__(self, options: ModelVerification):
        self.options = options

    __getstate__ = without_loaded

    @cached_property
    def _loaded(self) -> tuple:
        return load_own(self.options)

    def __call__(self, asked: Asked, pairs: list[Pairs]) -> list[list[bool | Failure]]:
        """Tells of each region; where a batch is refused, of each of its images by itself."""
        loaded = self._loaded  # a checkpoint that cannot be used ends the run
        try:
            return self._verdicts(asked, pairs, *loaded)
        except ValueError as error:
            if len(asked) > 1:
                return [
                    own
                    for one, texts in zip(asked, pairs, strict=True)
                    for own in self([one], [texts])
                ]
            return [[Failure(str(error)) for _ in texts] for texts in pairs]

    def _verdicts(self, asked: Asked, pairs: list[Pairs], model, processor) -> list[list]:
        prompt, answers = self.options.prompt, self.options.answers
        questions = [
            [prompt.format(caption=caption, category=category) for caption, category in texts]
            for texts in pairs
        ]

        scores = model.diffusion_score(
            [image for image, _ in asked],
            [masks for _, masks in asked],
            [[answers] * len(texts) for texts in pairs],
            prompts=questions,
            method="one_pass",
            length=0,
            processor=processor,
        )
        return [[self._is_yes(score) for score in own] for own in scores]

    def _is_yes(self, scores: Sequence[float]) -> bool:
        yes = torch.tensor(scores, dtype=torch.float64).softmax(0)[0].item()
        return yes >= self.options.min_yes


class VerifyRegions(VerifyCategories):
    """Drops the regions whose caption is not of their category, by a verifier that sees them.

    Rules: those of `VerifyCategories`, and "image" where it cannot be read.
    """

    def __init__(self, verifier: ModelVerifier):
        self.verifier = verifier

    def _answers(self, records: list[Record]) -> Iterator[bool | Failure]:
        opened = open_images(records, self.name)
        asked = [(image, [mask_of(region) for region in r.regions]) for r, image in opened]
        pairs = [[(x.caption, x.category) for x in record.regions] for record, _ in opened]
        found = self.verifier(asked, pairs) if asked else []
        return (answer for answers in found for answer in answers)
