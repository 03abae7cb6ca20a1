"""PerceptionDLM: a multimodal diffusion language model that captions many image regions at once.

The names below are imported when they are first used, so `import perceptiondlm` costs nothing.
"""

import importlib

_PUBLIC = {
    "DiffusionOptions": "generation_options",
    "DiffusionOutput": "generation_diffusion",
    "PerceptionDLMConfig": "configuration_perceptiondlm",
    "PerceptionDLMForConditionalGeneration": "modeling_perceptiondlm",
    "PerceptionDLMImageProcessor": "image_processing_perceptiondlm",
    "PerceptionDLMProcessor": "processing_perceptiondlm",
    "RegionCaptioner": "apps.captioning.captioner",
    "RegionMask": "regions.region_mask",
    "convert": "convert_checkpoint",
    "load_image": "image_loading",
    "load_mask": "image_loading",
    "load_regions": "regions.load",
    "split_label_map": "image_loading",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
