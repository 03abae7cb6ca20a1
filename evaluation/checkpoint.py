"""The checkpoint that a step measures and how it is to decode: options that several steps share."""

import argparse
import hashlib
import json


def parse_option(text: str) -> tuple[str, object]:
    """NAME=VALUE, the value as JSON where it is (`steps=16`), else as text (`remasking=random`)."""
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def load_model(path: str, subfolder: str, dtype: str, device: str):
    """A checkpoint and its processor, ready to caption."""
    from transformers import AutoModel, AutoProcessor

    common = {"trust_remote_code": True, "subfolder": subfolder}
    model = AutoModel.from_pretrained(path, dtype=dtype, **common).eval().to(device)
    return model, AutoProcessor.from_pretrained(path, **common)


def add_checkpoint_arguments(parser: argparse.ArgumentParser, *, required: bool = True):
    add = parser.add_argument
    add("--model", required=required, help="checkpoint: folder or Hub id")
    add("--subfolder", default="", help="of the checkpoint, for weights and processor")
    add("--dtype", default="auto", help="auto, float32, bfloat16, ...")
    add("--device", help="default: the accelerator if there is one, else the CPU")


def load_checkpoint(args: argparse.Namespace):
    """The model and processor that `add_checkpoint_arguments` names."""
    if args.model is None:
        raise ValueError("expected --model PATH, a checkpoint's folder or Hub id, got none")
    return load_model(args.model, args.subfolder, args.dtype, args.device or default_device())


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    import torch

    found = torch.accelerator.is_available()
    return str(torch.accelerator.current_accelerator()) if found else "cpu"


def checkpoint_record(args: argparse.Namespace, model) -> dict:
    """What a report says of the checkpoint."""
    return {
        "model": args.model,
        "subfolder": args.subfolder,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "weights": weights_fingerprint(model),
    }


def weights_fingerprint(model) -> str:
    """A short name of a model's weights: a hash of a few values of each parameter.

    Training changes it; a copy of the folder does not.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:16].float().cpu().numpy()
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()[:16]


def add_option_argument(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        dest="options",
        type=parse_option,
        metavar="NAME=VALUE",
        help="of diffusion_generate, as steps=32; may be repeated",
    )


def add_decoding_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument
    add("--steps", type=int, help="denoising steps; with --adaptive, the most that may be taken")
    add("--adaptive", help="commit what is certain enough: threshold, factor or entropy_bound")
    add("--adaptive-value", type=float, help="the threshold, factor or bound")
    add_option_argument(parser)


def decoding_options(args: argparse.Namespace) -> dict:
    """Options of `diffusion_generate` that were given; an `--option` wins over its own flag."""
    flags = {name: getattr(args, name) for name in ("steps", "adaptive", "adaptive_value")}
    return {name: v for name, v in flags.items() if v is not None} | dict(args.options)
