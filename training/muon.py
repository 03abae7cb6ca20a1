"""Optimizes the weight matrices of some modules by Muon, all else by the recipe's optimizer."""

from collections import defaultdict

import torch
from torch import nn
from torch.optim import Optimizer

from .param_groups import belongs

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Newton-Schulz, by K. Jordan
ITERATIONS = 5
MIN_NORM = 1e-7
ADAMW_SIZE = 0.2  # root mean square of AdamW's updates, over the learning rate (arXiv:2502.16982)


def takes_muon(name: str, parameter: nn.Parameter, modules: list[str]) -> bool:
    """Tells whether a parameter is a matrix in one of the modules."""
    return parameter.ndim == 2 and any(belongs(name, module) for module in modules)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Turns matrices (N, m, n) into ones with all singular values near 1.

    Newton-Schulz iterations of a X + (b A + c A^2) X with A = X X^T, in the precision that the
    matrices come in.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=MIN_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # (N, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(Optimizer):
    """Muon (K. Jordan, 2024) with Nesterov's momentum and decoupled weight decay, its updates
    scaled to the size of AdamW's.

    It computes in the gradients' precision, matrices of one shape together. torch's own rounds to
    bfloat16, which a processor without bfloat16 arithmetic emulates: with AVX2 alone that took two
    thirds of a training step.

    Args:
        groups: parameter groups of matrices, each with `lr` and `weight_decay`.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group["lr"], group["weight_decay"])
        return loss

    def _update(self, parameters: list[nn.Parameter], rate: float, decay: float):
        """Takes one step of matrices of one shape."""
        momenta = [self._momentum(parameter) for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
        turned = orthogonalize(torch.stack(ahead))
        scale = ADAMW_SIZE * max(parameters[0].shape) ** 0.5
        torch._foreach_mul_(parameters, 1 - rate * decay)
        torch._foreach_add_(parameters, list(turned.unbind()), alpha=-rate * scale)

    def _momentum(self, parameter: nn.Parameter) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


class WithMuon(Optimizer):
    """Muon and another optimizer, stepped as one; they take learning rates and weight decays of
    one kind.

    Args:
        groups: parameter groups of matrices, each with `lr` and `weight_decay`.
        other: the optimizer of all other parameters.
    """

    def __init__(self, groups: list[dict], other: Optimizer):
        self.parts = [Muon(groups), other]
        super().__init__([g for part in self.parts for g in part.param_groups], {})
        self._share_groups()

    def _share_groups(self):
        """Keeps one set of groups, so that a scheduler's rates reach the parts."""
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
