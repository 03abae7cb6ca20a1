"""Recipes: a YAML file and `key=value` overrides to typed options; an unknown key raises."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import TrainingArguments

from ..common.json_text import read_text
from ..configuration_perceptiondlm import PerceptionDLMConfig
from ..modeling_loss import LOSS_WEIGHTINGS
from .options import (
    build,
    coerce,
    expect_defaults,
    expect_known,
    expect_one_of,
    expect_positive,
    expect_share,
    field_names,
)
from .trainer_options import check_trainer

CONFIGS = Path(os.path.abspath(__file__)).parents[1] / "configs"


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained.

    Attributes:
        checkpoint: folder or Hub id to start from; None: from scratch, by `config`.
        subfolder: of the checkpoint.
        config: fields of `PerceptionDLMConfig`; over those of the checkpoint where there is one.
        tokenizer: folder of the tokenizer of a model from scratch; None: one is trained.
        vocab_size: most tokens of a trained tokenizer, special tokens included.
        tokenizer_scenes: synthetic scenes whose text it is trained on.
        zero_residuals: let every layer of a model from scratch begin as the identity.
        local_layers: of a model from scratch, vision layers whose heads start out looking at
            neighbouring patches (both: `starting_values`).
        max_tiles: most tiles of a picture, its thumbnail not counted (None: the processor's).
        dtype: of the parameters, "float32" or "bfloat16".
        attn_implementation: as in transformers.
    """

    checkpoint: str | None = None
    subfolder: str | None = None
    config: dict = field(default_factory=dict)
    tokenizer: str | None = None
    vocab_size: int = 512
    tokenizer_scenes: int = 2000
    zero_residuals: bool = False
    local_layers: int = 0
    max_tiles: int | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None

    def __post_init__(self):
        expect_known("model.config", self.config, field_names(PerceptionDLMConfig))
        expect_one_of("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if self.checkpoint is not None:
            needs = "without model.checkpoint: it sets starting values"
            expect_defaults(self, "model", ("zero_residuals", "local_layers"), needs)


@dataclass(frozen=True)
class SyntheticData:
    """Synthetic scenes, each its region captions or some of its questions.

    Attributes:
        scenes: scenes of an epoch, from `first_seed` on.
        scene_sets: sets of as many scenes that epochs take in turn.
        fresh: other scenes every epoch, without end.
        cache: render the scenes once, before training, and keep them in memory.
        cache_workers: processes that render them.
        region_share: share of the samples that caption regions; the others answer questions.
        first_region_share: the same in the first epoch (None: as in the others).
        regions_per_sample: most regions of a sample, drawn at random (None: as many as there are
            region prompts).
        questions_per_sample: most questions of a sample, each a branch of the same picture; more
            than one in the independent layout only.
        caption_length, max_new_tokens: slots that captions and answers are padded to.
        eval_scenes: held-out scenes of an evaluation, from `eval_first_seed` on.
    """

    scenes: int = 20000
    scene_sets: int = 1
    first_seed: int = 0
    fresh: bool = False
    cache: bool = False
    cache_workers: int = 2
    region_share: float = 0.7
    first_region_share: float | None = None
    regions_per_sample: int | None = None
    questions_per_sample: int = 1
    caption_length: int = 14
    max_new_tokens: int = 8
    eval_scenes: int = 0
    eval_first_seed: int = 0

    def __post_init__(self):
        expect_positive("data.scenes", self.scenes)
        expect_positive("data.scene_sets", self.scene_sets)
        expect_positive("data.questions_per_sample", self.questions_per_sample)
        expect_share("data.region_share", self.region_share)
        if self.first_region_share is not None:
            expect_share("data.first_region_share", self.first_region_share)
        if self.fresh and (self.cache or self.scene_sets > 1):
            given = "data.cache" if self.cache else f"data.scene_sets of {self.scene_sets}"
            raise ValueError(f"expected {given} only without data.fresh, got both")
        if not self.cache:
            expect_defaults(self, "data", ("cache_workers",), "with data.cache")
        if not self.eval_scenes:
            expect_defaults(self, "data", ("eval_first_seed",), "with data.eval_scenes")


@dataclass(frozen=True)
class RegionData:
    """Region captions: pictures with masks and a caption for each.

    Attributes:
        files: JSON, JSONL, Parquet or Arrow files in ParaCaption form (`image`, `mask_rles`,
            `captions`), or COCO-style JSON (`images`, `annotations` with `segmentation` and
            `caption`).
        image_root: folder that the records' image paths start from, and do not leave; by default
            that of their file. `/` takes absolute paths, wherever they lead.
        caption_length: slot that captions are padded to with end-of-turn; None: not padded.
        regions_per_sample: most regions of a sample (None: as many as there are region prompts).
        max_text_tokens: a longer caption makes its record a broken one.
        max_broken_share: share of broken records beyond which the run stops.
        streaming: read records while training instead of before.
        shuffle_buffer: records among which a streaming run draws.
        eval_files: the same for evaluation.
    """

    files: list[str] = field(default_factory=list)
    image_root: str | None = None
    caption_length: int | None = None
    regions_per_sample: int | None = None
    max_text_tokens: int = 512
    max_broken_share: float = 0.01
    streaming: bool = False
    shuffle_buffer: int = 1000
    eval_files: list[str] = field(default_factory=list)

    def __post_init__(self):
        _check_files(self)


@dataclass(frozen=True)
class ConversationData:
    """Conversations about pictures in LLaVA's form; every assistant turn is a target.

    Attributes:
        files: JSON, JSONL, Parquet or Arrow files with `conversations` (or `messages`) and
            `image` (or `images`): paths, or the pictures' bytes.
        image_root: folder that the records' image paths start from, and do not leave; by default
            that of their file. `/` takes absolute paths, wherever they lead.
        answer_length: slot that answers are padded to with end-of-turn; None: one end-of-turn.
        max_text_tokens: a longer answer makes its record a broken one.
        max_broken_share, streaming, shuffle_buffer, eval_files: as for regions.
    """

    files: list[str] = field(default_factory=list)
    image_root: str | None = None
    answer_length: int | None = None
    max_text_tokens: int = 2048
    max_broken_share: float = 0.01
    streaming: bool = False
    shuffle_buffer: int = 1000
    eval_files: list[str] = field(default_factory=list)

    def __post_init__(self):
        _check_files(self)


DATA_KINDS = {
    "synthetic": SyntheticData,
    "regions": RegionData,
    "conversations": ConversationData,
}


@dataclass(frozen=True)
class MaskingRecipe:
    """Which label positions of a sample are masked, and how its loss is weighted.

    Attributes:
        full_mask_share: share of the samples with everything masked (t = 1).
        t_low, t_high: of the other samples, t is uniform between these.
        complementary: every sample twice, the second time with the other positions masked (a
            fully masked one with fresh draws).
        loss_weighting: "inverse_rate" (as published, 1 / p) or "none".
        eval_levels: values of t at which the evaluation loss is taken.
    """

    full_mask_share: float = 0.0
    t_low: float = 0.0
    t_high: float = 1.0
    complementary: bool = False
    loss_weighting: str = "inverse_rate"
    eval_levels: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])

    def __post_init__(self):
        expect_share("masking.full_mask_share", self.full_mask_share)
        if not 0 <= self.t_low <= self.t_high <= 1:
            raise ValueError(
                "expected 0 <= masking.t_low <= masking.t_high <= 1,"
                f" got {self.t_low} and {self.t_high}"
            )
        expect_one_of("masking.loss_weighting", self.loss_weighting, tuple(LOSS_WEIGHTINGS))
        for level in self.eval_levels:
            expect_share("masking.eval_levels", level)


