"""Float32 linear layers on CPUs through oneDNN.

PyTorch gives them to MKL, which on AMD's processors reaches less than half of what oneDNN does
with the same arithmetic (the README's benchmark names machine and ratios).
"""

import contextlib

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

PLAIN = (torch.Tensor, torch.nn.Parameter)  # no quantised or distributed weights


class OneDNNLinear(TorchFunctionMode):
    """Inside it, `F.linear` of plain float32 CPU tensors without gradient runs in oneDNN.

    The sums are taken in another order than MKL's: results differ by float32 rounding.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and _takes(*args):
            x, weight, *bias = args
            return _linear(x.contiguous(), weight, *(bias or [None]), "none", [], "")
        return func(*args, **(kwargs or {}))


def _linear(*args) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(*args)


def _takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and all(type(t) in PLAIN and t.dtype == torch.float32 for t in given)
        and all(t.device.type == "cpu" for t in given)
        and x.ndim >= 2
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def fastest_linear(device: torch.device):
    """A context in which linear layers run the fastest known way on `device`."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return OneDNNLinear() if device.type == "cpu" and known else contextlib.nullcontext()
