"""Declares the sections of a recipe: what can be set, what it means, and what goes together."""

from dataclasses import dataclass, field
from typing import Any

from ..common.option_checks import (
    expect_defaults,
    expect_known,
    expect_one_of,
    expect_positive,
    expect_share,
    expect_type,
    field_names,
)
from ..common.quantization import expect_gradients
from ..configuration_perceptiondlm import PerceptionDLMConfig
from ..modeling_loss import LOSS_WEIGHTINGS


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained."""

    # Folder or Hub id to start from; none: a model from scratch, as `config` says.
    checkpoint: str | None = None
    subfolder: str | None = None  # of the checkpoint
    # Fields of `PerceptionDLMConfig`; over those of the checkpoint where there is one.
    config: dict[str, Any] = field(default_factory=dict)
    # Folder of the tokenizer of a model from scratch; none: a tokenizer is trained.
    tokenizer: str | None = None
    vocab_size: int = 512  # upper bound for a trained tokenizer, special tokens included
    tokenizer_scenes: int = 2000  # synthetic scenes whose text it is trained on
    # Of a model from scratch (see `starting_values`): every layer begins as the identity, and the
    # heads of this many vision layers start out looking at neighboring patches.
    zero_residuals: bool = False
    local_layers: int = 0
    max_tiles: int | None = None  # of an image, its thumbnail not counted; none: the processor's
    dtype: str = "float32"  # of the parameters
    attn_implementation: str | None = None  # as in transformers
    # Kind of weights that the frozen decoder of a checkpoint gets under an adapter: int8 or nf4.
    quantize: str | None = None

    def __post_init__(self):
        expect_known("model.config", self.config, field_names(PerceptionDLMConfig))
        expect_one_of("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if self.checkpoint is not None:
            needs = "without model.checkpoint: it sets starting values"
            expect_defaults(self, "model", ("zero_residuals", "local_layers"), needs)
        if self.quantize is not None:
            expect_gradients(self.quantize)


@dataclass(frozen=True)
class SyntheticData:
    """Synthetic scenes: a sample is the region captions of a scene, or some of its questions."""

    # What the scenes hold: "shapes", or "things" (drawn from npm packages, see docs/evaluation.md).
    scene_kind: str = "shapes"
    # What is learned: "texts", by denoising; or, of things, the regions' "names", by the vision
    # path alone (see `naming`), which takes nothing from the shares and lengths below.
    objective: str = "texts"
    crowded_share: float = 0.0  # of the scenes for names have 9 to 24 things instead of 2 to 8
    scenes: int = 20000  # of an epoch, from `first_seed` on
    scene_sets: int = 1  # sets of as many scenes, which epochs take in turn
    first_seed: int = 0
    fresh: bool = False  # other scenes every epoch, without end
    cache: bool = False  # render the scenes once, before training, and keep them in memory
    cache_workers: int = 2  # processes that render them
    region_share: float = 0.7  # of the samples caption regions; the others answer questions
    first_region_share: float | None = None  # the same in the first epoch; none: as in the others
    # Of the samples about regions, of things alone: these shares give labels ("Name each region."),
    # and ask every region a question of its own (independent layout); the others are captions.
    label_share: float = 0.0
    first_label_share: float | None = None  # the same in the first epoch; none: as in the others
    region_question_share: float = 0.0
    # Slots that most labels and answers about a region are padded to; none: as captions.
    label_length: int | None = None
    region_answer_length: int | None = None
    # Upper bound for the regions of a sample, drawn at random; none: the region prompts.
    regions_per_sample: int | None = None
    # Upper bound for the questions of a sample, each a branch of the same image; more than one
    # needs the independent layout.
    questions_per_sample: int = 1
    caption_length: int = 14  # slots that captions are padded to
    max_new_tokens: int = 8  # slots that answers are padded to
    # Batches are padded to a multiple of this many tokens: fewer different lengths, for which a CPU
    # prepares its kernels (and `torch.compile` its graphs) once each.
    pad_to_multiple_of: int = 1
    eval_scenes: int = 0  # held-out scenes of an evaluation, from `eval_first_seed` on
    eval_first_seed: int = 0

    def __post_init__(self):
        expect_positive("data.scenes", self.scenes)
        expect_positive("data.scene_sets", self.scene_sets)
        expect_positive("data.pad_to_multiple_of", self.pad_to_multiple_of)
        expect_positive("data.questions_per_sample", self.questions_per_sample)
        for name in ("label_length", "region_answer_length"):
            if getattr(self, name) is not None:
                expect_positive(f"data.{name}", getattr(self, name))
        expect_share("data.region_share", self.region_share)
        expect_one_of("data.scene_kind", self.scene_kind, ("shapes", "things"))
        expect_one_of("data.objective", self.objective, ("texts", "names"))
        expect_share("data.crowded_share", self.crowded_share)
        self._expect_form_shares()
        self._expect_objective()
        if self.scene_kind != "things":
            names = (
                *("label_share", "first_label_share", "region_question_share"),
                *("label_length", "region_answer_length"),
            )
            expect_defaults(self, "data", names, 'with data.scene_kind of "things"')
        if self.first_region_share is not None:
            expect_share("data.first_region_share", self.first_region_share)

        if self.fresh and (self.cache or self.scene_sets > 1):
            given = "data.cache" if self.cache else f"data.scene_sets of {self.scene_sets}"
            raise ValueError(f"expected {given} only without data.fresh, got both")
        if not self.cache:
            expect_defaults(self, "data", ("cache_workers",), "with data.cache")
        if not self.eval_scenes:
            expect_defaults(self, "data", ("eval_first_seed",), "with data.eval_scenes")

    def _expect_objective(self):
        """Refuses options that the objective leaves without effect."""
        if self.objective == "texts":
            needs = 'with data.objective of "names"'
            return expect_defaults(self, "data", ("crowded_share",), needs)
        if self.scene_kind != "things":
            raise ValueError(
                'expected data.scene_kind of "things" with data.objective of "names", got'
                f" {self.scene_kind!r}"
            )
        of_texts = ("region_share", "first_region_share", "label_share", "first_label_share")
        of_texts += ("region_question_share", "label_length", "region_answer_length")
        of_texts += ("regions_per_sample", "questions_per_sample", "eval_scenes")
        of_texts += ("pad_to_multiple_of",)
        expect_defaults(self, "data", of_texts, 'with data.objective of "texts"')

    def _expect_form_shares(self):
        """Refuses shares of samples about regions that leave less than nothing for captions."""
        questions = self.region_question_share
        expect_share("data.region_question_share", questions)
        for name in ("label_share", "first_label_share"):
            share = getattr(self, name)
            if share is not None:
                expect_share(f"data.{name}", share)
                expect_share(f"data.{name} + data.region_question_share", share + questions)


@dataclass(frozen=True)
class FileData:
    """What all data from files have in common: JSON, JSONL, Parquet or Arrow files."""

    files: list[str] = field(default_factory=list)  # paths, or patterns such as part-*.parquet
    # Folder that the records' image paths start from, and do not leave; none: that of their file.
    # `/` takes absolute paths, wherever they lead.
    image_root: str | None = None
    max_broken_share: float = 0.01  # of the records; with more of them broken the run stops
    streaming: bool = False  # read records while training instead of before
    shuffle_buffer: int = 1000  # records among which a streaming run draws
    eval_files: list[str] = field(default_factory=list)  # the same for evaluation
    # Batches are padded to a multiple of this many tokens: fewer different lengths, for which a CPU
    # prepares its kernels (and `torch.compile` its graphs) once each.
    pad_to_multiple_of: int = 1

    def __post_init__(self):
        if not self.files:
            raise ValueError("expected at least one file in data.files, got none")
        expect_share("data.max_broken_share", self.max_broken_share)
        expect_positive("data.pad_to_multiple_of", self.pad_to_multiple_of)
        if not self.streaming:
            expect_defaults(self, "data", ("shuffle_buffer",), "with data.streaming")


@dataclass(frozen=True)
class RegionData(FileData):
    """Region captions: images with region masks and a caption for each.

    The files are in ParaCaption's form (`image`, `mask_rles`, `captions`), or COCO-style JSON
    (`images`, `annotations` with `segmentation` and `caption`).
    """

    caption_length: int | None = None  # slot that captions are padded to; none: not padded
    # Upper bound for the regions of a sample; none: the region prompts.
    regions_per_sample: int | None = None
    max_text_tokens: int = 512  # a longer caption makes its record a broken one


@dataclass(frozen=True)
class ConversationData(FileData):
    """Conversations about images in LLaVA's form; every assistant turn is a target.

    The files hold `conversations` (or `messages`) and `image` (or `images`): paths, or the images'
    bytes.
    """

    # Slot that answers are padded to with end-of-turn; none: one end-of-turn.
    answer_length: int | None = None
    max_text_tokens: int = 2048  # a longer sequence makes its record a broken one


@dataclass(frozen=True)
class MaskingRecipe:
    """Which label positions of a sample are masked, and how its loss is weighted."""

    full_mask_share: float = 0.0  # of the samples have everything masked (t = 1)
    t_low: float = 0.0  # the other samples' t is uniform from here ...
    t_high: float = 1.0  # ... to here
    # Every sample twice, the second time with the other positions masked (a fully masked one with
    # fresh draws).
    complementary: bool = False
    loss_weighting: str = "inverse_rate"  # as published, 1 / p; or "none"
    eval_levels: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])  # of t

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
    """Which parameters learn, and how fast; modules are given by dotted names ("connector")."""

    trainable: list[str] = field(default_factory=list)  # modules that learn; empty: all
    frozen: list[str] = field(default_factory=list)  # modules that do not, taken from those
    zeroed: list[str] = field(default_factory=list)  # set to zero and kept so, for ablations
    # Of some modules, instead of the trainer's.
    learning_rates: dict[str, float] = field(default_factory=dict)
    # Modules whose matrices are updated by Muon, at the same rates (see `muon.WithMuon`).
    muon: list[str] = field(default_factory=list)
    # Draw a region's prompt at random, as in the released training (in the independent layout its
    # RoI placeholder and marker go with it).
    permute_prompts: bool = True


@dataclass(frozen=True)
class LoraRecipe:
    """A LoRA adapter of the language model."""

    r: int = 16  # rank
    alpha: int = 32  # scale
    dropout: float = 0.0
    target_modules: Any = None  # names or a pattern; none: the decoder's seven projections
    # Modules trained whole and saved with the adapter; none: the connector and region prompts.
    modules_to_save: list[str] | None = None
    # Save the whole model, the adapter added to its weights, instead of the adapter.
    merge: bool = False

    def __post_init__(self):
        expect_type("lora.target_modules", self.target_modules, list[str] | str | None)


@dataclass(frozen=True)
class DistillationRecipe:
    """A frozen teacher whose predictions the model learns to give."""

    checkpoint: str | None = None  # folder or Hub id
    subfolder: str | None = None  # of the checkpoint
    # Of the loss, the part that is the divergence from the teacher; the rest is the diffusion loss
    # of the captions.
    teacher_share: float = 1.0
    temperature: float = 1.0  # of both distributions; above 1 unlikely tokens count more
    dtype: str = "float32"  # of the teacher's weights

    def __post_init__(self):
        if self.checkpoint is None:
            raise ValueError("expected the teacher's folder or Hub id in distillation.checkpoint")
        expect_share("distillation.teacher_share", self.teacher_share)
        if self.temperature <= 0:
            raise ValueError(
                f"expected a positive distillation.temperature, got {self.temperature}"
            )
        expect_one_of("distillation.dtype", self.dtype, ("float32", "bfloat16", "float16"))
