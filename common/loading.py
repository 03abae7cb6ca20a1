"""Loads a checkpoint's model and processor, from a folder or from the Hub: one way for everybody.

Captioning, evaluation and training load through this module; publishing and conversion ask it about
places. So a path that is not there, an adapter or a checkpoint of another kind gets the same answer
from each of them.
"""

import logging
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import cached_file

from ..configuration_perceptiondlm import PerceptionDLMConfig
from ..modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from ..processing_perceptiondlm import PerceptionDLMProcessor
from .quantization import quantization_config

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"
NO_ERRORS = {  # of `cached_file`: None for whatever cannot be had
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or converted."""


class UnrecognizedCheckpoint(CheckpointError):
    """Not a checkpoint of a known layout, or not there at all."""


class MissingCheckpoint(UnrecognizedCheckpoint, FileNotFoundError):
    """A place at which there is no checkpoint."""


def load_model(
    source: str | Path,
    subfolder: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    attn_implementation: str | None = None,
    config_fields: dict | None = None,
    quantize: str | None = None,
) -> tuple[PerceptionDLMForConditionalGeneration, PerceptionDLMProcessor]:
    """Loads a checkpoint into this package's own classes; no code of its repository is run.

    Args:
        source: a folder or a Hub id.
        subfolder: of it, for weights and processor.
        dtype: of the parameters; "auto": as saved, but float32 for 16 bits on a given `device`
            that only emulates them.
        device: where the model is moved (None: it stays on the CPU); see `default_device`.
        revision, token: of a Hub repository.
        attn_implementation: as in transformers.
        config_fields: fields of `PerceptionDLMConfig` instead of the saved ones, which the
            processor follows.
        quantize: kind of weights that the decoder's linear layers get, see `quantization.KINDS`.

    Raises as `expect_checkpoint`, and ValueError for weights that do not fit the config, a device
    that is not there, or one that cannot run what is quantized.
    """
    device = None if device is None else usable_device(device)
    place = {"revision": revision, "token": token, "subfolder": subfolder or ""}
    expect_checkpoint(source, **place)
    if dtype == "auto" and quantize is None and device is not None and emulates(device):
        dtype = _computed(PerceptionDLMConfig.from_pretrained(source, **place).dtype)

    # a config of other fields may have parts that were not saved, which begin at random
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if config_fields is not None:
        options["config"] = PerceptionDLMConfig.from_pretrained(source, **place, **config_fields)
    if quantize is not None:
        config = options.get("config") or PerceptionDLMConfig.from_pretrained(source, **place)
        options |= _quantized(quantize, config, dtype, device or torch.device("cpu"))
    model = PerceptionDLMForConditionalGeneration.from_pretrained(source, **options, **place)
    processor = PerceptionDLMProcessor.from_pretrained(source, **place)
    if config_fields is not None:
        processor.follow(options["config"])
    return model if device is None else model.to(device), processor


def emulates(device: torch.device) -> bool:
    """Tells whether a device computes bfloat16 by way of float32, and many times slower than it.

    So do x86 processors without instructions for it (AVX512-BF16 or AMX).
    """
    if device.type != "cpu" or not torch.cpu._is_avx2_supported():
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _computed(saved) -> str | torch.dtype:
    """Returns the dtype to load weights in where 16 bits are emulated, and says so."""
    saved = getattr(torch, saved) if isinstance(saved, str) else saved
    if saved not in (torch.bfloat16, torch.float16):
        return "auto"
    logger.warning(
        "this processor emulates %s: the weights are loaded in float32, which takes twice the"
        " memory and is faster; dtype=%s keeps them as saved",
        *[str(saved).removeprefix("torch.")] * 2,
    )
    return torch.float32


def _quantized(
    kind: str, config: PerceptionDLMConfig, dtype: str | torch.dtype, device: torch.device
) -> dict:
    """Returns the options of `from_pretrained` that quantize: right on the device it will run on.

    There the kernels are, and a GPU's memory is enough where the CPU's may not be.
    """
    dtype = config.dtype if dtype == "auto" else dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    quantizing = {"quantization_config": quantization_config(kind, config, dtype, device)}
    return quantizing if device.type == "cpu" else quantizing | {"device_map": {"": device}}


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer alone, by the class that a processor's is loaded by.

    Raises FileNotFoundError for a path that is not there.
    """
    local_path(source)
    return PreTrainedTokenizerFast.from_pretrained(source)


def default_device() -> torch.device:
    """Returns the accelerator if there is one, else the CPU."""
    found = torch.accelerator.is_available()
    return torch.accelerator.current_accelerator() if found else torch.device("cpu")


def usable_device(device: str | torch.device) -> torch.device:
    """Returns a device, after trying it; raises ValueError for one that torch does not have."""
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # not known, or not built for
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"expected a device such as cpu or cuda:0, got {str(device)!r}: {reason}"
        ) from error
    if found.type == "meta":
        raise ValueError("expected a device that holds values, got 'meta'")
    return found


def local_path(source: str | Path) -> Path | None:
    """Returns the folder or file that a source names, or None for a Hub id, not looked up here.

    Raises MissingCheckpoint where nothing is there and it cannot be, or was hardly meant as, a Hub
    id: for all but "owner/name", and for that too if a folder "owner" is there.
    """
    path, text = Path(source), str(source)
    if text and path.exists():
        return path
    is_id = text.count("/") == 1 and "\\" not in text and not text.startswith((".", "/", "~"))
    if isinstance(source, Path) or not is_id or path.parent.exists():
        raise MissingCheckpoint(
            f"expected a folder or the id of a Hub repository (owner/name), got {text!r}: no such"
            " file or folder"
        )
    return None


def expect_checkpoint(source: str | Path, subfolder: str | None = None, **place):
    """Refuses what is no checkpoint of this package's layout, before anything else is loaded.

    Args:
        source: a folder or a Hub id.
        subfolder: of it.
        place: `revision` and `token`, of a Hub repository.

    Raises FileNotFoundError for a path that is not there or has no config, ValueError for a
    checkpoint of another kind, OSError where the Hub has, or gives, none.
    """
    place |= {"subfolder": subfolder or ""}
    path = local_path(source)
    where = source if path is None else path / place["subfolder"]
    if path is not None and not where.is_dir():
        raise MissingCheckpoint(f"expected a checkpoint's folder, got {where}, which is none")

    # A cached adapter is known without a network; one on the Hub once its config was looked for.
    if cached_file(source, ADAPTER_FILE, local_files_only=True, **NO_ERRORS, **place):
        raise adapter_error(where)
    settings, _ = PreTrainedConfig.get_config_dict(source, **place)
    if cached_file(source, ADAPTER_FILE, **NO_ERRORS, **place):
        raise adapter_error(where)

    if not settings:
        raise MissingCheckpoint(f"expected a checkpoint with a config.json in {where}, got none")
    if settings.get("model_type") != PerceptionDLMConfig.model_type:
        raise UnrecognizedCheckpoint(
            f"expected a checkpoint with model_type {PerceptionDLMConfig.model_type!r} in {where},"
            f" got {settings.get('model_type')!r}: convert other layouts with convert_checkpoint.py"
        )


def adapter_error(place: str | Path) -> UnrecognizedCheckpoint:
    """Returns the error that says what to do with an adapter where a whole checkpoint is needed."""
    return UnrecognizedCheckpoint(
        f"expected a whole checkpoint, got the adapter in {place}: merge it into its model with"
        f" convert_checkpoint.py --source {place} --base MODEL --output FOLDER"
    )
