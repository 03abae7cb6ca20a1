"""Adds LoRA adapters to the language model, with the small modules trained whole beside them."""

import warnings

from transformers import PreTrainedModel

from ..common.extras import extra
from .recipe_sections import LoraRecipe

# the decoder's projections; the vision tower's have the same names, so the path is part of it
TARGETS = (
    r".*language_model\.model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)


def default_modules_to_save(model: PreTrainedModel) -> list[str]:
    """Returns the connector and, where there are some, the region prompts."""
    return ["connector", *(["region_prompts"] if model.region_prompts is not None else [])]


def lora_config(model: PreTrainedModel, recipe: LoraRecipe):
    """Builds PEFT's config of a recipe."""
    with extra("train"):
        from peft import LoraConfig

    saved = recipe.modules_to_save
    return LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=recipe.target_modules or TARGETS,
        modules_to_save=default_modules_to_save(model) if saved is None else saved,
    )


def add_adapter(model: PreTrainedModel, recipe: LoraRecipe):
    """Returns the model as a `PeftModel` in which only the adapter and its whole modules learn."""
    with extra("train"):
        from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT asks for a property by its old name; nobody here can change that
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, lora_config(model, recipe))
