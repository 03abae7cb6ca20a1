"""Makes the checkpoints, tiny models, images and region masks that the tests share."""

# ruff: noqa: E402  (the environment comes before the imports that read it)

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

# Before transformers is imported: no network, and remote code apart from the user's own cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="perceptiondlm-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

import numpy as np
import pytest
import torch
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.convert_checkpoint import convert
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from PIL import Image
from transformers import PreTrainedTokenizerFast

VECTORS = Path(__file__).parent / "fixtures" / "vectors"
TEXT = {
    "vocab_size": 468,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "vision_use_head": False,
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves transformers' own tests out unless asked for, as their markers are unknown."""
    is_suite = collection_path.name == "test_transformers_suite.py"
    return True if is_suite and config.option.markexpr != "transformers_suite" else None


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Gives the folder of the recorded checkpoints and of what the released code computed."""
    return VECTORS


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Gives a function that converts a recorded checkpoint, by its name, and returns its folder."""
    root = tmp_path_factory.mktemp("converted")

    @functools.cache
    def convert_once(name: str) -> Path:
        vision = VECTORS / name / "vision" / "config.json"
        return convert(
            VECTORS / name,
            root / name.replace("/", "-"),
            vision_source=vision if vision.exists() else None,
        )

    return convert_once


@pytest.fixture(scope="session")
def load(converted):
    """Gives a function that loads a recorded checkpoint's model and processor, by its name."""

    @functools.cache
    def load_once(name: str):
        folder = converted(name)
        model = PerceptionDLMForConditionalGeneration.from_pretrained(folder).eval()
        processor = PerceptionDLMProcessor.from_pretrained(folder, trust_remote_code=True)
        return model, processor

    return load_once


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(VECTORS / "released-region")


@pytest.fixture(scope="session")
def make_config(tokenizer):
    """Gives a function that makes a tiny configuration for `tokenizer`.

    Keywords change its fields, `text` and `vision` those of its parts.
    """
    ids = tokenizer.convert_tokens_to_ids

    def make(*, text=None, vision=None, **changes) -> PerceptionDLMConfig:
        options = {
            "mask_token_id": ids("<|mdm_mask|>"),
            "eot_token_id": ids("<|eot_id|>"),
            "start_header_token_id": ids("<|start_header_id|>"),
            "end_header_token_id": ids("<|end_header_id|>"),
            "bos_token_id": ids("<|startoftext|>"),
            "eos_token_id": ids("<|endoftext|>"),
            "pad_token_id": tokenizer.pad_token_id,
            "image_token_id": ids("<IMG_CONTEXT>"),
            "image_start_token_id": ids("<img>"),
            "image_end_token_id": ids("</img>"),
            "roi_token_ids": ids([f"<|reserved_token_{i}|>" for i in range(16)]),
            "caption_token_ids": ids([f"<|Mask_Cap_{i}|>" for i in range(16)]),
        }
        return PerceptionDLMConfig(
            text_config=TEXT | (text or {}),
            vision_config=VISION | (vision or {}),
            **(options | changes),
        )

    return make


@pytest.fixture(scope="session")
def make(make_config, tokenizer):
    """Gives a function that makes a tiny model and its processor; equal calls share a pair.

    The random weights are loud: every norm, bias and embedding matters, and predictions differ
    from place to place.
    """
    pairs = {}

    def make_once(seed: int = 0, **changes):
        key = repr((seed, sorted(changes.items())))
        if key not in pairs:
            config = make_config(**changes)
            model = PerceptionDLMForConditionalGeneration(config).eval()
            randomize(model, seed)
            pairs[key] = model, PerceptionDLMProcessor.from_config(config, tokenizer)
        return pairs[key]

    return make_once


def randomize(model: torch.nn.Module, seed: int):
    """Draws loud weights: large enough that a change in any of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1 and name.endswith("weight"):  # a norm
            weight.data = 1 + 0.2 * noise
        elif "embed" in name or "prompts" in name or weight.ndim == 1:
            weight.data = 0.7 * noise
        else:
            weight.data = noise * 1.5 / weight[0].numel() ** 0.5


@pytest.fixture(scope="session")
def draw_image():
    """Gives a function that draws a smooth, asymmetric image; another for another seed."""

    def draw(width: int, height: int, seed: int = 0) -> Image.Image:
        noise = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)

    return draw


@pytest.fixture(scope="session")
def blobs():
    """Gives a function that draws irregular region masks of distinct areas, which may overlap.

    They are uint8 arrays (H, W): 0 outside, 255 inside, or any value above 0 with `soft`.
    """

    def draw(width: int, height: int, count: int, seed: int = 0, soft: bool = False) -> list:
        rng = np.random.default_rng(seed)
        masks, areas = [], set()
        while len(masks) < count:
            noise = rng.integers(0, 256, (4, 4), dtype=np.uint8)
            smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            values = np.asarray(smooth).astype(int) - int(rng.integers(110, 190))
            mask = np.where(values > 0, np.clip(values * 3, 1, 255) if soft else 255, 0)
            area = int((mask != 0).sum())
            if area and area not in areas:
                areas.add(area)
                masks.append(mask.astype(np.uint8))
        return masks

    return draw


@pytest.fixture(scope="session")
def scene(draw_image, blobs):
    """Gives a function that draws an image of a size, and region masks on it."""

    def draw(size, count, seed=0):
        return draw_image(*size, seed=seed), blobs(*size, count=count, seed=seed)

    return draw
