"""Puts the stages on Ray Data: tables between them, tasks and actors around them.

Between stages a row is its id, its values as JSON, and its image's bytes: whatever the rows of
several kinds of sources hold, all tables have one schema.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial

from ..common.ray_session import pool_size
from ..regions.segmenters import OFFLINE
from .captioning_stage import CaptionImages, FindRegions, open_row
from .dataset_sources import Source
from .writers import ShardWriter

LISTED_AT_ONCE = 1024  # rows in one task that lists
OPENED_AT_ONCE = 32  # images in a block from there on
DIGEST = 16  # bytes of an id where those that are done are looked up


def run_stages(
    ray, sources: Sequence[Source], options, writer: ShardWriter, done: set[str]
) -> Iterator[dict]:
    """Runs the stages, and yields what each shard that is written holds."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)

    rows = _captioned(ray, sources, options, writer, ray.put(_digests(done)))
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from (json.loads(text) for text in table["value"].to_pylist())


def _captioned(ray, sources: Sequence[Source], options, writer: ShardWriter, known):
    """Puts the stages together; nothing runs yet."""
    tasks, actors, segmenters = _shares(ray, options)
    opening = partial(_open, ray.put(list(sources)), writer.with_bytes)

    rows = ray.data.read_datasource(
        _datasource(sources),
        num_cpus=tasks["num_cpus"],
        override_num_blocks=_num_parts(sources),
    )
    rows = rows.map_batches(partial(_leave_out, known), **tasks)
    rows = rows.repartition(target_num_rows_per_block=OPENED_AT_ONCE)
    rows = rows.map_batches(opening, batch_size=OPENED_AT_ONCE, **tasks)
    if options.segmenter is not None:
        made = (FindRegions, options.segmenter, options.caption.device)
        rows = rows.map_batches(OnRows, fn_constructor_args=made, **segmenters)
    made = (CaptionImages, options.caption)
    rows = rows.map_batches(OnRows, fn_constructor_args=made, **actors)
    return rows.map_batches(partial(_write, writer), batch_size=options.shard_images, **tasks)


def _shares(ray, options) -> tuple[dict, dict, dict]:
    """Returns what tasks, captioning actors and segmenting actors ask for.

    A segmenter with weights has a quarter of its captioner's GPU, so that no two captioners share.
    """
    count, cpus = pool_size(ray, options.actors, options.gpus_per_actor)
    gpus, segmenter_gpus = options.gpus_per_actor, 0.0
    if options.segmenter is not None:
        cpus /= 2
        segmenter_gpus = 0.0 if options.segmenter == OFFLINE else gpus / 4
    actors = {
        "batch_size": OPENED_AT_ONCE,
        "batch_format": "pyarrow",
        "num_cpus": cpus,
        "num_gpus": (gpus - segmenter_gpus) or None,
        "compute": ray.data.ActorPoolStrategy(size=count),
    }
    tasks = {"num_cpus": min(0.25, cpus), "batch_format": "pyarrow"}
    return tasks, actors, {**actors, "num_gpus": segmenter_gpus or None}


def _table(values: Sequence, data: Sequence[bytes | None] | None = None, ids=None):
    """Puts rows in a table: their values as JSON, but for ids and images' bytes."""
    import pyarrow as pa

    none = [None] * len(values)
    columns = {
        "id": pa.array(ids or none, pa.large_string()),
        "value": pa.array([json.dumps(value) for value in values], pa.large_string()),
        "data": pa.array(data or none, pa.large_binary()),
    }
    return pa.table(columns)


def _to_table(rows: Sequence[dict]):
    """Puts rows with an `id` and `data` in a table."""
    values = [{name: row[name] for name in row if name != "data"} for row in rows]
    return _table(values, [row["data"] for row in rows], [row["id"] for row in rows])


def _rows_of(table) -> list[dict]:
    values = zip(table["value"].to_pylist(), table["data"].to_pylist(), strict=True)
    return [{**json.loads(value), "data": data} for value, data in values]


class OnRows:
    """Runs a stage on tables; made where it runs, so what it loads is loaded there."""

    def __init__(self, stage, *arguments):
        self.stage = stage(*arguments)

    def __call__(self, table):
        return _to_table(self.stage(_rows_of(table)))


def _open(sources_ref, with_bytes: bool, table):
    import ray

    sources = ray.get(sources_ref)
    rows = [
        open_row(sources[row["source"]], row, with_bytes) | {"source": row["source"]}
        for row in _rows_of(table)
    ]
    return _to_table(rows)


def _write(writer: ShardWriter, table):
    rows = _rows_of(table)
    return _table([writer(rows)] if rows else [])


def _digests(ids: set[str]):
    import numpy as np

    return np.sort(np.array([_digest(key) for key in ids], dtype=f"S{DIGEST}"))


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()


def _leave_out(known_ref, table):
    """Leaves out the rows whose ids are known."""
    import numpy as np
    import ray

    known = ray.get(known_ref)
    if not len(known):
        return table
    own = np.array([_digest(key) for key in table["id"].to_pylist()], dtype=known.dtype)
    places_of = np.minimum(np.searchsorted(known, own), len(known) - 1)
    return table.filter(known[places_of] != own)


def _num_parts(sources: Sequence[Source]) -> int:
    return max(1, sum(len(source.parts(LISTED_AT_ONCE)) for source in sources))


def list_part(number: int, prefix: str, source: Source, part) -> Iterator:
    """Yields tables of the rows of a part."""
    rows = []
    for row in source.rows(part):
        rows.append({**row, "id": prefix + row["id"], "entry": json.dumps(row["entry"])})
        rows[-1]["source"] = number
        if len(rows) == OPENED_AT_ONCE:
            yield _to_table(rows)
            rows = []
    if rows:
        yield _to_table(rows)


def _datasource(sources: Sequence[Source]):
    """Returns what Ray Data reads: a task for each part of each source."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    def task(number: int, source: Source, part) -> ReadTask:
        prefix = f"{number}/" if len(sources) > 1 else ""
        nothing = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(partial(list_part, number, prefix, source, part), nothing)

    class Rows(Datasource):
        def estimate_inmemory_data_size(self):
            return None

        def get_read_tasks(self, parallelism, per_task_row_limit=None, data_context=None):
            return [
                task(number, source, part)
                for number, source in enumerate(sources)
                for part in source.parts(LISTED_AT_ONCE)
            ]

    return Rows()
