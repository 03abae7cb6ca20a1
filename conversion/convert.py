"""Writes a checkpoint of any known layout as a self-contained folder, whole or not at all."""

import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_relative_import_files

from ..common.folders import OutputExists, clear_unfinished, expect_folder, new_folder
from ..common.loading import CheckpointError
from ..configuration_perceptiondlm import AUTO_MAP
from ..generation_generate import take_defaults
from .files import fetch
from .source import Source
from .sources import read_source

MODEL_CLASS = "PerceptionDLMForConditionalGeneration"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class VerificationFailed(CheckpointError):
    """What was written does not equal the source."""


# As it is named, not as it resolves: the files of a Hub snapshot are links into `blobs/`, where
# they have other names and no neighbors.
ROOT = Path(os.path.abspath(__file__)).parents[1]
MODEL_MODULES = ("modeling_perceptiondlm.py", "processing_perceptiondlm.py")


def convert(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    vision_source: str | Path | None = None,
    base: str | Path | None = None,
    force: bool = False,
    verify: bool = False,
) -> Path:
    """Converts a checkpoint to a folder that loads by itself, in one go or not at all.

    Args:
        source: a folder or a Hub id.
        output: the folder to make.
        dtype: of the weights written: "float32", "bfloat16" or "float16"; default: the source's.
        max_shard_size: bytes, or say "5GB".
        vision_source: folder or Hub id of SigLIP-2: weights for a fresh Base from LLaDA; for
            LLaDA-V the config alone (a file will do), default SigLIP-2 so400m patch 14 at 384.
        base: of an adapter, its model (default: the recorded one); of a training checkpoint, a
            folder with the config and processor that it lacks.
        force: replace the output.
        verify: before the output appears, reload it through the Auto classes, compare every tensor
            with the source bit for bit, and run a forward pass on a random image.

    Returns the output's path. Raises a `CheckpointError` (a ValueError; for files that are not
    there also a FileNotFoundError), FileExistsError for an output that would be lost, or OSError
    with ENOSPC on a full disk.
    """
    output, dtype = Path(os.path.abspath(output)), parse_dtype(dtype)
    limit = parse_size(max_shard_size)

    # all that can be refused is refused before anything is written
    folder = fetch(source)
    clear_unfinished(output)
    expect_free_output(output, [folder, vision_source, base], force)
    opened = read_source(folder, vision_source, base)
    dtype = dtype or opened.dtype
    shards = plan_shards(opened, dtype, limit)

    with new_folder(output, force) as unfinished:
        expect_space(unfinished, shards, dtype, opened)
        write_settings(unfinished, opened, dtype)
        copy_modules(unfinished)
        write_weights(unfinished, opened, shards, dtype)
        if verify:
            check_folder(unfinished, opened, dtype)
    return output


def parse_size(size: str | int) -> int:
    """Returns the bytes of a number or a text such as 5GB or 200 MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B|)", str(size).strip().upper())
    value = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if value < 1:
        raise CheckpointError(f"expected max_shard_size such as 5GB, got {size!r}")
    return value


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Returns a torch dtype, given by its name or itself."""
    dtype = DTYPES.get(dtype, dtype)
    if dtype is not None and dtype not in DTYPES.values():
        raise CheckpointError(f"expected dtype among {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def expect_free_output(output: Path, sources: Sequence[str | Path | None], force: bool):
    """Refuses to replace an output without `force`, and to replace the source even with it."""
    target = output.resolve()
    for source in (Path(source).resolve() for source in sources if source is not None):
        if target == source or target in source.parents:
            raise OutputExists(f"expected an output apart from the source {source}, got {output}")
    if os.path.lexists(output) and not force:
        raise OutputExists(f"expected an output that is not there yet, got {output}; see force")
    expect_folder(output)


def plan_shards(source: Source, dtype: torch.dtype, limit: int) -> list[list[str]]:
    """Chooses the names of each shard, in the order in which the source holds them."""
    shards, size = [[]], 0
    for name, origin in source.origins.items():
        own = byte_size(origin.shape, dtype)
        if shards[-1] and size + own > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return shards


def byte_size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Returns the bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def expect_space(folder: Path, shards: list[list[str]], dtype: torch.dtype, source: Source):
    """Raises OSError (ENOSPC) if the disk has too little space for what is to be written."""
    needed = sum(byte_size(source.origins[n].shape, dtype) for names in shards for n in names)
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = f"expected {needed} bytes free for the weights, got {free}"
        raise OSError(errno.ENOSPC, message, str(folder.parent.parent))


def write_weights(folder: Path, source: Source, shards: list[list[str]], dtype: torch.dtype):
    """Writes shard by shard, with an index if there are several."""
    weight_map = {}
    for i, names in enumerate(tqdm(shards, desc="Writing shards", disable=len(shards) == 1)):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        write_shard(folder / file, source, names, dtype)
        shutil.copymode(folder / "config.json", folder / file)  # safetensors: for the owner only
        weight_map |= dict.fromkeys(names, file)

    if len(shards) > 1:
        sizes = [byte_size(origin.shape, dtype) for origin in source.origins.values()]
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_shard(path: Path, source: Source, names: list[str], dtype: torch.dtype):
    """Writes one file of weights; OSError with ENOSPC if the disk is full."""
    tensors = {name: source.origins[name].load().to(dtype).contiguous() for name in names}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def write_settings(folder: Path, source: Source, dtype: torch.dtype):
    """Writes the configs of the model and of decoding, tokenizer and processor."""
    config = source.config
    of_config = take_defaults(config)
    decoding = source.generation_config or of_config
    config.architectures = [MODEL_CLASS]
    config.auto_map = dict(AUTO_MAP)
    config.dtype = dtype
    config.save_pretrained(folder)
    decoding.save_pretrained(folder)
    source.processor.save_pretrained(folder)


def copy_modules(folder: Path):
    """Copies the model's modules and all that they import, and the license if it is there."""
    paths = {ROOT / name for name in MODEL_MODULES}
    for module in list(paths):
        paths |= {Path(path) for path in get_relative_import_files(module)}

    license = ROOT / "LICENSE"
    for path in [*sorted(paths), *([license] if license.exists() else [])]:
        shutil.copyfile(path, folder / path.name)


def check_folder(folder: Path, source: Source, dtype: torch.dtype):
    """Reloads a converted folder as a user would and compares it with its source."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    loaded = model.state_dict()
    for name, origin in tqdm(source.origins.items(), desc="Comparing tensors"):
        expected = origin.load().to(dtype).contiguous()
        if loaded[name].dtype != dtype or not same_bits(loaded[name], expected):
            raise VerificationFailed(f"expected {name} as in the source, got other values")

    logits = forward_random_image(model, processor)
    if not bool(logits.isfinite().all()):
        raise VerificationFailed("expected finite logits for a random image, got others")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tells whether two tensors are equal in every bit, NaN included."""
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@torch.no_grad()
def forward_random_image(model, processor) -> torch.Tensor:
    """Returns logits of masked captions, or of an answer, for an image of noise."""
    noise = torch.randint(0, 256, (61, 97, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.to(torch.uint8).numpy())
    if model.config.num_region_prompts:
        left_half = Image.new("L", image.size)
        left_half.paste(255, (0, 0, 48, 61))
        inputs = processor(image, masks=[left_half], caption_length=4)
    else:
        inputs = processor(image, prompts="What is this?", max_new_tokens=4)
    return model(**inputs, logits_to_keep=4).logits
