"""Reads strangers' bytes in a few worker processes, killed when they take too long.

Threads of the server wait for a worker; they hold no interpreter lock while it decodes.
"""

import atexit
import contextlib
import dataclasses
import functools
import json
import logging
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, wait

from PIL import Image

from .chat import Asked
from .errors import ApiError
from .fetch import UrlPolicy
from .limits import Limits
from .tasks import unpack_asked
from .worker import receive, send, unpack_images

WORKERS = 2  # a quarter of a GiB each
START_SECONDS = 60.0  # for a worker to import what it needs
PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {} import main; main()"

log = logging.getLogger(__name__)


class Worker:
    """One process, with one task at a time."""

    def __init__(self):
        program = PROGRAM.format(f"{__package__}.worker")
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which ends its workers itself
        )
        try:
            self._answer(START_SECONDS)
        except (EOFError, OSError) as error:
            self.close()
            raise RuntimeError("a worker process ended before it was ready") from error

    def ask(self, header: dict, blob: bytes, seconds: float) -> tuple[dict, list[bytes]]:
        """Returns the answer to a task: a header and blobs.

        Raises EOFError or OSError where the process ended or was killed after so many seconds.
        """
        return self._answer(seconds, header, [blob])

    def _answer(self, seconds: float, *message):
        timer = threading.Timer(seconds, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            if message:
                send(self.process.stdin, *message)
            return receive(self.process.stdout)
        finally:
            timer.cancel()

    def close(self):
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                stream.close()
            except OSError:  # what was not yet written is lost with the process
                pass


class WorkerPool:
    """Reads requests and pages in `count` worker processes.

    The processes end with this one in any case.
    """

    def __init__(self, count: int = WORKERS):
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)
        self.count = count

    def read_chat(
        self, body: bytes, model: str, limits: Limits, policy: UrlPolicy, deadline: float
    ) -> Asked:
        """Reads what a request for a chat completion asks for.

        Raises ApiError. `deadline` is in terms of `time.monotonic`.
        """
        rules = dataclasses.asdict(policy)
        header = {"task": "chat", "model": model, "hosts": sorted(rules.pop("hosts"))}
        seconds = limits.decode_seconds + (policy.seconds if policy.hosts else 0)
        return unpack_asked(*self._run(header | {"policy": rules}, body, limits, seconds, deadline))

    def read_page(self, text: str, limits: Limits) -> tuple[Image.Image | None, list[Image.Image]]:
        """Reads the image (None where there is none) and region masks that the web page sends."""
        deadline = time.monotonic() + limits.request_seconds
        header, blobs = self._run(
            {"task": "page"}, text.encode(), limits, limits.decode_seconds, deadline
        )
        image, *masks = unpack_images(header["images"], blobs) or [None]
        return image, masks

    def _run(self, header: dict, blob: bytes, limits: Limits, seconds: float, deadline: float):
        header["limits"] = dataclasses.asdict(limits)
        worker: Worker | None = self._take(deadline)

        # A worker that crashed or took too long is ended; the next task starts another.
        try:
            seconds = max(0, min(seconds, deadline - time.monotonic()))
            answer, blobs = worker.ask(header, blob, seconds)
        except (EOFError, OSError) as error:
            log.warning("a worker process was ended: it took over %.1f s or crashed", seconds)
            worker.close()
            worker = None
            message = f"expected images that can be decoded within {seconds:.1f} seconds"
            raise ApiError(400, message, code="invalid_input") from error
        finally:
            self._idle.put(worker)  # None: the next task starts another

        if "error" in answer:
            raise _failure(answer["error"])
        return answer, blobs

    def _take(self, deadline: float) -> Worker:
        """Takes a worker, which is started if need be; raises ApiError where that takes too long.

        One that starts too late for this request is there for the next.
        """
        too_late = ApiError(504, "expected an answer in time, got none", code="timeout")
        try:
            worker = self._idle.get(timeout=max(0, deadline - time.monotonic()))
        except queue.Empty:
            raise too_late from None
        if worker is not None:
            return worker

        starting = _start()
        done, _ = wait([starting], max(0, deadline - time.monotonic()))
        if not done:
            starting.add_done_callback(self._keep)
            raise too_late
        if starting.exception() is not None:
            self._idle.put(None)
        return starting.result()

    def _keep(self, starting: Future[Worker]):
        """Gives a worker that has started its place; the next task starts one that has not."""
        self._idle.put(None if starting.exception() else starting.result())

    def warm_up(self):
        """Begins to start all workers, so that no request has to wait for one to start."""
        for worker in self._take_idle():
            if worker is None:
                _start().add_done_callback(self._keep)
            else:
                self._idle.put(worker)

    def close(self):
        """Ends the processes that are idle; those at work end with their task or with this one."""
        for worker in self._take_idle():
            if worker is not None:
                worker.close()

    def _take_idle(self) -> list[Worker | None]:
        """Takes all places whose workers have nothing to do."""
        taken = []
        with contextlib.suppress(queue.Empty):
            while True:
                taken.append(self._idle.get_nowait())
        return taken


def _start() -> Future[Worker]:
    """Begins to start a worker, in a thread of its own."""
    starting: Future[Worker] = Future()

    def start():
        try:
            starting.set_result(Worker())
        except BaseException as error:  # whoever waits for it is told
            starting.set_exception(error)

    threading.Thread(target=start, daemon=True).start()
    return starting


@functools.cache
def shared_pool() -> WorkerPool:
    """Returns the pool of this process, whose workers are started when they are needed."""
    pool = WorkerPool()
    atexit.register(pool.close)
    return pool


def _failure(error: dict) -> ApiError:
    if error["status"] >= 500:
        log.error("a request could not be read: %s", error["message"])
        error = error | {"message": "internal error, see the server's log"}
    return ApiError(**error)
