"""What a PerceptionDLM checkpoint is: vision tower, language model, regions, special token ids.

Also, which files its folder may name.
"""

import functools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils.versions import require_version

# First of all, so that an older version says what it lacks before an import of it fails.
require_version("transformers>=5.18.0", "PerceptionDLM needs it: pip install -U transformers")

from huggingface_hub.dataclasses import strict  # noqa: E402
from huggingface_hub.errors import StrictDataclassError  # noqa: E402
from transformers import LlamaConfig, PreTrainedConfig, SiglipVisionConfig  # noqa: E402

IMAGE_LAYOUTS = ("tiled", "anyres")
REGION_LAYOUTS = ("released", "independent", "full")
ROI_CONVENTIONS = ("released", "aligned")

# Where transformers' auto classes find this package's, in every checkpoint that is saved.
AUTO_MAP = {
    "AutoConfig": "configuration_perceptiondlm.PerceptionDLMConfig",
    "AutoImageProcessor": "image_processing_perceptiondlm.PerceptionDLMImageProcessor",
    "AutoModel": "modeling_perceptiondlm.PerceptionDLMForConditionalGeneration",
    "AutoModelForImageTextToText": ("modeling_perceptiondlm.PerceptionDLMForConditionalGeneration"),
    "AutoProcessor": "processing_perceptiondlm.PerceptionDLMProcessor",
}

# What `role_ids` and `region_ids` hold, for each position of a sequence.
ROLE_SHARED, ROLE_ROI, ROLE_CAPTION = 0, 1, 2
SHARED_REGION = -1  # belongs to every region
NO_REGION = -2  # belongs to none: seen by no caption


def _refuses_as_value_error(config_class):
    """Makes a config class raise ValueError for what it cannot be built from.

    Different parts of transformers raise different errors for a value of the wrong type.
    """
    build = config_class.__init__

    @functools.wraps(build)
    def __init__(self, *args, **kwargs):
        try:
            build(self, *args, **kwargs)
        except (StrictDataclassError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"expected a valid {config_class.__name__}: {error}") from error

    config_class.__init__ = __init__
    return config_class


@_refuses_as_value_error
@strict
class PerceptionDLMTextConfig(LlamaConfig):
    """Describes LLaDA's decoder: Llama's shapes, bidirectional attention (arXiv:2502.09992).

    The defaults are LLaDA-8B's. `rope_parameters` holds `rope_theta`; `num_key_value_heads`
    smaller than `num_attention_heads` gives grouped-query attention.
    """

    model_type = "llada"
    base_config_key = "text_config"
    # the embeddings too: transformers 5.18 would split a tied head without them
    base_model_tp_plan = {"embed_tokens": "embedding_rowwise", **LlamaConfig.base_model_tp_plan}
    # The network does not pass through the layers alone.
    base_model_pp_plan = None

    vocab_size: int = 126464
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 16384
    rms_norm_eps: float = 1e-5
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    if TYPE_CHECKING:  # the parent's
        rope_parameters: dict | None

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None and "rope_theta" not in kwargs:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
        super().__post_init__(**kwargs)


