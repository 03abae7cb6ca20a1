"""Measures `caption-dataset`: against a plain loop, its memory, and how it grows with actors.

    python -m perceptiondlm.benchmarks.dataset --images 2000 --actors 1 2 4 --output dataset.json

Small drawn images, four box-shaped regions each, captioned by a trained model. The plain loop
opens, captions and writes the same rows in one process, in the same batches. Every run is a fresh
process, its start-up counted in; memory is the proportional share (PSS) of the run's processes,
which counts what they share once.

`--more-images` runs the pipeline once more on so many images, to see whether memory grows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ..common.files import write_json
from ..image_masks import encode_rle, fill_box
from .denoising import describe_machine
from .replicas import descendants
from .workload import TRAINED, TRAINED_ARGUMENTS, TRAINED_SUBFOLDER

SIDE, REGIONS = 64, 4
DECODING = {"caption_length": 11, "steps": 4}
GPUS = 64  # of the estimate


def measure(arguments) -> dict:
    """Runs all there is to measure; returns the result to write."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        source = write_images(folder / "source", arguments.images)
        loop = run_loop(source, folder / "loop")
        runs = {}
        for actors in arguments.actors:
            output = folder / f"actors-{actors}"
            runs[str(actors)] = run_pipeline(source, output, actors)
            runs[str(actors)]["same_captions"] = captions(folder / "loop") == captions(output)
        more = None
        if arguments.more_images:
            source = write_images(folder / "more", arguments.more_images)
            more = run_pipeline(source, folder / "more-out", arguments.actors[0])

    best = min(run["seconds"] for run in runs.values())
    return {
        "machine": describe_machine("cpu"),
        "images": arguments.images,
        "regions": REGIONS * arguments.images,
        "decoding": DECODING,
        "loop": loop,
        "actors": runs,
        "ratio_to_loop": best / loop["seconds"],
        "more": more and {"images": arguments.more_images, **more},
        "on_paper": on_paper(runs[str(arguments.actors[0])]["stage_seconds"], arguments.images),
    }


