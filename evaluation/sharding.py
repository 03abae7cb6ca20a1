"""Divides work among the processes that accelerate or torchrun started."""

from collections.abc import Callable
from dataclasses import dataclass

from ..common.extras import extra


def process_state():
    """Returns what accelerate knows of this process: its rank and the device that it is to use."""
    import torch

    with extra("eval"):
        from accelerate import PartialState

    # On a machine without an accelerator it connects the processes only if it is told to use CPUs.
    return PartialState(cpu=not torch.accelerator.is_available())


@dataclass(frozen=True)
class Shard:
    """One process's share of the work, and how it waits for the other processes."""

    rank: int = 0  # of this process, from 0
    count: int = 1  # of processes
    barrier: Callable[[], None] = lambda: None  # returns when every process has called it

    def __post_init__(self):
        if not 0 <= self.rank < self.count:
            raise ValueError(f"expected a rank from 0 to {self.count - 1}, got {self.rank}")

    @classmethod
    def from_accelerate(cls) -> "Shard":
        """Makes the shard of this process, among those that accelerate or torchrun started."""
        state = process_state()
        return cls(state.process_index, state.num_processes, state.wait_for_everyone)
