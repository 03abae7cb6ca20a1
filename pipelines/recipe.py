"""Reads the engine's recipes: which stages run, with which options, from where to where.

A stage runs when its section is there: `masks: {}` with its defaults, no `masks` not at all.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.extras import extra
from ..common.option_checks import (
    expect_known,
    expect_one_of,
    expect_positive,
    expect_share,
    field_names,
)
from .captioners import ModelOptions, PromptOptions
from .categories import EXTRACT, VERIFY, checked_prompt
from .endpoint import EndpointOptions
from .mask_checks import MaskCheckOptions
from .mask_filters import MaskOptions
from .region_verifier import ModelVerification
from .row_sources import LinesSource, ReadsRows, RowsSource
from .sources import PanopticSource, Sa1bSource
from .text_filters import TextOptions
from .transformers_chat import TransformersOptions

with extra("engine"):
    from ..common.recipe_files import option_types, read_recipe, typed_sections

BRANCHES = ("sa1b", "coconut")
IMAGES = ("link", "path")
SHARDS = ("parquet", "webdataset")
SHARD_IMAGES = ("path", "bytes")


@dataclass(frozen=True)
class HeadNouns:
    """Core categories by a rule of English: the head of the first noun phrase. No options."""


@dataclass(frozen=True)
class EndpointExtraction(EndpointOptions):
    """Core categories by a chat model behind an endpoint."""

    prompt: str = EXTRACT  # with {caption}

    def __post_init__(self):
        super().__post_init__()
        checked_prompt(self.prompt, "caption")


@dataclass(frozen=True)
class TransformersExtraction(TransformersOptions):
    """Core categories by a chat model of transformers."""

    prompt: str = EXTRACT  # with {caption}

    def __post_init__(self):
        super().__post_init__()
        checked_prompt(self.prompt, "caption")


@dataclass(frozen=True)
class WordVerification:
    """Captions and categories compared by their words."""

    synonyms: dict[str, Any] = field(default_factory=dict)  # category: list of further names

    def __post_init__(self):
        for category, names in self.synonyms.items():
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(
                    f"expected verifier.synonyms.{category} as a list of names, got {names!r}"
                )


@dataclass(frozen=True)
class EndpointVerification(EndpointOptions):
    """Captions and categories compared by a chat model behind an endpoint."""

    prompt: str = VERIFY  # with {caption} and {category}

    def __post_init__(self):
        super().__post_init__()
        checked_prompt(self.prompt, "caption", "category")


@dataclass(frozen=True)
class TransformersVerification(TransformersOptions):
    """Captions and categories compared by a chat model of transformers."""

    prompt: str = VERIFY  # with {caption} and {category}

    def __post_init__(self):
        super().__post_init__()
        checked_prompt(self.prompt, "caption", "category")


@dataclass(frozen=True)
class OutputOptions:
    """Where the records go, and in which form."""

    folder: str = ""
    # Regions of a record; an image with more becomes several records of nearly as many.
    max_regions: int = 16
    # "link": the images are in the folder too, as hard links or else copies, so that training needs
    # nothing else. "path": paths from the source's folder, for training's `data.image_root`.
    images: str = "link"
    # "parquet", "webdataset": the records also as shards in captions/, as `caption-dataset` writes
    # them; "bytes": with the images themselves instead of their paths.
    shards: str | None = None
    shard_images: str = "path"
    batch_images: int = 4  # that go through the stages together
    part_images: int = 64  # after which a part is finished: what a killed run repeats at most
    max_images: int | None = None  # of the source, from its beginning; none: all
    # Of the images, those of which no region could be read, or captioned at all; with more of them
    # the run stops.
    max_broken_share: float = 0.5
    card: bool = True  # figures and a contact sheet
    sheet: int = 24  # regions on the contact sheet
    seed: int = 0  # of the regions that are drawn for it

    def __post_init__(self):
        if not self.folder:
            raise ValueError("expected output.folder, got none")
        expect_one_of("output.images", self.images, IMAGES)

        # Shards.
        expect_one_of("output.shard_images", self.shard_images, SHARD_IMAGES)
        if self.shards is not None:
            expect_one_of("output.shards", self.shards, SHARDS)
        elif self.shard_images != "path":
            raise ValueError("expected output.shard_images only with output.shards, got no shards")
        if self.shards == "webdataset" and self.shard_images != "bytes":
            raise ValueError(
                "expected output.shard_images bytes with webdataset, whose samples hold their"
                " images, got path"
            )

        # Numbers.
        for name in ("max_regions", "batch_images", "part_images", "sheet"):
            expect_positive(f"output.{name}", getattr(self, name))
        expect_share("output.max_broken_share", self.max_broken_share)
        if self.max_images is not None:
            expect_positive("output.max_images", self.max_images)


KINDS = {
    "source": {
        "sa1b": Sa1bSource,
        "panoptic": PanopticSource,
        "lines": LinesSource,
        "rows": RowsSource,
    },
    "captioner": {
        "model": ModelOptions,
        "endpoint": EndpointOptions,
        "transformers": TransformersOptions,
    },
    "categories": {
        "words": HeadNouns,
        "endpoint": EndpointExtraction,
        "transformers": TransformersExtraction,
    },
    "verifier": {
        "words": WordVerification,
        "model": ModelVerification,
        "endpoint": EndpointVerification,
        "transformers": TransformersVerification,
    },
}
PLAIN = {
    "masks": MaskOptions,
    "prompt": PromptOptions,
    "mask_check": MaskCheckOptions,
    "texts": TextOptions,
    "output": OutputOptions,
}


@dataclass(frozen=True)
class EngineRecipe:
    """Everything of one run; a section that is None is a stage that is left out."""

    branch: str
    source: Sa1bSource | PanopticSource | LinesSource | RowsSource
    output: OutputOptions
    masks: MaskOptions | None = None
    captioner: ModelOptions | EndpointOptions | TransformersOptions | None = None
    prompt: PromptOptions | None = None
    categories: HeadNouns | EndpointExtraction | TransformersExtraction | None = None
    mask_check: MaskCheckOptions | None = None
    verifier: (
        WordVerification
        | ModelVerification
        | EndpointVerification
        | TransformersVerification
        | None
    ) = None
    texts: TextOptions | None = None

    def to_dict(self) -> dict:
        """Returns plain values, each section with its kind."""
        values: dict = {"branch": self.branch}
        for section in (*KINDS, *PLAIN):
            options = getattr(self, section)
            if options is not None:
                kinds = {cls: kind for kind, cls in KINDS.get(section, {}).items()}
                kind = {"kind": kinds[type(options)]} if kinds else {}
                values[section] = {**kind, **dataclasses.asdict(options)}
        return values


def load_recipe(path: str | Path, overrides: list[str] = ()) -> EngineRecipe:
    """Reads a YAML recipe; each override is `section.key=value`, its value in YAML.

    Raises FileNotFoundError for no such file, folder or source, ValueError for an unknown key or a
    wrong value.
    """
    return build_recipe(read_recipe(path, overrides))


def build_recipe(values: dict) -> EngineRecipe:
    """Builds a recipe from nested plain values; raises as `load_recipe`."""
    expect_known("the recipe", values, field_names(EngineRecipe), dotted=_every_name())
    values = {name: options for name, options in values.items() if options is not None}
    expect_one_of("branch", branch := values.pop("branch", None), BRANCHES)
    for section, options in values.items():
        if not isinstance(options, dict):
            raise ValueError(f"expected options in section {section!r}, got {options!r}")
    for section in ("source", "output"):
        if section not in values:
            raise ValueError(f"expected a section {section!r} in the recipe, got none")

    classes, given = dict(PLAIN), {}
    for section, options in values.items():
        given[section] = dict(options)
        if section in KINDS:
            kind = given[section].pop("kind", None)
            if (section, kind) == ("categories", "model"):
                raise ValueError(NO_OWN_EXTRACTION)
            expect_one_of(f"{section}.kind", kind, tuple(KINDS[section]))
            classes[section] = KINDS[section][kind]
    classes = {section: classes[section] for section in given}
    recipe = EngineRecipe(branch=branch, **_named(classes, given))
    _check_sections(recipe)
    return recipe


def _named(classes: dict, given: dict) -> dict:
    """Builds the sections one by one, so that an error of one that has several uses names it."""
    built = {}
    for section, cls in classes.items():
        try:
            built |= typed_sections({section: cls}, given)
        except ValueError as error:
            if section in str(error):
                raise
            raise ValueError(f"{error} (in section {section!r})") from error
    return built


def _every_name() -> list[str]:
    """Returns every key of every section, as an override names it."""
    every = [{section: cls} for section, kinds in KINDS.items() for cls in kinds.values()]
    return [name for classes in (*every, PLAIN) for name in option_types(classes)]


NO_OWN_EXTRACTION = (
    "expected categories.kind words, endpoint or transformers, got model: a checkpoint of this"
    " package answers from a region's pixels, and the category has to come out of the caption"
    " alone, or the mask check would test the model's eyes and not the caption"
)
NEEDED = {  # what a branch has no use for, and why
    ("sa1b", "verifier"): "with branch coconut, whose regions have categories",
    ("coconut", "categories"): "with branch sa1b: here the regions have categories",
    ("coconut", "mask_check"): "with branch sa1b: here the masks were annotated",
}


def _check_sections(recipe: EngineRecipe):
    """Refuses sections without effect, and those that miss another one."""
    for (branch, section), needs in NEEDED.items():
        if recipe.branch == branch and getattr(recipe, section) is not None:
            raise ValueError(f"expected {section} only {needs}; got branch {branch}")

    if recipe.branch == "coconut" and isinstance(recipe.source, Sa1bSource):
        raise ValueError(
            "expected a source with categories for branch coconut (panoptic, lines or rows), got"
            " sa1b"
        )
    if recipe.mask_check is not None and recipe.categories is None:
        raise ValueError("expected categories with mask_check, which looks for them, got none")
    if recipe.captioner is None and not isinstance(recipe.source, ReadsRows):
        raise ValueError(
            "expected a captioner, or source.kind lines or rows with captions, got neither"
        )

    is_chat = isinstance(recipe.captioner, (EndpointOptions, TransformersOptions))
    if recipe.prompt is not None and not is_chat:
        raise ValueError("expected prompt only with captioner.kind endpoint or transformers")
