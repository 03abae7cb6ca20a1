"""Muon for the weight matrices of some modules, the recipe's own optimizer for all else."""

from collections import defaultdict

import torch
from torch import nn
from torch.optim import Optimizer

from .parameters import belongs


def takes_muon(name: str, parameter: nn.Parameter, modules: list[str]) -> bool:
    """Whether a parameter is a matrix in one of the modules."""
    return parameter.ndim == 2 and any(belongs(name, module) for module in modules)


def orthogonalise(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Matrices (N, m, n) with all singular values near 1, by Newton-Schulz iterations of
    a X + (b A + c A^2) X, A = X X^T, in the precision that they come in."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT  # (N, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """torch's Muon in the gradients' precision, matrices of one shape together, its updates scaled
    to the size of AdamW's (arXiv:2502.16982).

    torch's rounds to bfloat16, which a processor without bfloat16 arithmetic emulates: with AVX2
    alone that took two thirds of a training step.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._update(parameters, group, rate=0.2 * max(shape) ** 0.5 * group["lr"])
        return loss

    def _update(self, parameters: list[nn.Parameter], group: dict, rate: float):
        momenta = [self._momentum(parameter) for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
        turned = orthogonalise(
            torch.stack(ahead), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(turned.unbind()), alpha=-rate)

    def _momentum(self, parameter: nn.Parameter) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


class WithMuon(Optimizer):
    """Muon (K. Jordan, 2024) and another optimizer, stepped as one; they take learning rates and
    weight decays of one kind.

    Args:
        groups: parameter groups of matrices, each with `lr` and `weight_decay`.
        other: the optimizer of all other parameters.
    """

    def __init__(self, groups: list[dict], other: Optimizer):
        self.parts = [Muon(groups), other]
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
