"""Asks an OpenAI-compatible endpoint about many regions: several calls at once, answers kept.

The calls themselves (time-outs, retries, Retry-After, budget) are those of `common.chat_endpoint`.
An answer is on disk before it counts, so that a run that was killed pays for none twice.
"""

import contextlib
import hashlib
import json
import re
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..common.chat_endpoint import (
    CallBudget,
    CallFailure,
    CutOff,
    Endpoint,
    Exhausted,
    RetryPolicy,
    make_client,
)
from ..common.option_checks import expect_positive
from .records import Record, without_loaded

FAILED = "call failed"  # the rule of what a later run asks again
FAILURES_IN_A_ROW = 8  # more than chance: the endpoint is gone
LOCK_SECONDS = 60  # that a writer waits for another process's


class EngineStopped(Exception):
    """Nothing further can be done now: the endpoint is gone, refuses the key, or is paid up.

    What was finished is kept; the same command goes on from there.
    """


@dataclass(frozen=True)
class EndpointOptions:
    """How a chat model behind an endpoint is asked."""

    model: str = ""  # its name there
    base_url: str | None = None  # none: OPENAI_BASE_URL, or OpenAI's own
    concurrency: int = 16  # calls under way at once, of one process
    attempts: int = 6  # calls for one question at most
    first_delay: float = 1.0  # seconds before the second attempt; it doubles from then on
    timeout: float = 120.0  # seconds that a call may take
    max_calls: int | None = None  # of one process, retries included; none: no limit
    cache: str | None = None  # file of the answers, for all runs; none: in the output folder
    # Further fields of each request; none removes one of these.
    request: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 512})

    def __post_init__(self):
        if not self.model:
            raise ValueError("expected the model's name at its endpoint, got none")
        expect_positive("concurrency", self.concurrency)
        expect_positive("attempts", self.attempts)
        if self.timeout <= 0 or self.first_delay < 0:
            raise ValueError(
                "expected a timeout above 0 and a first_delay of 0 or more, got"
                f" {self.timeout} and {self.first_delay}"
            )


@dataclass(frozen=True)
class Failure:
    """Stands for an answer that did not come.

    Attributes:
        reason: why.
        passing: of the endpoint's state, not of the question: worth asking again in a later run.
    """

    reason: str
    passing: bool = False


def drop_failures(
    record: Record, stage: str, rule: str, failures: dict[str, Failure], expected: str = ""
):
    """Drops regions, by their keys, whose answer did not come: by a rule, or by `FAILED`.

    Args:
        record: of the regions.
        stage, rule: as for `Record.drop`.
        failures: by region key.
        expected: what the reasons begin with.
    """
    for name, passing in ((rule, False), (FAILED, True)):
        own = {key: found for key, found in failures.items() if found.passing is passing}
        record.drop(stage, name, {key: expected + found.reason for key, found in own.items()})


class ChatModel:
    """A chat model that answers lists of conversations, in order.

    It is pickled with its options alone.
    """

    def __init__(self, options: EndpointOptions):
        self.options = options
        self._in_a_row = 0

    __getstate__ = without_loaded

    @cached_property
    def _endpoint(self) -> Endpoint:
        options = self.options
        request = {name: value for name, value in options.request.items() if value is not None}
        return Endpoint(
            make_client(options.base_url, options.timeout),
            options.model,
            request=request,
            policy=RetryPolicy(attempts=options.attempts, first_delay=options.first_delay),
            budget=CallBudget(options.max_calls),
            whole=True,
        )

    @cached_property
    def _answers(self) -> "AnswerCache | None":
        return AnswerCache(self.options.cache) if self.options.cache else None

    def __call__(self, conversations: list[list[dict]]) -> list[str | Failure]:
        """Returns the text of each answer, or its failure; equal conversations are asked once.

        Raises EngineStopped where no further call will do better.
        """
        keys = [self._key(messages) for messages in conversations]
        known = self._answers.get(keys) if self._answers else {}
        left = {k: m for k, m in zip(keys, conversations, strict=True) if k not in known}

        with ThreadPoolExecutor(self.options.concurrency) as pool:
            tasks = {key: pool.submit(self._ask, key, m) for key, m in left.items()}
            try:
                found = {key: task.result() for key, task in tasks.items()}
            except BaseException:
                self._endpoint.stop.set()
                pool.shutdown(cancel_futures=True)
                del self.__dict__["_endpoint"]
                raise
        return [{**known, **found}[key] for key in keys]

    def _key(self, messages: list[dict]) -> str:
        """Hashes everything that an answer depends on."""
        content = [self.options.model, messages, self.options.request]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _ask(self, key: str, messages: list[dict]) -> str | Failure:
        try:
            answer = self._endpoint.ask(messages)
        except CutOff as failure:  # the endpoint is well
            return Failure(str(failure))
        except CallFailure as failure:
            if self._endpoint.stop.is_set():
                return Failure(str(failure))  # the reason for stopping is known already
            self._in_a_row += 1
            if failure.fatal or self._in_a_row >= FAILURES_IN_A_ROW:
                self._endpoint.stop.set()  # nobody waits, nobody asks on
                raise EngineStopped(f"{self.options.model}: {failure}") from failure
            return Failure(str(failure), passing=isinstance(failure, Exhausted))

        self._in_a_row = 0
        if any("\ud800" <= character <= "\udfff" for character in answer):
            return Failure(f"expected text, got a lone surrogate in {answer!r:.80}")
        if self._answers:
            self._answers.put(key, answer)
        return answer


class AnswerCache:
    """Keeps answers by the hash of their question, in one SQLite file that only grows.

    Threads and processes of a machine may share it; each answer is committed by itself.
    """

    def __init__(self, path: str | Path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = sqlite3.connect(path, timeout=LOCK_SECONDS, check_same_thread=False)
        try:
            with self._file:
                self._file.execute("CREATE TABLE IF NOT EXISTS answers (key PRIMARY KEY, text)")
        except sqlite3.DatabaseError as error:
            raise ValueError(f"expected a cache of answers at {path}, got: {error}") from error

    def get(self, keys: list[str]) -> dict[str, str]:
        """Returns the answers that are there."""
        query = "SELECT text FROM answers WHERE key = ?"
        with self._lock:
            rows = {key: self._file.execute(query, [key]).fetchone() for key in set(keys)}
        return {key: row[0] for key, row in rows.items() if row is not None}

    def put(self, key: str, text: str):
        """Adds an answer; one that is there stays."""
        with self._lock, contextlib.ExitStack() as stack:
            stack.enter_context(self._file)  # a transaction
            self._file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", [key, text])


def visible_text(answer: str | Failure) -> str | Failure:
    """Returns an answer without the thoughts that reasoning models put before it.

    A Failure where nothing follows them, or nothing is there.
    """
    if isinstance(answer, Failure):
        return answer
    text = re.sub(r"^\s*<think>.*?(</think>|\Z)", "", answer, flags=re.DOTALL).strip()
    return text or Failure(f"expected an answer, got {answer!r:.80}")


# What a message is made of.


def text_part(text: str) -> dict:
    """Returns a part of a chat message that says something."""
    return {"type": "text", "text": text}


def image_part(data_url: str) -> dict:
    """Returns a part of a chat message that shows an image."""
    return {"type": "image_url", "image_url": {"url": data_url}}
