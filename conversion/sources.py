"""Understands checkpoints of every layout: config, processor and where each tensor comes from.

No weights are loaded until they are asked for. Each `read_` function takes the folder, its config,
and the options `vision_source` and `base` of `convert`, of which it refuses what it has no use for.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from ..common.loading import ADAPTER_FILE, CheckpointError, UnrecognizedCheckpoint
from ..common.special_tokens import (
    CAPTION_TOKENS,
    IMAGE_TOKENS,
    LLAVA_IMAGE_TOKENS,
    NAMED_TOKENS,
    token_ids,
)
from ..configuration_perceptiondlm import PerceptionDLMConfig
from ..processing_perceptiondlm import PerceptionDLMProcessor
from .files import StateDict, WeightFiles, fetch, read_json
from .layouts import (
    LLAVA_TEMPLATE_PRELUDE,
    PENULTIMATE_LAYER,
    SIGLIP2_SO400M_PATCH14_384,
    Origin,
    add_missing_tokens,
    fresh_tensor,
    llama_rules,
    llama_text_config,
    llava_rules,
    map_names,
    original_llada_rules,
    original_text_config,
    pick,
    read_tokenizer,
    released_rules,
    rows_needed,
    siglip_rules,
    vision_settings,
)
from .own_layout import read_adapter, read_own, read_sharded
from .source import EMBEDDING, HEAD, Source, expect_no, expect_unquantized, few

MAX_CANVAS_TILES = 6  # a side, of an anyres canvas


def read_released(folder: Path, settings: dict, vision_source, base) -> Source:
    """Reads a released PerceptionDLM (regions) or PerceptionDLM-Base."""
    expect_no("vision_source", vision_source, "a checkpoint that has its own vision tower")
    expect_no("base", base, "a whole checkpoint")

    tensors = WeightFiles(folder)
    tokenizer = read_tokenizer(folder)
    tokenizer.chat_template = None  # the language model's own, which knows no images

    text = llama_text_config(settings["language_model_config"])
    rows, _ = tensors.shape("language_model.model.embed_tokens.weight")
    vision, layers = vision_settings(
        settings["vision_model_config"], settings["vision_select_layer"]
    )

    config = PerceptionDLMConfig(
        vision_config=vision,
        text_config={**text, "vocab_size": rows},
        spatial_merge_size=round(1 / settings["downsample_ratio"]),
        num_region_prompts=settings.get("prompt_numbers", 0),
        **pick(settings, ["roi_output_size"]),
        roi_convention="released",
        roi_stride=32,
        region_layout="released",
        **token_ids(tokenizer, IMAGE_TOKENS),
    )

    origins = map_names(tensors, released_rules(config, layers))
    return Source(config, PerceptionDLMProcessor.from_config(config, tokenizer), origins)


def read_llava(folder: Path, settings: dict, vision_source, base) -> Source:
    """Reads LLaDA-V.

    `vision_source` has the SigLIP config; default: SigLIP-2 so400m, patch 14, at 384 pixels.
    """
    expect_no("base", base, "a whole checkpoint")

    tensors = WeightFiles(folder)
    vision, layers = vision_settings(
        read_vision_config(vision_source) if vision_source else SIGLIP2_SO400M_PATCH14_384,
        settings.get("mm_vision_select_layer", PENULTIMATE_LAYER),
    )
    max_tiles = anyres_tiles(settings, vision)

    tokenizer = read_tokenizer(folder)
    # LLaVA's code loses the first token after an image, the newline of "<image>\n".
    add_missing_tokens(tokenizer, list(LLAVA_IMAGE_TOKENS.values()), rstrip=True)
    if not isinstance(tokenizer.chat_template, str):
        raise CheckpointError(f"expected a tokenizer with a chat template in {folder}, got none")
    template = LLAVA_TEMPLATE_PRELUDE + tokenizer.chat_template
    tokenizer.chat_template = None

    ids = token_ids(tokenizer, LLAVA_IMAGE_TOKENS)
    banned = ("eos_token_id", "bos_token_id", "start_header_token_id", "end_header_token_id")
    rows, _ = tensors.shape("model.embed_tokens.weight")
    rows = max(rows, rows_needed(tokenizer))

    config = PerceptionDLMConfig(
        vision_config=vision,
        text_config={**llama_text_config(settings), "vocab_size": rows},
        image_layout="anyres",
        spatial_merge_size=1,
        anyres_max_tiles=max_tiles,
        num_region_prompts=0,
        banned_token_ids=[ids[name] for name in banned],
        generation_defaults={"stop_strings": [NAMED_TOKENS["eot_token_id"]]},
        **ids,
    )

    origins = map_names(tensors, llava_rules(config, layers))
    extend_vocabulary(origins, config)
    processor = PerceptionDLMProcessor.from_config(
        config, tokenizer, chat_template=template, image_token=LLAVA_IMAGE_TOKENS["image_token_id"]
    )
    return Source(config, processor, origins)


def anyres_tiles(settings: dict, vision: dict) -> int:
    """Returns `anyres_max_tiles` of a LLaDA-V config.

    Raises CheckpointError for another way of dividing images than the one that is built here.
    """
    expected = {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "spatial_unpad"}
    for name, value in expected.items():
        if settings[name] != value:
            raise CheckpointError(f"expected {name} {value!r}, got {settings[name]!r}")

    sides = [i * vision["image_size"] for i in range(1, MAX_CANVAS_TILES + 1)]
    canvases, given = [[w, h] for w in sides for h in sides], settings.get("image_grid_pinpoints")
    if isinstance(given, list) and given != canvases:
        raise CheckpointError(
            f"expected image_grid_pinpoints of 1 to {MAX_CANVAS_TILES} tiles of {sides[0]} pixels a"
            f" side (as vision_source says), got {few(list(map(str, given)))}"
        )

    aspect = settings["image_aspect_ratio"]
    shrunk = re.fullmatch(r"anyres_max_(\d+)", str(aspect))
    if not shrunk:
        raise CheckpointError(f"expected image_aspect_ratio 'anyres_max_N', got {aspect!r}")
    return int(shrunk[1])


def read_llada(folder: Path, settings: dict, vision_source, base) -> Source:
    """Reads LLaDA, under its own names or Llama's, with SigLIP: a fresh Base to be trained."""
    expect_no("base", base, "a whole checkpoint")
    if vision_source is None:
        raise CheckpointError("expected vision_source, a SigLIP-2 model to build a Base from LLaDA")

    tensors = WeightFiles(folder)
    is_original = any(name.startswith("model.transformer.") for name in tensors.shapes)
    if is_original:
        text, embedding = original_text_config(settings), "model.transformer.wte.weight"
    else:
        text, embedding = llama_text_config(settings), "model.embed_tokens.weight"

    tokenizer = read_tokenizer(folder)
    tokenizer.chat_template = None
    add_missing_tokens(tokenizer, [*IMAGE_TOKENS.values(), *CAPTION_TOKENS])

    tower = fetch(vision_source)
    vision, layers = vision_settings(read_json(tower / "config.json"), PENULTIMATE_LAYER)
    rows, _ = tensors.shape(embedding)

    config = PerceptionDLMConfig(
        vision_config=vision,
        text_config={**text, "vocab_size": max(rows, rows_needed(tokenizer))},
        num_region_prompts=0,
        roi_convention="aligned",
        **token_ids(tokenizer, IMAGE_TOKENS),
    )

    # of the language model, the vision tower, and what is drawn: the connector, added rows
    tied = config.tie_word_embeddings
    rules = original_llada_rules(tied) if is_original else llama_rules("", tied)
    origins = map_names(tensors, rules)
    origins |= map_names(
        WeightFiles(tower), siglip_rules("", config.vision_config.num_hidden_layers, layers)
    )
    origins |= fresh_connector(config)
    extend_vocabulary(origins, config)
    return Source(config, PerceptionDLMProcessor.from_config(config, tokenizer), origins)