def write_images(folder: Path, count: int) -> Path:
    """Writes images and a file of JSON lines with their regions; returns the file."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for k in range(count):
        pixels = random.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(folder / f"{k}.png")
        corners = random.integers(0, SIDE - 16, (REGIONS, 2)).tolist()
        boxes = [fill_box((x, y, x + 16, y + 16), (SIDE, SIDE)) for x, y in corners]
        rles = [encode_rle(np.asarray(box)) for box in boxes]
        lines.append(json.dumps({"image": f"{k}.png", "mask_rles": rles}) + "\n")
    path = folder / "rows.jsonl"
    path.write_text("".join(lines))
    return path


def run_pipeline(source: Path, output: Path, actors: int) -> dict:
    """Captions the source by the command; returns its seconds, stages and memory."""
    options = [f"--{k.replace('_', '-')}={value}" for k, value in DECODING.items()]
    command = ["-m", "perceptiondlm.apps.cli", "caption-dataset", str(source), *TRAINED_ARGUMENTS]
    run = _timed(
        [sys.executable, *command, "--output", str(output), f"--actors={actors}", *options]
    )
    own = json.loads((output / "summary.json").read_text())["this_run"]
    return {**run, "run_seconds": own["seconds"], "stage_seconds": own["stage_seconds"]}


def run_loop(source: Path, output: Path) -> dict:
    """Captions the source by the plain loop, in a process of its own."""
    code = "import perceptiondlm.benchmarks.dataset as d, sys; d.plain_loop(*sys.argv[1:])"
    return _timed([sys.executable, "-c", code, str(source), str(output)])


def plain_loop(source: str, output: str):
    """Opens, captions and writes every row, one batch after another, in this process."""
    from ..pipelines import places
    from ..pipelines.captioning_stage import CaptionImages, CaptionOptions, open_row
    from ..pipelines.open_sources import open_source
    from ..pipelines.ray_stages import LISTED_AT_ONCE, OPENED_AT_ONCE
    from ..pipelines.writers import CAPTIONS, ERRORS, ShardWriter

    for name in (CAPTIONS, ERRORS):
        places.make_folder(f"{output}/{name}")
    writer = ShardWriter(output, "parquet", False, {"model": "", "options": "", "version": ""})
    caption = CaptionImages(CaptionOptions(TRAINED, TRAINED_SUBFOLDER, decoding=dict(DECODING)))

    opened = open_source(source)
    listed = (row for part in opened.parts(LISTED_AT_ONCE) for row in opened.rows(part))
    done: list[dict] = []
    while rows := list(islice(listed, OPENED_AT_ONCE)):
        entries = [
            {**row, "entry": json.dumps(row["entry"]), "data": row.get("data")} for row in rows
        ]
        done += caption([open_row(opened, row, False) for row in entries])
        if len(done) >= 256:
            writer(done)
            done = []
    if done:
        writer(done)


def captions(output: Path) -> dict[str, list[str]]:
    """Returns the captions of every image in the shards of a folder."""
    from ..pipelines.writers import read_rows

    shards = output.glob("captions/*.parquet")
    return {Path(r["image"]).name: r["captions"] for p in shards for r in read_rows(str(p))}


def on_paper(stage_seconds: dict[str, float], images: int) -> dict:
    """Returns, from one process's seconds of each stage, what keeps so many GPUs busy.

    A GPU is taken to caption as fast as an actor here, so the numbers say how the stages divide
    rather than how fast a cluster is.
    """
    each = {name: seconds / images for name, seconds in stage_seconds.items()}
    in_actor = each["caption"] + each["decode"]
    rate = GPUS / in_actor  # images a second
    return {
        "gpus": GPUS,
        "images_per_second": rate,
        "cores_for_reading": rate * each["read"],
        "cores_for_writing": rate * each["write"],
        "share_of_decoding_in_actor": each["decode"] / in_actor,
    }


def _timed(command: list[str]) -> dict:
    """Runs a command; returns its seconds and the highest memory of all its processes, in bytes."""
    started = time.perf_counter()
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = [0]
    watch = threading.Thread(target=_watch, args=(run, peak), daemon=True)
    watch.start()
    _, errors = run.communicate()
    seconds = time.perf_counter() - started
    watch.join()
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}:\n{errors[-2000:]}")
    return {"seconds": seconds, "peak_bytes": peak[0]}


def _watch(run: subprocess.Popen, peak: list[int]):
    while run.poll() is None:
        peak[0] = max(peak[0], sum(map(_proportional_bytes, [run.pid, *descendants(run.pid)])))
        time.sleep(1)


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def main():
    """Runs the benchmark and prints what matters."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--more-images", type=int, help="say 20000")
    parser.add_argument("--folder", help="where images and outputs go (default: temporary files)")
    parser.add_argument("--output", help="where the result goes (JSON)")
    arguments = parser.parse_args()

    result = measure(arguments)
    if arguments.output:
        write_json(arguments.output, result)
    print(f"the plain loop: {result['loop']['seconds']:.1f} s")
    for actors, run in result["actors"].items():
        stages = ", ".join(f"{name} {value:.1f}" for name, value in run["stage_seconds"].items())
        print(
            f"{actors} actors: {run['seconds']:.1f} s, {run['peak_bytes'] / 2**30:.2f} GiB,"
            f" same captions: {run['same_captions']}; stages: {stages}"
        )
    if result["more"]:
        more = result["more"]
        gib = more["peak_bytes"] / 2**30
        print(f"{more['images']} images: {more['seconds']:.1f} s, {gib:.2f} GiB")
    print(f"best over the loop: {result['ratio_to_loop']:.2f}; on paper: {result['on_paper']}")


if __name__ == "__main__":
    main()
