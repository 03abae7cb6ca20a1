"""Runs `perceptiondlm caption-dataset`: data sets of any size, on this machine or a Ray cluster."""

import argparse
import sys

from ..apps.captioning.model_arguments import add_model_arguments
from ..common.option_arguments import add_option_arguments, given_options

EPILOG = """\
examples:
  a folder of images and one of masks (named as for `perceptiondlm caption`):
    perceptiondlm caption-dataset photos/ --masks masks/ --output captioned/
  SA-1B, with the images in the output, on four GPUs:
    perceptiondlm caption-dataset sa1b/ --output captioned/ --images bytes --gpus-per-actor 1
  JSON lines, Parquet, tars, COCO, datasets on disk; patterns and URLs of them:
    perceptiondlm caption-dataset 's3://bucket/shards/*.tar' --output s3://bucket/captioned
  on a cluster:
    perceptiondlm caption-dataset /shared/coco.json --image-root /shared/train2017 \\
        --output /shared/captioned --address head:6379 --gpus-per-actor 1
The same command goes on where an earlier one stopped, however it stopped.

exit codes:
  0  every image was done, or done before
  1  some images or regions have errors, named in errors.parquet; or too many have, and it stopped
  2  nothing was done: the command line, the source or the output cannot be used
  130  interrupted (Ctrl-C); what was done until then is kept
"""
DONE, SOME_FAILED, USAGE = 0, 1, 2


def configure(parser: argparse.ArgumentParser):
    """Adds the arguments to the parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument

    # What is captioned.
    add("sources", nargs="+", metavar="source", help="folders, quoted patterns, files or URLs")
    add("--output", required=True, help="folder or URL of the shards")
    add("--masks", nargs="+", default=[], metavar="PATH", help="region masks of a folder's images")
    add("--image-root", help="folder that the images' paths in files start from")
    add("--recursive", action="store_true", help="look into subfolders too")
    add(
        "--segmenter",
        metavar="MODEL",
        help="finds the regions of images without masks: offline, or a SAM's folder or Hub id",
    )
    add("--instruction", help="instead of 'Describe each masked region in detail.'")

    # What is written.
    add("--format", default="parquet", choices=("parquet", "webdataset"), help="of the shards")
    add("--images", choices=("path", "bytes"), help="in the output (default: as the source has)")
    add("--shard-images", type=int, default=256, metavar="N", help="in a shard (default: 256)")
    add("--max-error-share", type=float, default=0.1, metavar="X", help="default: 0.1")
    add("--retry-errors", action="store_true", help="try images again that failed before")

    _add_placement(parser.add_argument_group("placement"))
    add_model_arguments(parser.add_argument_group("model"))
    add_option_arguments(parser.add_argument_group("decoding"))


def _add_placement(group):
    add = group.add_argument
    add("--address", help="of a Ray cluster, as head:6379, or auto (default: this machine)")

    add(
        "--actors",
        type=_actors,
        metavar="N",
        help="that hold the model, or auto: as many as there is room for (default: auto)",
    )
    add("--gpus-per-actor", type=float, default=0.0, metavar="X", help="default: 0, on CPUs")
    add(
        "--batch-regions",
        type=int,
        default=24,
        metavar="N",
        help="regions in one call of the model, about (default: 24)",
    )


def _actors(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected auto or a number of at least 1, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Captions the data set; says a user's mistake in one line on stderr."""
    from ..common.ray_session import import_data
    from .dataset import TooManyErrors, caption_dataset

    ray = import_data()
    try:
        sources, options = _job(args)
        with ProgressBar(sources) as bar:
            summary = caption_dataset(sources, options, bar.show)
    except TooManyErrors as error:
        return _say(f"stopped: {error}", SOME_FAILED)
    except ray.exceptions.RayError as error:  # some are ValueErrors, too, of many lines
        return _say(_cause(error), SOME_FAILED)
    except (ValueError, OSError) as error:
        return _say(str(error), USAGE)
    print("\n".join(report_lines(summary, args.output)))
    return SOME_FAILED if set(summary["errors"]) - {"no regions"} else DONE


def _job(args: argparse.Namespace):
    from ..apps.captioning.captioner import EMBEDDED, EMBEDDED_SUBFOLDER
    from .captioning_stage import CaptionOptions
    from .dataset import DatasetOptions
    from .open_sources import open_source

    caption = CaptionOptions(
        model=args.model or str(EMBEDDED),
        subfolder=args.subfolder if args.model else EMBEDDED_SUBFOLDER,
        revision=args.revision,
        device=args.device,
        dtype=args.dtype,
        quantize=args.quantize,
        instruction=args.instruction,
        batch_regions=args.batch_regions,
        decoding=given_options(args),
    )
    names = ("output", "format", "images", "segmenter", "actors", "gpus_per_actor")
    names += ("shard_images", "address", "max_error_share", "retry_errors")
    options = DatasetOptions(caption=caption, **{name: getattr(args, name) for name in names})
    places = {"masks": args.masks, "image_root": args.image_root, "recursive": args.recursive}
    return [open_source(place, **places) for place in args.sources], options


class ProgressBar:
    """Shows how many images are done."""

    def __init__(self, sources):
        self.sources = sources

    def __enter__(self):
        from tqdm import tqdm

        from .dataset_sources import count_rows

        self.bar = tqdm(total=count_rows(self.sources), unit="image", desc="caption")
        return self

    def show(self, progress):
        self.bar.update(progress.rows - self.bar.n)
        self.bar.set_postfix(regions=progress.regions, failed=progress.failed)

    def __exit__(self, *_):
        self.bar.close()


def report_lines(summary: dict, output: str) -> list[str]:
    """Returns what a run has to say at its end."""
    errors = ", ".join(f"{kind} {count}" for kind, count in summary["errors"].items()) or "none"
    own = summary["this_run"]
    stages = ", ".join(f"{name} {value:.1f}" for name, value in own["stage_seconds"].items())
    return [
        f"{output}: {summary['images']} images, {summary['regions']} regions; errors: {errors}",
        f"this run: {own['images']} images, {own['regions']} regions in {own['seconds']:.1f} s"
        f" ({own['regions_per_second']:.2f} regions/s); seconds of all processes: {stages or '-'}",
    ]


def _cause(error: Exception) -> str:
    """Returns the line of a remote error that says what happened."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__


def _say(message: str, code: int) -> int:
    print(f"perceptiondlm caption-dataset: {message}", file=sys.stderr)
    return code