@_refuses_as_value_error
@strict
class PerceptionDLMConfig(PreTrainedConfig):
    """Describes a whole checkpoint; the defaults are the released 8B region model.

    Args:
        vision_config: a `SiglipVisionConfig`; `num_hidden_layers` counts the layers that are used
            (SigLIP-2 so400m has 27, of which the last is never run, so 26).
        text_config: a `PerceptionDLMTextConfig`.
        image_layout: how an image becomes tiles and tokens, "tiled" (best-fitting grid, thumbnail
            last, `spatial_merge_size` squared patches a token) or "anyres" (LLaVA-V: squeezed tile
            first, padding cropped off, a newline embedding after each row).
        spatial_merge_size: side of the square of patches merged into one visual token.
        anyres_max_tiles: tiles' worth of cells beyond which an anyres map is shrunk.
        num_region_prompts: learned region prompts, and so regions in one group (0: no regions).
        roi_output_size: side of the RoI-aligned grid replayed for a region (0: no replay).
        roi_convention: "released" (shifted map, box scaled twice) or "aligned" (real tiles, once).
        roi_stride: divisor of the released convention's second scaling, in cells.
        region_layout: attention structure, "released", "independent" (a tree: shared trunk, one
            branch a region) or "full" (none, for ablations).
        mask_token_id ... caption_token_ids: ids read from the checkpoint's tokenizer.
        banned_token_ids, generation_defaults: of checkpoints whose decoding defaults are not in a
            `generation_config.json`: ids never produced in answers, and options of
            `DiffusionOptions`.
    """

    model_type = "perceptiondlm"
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": PerceptionDLMTextConfig}

    if TYPE_CHECKING:  # after construction; either may be given as a dict or left out
        vision_config: SiglipVisionConfig
        text_config: PerceptionDLMTextConfig
    else:
        vision_config: dict | PreTrainedConfig | None = None
        text_config: dict | PreTrainedConfig | None = None

    image_layout: str = "tiled"
    spatial_merge_size: int = 2
    anyres_max_tiles: int = 4

    num_region_prompts: int = 6
    roi_output_size: int = 4
    roi_convention: str = "released"
    roi_stride: int = 32
    region_layout: str = "released"

    mask_token_id: int = 126336
    eot_token_id: int = 126348
    start_header_token_id: int = 126346
    end_header_token_id: int = 126347
    bos_token_id: int | None = 126080
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081
    image_token_id: int = 126349
    image_start_token_id: int | None = 126350
    image_end_token_id: int | None = 126351
    roi_token_ids: list[int] | None = None
    caption_token_ids: list[int] | None = None
    banned_token_ids: list[int] | None = None
    generation_defaults: dict | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        # Parts may be given as dicts, as they are saved.
        self.vision_config = _sub_config(self.vision_config, SiglipVisionConfig, FLAGSHIP_VISION)
        self.text_config = _sub_config(self.text_config, PerceptionDLMTextConfig, {})
        # LLaDA's reserved tokens, and those that the released checkpoint adds.
        if self.roi_token_ids is None:
            self.roi_token_ids = list(range(126084, 126100))
        if self.caption_token_ids is None:
            self.caption_token_ids = list(range(126352, 126368))

        # A tied head may be declared for the whole or for the language model alone.
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        super().__post_init__(**{"auto_map": dict(AUTO_MAP), **kwargs})
        self._check()

    def _check(self):
        """Refuses values that no model can be built from."""
        _expect_one_of("image_layout", self.image_layout, IMAGE_LAYOUTS)
        _expect_one_of("region_layout", self.region_layout, REGION_LAYOUTS)
        _expect_one_of("roi_convention", self.roi_convention, ROI_CONVENTIONS)

        # Sizes and counts.
        vision = self.vision_config
        _expect_at_least(
            1,
            spatial_merge_size=self.spatial_merge_size,
            anyres_max_tiles=self.anyres_max_tiles,
            roi_stride=self.roi_stride,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
        )
        _expect_at_least(
            0, num_region_prompts=self.num_region_prompts, roi_output_size=self.roi_output_size
        )

        # Combinations.
        slots = min(len(self.roi_token_ids or ()), len(self.caption_token_ids or ()))
        if self.num_region_prompts > slots:
            raise ValueError(
                f"expected num_region_prompts of at most {slots} (the roi_token_ids and"
                f" caption_token_ids given), got {self.num_region_prompts}"
            )
        if self.image_layout == "anyres" and self.num_region_prompts:
            raise ValueError(
                "expected num_region_prompts 0 with image_layout 'anyres',"
                f" got {self.num_region_prompts}: region prompts need tiled images"
            )
        if self.image_layout == "tiled" and self.grid_side % self.spatial_merge_size:
            raise ValueError(
                f"expected a patch grid divisible by spatial_merge_size {self.spatial_merge_size},"
                f" got {self.grid_side} patches a side"
            )

    @property
    def grid_side(self) -> int:
        """Counts the patches along one side of a tile."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def cells_per_side(self) -> int:
        """Counts the visual tokens along one side of a tile."""
        return self.grid_side // self.spatial_merge_size


# SigLIP-2 so400m, patch 16, 512 pixels, without its last layer and head.
FLAGSHIP_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 512,
    "patch_size": 16,
    "vision_use_head": False,
}


def _sub_config(value, config_class, defaults: dict):
    if value is None:
        return config_class(**defaults)
    if isinstance(value, dict):
        return config_class(**value)
    return value


def _expect_at_least(least: int, **values: int):
    for name, value in values.items():
        if value < least:
            raise ValueError(f"expected {name} of at least {least}, got {value}")


def _expect_one_of(name: str, value, allowed: tuple[str, ...]):
    if value not in allowed:
        raise ValueError(f"expected {name} to be one of {', '.join(allowed)}, got {value!r}")


# Files that a checkpoint, or another file, names: they have to lie inside its folder.


def _is_below(path: str | Path, folder: str | Path) -> bool:
    """Tells whether a path lies somewhere inside a folder, links left as they are."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return path != folder and path.is_relative_to(folder)


def _blobs(folder: Path) -> list[Path]:
    """Finds where the files of a Hub cache's snapshot are kept; nothing for any other folder."""
    place = Path(os.path.abspath(folder))
    snapshots = [p for p in (place, *place.parents) if p.parent.name == "snapshots"]
    return [snapshot.parent.parent.resolve() / "blobs" for snapshot in snapshots]


def path_inside(folder: str | Path, name: object, links: bool = False) -> Path:
    """Returns the path of a file that another file names, which has to lie inside a folder.

    Raises ValueError for a name that leads out of it: absolute, by `..`, or, unless `links` are
    taken for the owner's own, by a symbolic link; those of a Hub cache always lead to the files of
    the same repository.
    """
    folder = Path(folder)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"expected the name of a file in {folder}, got {name!r:.120}")
    path = folder / name

    # By its name alone, and by where links lead.
    is_elsewhere = bool(re.match(r"[A-Za-z]:[\\/]", name)) or not _is_below(
        os.path.normpath(path), os.path.normpath(folder)
    )
    roots = [folder.resolve(), *_blobs(folder)]
    is_linked = not any(_is_below(path.resolve(), root) for root in roots)
    if is_elsewhere or (is_linked and not links):
        raise ValueError(f"expected the name of a file inside {folder}, got {name!r:.120}")
    return path


def expect_shards_inside(folder: str | Path):
    """Refuses a folder of weights whose index names files elsewhere, which would be read."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = Path(folder) / name
        if index.is_file():
            shards = json.loads(index.read_bytes()).get("weight_map", {})
            for shard in set(shards.values()):
                path_inside(folder, shard, links=True)


PerceptionDLMConfig.register_for_auto_class()

__all__ = ["PerceptionDLMConfig", "PerceptionDLMTextConfig"]
