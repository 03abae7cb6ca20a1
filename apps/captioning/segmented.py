"""Finds an image's regions by a segmenter, for `perceptiondlm caption`."""

import argparse
from collections.abc import Iterable
from functools import partial

from PIL import Image

from ...regions.files import ImageSource
from ...regions.prompts import no_text_error
from ...regions.region_source import Maker, RegionSource, Source
from ...regions.segmenters import Segmenter, find_regions, load_segmenter


class Segmented(Source):
    """The regions that a segmenter finds in one image."""

    def __init__(self, segmenter: Segmenter, prompts: dict, image: Image.Image):
        self.segmenter = segmenter
        self.prompts = prompts
        self.image = image

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterable[Maker]:
        for region in find_regions(self.image, self.segmenter, **self.prompts):
            said = {"label": region.label, "score": region.score}
            yield region.origin, partial(_each, RegionSource(region.mask, region.origin, **said))


def _each(region: RegionSource) -> list[RegionSource]:
    return [region]


def segments(args: argparse.Namespace) -> bool:
    """Tells whether arguments ask for a segmenter's regions; boxes do where it is named."""
    return bool(args.everything or args.point or args.text or (args.segmenter and args.box))


def prompts_of(args: argparse.Namespace) -> dict:
    """Returns what `find_regions` is asked for."""
    return {
        "everything": args.everything,
        "points": args.point or None,
        "boxes": (args.segmenter and args.box) or None,
        "text": args.text or None,
    }


def load_segmenter_of(args: argparse.Namespace) -> Segmenter:
    """Loads the segmenter that arguments name.

    Raises as `load_segmenter`, and ValueError where it does not read the text that is given.
    """
    segmenter = load_segmenter(args.segmenter, args.device)
    if args.text and not segmenter.reads_text:
        raise no_text_error(args.text[0])
    return segmenter
