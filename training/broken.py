"""Counts broken records, once each, logs where and why, and stops a run that has too many."""

import logging
import multiprocessing

logger = logging.getLogger(__name__)

MIN_SEEN = 100  # records of a stream before its share of broken ones means anything


class TooManyBroken(ValueError):
    """More records are broken than the recipe allows."""


class BrokenRecords:
    """Counts shared by all the workers of a process.

    Args:
        max_share: share of broken records beyond which `report` raises `TooManyBroken`; unless it
            is 0, the first one is always allowed: of few records one is more than a small share.
        total: how many records there are; None for a stream, of which `seen` are counted.
    """

    def __init__(self, max_share: float, total: int | None):
        self.max_share = max_share
        self.total = total
        self._lock = multiprocessing.Lock()
        self._counts = multiprocessing.Array("q", 2, lock=False)  # broken, seen
        self._flags = multiprocessing.Array("b", max(total or 0, 1), lock=False)

    @property
    def count(self) -> int:
        """Counts the distinct broken records so far."""
        return self._counts[0]

    def see(self):
        """Counts one record of a stream."""
        with self._lock:
            self._counts[1] += 1

    def report(self, number: int, where: str, reason: str):
        """Logs record `number` as broken, once; raises `TooManyBroken` beyond the share."""
        with self._lock:
            if self.total is not None:
                if self._flags[number]:
                    return
                self._flags[number] = 1
            self._counts[0] += 1
            broken, seen = self._counts[0], self._counts[1]

        logger.warning("skipped a broken record, %s: %s", where, reason)
        of = self.total if self.total is not None else max(seen, MIN_SEEN)
        if broken > max(self.max_share * of, bool(self.max_share)):
            raise TooManyBroken(
                f"expected at most {self.max_share:.2%} broken records (data.max_broken_share),"
                f" got {broken} of {of}; the last one, {where}: {reason}"
            )
