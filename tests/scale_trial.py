"""Kills a run of `caption-dataset` at random moments, and goes on with it, over and over."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import scale_data
import scale_runs
from perceptiondlm.pipelines.writers import read_rows
from shapes import ARGUMENTS

VICTIMS = ("driver", "worker", "node")
ENOUGH = 300  # seconds that a run may take to come to something


def command(source: Path, output: Path) -> list[str]:
    program = [sys.executable, "-m", "perceptiondlm.apps.cli", "caption-dataset", str(source)]
    options = ["--output", str(output), "--shard-images", "4", "--caption-length", "4"]
    return [*program, *ARGUMENTS, *options]


def processes() -> dict[int, tuple[int, str]]:
    """Returns parent and command line of each process."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            except OSError:
                continue
            found[int(folder.name)] = int(parent), line
    return found


def descendants(pid: int) -> dict[int, str]:
    """Returns the command lines of a process's children, and theirs."""
    every, own = processes(), {pid: ""}
    while new := {p: line for p, (parent, line) in every.items() if parent in own and p not in own}:
        own |= new
    return {p: line for p, line in own.items() if p != pid}


def victim_of(kind: str, driver: int, rng: random.Random) -> int | None:
    """Returns the process to kill: the driver, one of Ray's workers, or the node's own."""
    if kind == "driver":
        return driver
    sign = "ray::Map" if kind == "worker" else "/raylet"
    found = [p for p, line in descendants(driver).items() if sign in line]
    return rng.choice(found) if found else None


def expect_readable(output: Path):
    """Every file that has its name can be read, at any moment."""
    for path in [
        *output.glob("captions/part-*"),
        *output.glob("err*/part-*"),
        *output.glob("e*.p*"),
    ]:
        try:
            read_rows(str(path))
        except FileNotFoundError:
            continue  # joined with the others, or rewritten, meanwhile


def trial(folder: Path, kills: int, images: int, seed: int = 0) -> dict:
    """Kills so often, then lets the run finish; returns the number of kills of each kind."""
    rng = random.Random(seed)
    drawn = scale_data.draw(images)
    source, output = scale_data.write_lines(folder, drawn), folder / "out"
    done = dict.fromkeys(VICTIMS, 0)
    while sum(done.values()) < kills:
        alone = _one_run(command(source, output), output, done, kills, rng)
        expect_readable(output)
        if alone:
            _expect_none_twice_that_is_settled(output)

    subprocess.run(command(source, output), check=True, capture_output=True, timeout=1800)
    rows = scale_runs.written(output)
    assert scale_runs.regions_of(rows) == scale_runs.regions_drawn(drawn)
    assert len({row["id"] for row in rows}) == len(rows) == len(drawn)
    assert read_rows(str(output / "errors.parquet")) == []
    return done


def _one_run(arguments, output: Path, done: dict, kills: int, rng: random.Random) -> bool:
    """Runs until something is killed that ends it; workers are killed as it goes on.

    Returns whether nothing of the run is left. Ray ends the workers of a killed driver, but some
    seconds later: now and then they are left to write on beside the next run.
    """
    left: dict[int, str] = {}
    run = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for_shards(output, run, rng)
        while run.poll() is None and sum(done.values()) < kills:
            time.sleep(rng.uniform(0, 1.5))
            kind = rng.choice([k for k in VICTIMS if done[k] == min(done.values())])
            victim = victim_of(kind, run.pid, rng)
            if victim is None or run.poll() is not None:
                continue
            left |= descendants(run.pid)  # who has no parent any more when that is killed
            os.kill(victim, signal.SIGKILL)
            done[kind] += 1
            print(f"killed {kind}; {done}", flush=True)
            expect_readable(output)
            if kind != "worker":
                break
        run.wait(timeout=120 if run.poll() is None else 1)
    except subprocess.TimeoutExpired:
        pass  # a driver whose node is gone may hang
    finally:
        left |= descendants(run.pid)
        run.kill()
        run.wait()
    alone = rng.random() < 0.5
    if alone:
        _end(left)
    return alone


def _wait_for_shards(output: Path, run, rng: random.Random):
    """Waits until the run has written something, or, now and then, only a while."""
    before, started = len(list(output.glob("captions/*"))), time.monotonic()
    patience = rng.choice((rng.uniform(1, 20), ENOUGH, ENOUGH))
    while run.poll() is None and time.monotonic() - started < patience:
        if len(list(output.glob("captions/*"))) > before:
            return
        time.sleep(0.1)


def _end(left: dict[int, str]):
    """Ends what a killed driver left, which Ray itself ends too, some seconds later."""
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _expect_none_twice_that_is_settled(output: Path):
    from perceptiondlm.pipelines.writers import settle

    if (output / "manifest.json").exists() and (output / "captions").exists():
        contents = settle(str(output))
        rows = scale_runs.written(output)
        assert contents.images == len(rows) == len({row["id"] for row in rows})
