"""Measures a training step's seconds and peak memory, on random weights and a noise image.

    python -m perceptiondlm.benchmarks.training_step configs/regions_lora.yaml \\
        trainer.gradient_accumulation_steps=1 --preset 8b --output lora.json
    accelerate launch --config_file configs/accelerate/fsdp_one_node.yaml \\
        -m perceptiondlm.benchmarks.training_step configs/regions.yaml \\
        trainer.gradient_accumulation_steps=1 --preset 8b --output full.json

The steps are those of `perceptiondlm train` with the recipe, apart from its `model` and its `data`:
the model is the preset's, and every sample an image of six tiles with a caption for each region.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments

from ..evaluation.environment import versions
from ..evaluation.files import write_json
from ..image_masks import encode_rle, fill_box
from ..training.recipe import Recipe, load_recipe
from ..training.run import arguments_of, assemble_trainer
from ..training.sharding import leave_group
from .denoising import describe_machine
from .workload import (
    IMAGE_SIZE,
    PRESETS,
    build_model,
    build_tokenizer,
    noise_image,
    random_box,
    set_layout,
)

WARM_UP = 2  # steps whose seconds do not count


class StepClock(TrainerCallback):
    """Measures the seconds of every step, with the work that the device still had to do.

    After the warm-up the GPU's peak of memory starts anew.
    """

    def __init__(self):
        self.seconds = []
        self.started = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        """Starts the clock of a step."""
        self.started = self._now(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        """Stops the clock of a step."""
        self.seconds.append(self._now(args.device) - self.started)
        if len(self.seconds) == WARM_UP and args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    @staticmethod
    def _now(device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


def region_record(folder: Path, regions: int) -> dict:
    """Makes a training record: a noise image, saved in `folder`, with `regions` boxes as masks."""
    random = np.random.default_rng(0)
    width, height = IMAGE_SIZE
    noise_image(random).save(folder / "noise.png")
    boxes = [random_box(random, width, height)["box"] for _ in range(regions)]
    rles = [encode_rle(fill_box(box, (width, height))) for box in boxes]
    captions = ["a region of noise, gray on the whole"] * regions
    return {"image": "noise.png", "mask_rles": rles, "captions": captions}


def benchmark_recipe(arguments, folder: Path) -> tuple[Recipe, TrainingArguments]:
    """Loads the recipe for a record that is written to `folder`, and without checkpoints.

    Returns the recipe and the Trainer's arguments that it makes.
    """
    data = folder / "regions.jsonl"
    overrides = [
        *arguments.overrides,
        "data.kind=regions",
        "data.streaming=false",
        f"data.files=[{data}]",
        f"data.image_root={folder}",
        f"trainer.output_dir={folder / 'run'}",
        f"trainer.max_steps={WARM_UP + arguments.steps}",
        "trainer.save_strategy=no",
        "trainer.logging_steps=1",
    ]
    recipe = load_recipe(arguments.recipe, overrides)
    args = arguments_of(recipe)

    # A step's samples are copies of one record.
    count = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    record = json.dumps(region_record(folder, arguments.regions))
    data.write_text(f"{record}\n" * count, encoding="utf-8")
    return recipe, args


def measure(arguments, folder: Path) -> dict:
    """Trains for some steps; returns the result to write."""
    recipe, args = benchmark_recipe(arguments, folder)
    tokenizer = build_tokenizer()

    # Several processes divide the model before any of them has to hold it on its device.
    device = str(args.device) if args.world_size == 1 else "cpu"
    model = build_model(arguments.preset, tokenizer, device).train()
    processor = set_layout(model, tokenizer, "independent")

    trainer = assemble_trainer(recipe, args, model, processor)
    clock = StepClock()
    trainer.add_callback(clock)
    counts = [p.numel() for p in trainer.model.parameters()]
    learning = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()

    return {
        "machine": describe_machine(args.device.type),
        "versions": versions(),
        "preset": arguments.preset,
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "processes": args.world_size,
        "samples_a_step": args.train_batch_size * args.gradient_accumulation_steps,
        "regions": arguments.regions,
        "parameters": sum(counts),
        "learning": sum(learning),
        "seconds": statistics.median(clock.seconds[WARM_UP:]),
        "all_seconds": clock.seconds,
        "peak_bytes": peak_bytes(args.device),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory that this process has held: of its GPU, or else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def main(arguments: list[str] | None = None):
    """Measures and prints; with several processes each trains and the first writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("recipe")
    add("overrides", nargs="*", metavar="section.key=value", help="options of the recipe")
    add("--preset", choices=sorted(name for name in PRESETS if "llada" not in name), default="cpu")
    add("--regions", type=int, default=6, help="of each image")
    add("--steps", type=int, default=5, help="that count")
    add("--output", required=True, help="JSON")
    parsed = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        result = measure(parsed, Path(folder))

    if int(os.environ.get("RANK", 0)) == 0:
        write_json(parsed.output, result)
        print(json.dumps(result, indent=2))
    leave_group()


if __name__ == "__main__":
    main()
