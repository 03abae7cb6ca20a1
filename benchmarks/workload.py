"""Builds what the benchmarks run: a model of random weights, a tokenizer, and inputs.

The inputs are noise images with regions, or with a question where the model has no region prompts.
"""

import copy
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..common.quantization import KINDS, quantization_config
from ..common.special_tokens import (
    CAPTION_TOKENS,
    IMAGE_TOKENS,
    NAMED_TOKENS,
    ROI_TOKENS,
    token_ids,
)
from ..configuration_perceptiondlm import FLAGSHIP_VISION, PerceptionDLMConfig
from ..modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from ..processing_perceptiondlm import PerceptionDLMProcessor

# A trained model that is never trained anew, unlike the embedded one.
TRAINED = str(Path(os.path.abspath(__file__)).parents[1])
TRAINED_SUBFOLDER = "tests/shapes_model"
TRAINED_ARGUMENTS = ["--model", TRAINED, "--subfolder", TRAINED_SUBFOLDER]  # of a command

IMAGE_SIZE = (1536, 1024)  # six tiles of 512 and the thumbnail

CPU_PRESET = {
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 512,
        "patch_size": 16,
    },
    "text_config": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
}
# LLaDA-V: up to 36 tiles, whose map is shrunk to four tiles' worth of cells; no region prompts.
LLAVA_LAYOUT = {"image_layout": "anyres", "spatial_merge_size": 1, "num_region_prompts": 0}
LLAVA_CPU_PRESET = {
    **CPU_PRESET,
    **LLAVA_LAYOUT,
    "vision_config": {**CPU_PRESET["vision_config"], "image_size": 384, "patch_size": 28},
}
LLAVA_8B_PRESET = {
    **LLAVA_LAYOUT,
    "vision_config": {**FLAGSHIP_VISION, "image_size": 384, "patch_size": 14},
}
# name: (config fields, dtype)
PRESETS = {
    "cpu": (CPU_PRESET, torch.float32),
    "8b": ({}, torch.bfloat16),
    "llada-v-cpu": (LLAVA_CPU_PRESET, torch.float32),
    "llada-v-8b": (LLAVA_8B_PRESET, torch.bfloat16),
}

SPECIAL_TOKENS = [
    *NAMED_TOKENS.values(),
    *IMAGE_TOKENS.values(),
    *ROI_TOKENS,
    *CAPTION_TOKENS,
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer of single bytes and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def build_model(preset: str, tokenizer, device: str) -> PerceptionDLMForConditionalGeneration:
    """Builds the preset's model with random weights (seed 0), made on the device."""
    fields, dtype = PRESETS[preset]
    config = PerceptionDLMConfig(**fields, **token_ids(tokenizer, IMAGE_TOKENS))

    # Made in its dtype at once: the largest preset has no room for float32.
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return PerceptionDLMForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)


def in_precision(model, precision: str) -> PerceptionDLMForConditionalGeneration:
    """Returns a copy of a model in another dtype, or with quantized weights (a name in `KINDS`)."""
    if precision not in KINDS:
        return copy.deepcopy(model).to(getattr(torch, precision))

    # Weights are quantized while they are loaded.
    device = model.device
    how = quantization_config(precision, model.config, model.dtype, device)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return PerceptionDLMForConditionalGeneration.from_pretrained(
            folder, dtype=model.dtype, quantization_config=how, device_map={"": device}
        ).eval()


def set_layout(model, tokenizer, layout: str) -> PerceptionDLMProcessor:
    """Gives the model the layout ("released" or "independent") and returns its processor."""
    model.config.region_layout = layout
    model.config.roi_convention = "released" if layout == "released" else "aligned"
    return PerceptionDLMProcessor.from_config(model.config, tokenizer)


def question_inputs(processor, num_images: int, max_new_tokens: int) -> dict:
    """Makes inputs for a question about each of some noise images."""
    random = np.random.default_rng(0)
    images = [[noise_image(random)] for _ in range(num_images)]
    prompts = ["Please describe the image in detail."] * num_images
    return processor(images, prompts=prompts, max_new_tokens=max_new_tokens)


def region_inputs(processor, num_regions: int, num_images: int, caption_length: int) -> dict:
    """Makes inputs for noise images with some boxes each, divided into region groups."""
    random = np.random.default_rng(0)
    width, height = IMAGE_SIZE
    max_regions = processor.image_processor.num_region_prompts
    images, masks = [], []
    for _ in range(num_images):
        image = noise_image(random)
        boxes = [random_box(random, width, height) for _ in range(num_regions)]
        for first in range(0, num_regions, max_regions):
            images.append(image)
            masks.append(boxes[first : first + max_regions])
    return processor(images, masks=masks, caption_length=caption_length)


def noise_image(random) -> Image.Image:
    """Draws an image of `IMAGE_SIZE` from a numpy generator."""
    width, height = IMAGE_SIZE
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_box(random, width: int, height: int) -> dict:
    """Draws a box of at least 64 and at most half the sides, as the processor takes it."""
    w, h = random.integers(64, width // 2), random.integers(64, height // 2)
    x, y = random.integers(0, width - w), random.integers(0, height - h)
    return {"box": [int(x), int(y), int(x + w), int(y + h)]}
