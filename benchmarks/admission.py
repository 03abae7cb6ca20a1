"""Measures how long short requests take beside a long one, with two checkouts' engines.

    python -m perceptiondlm.benchmarks.admission --against OTHER_CHECKOUT --output admission.json

Three ways of asking, on a trained model: `spread`, one short request after another while a long
one runs; `burst`, all short ones at once beside it; `equal`, a number of clients with equal short
requests and no long one, for the throughput. Every round is a fresh process of each engine, in
turn, so that what else the machine does slows both; medians are reported, over rounds after the
first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ..common.files import write_json
from ..evaluation.environment import git_revision, versions
from .denoising import describe_machine

ROOT = Path(os.path.abspath(__file__)).parents[1]
CLIENT = ROOT / "benchmarks" / "admission_client.py"
NAME = "perceptiondlm.benchmarks.admission_client"
# Runs the client's file as a module of whichever package is found.
PROGRAM = """
import importlib.util, json, sys
import perceptiondlm.benchmarks
spec = importlib.util.spec_from_file_location(sys.argv[1], sys.argv[2])
client = importlib.util.module_from_spec(spec)
spec.loader.exec_module(client)
client.main(json.loads(sys.argv[3]))
"""
WAYS = ("spread", "burst", "equal")
SECONDS_TO_END = 1800


def measure(arguments) -> dict:
    """Runs all rounds; returns the result to write."""
    checkouts = {"this": ROOT}
    if arguments.against:
        checkouts["against"] = Path(arguments.against).resolve()
    revisions = {name: git_revision(folder) for name, folder in checkouts.items()}

    # The pace of `spread` is the same for both engines.
    alone = run_client(ROOT, arguments, "equal", 0.0, requests=1)["alone_seconds"]
    ways = {}
    for way in arguments.ways:
        rounds: dict[str, list[dict]] = {name: [] for name in checkouts}
        for number in range(arguments.repeats + 1):
            for name, folder in checkouts.items():
                found = run_client(folder, arguments, way, alone)
                median = statistics.median(found["short_seconds"])
                print(f"{way}, round {number}, {name}: median {median:.3f} s", flush=True)
                rounds[name].append(found)
        ways[way] = summary(rounds)

    return {
        "machine": describe_machine("cpu"),
        "versions": versions(),
        "revisions": revisions,
        "load": os.getloadavg(),
        "requests": arguments.requests,
        "regions": arguments.regions,
        "long_length": arguments.long_length,
        "max_batch": arguments.max_batch,
        "clients": arguments.clients,
        "alone_seconds": alone,
        "interval_seconds": arguments.spacing * alone,
        "ways": ways,
    }


def summary(rounds: dict[str, list[dict]]) -> dict:
    """Returns medians over the rounds after the first, and this engine's over the other's."""
    engines = {}
    for name, found in rounds.items():
        counted = found[1:] or found
        own = {
            "rounds": [statistics.median(one["short_seconds"]) for one in counted],
            "slowest": [max(one["short_seconds"]) for one in counted],
        }
        for key in ("long_seconds", "seconds"):
            if key in counted[0]:
                own[key] = [one[key] for one in counted]
        engines[name] = {**own, "median_seconds": statistics.median(own["rounds"])}

    result: dict = {"engines": engines}
    if "against" in engines:
        this, other = engines["this"], engines["against"]
        result["ratio"] = this["median_seconds"] / other["median_seconds"]
        for key in ("long_seconds", "seconds"):
            if key in this:
                ratio = statistics.median(this[key]) / statistics.median(other[key])
                result[f"{key}_ratio"] = ratio
        every = [one["captions"] for found in rounds.values() for one in found]
        result["same_captions"] = all(one == every[0] for one in every)
    return result


def run_client(folder: Path, arguments, way: str, alone: float, **changes) -> dict:
    """Runs the client once with the package of a checkout; returns what it printed."""
    names = ("requests", "regions", "long_length", "max_batch", "clients", "spacing")
    asked = {name: getattr(arguments, name) for name in names}
    asked |= {"way": way, "alone": alone, **changes}
    with tempfile.TemporaryDirectory() as place:
        # The package has its name, whatever the checkout's folder is called.
        (Path(place) / "perceptiondlm").symlink_to(folder, target_is_directory=True)
        command = [sys.executable, "-c", PROGRAM, NAME, str(CLIENT), json.dumps(asked)]
        run = subprocess.run(
            command,
            cwd=place,
            env={**os.environ, "PYTHONPATH": place},
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_END,
        )
    if run.returncode:
        raise RuntimeError(f"the client of {folder} ended with {run.returncode}:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None):
    """Measures, prints the ratios and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--against", help="folder of another checkout, whose engine is measured in turn")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--requests", type=int, default=32, help="short ones")
    add("--regions", type=int, default=2, help="of each request")
    add("--long-length", type=int, default=128, help="tokens of a caption of the long request")
    add("--spacing", type=float, default=1.5, help="of `spread`, in times of a short one alone")
    add("--clients", type=int, default=8, help="of `equal`")
    add("--max-batch", type=int, default=8)
    add("--repeats", type=int, default=3)
    add("--output", help="JSON")
    parsed = parser.parse_args(arguments)

    result = measure(parsed)
    if parsed.output:
        write_json(parsed.output, result)
    for way, found in result["ways"].items():
        each = ", ".join(f"{n} {e['median_seconds']:.3f} s" for n, e in found["engines"].items())
        ratio = f"; ratio {found['ratio']:.2f}" if "ratio" in found else ""
        print(f"{way}: median latency of the short ones: {each}{ratio}")


if __name__ == "__main__":
    main()
