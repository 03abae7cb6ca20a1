"""Commands in processes of their own, to be killed: fresh ones, and forks of a warm one.

Importing torch and transformers takes seconds, so most trials fork: a parent imports everything
and computes nothing, and each of its children runs one command in a process group of its own. A
child ends by a SIGKILL to its group, sent from outside at a moment of the clock or by itself right
before its n-th access to files of a folder, where a kill does most harm.

    python tests/trial_processes.py    # the parent; what it reads and prints is JSON lines
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KILLED = -signal.SIGKILL
COMMAND = ("-m", "perceptiondlm.apps.cli")
# What a command may access: as `sys.addaudithook` names it.
ACCESSES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (minus the signal, if one ended it), what it said on stderr,
    the seconds it took and, of a watched fork that ended by itself, its accesses."""

    code: int
    errors: str
    seconds: float
    accesses: int | None = None


class Forks:
    """The warm parent; a context that gives it."""

    def __init__(self, logs: Path, **variables: str):
        self.logs = logs
        self.count = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.parent = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, **variables},
        )

    def __enter__(self) -> "Forks":
        assert self._ask({"ping": True}) == {"pong": True}
        return self

    def __exit__(self, *_):
        self.parent.stdin.close()
        self.parent.wait(30)

    def _ask(self, request: dict) -> dict:
        self.parent.stdin.write(json.dumps(request) + "\n")
        self.parent.stdin.flush()
        return json.loads(self.parent.stdout.readline())

    def run(
        self,
        arguments: Sequence,
        *,
        after: float | None = None,
        at: int | None = None,
        watched: Path | None = None,
        processes: int = 1,
        program: str = "cli",
        **variables: str,
    ) -> Ended:
        """Runs a command; a kill comes `after` so many seconds or `at` an access to `watched`.

        Args:
            processes: started together, in one group, as the ranks of one run.
            program: "cli", or "convert", which is a command of its own.
            variables: of the environment.
        """
        self.count += 1
        log = self.logs / f"{self.count}.log"
        log.touch()
        request = {
            "arguments": list(map(str, arguments)),
            "program": program,
            "log": str(log),
            "at": at,
            "watched": None if watched is None else str(watched),
            "variables": variables,
            "processes": processes,
        }
        started = time.monotonic()
        pids = self._ask(request)["pids"]
        if after is not None:
            time.sleep(after)
            try:
                os.killpg(pids[0], signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has ended by itself, as its code will say
        codes = self._ask({"wait": pids})["codes"]
        seconds = time.monotonic() - started
        counted = log.with_suffix(".accesses")
        accesses = int(counted.read_text()) if counted.exists() else None
        code = next((c for c in codes if c), 0)
        return Ended(code, log.read_text(), seconds, accesses)


def run_fresh(
    arguments: Sequence, *, after: float | None = None, command=COMMAND, **variables: str
) -> Ended:
    """Runs a command in a fresh interpreter; a kill of it and of all that it has started, in groups
    of their own or not, comes `after` so many seconds."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=after or 120)
    except subprocess.TimeoutExpired:
        for member in family(process.pid):
            os.kill(member, signal.SIGKILL)
        _, errors = process.communicate()
    return Ended(process.returncode, errors, time.monotonic() - started)


def family(pid: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(status.parent.name)] = int(status.read_text().split("PPid:")[1].split()[0])
    found, members = {pid}, set()
    while found:
        members |= found
        found = {child for child, parent in parents.items() if parent in found} - members
    return members


# The parent.


def serve():
    """Forks as it is told, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    programs = _import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        if "ping" in request:
            answer = {"pong": True}
        elif "wait" in request:
            codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in request["wait"]]
            answer = {"codes": codes}
        else:
            answer = {"pids": _fork_all(request, programs)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _import_everything() -> dict:
    import accelerate.commands.launch  # noqa: F401
    import openai  # noqa: F401
    import perceptiondlm.apps.captioning.outputs
    import perceptiondlm.apps.captioning.run
    import perceptiondlm.evaluation.judge
    import perceptiondlm.evaluation.predict
    import perceptiondlm.modeling_perceptiondlm
    import perceptiondlm.publishing.command
    import perceptiondlm.training.run  # noqa: F401
    from perceptiondlm import convert_checkpoint
    from perceptiondlm.apps import cli

    perceptiondlm.apps.captioning.outputs.SAVE_SECONDS = 0  # captions are saved after every image
    return {"cli": cli.main, "convert": convert_checkpoint.main}


def _fork_all(request: dict, programs: dict) -> list[int]:
    pids: list[int] = []
    for rank in range(request["processes"]):
        pid = os.fork()
        if not pid:
            os.setpgid(0, pids[0] if pids else 0)
            _run_child(request, programs[request["program"]], rank)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def _run_child(request: dict, main, rank: int):
    code = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(log, 2)
        os.environ.update(request["variables"])
        if request["processes"] > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        accesses = _watch(request) if request["watched"] and rank == 0 else None
        code = main(request["arguments"])
        if accesses is not None:
            Path(request["log"]).with_suffix(".accesses").write_text(str(accesses[0]))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code or 0)


def _watch(request: dict) -> list[int]:
    """Counts accesses to files of a folder, and ends the group right before the n-th."""
    watched, at, count = request["watched"], request["at"], [0]

    def look(event: str, arguments: tuple):
        if event not in ACCESSES:
            return
        name = arguments[0]
        by_folder = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # as rmtree's are
        is_named = isinstance(name, (str, bytes, os.PathLike))
        if by_folder or (is_named and watched in os.fsdecode(name)):
            count[0] += 1
            if count[0] == at:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(look)
    return count


if __name__ == "__main__":
    serve()
