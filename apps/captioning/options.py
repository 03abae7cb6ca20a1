"""Refuses options of `perceptiondlm caption` that contradict, or have no use together."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...generation_options import TEMPLATE_DECIDES, options_of
from ...generation_templates import Template
from .outputs import format_of

REGIONS = ("masks", "label_maps", "box", "polygon", "everything", "point", "text")
REGION_OPTIONS = (
    "instruction",
    "region_question",
    "segmenter",
    "max_regions",
    "fill",
    *options_of("captions"),
)
MAX_NUMBER = 1000  # of a region
NEEDED = {  # option: others, of which it needs one
    "font": ("output", "animate"),
    "fill": ("output", "animate"),
    "subfolder": ("model",),
    "revision": ("model",),
}


def check_options(args: argparse.Namespace):
    """Raises ValueError for options that contradict, or have nothing to act on."""
    regions = [name for name in REGIONS if getattr(args, name)]
    if bool(regions) == bool(args.question):
        raise ValueError(
            f"expected regions ({', '.join(map(flag, REGIONS))}) or a --question,"
            f" got {'both' if regions else 'neither'}; try --help for examples"
        )
    _check_prompts(args)
    if args.font is not None and not args.font.is_file():
        raise FileNotFoundError(f"expected a TrueType font at {args.font}, found none")

    if args.question:
        if format_of(args.captions, args.format) == "coco":
            raise ValueError("expected text, json or jsonl for answers, got --format coco")
        _refuse(args, REGION_OPTIONS, "regions", "a --question")
    else:
        _refuse(args, options_of("answers"), "a --question", "regions")
    for name, others in NEEDED.items():
        if getattr(args, name) is not None and all(getattr(args, o) is None for o in others):
            wanted = " or ".join(map(flag, others))
            raise ValueError(f"expected {wanted} with {flag(name)}, got it alone")
    _check_places(args)
    _check_texts(args)
    _check_questions(args)
    _check_template(args)


def _refuse(args: argparse.Namespace, names: Sequence[str], theirs: str, ours: str):
    given = [flag(name) for name in names if getattr(args, name) not in (None, [])]
    if given:
        raise ValueError(f"expected {', '.join(given)} with {theirs} alone, got {ours}")


def _check_prompts(args: argparse.Namespace):
    """Refuses what a segmenter could not be asked for together, and one that is not asked."""
    prompts = [name for name in ("point", "text") if getattr(args, name)]
    if args.box and args.segmenter:
        prompts.append("box")
    if args.everything and prompts:
        got = ", ".join(map(flag, prompts))
        raise ValueError(f"expected --everything or prompts for its regions, got {got} with it")
    if args.segmenter is not None and not (args.everything or prompts):
        raise ValueError(
            "expected --everything, --point, --box or --text with --segmenter, got it alone"
        )


def _check_places(args: argparse.Namespace):
    if args.recursive and not any(Path(image).is_dir() for image in args.images):
        raise ValueError("expected a folder of images with --recursive, got none")
    if args.revision is not None and Path(args.model).exists():
        raise ValueError(f"expected a Hub id with --revision, got the folder {args.model}")


def _check_questions(args: argparse.Namespace):
    """Refuses questions of regions that are none, or have one already."""
    numbers = [number for number, _ in args.region_question]
    for number, text in args.region_question:
        if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= MAX_NUMBER:
            raise ValueError(f"expected --region-question 1, 2, ... and a text, got {number!r}")
        if not text.strip():
            raise ValueError(f"expected a question for region {number}, got none")
    if len(set(map(int, numbers))) < len(numbers):
        raise ValueError(f"expected one --region-question a region, got {', '.join(numbers)}")


def _check_template(args: argparse.Namespace):
    """Refuses what is no template, and options that have no use beside one."""
    if args.template is None:
        return
    template = Template.parse(args.template)
    for name in TEMPLATE_DECIDES:
        if getattr(args, name, None) is not None:
            raise ValueError(
                f"expected no {flag(name)} with a --template, got {getattr(args, name)}"
            )
    if args.animate is not None and template.num_lengths > 1:
        raise ValueError(
            "expected a --template whose fields have one length each with --animate, got several"
        )


def _check_texts(args: argparse.Namespace):
    """Refuses bytes that are not text: Python carries them as lone surrogates."""
    for name, texts in (
        ("question", args.question),
        ("instruction", [args.instruction or ""]),
        ("template", [args.template or ""]),
        ("region_question", [text for _, text in args.region_question]),
        ("text", args.text),
    ):
        for text in texts:
            if not text.isascii() and text != text.encode("utf-8", "ignore").decode("utf-8"):
                raise ValueError(f"expected UTF-8 text for {flag(name)}, got {text!a}")


def flag(name: str) -> str:
    """Returns an option's name as it is typed."""
    return f"--{name.replace('_', '-')}"
