"""Asks an OpenAI-compatible endpoint one question: retried, counted, and never showing the key.

The `openai` client does the requests and their timeouts. Its own retries are off, since they would
break what a paid run promises: they are counted by nobody, so that a call budget could not stop
them; they take a completion without text for an answer and go on when the credit is spent; they
cut a Retry-After at one or two minutes; and their waits cannot be ended when the run is stopped.
"""

import email.utils
import importlib
import json
import os
import random
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from .extras import extra

RETRIED_STATUSES = (408, 409, 429)  # and every 5xx
FATAL_STATUSES = (401, 403, 404)  # no other call can do better
NO_KEY = "none"  # sent to a user's own server, which asks for no key
MAX_BODY = 16 << 20  # bytes of a response, far beyond any completion


class CallFailure(Exception):
    """A question that got no answer; `fatal` means that no other question will get one."""

    def __init__(self, reason: str, *, fatal: bool = False):
        super().__init__(reason)
        self.fatal = fatal


class Exhausted(CallFailure):
    """A question that failed at each attempt, each time for what may pass."""


class CutOff(CallFailure):
    """An answer that was longer than the tokens it was given."""


@dataclass(frozen=True)
class RetryPolicy:
    """Says how often, and after how many seconds, a failed call is made again."""

    attempts: int = 6  # calls made for one question at most
    first_delay: float = 1.0  # before the second attempt; it doubles from then on
    max_delay: float = 60.0  # that this doubling ends at
    max_retry_after: float = 600.0  # a server that asks for a longer wait is given up on

    def __post_init__(self):
        if self.attempts < 1:
            raise ValueError(f"expected attempts of 1 or more, got {self.attempts}")

    def delay(self, attempt: int) -> float:
        """Returns the seconds to wait after a failed attempt, which are counted from 0.

        They are shortened at random by up to half, so that calls that failed together are not
        repeated together.
        """
        delay = min(self.first_delay * 2**attempt, self.max_delay)
        return delay * random.uniform(0.5, 1.0)


class CallBudget:
    """Counts the calls made, retries included, and refuses those beyond the limit."""

    def __init__(self, limit: int | None = None):
        if limit is not None and limit < 0:
            raise ValueError(f"expected a call budget of 0 or more, got {limit}")
        self.limit = limit
        self.spent = 0
        self._lock = threading.Lock()

    def spend(self):
        """Counts a call that is about to be made. Raises a fatal CallFailure at the limit."""
        with self._lock:
            if self.limit is not None and self.spent >= self.limit:
                raise CallFailure(f"the budget of {self.limit} calls is spent", fatal=True)
            self.spent += 1


class Endpoint:
    """A chat model behind an `openai` client.

    Args:
        client: an `openai.OpenAI` or `AzureOpenAI` as `make_client` makes it.
        model: the model's name there.
        request: further fields of each request (temperature, max_tokens, ...).
        policy: when to try again.
        budget: counts the calls.
        whole: take no answer that was cut off at its number of tokens (CutOff).

    Attributes:
        stop: when set, waiting ends and no further call is made.
    """

    def __init__(
        self,
        client,
        model: str,
        *,
        request: dict | None = None,
        policy: RetryPolicy | None = None,
        budget: CallBudget | None = None,
        whole: bool = False,
    ):
        self.client = client
        self.model = model
        self.request = request or {}
        self.policy = policy or RetryPolicy()
        self.budget = budget or CallBudget()
        self.whole = whole
        self.stop = threading.Event()

    def ask(self, messages: list[dict]) -> str:
        """Returns the text of the answer. Raises CallFailure with the last reason for none."""
        for attempt in range(self.policy.attempts):
            if self.stop.is_set():
                raise CallFailure("the run was stopped")
            self.budget.spend()

            answer, reason, wait = self._attempt(messages)
            if reason is None:
                return answer
            if attempt + 1 < self.policy.attempts:
                self.stop.wait(self.policy.delay(attempt) if wait is None else wait)

        raise Exhausted(f"{reason} ({self.policy.attempts} attempts)")

    def _attempt(self, messages: list[dict]) -> tuple[str | None, str | None, float | None]:
        """Makes one call: (answer, None, None), or (None, reason, seconds asked for).

        Raises CallFailure where trying again cannot help.
        """
        import openai

        try:
            # The raw response, since the client makes a completion of any JSON.
            raw = self.client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, **self.request
            )
            return parse_completion(raw.http_response.text, self.whole), None, None
        except openai.APITimeoutError:
            return None, "no response in time", None
        except openai.APIConnectionError as error:
            return None, self._redact(f"no connection or a cut one: {error.__cause__!r}"), None
        except openai.APIStatusError as error:
            return None, *self._status_reason(error)
        except MalformedCompletion as error:
            return None, self._redact(str(error)), None

    def _status_reason(self, error) -> tuple[str, float | None]:
        """Returns why and when to try again after an HTTP error. Raises as `_attempt`."""
        status = error.status_code
        if 300 <= status < 400:
            place = public_url(error.response.headers.get("location", ""))
            reason = f"HTTP {status}: expected an answer, got a redirect to {place}"
            raise CallFailure(f"{reason}: give the base URL that it leads to", fatal=True)
        reason = self._redact(f"HTTP {status}: {error.response.text[:200].strip()}")
        is_out_of_credit = error.code == "insufficient_quota"
        if is_out_of_credit or not (status in RETRIED_STATUSES or status >= 500):
            raise CallFailure(reason, fatal=is_out_of_credit or status in FATAL_STATUSES)

        wait = retry_after(error.response.headers)
        if wait is not None and wait > self.policy.max_retry_after:
            raise CallFailure(f"{reason}, to be tried again in {wait:.0f} s", fatal=True)
        return reason, wait

    def _redact(self, text: str) -> str:
        key = self.client.api_key
        return text.replace(key, "[key]") if key and key != NO_KEY else text


