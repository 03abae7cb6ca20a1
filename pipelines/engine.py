"""Runs the stages of a recipe over a source, on this machine and in this process.

source -> batches -> stages -> parts/000000.json, ...   each written whole or not at all
                               records.jsonl, dropped.jsonl, summary.json and the card, at the end

A run that was killed goes on after its last part; parts in which calls failed are made again, where
the answers that came are on disk. A region is in the records or among what was dropped, once.
"""

import hashlib
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ..common.files import json_bytes, only_run, write_bytes, write_json, writing
from ..common.json_text import encode_json, read_json, read_optional_json
from .endpoint import FAILED
from .output import KeepCaptioned, dropped_rows, lines_of, link_image
from .recipe import EngineRecipe
from .records import Record, Stage
from .sources import READ, Source
from .stages import make_stages

STATE, PARTS = "engine.json", "parts"
RECORDS, DROPPED, SUMMARY = "records.jsonl", "dropped.jsonl", "summary.json"
# Options that change how a run goes and not what comes out.
HARMLESS = {
    *("concurrency", "attempts", "first_delay", "timeout", "max_calls", "cache", "base_url"),
    *("device", "batch_size", "batch_images", "max_broken_share", "card", "sheet", "seed"),
    *("shards", "shard_images"),
}


# Rules that say nothing about a region, but that it could not be read, shown or asked about.
TROUBLES = {"broken record", "broken region", "image", "no caption", "no answer", FAILED}


@dataclass
class StageCount:
    """Counts what a stage got, gave and dropped (by rule), and its seconds.

    regions_in = regions_out + all that it dropped.
    """

    regions_in: int = 0
    regions_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, other: "StageCount"):
        """Adds the counts of another part."""
        self.regions_in += other.regions_in
        self.regions_out += other.regions_out
        self.dropped = dict(Counter(self.dropped) + Counter(other.dropped))
        self.seconds += other.seconds


@dataclass
class Part:
    """Holds what became of some items of the source.

    Attributes:
        digest: of the items, by which a resumed run knows them.
        images: of the source; `broken` of them lost all their regions to `TROUBLES`.
        lines: of `records.jsonl`.
        dropped: rows of `dropped.jsonl`.
        counts: by stage, in order.
    """

    digest: str
    images: int = 0
    broken: int = 0
    lines: list[dict] = field(default_factory=list)
    dropped: list[dict] = field(default_factory=list)
    counts: dict[str, StageCount] = field(default_factory=dict)

    def failed_calls(self) -> int:
        """Counts the regions that are to be asked about again."""
        return sum(row["rule"] == FAILED for row in self.dropped)

    def to_bytes(self) -> bytes:
        """Encodes a part as JSON."""
        return json_bytes({**vars(self), "counts": {k: vars(v) for k, v in self.counts.items()}})

    @classmethod
    def read(cls, path: Path) -> "Part":
        """Reads a part of a run."""
        values = read_json(path)
        counts = {name: StageCount(**count) for name, count in values["counts"].items()}
        return cls(**{**values, "counts": counts})


def run_engine(
    recipe: EngineRecipe, *, restart: bool = False, stages: list[Stage] | None = None
) -> dict:
    """Runs a recipe, or goes on with it; returns the summary.

    Args:
        recipe: as `load_recipe` reads it.
        restart: begin anew where an earlier run's output is.
        stages: instead of those that the recipe names, say with a captioner of one's own.

    Raises ValueError for an output of other options or of a source that has changed, and where too
    many of the images are broken; EngineStopped where an endpoint answers no more. The same call
    goes on from there.
    """
    folder = Path(recipe.output.folder)
    with only_run(folder / STATE):
        _begin(folder, recipe.to_dict(), restart)
        own = make_stages(recipe) if stages is None else stages
        paths = list(_make_parts(recipe, [*own, KeepCaptioned()], folder / PARTS))
        return _finish(recipe, folder, paths)


def _begin(folder: Path, values: dict, restart: bool):
    """Writes down the recipe, or compares it with that of the output that is there."""
    earlier = read_optional_json(folder / STATE)
    if restart or not earlier:
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        write_json(folder / STATE, {"recipe": values})
        return

    if not isinstance(earlier, dict) or not isinstance(earlier.get("recipe"), dict):
        raise ValueError(f"expected the recipe of an earlier run in {folder / STATE}, got another")
    one, other = _flat(earlier["recipe"]), _flat(values)
    for name in sorted({*one, *other}):
        if name.rpartition(".")[2] not in HARMLESS and one.get(name) != other.get(name):
            raise ValueError(
                f"expected the options that {folder} was made with, got {name} of"
                f" {other.get(name)!r:.80} instead of {one.get(name)!r:.80}: give another"
                " output.folder, or --restart"
            )


def _flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for name, value in values.items():
        is_section = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{name}.") if is_section else {prefix + name: value}
    return found


# Parts.


def _make_parts(recipe: EngineRecipe, stages: list[Stage], folder: Path) -> Iterator[Path]:
    """Makes the parts that are not there yet; yields the paths of all."""
    options, source = recipe.output, recipe.source
    images = broken = 0
    with tqdm(desc="engine", unit="image", total=options.max_images) as bar:
        items = itertools.islice(source.items(), options.max_images)
        for number, chunk in enumerate(_chunks(items, options.part_images)):
            path = folder / f"{number:06d}.json"
            part = _known_part(path, chunk)
            if part is None:
                part = _make_part(recipe, source, stages, chunk, bar)
                write_bytes(path, part.to_bytes())
            else:
                bar.update(len(chunk))
            yield path

            images, broken = images + part.images, broken + part.broken
            _expect_few_broken(images, broken, options.max_broken_share, part)


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _digest(items: list) -> str:
    plain = [_without_bytes(item) for item in items]
    return hashlib.sha256(repr(plain).encode("utf-8", "backslashreplace")).hexdigest()


