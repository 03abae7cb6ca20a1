"""Plays several devices on one CPU: tensors say where they are, and refuse to be mixed."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

FIRST, SECOND, THIRD = (f"lazy:{i}" for i in (1, 2, 3))  # needs no driver to be named


class PlacedTensor(torch.Tensor):
    """A CPU tensor, `held`, under another device's name."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device=None, requires_grad: bool = False):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device or inner.device,
            requires_grad=requires_grad,
        )

    def __init__(self, inner: torch.Tensor, device=None, requires_grad: bool = False):
        self.held = getattr(inner, "held", inner)

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run_placed(func, args, kwargs or {})


def run_placed(func, args, kwargs: dict):
    """Runs an operator on the CPU; its tensors must share a device, which its results get."""
    places = set()

    def unwrap(x):
        if isinstance(x, torch.Tensor) and x.ndim:  # a single number goes with any device
            places.add(x.device)
        return x.held if isinstance(x, PlacedTensor) else x

    args, kwargs = tree_map(unwrap, args), tree_map(unwrap, dict(kwargs))
    place = kwargs.get("device")
    if place is not None:
        kwargs["device"] = torch.device("cpu")
    elif len(places) > 1:
        raise RuntimeError(f"expected tensors of one device for {func}, got {places}")
    else:
        place = next(iter(places), torch.device("cpu"))
    out = func(*args, **kwargs)
    if place.type == "cpu":
        return out
    return tree_map(lambda x: PlacedTensor(x, place) if isinstance(x, torch.Tensor) else x, out)


class SimulatedDevices(TorchDispatchMode):
    """Makes `FIRST`, `SECOND` and `THIRD` devices inside the context.

    `torch.tensor` and generators do not pass through a mode, so they are replaced meanwhile, and
    autocast is off, which would ask the device's driver.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run_placed(func, args, kwargs or {})

    def __enter__(self):
        self.replaced = torch.tensor, torch.Generator, torch.is_autocast_enabled
        tensor, generator, _ = self.replaced

        def placed_tensor(data, *args, device=None, **kwargs):
            made = tensor(data, *args, **kwargs)
            return made if device is None else made.to(device)

        torch.tensor, torch.Generator = placed_tensor, lambda device=None: generator()
        torch.is_autocast_enabled = lambda *device: False
        return super().__enter__()

    def __exit__(self, *raised):
        torch.tensor, torch.Generator, torch.is_autocast_enabled = self.replaced
        return super().__exit__(*raised)
