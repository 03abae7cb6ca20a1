"""Times ways of denoising against the published one, alternating in one run.

    python -m perceptiondlm.benchmarks.denoising --preset cpu --regions 4 --images 1 \\
        --methods published,independent-exact --repeats 3 --output result.json

Presets `llada-v-cpu` and `llada-v-8b` answer a question about each picture instead of captioning
regions. A row's `seconds` is the median over the repeats of generation alone (inputs ready on the
device, the pictures' encoding included), its `ratio` the published way's seconds over it, for the
same regions and images in the same run.
"""

import argparse
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from ..configuration_perceptiondlm import ROLE_CAPTION
from ..evaluation.files import write_json
from ..modeling_language import fastest_linear
from ..processing_sequence import RESPONSE_INPUTS
from .published import answer_questions_plainly, caption_regions_plainly
from .report import draw, table, update_readme
from .workload import (
    PRESETS,
    build_model,
    build_tokenizer,
    question_inputs,
    region_inputs,
    set_layout,
)


@dataclass(frozen=True)
class Method:
    """A way of denoising: the layout it needs and the options of `diffusion_generate`."""

    layout: str
    options: dict
    exact: bool = True


# The `published` method is one of `benchmarks.published`; these are ours.
METHODS = {
    "released-exact": Method("released", {}),
    "released-cached": Method("released", {"prompt_refresh_interval": 0}, exact=False),
    "released-cached-8": Method("released", {"prompt_refresh_interval": 8}, exact=False),
    "released-adaptive": Method(
        "released", {"prompt_refresh_interval": 0, "threshold": 0.9, "budget": True}, exact=False
    ),
    "independent-exact": Method("independent", {}),
    "independent-compiled": Method("independent", {"compile": True}),
    "independent-adaptive": Method("independent", {"threshold": 0.9, "budget": True}, exact=False),
}


def measure(arguments) -> dict:
    """Runs every method for every number of regions and images; returns the result to write."""
    device = arguments.device
    tokenizer = build_tokenizer()
    model = build_model(arguments.preset, tokenizer, device)
    floor = measure_floor(model, device)
    rows = []
    for images in arguments.images:
        for regions in arguments.regions if model.config.num_region_prompts else [1]:
            rows += _measure_size(model, tokenizer, regions, images, arguments)
    for row in rows:
        row["floor_seconds"] = floor_seconds(row, floor, arguments)
    return {
        "machine": describe_machine(device),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "preset": arguments.preset,
        "steps": arguments.steps,
        "budget": arguments.budget,
        "caption_length": arguments.caption_length,
        "repeats": arguments.repeats,
        "parameters": sum(p.numel() for p in model.parameters()),
        "floor": floor,
        "rows": rows,
    }


def _measure_size(model, tokenizer, regions: int, images: int, arguments) -> list[dict]:
    """Alternates the methods `repeats` times after one warm-up of each; one row a method."""
    runs, sizes = {}, {}
    for name in arguments.methods:
        runs[name], sizes[name] = _runner(name, model, tokenizer, regions, images, arguments)
    timings = {name: [] for name in runs}
    forwards, peaks = {}, {}
    for repeat in range(arguments.repeats + (0 if arguments.no_warm_up else 1)):
        for name, run in runs.items():
            seconds, peak, forwards[name] = timed(run, arguments.device)
            if repeat or arguments.no_warm_up:
                timings[name].append(seconds)
                peaks[name] = max(peak, peaks.get(name, 0))
            print(f"{name} regions={regions} images={images} {seconds:.3f} s", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in timings.items()}
    tokens = regions * images * arguments.caption_length
    return [
        {
            "method": name,
            "exact": name == "published" or METHODS[name].exact,
            "regions": regions,
            "images": images,
            "seconds": medians[name],
            "all_seconds": timings[name],
            "ratio": medians["published"] / medians[name] if "published" in medians else None,
            "tokens": list(sizes[name]),
            "forwards": forwards[name],
            "tokens_per_forward": tokens / forwards[name],
            "tokens_per_second": tokens / medians[name],
            "peak_bytes": peaks[name],
        }
        for name in runs
    ]


def _runner(name, model, tokenizer, regions, images, arguments):
    """A call that denoises once and returns the forward passes it took; and its size: passes,
    positions of one, answer positions of one."""
    layout = "released" if name == "published" else METHODS[name].layout
    processor = set_layout(model, tokenizer, layout)
    if model.config.num_region_prompts:
        plainly = caption_regions_plainly
        inputs = region_inputs(processor, regions, images, arguments.caption_length)
    else:
        plainly = answer_questions_plainly
        inputs = question_inputs(processor, images, arguments.caption_length)
    inputs = {k: v.to(arguments.device) for k, v in inputs.items() if k not in RESPONSE_INPUTS}

    def run() -> int:
        set_layout(model, tokenizer, layout)
        if name == "published":
            plainly(model, inputs, arguments.steps)
            return arguments.steps * len(inputs["input_ids"])
        options = dict(METHODS[name].options)
        steps = arguments.budget if options.pop("budget", False) else arguments.steps
        return model.diffusion_generate(inputs=inputs, steps=steps, **options).num_forwards

    roles = inputs["role_ids"]
    answer = int((roles == ROLE_CAPTION).any(0).sum())
    return run, (*roles.shape, answer)


