"""`perceptiondlm evaluate predict`: captions a benchmark's regions, image by image.

Every batch is journaled when it is done, so a killed run goes on where it stopped, also with
another number of processes. Each process writes a journal of its own; the first merges them.
Regions whose image or mask cannot be read are named and left out: the next run tries them again.
"""

import argparse
import glob
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..common.fingerprints import weights_fingerprint
from ..common.region_images import RegionImage, caption_regions, read_regions
from ..image_loading import load_image
from .benchmarks import RegionSample, load_benchmark
from .checkpoint import (
    add_checkpoint_arguments,
    add_decoding_arguments,
    checkpoint_record,
    decoding_options,
    load_checkpoint,
)
from .environment import run_environment
from .files import Journal, read_journal, run_record_path, write_json
from .sharding import Shard, process_state
from .throughput import BatchCost, Throughput, batch_cost, stop_ids, timed, total_throughput

logger = logging.getLogger(__name__)

ASIDE = ".old"  # ends the names of journals that a restart replaces, until the restart is done


@dataclass(frozen=True)
class Prediction:
    """What came of a run, all processes together.

    Attributes:
        captions: by region key.
        throughput: what they took.
        missing: keys of the regions that could not be captioned.
    """

    captions: dict[str, str]
    throughput: Throughput
    missing: tuple[str, ...] = ()


def predict(
    model,
    processor,
    samples: Sequence[RegionSample],
    output: str | Path,
    *,
    batch_size: int = 1,
    options: dict | None = None,
    checkpoint: str | None = None,
    warmup: int = 0,
    shard: Shard | None = None,
    restart: bool = False,
    progress: bool = True,
) -> Prediction | None:
    """Captions every region once and writes `{key: caption}` to `output`.

    Args:
        model: has `diffusion_generate` and `config`.
        processor: passed on to it.
        samples: the regions; those of one image are captioned together.
        output: the prediction file, written when all is done; the journals lie beside it, and stay.
        batch_size: images in one call.
        options: of `diffusion_generate`.
        checkpoint: names the model in the journal; a journal of another model or of other options
            is refused.
        warmup: untimed calls on the first batch beforehand.
        shard: this process's part of the images.
        restart: does not go on from the journals of earlier runs; they are kept aside, and removed
            when the prediction file is written.
        progress: shows a progress bar.

    Returns the captions in the order of the samples (None in every process but the first). Where
    there are none at all, what was at `output` stays.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size of 1 or more, got {batch_size}")
    shard = shard or Shard()
    options = options or {}
    identity = json.loads(json.dumps({"checkpoint": checkpoint, "options": options}))

    # What earlier runs have done is left out, and the rest is divided among the processes.
    if restart:
        _set_aside(output, shard)
    done = _captions_in(_journals(output), identity)
    images = _by_image(s for s in samples if s.key not in done)
    shard.barrier()  # everyone has read the journals before anyone adds to them
    mine = images[shard.rank :: shard.count]
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]

    for _ in range(warmup if batches else 0):
        _caption(model, processor, batches[0], options, shard.rank)

    with Journal(_journal_path(output, shard.rank)) as journal:
        if not journal.records:
            journal.append(identity)
        bar = tqdm(
            total=sum(map(len, mine)),
            desc="predict",
            unit="region",
            disable=not progress or shard.rank > 0,
        )
        with bar:
            for batch in batches:
                captions, cost = _caption(model, processor, batch, options, shard.rank)
                if captions:
                    journal.append({"captions": captions, "cost": asdict(cost)})
                bar.update(sum(map(len, batch)))

    shard.barrier()
    return _merge(samples, output, identity) if shard.rank == 0 else None


def _merge(samples: Sequence[RegionSample], output: str | Path, identity: dict) -> Prediction:
    """Joins all journals by key and writes the prediction file."""
    journals = _journals(output)
    found = _captions_in(journals, identity)

    # In the order of the samples, whoever captioned them
    captions = {sample.key: found[sample.key] for sample in samples if sample.key in found}
    missing = tuple(sample.key for sample in samples if sample.key not in found)
    costs = [
        BatchCost(**record["cost"])
        for records in journals.values()
        for record in records
        if "cost" in record
    ]
    if captions or not missing:
        write_json(output, captions)

        # Only now are journals that a restart replaces no longer needed.
        for path in _journals(output, ASIDE):
            path.unlink()
    return Prediction(captions, total_throughput(costs), missing)


def _caption(
    model, processor, batch: Sequence[Sequence[RegionSample]], options: dict, rank: int
) -> tuple[dict[str, str], BatchCost | None]:
    """Captions what can be read of one batch of images, and measures it."""
    start = time.perf_counter()
    read = [found for regions in batch if (found := _read(regions)).masks]
    if not read:
        return {}, None

    result, seconds = timed(model, partial(caption_regions, model, processor, read), **options)
    end = time.perf_counter()

    captions = {
        key: text
        for one, texts in zip(read, result.texts, strict=True)
        for key, text in zip(one.masks, texts, strict=True)
    }
    cost = batch_cost(
        result,
        stop_ids(model.config),
        images=len(read),
        generate_seconds=seconds,
        end_to_end_seconds=end - start,
        rank=rank,
    )
    return captions, cost


def _read(regions: Sequence[RegionSample]) -> RegionImage:
    """Reads the regions of one image; those that cannot be read are named and left out."""
    path = regions[0].image_path
    found = read_regions(lambda: load_image(path), {each.key: each.mask for each in regions})
    for each in regions:
        if (error := found.error or found.errors.get(each.key)) is not None:
            logger.warning("left out region %s of %s: %s", each.key, path, error)
    return found


def _by_image(samples: Iterator[RegionSample]) -> list[list[RegionSample]]:
    """Returns the regions of each image, images in the order of their first region."""
    images: dict[Path, list[RegionSample]] = {}
    for sample in samples:
        images.setdefault(sample.image_path, []).append(sample)
    return list(images.values())


def _journal_path(output: str | Path, rank: int) -> Path:
    return Path(output).with_suffix(f".rank{rank}.journal.jsonl")


def _journals(output: str | Path, aside: str = "") -> dict[Path, list[dict]]:
    """Reads every process's journal, also of processes that are not there now."""
    output = Path(output)
    paths = output.parent.glob(f"{glob.escape(output.stem)}.rank*.journal.jsonl{aside}")
    return {path: read_journal(path) for path in sorted(paths)}


