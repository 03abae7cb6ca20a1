"""Counts what an engine does, for Prometheus and for its own guess at when it is free again."""

import threading
import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

COUNTERS = {
    "accepted": "requests queued",
    "completed": "requests answered",
    "refused": "requests refused because the queue was full",
    "invalid": "requests refused because they did not fit",
    "cancelled": "requests given up by their client or timed out",
    "failed": "requests on which the model failed",
    "batches": "batches run",
    "joined": "requests that started while others were under way",
    "forwards": "denoising forward passes",
    "tokens": "tokens of captions and answers up to their ends",
    "seen_hits": "requests whose images had been seen before",
    "seen_misses": "requests whose images were seen for the first time, or again",
}
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
LATENCY_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds
RECENT_BATCHES = 64  # that rates look back on
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0


class Metrics:
    """Keeps counts of one engine's work; safe in any thread.

    Args:
        queue_length, running, up, seen_bytes: return the engine's state when metrics are read:
            requests waiting, requests under way, whether requests are taken, memory of
            images that were seen.

    Attributes:
        registry: Prometheus' collectors, whose names begin with `perceptiondlm_`.
        started: seconds since the epoch.
    """

    def __init__(
        self,
        *,
        queue_length: Callable[[], int],
        running: Callable[[], int],
        up: Callable[[], bool],
        seen_bytes: Callable[[], int],
    ):
        self.started = time.time()
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._recent: deque[tuple[int, float, int]] = deque(maxlen=RECENT_BATCHES)

        # A registry of its own: a process may run several engines.
        own = {"namespace": "perceptiondlm", "registry": self.registry}
        self._counters = {name: Counter(name, text, **own) for name, text in COUNTERS.items()}
        self._batch_size = Histogram(
            "batch_size", "requests that started as one batch", buckets=BATCH_BUCKETS, **own
        )
        self._latency = Histogram(
            "latency_seconds", "from queued to answered", buckets=LATENCY_BUCKETS, **own
        )

        # Gauges are asked for their value when metrics are read.
        gauges = {
            "queue_length": ("requests waiting", queue_length),
            "running": ("requests under way", running),
            "up": ("whether requests are taken", up),
            "seen_bytes": ("memory of images that were seen and are kept", seen_bytes),
            "uptime_seconds": ("seconds since the start", lambda: time.time() - self.started),
            "tokens_per_second": ("tokens a busy second, lately", self._tokens_per_second),
        }
        for name, (text, read) in gauges.items():
            Gauge(name, text, **own).set_function(read)

    def count(self, name: str, amount: int = 1):
        """Adds to a counter of `COUNTERS`."""
        self._counters[name].inc(amount)

    def add_batch(self, jobs: int, seconds: float, tokens: int, forwards: int):
        """Notes a batch that was run, and how many seconds of the model's time it took."""
        self.count("batches")
        self.count("tokens", tokens)
        self.count("forwards", forwards)
        self._batch_size.observe(jobs)
        with self._lock:
            self._recent.append((jobs, seconds, tokens))

    def add_latency(self, seconds: float):
        """Notes a request that was answered so long after it was queued."""
        self.count("completed")
        self._latency.observe(seconds)

    def seconds_until_free(self, waiting: int) -> float:
        """Guesses, from recent batches, when a full queue of `waiting` jobs has a place (s)."""
        jobs, seconds, _ = self._recent_sums()
        guess = waiting * seconds / jobs / 2 if jobs else MIN_RETRY_SECONDS
        return min(max(guess, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

    def prometheus(self) -> bytes:
        """Returns everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _tokens_per_second(self) -> float:
        _, seconds, tokens = self._recent_sums()
        return tokens / seconds if seconds else 0.0

    def _recent_sums(self) -> tuple[int, float, int]:
        """Returns jobs, seconds and tokens of all recent batches."""
        with self._lock:
            recent = list(self._recent)
        jobs, seconds, tokens = zip(*recent, strict=True) if recent else ((), (), ())
        return sum(jobs), sum(seconds), sum(tokens)
