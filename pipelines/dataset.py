"""Captions a data set: rows of sources go through Ray Data's stages, and end up in shards.

    list ── leave out what is done ── open ── (segment) ── caption ── write ── count
    tasks          tasks              tasks     actors      actors    tasks    here

Ray schedules, spills, and runs again what dies with a process or a machine. Its own checkpoints
(`ray.data.checkpoint`) are not used: they compare ids right after a read, keep them in files beside
the data, and make a Parquet shard visible while it is being written; here the shards themselves,
each of them whole, say what is done.
"""

import importlib.metadata
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..common.files import only_run
from ..common.fingerprints import files_fingerprint
from ..common.json_text import parse_json
from ..common.loading import expect_checkpoint, usable_device
from ..common.ray_session import import_data, ray_session
from ..generation_options import DiffusionOptions
from . import places
from .captioning_stage import CaptionOptions
from .dataset_sources import Source
from .ray_stages import run_stages
from .writers import CAPTIONS, ERRORS, FORMATS, ShardWriter, holds_rows, settle

MANIFEST, SUMMARY = "manifest.json", "summary.json"
FIRST_IMAGES = 50  # before the share of errors stops a run


class TooManyErrors(Exception):
    """A run was stopped because most of it is broken."""


@dataclass(frozen=True)
class DatasetOptions:
    """Says how a data set is captioned and where it goes.

    Attributes:
        output: a folder, or a URL of one.
        caption: model and decoding.
        format: of the shards.
        images: "path" or "bytes" in the output; None: as the source has them.
        segmenter: finds the regions of images without masks.
        actors: that hold a model each; None: as many as there is room for.
        gpus_per_actor: may be a fraction.
        shard_images: in a shard, about.
        address: of a cluster; None: this machine.
        max_error_share: of the images, before a run stops.
        retry_errors: try images again that failed in an earlier run.
    """

    output: str
    caption: CaptionOptions
    format: str = "parquet"
    images: str | None = None
    segmenter: str | None = None
    actors: int | None = None
    gpus_per_actor: float = 0.0
    shard_images: int = 256
    address: str | None = None
    max_error_share: float = 0.1
    retry_errors: bool = False

    def __post_init__(self):
        positive = {"shard_images": self.shard_images, "batch_regions": self.caption.batch_regions}
        for name, value in positive.items():
            if value < 1:
                raise ValueError(f"expected {name} of 1 or more, got {value}")
        if self.actors is not None and self.actors < 1:
            raise ValueError(f"expected actors of 1 or more, got {self.actors}")
        if not 0 <= self.gpus_per_actor:
            raise ValueError(f"expected gpus_per_actor of 0 or more, got {self.gpus_per_actor}")
        if not 0 <= self.max_error_share <= 1:
            raise ValueError(f"expected max_error_share in [0, 1], got {self.max_error_share}")
        if self.format not in FORMATS:
            raise ValueError(f"expected a format of {', '.join(FORMATS)}, got {self.format!r}")
        if self.images not in (None, "path", "bytes"):
            raise ValueError(f"expected images as path or bytes, got {self.images!r}")


@dataclass
class Progress:
    """Counts what a run has done so far."""

    rows: int = 0
    images: int = 0
    regions: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, done: dict):
        """Adds what was written of one shard."""
        for name in ("rows", "images", "regions", "failed"):
            setattr(self, name, getattr(self, name) + done[name])
        for stage, seconds in done["seconds"].items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


def caption_dataset(sources: Sequence[Source], options: DatasetOptions, show=None) -> dict:
    """Captions all that sources have and the output folder has not; returns the summary.

    Args:
        sources: see `open_source`.
        options: how, and where to.
        show: called with the `Progress` after each shard.

    Raises ValueError for options that contradict, an output that another run made with other
    options, an address at which nobody answers; OSError for an output that cannot be written; and
    `TooManyErrors`. What was done until then is kept, and is not done again.
    """
    import_data()

    # What is to be done, and where to; an output of other options is refused.
    output = places.absolute(options.output)
    with_bytes = images_as_bytes(sources, options)
    identity = identity_of(sources, options, with_bytes)
    if options.address is None and options.caption.device is not None:
        usable_device(options.caption.device)
    folders = [f"{output}/{name}" for name in (CAPTIONS, ERRORS)]
    local = [output, *folders] if places.local_of(output) is not None else []
    prepare(output, folders, identity)

    writer = ShardWriter(output, options.format, with_bytes, provenance_of(identity))

    # What is there already is left out.
    with only_run(*local):
        before = settle(output, options.retry_errors)
        started = time.perf_counter()
        progress = Progress()
        try:
            with ray_session(options.address) as ray:
                for done in run_stages(ray, sources, options, writer, before.done):
                    progress.add(done)
                    if show is not None:
                        show(progress)
                    expect_few_errors(progress, options.max_error_share, FIRST_IMAGES)
        finally:
            summary = write_summary(output, progress, time.perf_counter() - started)
        expect_few_errors(progress, options.max_error_share)
        return summary