def _set_aside(output: str | Path, shard: Shard):
    """Sets all journals aside, once, before any process reads or writes one.

    Those that are aside already are of a run that finished, or came further: they stay.
    """
    shard.barrier()
    if shard.rank == 0:
        for path in _journals(output):
            aside = path.with_name(path.name + ASIDE)
            path.unlink() if aside.exists() else path.rename(aside)
    shard.barrier()


def _captions_in(journals: dict[Path, list[dict]], identity: dict) -> dict[str, str]:
    """Returns all captions in the journals, which must be of the same checkpoint and options."""
    captions = {}
    for path, records in journals.items():
        if records and records[0] != identity:
            raise ValueError(
                f"{path}: expected a journal of {identity}, got one of {records[0]}; choose another"
                " output or remove the journal"
            )
        for record in records[1:]:
            captions |= record["captions"]
    return captions


def configure(parser: argparse.ArgumentParser):
    """Adds the options of this step."""
    add = parser.add_argument
    add_checkpoint_arguments(parser)
    add("--benchmark", required=True, help="benchmark folder, COCO-style JSON, or Hub dataset id")
    add("--images", help="folder of the image files, if not beside the annotations")
    add("--output", required=True, help="where the captions go (JSON)")
    add("--batch-size", type=int, default=1, help="images in one call")
    add("--limit", type=int, help="only the first regions")
    add("--warmup", type=int, default=0, help="untimed calls beforehand")
    add("--restart", action="store_true", help="forget an earlier run instead of going on from it")
    add_decoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Captions the benchmark's regions; the first process writes captions and record."""
    for name, minimum in (("limit", 1), ("warmup", 0)):
        if getattr(args, name) is not None and getattr(args, name) < minimum:
            raise ValueError(f"expected {name} of {minimum} or more, got {getattr(args, name)}")
    options = decoding_options(args, questions=False)

    benchmark = load_benchmark(args.benchmark, images=args.images)
    samples = benchmark.samples[: args.limit]

    # Each process loads the model on its own device.
    shard = Shard.from_accelerate()
    model, processor = load_checkpoint(args, str(process_state().device))
    checkpoint = f"{args.model}/{args.subfolder}" if args.subfolder else args.model
    identity = f"{checkpoint} {weights_fingerprint(model)}"

    prediction = predict(
        model,
        processor,
        samples,
        args.output,
        batch_size=args.batch_size,
        options=options,
        checkpoint=identity,
        warmup=args.warmup,
        shard=shard,
        restart=args.restart,
    )

    if prediction is None:
        return 0
    if prediction.captions:
        record = _run_record(args, model, checkpoint, prediction)
        write_json(run_record_path(args.output), record)
        print(f"{args.output}: {prediction.throughput}")
    if missing := prediction.missing:
        print(
            f"perceptiondlm evaluate predict: {len(missing)} of {len(samples)} regions have no"
            " caption, as said above; the same command tries them again",
            file=sys.stderr,
        )
    return 1 if missing else 0


def _run_record(args: argparse.Namespace, model, checkpoint: str, prediction: Prediction) -> dict:
    return {
        "checkpoint": checkpoint,
        **checkpoint_record(args, model),
        "benchmark": str(args.benchmark),
        "predictions": str(args.output),
        "missing": list(prediction.missing),
        "batch_size": args.batch_size,
        "options": decoding_options(args, questions=False),
        "throughput": prediction.throughput.to_json(),
        "environment": run_environment(),
    }
