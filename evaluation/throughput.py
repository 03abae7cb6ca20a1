"""Efficiency of a prediction run: tokens per forward pass and seconds, counted two ways each."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class BatchCost:
    """What captioning one batch of pictures took.

    Attributes:
        images, regions: how many were captioned.
        forwards: denoising forward passes as the model counts them: those of each picture, whether
            pictures share a batch or not.
        nominal_tokens: caption positions, padding counted.
        effective_tokens: tokens before each caption's end of turn.
        generate_seconds: of the generating call alone, with the device idle before and after.
        end_to_end_seconds: from opening the files to having the captions.
        rank: the process that did it.
    """

    images: int
    regions: int
    forwards: int
    nominal_tokens: int
    effective_tokens: int
    generate_seconds: float
    end_to_end_seconds: float
    rank: int = 0


@dataclass(frozen=True)
class Throughput:
    """The sum of a run's batches.

    Attributes:
        images ... effective_tokens: as in `BatchCost`, summed.
        generate_seconds, end_to_end_seconds: of the slowest process, since they run side by side.
        nominal_tpf: caption positions per forward pass, as the paper counts.
        effective_tpf: tokens before end of turn per forward pass.
        tokens_per_second: effective tokens per end-to-end second.
        regions_per_second: captions per end-to-end second.
        processes: how many shared the work.
    """

    images: int
    regions: int
    forwards: int
    nominal_tokens: int
    effective_tokens: int
    generate_seconds: float
    end_to_end_seconds: float
    nominal_tpf: float
    effective_tpf: float
    tokens_per_second: float
    regions_per_second: float
    processes: int

    def to_json(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.regions} regions of {self.images} images in {self.end_to_end_seconds:.2f} s"
            f" ({self.generate_seconds:.2f} s generating),"
            f" TPF {self.nominal_tpf:.2f} nominal, {self.effective_tpf:.2f} effective,"
            f" {self.tokens_per_second:.1f} tokens/s"
        )


def timed(model, function: Callable[..., Result], **inputs) -> tuple[Result, float]:
    """`function(**inputs)` and the seconds it took, the model's device idle before and after."""
    _synchronise(model)
    start = time.perf_counter()
    result = function(**inputs)
    _synchronise(model)
    return result, time.perf_counter() - start


def _synchronise(model):
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
    """What a `DiffusionOutput` took; `stops` are the ids that end a caption."""
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
    """How many tokens come before the first that ends the turn."""
    stops = set(stop_ids)
    return next((position for position, token in enumerate(ids) if token in stops), len(ids))


def stop_ids(config) -> tuple[int, ...]:
    """The token ids that end a caption: end of turn, and end of text if the checkpoint has it."""
    ends = config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return (config.eot_token_id, *ends)


def _slowest(costs: list[BatchCost], name: str) -> float:
    per_rank = {}
    for cost in costs:
        per_rank[cost.rank] = per_rank.get(cost.rank, 0.0) + getattr(cost, name)
    return max(per_rank.values(), default=0.0)


def _ratio(amount: float, per: float) -> float:
    return amount / per if per else 0.0
