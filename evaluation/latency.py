"""`perceptiondlm evaluate latency`: measures seconds and tokens per second against regions.

Scenes with enough objects are captioned one image at a time, all chosen regions together and then
one region at a time, as the paper's Figures 1b and 1c compare.
"""

import argparse
import statistics
from collections.abc import Sequence

from tqdm import tqdm

from .checkpoint import (
    add_checkpoint_arguments,
    add_decoding_arguments,
    checkpoint_record,
    decoding_options,
    load_checkpoint,
)
from .environment import run_environment
from .files import write_json
from .held_out import resolved_options
from .scene_kinds import KINDS, SHAPES, SPLIT, THINGS, add_kind_argument
from .throughput import effective_length, stop_ids, timed

LABELS = {True: "all regions together", False: "one region at a time"}  # by `together`


def measure_latency(
    model, processor, scenes: Sequence, regions: int, together: bool, options: dict
) -> dict:
    """Captions the first `regions` regions of each scene; returns a row for the figures.

    Its `latency` is the median over scenes of the seconds per image, its `tokens_per_second` that
    of the tokens before end of turn per second.
    """
    seconds, rates = [], []
    for scene in scenes:
        masks = [thing.mask for thing in scene.objects[:regions]]
        groups = [masks] if together else [[mask] for mask in masks]
        tokens = elapsed = 0

        for group in groups:
            result, spent = timed(
                model,
                model.diffusion_generate,
                images=scene.image,
                masks=group,
                processor=processor,
                **options,
            )
            ids = result.token_ids[0]
            tokens += sum(effective_length(caption, stop_ids(model.config)) for caption in ids)
            elapsed += spent

        seconds.append(elapsed)
        rates.append(tokens / elapsed)

    return {
        "label": LABELS[together],
        "regions": regions,
        "latency": statistics.median(seconds),
        "tokens_per_second": statistics.median(rates),
    }


def configure(parser: argparse.ArgumentParser):
    """Adds the options of this step."""
    add_checkpoint_arguments(parser)
    add_decoding_arguments(parser)
    add = parser.add_argument
    most = f"{SHAPES.max_regions}, with things {THINGS.max_regions}"
    help_text = f"how many are captioned, from 1 to {most} (default: 1 2 4 6 8)"
    add("--regions", type=int, nargs="+", default=[1, 2, 4, 6, 8], help=help_text)
    add("--pictures", type=int, default=10, help="images over which the median is taken")
    add("--output", required=True, help="where the rows go (JSON)")
    add_kind_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measures every number of regions both ways and writes the rows."""
    kind = KINDS[args.scene_kind]
    for regions in args.regions:
        if not 1 <= regions <= kind.max_regions:
            raise ValueError(f"expected regions from 1 to {kind.max_regions}, got {regions}")
    options = decoding_options(args, questions=False)
    if args.pictures < 1:
        raise ValueError(f"expected pictures of 1 or more, got {args.pictures}")

    model, processor = load_checkpoint(args)
    chosen = resolved_options(model, options)

    # The same scenes in every row, so that only the regions differ
    scenes = kind.render_crowded(args.pictures, max(args.regions))
    plan = [(regions, together) for together in (True, False) for regions in args.regions]

    measure_latency(model, processor, scenes[:1], args.regions[0], True, options)  # to warm up
    rows = [
        measure_latency(model, processor, scenes, regions, together, options)
        for regions, together in tqdm(plan, desc="latency")
    ]

    record = {
        **checkpoint_record(args, model),
        "decoding_options": chosen,
        "scene_kind": kind.name,
        "pictures": args.pictures,
        "split": SPLIT,
        **run_environment(),
    }
    write_json(args.output, {"rows": rows} | record)
    print(args.output)
    return 0
