"""Words what a judge is asked: one chat message per question, with or without images.

The questions, ParaDLC-Bench's recognition question among them, are the benchmarks'. The
instructions around them and the recognition question without an image are worded here. Scores can
be compared only where the wording is the same, so `JudgePrompt.from_file` takes another one.
"""

import hashlib
import string
from dataclasses import dataclass
from pathlib import Path

from ..common.crops import png_data_url
from ..common.json_text import read_text
from .benchmarks import Benchmark, RegionSample
from .scoring import RECOGNITION_CHOICES, Question

MODES = ("image", "text")
PROMPT_VERSION = "perceptiondlm-judge-1"  # to be changed whenever a word below is

TEMPLATE = """\
Judge a description of one object by answering a multiple-choice question about it.
- Answer with exactly one of the choices, as it is written. Do not explain, correct or repeat \
anything else.
- Wording need not match: if no choice fits exactly, take the one that comes closest.

Description:
{caption}

Question:
{question}
"""
# ParaDLC-Bench asks about the class with the image in view; the question in text needs none.
RECOGNITION = {
    "image": (
        "The object in the image is {name}. Based on the image, is it likely that the object in"
        " the description is given class: {name} or object of a similar type?"
    ),
    "text": (
        "Is it likely that the object in the description is of the class {name} or of a similar"
        " type? An exact match is not needed."
    ),
}


@dataclass(frozen=True)
class JudgePrompt:
    """The wording of a judge's questions.

    Attributes:
        mode: "image" shows crops of the image and the region mask, "text" shows nothing.
        template: text with the fields {caption} and {question}.
        version: names the wording in caches and reports.
        recognition: the recognition question, with the field {name}; None for the mode's own.
    """

    mode: str
    template: str = TEMPLATE
    version: str = PROMPT_VERSION
    recognition: str | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"expected mode to be one of {MODES}, got {self.mode!r}")

    @classmethod
    def from_file(cls, path: str | Path, mode: str) -> "JudgePrompt":
        """Reads a wording from a file: a template with {caption} and {question}.

        Above a line of three dashes the file may give the recognition question, with {name}. The
        version is a hash of the content. Raises ValueError for other fields.
        """
        content = read_text(path)
        above, separator, below = content.partition("\n---\n")
        recognition, template = (above.strip(), below) if separator else (None, content)

        _expect_fields(path, template, {"caption", "question"})
        if recognition is not None:
            _expect_fields(path, recognition, {"name"})

        version = "file-" + hashlib.sha256(content.encode()).hexdigest()[:12]
        return cls(mode, template, version, recognition)

    def region_messages(
        self, sample: RegionSample, questions: tuple[Question, ...], caption: str
    ) -> list[list[dict]]:
        """Returns the chat messages of a region's questions, recognition first."""
        recognition = (self.recognition or RECOGNITION[self.mode]).format(name=sample.class_name)
        asked = [(recognition, RECOGNITION_CHOICES), *((q.text, q.choices) for q in questions)]
        shown = _image_parts(sample) if self.mode == "image" else []
        return [self._message(shown, caption, *question) for question in asked]

    def _message(self, shown: list, caption: str, text: str, choices: tuple) -> list[dict]:
        prompt = self.template.format(caption=caption, question=lettered(text, choices))
        content = [*shown, {"type": "text", "text": prompt}] if shown else prompt
        return [{"role": "user", "content": content}]


def _expect_fields(path: str | Path, text: str, expected: set[str]):
    fields = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    if fields != expected:
        wanted = " and ".join(f"{{{name}}}" for name in sorted(expected))
        raise ValueError(f"{path}: expected the fields {wanted}, got {sorted(fields)}")


def lettered(text: str, choices: tuple[str, ...]) -> str:
    """Writes a question and, below it, its choices under the letters A, B, ..."""
    letters = string.ascii_uppercase
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=False)]
    return "\n".join([text, *lines])


def default_mode(benchmark: Benchmark) -> str:
    """Returns the published mode: ParaDLC-Bench shows the judge images, others text alone."""
    return "image" if benchmark.name == "paradlc" else "text"


def _image_parts(sample: RegionSample) -> list[dict]:
    """Returns the parts of a chat message that show a region: the image around it, and its mask."""
    from .crops import region_crops  # needs torch, which text alone does not

    image, mask = region_crops(sample)
    return [
        {"type": "text", "text": "The image around the object:"},
        {"type": "image_url", "image_url": {"url": png_data_url(image)}},
        {"type": "text", "text": "The mask of the object in it:"},
        {"type": "image_url", "image_url": {"url": png_data_url(mask)}},
    ]
