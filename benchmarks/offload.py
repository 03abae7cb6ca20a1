"""Measures what a denoising step costs when the decoder's weights are on the disk.

    python -m perceptiondlm.benchmarks.offload --preset cpu --output offload.json

Weights stream once for each step, whatever number of images are denoised together. So a step's
floor is the step in memory and one reading of all layers; both are measured in the same run, in
turn, and medians are reported. Files of weights that fit in memory are read from the page cache:
the disk itself is slower by as much as it is.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ..common.files import write_json
from ..modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from .denoising import describe_machine
from .workload import PRESETS, build_model, build_tokenizer, region_inputs, set_layout

LAYERS = "language_model.model.layers"
FEW_STEPS, MANY_STEPS = 1, 5  # whose difference holds no prompt and no image
LAYOUTS = ("released", "independent")


def measure(arguments) -> dict:
    """Times steps of each layout in memory and on the disk; returns the result to write."""
    tokenizer = build_tokenizer()
    model = build_model(arguments.preset, tokenizer, "cpu")
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model.save_pretrained(Path(folder) / "model")
        streamed = load_streamed(Path(folder) / "model", Path(folder) / "offload")
        for layout in arguments.layouts:
            processor = set_layout(model, tokenizer, layout)
            set_layout(streamed, tokenizer, layout)
            for images in arguments.images:
                row = _measure_size(model, streamed, processor, images, arguments)
                rows.append({"layout": layout, "images": images, **row})

    layers = [p for name, p in model.named_parameters() if name.startswith(LAYERS)]
    return {
        "machine": describe_machine("cpu"),
        "preset": arguments.preset,
        "layer_bytes": sum(p.numel() * p.element_size() for p in layers),
        "regions": arguments.regions,
        "repeats": arguments.repeats,
        "rows": rows,
    }


def load_streamed(folder: Path, offload: Path):
    """Loads a checkpoint whose decoder layers stay on the disk."""
    config = PerceptionDLMForConditionalGeneration.config_class.from_pretrained(folder)
    count = config.text_config.num_hidden_layers
    others = ("vision_tower", "connector", "region_prompts", "language_model.model.embed_tokens")
    others += ("language_model.model.norm", "language_model.model.rotary_emb")
    places = dict.fromkeys([*others, "language_model.lm_head"], "cpu")
    places |= {f"{LAYERS}.{k}": "disk" for k in range(count)}
    return PerceptionDLMForConditionalGeneration.from_pretrained(
        folder, device_map=places, offload_folder=offload, dtype="auto"
    ).eval()


def _measure_size(model, streamed, processor, images: int, arguments) -> dict:
    """Measures one number of images: seconds of a step, and of reading the layers once."""
    length = arguments.caption_length
    inputs = region_inputs(processor, arguments.regions, images, length)
    ways = {
        "in_memory": lambda: step_seconds(model, processor, inputs),
        "streamed": lambda: step_seconds(streamed, processor, inputs),
        "reading": lambda: reading_seconds(streamed),
    }
    timings = {name: [] for name in ways}
    for repeat in range(arguments.repeats + 1):
        for name, way in ways.items():
            seconds = way()
            if repeat:  # the first warms up
                timings[name].append(seconds)

    medians = {name: statistics.median(values) for name, values in timings.items()}
    floor = medians["in_memory"] + medians["reading"]
    return {**medians, "ratio_to_floor": medians["streamed"] / floor}


def step_seconds(model, processor, inputs) -> float:
    """Times one denoising step of prepared inputs."""
    seconds = []
    for steps in (FEW_STEPS, MANY_STEPS):
        start = time.perf_counter()
        model.diffusion_generate(inputs=dict(inputs), processor=processor, steps=steps)
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / (MANY_STEPS - FEW_STEPS)


def reading_seconds(streamed) -> float:
    """Times the reading of every decoder layer's weights once, into memory of its own."""
    hooks = [
        (module._hf_hook.weights_map, name)
        for key, module in streamed.named_modules()
        if key.startswith(LAYERS) and getattr(module, "_hf_hook", None) is not None
        for name, _ in module.named_parameters(recurse=False)
    ]
    start = time.perf_counter()
    for weights, name in hooks:
        weights[name].clone()
    return time.perf_counter() - start


def main():
    """Runs the benchmark and prints one line for each size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--regions", type=int, default=4)
    parser.add_argument("--caption-length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--folder", help="where the weights are written (default: temporary files)")
    parser.add_argument("--output", help="where the result goes (JSON)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    result = measure(arguments)
    if arguments.output:
        write_json(arguments.output, result)
    for row in result["rows"]:
        print(
            f"{row['layout']}, {row['images']} images: a step {row['in_memory']:.3f} s in memory,"
            f" {row['streamed']:.3f} s streamed, {row['reading']:.3f} s to read the layers;"
            f" {row['ratio_to_floor']:.2f} times the floor"
        )


if __name__ == "__main__":
    main()
