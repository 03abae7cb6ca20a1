"""Finds the regions of an image: by segmenters, or in what tools and data sets have saved."""

import importlib

_PUBLIC = {"RegionMask": "region_mask", "load_regions": "load"}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