@dataclass(frozen=True)
class ParametersRecipe:
    """Which parameters learn, and how fast.

    Attributes:
        trainable: modules that learn, by dotted name ("connector"); empty: all.
        frozen: modules that do not, taken from those.
        zeroed: modules whose parameters are zero and stay so, for ablations.
        learning_rates: of some modules, instead of the trainer's.
        muon: modules whose matrices are updated by Muon, at the same rates (see `muon.WithMuon`).
        permute_prompts: draw a region's prompt at random, as in the released training (in the
            independent layout its RoI placeholder and marker go with it).
    """

    trainable: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    zeroed: list[str] = field(default_factory=list)
    learning_rates: dict[str, float] = field(default_factory=dict)
    muon: list[str] = field(default_factory=list)
    permute_prompts: bool = True


@dataclass(frozen=True)
class LoraRecipe:
    """A LoRA adapter of the language model.

    Attributes:
        r, alpha, dropout: rank, scale and dropout.
        target_modules: names or a pattern (None: the decoder's seven projections).
        modules_to_save: modules trained whole and saved with the adapter (None: the connector and
            the region prompts).
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything of one run.

    Attributes:
        trainer: fields of `transformers.TrainingArguments`.
        save_code: copy the modules of the code beside the final weights.
    """

    model: ModelRecipe
    data: SyntheticData | RegionData | ConversationData
    masking: MaskingRecipe
    parameters: ParametersRecipe
    lora: LoraRecipe | None
    trainer: dict
    save_code: bool = True


