"""One question to an OpenAI-compatible endpoint: retried, counted, and never showing the key."""

import email.utils
import json
import os
import random
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..common.extras import extra

RETRIED_STATUSES = (408, 409, 429)  # and every 5xx
FATAL_STATUSES = (401, 403, 404)  # no other call can do better
NO_KEY = "none"  # sent to servers of one's own that ask for no key


class JudgeFailure(Exception):
    """A question that got no answer; `fatal` means that no other will."""

    def __init__(self, reason: str, *, fatal: bool = False):
        super().__init__(reason)
        self.fatal = fatal


@dataclass(frozen=True)
class RetryPolicy:
    """When to try again.

    Attributes:
        attempts: calls made for one question at most.
        first_delay: seconds before the second attempt; it doubles from then on.
        longest_delay: seconds that this doubling ends at.
        longest_retry_after: a server that asks for a longer wait is given up on.
    """

    attempts: int = 6
    first_delay: float = 1.0
    longest_delay: float = 60.0
    longest_retry_after: float = 600.0

    def __post_init__(self):
        if self.attempts < 1:
            raise ValueError(f"expected attempts of 1 or more, got {self.attempts}")

    def delay(self, attempt: int) -> float:
        """Seconds to wait after a failed attempt (from 0), shortened at random by up to half."""
        longest = min(self.first_delay * 2**attempt, self.longest_delay)
        return longest * random.uniform(0.5, 1.0)


class CallBudget:
    """Counts the calls made, retries included, and refuses the one beyond the limit."""

    def __init__(self, limit: int | None = None):
        if limit is not None and limit < 0:
            raise ValueError(f"expected a call budget of 0 or more, got {limit}")
        self.limit = limit
        self.spent = 0
        self._lock = threading.Lock()

    def spend(self):
        with self._lock:
            if self.limit is not None and self.spent >= self.limit:
                raise JudgeFailure(f"the budget of {self.limit} calls is spent", fatal=True)
            self.spent += 1


class Endpoint:
    """A chat model behind an `openai` client.

    Args:
        client: an `openai.OpenAI` or `AzureOpenAI` that does not retry by itself.
        model: its name there.
        request: further fields of each request (temperature, max_tokens, ...).
        policy: when to try again.
        budget: what the calls are counted in.

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
    ):
        self.client = client
        self.model = model
        self.request = request or {}
        self.policy = policy or RetryPolicy()
        self.budget = budget or CallBudget()
        self.stop = threading.Event()

    def ask(self, messages: list[dict]) -> str:
        """The answer's text; JudgeFailure with the last reason when there is none."""
        for attempt in range(self.policy.attempts):
            if self.stop.is_set():
                raise JudgeFailure("the run was stopped")
            self.budget.spend()
            answer, reason, wait = self._attempt(messages)
            if reason is None:
                return answer
            if attempt + 1 < self.policy.attempts:
                self.stop.wait(self.policy.delay(attempt) if wait is None else wait)
        raise JudgeFailure(f"{reason} ({self.policy.attempts} attempts)")

    def _attempt(self, messages: list[dict]) -> tuple[str | None, str | None, float | None]:
        """One call: (answer, None, None), or (None, why to try again, seconds asked for if any)."""
        import openai

        try:
            raw = self.client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, **self.request
            )
            return parse_completion(raw.http_response.text), None, None
        except openai.APITimeoutError:
            return None, "no response in time", None
        except openai.APIConnectionError as error:
            return None, self._redact(f"no connection or a cut one: {error.__cause__!r}"), None
        except openai.APIStatusError as error:
            return None, *self._judge_status(error)
        except MalformedCompletion as error:
            return None, self._redact(str(error)), None

    def _judge_status(self, error) -> tuple[str, float | None]:
        """Why and when to try again after an HTTP error; JudgeFailure if that cannot help."""
        status = error.status_code
        reason = self._redact(f"HTTP {status}: {error.response.text[:200].strip()}")
        out_of_credit = error.code == "insufficient_quota"
        if out_of_credit or not (status in RETRIED_STATUSES or status >= 500):
            raise JudgeFailure(reason, fatal=out_of_credit or status in FATAL_STATUSES)
        wait = retry_after(error.response.headers)
        if wait is not None and wait > self.policy.longest_retry_after:
            raise JudgeFailure(f"{reason}, to be tried again in {wait:.0f} s", fatal=True)
        return reason, wait

    def _redact(self, text: str) -> str:
        key = self.client.api_key
        return text.replace(key, "[key]") if key and key != NO_KEY else text


class MalformedCompletion(Exception):
    """A response that is no chat completion."""


def parse_completion(body: str) -> str:
    """The text of a chat completion's first choice."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise MalformedCompletion(
            f"expected a chat completion, got {body[:120]!r} ({type(error).__name__})"
        ) from error
    if not isinstance(content, str):
        raise MalformedCompletion(f"expected a completion with text, got content {content!r:.80}")
    return content


def retry_after(headers) -> float | None:
    """Seconds that a Retry-After header (seconds or a date) asks for; None without a usable one."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        parsed = email.utils.parsedate_tz(value)
        return None if parsed is None else max(0.0, email.utils.mktime_tz(parsed) - time.time())


def make_client(base_url: str | None, timeout: float, azure_api_version: str | None = None):
    """An `openai` client with the key from the environment.

    OPENAI_API_KEY holds the key (AZURE_OPENAI_API_KEY for Azure, whose endpoint is `base_url`). A
    server of one's own given by `base_url` needs none.
    """
    with extra("eval"):
        import openai

    if timeout <= 0:
        raise ValueError(f"expected a timeout of more than 0 seconds, got {timeout}")
    variable = "AZURE_OPENAI_API_KEY" if azure_api_version else "OPENAI_API_KEY"
    key = os.environ.get(variable)
    base_url = base_url or os.environ.get(
        "AZURE_OPENAI_ENDPOINT" if azure_api_version else "OPENAI_BASE_URL"
    )
    if not key and not base_url:
        raise ValueError(f"expected the judge's key in {variable}, got none and no base URL")
    common = {"api_key": key or NO_KEY, "timeout": timeout, "max_retries": 0}
    if azure_api_version:
        if not base_url:
            raise ValueError("expected a base URL or AZURE_OPENAI_ENDPOINT for Azure, got none")
        return openai.AzureOpenAI(azure_endpoint=base_url, api_version=azure_api_version, **common)
    return openai.OpenAI(base_url=base_url, **common)


def public_url(url: str) -> str:
    """A URL without the credentials and query that it may carry."""
    parts = urlsplit(str(url))
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"