def timed(run: Callable[[], int], device: str) -> tuple[float, int, int]:
    """Seconds, peak bytes during the run (device memory, or resident memory on CPU), forwards."""
    with PeakMemory(device) as memory:
        _synchronise(device)
        start = time.perf_counter()
        forwards = run()
        _synchronise(device)
        seconds = time.perf_counter() - start
    return seconds, memory.peak, forwards


class PeakMemory:
    """Highest memory use inside a `with` block."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        self.peak = 0

    def __enter__(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.stop = threading.Event()
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *error):
        if self.cuda:
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.stop.set()
            self.thread.join()

    def _watch(self):
        while True:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
            self.peak = max(self.peak, resident)
            if self.stop.wait(0.01):
                return


def _synchronise(device: str):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure_floor(model, device: str) -> dict:
    """Matmul rate and copy bandwidth of the device, in the model's dtype, and what they bound.

    A cached step reads every weight of the language model once; the prompt's pass does two
    operations a weight and token. The rate is that of linear layers as `diffusion_generate` runs
    them; the default rate, PyTorch's own, is the published way's.
    """
    dtype = next(model.language_model.parameters()).dtype
    size = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    with torch.no_grad():
        default = _median_seconds(lambda: torch.nn.functional.linear(a, b), device)
        layer = torch.nn.Linear(size, size, bias=False, device=device, dtype=dtype)
        fastest_linear(parent := torch.nn.Sequential(layer))
        seconds = _median_seconds(lambda: parent(a), device)
    rate = 2 * size**3 / seconds
    source = torch.randn(2**28 if device.startswith("cuda") else 2**25, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), device)
    weights = sum(p.numel() * p.element_size() for p in model.language_model.parameters())
    bandwidth = 2 * source.numel() * source.element_size() / copy
    return {
        "matmul_flops_per_second": rate,
        "default_matmul_flops_per_second": 2 * size**3 / default,
        "copy_bytes_per_second": bandwidth,
        "language_model_bytes": weights,
        "language_model_parameters": sum(p.numel() for p in model.language_model.parameters()),
        "seconds_to_read_weights": weights / bandwidth,
    }


def floor_seconds(row: dict, floor: dict, arguments) -> float | None:
    """Least time of a method that computes the prompt once: its arithmetic, then for each step the
    larger of the answer's arithmetic and reading the weights once. None for the others."""
    if row["method"] == "published" or row["method"] == "released-exact":
        return None
    rows, length, answer = row["tokens"]
    operation = 2 * floor["language_model_parameters"] / floor["matmul_flops_per_second"]
    steps = arguments.budget if "adaptive" in row["method"] else arguments.steps
    step = max(rows * answer * operation, floor["seconds_to_read_weights"])
    return rows * (length - answer) * operation + steps * step


def _median_seconds(run: Callable, device: str, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        _synchronise(device)
        start = time.perf_counter()
        run()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def describe_machine(device: str) -> dict:
    """Names of the processor and, on CUDA, of the accelerator."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    machine = {"cpu": cpu, "threads": torch.get_num_threads(), "device": device}
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--regions", type=_integers, default=[4], help="say 1,2,4,6,12,24")
    parser.add_argument("--images", type=_integers, default=[1], help="say 1,8")
    parser.add_argument(
        "--methods",
        help=f"among published,{','.join(METHODS)}",
    )
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--budget", type=int, default=12, help="forwards of adaptive methods")
    parser.add_argument("--caption-length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-warm-up", action="store_true", help="time the first run too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plots", type=Path, help="folder to draw the plots in")
    parser.add_argument("--readme", type=Path, help="README whose table to replace")
    parsed = parser.parse_args(arguments)
    answers = PRESETS[parsed.preset][0].get("num_region_prompts") == 0
    best = "released-exact" if answers else "independent-exact"
    parsed.methods = (parsed.methods or f"published,{best}").split(",")
    released = [n for n, m in METHODS.items() if m.layout == "released"]
    unknown = sorted(set(parsed.methods) - {"published", *METHODS})
    if unknown:
        parser.error(f"expected methods among published, {', '.join(METHODS)}, got {unknown}")
    if answers and set(parsed.methods) - {"published", *released}:
        parser.error(f"expected methods among published, {', '.join(released)} for LLaDA-V")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a table and writes the JSON."""
    parsed = parse(arguments)
    result = measure(parsed)
    print(table(result))
    if parsed.output:
        write_json(parsed.output, result)
    if parsed.plots:
        draw(result, parsed.plots)
    if parsed.readme:
        update_readme(parsed.readme, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
