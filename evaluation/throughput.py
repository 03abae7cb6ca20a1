"""Measures the efficiency of a run: tokens per forward pass and seconds, counted two ways each."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """What captioning some images took."""

    images: int
    regions: int
    forwards: int  # forward passes, those of each image counted though images share a batch
    nominal_tokens: int  # caption positions, padding counted
    effective_tokens: int  # tokens before each caption's end of turn
    generate_seconds: float  # of the generating call alone, the device idle before and after
    end_to_end_seconds: float  # from opening the files to having the captions


@dataclass(frozen=True)
class BatchCost(Cost):
    """The cost of one batch of images."""

    rank: int = 0  # the process that did it


@dataclass(frozen=True)
class Throughput(Cost):
    """The cost of a whole run: counts summed, seconds of the slowest process."""

    nominal_tpf: float  # caption positions per forward pass, as the paper counts
    effective_tpf: float  # tokens before end of turn per forward pass
    tokens_per_second: float  # effective tokens per end-to-end second
    regions_per_second: float  # captions per end-to-end second
    processes: int  # that shared the work

    def to_json(self) -> dict:
        """Returns the record as JSON holds it."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.regions} regions of {self.images} images in {self.end_to_end_seconds:.2f} s"
            f" ({self.generate_seconds:.2f} s generating),"
            f" TPF {self.nominal_tpf:.2f} nominal, {self.effective_tpf:.2f} effective,"
            f" {self.tokens_per_second:.1f} tokens/s"
        )


def timed(model, function: Callable[..., Result], **inputs) -> tuple[Result, float]:
    """Calls a function; returns its result and the seconds it took.

    The model's device is idle before and after, so that all of the work is counted.
    """
    _synchronize(model)
    start = time.perf_counter()
    result = function(**inputs)
    _synchronize(model)
    return result, time.perf_counter() - start


def _synchronize(model):
    """Waits for the device, so that a clock read afterwards counts the work that was queued."""
    import torch

    device = torch.device(model.device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def batch_cost(
    result,
    stops: Sequence[int],
    *,
    images: int,
    generate_seconds: float,
    end_to_end_seconds: float,
    rank: int = 0,
) -> BatchCost:
    """Counts what a `DiffusionOutput` took; `stops` are the ids that end a caption."""
    ids = [caption for image_ids in result.token_ids for caption in image_ids]
    return BatchCost(
        images=images,
        regions=len(ids),
        forwards=int(result.num_forwards),
        nominal_tokens=sum(map(len, ids)),
        effective_tokens=sum(effective_length(caption, stops) for caption in ids),
        generate_seconds=generate_seconds,
        end_to_end_seconds=end_to_end_seconds,
        rank=rank,
    )


def total_throughput(costs: Iterable[BatchCost]) -> Throughput:
    """Adds up the batches of every process."""
    costs = list(costs)
    counts = {
        name: sum(getattr(cost, name) for cost in costs)
        for name in ("images", "regions", "forwards", "nominal_tokens", "effective_tokens")
    }

    # Processes work side by side, so their seconds are not summed.
    generating = _slowest(costs, "generate_seconds")
    seconds = _slowest(costs, "end_to_end_seconds")
    return Throughput(
        **counts,
        generate_seconds=generating,
        end_to_end_seconds=seconds,
        nominal_tpf=_ratio(counts["nominal_tokens"], counts["forwards"]),
        effective_tpf=_ratio(counts["effective_tokens"], counts["forwards"]),
        tokens_per_second=_ratio(counts["effective_tokens"], seconds),
        regions_per_second=_ratio(counts["regions"], seconds),
        processes=len({cost.rank for cost in costs}),
    )


def effective_length(ids: Sequence[int], stop_ids: Iterable[int]) -> int:
    """Counts the tokens before the first that ends the turn."""
    stops = set(stop_ids)
    return next((position for position, token in enumerate(ids) if token in stops), len(ids))


def stop_ids(config) -> tuple[int, ...]:
    """Returns the token ids that end a caption: end of turn and, if there is one, end of text."""
    ends = config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return (config.eot_token_id, *ends)


def _slowest(costs: list[BatchCost], name: str) -> float:
    """Returns the seconds of the slowest process; the processes work side by side."""
    per_rank = {}
    for cost in costs:
        per_rank[cost.rank] = per_rank.get(cost.rank, 0.0) + getattr(cost, name)
    return max(per_rank.values(), default=0.0)


def _ratio(amount: float, per: float) -> float:
    return amount / per if per else 0.0
