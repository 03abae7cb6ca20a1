"""Reads checkpoints of this package's own layout: saved models, training checkpoints, adapters."""

import inspect
from collections.abc import Sequence
from pathlib import Path

from transformers import GenerationConfig

from ..common.extras import MissingExtra
from ..common.loading import ADAPTER_FILE, CheckpointError, UnrecognizedCheckpoint
from ..configuration_perceptiondlm import PerceptionDLMConfig
from ..generation_generate import default_generation_config, update_generation_config
from ..generation_options import OPTIONS
from ..image_processing_perceptiondlm import PerceptionDLMImageProcessor
from ..modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from ..processing_perceptiondlm import PerceptionDLMProcessor
from .files import MissingFile, StateDict, Tensors, WeightFiles, fetch, read_json
from .layouts import OWN_RULES, map_names, read_tokenizer
from .sharded import DistributedFiles
from .source import Source, expect_no, expect_unquantized


def read_own(folder: Path, settings: dict, vision_source, base) -> Source:
    """Reads this package's layout: a saved model, or a training checkpoint.

    A training checkpoint that lacks config and processor takes those of `base`.
    """
    folders = [folder] if base is None else [folder, fetch(base)]
    return _read_own(WeightFiles(folder), folders, vision_source)


def read_sharded(folder: Path, vision_source, base) -> Source:
    """Reads a checkpoint that FSDP saved sharded; `base` has what is not beside it."""
    folders = [folder.parent] if base is None else [folder.parent, fetch(base)]
    return _read_own(DistributedFiles(folder), folders, vision_source)


def read_adapter(folder: Path, vision_source, base) -> Source:
    """Reads a PEFT adapter, merged into its base in memory."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtra(error, "train") from error

    base = base or read_json(folder / ADAPTER_FILE).get("base_model_name_or_path")
    if base is None:
        raise CheckpointError(f"expected base, the model that {folder} adapts, got none")
    base_folder = fetch(base)
    settings = read_json(base_folder / "config.json")
    kind = settings.get("model_type")
    if kind != PerceptionDLMConfig.model_type:
        raise UnrecognizedCheckpoint(f"expected a converted base in {base_folder}, got {kind!r}")
    expect_unquantized(settings, base_folder)

    model = PerceptionDLMForConditionalGeneration.from_pretrained(base_folder, dtype="auto")
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return _read_own(StateDict(folder, merged.state_dict()), [folder, base_folder], vision_source)


def _read_own(tensors: Tensors, folders: Sequence[Path], vision_source) -> Source:
    """Reads config, tokenizer and processor from the first of the folders that has them."""
    expect_no("vision_source", vision_source, "a checkpoint that has its own vision tower")
    config = PerceptionDLMConfig.from_dict(read_json(_first("config.json", folders)))
    tokenizer = read_tokenizer(_first("tokenizer.json", folders).parent)
    origins = map_names(tensors, OWN_RULES)
    decoding = own_generation_config(folders, config)
    return Source(config, own_processor(folders, config, tokenizer), origins, decoding)


def own_generation_config(folders, config) -> GenerationConfig:
    """Returns the decoding defaults of the config, and over them those saved in their own file."""
    decoding = default_generation_config(config)
    saved = next((f for f in folders if (f / "generation_config.json").exists()), None)
    if saved is not None:
        settings = read_json(saved / "generation_config.json")
        decoding = update_generation_config(decoding, settings, saved)
    known = {name: getattr(decoding, name, None) for name in (*OPTIONS, "do_sample")}
    return GenerationConfig(**{name: value for name, value in known.items() if value is not None})


def own_processor(folders, config, tokenizer) -> PerceptionDLMProcessor:
    """Builds the saved processor without running the checkpoint's code, else the config's."""
    template = {"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    tokenizer.chat_template = None
    saved = next((f for f in folders if (f / "processor_config.json").exists()), None)
    if saved is None:
        return PerceptionDLMProcessor.from_config(config, tokenizer, **template)

    settings = read_json(saved / "processor_config.json")
    images = settings.get("image_processor", {})
    images = PerceptionDLMImageProcessor(**_known(PerceptionDLMImageProcessor, images))
    own = _known(PerceptionDLMProcessor, settings)
    own.pop("image_processor", None)
    return PerceptionDLMProcessor(images, tokenizer, **{**own, **template})


def _known(kind: type, settings: dict) -> dict:
    """Keeps the settings that a class's constructor takes.

    What else a file says (whose code to load, say) is not carried on.
    """
    names = inspect.signature(kind).parameters.keys()
    return {name: settings[name] for name in names if name in settings}


def _first(name: str, folders: Sequence[Path]) -> Path:
    """Returns the first of the folders' files of this name."""
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    places = " or ".join(map(str, folders))
    raise MissingFile(f"expected {name} in {places}, got no such file; name a base that has it")
