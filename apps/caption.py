"""`perceptiondlm caption`: captions for the regions of pictures, or answers about pictures."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

EPILOG = """\
examples:
  one picture, two regions as PNG masks (same size as the picture, not black inside):
    perceptiondlm caption photo.jpg --masks cup.png spoon.png
  regions as boxes or polygons, in pixels:
    perceptiondlm caption photo.jpg --box 40,60,220,300 --polygon 300,80,380,90,350,200
  see it: regions in colour with their captions, and the captions appearing step by step:
    perceptiondlm caption photo.jpg --masks cup.png --output seen.png --animate denoising.gif
  a folder of pictures and one of masks (cat.jpg goes with cat.png, cat_0.png, cat_1.png, cat/*):
    perceptiondlm caption photos/ --masks masks/ --captions captions.jsonl
  COCO or SAM annotations, captions back as COCO:
    perceptiondlm caption photos/ --masks instances.json --captions captioned.coco.json
  a label map, in which every colour is a region:
    perceptiondlm caption photo.jpg --label-maps segmentation.png
  a question about the whole picture:
    perceptiondlm caption photo.jpg --question "What is on the table?"
  another checkpoint, fewer steps:
    perceptiondlm caption photo.jpg --masks cup.png --model owner/name --steps 8

exit codes:
  0  every picture was done
  1  some pictures failed; each is reported on stderr, the others are done
  2  nothing was done: the command line, the model or the inputs as a whole cannot be used
  130  interrupted (Ctrl-C); what was done until then is kept
"""

DONE, SOME_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# Options handed on to `DiffusionOptions`: (name, type, help).
DECODING = (
    ("steps", int, "denoising steps (default: one for each token of a caption or answer)"),
    ("caption_length", int, "tokens of a region's caption, padding counted (default: 32)"),
    ("max_new_tokens", int, "tokens of an answer (default: 128)"),
    ("block_length", int, "decode an answer in blocks of so many tokens"),
    ("temperature", float, "0 takes the likeliest token (default), more is more random"),
    ("top_k", int, "choose among so many likeliest tokens"),
    ("top_p", float, "choose among the likeliest tokens of so much probability"),
    ("cfg_scale", float, "classifier-free guidance (default: 0, none)"),
    ("adaptive_value", float, "the threshold, factor or bound of --adaptive"),
    ("adaptive_verify", float, "with --adaptive, mask tokens again whose probability falls under"),
    ("prompt_cache", int, "approximate: recompute the prompt only every so many steps"),
    ("batch_size", int, "passes run together, each of as many regions as the model has prompts"),
    ("seed", int, "makes random decoding repeatable"),
)


def configure(parser: argparse.ArgumentParser):
    """Adds the arguments to the `caption` parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Describes each masked region of a picture, all regions in one denoising process; or, with"
        "\n--question, answers about the whole picture. Captions go to stdout unless --captions"
        " names\na file."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "pictures", nargs="+", metavar="picture", help="files, folders, quoted patterns or URLs"
    )
    parser.add_argument("--recursive", action="store_true", help="look into subfolders too")
    _add_regions(parser.add_argument_group("regions"))
    _add_results(parser.add_argument_group("results"))
    _add_model(parser.add_argument_group("model"))
    _add_decoding(parser.add_argument_group("decoding"))


def _add_regions(group):
    group.add_argument(
        "--masks",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="mask pictures, a folder of them, or a JSON file: COCO, SAM, or a list of masks",
    )
    group.add_argument(
        "--label-maps",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="pictures in which every value or colour is a region, or a folder of them by name",
    )
    group.add_argument(
        "--box",
        action="append",
        default=[],
        type=_box,
        metavar="X0,Y0,X1,Y1",
        help="a region as a box in pixels; repeat for more",
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
        "--max-regions", type=_positive, metavar="N", help="only the N largest of each picture"
    )
    group.add_argument("--instruction", help="instead of 'Describe each masked region in detail.'")
    group.add_argument(
        "--question", action="append", default=[], help="ask about the whole picture; repeatable"
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
        help="draw regions and captions; for several pictures, a folder",
    )
    group.add_argument(
        "--animate",
        type=Path,
        metavar="GIF",
        help="the captions appearing step by step (.gif, .webp, .png); for several, a folder",
    )
    group.add_argument("--font", type=Path, help="TrueType font, for captions beyond Latin letters")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_model(group):
    group.add_argument("--model", help="folder or Hub id (default: the small embedded model)")
    group.add_argument("--subfolder", help="folder of the weights inside it")
    group.add_argument("--revision", help="branch, tag or commit on the Hub")
    group.add_argument("--device", help="say cpu or cuda:1 (default: a GPU if there is one)")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="default: as saved",
    )


def _add_decoding(group):
    for name, kind, text in DECODING:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    group.add_argument(
        "--adaptive",
        choices=("threshold", "factor", "entropy_bound"),
        help="commit what is sure enough at each step instead of a fixed number: faster",
    )
    group.add_argument("--remasking", choices=("low_confidence", "random"))
    group.add_argument("--compile", action="store_true", default=None, help="use torch.compile")


def run(args: argparse.Namespace) -> int:
    """Captions what `args` asks for; returns an exit code (see `EPILOG`)."""
    try:
        task = _Task(args)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        # torch raises RuntimeError for a device that it does not know, AssertionError for one that
        # it was not built for
        _report(str(error))
        return USAGE
    except KeyboardInterrupt:
        _report("interrupted before the first picture")
        return INTERRUPTED
    try:
        return task.run()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains
    except OSError as error:
        _report(f"cannot write captions: {error}")
    return SOME_FAILED


class _Task:
    """One command: what goes in, the model, where results go."""

    def __init__(self, args: argparse.Namespace):
        from .inputs import find_pictures
        from .outputs import CaptionWriter, format_of

        self.args = args
        asked = bool(args.masks or args.label_maps or args.box or args.polygon)
        if asked == bool(args.question):
            raise ValueError(
                "expected regions (--masks, --label-maps, --box, --polygon) or a --question,"
                f" got {'both' if asked else 'neither'}; try --help for examples"
            )
        self.pictures = find_pictures(args.pictures, args.recursive)
        self.sources = self._region_sources()
        kind = format_of(args.captions, args.format)
        if kind == "coco" and args.question:
            raise ValueError("expected text, json or jsonl for answers, got --format coco")
        self._check_outputs()
        self.writer = CaptionWriter(kind, args.captions)
        self.failed = self._report_refused()
        self.skipped = 0
        self.captioner = self._load_model()

    def _region_sources(self) -> list:
        from .region_sources import LabelMaps, Shapes, open_sources

        args = self.args
        sources = open_sources(args.masks, self.pictures)
        for path in map(Path, args.label_maps):
            if not path.exists():
                raise FileNotFoundError(f"expected a label map or a folder of them at {path}")
            if path.is_file() and len(self.pictures) > 1:
                raise ValueError(
                    f"expected a folder of label maps for {len(self.pictures)}"
                    f" pictures, got the file {path}"
                )
            sources.append(LabelMaps(path))
        shapes = [{"box": b} for b in args.box] + [{"polygons": [p]} for p in args.polygon]
        return sources + ([Shapes(shapes)] if shapes else [])

    def _check_outputs(self):
        """Refuses, before anything is computed, results that could not be written as meant."""
        from .animation import FORMATS as ANIMATIONS
        from .drawing import SUFFIXES as DRAWINGS

        if self.args.font is not None and not self.args.font.is_file():
            raise FileNotFoundError(f"expected a TrueType font at {self.args.font}, found none")
        originals = {Path(p.path).resolve() for p in self.pictures}
        for option, kinds in (("output", DRAWINGS), ("animate", ANIMATIONS)):
            path = getattr(self.args, option)
            if path is None:
                continue
            if len(self.pictures) > 1 and (path.suffix.lower() in kinds or path.is_file()):
                raise ValueError(
                    f"expected a folder for --{option} with {len(self.pictures)} pictures,"
                    f" got {path}"
                )
            if len(self.pictures) == 1 and path.suffix.lower() not in kinds and not path.is_dir():
                raise ValueError(f"expected --{option} to end in {', '.join(kinds)}, got {path}")
        paths = [self.args.captions, *self._drawn(), *self._animated()]
        given = [path.resolve() for path in paths if path is not None]
        for path in given:
            if path in originals:
                raise ValueError(f"expected results beside the pictures, got {path}, one of them")
        if len(set(given)) < len(given):
            raise ValueError("expected each result in a file of its own, got one file for two")

    def _drawn(self) -> list[Path | None]:
        return output_paths(self.pictures, self.args.output, ".png")

    def _animated(self) -> list[Path | None]:
        return output_paths(self.pictures, self.args.animate, ".gif")

    def _report_refused(self) -> int:
        refused = [line for source in self.sources for line in getattr(source, "refused", [])]
        for line in refused[:10]:
            _report(line)
        if len(refused) > 10:
            _report(f"... and {len(refused) - 10} more file names")
        return len(refused)

    def _load_model(self):
        from transformers.utils import logging

        from .captioner import RegionCaptioner

        args = self.args
        if args.quiet or not sys.stderr.isatty():
            logging.disable_progress_bar()
        names = [name for name, *_ in DECODING] + ["adaptive", "remasking", "compile"]
        options = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
        captioner = RegionCaptioner.from_pretrained(
            args.model,
            subfolder=args.subfolder,
            revision=args.revision,
            device=args.device,
            dtype=args.dtype,
            return_history=args.animate is not None,
            **options,
        )
        captioner.check_options()
        return captioner

    def run(self) -> int:
        """Works through the pictures."""
        from tqdm import tqdm

        hidden = self.args.quiet or len(self.pictures) < 2
        places = zip(self.pictures, self._drawn(), self._animated(), strict=True)
        bar = tqdm(places, total=len(self.pictures), unit="picture", disable=hidden)
        interrupted = False
        try:
            for picture, drawing, animation in bar:
                self._try(picture, drawing, animation)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            bar.close()
            self.writer.close()
        return self._summary(interrupted)

    def _try(self, picture, drawing: Path | None, animation: Path | None):
        from torch import OutOfMemoryError

        try:
            return self._one(picture, drawing, animation)
        except BrokenPipeError:  # nobody reads on
            raise
        except OutOfMemoryError as error:
            _report(f"{picture.path}: out of memory, try --batch-size 1: {error}")
        except (ValueError, OSError) as error:
            _report(f"{picture.path}: {error}")
        self.failed += 1

    def _one(self, picture, drawing: Path | None, animation: Path | None):
        from ..evaluation.files import write_bytes
        from .animation import draw_history, encode_animation
        from .drawing import encode_picture
        from .inputs import open_picture
        from .region_sources import gather_regions

        args = self.args
        image = open_picture(picture.path)
        regions = []
        if args.question:
            result = self.captioner.ask(image, args.question)
        else:
            regions = gather_regions(self.sources, picture, image.size, args.max_regions)
            if not regions:
                return self._without_regions(picture)
            masks = [region.mask for region in regions]
            result = self.captioner(image, masks, instruction=args.instruction)
        if drawing is not None:
            data = encode_picture(result.draw(font=args.font), drawing.suffix)
            write_bytes(drawing, data)
        if animation is not None:
            frames = draw_history(result, font=args.font)
            write_bytes(animation, encode_animation(frames, animation.suffix))
        self.writer.add(picture.path, result, regions)

    def _without_regions(self, picture):
        if picture.named:
            raise ValueError(
                f"expected masks for this picture in {', '.join(self.args.masks)}, found none"
            )
        self.skipped += 1

    def _summary(self, interrupted: bool) -> int:
        done = len(self.writer.records)
        if interrupted:
            _report(f"interrupted: {done} of {len(self.pictures)} pictures done and kept")
            return INTERRUPTED
        if self.skipped:
            _report(f"{self.skipped} of {len(self.pictures)} pictures have no masks, left out")
        if self.failed:
            _report(f"{done} pictures done, {self.failed} failed")
            return SOME_FAILED
        return DONE if done else SOME_FAILED


def output_paths(pictures: Sequence, given: Path | None, suffix: str) -> list[Path | None]:
    """A file for each picture's drawing: `given` itself, or one by the picture's name in it."""
    if given is None:
        return [None] * len(pictures)
    if len(pictures) == 1 and not given.is_dir():
        return [given]
    taken: set[str] = set()
    paths = []
    for picture in pictures:
        name, number = picture.stem, 2
        while name.lower() in taken:  # a/cat.jpg and b/cat.jpg
            name, number = f"{picture.stem}-{number}", number + 1
        taken.add(name.lower())
        paths.append(given / f"{name}{suffix}")
    return paths


def _report(message: str):
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


def _polygon(text: str) -> list[float]:
    polygon = _numbers(text)
    if len(polygon) < 6 or len(polygon) % 2:
        raise argparse.ArgumentTypeError(f"expected three points or more, X,Y each, got {text!r}")
    return polygon


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
