"""Times ways of denoising against the published one; all alternate in one run.

    python -m perceptiondlm.benchmarks.denoising --preset cpu --regions 4 --images 1 \\
        --methods published,independent-exact --repeats 3 --output result.json

A method named with a precision, such as `independent-exact@bfloat16` or `@int8`, runs on a copy of
the model in that dtype or with weights quantized so; the published way stays in the preset's dtype.
`--all` runs every method for all numbers of regions and images, on a GPU in three precisions more.

Presets `llada-v-cpu` and `llada-v-8b` answer a question about each image instead of captioning
regions. A row's `seconds` is the median over the repeats of generation alone (inputs ready on the
device, the encoding of the images included). Its `ratio` is the published way's seconds over it,
for the same regions and images in the same run.
"""

import argparse
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from ..common.quantization import KINDS
from ..configuration_perceptiondlm import ROLE_CAPTION
from ..evaluation.environment import cpu_name
from ..evaluation.files import write_json
from ..modeling_language import fastest_linear
from .published import answer_questions_plainly, caption_regions_plainly
from .report import draw, table, update_readme
from .workload import (
    PRESETS,
    build_model,
    build_tokenizer,
    in_precision,
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


PRECISIONS = ("float32", "bfloat16", *KINDS)
ALL_REGIONS, ALL_IMAGES = [1, 2, 4, 6, 12, 24], [1, 8]
GPU_PRECISIONS = ("fp8", "int4", "int8")  # of the tree's exact and adaptive decoding
FLOOR_REPEATS = 7  # of each measurement of the machine

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
    precisions = {split_method(name)[1] for name in arguments.methods} - {None}
    models = {None: model, **{name: in_precision(model, name) for name in sorted(precisions)}}

    rows = []
    for images in arguments.images:
        for regions in arguments.regions if model.config.num_region_prompts else [1]:
            rows += _measure_size(models, tokenizer, regions, images, arguments)
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


def split_method(name: str) -> tuple[str, str | None]:
    """Returns a method and the precision that it is to run in (None: the preset's)."""
    method, _, precision = name.partition("@")
    return method, precision or None


def _measure_size(models: dict, tokenizer, regions: int, images: int, arguments) -> list[dict]:
    """Alternates the methods `repeats` times after one warm-up of each; returns their rows.

    `models` are by precision.
    """
    runs, sizes = {}, {}
    for name in arguments.methods:
        method, precision = split_method(name)
        how = (models[precision], tokenizer, regions, images, arguments)
        runs[name], sizes[name] = _runner(method, *how)

    # Alternating, so that whatever else the machine does slows all methods alike
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
            "precision": split_method(name)[1],
            "exact": name == "published" or METHODS[split_method(name)[0]].exact,
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
    """Prepares a method's inputs; returns a function that denoises them once, and their size.

    The function returns the forward passes that it took. The size is (sequences, positions of one,
    response positions of one).
    """
    layout = "released" if name == "published" else METHODS[name].layout
    processor = set_layout(model, tokenizer, layout)
    if model.config.num_region_prompts:
        plainly = caption_regions_plainly
        inputs = region_inputs(processor, regions, images, arguments.caption_length)
    else:
        plainly = answer_questions_plainly
        inputs = question_inputs(processor, images, arguments.caption_length)
    inputs = inputs.to(arguments.device)  # before any clock runs

    def run() -> int:
        set_layout(model, tokenizer, layout)
        if name == "published":
            plainly(model, inputs, arguments.steps)
            return arguments.steps * len(inputs["input_ids"])
        options = dict(METHODS[name].options)
        steps = arguments.budget if options.pop("budget", False) else arguments.steps
        return model.diffusion_generate(inputs=inputs, steps=steps, **options).num_forwards

    roles = inputs["role_ids"]
    response_length = int((roles == ROLE_CAPTION).any(0).sum())
    return run, (*roles.shape, response_length)


def timed(run: Callable[[], int], device: str) -> tuple[float, int, int]:
    """Runs a function; returns seconds, peak bytes meanwhile, and the forward passes it took.

    The bytes are the device's on CUDA, else the process's resident memory.
    """
    with PeakMemory(device) as memory:
        _synchronize(device)
        start = time.perf_counter()
        forwards = run()
        _synchronize(device)
        seconds = time.perf_counter() - start
    return seconds, memory.peak, forwards


class PeakMemory:
    """Measures the highest memory use inside a `with` block; `peak` holds it, in bytes."""

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
        """Looks at the resident memory, in pages of 4 KiB, until it is told to stop."""
        while True:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
            self.peak = max(self.peak, resident)
            if self.stop.wait(0.01):
                return


def _synchronize(device: str):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure_floor(model, device: str) -> dict:
    """Measures the device's matmul rate and copy bandwidth, in the model's dtype.

    They bound the time of denoising: a cached step reads every weight of the language model once,
    and the prompt's forward pass does two operations per weight and token. The rate is that of
    linear layers as `diffusion_generate` runs them; the default rate, PyTorch's own, is that of the
    published way.
    """
    dtype = next(model.language_model.parameters()).dtype
    size = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")

    # Matrix products
    with torch.no_grad():
        default = _median_seconds(lambda: torch.nn.functional.linear(a, b), device)
        layers = torch.nn.Sequential(torch.nn.Linear(size, size, False, device, dtype))
        fastest_linear(layers)
        seconds = _median_seconds(lambda: layers(a), device)

    # Copies, which read and write every byte once
    source = torch.randn(2**28 if device.startswith("cuda") else 2**25, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), device)
    bandwidth = 2 * source.numel() * source.element_size() / copy

    weights = sum(p.numel() * p.element_size() for p in model.language_model.parameters())
    return {
        "matmul_flops_per_second": 2 * size**3 / seconds,
        "default_matmul_flops_per_second": 2 * size**3 / default,
        "copy_bytes_per_second": bandwidth,
        "language_model_bytes": weights,
        "language_model_parameters": sum(p.numel() for p in model.language_model.parameters()),
        "seconds_to_read_weights": weights / bandwidth,
    }


