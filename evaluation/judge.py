"""`perceptiondlm evaluate judge`: asks a judge every question, and pays for each answer once."""

import argparse
import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ..common.chat_endpoint import (
    CallBudget,
    CallFailure,
    Endpoint,
    RetryPolicy,
    make_client,
    public_url,
)
from .benchmarks import Benchmark, load_benchmark
from .environment import run_environment
from .files import Journal, file_sha256, read_json, run_record_path, write_json
from .judge_prompts import MODES, JudgePrompt, default_mode

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # between looks for an answer that another run is asking for
FAILURES_IN_A_ROW = 8  # more than chance: the endpoint is gone


@dataclass(frozen=True)
class JudgeCall:
    """One question about one caption; `key` names it in the cache."""

    region: str
    question: int
    key: str
    messages: list = field(repr=False)


@dataclass(frozen=True)
class JudgeOutcome:
    """The result of a run.

    Attributes:
        answers: per region the recognition answer, then one per question; None where a question
            failed or was not asked.
        failures: region, question and reason of each question that failed.
        stopped: why the run ended early, if it did.
        calls: HTTP calls made, retries included.
        cached: questions answered by the cache, from earlier runs or from one under way beside
            this one.
    """

    answers: dict[str, list[str | None]]
    failures: list[dict]
    stopped: str | None
    calls: int
    cached: int

    @property
    def complete(self) -> bool:
        return all(answer is not None for row in self.answers.values() for answer in row)


def call_key(model: str, messages: list, prompt_version: str, request: dict) -> str:
    """Hashes everything that a judge's answer depends on."""
    content = [model, messages, prompt_version, request]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plan_calls(
    benchmark: Benchmark, captions: Mapping[str, str], prompt: JudgePrompt, endpoint: Endpoint
) -> Iterator[JudgeCall]:
    """Yields every question about a captioned region; images are cropped as they are needed."""
    for sample in benchmark.samples:
        if sample.key not in captions:
            continue

        questions = benchmark.questions[sample.key]
        messages = prompt.region_messages(sample, questions, captions[sample.key])
        for number, message in enumerate(messages):
            key = call_key(endpoint.model, message, prompt.version, endpoint.request)
            yield JudgeCall(sample.key, number, key, message)


class _JudgeRun:
    """The state that the threads of one run share."""

    def __init__(self, endpoint: Endpoint, cache: Journal, prompt_version: str):
        self.endpoint = endpoint
        self.cache = cache
        self.prompt_version = prompt_version
        self.known: dict[str, str] = {}
        self.own: set[str] = set()  # keys that this run paid for
        self._learned = 0  # records of the cache that `known` has
        self.failures: list[dict] = []
        self.stopped: str | None = None
        self._in_a_row = 0
        self._lock = threading.Lock()
        self._learn()

    def _learn(self):
        """Adds the answers that have come into the cache to `known`.

        One thread does it at a time, so that none looks at `known` while another has read an
        answer but has not put it there yet.
        """
        with self._lock:
            self.cache.refresh()
            records = self.cache.records[self._learned :]
            self._learned += len(records)
            self.known |= {r["key"]: r["answer"] for r in records if "answer" in r}

    def answer(self, call: JudgeCall):
        """Asks one question, unless another run that shares the cache asks or has asked it."""
        while not self.endpoint.stop.is_set():
            with self.cache.claim(call.key) as is_mine:
                self._learn()
                if call.key in self.known:
                    return
                if is_mine:
                    self._ask(call)
                    return
            self.endpoint.stop.wait(POLL_SECONDS)

    def _ask(self, call: JudgeCall):
        """Asks one question and records the answer or the failure, on disk first."""
        try:
            answer = self.endpoint.ask(call.messages)
        except CallFailure as failure:
            self._fail(call, failure)
            return
        self.cache.append({**self._record(call), "answer": answer})
        with self._lock:
            self.known[call.key] = answer
            self.own.add(call.key)
            self._in_a_row = 0

    def _fail(self, call: JudgeCall, failure: CallFailure):
        """Records a failure, and stops the run where it is fatal or one of many in a row."""
        if self.endpoint.stop.is_set():
            return  # the reason for stopping is known already
        if not failure.fatal:
            self.cache.append({**self._record(call), "failure": str(failure)})

        with self._lock:
            record = {"region": call.region, "question": call.question, "reason": str(failure)}
            self.failures.append(record)
            self._in_a_row += 1

            if failure.fatal:
                self._stop(str(failure))
            elif self._in_a_row >= FAILURES_IN_A_ROW:
                self._stop(f"{self._in_a_row} calls in a row failed, the last with: {failure}")

    def _stop(self, reason: str):
        self.stopped = self.stopped or reason
        self.endpoint.stop.set()

    def _record(self, call: JudgeCall) -> dict:
        return {
            "key": call.key,
            "region": call.region,
            "question": call.question,
            "model": self.endpoint.model,
            "prompt_version": self.prompt_version,
        }


