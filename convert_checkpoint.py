"""Turns checkpoints of every known layout into a self-contained folder of this package's layout.

    python convert_checkpoint.py --source RELEASED_FOLDER --output FOLDER [--push-to-hub OWNER/NAME]

Sources: released PerceptionDLM and PerceptionDLM-Base; LLaDA (its own names or Llama's) with a
SigLIP-2 tower, for a fresh Base; LLaDA-V; this package's own layout, training checkpoints (FSDP's
sharded ones too) and PEFT adapters.
"""

import argparse
import errno
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the folder around it is the package
    from types import ModuleType

    __package__ = "perceptiondlm"
    sys.modules[__package__] = ModuleType(__package__)
    sys.modules[__package__].__path__ = [os.path.dirname(os.path.abspath(__file__))]

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_relative_import_files

from .checkpoint_files import (
    ConversionError,
    DamagedFile,
    MissingFile,
    MissingTensor,
    UnknownTensor,
    UnrecognisedSource,
    WrongShape,
    fetch,
)
from .checkpoint_output import OutputExists, clear_unfinished, expect_folder, new_folder
from .checkpoint_sources import Source, read_source
from .configuration_perceptiondlm import AUTO_MAP
from .extras import MissingExtra

MODEL_CLASS = "PerceptionDLMForConditionalGeneration"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class VerificationFailed(ConversionError):
    """What was written does not equal the source."""

    exit_code = 11


