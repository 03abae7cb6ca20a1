"""Reads recipes: a YAML file and `key=value` overrides, merged by OmegaConf into typed sections."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from ..common.extras import extra
from ..common.option_checks import (
    expect_defaults,
    expect_known,
    expect_one_of,
    expect_type,
    field_names,
)
from .recipe_sections import (
    ConversationData,
    DistillationRecipe,
    LoraRecipe,
    MaskingRecipe,
    ModelRecipe,
    ParametersRecipe,
    RegionData,
    SyntheticData,
)
from .trainer_options import check_trainer

with extra("train"):
    from ..common.recipe_files import option_types, read_recipe, typed_sections

DATA_KINDS = {
    "synthetic": SyntheticData,
    "regions": RegionData,
    "conversations": ConversationData,
}


@dataclass(frozen=True)
class Recipe:
    """Everything of one run."""

    model: ModelRecipe
    data: SyntheticData | RegionData | ConversationData
    masking: MaskingRecipe
    parameters: ParametersRecipe
    lora: LoraRecipe | None
    distillation: DistillationRecipe | None
    trainer: dict  # fields of `transformers.TrainingArguments`
    save_code: bool = True  # copy the modules of the code beside the final weights


SECTIONS = {"model": ModelRecipe, "masking": MaskingRecipe, "parameters": ParametersRecipe}
# Sections that do something only where a recipe has them.
OPTIONAL_SECTIONS = {"lora": LoraRecipe, "distillation": DistillationRecipe}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe; each override is `section.key=value`, its value in YAML.

    A recipe of this package, `configs/NAME.yaml`, is found from any folder that has none of that
    name. Raises FileNotFoundError for no such file, ValueError for an unknown key or a wrong value.
    """
    return build_recipe(read_recipe(path, overrides))


def build_recipe(values: dict) -> Recipe:
    """Builds a recipe from nested plain values; raises ValueError as `load_recipe`."""
    expect_known("the recipe", values, field_names(Recipe), dotted=_every_name())
    save_code = values.get("save_code", True)
    expect_type("save_code", save_code, bool)
    values = {k: v for k, v in values.items() if k != "save_code" and v is not None}
    for section, options in values.items():
        if not isinstance(options, dict):
            raise ValueError(f"expected options in section {section!r}, got {options!r}")

    data = dict(values.get("data", {}))
    expect_one_of("data.kind", kind := data.pop("kind", None), tuple(DATA_KINDS))
    given = {name: cls for name, cls in OPTIONAL_SECTIONS.items() if name in values}
    classes = {**SECTIONS, "data": DATA_KINDS[kind], **given}
    absent = dict.fromkeys(OPTIONAL_SECTIONS)
    sections = absent | typed_sections(classes, {**values, "data": data})
    trainer = check_trainer(values.get("trainer", {}))
    recipe = Recipe(**sections, trainer=trainer, save_code=save_code)
    _check_sections(recipe)
    return recipe


def _every_name() -> list[str]:
    """Returns every key of every section, as an override names it."""
    sections = option_types({**SECTIONS, **OPTIONAL_SECTIONS, "trainer": TrainingArguments})
    return [
        *sections,
        *(name for kind in DATA_KINDS.values() for name in option_types({"data": kind})),
    ]


def _check_sections(recipe: Recipe):
    """Refuses options that those of another section leave without effect."""
    _check_model(recipe)

    # What the kind of data has no use for.
    if recipe.distillation is not None and isinstance(recipe.data, ConversationData):
        raise ValueError(
            "expected data.kind synthetic or regions with distillation, got conversations"
        )
    if getattr(recipe.data, "objective", None) == "names":
        _check_names(recipe)
    _check_evaluation(recipe)

    if isinstance(recipe.data, ConversationData):
        needs = "with region captions: conversations have no region prompts"
        expect_defaults(recipe.parameters, "parameters", ("permute_prompts",), needs)
    if getattr(recipe.data, "streaming", False):
        for name in ("train_sampling_strategy", "dataloader_drop_last"):
            if name in recipe.trainer:
                raise ValueError(
                    f"expected no trainer.{name} with data.streaming, which has its own order and"
                    f" only whole batches, got {recipe.trainer[name]!r}"
                )


def _check_model(recipe: Recipe):
    """Refuses options of a tokenizer that is not trained, and a config that nothing holds."""
    model, of_tokenizer = recipe.model, ("vocab_size", "tokenizer_scenes")
    lora = recipe.lora

    # Adapters and quantized weights.
    if lora is not None and not lora.merge and model.checkpoint and model.config:
        raise ValueError(
            "expected no model.config with lora, since an adapter is loaded on its checkpoint as"
            f" that is, or lora.merge, got {model.config}"
        )
    if lora is not None and lora.merge and model.quantize is not None:
        raise ValueError(
            "expected no model.quantize with lora.merge, which adds the adapter to whole weights,"
            f" got {model.quantize}"
        )
    if model.quantize is not None and (recipe.lora is None or model.checkpoint is None):
        raise ValueError(
            "expected a model.checkpoint and a lora section with model.quantize, since quantized"
            f" weights cannot learn themselves, got model.quantize={model.quantize}"
        )

    # The tokenizer comes with the checkpoint, from a folder, or is trained.
    if model.checkpoint is not None:
        needs = "without model.checkpoint, which has its own tokenizer"
        expect_defaults(model, "model", ("tokenizer", *of_tokenizer), needs)
    else:
        expect_defaults(model, "model", ("subfolder",), "with model.checkpoint")
    if model.tokenizer is not None:
        expect_defaults(model, "model", of_tokenizer, "without model.tokenizer: one is trained")


def _check_names(recipe: Recipe):
    """Refuses what names are learned without: noise, a teacher, an adapter of the decoder."""
    needs = 'with data.objective of "texts"'
    expect_defaults(recipe.masking, "masking", field_names(MaskingRecipe), needs)
    for section in OPTIONAL_SECTIONS:
        if getattr(recipe, section) is not None:
            raise ValueError(f"expected a section {section} only {needs}, got one")


def _check_evaluation(recipe: Recipe):
    """Refuses an evaluation without data, and its options where there is none."""
    data, trainer = recipe.data, recipe.trainer
    has_evaluation = bool(getattr(data, "eval_files", None) or getattr(data, "eval_scenes", 0))
    evaluates = trainer.get("eval_strategy", "no") != "no" or trainer.get("eval_on_start")
    if evaluates and not has_evaluation:
        raise ValueError(
            "expected data.eval_files, or data.eval_scenes of synthetic data, for"
            " trainer.eval_strategy, got neither"
        )
    if not has_evaluation:
        expect_defaults(recipe.masking, "masking", ("eval_levels",), "with data for evaluation")