def floor_seconds(row: dict, floor: dict, arguments) -> float | None:
    """Returns the least seconds in which a method that computes the prompt once can be done.

    That is the prompt's arithmetic and, for each step, the larger of the response's arithmetic and
    the time to read the weights once. Returns None for methods that compute the prompt again.
    """
    if row["method"] == "published" or split_method(row["method"])[0] == "released-exact":
        return None
    sequences, length, response_length = row["tokens"]

    per_token = 2 * floor["language_model_parameters"] / floor["matmul_flops_per_second"]
    steps = arguments.budget if "adaptive" in row["method"] else arguments.steps
    step = max(sequences * response_length * per_token, floor["seconds_to_read_weights"])
    return sequences * (length - response_length) * per_token + steps * step


def _median_seconds(run: Callable, device: str) -> float:
    times = []
    for _ in range(FLOOR_REPEATS):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # without the warm-up


def describe_machine(device: str) -> dict:
    """Returns the names of the processor and, on CUDA, of the accelerator."""
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": device}
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="cpu")
    add("--regions", type=_integers, default=[4], help="say 1,2,4,6,12,24")
    add("--images", type=_integers, default=[1], help="say 1,8")
    add("--methods", help=f"among published,{','.join(METHODS)}, each with @PRECISION or without")
    add("--all", action="store_true", help="every method, number of regions and of images")
    add("--steps", type=int, default=32)
    add("--budget", type=int, default=12, help="forward passes of adaptive methods")
    add("--caption-length", type=int, default=32)
    add("--repeats", type=int, default=3)
    add("--no-warm-up", action="store_true", help="time the first run too")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    add("--output", type=Path, help="JSON file to write")
    add("--plots", type=Path, help="folder to draw the plots in")
    add("--readme", type=Path, help="README whose table to replace")
    parsed = parser.parse_args(arguments)

    # A model without region prompts answers questions, in the one layout that it has.
    answers = PRESETS[parsed.preset][0].get("num_region_prompts") == 0
    best = "released-exact" if answers else "independent-exact"
    released = [n for n, m in METHODS.items() if m.layout == "released"]
    if parsed.all:
        if parsed.methods:
            parser.error("expected --all or --methods, got both")
        parsed.methods = ",".join(every_method(released if answers else METHODS, parsed.device))
        parsed.regions, parsed.images = ALL_REGIONS, ALL_IMAGES
    parsed.methods = (parsed.methods or f"published,{best}").split(",")

    # Methods that there are, for models that have them.
    asked = [split_method(name) for name in parsed.methods]
    known = {("published", None)} | {(n, p) for n in METHODS for p in (None, *PRECISIONS)}
    if unknown := [m for m, a in zip(parsed.methods, asked, strict=True) if a not in known]:
        parser.error(
            f"expected methods among published, {', '.join(METHODS)}, each but the first with"
            f" @{' or @'.join(PRECISIONS)} or without, got {unknown}"
        )
    if answers and {method for method, _ in asked} - {"published", *released}:
        parser.error(f"expected methods among published, {', '.join(released)} for LLaDA-V")
    return parsed


def every_method(names: Iterable[str], device: str) -> list[str]:
    """Lists all methods of a preset; on a GPU those of the tree with quantized weights too."""
    names = list(names)
    quantized = []
    if device.startswith("cuda"):
        of_tree = ("independent-exact", "independent-adaptive")
        quantized = [f"{n}@{p}" for n in of_tree if n in names for p in GPU_PRECISIONS]
    return ["published", *names, *quantized]


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
