"""Muon for the weight matrices of some modules, the recipe's own optimizer for all else."""

import torch
from torch import nn
from torch.optim import Optimizer

from .parameters import belongs


def takes_muon(name: str, parameter: nn.Parameter, modules: list[str]) -> bool:
    """Whether a parameter is a matrix in one of the modules."""
    return parameter.ndim == 2 and any(belongs(name, module) for module in modules)


class WithMuon(Optimizer):
    """Muon (K. Jordan, 2024) and another optimizer, stepped as one.

    Muon's updates are scaled to the size of AdamW's (arXiv:2502.16982), so that both take learning
    rates and weight decays of one kind.

    Args:
        groups: parameter groups of matrices, each with `lr` and `weight_decay`.
        other: the optimizer of all other parameters.
    """

    def __init__(self, groups: list[dict], other: Optimizer):
        muon = torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw")
        self.parts = [muon, other]
        super().__init__([g for part in self.parts for g in part.param_groups], {})
        self._share_groups()

    def _share_groups(self):
        """One set of groups, so that a scheduler's rates reach the parts."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict):
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
