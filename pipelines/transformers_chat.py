"""Asks a chat model that transformers loads by id, in this process, as an endpoint is asked."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..common.option_checks import expect_positive
from .endpoint import Failure
from .records import without_loaded


@dataclass(frozen=True)
class TransformersOptions:
    """Which model answers, and how."""

    model: str = ""  # folder or Hub id; no code of its repository is run
    device: str | None = None  # none: the accelerator, else the CPU
    dtype: str = "auto"
    batch_size: int = 8
    # Options of `generate`.
    generate: dict[str, Any] = field(
        default_factory=lambda: {"max_new_tokens": 256, "do_sample": False}
    )

    def __post_init__(self):
        if not self.model:
            raise ValueError("expected a model's folder or Hub id, got none")
        expect_positive("batch_size", self.batch_size)


class TransformersChat:
    """A chat model of transformers that answers lists of conversations, in order.

    Args:
        options: which model.
        task: "image-text-to-text", or "text-generation" for conversations of text alone.

    It is pickled with its options alone.
    """

    def __init__(self, options: TransformersOptions, task: str = "image-text-to-text"):
        self.options = options
        self.task = task

    __getstate__ = without_loaded

    @cached_property
    def _pipeline(self):
        import transformers

        return transformers.pipeline(
            self.task,
            model=self.options.model,
            device=self.options.device,
            dtype=self.options.dtype,
            trust_remote_code=False,
        )

    def __call__(self, conversations: list[list[dict]]) -> list[str | Failure]:
        """Returns the text of each answer."""
        if not conversations:
            return []
        chats = [[_own_form(message) for message in messages] for messages in conversations]
        options = {"batch_size": self.options.batch_size, "return_full_text": False}
        if self.task == "text-generation":
            answers = self._pipeline(chats, **options, **self.options.generate)
        else:  # which takes other options of `generate` for the processor's
            answers = self._pipeline(text=chats, **options, generate_kwargs=self.options.generate)
        found = [answer[0] if isinstance(answer, list) else answer for answer in answers]
        return [answer["generated_text"] for answer in found]


def _own_form(message: dict) -> dict:
    """Turns the images of an endpoint's message into those of transformers' chat templates."""
    if isinstance(message["content"], str):
        return message
    parts = [
        {"type": "image", "url": part["image_url"]["url"]} if part["type"] == "image_url" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}