FULL_DISK_CODE, NOT_PUBLISHED_CODE = 9, 12
# As it is named, not as it resolves: the files of a Hub snapshot are links into `blobs/`, where
# they have other names and no neighbours.
OWN_FILE = Path(os.path.abspath(__file__))
PUBLISHES = (OWN_FILE.parent / "apps").is_dir()  # not from a checkpoint's copy
EXIT_CODES = f"""exit codes:
  0  converted
  1  any other failure
  2  wrong arguments
  {UnrecognisedSource.exit_code}  the source is not there, or is no known checkpoint
  {MissingFile.exit_code}  a shard or another needed file is missing
  {DamagedFile.exit_code}  a file is truncated or unreadable
  {UnknownTensor.exit_code}  a tensor that no rule, or no part of the model, has a place for
  {MissingTensor.exit_code}  a rule or a part of the model without its tensor
  {WrongShape.exit_code}  a tensor of another shape than the config says
  {FULL_DISK_CODE}  the disk is full
  {OutputExists.exit_code} the output exists (see --force)
  {VerificationFailed.exit_code} what was written does not equal the source (--verify)
  {NOT_PUBLISHED_CODE} converted, but not published (--push-to-hub): `perceptiondlm publish` goes on
"""


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
            with the source bit for bit, and run a forward pass on a random picture.

    Returns the output's path. Raises a `ConversionError` (a ValueError; for files also a
    FileNotFoundError or FileExistsError) that says what was expected and what came, or OSError
    with ENOSPC on a full disk.
    """
    output, dtype = Path(os.path.abspath(output)), parse_dtype(dtype)
    limit = parse_size(max_shard_size)
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
    """Bytes of a number or a text such as 5GB or 200 MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B|)", str(size).strip().upper())
    value = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if value < 1:
        raise ConversionError(f"expected max_shard_size such as 5GB, got {size!r}")
    return value


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype by its name or itself."""
    dtype = DTYPES.get(dtype, dtype)
    if dtype is not None and dtype not in DTYPES.values():
        raise ConversionError(f"expected dtype among {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def expect_free_output(output: Path, sources: Sequence[str | Path | None], force: bool):
    """Refuses to replace without `force`, and what is converted even with it."""
    target = output.resolve()
    for source in (Path(source).resolve() for source in sources if source is not None):
        if target == source or target in source.parents:
            raise OutputExists(f"expected an output apart from the source {source}, got {output}")
    if os.path.lexists(output) and not force:
        raise OutputExists(f"expected an output that is not there yet, got {output}; see force")
    expect_folder(output)


def plan_shards(source: Source, dtype: torch.dtype, limit: int) -> list[list[str]]:
    """Target names of each shard, in the order in which the source holds them."""
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
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def expect_space(folder: Path, shards: list[list[str]], dtype: torch.dtype, source: Source):
    """Raises ENOSPC before writing what cannot fit."""
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
    """Writes config, tokenizer and processor."""
    config = source.config
    config.architectures = [MODEL_CLASS]
    config.auto_map = dict(AUTO_MAP)
    config.dtype = dtype
    config.save_pretrained(folder)
    source.processor.save_pretrained(folder)


def copy_modules(folder: Path):
    """Copies this module, all that it needs, and so all of the model's; the license if there."""
    modules = [OWN_FILE, *get_relative_import_files(OWN_FILE)]
    license = OWN_FILE.with_name("LICENSE")
    for path in [*modules, *([license] if license.exists() else [])]:
        shutil.copyfile(path, folder / Path(path).name)


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
    logits = forward_random_picture(model, processor)
    if not bool(logits.isfinite().all()):
        raise VerificationFailed("expected finite logits for a random picture, got others")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every bit, NaN included."""
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@torch.no_grad()
def forward_random_picture(model, processor) -> torch.Tensor:
    """Logits of masked captions, or of an answer, for a picture of noise."""
    noise = torch.randint(0, 256, (61, 97, 3), generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.to(torch.uint8).numpy())
    if model.config.num_region_prompts:
        left_half = Image.new("L", picture.size)
        left_half.paste(255, (0, 0, 48, 61))
        inputs = processor(picture, masks=[left_half], caption_length=4)
    else:
        inputs = processor(picture, prompts="What is this?", max_new_tokens=4)
    return model(**inputs, logits_to_keep=4).logits


def argument_parser() -> argparse.ArgumentParser:
    """The command's options: `convert`'s, and those of publishing."""
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--source", required=True, help="checkpoint folder or Hub id")
    add("--output", required=True, type=Path, help="folder to make")
    add("--dtype", choices=DTYPES, help="of the weights written (default: the source's)")
    add("--max-shard-size", default="5GB", help="of a weight file (default: %(default)s)")
    add("--vision-source", help="SigLIP-2 for a Base from LLaDA, or the SigLIP config of LLaDA-V")
    add("--base", help="model of an adapter; config and processor of a training checkpoint")
    add("--force", action="store_true", help="replace the output")
    add("--verify", action="store_true", help="reload, compare with the source, run once")
    if PUBLISHES:
        publishing().add_push_options(parser.add_argument_group("publishing"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = argument_parser().parse_args(argv)
    parameters = inspect.signature(convert).parameters
    try:
        output = convert(**{name: getattr(args, name) for name in parameters})
    except (ValueError, OSError, MissingExtra) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    print(output)
    return publish(args, sys.argv[1:] if argv is None else argv) if PUBLISHES else 0


def publish(args: argparse.Namespace, argv: list[str]) -> int:
    """Records where the output comes from and, when asked, puts it on the Hub."""
    command = ["python", "convert_checkpoint.py", *argv]
    publishing().write_provenance(args.output, args.source, fetch(args.source), command)
    if args.push_to_hub is None:
        return 0
    failed = publishing().push_from(args, args.output, args.push_to_hub)
    return NOT_PUBLISHED_CODE if failed else 0


def publishing():
    """The package's module for it, not imported as the modules are that travel with this one."""
    return importlib.import_module(f"{__package__}.apps.publishing")


def exit_code(error: Exception) -> int:
    """The command's code for a failure (see `EXIT_CODES`)."""
    if isinstance(error, ConversionError):
        return error.exit_code
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return FULL_DISK_CODE if is_full else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # to clean up
    sys.exit(main())