def judge(
    benchmark: Benchmark,
    captions: Mapping[str, str],
    endpoint: Endpoint,
    prompt: JudgePrompt,
    cache_path: str | Path,
    *,
    concurrency: int = 8,
) -> JudgeOutcome:
    """Asks every question about every captioned region that the cache has not answered.

    Each answer is on disk before it counts. A killed run loses at most the calls under way, and the
    next run repeats none that were answered. Questions that failed are asked again by the next run.

    Args:
        benchmark: regions and questions.
        captions: per region key its caption; regions without one are not asked about.
        endpoint: the judge.
        prompt: the wording, and whether images are shown.
        cache_path: a JSONL file that only grows. It may serve many runs and judges, also at the
            same time: what one run is asking, the others wait for.
        concurrency: calls under way at once.

    Raises ValueError for concurrency below 1, FileNotFoundError for images that are to be shown
    and are not there.
    """
    if concurrency < 1:
        raise ValueError(f"expected concurrency of 1 or more, got {concurrency}")
    if prompt.mode == "image":
        # A missing image is found before anything is paid for.
        _expect_images(benchmark, captions)

    asked: dict[str, list[str]] = {}
    with Journal(cache_path) as cache:
        run = _JudgeRun(endpoint, cache, prompt.version)
        total = sum(
            1 + len(benchmark.questions[s.key]) for s in benchmark.samples if s.key in captions
        )
        calls = plan_calls(benchmark, captions, prompt, endpoint)
        with tqdm(total=total, desc="judge", unit="question") as bar:
            _ask_all(run, calls, asked, concurrency, bar)

    answers = {region: [run.known.get(key) for key in keys] for region, keys in asked.items()}
    found = run.known.keys() - run.own
    cached = sum(key in found for keys in asked.values() for key in keys)
    return JudgeOutcome(answers, run.failures, run.stopped, endpoint.budget.spent, cached)


def _ask_all(run: _JudgeRun, calls: Iterator[JudgeCall], asked: dict, concurrency: int, bar: tqdm):
    """Keeps `concurrency` calls under way, and few more in memory, since images are large.

    The keys of each region's questions are put into `asked`, in their order.
    """
    submitted, pending = set(), set()
    with ThreadPoolExecutor(concurrency) as pool, contextlib.ExitStack() as unless_done:
        unless_done.callback(run.endpoint.stop.set)

        # A question that comes twice is asked once.
        for call in calls:
            asked.setdefault(call.region, []).append(call.key)
            if call.key in run.known or call.key in submitted or run.stopped:
                bar.update()
                continue

            submitted.add(call.key)
            pending.add(pool.submit(run.answer, call))
            if len(pending) >= 2 * concurrency:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                _collect(done, bar)

        done, _ = wait(pending)
        _collect(done, bar)
        unless_done.pop_all()


def _expect_images(benchmark: Benchmark, captions: Mapping[str, str]):
    """Raises FileNotFoundError unless the images of all captioned regions are there."""
    paths = {sample.image_path for sample in benchmark.samples if sample.key in captions}
    missing = sorted(path for path in paths if not path.is_file())
    if missing:
        raise FileNotFoundError(
            f"expected the images of {benchmark.source}, found {len(missing)} of {len(paths)}"
            f" missing, first {missing[0]}"
        )


def _collect(done: set, bar: tqdm):
    for future in done:
        future.result()  # raises an internal error, which must not pass unseen
        bar.update()


def read_captions(path: str | Path, benchmark: Benchmark) -> dict[str, str]:
    """Reads a prediction file, and warns where its regions are not those of the benchmark.

    Raises ValueError for a file of another form, and for one without any of the regions.
    """
    captions = read_json(path)
    if not isinstance(captions, dict):
        raise ValueError(f"{path}: expected an object, got {type(captions).__name__}")
    for key, caption in captions.items():
        if not isinstance(caption, str):
            raise ValueError(f"{path}: region {key}: expected a caption, got {caption!r}")

    keys = {sample.key for sample in benchmark.samples}
    if not keys & set(captions):
        raise ValueError(f"{path}: expected captions of the benchmark's regions, got none of them")

    if missing := len(keys - set(captions)):
        logger.warning("%d of %d regions have no caption in %s", missing, len(keys), path)
    if unknown := len(set(captions) - keys):
        logger.warning("%d captions in %s are of no region of the benchmark", unknown, path)
    return captions


