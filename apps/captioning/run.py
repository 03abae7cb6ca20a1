"""Runs `perceptiondlm caption`: what goes in, the model, and where results go.

A run loses nothing: what can be captioned is, what cannot is named, and the exit code tells.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ...common.files import file_to_replace, only_run, write_bytes
from ...common.streams import silence_stdout
from ...regions.files import open_image
from .command import DONE, INTERRUPTED, SOME_FAILED, USAGE, report
from .inputs import find_images
from .model_arguments import load_captioner
from .outputs import CaptionWriter, format_of

NAMED = 10  # of a kind of fault, before "and so many more"


class CaptionRun:
    """Checks all that can be refused before anything is computed, then runs."""

    def __init__(self, args: argparse.Namespace, decoding: dict):
        self.args = args
        self.images = find_images(args.images, args.recursive)
        self.sources = self._region_sources()
        self._check_outputs()
        self.writer = CaptionWriter(format_of(args.captions, args.format), args.captions)
        self.failed: list[str] = []  # images
        self.lost = self._report_sources()  # regions, and entries of annotation files
        self.skipped = 0
        self.segmenter = self._load_segmenter()
        self.captioner = self._load_model(decoding)

    def _region_sources(self) -> list:
        from ...regions.sources import LabelMaps, Shapes, open_sources

        args = self.args
        sources = open_sources(args.masks, self.images, resize_masks=args.resize_masks)
        for path in map(Path, args.label_maps):
            if not path.exists():
                raise FileNotFoundError(f"expected a label map or a folder of them at {path}")
            if path.is_file() and len(self.images) > 1:
                raise ValueError(
                    f"expected a folder of label maps for {len(self.images)}"
                    f" images, got the file {path}"
                )
            sources.append(LabelMaps(path))
            sources[-1].resize_masks = args.resize_masks
        boxes = [] if args.segmenter else args.box  # those are a segmenter's prompts
        shapes = [{"box": b} for b in boxes] + [{"polygons": [p]} for p in args.polygon]
        return sources + ([Shapes(shapes)] if shapes else [])

    def _check_outputs(self):
        """Refuses results that could not be written as meant, or would replace what is read."""
        from .animation import FORMATS as ANIMATIONS
        from .drawing import SUFFIXES as DRAWINGS

        args = self.args
        if args.captions is None and sys.stdout is None:
            raise ValueError("expected --captions FILE or an open stdout, got neither")
        for option, kinds in (("output", DRAWINGS), ("animate", ANIMATIONS)):
            self._check_suffix(option, getattr(args, option), kinds)

        paths = [args.captions, *self._drawn(), *self._animated()]
        given = [file_to_replace(path) for path in paths if path is not None]
        for path in given:
            if self._is_input(path):
                raise ValueError(
                    f"expected results beside the images and masks, got {path}, one of them"
                )
        if len(set(given)) < len(given):
            raise ValueError("expected each result in a file of its own, got one file for two")

    def _check_suffix(self, option: str, path: Path | None, kinds: dict):
        if path is None:
            return
        if len(self.images) > 1 and (path.suffix.lower() in kinds or path.is_file()):
            raise ValueError(
                f"expected a folder for --{option} with {len(self.images)} images, got {path}"
            )
        if len(self.images) == 1 and path.suffix.lower() not in kinds and not path.is_dir():
            raise ValueError(f"expected --{option} to end in {', '.join(kinds)}, got {path}")

    def _is_input(self, path: Path) -> bool:
        regions = [Path(p).resolve() for p in (*self.args.masks, *self.args.label_maps)]
        images = [Path(source.path).resolve() for source in self.images]
        inside = path.exists() and any(path.is_relative_to(p) for p in regions)
        return inside or path in images or path in regions

    def _drawn(self) -> list[Path | None]:
        return output_paths(self.images, self.args.output, ".png")

    def _animated(self) -> list[Path | None]:
        return output_paths(self.images, self.args.animate, ".gif")

    def _report_sources(self) -> int:
        """Says what in annotation files is of no use, and how many entries that is."""
        refused = [line for source in self.sources for line in source.refused]
        for line in refused[:NAMED]:
            report(line)
        if len(refused) > NAMED:
            report(f"... and {len(refused) - NAMED} more entries")
        for source in self.sources:
            if note := source.unused_note():
                report(note)
        return len(refused)

    def _load_segmenter(self):
        from .segmented import load_segmenter_of, segments

        if not segments(self.args):
            return None
        segmenter = load_segmenter_of(self.args)
        if segmenter.note and not self.args.quiet:
            report(segmenter.note)
        return segmenter

    def _load_model(self, decoding: dict):
        from transformers.utils import logging

        args = self.args
        if args.quiet or not sys.stderr.isatty():
            logging.disable_progress_bar()
        captioner = load_captioner(args, return_history=args.animate is not None, **decoding)
        captioner.check_options()
        layout = captioner.model.config.region_layout
        if args.prompt_refresh_interval is not None and layout == "independent":
            raise ValueError(
                "expected no --prompt-refresh-interval with this checkpoint, which keeps the prompt"
                f" exactly (region_layout {layout!r}), got {args.prompt_refresh_interval}"
            )
        return captioner

    def run(self) -> int:
        """Works through the images; returns an exit code."""
        args = self.args
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(only_run(args.captions, args.output, args.animate))
            except (ValueError, OSError) as error:  # another run's, or not to be written
                report(str(error))
                return USAGE
            return self._run()

    def _run(self) -> int:
        interrupted = False
        try:
            try:
                self._caption_all()
            except KeyboardInterrupt:
                interrupted = True
            self.writer.close(finished=not interrupted)

        except BrokenPipeError:  # nobody reads on
            silence_stdout()
            return SOME_FAILED
        except OSError as error:
            report(f"cannot write captions: {error}")
            self._rescue()
            return SOME_FAILED
        return self._summary(interrupted)

    def _rescue(self):
        """Prints captions that could not go to a file; a stdout that took none is given up."""
        if self.args.captions is None or sys.stdout is None:
            silence_stdout()
        elif self.writer.records:
            self.writer.print(self.writer.records)

    def _caption_all(self):
        from tqdm import tqdm

        hidden = self.args.quiet or len(self.images) < 2
        places = zip(self.images, self._drawn(), self._animated(), strict=True)
        with tqdm(places, total=len(self.images), unit="image", disable=hidden) as bar:
            for source, drawing, animation in bar:
                described = self._try(source)
                if described is not None:
                    self.writer.add(source.path, *described)
                    self._draw(source, described[0], drawing, animation)

    def _try(self, source) -> tuple | None:
        """Returns result and regions of an image; None, and says why, where there are none."""
        from torch import OutOfMemoryError

        try:
            return self._describe(source)
        except (OutOfMemoryError, MemoryError) as error:
            self._fail(source, f"out of memory, try --batch-size 1: {error}")
        except (ValueError, OSError) as error:
            self._fail(source, error)
        return None

    def _describe(self, source) -> tuple | None:
        from ...regions.sources import gather_regions
        from .segmented import Segmented, prompts_of

        args = self.args
        image = open_image(source.path)
        if args.question:
            return self.captioner.ask(image, args.question, template=args.template), []
        refused: list[str] = []
        sources = self.sources
        if self.segmenter is not None:
            sources = [*sources, Segmented(self.segmenter, prompts_of(args), image)]
        options = args.max_regions, refused, args.resize_masks
        regions = gather_regions(sources, source, image.size, *options)
        for line in refused:
            report(f"{source.path}: {line}")
        self.lost += len(refused)
        if not regions:
            return self._without_regions(source, refused)
        masks = [region.opened(image.size, args.resize_masks) for region in regions]
        asked = {"instruction": args.instruction, "template": args.template}
        if args.region_question:
            asked["questions"] = self._questions(len(masks))
        return self.captioner(image, masks, **asked), regions

    def _questions(self, count: int) -> list[str | None]:
        """Returns the question of each of an image's regions, None where there is none."""
        questions: list[str | None] = [None] * count
        for number, text in self.args.region_question:
            if int(number) > count:
                raise ValueError(
                    f"expected a question for regions 1 to {count}, got one for {number}"
                )
            questions[int(number) - 1] = text
        return questions

    def _without_regions(self, source, refused: list[str]):
        if refused:
            raise ValueError(f"expected regions that can be used, got {len(refused)} that cannot")
        if source.named:
            places = ", ".join([*self.args.masks, *self.args.label_maps])
            raise ValueError(f"expected masks for this image in {places}, found none")
        self.skipped += 1

    def _draw(self, source, result, drawing: Path | None, animation: Path | None):
        from .animation import draw_history, encode_animation
        from .drawing import encode_image

        style = {"font": self.args.font} | ({"fill": True} if self.args.fill else {})
        try:
            if drawing is not None:
                write_bytes(drawing, encode_image(result.draw(**style), drawing.suffix))
            if animation is not None:
                frames = draw_history(result, **style)
                write_bytes(animation, encode_animation(frames, animation.suffix))
        except (ValueError, OSError) as error:
            self._fail(source, f"captioned, but not drawn: {error}")

    def _fail(self, source, reason):
        report(f"{source.path}: {reason}")
        self.failed.append(Path(source.path).name)

    def _summary(self, interrupted: bool) -> int:
        done = len(self.writer.records)
        if interrupted:
            place = f" in {self.writer.place}" if self.writer.place else ""
            report(f"interrupted: {done} of {len(self.images)} images done and kept{place}")
            return INTERRUPTED
        if self.skipped:
            report(f"{self.skipped} of {len(self.images)} images have no masks, left out")
        if self.failed or self.lost:
            names = f": {', '.join(self.failed[:NAMED])}" if self.failed else ""
            names += ", ..." if len(self.failed) > NAMED else ""
            lost = f"; {self.lost} regions left out" if self.lost else ""
            report(f"{done} images done, {len(self.failed)} failed{names}{lost}")
            return SOME_FAILED
        return DONE if done else SOME_FAILED


def output_paths(images: Sequence, given: Path | None, suffix: str) -> list[Path | None]:
    """Returns a file for each image's drawing: `given` itself, or one by its name in it."""
    if given is None:
        return [None] * len(images)
    if len(images) == 1 and not given.is_dir():
        return [given]
    taken: set[str] = set()
    paths = []
    for source in images:
        name, number = source.stem, 2
        while name.lower() in taken:  # a/cat.jpg and b/cat.jpg
            name, number = f"{source.stem}-{number}", number + 1
        taken.add(name.lower())
        paths.append(given / f"{name}{suffix}")
    return paths