def _without_bytes(item):
    """Puts a hash in the place of the image that a row holds: as text it is four times as long."""
    if isinstance(item, dict) and isinstance(item.get("data"), bytes):
        return {**item, "data": hashlib.sha256(item["data"]).hexdigest()}
    return item


def _known_part(path: Path, items: list) -> Part | None:
    """Returns the part that an earlier run made of the same items; None if it has to be made."""
    if not path.exists():
        return None
    part = Part.read(path)
    if part.digest != _digest(items):
        raise ValueError(
            f"expected the source that {path} was made of, got another one, or one that has changed"
            " since: give another output.folder, or --restart"
        )
    return None if part.failed_calls() else part


def _expect_few_broken(images: int, broken: int, max_share: float, part: Part):
    if broken > max_share * images:
        reason = next((row["reason"] for row in part.dropped if row["rule"] in TROUBLES), "")
        raise ValueError(
            f"expected at most {max_share:g} of the images broken (output.max_broken_share), got"
            f" {broken} of {images}, say: {reason}"
        )


def _make_part(
    recipe: EngineRecipe, source: Source, stages: list[Stage], items: list, bar: tqdm
) -> Part:
    """Takes items through all stages."""
    part = Part(_digest(items), images=len(items))
    for batch in _chunks(items, recipe.output.batch_images):
        records = run_stages(_read(source, batch, part), stages, part.counts)
        for record in records:
            _write(record, recipe, part)
        bar.update(len(batch))
    return part


def _read(source: Source, items: list, part: Part) -> list[Record]:
    start = time.perf_counter()
    records = [source.read(item) for item in items]
    gone = Counter(entry.rule for record in records for entry in record.dropped)
    kept = sum(len(record.regions) for record in records)
    seconds = time.perf_counter() - start
    count = StageCount(kept + gone.total(), kept, dict(gone), seconds)
    part.counts.setdefault(READ, StageCount()).add(count)
    return records


def run_stages(
    records: list[Record], stages: list[Stage], counts: dict[str, StageCount]
) -> list[Record]:
    """Runs records through stages, one after another, and adds to the `counts` of each.

    An assertion holds each stage to its promise: what it got it gave on, or dropped with a reason.
    """
    for stage in stages:
        before, keys = _dropped(records), _region_keys(records)
        start = time.perf_counter()
        records = stage(records)
        seconds = time.perf_counter() - start

        gone = _dropped(records) - before
        left = _region_keys(records)
        assert len(left) + gone.total() == len(keys) and left <= keys, stage.name
        rules = {rule: number for (_, rule), number in gone.items()}
        count = StageCount(len(keys), len(left), rules, seconds)
        counts.setdefault(stage.name, StageCount()).add(count)
    return records


def _dropped(records: list[Record]) -> Counter:
    return Counter((entry.stage, entry.rule) for record in records for entry in record.dropped)


def _region_keys(records: list[Record]) -> set[tuple[str, str]]:
    return {(record.key, region.key) for record in records for region in record.regions}


def _write(record: Record, recipe: EngineRecipe, part: Part):
    """Adds a finished record to its part, and its image to the output."""
    options = recipe.output
    if record.regions:
        is_linked = options.images == "link"
        if not is_linked and isinstance(record.image, bytes):
            raise ValueError(
                f"expected images with paths of their own for output.images path, got the bytes of"
                f" {record.key}: link them"
            )
        image = link_image(record, Path(options.folder)) if is_linked else record.name
        part.lines += lines_of(record, options.max_regions, image)
    elif any(entry.rule in TROUBLES for entry in record.dropped):
        part.broken += 1
    part.dropped += dropped_rows(record)


# The end.


def _finish(recipe: EngineRecipe, folder: Path, paths: list[Path]) -> dict:
    """Puts all parts together: records, what was dropped, summary and card."""
    summary = _join(folder, paths)
    if recipe.output.shards is not None:
        from .shards import RecordShards

        shards = RecordShards(recipe)
        for path in paths:
            shards.add(Part.read(path).lines)
    if recipe.output.images == "path":
        summary["train_with"] = f"data.image_root={recipe.source.image_root}"
    write_json(folder / SUMMARY, summary)
    if recipe.output.card:
        from .card import write_card

        write_card(folder, recipe, summary)
    return summary


def _join(folder: Path, paths: list[Path]) -> dict:
    """Writes the lines of all parts to two files; returns what was counted."""
    totals: dict[str, StageCount] = {}
    summary = {"images": 0, "broken_images": 0, "records": 0, "regions": 0, "dropped": 0}
    summary["failed_calls"] = 0
    with writing(folder / RECORDS) as records, writing(folder / DROPPED) as dropped:
        for path in paths:
            part = Part.read(path)
            for name, count in part.counts.items():
                totals.setdefault(name, StageCount()).add(count)
            records.writelines(map(_line, part.lines))
            dropped.writelines(map(_line, part.dropped))

            summary["images"] += part.images
            summary["broken_images"] += part.broken
            summary["records"] += len(part.lines)
            summary["regions"] += sum(len(line["captions"]) for line in part.lines)
            summary["dropped"] += len(part.dropped)
            summary["failed_calls"] += part.failed_calls()
    return {**summary, "stages": {name: vars(count) for name, count in totals.items()}}


def _line(values: dict) -> bytes:
    return encode_json(json.dumps(values, ensure_ascii=False) + "\n")