def fresh_connector(config: PerceptionDLMConfig) -> dict[str, Origin]:
    """Draws a connector as initialized for training: normal weights, no biases."""
    width = config.text_config.hidden_size
    merged = config.vision_config.hidden_size * config.spatial_merge_size**2
    tensors = {
        "connector.linear_1.weight": fresh_tensor((width, merged), config.initializer_range, 1),
        "connector.linear_1.bias": torch.zeros(width),
        "connector.linear_2.weight": fresh_tensor((width, width), config.initializer_range, 2),
        "connector.linear_2.bias": torch.zeros(width),
    }
    fresh = StateDict(Path("a fresh connector"), tensors)
    return {name: Origin(fresh, name) for name in tensors}


def extend_vocabulary(origins: dict[str, Origin], config: PerceptionDLMConfig):
    """Gives added tokens that do not fit rows of their own."""
    for name in (EMBEDDING, HEAD):
        if name in origins:
            origin = origins[name]
            origins[name] = Origin(origin.tensors, origin.name, config.text_config.vocab_size)


def read_vision_config(source: str | Path) -> dict:
    """Reads the config of a SigLIP folder, file or Hub id."""
    path = fetch(source, ["config.json"])
    return read_json(path if path.is_file() else path / "config.json")


READERS: dict[str, Callable[..., Source]] = {
    "pdmllm": read_released,
    "dmllm": read_released,
    "llada": read_llada,
    "llava_llada": read_llava,
    PerceptionDLMConfig.model_type: read_own,
}
SHARDED_FOLDER = "pytorch_model_fsdp_0"


def read_source(folder: Path, vision_source=None, base=None) -> Source:
    """Understands a checkpoint folder by its contents, and checks it whole."""
    if (folder / ADAPTER_FILE).exists():
        source = read_adapter(folder, vision_source, base)
    elif (folder / SHARDED_FOLDER).is_dir():
        source = read_sharded(folder / SHARDED_FOLDER, vision_source, base)
    elif (folder / ".metadata").exists():
        source = read_sharded(folder, vision_source, base)
    else:
        source = _read_whole(folder, vision_source, base)
    source.check()
    return source


def _read_whole(folder: Path, vision_source, base) -> Source:
    if not (folder / "config.json").exists():
        raise UnrecognizedCheckpoint(
            f"expected a checkpoint with a config.json in {folder}, got none"
        )
    settings = read_json(folder / "config.json")
    kind = settings.get("model_type")
    if kind not in READERS:
        raise UnrecognizedCheckpoint(
            f"expected a model_type among {', '.join(READERS)} in {folder / 'config.json'},"
            f" got {kind!r}"
        )
    expect_unquantized(settings, folder)
    return READERS[kind](folder, settings, vision_source, base)
