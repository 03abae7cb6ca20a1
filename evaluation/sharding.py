"""Which part of the work a process has, among those that accelerate or torchrun started."""

from collections.abc import Callable
from dataclasses import dataclass

from ..common.extras import extra


def process_state():
    """What accelerate knows of this process: its rank, and the device that it is to use."""
    import torch

    with extra("eval"):
        from accelerate import PartialState

    # Without being told so, it takes processes on CPUs alone for strangers to each other.
    return PartialState(cpu=not torch.accelerator.is_available())


@dataclass(frozen=True)
class Shard:
    """Which part of the work this process has, and how it waits for the others."""

    rank: int = 0
    count: int = 1
    barrier: Callable[[], None] = lambda: None

    def __post_init__(self):
        if not 0 <= self.rank < self.count:
            raise ValueError(f"expected a rank from 0 to {self.count - 1}, got {self.rank}")

    @classmethod
    def from_accelerate(cls) -> "Shard":
        """This process's place among those that accelerate or torchrun started."""
        state = process_state()
        return cls(state.process_index, state.num_processes, state.wait_for_everyone)
