"""Measures the memory that loading a checkpoint takes, in bfloat16 and quantized.

    python -m perceptiondlm.benchmarks.loading --preset 8b --precisions none int8 int4 \\
        --output loading.json

A checkpoint of random weights is written once. Each precision loads it in a fresh process, which
then runs one forward pass over a few tokens, so that the decoder's weights have been touched. Two
peaks are reported: the process's own memory (`own_bytes`), and all that is resident
(`resident_bytes`): with pages of the files that are mapped, which the system takes back when it
needs them.

8b needs 17 GB on the disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..common.files import write_json
from ..common.quantization import KINDS, quantization_config
from ..configuration_perceptiondlm import PerceptionDLMConfig
from ..modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from .denoising import describe_machine
from .workload import PRESETS

SHARD_BYTES = 4 * 2**30
SPREAD = 0.02  # of the random weights
TOKENS = 16  # of the forward pass
FIELDS = {"own_bytes": "RssAnon", "resident_bytes": "VmRSS"}  # of /proc/PID/status


def measure(arguments) -> dict:
    """Writes the checkpoint and loads it in every precision; returns the result to write."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        size = write_checkpoint(arguments.preset, Path(folder))
        rows = [{"precision": name, **_load_apart(folder, name)} for name in arguments.precisions]
    return {
        "machine": describe_machine("cpu"),
        "preset": arguments.preset,
        "checkpoint_bytes": size,
        "rows": rows,
    }


def write_checkpoint(preset: str, folder: Path) -> int:
    """Writes random weights of a preset, a shard at a time; returns their bytes."""
    fields, dtype = PRESETS[preset]
    config = PerceptionDLMConfig(**fields, dtype=dtype)
    with torch.device("meta"):
        shapes = PerceptionDLMForConditionalGeneration(config).state_dict()
    bits = torch.finfo(dtype).bits

    # Names of each shard, in order.
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in shapes.items():
        own = tensor.numel() * bits // 8
        if shards[-1] and filled + own > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += own

    random = torch.Generator().manual_seed(0)
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weights = {
            name: torch.empty(shapes[name].shape, dtype=dtype).normal_(0, SPREAD, generator=random)
            for name in names
        }
        save_file(weights, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)

    config.save_pretrained(folder)
    total = sum(tensor.numel() for tensor in shapes.values()) * bits // 8
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)
    return total


def _load_apart(folder: str, precision: str) -> dict:
    """Loads a checkpoint in a fresh process; returns its seconds and peaks."""
    code = "import perceptiondlm.benchmarks.loading as l, sys; l.load(*sys.argv[1:])"
    command = [sys.executable, "-c", code, folder, precision]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = dict.fromkeys(FIELDS, 0)
    watch = threading.Thread(target=_watch, args=(run, peaks), daemon=True)
    watch.start()
    told, _ = run.communicate()
    watch.join()
    if run.returncode:
        raise RuntimeError(f"loading in {precision} ended with {run.returncode}")
    return {**json.loads(told.splitlines()[-1]), **peaks}


def load(folder: str, precision: str):
    """Loads a checkpoint and predicts once; prints what the process alone sees, as JSON."""
    config = PerceptionDLMConfig.from_pretrained(folder)
    how = None
    if precision in KINDS:
        how = quantization_config(precision, config, config.dtype, torch.device("cpu"))
    before = memory_of("self")["own_bytes"]

    start = time.perf_counter()
    model = PerceptionDLMForConditionalGeneration.from_pretrained(
        folder, dtype=config.dtype, quantization_config=how
    ).eval()
    seconds = time.perf_counter() - start
    loaded = memory_of("self")["own_bytes"]

    start = time.perf_counter()
    with torch.inference_mode():
        model(input_ids=torch.arange(TOKENS)[None])
    told = {
        "before_bytes": before,
        "loaded_bytes": loaded,
        "seconds": seconds,
        "forward_seconds": time.perf_counter() - start,
    }
    print(json.dumps(told))


def memory_of(pid: int | str) -> dict[str, int]:
    """Returns the memory of a process in bytes, by the names of `FIELDS`; of one that ended, 0."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        lines = []
    kibibytes = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(kibibytes.get(own, "0").split()[0]) for name, own in FIELDS.items()}


def _watch(run: subprocess.Popen, peaks: dict[str, int]):
    while run.poll() is None:
        now = memory_of(run.pid)
        peaks |= {name: max(peak, now[name]) for name, peak in peaks.items()}
        time.sleep(0.05)


def main():
    """Runs the benchmark and prints one line for each precision."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="8b")
    parser.add_argument(
        "--precisions", nargs="+", choices=("none", *KINDS), default=["none", "int8", "int4"]
    )
    parser.add_argument("--folder", help="where the weights are written (default: temporary files)")
    parser.add_argument("--output", help="where the result goes (JSON)")
    arguments = parser.parse_args()

    result = measure(arguments)
    if arguments.output:
        write_json(arguments.output, result)
    for row in result["rows"]:
        gigabytes = {name: row[name] / 1e9 for name in (*FIELDS, "before_bytes")}
        print(
            f"{row['precision']}: {gigabytes['own_bytes']:.1f} GB of its own at most,"
            f" {gigabytes['before_bytes']:.1f} before it loaded;"
            f" {gigabytes['resident_bytes']:.1f} GB resident; {row['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
