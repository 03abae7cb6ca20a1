"""Fits TRL's SFTTrainer with the diffusion loss. Needs `pip install trl`.

TRL's own trainer computes next-token probabilities from the decoder's states, which are no loss of
a diffusion model: with it, training stops at its first step.
"""

from transformers import Trainer
from trl import SFTConfig, SFTTrainer
from trl.data_utils import prepare_multimodal_messages

from ..processing_perceptiondlm import PerceptionDLMProcessor

COLUMNS = ("messages", "prompt", "completion", "image", "images")

# Options of SFTConfig that have no meaning for this loss, and what they may be.
NEUTRAL = {
    "packing": (False,),
    "padding_free": (False, None),
    "assistant_only_loss": (False,),
    "completion_only_loss": (None, True),
    "loss_type": ("nll",),
    "label_smoothing_factor": (0.0,),
    "dataset_text_field": ("text",),
    "pad_to_multiple_of": (None,),
    "chat_template_path": (None,),
}


class DiffusionSFTTrainer(SFTTrainer):
    """Fine-tunes on TRL's conversational data: each row's last assistant message is learned.

    Rows hold `messages`, or `prompt` and `completion` (lists of messages, or texts in which the
    processor's image token stands for each image), and `images` or `image` where there are some.

    Args:
        model: a `PerceptionDLMForConditionalGeneration`, or its path.
        processing_class: its processor.
        args: an `SFTConfig`; rows of more than `max_length` tokens are refused, none is cut.
        options: SFTTrainer's others, but `data_collator`, `formatting_func`, `compute_metrics` and
            `compute_loss_func`, which this trainer has no use for.

    Raises ValueError for options that it does not honor.
    """

    def __init__(
        self,
        model,
        args: SFTConfig | None = None,
        *,
        processing_class: PerceptionDLMProcessor,
        **options,
    ):
        args = args or SFTConfig()
        expect_honored(args, options)
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        collator = ConversationCollator(processing_class, args.max_length)
        super().__init__(
            model, args, data_collator=collator, processing_class=processing_class, **options
        )

    def _set_signature_columns_if_needed(self):
        self._signature_columns = list(COLUMNS)

    def compute_loss(self, *args, **kwargs):
        """Computes the model's own loss, not TRL's."""
        return Trainer.compute_loss(self, *args, **kwargs)


def expect_honored(args: SFTConfig, options: dict):
    """Refuses options that would be ignored."""
    for name, values in NEUTRAL.items():
        value = getattr(args, name, values[0])
        if value not in values:
            raise ValueError(
                f"expected {name} {values[0]!r} with the diffusion loss, got {value!r}"
            )
    for name in ("data_collator", "formatting_func", "compute_metrics", "compute_loss_func"):
        if options.get(name) is not None:
            raise ValueError(f"expected no {name} with the diffusion loss, got {options[name]!r}")


class ConversationCollator:
    """Makes a batch, with labels on the responses alone, of rows of TRL's conversational data."""

    def __init__(self, processor: PerceptionDLMProcessor, max_length: int | None):
        self.processor = processor
        self.max_length = max_length

    def __call__(self, rows: list[dict]):
        prompts, responses, images = zip(*map(self._read, rows), strict=True)
        return self.processor(
            [list(own) for own in images] if any(images) else None,
            text=list(prompts),
            answers=list(responses),
            max_length=self.max_length,
        )

    def _read(self, row: dict) -> tuple[str, str, list]:
        """Returns the rendered prompt, the response and the images of a row."""
        images = [row["image"]] if "image" in row else list(row.get("images") or [])
        if row.get("messages") is not None:
            prompt, response = row["messages"][:-1], row["messages"][-1:]
        elif row.get("prompt") is not None and row.get("completion") is not None:
            prompt, response = row["prompt"], row["completion"]
        else:
            raise ValueError(
                f"expected rows with messages, or with prompt and completion, got {sorted(row)}"
            )
        if isinstance(prompt, str) and isinstance(response, str):
            return prompt, response.removesuffix(self.processor.eot_token), images

        messages = prepare_multimodal_messages(prompt, images)
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return text, _response_of(response), _images_of(messages)


def _response_of(messages: list[dict]) -> str:
    """Returns the text of the one assistant message."""
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        raise ValueError(f"expected one assistant message at a row's end, got roles {roles}")
    content = messages[0]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    kinds = {part["type"] for part in parts}
    if kinds != {"text"}:
        raise ValueError(f"expected a response of text alone, got {sorted(kinds)}")
    return "".join(part["text"] for part in parts)


def _images_of(messages: list[dict]) -> list:
    """Returns the images in messages, in their order."""
    parts = [part for message in messages for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]
