"""Builds the model and processor of a recipe: from a checkpoint, or from scratch."""

import inspect
import itertools
import logging

import torch
from transformers import set_seed

from ..common.loading import load_model, load_tokenizer
from ..common.special_tokens import IMAGE_TOKENS, token_ids
from ..configuration_perceptiondlm import PerceptionDLMConfig
from ..generation_generate import take_defaults
from ..modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from ..processing_perceptiondlm import PerceptionDLMProcessor
from ..scenes.concepts import CONCEPTS
from ..scenes.shapes import iter_corpus
from ..scenes.thing_language import LABEL_INSTRUCTION, iter_thing_corpus
from .recipe import Recipe
from .recipe_sections import ModelRecipe, SyntheticData
from .starting_values import start_locally, zero_residuals
from .tokenizer import train_tokenizer

NAME_INTERVAL = 4  # scenes whose text has each name once more, for the tokenizer

logger = logging.getLogger(__name__)


def build_model(recipe: Recipe, device: torch.device | None = None):
    """Builds the model of a recipe, in training precision, and its processor.

    Quantized weights are made for the `device` they are trained on (None: the CPU), where the
    trainer moves all others later.
    """
    set_seed(recipe.trainer.get("seed", 42))

    if recipe.model.checkpoint is None:
        model, processor = _from_scratch(recipe)
    else:
        model, processor = load_model(
            recipe.model.checkpoint,
            recipe.model.subfolder,
            getattr(torch, recipe.model.dtype),
            attn_implementation=recipe.model.attn_implementation,
            device=None if recipe.model.quantize is None else device,
            config_fields=recipe.model.config,
            quantize=recipe.model.quantize,
        )

    if recipe.model.max_tiles is not None:
        processor.image_processor.max_tiles = recipe.model.max_tiles
    count = sum(parameter.numel() for parameter in model.parameters())
    logger.info("model with %.2f M parameters, %d tokens", count / 1e6, len(processor.tokenizer))
    return model, processor


def _from_scratch(recipe: Recipe):
    """Builds a model with fresh weights, and a processor of its config."""
    tokenizer = _tokenizer(recipe.model, recipe.data)
    config = fresh_config(recipe.model.config, tokenizer, recipe.data)
    processor = PerceptionDLMProcessor.from_config(config, tokenizer)
    if recipe.model.attn_implementation is not None:
        config._attn_implementation = recipe.model.attn_implementation
    model = PerceptionDLMForConditionalGeneration(config)
    take_defaults(config)  # they are saved as the model's `generation_config`
    if recipe.model.zero_residuals:
        zero_residuals(model)
    if recipe.model.local_layers:
        start_locally(model, recipe.model.local_layers)
    return model.to(getattr(torch, recipe.model.dtype)), processor


def fresh_config(fields: dict, tokenizer, data) -> PerceptionDLMConfig:
    """Builds a config for a tokenizer, with the data's slots as decoding lengths."""
    text = {"vocab_size": len(tokenizer), **fields.get("text_config", {})}
    defaults = {}
    if isinstance(data, SyntheticData):
        lengths = ("caption_length", "max_new_tokens")
        defaults = {name: getattr(data, name) for name in lengths}
    return PerceptionDLMConfig(
        **{
            **token_ids(tokenizer, IMAGE_TOKENS),
            **fields,
            "text_config": text,
            "generation_defaults": {**defaults, **fields.get("generation_defaults", {})},
        }
    )


def _tokenizer(recipe: ModelRecipe, data):
    """Loads the recipe's tokenizer, or trains one on the texts of synthetic scenes."""
    if recipe.tokenizer is not None:
        return load_tokenizer(recipe.tokenizer)

    defaults = inspect.signature(PerceptionDLMProcessor).parameters
    prompts = [defaults[name].default for name in ("system_prompt", "region_instruction")]
    frame = [*prompts, "system\n", "user\n", "assistant\n"] * (recipe.tokenizer_scenes // 10 + 1)
    is_things = isinstance(data, SyntheticData) and data.scene_kind == "things"
    corpus = iter_thing_texts if is_things else iter_corpus
    corpus = itertools.chain(frame, corpus(recipe.tokenizer_scenes))
    return train_tokenizer(corpus, recipe.vocab_size)


def iter_thing_texts(count: int):
    """Yields the texts of `count` scenes of things, as they are drawn for training."""
    from ..scenes.things import render_thing_scene  # needs what draws things

    yield from [LABEL_INSTRUCTION] * count
    # A name is a label's first word, and follows a space elsewhere; both are to be whole tokens.
    for concept in CONCEPTS:
        yield from [concept.name, f" {concept.name}"] * (count // NAME_INTERVAL)
    scenes = (render_thing_scene(seed) for seed in range(count))
    yield from iter_thing_corpus([[thing.facts for thing in scene.things] for scene in scenes])
