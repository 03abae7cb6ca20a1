"""Runs `perceptiondlm caption`: captions for the regions of images, or answers about images."""

import argparse
import sys
from pathlib import Path

from ...common.option_arguments import add_option_arguments, given_options
from .model_arguments import add_model_arguments

EPILOG = """\
examples:
  one image, two regions as PNG masks (same size as the image, not black inside):
    perceptiondlm caption photo.jpg --masks cup.png spoon.png
  regions as boxes or polygons, in pixels:
    perceptiondlm caption photo.jpg --box 40,60,220,300 --polygon 300,80,380,90,350,200
  regions that are found: everything, what lies at a point, or what a box holds; by a model, text:
    perceptiondlm caption photo.jpg --everything --output seen.png
    perceptiondlm caption photo.jpg --point 320,200 --point 80,410
    perceptiondlm caption photo.jpg --box 40,60,220,300 --segmenter facebook/sam2.1-hiera-small
    perceptiondlm caption photo.jpg --text mug --segmenter facebook/sam3
  see it: regions in color with their captions, and the captions appearing step by step:
    perceptiondlm caption photo.jpg --masks cup.png --output seen.png --animate denoising.gif
  a folder of images and one of masks (cat.jpg goes with cat.png, cat_0.png, cat_1.png, cat/*;
  the masks of a single image may have any names):
    perceptiondlm caption photos/ --masks masks/ --captions captions.jsonl
  COCO annotations (or SAM's, LabelMe's, Label Studio's, CVAT's...), captions back as COCO:
    perceptiondlm caption photos/ --masks instances.json --captions captioned.coco.json
  a label map, in which every color is a region:
    perceptiondlm caption photo.jpg --label-maps segmentation.png
  a question about the whole image, or about the first region:
    perceptiondlm caption photo.jpg --question "What is on the table?"
    perceptiondlm caption photo.jpg --masks cup.png --region-question 1 "What is it made of?"
  another checkpoint, fewer steps:
    perceptiondlm caption photo.jpg --masks cup.png --model owner/name --steps 8

exit codes:
  0  every image was done
  1  some images or regions failed; each is reported on stderr, the others are done
  2  nothing was done: the command line, the model or the inputs as a whole cannot be used
  130  interrupted (Ctrl-C); what was done until then is kept
"""

DONE, SOME_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def configure(parser: argparse.ArgumentParser):
    """Adds the arguments to the `caption` parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Describes each masked region of an image, all regions in one denoising process; or, with"
        "\n--question, answers about the whole image. Captions go to stdout unless --captions"
        " names\na file."
    )
    parser.epilog = EPILOG

    parser.add_argument(
        "images", nargs="+", metavar="image", help="files, folders, quoted patterns or URLs"
    )
    parser.add_argument("--recursive", action="store_true", help="look into subfolders too")
    _add_regions(parser.add_argument_group("regions"))
    _add_prompts(parser.add_argument_group("regions that are found"))
    _add_results(parser.add_argument_group("results"))
    add_model_arguments(parser.add_argument_group("model"))
    add_option_arguments(parser.add_argument_group("decoding"))


def _add_regions(group):
    group.add_argument(
        "--masks",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="mask images or a folder of them, or annotations: COCO (also panoptic), SAM, LabelMe,"
        " Label Studio, CVAT, YOLO segments, .npy, .npz; a list of what is read: docs/regions.md",
    )
    group.add_argument(
        "--resize-masks",
        action="store_true",
        help="take masks of another size than the image's, by nearest pixel",
    )
    group.add_argument(
        "--label-maps",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="images in which every value or color is a region, but black and the void label"
        " 255, or a folder of them by name",
    )
    group.add_argument(
        "--box",
        action="append",
        default=[],
        type=_box,
        metavar="X0,Y0,X1,Y1",
        help="a region as a box in pixels; with --segmenter, a box around one; repeat for more",
    )
    group.add_argument(
        "--polygon",
        action="append",
        default=[],
        type=_polygon,
        metavar="X,Y,X,Y,...",
        help="a region as a polygon in pixels; repeat for more",
    )
    group.add_argument(
        "--max-regions", type=_positive, metavar="N", help="only the N largest of each image"
    )

    # What is asked.
    group.add_argument("--instruction", help="instead of 'Describe each masked region in detail.'")
    group.add_argument(
        "--region-question",
        action="append",
        default=[],
        nargs=2,
        metavar=("NUMBER", "TEXT"),
        help="ask region 1, 2, ... its own question instead; repeat for more",
    )
    group.add_argument(
        "--question", action="append", default=[], help="ask about the whole image; repeatable"
    )
    group.add_argument(
        "--template",
        help="fixed text with fields to be filled, as 'a {color:1-2} {}', for captions or answers"
        " (docs/prompting.md)",
    )


def _add_prompts(group):
    group.add_argument("--everything", action="store_true", help="all that stands out")
    group.add_argument(
        "--point",
        action="append",
        default=[],
        type=_point,
        metavar="X,Y",
        help="what lies at a place in pixels; repeat for more",
    )
    group.add_argument(
        "--text",
        action="append",
        default=[],
        help="all that a name fits, for a segmenter that reads text; repeat for more",
    )
    group.add_argument(
        "--segmenter",
        metavar="MODEL",
        help="folder or Hub id of a SAM, SAM 2 or SAM 3 (default: offline, which needs no weights)",
    )


def _add_results(group):
    group.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="write captions here (.txt, .json, .jsonl, .coco.json)",
    )
    group.add_argument(
        "--format",
        choices=("text", "json", "jsonl", "coco"),
        help="default: what --captions ends in, else text",
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="PICTURE",
        help="draw regions and captions; for several images, a folder",
    )
    group.add_argument(
        "--animate",
        type=Path,
        metavar="GIF",
        help="the captions appearing step by step (.gif, .webp, .png); for several, a folder",
    )
    group.add_argument("--font", type=Path, help="TrueType font, for captions beyond Latin letters")
    group.add_argument(
        "--fill", action="store_true", default=None, help="tint the regions in the drawing, too"
    )
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Captions what `args` asks for; returns an exit code (see `EPILOG`)."""
    from .options import check_options
    from .run import CaptionRun

    try:
        check_options(args)
        task = CaptionRun(args, given_options(args))
    except (ValueError, OSError) as error:
        report(str(error))
        return USAGE
    except KeyboardInterrupt:
        report("interrupted before the first image")
        return INTERRUPTED
    return task.run()


def report(message: str):
    """Says something on stderr, above the progress bar."""
    from tqdm import tqdm

    tqdm.write(f"perceptiondlm caption: {message}", file=sys.stderr)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers with commas, got {text!r}") from error


def _box(text: str) -> list[float]:
    box = _numbers(text)
    if len(box) != 4:
        raise argparse.ArgumentTypeError(f"expected X0,Y0,X1,Y1, got {text!r}")
    return box


def _point(text: str) -> list[float]:
    point = _numbers(text)
    if len(point) != 2:
        raise argparse.ArgumentTypeError(f"expected X,Y, got {text!r}")
    return point


def _polygon(text: str) -> list[float]:
    polygon = _numbers(text)
    if len(polygon) < 6 or len(polygon) % 2:
        raise argparse.ArgumentTypeError(f"expected three points or more, X,Y each, got {text!r}")
    return polygon


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
