"""Holds a checkpoint in this package's terms, and checks it whole before anything is written."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import GenerationConfig

from ..common.loading import CheckpointError
from ..common.special_tokens import IMAGE_TOKENS, NAMED_TOKENS
from ..configuration_perceptiondlm import PerceptionDLMConfig
from ..modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from ..processing_perceptiondlm import PerceptionDLMProcessor
from .files import MissingTensor, UnknownTensor, WrongShape
from .layouts import Origin

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


@dataclass
class Source:
    """A checkpoint in this package's terms; `origins` has each of the model's tensors by name."""

    config: PerceptionDLMConfig
    processor: PerceptionDLMProcessor
    origins: dict[str, Origin]
    generation_config: GenerationConfig | None = None  # None: what the config says

    @cached_property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the language model."""
        return self.origins[EMBEDDING].load().dtype

    def check(self):
        """Raises unless names, shapes and token ids are exactly what the config's model has."""
        expected = model_shapes(self.config)
        if self.config.tie_word_embeddings:
            self.origins.pop(HEAD, None)

        missing = sorted(expected.keys() - self.origins.keys())
        if missing:
            raise MissingTensor(
                f"expected a tensor for each of the model's, got none for {few(missing)}"
            )

        extra = sorted(self.origins[name].name for name in self.origins.keys() - expected.keys())
        if extra:
            raise UnknownTensor(f"expected only the model's tensors, got also {few(extra)}")

        wrong = [
            f"{origin.name} of {list(origin.shape)} (expected {list(expected[target])})"
            for target, origin in self.origins.items()
            if origin.shape != expected[target]
        ]
        if wrong:
            raise WrongShape(f"expected shapes as in the config, got {few(wrong)}")
        expect_ids_in_vocabulary(self.config)


def model_shapes(config: PerceptionDLMConfig) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the tensors that a checkpoint of this config holds."""
    with torch.device("meta"):
        model = PerceptionDLMForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def expect_ids_in_vocabulary(config: PerceptionDLMConfig):
    """Refuses special tokens without a row in the embedding."""
    rows = config.text_config.vocab_size
    single = [getattr(config, name) for name in (*NAMED_TOKENS, *IMAGE_TOKENS, "pad_token_id")]
    ids = [i for i in (*single, *config.roi_token_ids, *config.caption_token_ids) if i is not None]
    if max(ids) >= rows:
        raise WrongShape(
            f"expected token ids under the {rows} rows of the embedding, got {max(ids)}"
        )


def few(items: list[str]) -> str:
    """Lists the first items, and says how many more there are."""
    rest = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(items[:4]) + rest


def expect_unquantized(settings: dict, folder: Path):
    """Refuses a checkpoint whose weights are quantized: their scales have no place in another."""
    if (quantization := settings.get("quantization_config")) is not None:
        raise CheckpointError(
            f"expected weights that are not quantized in {folder}, got"
            f" {quantization.get('quant_method', quantization)!r}: convert the original, and"
            " quantize while loading it"
        )


def expect_no(name: str, value, why: str):
    """Refuses an option that a source has no use for."""
    if value is not None:
        raise CheckpointError(f"expected no {name} with {why}, got {str(value)!r}")
