"""Serves training samples from data files: by index where they fit, else from a stream.

A maker turns a record into samples; the data sets choose records, skip broken ones and seed.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .broken import BrokenRecords
from .records import Record, expand_files, open_records, record_of
from .samples import CONTENT_STREAM, ORDER_STREAM, Sample, generator_of


class SampleMaker(Protocol):
    """Makes the samples of one kind of record."""

    def count(self, values: dict) -> int:
        """Counts the items (masks, answers) of a record, as far as that can be told."""

    def samples_of(self, count: int) -> int:
        """Counts the samples of a record with so many items."""

    def length(self, count: int, number: int) -> int:
        """Estimates how long sample `number` of a record with so many items is."""

    def make(
        self, record: Record, number: int, rng: np.random.Generator, key: tuple, epoch: int
    ) -> Sample:
        """Makes sample `number` of a record; whatever it raises is the record's fault."""


class BrokenRecord(Exception):
    """A record of which no sample could be made, and why."""


def make_checked(maker: SampleMaker, record: Record, number: int, rng, key, epoch: int) -> Sample:
    """Makes a sample; raises `BrokenRecord` whatever is wrong with its record."""
    if record.values is None:
        raise BrokenRecord(record.error)
    try:
        return maker.make(record, number, rng, key, epoch)
    except Exception as error:  # files hold anything, and decoders raise anything
        raise BrokenRecord(describe(error)) from error


class FileDataset(Dataset):
    """Samples of data files by index; the index counts on over epochs.

    A broken record's samples are replaced by those that follow it, so that every batch is full.
    """

    def __init__(
        self, files: list[str], maker: SampleMaker, max_broken_share: float, seed: int = 0
    ):
        self.files = files = expand_files(files)
        self.maker = maker
        self.seed = seed
        self.rows = open_records(files, maker.count, streaming=False)
        self.counts = np.asarray(self.rows["count"], dtype=np.int64)

        samples = np.asarray([maker.samples_of(int(c)) for c in self.counts], dtype=np.int64)
        if not samples.sum():
            raise ValueError(f"expected records in {', '.join(files)}, got none")
        self.ends = np.cumsum(samples)
        self.broken = BrokenRecords(max_broken_share, len(self.rows))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, i: int) -> tuple[int, int]:
        """Finds the row of sample `i` of an epoch, and which of its samples it is."""
        row = int(np.searchsorted(self.ends, i, side="right"))
        start = int(self.ends[row - 1]) if row else 0
        return row, i - start

    def length(self, index: int) -> int:
        """Estimates how long a sample is, without making it."""
        row, number = self.place(index % len(self))
        return self.maker.length(int(self.counts[row]), number)

    def __getitem__(self, index: int) -> Sample:
        epoch, i = divmod(index, len(self))
        for step in range(len(self)):
            row, number = self.place((i + step) % len(self))
            record = record_of(self.rows[row], self.files)
            rng = generator_of(self.seed, CONTENT_STREAM, epoch, i)
            try:
                return make_checked(self.maker, record, number, rng, (epoch, i), epoch)
            except BrokenRecord as error:
                self.broken.report(row, record.where, str(error))
        raise ValueError(f"expected a record that is not broken in {', '.join(self.files)}")


class StreamDataset(IterableDataset):
    """Samples of data files as they are read, epoch after epoch, without end.

    Args:
        rank, world_size: this process's share of the records.
        buffer: records among which the next one is drawn.
    """

    def __init__(
        self,
        files: list[str],
        maker: SampleMaker,
        max_broken_share: float,
        seed: int = 0,
        *,
        buffer: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        from datasets.distributed import split_dataset_by_node

        self.files = files = expand_files(files)
        self.maker = maker
        self.seed = seed

        rows = open_records(files, maker.count, streaming=True)
        # the same number seeds every process, so that they divide one order among them
        order_seed = int(generator_of(seed, ORDER_STREAM).integers(2**31))
        rows = rows.shuffle(seed=order_seed, buffer_size=buffer)
        self.rows = split_dataset_by_node(rows, rank=rank, world_size=world_size)
        self.broken = BrokenRecords(max_broken_share, None)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        if worker is not None and worker.id >= self.rows.num_shards:
            return  # there are fewer files than workers

        epoch = 0
        while True:
            self.rows.set_epoch(epoch)
            made = 0
            for sample in self._epoch(epoch):
                made += 1
                yield sample

            if not made:
                raise ValueError(f"expected records that are not broken in {', '.join(self.files)}")
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Sample]:
        """Yields the samples of one epoch; a broken record gives none of its further ones."""
        for row in self.rows:
            record = record_of(row, self.files)
            self.broken.see()
            for number in range(self.maker.samples_of(row["count"])):
                key = (epoch, *record.key, number)
                rng = generator_of(self.seed, CONTENT_STREAM, *key)
                try:
                    yield make_checked(self.maker, record, number, rng, key, epoch)
                except BrokenRecord as error:
                    self.broken.report(record.key[1], record.where, str(error))
                    break


def describe(error: Exception) -> str:
    """Says in one line what is wrong with a record.

    An error that is none of this package's own words comes with its type.
    """
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