SECTIONS = {
    "model": ModelRecipe,
    "masking": MaskingRecipe,
    "parameters": ParametersRecipe,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe; each override is `section.key=value`, its value in YAML.

    A recipe of this package, `configs/NAME.yaml`, is found from any folder that has none of that
    name. Raises FileNotFoundError for no such file, ValueError for an unknown key or a wrong value.
    """
    file = path = Path(path)
    if path.parts[:1] == (CONFIGS.name,) and not path.exists():
        file = CONFIGS.parent / path
    if not file.is_file():
        raise FileNotFoundError(f"expected a recipe file, got {str(path)!r}: no such file")
    values = _parse(read_text(file), str(path)) or {}
    if not isinstance(values, dict):
        raise ValueError(f"expected sections in {path}, got {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    return build_recipe(values)


def build_recipe(values: dict) -> Recipe:
    """A recipe from nested plain values."""
    expect_known("the recipe", values, field_names(Recipe), dotted=_dotted_names())
    sections = {name: build(cls, values.get(name), name) for name, cls in SECTIONS.items()}
    lora = None if values.get("lora") is None else build(LoraRecipe, values["lora"], "lora")
    if lora is not None and sections["model"].checkpoint and sections["model"].config:
        raise ValueError(
            "expected no model.config with lora, since an adapter is loaded on its checkpoint as"
            f" that is, got {sections['model'].config}"
        )
    recipe = Recipe(
        data=_build_data(values.get("data")),
        lora=lora,
        trainer=check_trainer(values.get("trainer")),
        save_code=coerce(values.get("save_code", True), bool, "save_code"),
        **sections,
    )
    _check_sections(recipe)
    return recipe


def _dotted_names() -> list[str]:
    """Every key of every section, as an override names it."""
    sections = {**SECTIONS, "lora": LoraRecipe, "trainer": TrainingArguments}
    names = [f"{section}.{name}" for section, cls in sections.items() for name in field_names(cls)]
    kinds = {name for cls in DATA_KINDS.values() for name in field_names(cls)}
    return [*names, *(f"data.{name}" for name in kinds)]


def _check_sections(recipe: Recipe):
    """Refuses options that those of another section leave without effect."""
    data, trainer, model = recipe.data, recipe.trainer, recipe.model
    tokenizer = ("vocab_size", "tokenizer_scenes")
    if model.checkpoint is not None:
        needs = "without model.checkpoint, which has its own tokenizer"
        expect_defaults(model, "model", ("tokenizer", *tokenizer), needs)
    else:
        expect_defaults(model, "model", ("subfolder",), "with model.checkpoint")
    if model.tokenizer is not None:
        expect_defaults(model, "model", tokenizer, "without model.tokenizer: one is trained")
    if isinstance(data, ConversationData):
        needs = "with region captions: conversations have no region prompts"
        expect_defaults(recipe.parameters, "parameters", ("permute_prompts",), needs)
    has_evaluation = bool(getattr(data, "eval_files", None) or getattr(data, "eval_scenes", 0))
    evaluates = trainer.get("eval_strategy", "no") != "no" or trainer.get("eval_on_start")
    if evaluates and not has_evaluation:
        raise ValueError(
            "expected data.eval_files, or data.eval_scenes of synthetic data, for"
            " trainer.eval_strategy, got neither"
        )
    if not has_evaluation:
        expect_defaults(recipe.masking, "masking", ("eval_levels",), "with data for evaluation")
    if getattr(data, "streaming", False):
        for name in ("train_sampling_strategy", "dataloader_drop_last"):
            if name in trainer:
                raise ValueError(
                    f"expected no trainer.{name} with data.streaming, which has its own order and"
                    f" only whole batches, got {trainer[name]!r}"
                )


def _build_data(values: dict | None):
    if not isinstance(values, dict | None):
        raise ValueError(f"expected options in section 'data', got {values!r}")
    values = dict(values or {})
    kind = values.pop("kind", None)
    expect_one_of("data.kind", kind, tuple(DATA_KINDS))
    return build(DATA_KINDS[kind], values, "data")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values, as everyone expects: 1e-3 is a number, `no` is a word."""


_PLAIN_VALUES = {  # tag: what it looks like; asked in this order
    "int": r"[-+]?\d+",
    "float": r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?|[-+]?\.inf|\.nan",
    "bool": r"true|false|True|False",
    "null": r"null|~|",
}
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in _PLAIN_VALUES.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None
    )


def _parse(text: str, where: str):
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"expected YAML in {where}, got: {error}") from error


def _override(values: dict, override: str):
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"expected an override section.key=value, got {override!r}")
    *parents, last = name.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ValueError(f"expected {parent!r} of {name!r} to be a section, got {values!r}")
    values[last] = _parse(text, override)


def _check_files(data):
    if not data.files:
        raise ValueError("expected at least one file in data.files, got none")
    expect_share("data.max_broken_share", data.max_broken_share)
    if not data.streaming:
        expect_defaults(data, "data", ("shuffle_buffer",), "with data.streaming")
