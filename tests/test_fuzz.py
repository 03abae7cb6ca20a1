"""Hostile and absurd input at the Python doors: every refusal is a documented error.

Each trial draws from its own seed, so that `-k seed` repeats it. Whatever is thrown at a door, it
either works or raises ValueError (a file that is not there: FileNotFoundError; a wrong Python
call: TypeError), in bounded time and memory.
"""

import json
import math
import random

import numpy as np
import pytest
import torch
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.generation_options import OPTIONS as DECODING_OPTIONS
from perceptiondlm.image_loading import load_image, load_mask
from PIL import Image

ALLOWED = (ValueError, FileNotFoundError, TypeError)
TRIALS = 20_000
QUICK_TRIALS = 150

NUMBERS = [
    0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.0, 0.5, 1.0, -0.5, 1e-300, 1e300,
    math.inf, -math.inf, math.nan, True, False, np.int64(3), np.float32(0.5),
]  # fmt: skip
TEXTS = [
    "",
    "a",
    "low_confidence",
    "random",
    "threshold",
    "factor",
    "<|eot_id|>",
    "\ud800",
    "\0",
    "é" * 40,
]
OPTIONS = [*DECODING_OPTIONS, "callback", "nonsense"]


def anything(rng: random.Random, depth: int = 0):
    """A value of some kind: number, text, bytes, list, dict, array, tensor, image, None."""
    kind = rng.randrange(12 if depth < 2 else 6)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(TEXTS)
    if kind == 4:
        return None
    if kind == 5:
        return rng.randbytes(rng.randrange(20))
    if kind == 6:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        names = ("box", "polygons", "size", "counts", "x")
        return {rng.choice(names): anything(rng, depth + 1) for _ in range(rng.randrange(3))}
    if kind == 8:
        return array(rng)
    if kind == 9:
        values = array(rng)
        return torch.from_numpy(values) if values.dtype != object else None
    if kind == 10:
        modes = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I", "I;16", "F", "CMYK", "YCbCr")
        return Image.new(rng.choice(modes), (rng.randrange(1, 9), rng.randrange(1, 9)))
    return object()


def array(rng: random.Random) -> np.ndarray:
    """A small array of odd shape, type and values."""
    shape = tuple(rng.choice((0, 1, 3, 4, 8)) for _ in range(rng.randrange(4)))
    values = np.random.default_rng(rng.randrange(2**32)).normal(size=shape)
    values = np.asarray(values * rng.choice((1, 300)))
    if rng.random() < 0.2 and values.size:
        values.flat[0] = rng.choice((math.nan, math.inf, -math.inf))
    with np.errstate(invalid="ignore"):
        return values.astype(rng.choice((bool, np.uint8, np.int64, np.float16, np.float64, object)))


def decode(rng: random.Random, model, processor, image, masks):
    options = {rng.choice(OPTIONS): anything(rng) for _ in range(rng.randrange(1, 4))}
    if options.get("compile") is True:
        options["compile"] = False  # what it compiles is not what is tested
    options = bounded(options)
    if rng.random() < 0.5:
        given = {"images": image, "masks": masks, "caption_length": 3} | options
    else:
        given = {"images": image, "prompts": "What?", "max_new_tokens": 3} | options
    model.diffusion_generate(processor=processor, **given)


def bounded(options: dict) -> dict:
    """Options without numbers that are allowed but slow: a length or a number of steps."""
    small = ("steps", "caption_length", "max_new_tokens", "block_length")
    return {k: v for k, v in options.items() if k not in small or type(v) is not int or v < 10}


def pass_inputs(rng: random.Random, model, processor, image, masks):
    target = rng.choice(("images", "masks", "prompts", "mask", "inputs"))
    given = {"images": image, "masks": masks, "caption_length": 2}
    if target == "mask":
        given["masks"] = [anything(rng) for _ in range(rng.randrange(1, 3))]
    elif target == "prompts":
        given = {"images": image, "prompts": anything(rng), "max_new_tokens": 2}
    elif target == "inputs":
        given = {"inputs": anything(rng)}
    else:
        given[target] = anything(rng)
    model.diffusion_generate(processor=processor, **given)


def change_tensors(rng: random.Random, model, processor, image, masks):
    if rng.random() < 0.5:
        inputs = processor(image, masks=masks, caption_length=2)
    else:
        inputs = processor(image, prompts="What?", max_new_tokens=2)
    name = rng.choice(sorted(inputs))
    if name == "task":
        inputs["task"] = anything(rng)
        return model.diffusion_generate(inputs=dict(inputs), processor=processor)
    change = rng.randrange(6)
    tensor = inputs[name]
    if change == 0:
        inputs.pop(name)
    elif change == 1:
        inputs[name] = anything(rng)
    elif change == 2:
        inputs[name] = tensor.flatten()
    elif change == 3:
        inputs[name] = tensor[..., : rng.randrange(tensor.shape[-1] + 1)]
    else:
        changed = tensor.clone()
        number = rng.choice([n for n in NUMBERS if abs(n) < 2**63 and math.isfinite(n)])
        changed.view(-1)[rng.randrange(max(changed.numel(), 1))] = number
        inputs[name] = changed
    model.diffusion_generate(inputs=dict(inputs), processor=processor)


def process(rng: random.Random, model, processor, image, masks):
    names = (
        "images", "text", "masks", "prompts", "caption_length", "max_new_tokens", "captions",
        "answers", "padding", "return_tensors", "add_special_tokens",
    )  # fmt: skip
    given = {"images": image} | {rng.choice(names): anything(rng) for _ in range(3)}
    processor(**given)


def open_anything(rng: random.Random, model, processor, image, masks):
    if rng.random() < 0.5:
        load_image(anything(rng))
    else:
        load_mask(anything(rng), image.size)


def configure(rng: random.Random, model, processor, image, masks):
    values = json.loads(model.config.to_json_string())
    place = rng.choice((values, values["text_config"], values["vision_config"]))
    name = rng.choice(sorted(place))
    value = anything(rng)
    place[name] = value
    try:
        json.dumps(values)
    except (TypeError, ValueError):
        return  # such a value stands in no file
    PerceptionDLMConfig(**values)


DOORS = [decode, pass_inputs, change_tensors, process, open_anything, configure]


@pytest.fixture(scope="module")
def scene(make, draw_image, blobs):
    model, processor = make()
    return model, processor, draw_image(40, 40), blobs(40, 40, count=2)


def refuse_or_work(door, seed: int, scene):
    try:
        door(random.Random(seed), *scene)
    except ALLOWED:
        pass


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_absurd_input_is_refused_with_a_documented_error(door, scene):
    for seed in range(QUICK_TRIALS):
        refuse_or_work(door, seed, scene)


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_absurd_input_of_thousands_of_kinds_is_refused(door, scene):
    for seed in range(QUICK_TRIALS, TRIALS // len(DOORS) + 1):
        refuse_or_work(door, seed, scene)