class MalformedCompletion(Exception):
    """A body that is no chat completion with text."""


def parse_completion(body: str, whole: bool = False) -> str:
    """Returns the text of a chat completion's first choice.

    Raises MalformedCompletion, and CutOff where it has to be `whole` and is not.
    """
    try:
        choice = json.loads(body)["choices"][0]
        content = choice["message"]["content"]
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise MalformedCompletion(
            f"expected a chat completion, got {body[:120]!r} ({type(error).__name__})"
        ) from error
    if whole and choice.get("finish_reason") == "length":
        raise CutOff(f"expected a whole answer, got one cut off at max_tokens: {content!r:.80}")
    if not isinstance(content, str):
        raise MalformedCompletion(f"expected a completion with text, got content {content!r:.80}")
    return content


def retry_after(headers) -> float | None:
    """Returns the seconds that a Retry-After header asks for, given in seconds or as a date.

    None without a header that can be read.
    """
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        parsed = email.utils.parsedate_tz(value)
        return None if parsed is None else max(0.0, email.utils.mktime_tz(parsed) - time.time())


def make_client(base_url: str | None, timeout: float, azure_api_version: str | None = None):
    """Makes an `openai` client with the key from the environment.

    Args:
        base_url: the endpoint; None: OPENAI_BASE_URL, or OpenAI's own (AZURE_OPENAI_ENDPOINT for
            Azure). A user's own server needs no key.
        timeout: seconds that a call may take.
        azure_api_version: of Azure, if it is to be spoken to.

    The key is taken from OPENAI_API_KEY, or AZURE_OPENAI_API_KEY. Raises ValueError for a timeout
    that is not positive, or where a key or an endpoint is needed and there is none.
    """
    with extra("eval"):
        import openai

    if timeout <= 0:
        raise ValueError(f"expected a timeout of more than 0 seconds, got {timeout}")

    # Azure has variables of its own.
    variable = "AZURE_OPENAI_API_KEY" if azure_api_version else "OPENAI_API_KEY"
    endpoint = "AZURE_OPENAI_ENDPOINT" if azure_api_version else "OPENAI_BASE_URL"
    key, base_url = os.environ.get(variable), base_url or os.environ.get(endpoint)
    if not key and not base_url:
        raise ValueError(f"expected a key for the endpoint in {variable}, got none and no base URL")

    # Images and questions go to the endpoint that was named and to no other: no redirects.
    hooks = {"response": [lambda response: _bound_body(response, timeout)]}
    http = openai.DefaultHttpxClient(follow_redirects=False, event_hooks=hooks)
    common = {"api_key": key or NO_KEY, "timeout": timeout, "http_client": http}
    common["max_retries"] = 0  # see above: ours
    if azure_api_version:
        if not base_url:
            raise ValueError("expected a base URL or AZURE_OPENAI_ENDPOINT for Azure, got none")
        return openai.AzureOpenAI(azure_endpoint=base_url, api_version=azure_api_version, **common)
    return openai.OpenAI(base_url=base_url, **common)


def _bound_body(response, timeout: float):
    """Bounds the seconds and bytes of a response's body; httpx itself bounds each read alone."""
    # httpx, or what has taken its place in the installed `openai`.
    httpx = importlib.import_module(type(response).__module__.partition(".")[0])

    class BoundedStream(httpx.SyncByteStream):
        def __init__(self, stream):
            self.stream = stream

        def __iter__(self):
            end, size = time.monotonic() + timeout, 0
            for chunk in self.stream:
                size += len(chunk)
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("expected the whole body in time")
                if size > MAX_BODY:
                    raise httpx.ReadError(f"expected a body of {MAX_BODY:,} bytes at most")
                yield chunk

        def close(self):
            self.stream.close()

    response.stream = BoundedStream(response.stream)


def public_url(url: str) -> str:
    """Returns a URL without the credentials and query that it may carry."""
    parts = urlsplit(str(url))
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"
