"""Makes tiny LLaDA-V models of many shapes, with loud random weights."""

import functools

import torch
from conftest import TEXT, VISION, randomize
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor

# 8 cells a side; 7; and 4, where two pixels of a tile belong to no patch.
VISION_SHAPES = {
    "even": {},
    "odd": {"image_size": 28, "patch_size": 4},
    "ragged": {"image_size": 30, "patch_size": 7},
}


def maker(load):
    """Gives a function that makes a model and its processor; equal calls share a pair.

    Tokenizer, template and special tokens are the recorded checkpoint's.
    """
    recorded, saved = load("released-llava")

    @functools.cache
    def make(seed: int = 0, shape: str = "even", grouped: bool = False, most: int = 4, loud=()):
        """`most`: `anyres_max_tiles`; `loud`: names of token ids whose logits are large."""
        fields = recorded.config.to_dict()
        text = TEXT | {"vocab_size": fields["text_config"]["vocab_size"]}
        fields |= {
            "text_config": text | ({"num_key_value_heads": 2} if grouped else {}),
            "vision_config": VISION | VISION_SHAPES[shape],
            "anyres_max_tiles": most,
        }
        config = PerceptionDLMConfig.from_dict(fields)
        model = PerceptionDLMForConditionalGeneration(config).eval()
        model.generation_config = recorded.generation_config
        randomize(model, seed)
        with torch.no_grad():
            for name in loud:
                model.get_output_embeddings().weight[getattr(config, name)] *= 2.5
        options = {"chat_template": saved.chat_template, "image_token": saved.image_token}
        return model, PerceptionDLMProcessor.from_config(config, saved.tokenizer, **options)

    return make


def deviation(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference over the largest magnitude."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())