def expect_few_errors(progress: Progress, max_share: float, first: int = 1):
    """Raises TooManyErrors where more than a share of the images failed."""
    if progress.rows >= first and progress.failed > max_share * progress.rows:
        raise TooManyErrors(
            f"expected errors in at most {max_share:.0%} of the images, got {progress.failed} in"
            f" {progress.rows}: see errors.parquet"
        )


def images_as_bytes(sources: Sequence[Source], options: DatasetOptions) -> bool:
    """Tells whether the output holds images themselves."""
    inside = [source.place for source in sources if source.has_bytes]
    if options.images == "path" and inside:
        raise ValueError(f"expected images as bytes from {inside[0]}, which has no paths, got path")
    return (
        options.images == "bytes"
        or bool(inside)
        or (options.images is None and options.format == "webdataset")
    )


def identity_of(sources: Sequence[Source], options: DatasetOptions, with_bytes: bool) -> dict:
    """Returns all that decides what the output holds, ready for JSON."""
    caption = options.caption
    place = {"subfolder": caption.subfolder, "revision": caption.revision}
    expect_checkpoint(caption.model, **place)
    DiffusionOptions.build({}, caption.decoding, "captions")

    local = Path(caption.model)
    found = {
        "sources": [source.identity() for source in sources],
        "model": os.path.abspath(local) if local.exists() else caption.model,
        "weights": _local_weights(caption) if local.exists() else None,
        **place,
        "dtype": caption.dtype,
        "quantize": caption.quantize,
        "instruction": caption.instruction,
        "decoding": caption.decoding,
        "segmenter": options.segmenter,
        "format": options.format,
        "images": "bytes" if with_bytes else "path",
    }
    return json.loads(json.dumps(found))


def _local_weights(caption: CaptionOptions) -> str:
    from ..configuration_perceptiondlm import PerceptionDLMConfig

    folder = Path(caption.model, caption.subfolder or "")
    dtype = caption.dtype
    if dtype == "auto":
        saved = PerceptionDLMConfig.from_pretrained(folder).dtype
        dtype = str(saved or "float32").removeprefix("torch.")
    return files_fingerprint(folder, sorted(folder.glob("*.safetensors")), dtype)


def prepare(output: str, folders: Sequence[str], identity: dict):
    """Makes the output folder, or checks that what it holds is of the same options."""
    manifest = f"{output}/{MANIFEST}"
    is_ours = places.exists(manifest)
    if not is_ours and places.exists(output) and places.find_files(output):
        raise ValueError(
            f"expected a new folder, or one with a {MANIFEST}, as output, got {output}"
        )
    if is_ours and holds_rows(output):
        earlier = parse_json(places.read_place(manifest), manifest)["options"]
        for name in identity:
            if earlier.get(name) != identity[name]:
                own, other = (json.dumps(x.get(name))[:200] for x in (identity, earlier))
                raise ValueError(
                    f"expected the options that {output} was made with, got another {name}:"
                    f" {own} instead of {other}; name another output"
                )

    for folder in folders:
        places.make_folder(folder)
    content = {"options": identity, "version": own_version()}
    places.write_place(manifest, json.dumps(content, indent=1).encode())


def provenance_of(identity: dict) -> dict:
    """Returns what each row says about where its captions come from."""
    names = ("revision", "dtype", "instruction", "decoding", "segmenter")
    kept = {name: identity[name] for name in names if identity[name]}
    model = "/".join(filter(None, [identity["model"], identity["subfolder"]]))
    return {"model": model, "options": json.dumps(kept, sort_keys=True), "version": own_version()}


def own_version() -> str | None:
    """Returns this package's version; None where it runs from a folder and is not installed."""
    try:
        return importlib.metadata.version("perceptiondlm")
    except importlib.metadata.PackageNotFoundError:
        return None


def write_summary(output: str, progress: Progress, seconds: float) -> dict:
    """Settles the output, and writes what is in it and what this run has added."""
    contents = settle(output)

    summary = {
        "images": contents.images,
        "regions": contents.regions,
        "errors": contents.errors,
        "this_run": {
            "images": progress.images,
            "regions": progress.regions,
            "failed": progress.failed,
            "seconds": round(seconds, 3),
            "regions_per_second": round(progress.regions / max(seconds, 1e-9), 3),
            "stage_seconds": {k: round(v, 3) for k, v in progress.seconds.items()},
        },
    }
    places.write_place(f"{output}/{SUMMARY}", json.dumps(summary, indent=1).encode())
    return summary
