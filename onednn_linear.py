"""Float32 linear layers on CPUs through oneDNN.

PyTorch gives them to MKL, which reached less than half of oneDNN's rate on the AMD processor of the
README's benchmark.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

PLAIN = (torch.Tensor, torch.nn.Parameter)  # no quantised or distributed weights
FEWEST_ROWS, FEWEST_WEIGHTS = 16, 2**16  # smaller products gain nothing


class OneDNNLinear(TorchFunctionMode):
    """Inside it, `F.linear` of plain float32 CPU tensors without gradient runs in oneDNN.

    The sums are taken in another order than MKL's: results differ by float32 rounding.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and _takes(*args):
            return linear(*args)
        return func(*args, **(kwargs or {}))

    def __exit__(self, *raised):
        # torch takes modes off their stack during a call; Ctrl-C between that and its `try` leaves
        # this one off, and taking off another would hide the interrupt behind a RuntimeError
        if any(mode is self for mode in _get_current_function_mode_stack()):
            super().__exit__(*raised)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` in oneDNN, which compiles and keeps a kernel for every shape it meets: so the
    number of rows is padded to one of few, or memory would grow with every new length."""
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    missing = padded_rows(len(rows)) - len(rows)
    padded = F.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()
    out = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    return out[: len(rows)].view(*x.shape[:-1], -1)


def padded_rows(rows: int) -> int:
    """The next of eight numbers an octave, and a multiple of 16 at least."""
    unit = max(16, 1 << (rows.bit_length() - 4))
    return -(-rows // unit) * unit


def _takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and all(type(t) in PLAIN and t.dtype == torch.float32 for t in given)
        and all(t.device.type == "cpu" for t in given)
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and weight.numel() >= FEWEST_WEIGHTS
        and not torch.is_autocast_enabled("cpu")
    )


def fastest_linear(device: torch.device):
    """A context in which linear layers run the fastest known way on `device`."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return OneDNNLinear() if device.type == "cpu" and known else contextlib.nullcontext()
