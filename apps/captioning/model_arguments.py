"""Declares the arguments that say which model is run and where, and loads it."""

import argparse

from ...common.quantization import add_quantize_argument


def add_model_arguments(group):
    """Adds the arguments that `load_captioner` reads to a parser or a group of one."""
    group.add_argument("--model", help="folder or Hub id (default: the small embedded model)")
    group.add_argument("--subfolder", help="folder of the weights inside it")
    group.add_argument("--revision", help="branch, tag or commit on the Hub")
    group.add_argument("--device", help="say cpu or cuda:1 (default: a GPU if there is one)")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="default: as saved, or float32 where the CPU emulates 16 bits",
    )
    add_quantize_argument(group)


def load_captioner(args: argparse.Namespace, **options):
    """Loads the `RegionCaptioner` that the arguments name, with decoding options of every call.

    Raises as `RegionCaptioner.from_pretrained`.
    """
    from .captioner import RegionCaptioner

    if args.quantize is not None:
        options["quantize"] = args.quantize
    return RegionCaptioner.from_pretrained(
        args.model,
        subfolder=args.subfolder,
        revision=args.revision,
        device=args.device,
        dtype=args.dtype,
        **options,
    )