def parse_object(text: str) -> dict:
    """Parses a JSON object given on the command line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def configure(parser: argparse.ArgumentParser):
    """Adds the options of this step."""
    add = parser.add_argument
    add("--benchmark", required=True, help="benchmark folder, COCO-style JSON, or Hub dataset id")
    add("--images", help="folder of the image files, if not beside the annotations")
    add("--predictions", required=True, help="JSON: {region: caption}")
    add("--output", required=True, help="where the answers go (JSON)")

    add("--model", required=True, help="the judge's name at its endpoint")
    add("--base-url", help="OpenAI-compatible endpoint (default: OPENAI_BASE_URL, or OpenAI)")
    add("--azure-api-version", help="speak to Azure, at --base-url or AZURE_OPENAI_ENDPOINT")
    add("--mode", choices=MODES, help="show images or text alone (default: as published)")
    add("--prompt-file", help="another wording, with {caption} and {question}")
    help_text = "further request fields; null removes a default (temperature 0, max_tokens 300)"
    add("--request", type=parse_object, default={}, metavar="JSON", help=help_text)

    add("--cache", help="JSONL of answers (default: beside the output, .cache.jsonl)")
    add("--concurrency", type=int, default=8, help="calls under way at once")
    add("--max-calls", type=int, help="call budget, retries included")
    add("--attempts", type=int, default=RetryPolicy.attempts, help="calls per question at most")
    add("--first-delay", type=float, default=RetryPolicy.first_delay, help="seconds of back-off")
    add("--timeout", type=float, default=120, help="seconds per call")


def run(args: argparse.Namespace) -> int:
    """Judges the predictions; returns 1 where questions are left, for the same command to go on."""
    benchmark = load_benchmark(args.benchmark, images=args.images)
    if not benchmark.questions:
        raise ValueError(f"expected questions in {benchmark.source.parent / 'qa.json'}, got none")
    captions = read_captions(args.predictions, benchmark)

    mode = args.mode or default_mode(benchmark)
    prompt = (
        JudgePrompt.from_file(args.prompt_file, mode) if args.prompt_file else JudgePrompt(mode)
    )
    endpoint = _endpoint(args)

    cache = args.cache or Path(args.output).with_suffix(".cache.jsonl")
    outcome = judge(benchmark, captions, endpoint, prompt, cache, concurrency=args.concurrency)
    if not outcome.complete:
        print(_incomplete_message(outcome, cache))
        return 1

    # Only complete answers are written, so that none are scored by mistake.
    write_json(args.output, outcome.answers)
    write_json(run_record_path(args.output), _run_record(args, endpoint, prompt, outcome))
    print(
        f"{args.output}: {len(outcome.answers)} regions, {outcome.calls} calls made,"
        f" {outcome.cached} answers from the cache"
    )
    return 0


def _endpoint(args: argparse.Namespace) -> Endpoint:
    request = {"temperature": 0, "max_tokens": 300, **args.request}
    return Endpoint(
        make_client(args.base_url, args.timeout, args.azure_api_version),
        args.model,
        request={name: value for name, value in request.items() if value is not None},
        policy=RetryPolicy(attempts=args.attempts, first_delay=args.first_delay),
        budget=CallBudget(args.max_calls),
    )


def _incomplete_message(outcome: JudgeOutcome, cache: str | Path) -> str:
    """Says how much is left, why, and how to go on."""
    unanswered = sum(answer is None for row in outcome.answers.values() for answer in row)
    why = outcome.stopped or outcome.failures[0]["reason"]
    return (
        f"{unanswered} questions have no answer after {outcome.calls} calls"
        f" ({len(outcome.failures)} failed): {why}\n"
        f"The answers so far are in {cache}; the same command goes on from there."
    )


def _run_record(
    args: argparse.Namespace, endpoint: Endpoint, prompt: JudgePrompt, outcome: JudgeOutcome
) -> dict:
    return {
        "judge": endpoint.model,
        "endpoint": public_url(endpoint.client.base_url),
        "mode": prompt.mode,
        "prompt_version": prompt.version,
        "request": endpoint.request,
        "predictions": str(args.predictions),
        "predictions_sha256": file_sha256(args.predictions),
        "calls": outcome.calls,
        "answers_from_cache": outcome.cached,
        "environment": run_environment(),
    }
