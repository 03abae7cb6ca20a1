"""What a server did: counters, a histogram of batches, percentiles, as Prometheus text."""

import threading
import time
from collections import deque

COUNTERS = {
    "accepted": "requests queued",
    "completed": "requests answered",
    "refused": "requests refused because the queue was full",
    "invalid": "requests refused because they did not fit",
    "cancelled": "requests given up by their client or timed out",
    "failed": "requests on which the model failed",
    "batches": "batches run",
    "forwards": "denoising forward passes",
    "tokens": "tokens of captions and answers up to their ends",
}
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
QUANTILES = (0.5, 0.9, 0.99)
RECENT = 1024  # latencies and batches that percentiles and rates look back on
RETRY_SECONDS = (1.0, 60.0)


class Metrics:
    """Thread-safe counts of one engine's work."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._batches = dict.fromkeys(BATCH_BUCKETS, 0)
        self._batched_jobs = 0
        self._latencies: deque[float] = deque(maxlen=RECENT)
        self._latency_sum = 0.0
        self._recent: deque[tuple[int, float, int]] = deque(maxlen=64)  # jobs, seconds, tokens
        self.started = time.time()

    def count(self, name: str):
        """Adds one to a counter of `COUNTERS`."""
        with self._lock:
            self._counts[name] += 1

    def add_batch(self, jobs: int, seconds: float, tokens: int, forwards: int):
        """Notes a batch that was run."""
        with self._lock:
            self._counts["batches"] += 1
            self._counts["tokens"] += tokens
            self._counts["forwards"] += forwards
            self._batched_jobs += jobs
            for bucket in BATCH_BUCKETS:
                self._batches[bucket] += jobs <= bucket
            self._recent.append((jobs, seconds, tokens))

    def add_latency(self, seconds: float):
        """Notes a request that was answered so long after it was queued."""
        with self._lock:
            self._counts["completed"] += 1
            self._latencies.append(seconds)
            self._latency_sum += seconds

    def seconds_until_free(self, waiting: int) -> float:
        """A guess, from recent batches, at when a full queue of `waiting` jobs has a place."""
        with self._lock:
            jobs = sum(jobs for jobs, _, _ in self._recent)
            seconds = sum(seconds for _, seconds, _ in self._recent)
        guess = waiting * seconds / jobs / 2 if jobs else RETRY_SECONDS[0]
        return min(max(guess, RETRY_SECONDS[0]), RETRY_SECONDS[1])

    def snapshot(self) -> dict:
        """Counts, mean batch, latency percentiles in seconds and recent tokens a second."""
        with self._lock:
            latencies = sorted(self._latencies)
            busy = sum(seconds for _, seconds, _ in self._recent)
            tokens = sum(tokens for _, _, tokens in self._recent)
            batches = self._counts["batches"]
            return {
                **self._counts,
                "mean_batch": self._batched_jobs / batches if batches else 0.0,
                "latency": {q: percentile(latencies, q) for q in QUANTILES},
                "tokens_per_second": tokens / busy if busy else 0.0,
            }

    def prometheus(self, *, queue_length: int, running: int, up: bool) -> str:
        """Everything in Prometheus' text format, version 0.0.4."""
        now = self.snapshot()
        lines = []
        for name, text in COUNTERS.items():
            lines += _metric(f"{name}_total", "counter", text, [("", now[name])])
        gauges = {
            "queue_length": ("requests waiting", queue_length),
            "running": ("requests in the running batch", running),
            "up": ("whether requests are taken", int(up)),
            "uptime_seconds": ("seconds since the start", time.time() - self.started),
            "tokens_per_second": ("tokens a busy second, lately", now["tokens_per_second"]),
        }
        for name, (text, value) in gauges.items():
            lines += _metric(name, "gauge", text, [("", value)])
        with self._lock:
            buckets = [(f'_bucket{{le="{b}"}}', n) for b, n in self._batches.items()]
            jobs, latency_sum = self._batched_jobs, self._latency_sum
        buckets += [
            ('_bucket{le="+Inf"}', now["batches"]),
            ("_sum", jobs),
            ("_count", now["batches"]),
        ]
        lines += _metric("batch_size", "histogram", "requests of a batch", buckets)
        quantiles = [(f'{{quantile="{q}"}}', value) for q, value in now["latency"].items()]
        quantiles += [("_sum", latency_sum), ("_count", now["completed"])]
        text = "from queued to answered, lately"
        lines += _metric("latency_seconds", "summary", text, quantiles)
        return "\n".join(lines) + "\n"


def percentile(ordered: list[float], q: float) -> float:
    """The nearest-rank percentile of ordered values; 0 of none."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


def _metric(name: str, kind: str, text: str, samples: list[tuple[str, float]]) -> list[str]:
    full = f"perceptiondlm_{name}"
    head = [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
    return head + [
        f"{full}{suffix} {value:.6g}" if isinstance(value, float) else f"{full}{suffix} {value}"
        for suffix, value in samples
    ]
