"""Makes very small recipes, and reads off what tests look at in their runs."""

import functools
import tempfile
from pathlib import Path

from perceptiondlm.scenes.shapes import iter_corpus
from perceptiondlm.training.recipe import Recipe, build_recipe
from perceptiondlm.training.tokenizer import train_tokenizer

TINY = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    "num_region_prompts": 8,
    "roi_output_size": 2,
    "roi_convention": "aligned",
    "region_layout": "independent",
    "initializer_range": 0.1,
}


@functools.cache
def small_tokenizer() -> str:
    """Saves a tokenizer to which every word of a scene is one token; returns its folder."""
    folder = tempfile.mkdtemp(prefix="perceptiondlm-tokenizer-")
    train_tokenizer(iter_corpus(100), 512).save_pretrained(folder)
    return folder


def recipe_values(output: Path, **sections) -> dict:
    """Returns a recipe of a few steps as plain values; keywords replace options of sections."""
    values = {
        "model": {"config": TINY, "tokenizer": small_tokenizer(), "max_tiles": 2},
        "data": {"kind": "synthetic", "scenes": 24, "caption_length": 12},
        "masking": {"loss_weighting": "none"},
        "parameters": {},
        "trainer": {
            "output_dir": str(output),
            "max_steps": 4,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "seed": 0,
            "disable_tqdm": True,
            "lr_scheduler_type": "constant",
        },
    }
    for name, options in sections.items():
        plain = not isinstance(options, dict)
        values[name] = options if plain else {**values.get(name, {}), **options}
    return values


def small_recipe(output: Path, **sections) -> Recipe:
    """Returns `recipe_values` as a recipe."""
    return build_recipe(recipe_values(output, **sections))


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights_of(trainer) -> dict:
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}
