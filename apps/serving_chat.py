"""OpenAI's chat completions as jobs for an engine, and results as chat completions.

A picture comes as an `image_url` part. Its regions come from, the first of these that there is:
a `masks` field of the request, a text part that is a JSON object with `masks`, further image parts
of the same message, or the picture's own alpha channel. Without regions, the conversation is
answered.
"""

import json
import time
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from .captioner import RegionCaptions, Step
from .serving_http import ApiError
from .serving_jobs import ChatJob, Completion, RegionJob
from .serving_limits import (
    Limits,
    alpha_mask,
    decode_data_url,
    decode_mask,
    decode_picture,
    expect_at_most,
    expect_masks,
    read_mask,
)

DECODING = ("steps", "block_length", "temperature", "top_k", "top_p", "cfg_scale", "remasking",
            "adaptive", "adaptive_value", "adaptive_verify", "prompt_cache", "seed")
MOST_KEYS, MOST_ITEMS = 64, 256  # of an object and a list in a request, masks apart
SHOWN = 200  # characters of a client's input that an error repeats


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class TextPart(Model):
    type: Literal["text"]
    text: str


class ImageUrl(Model):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # all pictures are seen alike


class ImagePart(Model):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None


class StreamOptions(Model):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextFormat(Model):
    type: Literal["text"]


class ChatRequest(Model):
    """The fields of OpenAI's request that mean something here, and this server's own.

    Fields of OpenAI's that would change nothing at their neutral values are taken at those only.
    """

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Literal[1] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    # this server's own
    task: Literal["regions", "question"] | None = None
    masks: list[Any] | None = None
    caption_length: int | None = None
    steps: int | None = None
    block_length: int | None = None
    top_k: int | None = None
    cfg_scale: float | None = None
    remasking: str | None = None
    adaptive: str | None = None
    adaptive_value: float | None = None
    adaptive_verify: float | None = None
    prompt_cache: int | None = None


def read_request(body: bytes | bytearray) -> ChatRequest:
    """Parses a body; ApiError 400 says which field is wrong."""
    try:
        content = from_json(body)
    except ValueError as error:
        raise ApiError(400, f"expected JSON, got: {error}", code="invalid_request") from error
    _expect_small(content)
    try:
        return ChatRequest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = _place(first["loc"])
        message = f"{place}: {first['msg']}" if place else first["msg"]
        if first["type"] != "missing":
            message += f", got {first['input']!r:.{SHOWN}}"
        raise ApiError(400, message, code="invalid_request", param=place or None) from error


def _expect_small(value, depth: int = 6):
    """Refuses objects and lists so large that there would be an error for each of millions."""
    if isinstance(value, dict):
        if len(value) > MOST_KEYS:
            raise ApiError(400, f"expected objects of at most {MOST_KEYS} keys, got {len(value)}",
                           code="invalid_request")
        value = [item for key, item in value.items() if key != "masks"]
    elif isinstance(value, list) and len(value) > MOST_ITEMS:
        raise ApiError(400, f"expected lists of at most {MOST_ITEMS} items, got {len(value)}",
                       code="invalid_request")
    if isinstance(value, list) and depth:
        for item in value:
            _expect_small(item, depth - 1)


def _place(loc: tuple) -> str:
    """`messages[0].content[1].image_url.url`, without the names of union members."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("text_part", "str"):
            text += f".{part}" if text else part
    return text


class JobReader:
    """Makes a job and its options of a request.

    Args:
        limits: what a request may ask for.
        fetch: gives the bytes behind an http(s) URL, or raises ValueError.
    """

    def __init__(self, limits: Limits, fetch: Callable[[str], bytes]):
        self.limits = limits
        self.fetch = fetch

    def __call__(self, request: ChatRequest) -> tuple[RegionJob | ChatJob, dict]:
        """Raises ValueError for what does not fit."""
        for message in request.messages:
            self._check_text(message)
        masks, request = _masks_in_text(request)
        masks = request.masks if request.masks is not None else masks
        if request.task == "question" and masks:
            raise ValueError("expected no masks for the task 'question', got some")
        job = None if request.task == "question" else self._region_job(request, masks)
        if job is not None:
            return job, self._options(request, job)
        if masks is not None or request.task == "regions":
            raise ValueError("expected a picture with at least one mask, got none")
        job = self._chat_job(request)
        return job, self._options(request, job)

    def _check_text(self, message: Message):
        content = message.content
        parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        texts = [p.text for p in parts if isinstance(p, TextPart) and not _mask_json(p.text)]
        expect_at_most("text, in characters,", sum(map(len, texts)), self.limits.text)

    def _region_job(self, request: ChatRequest, masks: list | None) -> RegionJob | None:
        """The regions asked for, or None where there are none."""
        *before, last = request.messages
        urls = _image_urls(last)
        wanted = masks is not None or len(urls) > 1 or request.task == "regions"
        if not urls or (before and not wanted):
            return None
        if before or last.role != "user":
            raise ValueError("expected one user message for regions, got a conversation")
        expect_at_most("image parts", len(urls), self.limits.masks + 1)
        picture = decode_picture(self._bytes(urls[0], "the picture"), "the picture", self.limits)
        if masks is not None:
            if len(urls) > 1:
                raise ValueError("expected masks as JSON or as image parts, got both")
            expect_masks(len(masks), picture.size, self.limits)
            regions = [
                read_mask(mask, picture.size, f"mask {k}", self.limits)
                for k, mask in enumerate(masks, 1)
            ]
        elif len(urls) > 1:
            expect_masks(len(urls) - 1, picture.size, self.limits)
            regions = [self._mask_part(url, k) for k, url in enumerate(urls[1:], 1)]
        else:
            alpha = alpha_mask(picture)
            regions = [alpha] if alpha is not None else []
        if not regions:
            return None
        return RegionJob.build(picture, regions, _text_of(last) or None)

    def _mask_part(self, url: str, number: int):
        name = f"mask {number}"
        return decode_mask(self._bytes(url, name), name, self.limits)

    def _chat_job(self, request: ChatRequest) -> ChatJob:
        if request.messages[-1].role != "user":
            raise ValueError(
                f"expected the last message from the user, got {request.messages[-1].role!r}"
            )
        urls = [url for message in request.messages for url in _image_urls(message)]
        expect_at_most("pictures", len(urls), self.limits.images)
        pictures = []
        for k, url in enumerate(urls, 1):
            name = f"picture {k}"
            picture = decode_picture(self._bytes(url, name), name, self.limits)
            pictures += ChatJob.ask(picture, "").images  # upright RGB
        return ChatJob([_template_message(m) for m in request.messages], tuple(pictures))

    def _bytes(self, url: str, name: str) -> bytes:
        if url[:5].lower() == "data:":
            return decode_data_url(url, name, self.limits)
        return self.fetch(url)

    def _options(self, request: ChatRequest, job) -> dict:
        options = {name: getattr(request, name) for name in DECODING}
        length = request.max_completion_tokens or request.max_tokens
        if isinstance(job, RegionJob):
            options["caption_length"] = request.caption_length or length
        elif request.caption_length is not None:
            raise ValueError("expected max_tokens for a question, got caption_length")
        else:
            options["max_new_tokens"] = length
        if request.stop:
            stops = [request.stop] if isinstance(request.stop, str) else request.stop
            expect_at_most("stop strings", len(stops), 4)
            options["stop_strings"] = stops
        for name, most in (("caption_length", self.limits.caption_length),
                           ("max_new_tokens", self.limits.new_tokens),
                           ("steps", self.limits.steps)):
            expect_at_most(name, options.get(name), most)
        if options["seed"] is not None and not 0 <= options["seed"] < 2**63:
            raise ValueError(f"expected seed from 0 to 2**63 - 1, got {options['seed']}")
        return {name: value for name, value in options.items() if value is not None}


def _image_urls(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return []
    return [part.image_url.url for part in message.content if isinstance(part, ImagePart)]


def _text_of(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content.strip()
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    return "\n".join(texts).strip()


def _mask_json(text: str) -> list | None:
    """The masks of a text that is a JSON object with nothing but `masks`."""
    text = text.strip()
    if not (text.startswith("{") and text.endswith("}") and '"masks"' in text):
        return None
    try:
        content = json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("expected masks as flat JSON, got deeply nested JSON") from error
    except ValueError as error:
        raise ValueError(f"expected masks as JSON in the text, got: {error}") from error
    if set(content) != {"masks"} or not isinstance(content["masks"], list):
        raise ValueError('expected {"masks": [...]} as JSON in the text')
    return content["masks"]


def _no_constant(name: str):
    raise ValueError(f"expected finite numbers, got {name}")


def _masks_in_text(request: ChatRequest) -> tuple[list | None, ChatRequest]:
    """The masks that a text part of the last message holds, and the request without that part."""
    last = request.messages[-1]
    if isinstance(last.content, str):
        return None, request
    masks, kept = None, []
    for part in last.content:
        found = _mask_json(part.text) if isinstance(part, TextPart) else None
        if found is None:
            kept.append(part)
        elif masks is not None or request.masks is not None:
            raise ValueError("expected masks in one place, got them in two")
        else:
            masks = found
    message = last.model_copy(update={"content": kept})
    return masks, request.model_copy(update={"messages": [*request.messages[:-1], message]})


def _template_message(message: Message) -> dict:
    """A message for the chat template: its pictures first, as the model has learned it."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    pictures = [{"type": "image"} for _ in _image_urls(message)]
    return {"role": role, "content": [*pictures, {"type": "text", "text": _text_of(message)}]}


class ChatWriter:
    """Chat completions, whole or in chunks, of one request."""

    def __init__(self, model: str):
        self.model = model
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, completion: Completion) -> dict:
        """The answer to a request without `stream`."""
        message = {"role": "assistant", "content": content_of(completion), "refusal": None}
        if isinstance(completion.result, RegionCaptions):
            message["regions"] = _regions(completion)
        choice = {"index": 0, "message": message, "logprobs": None,
                  "finish_reason": _reason(completion)}
        return {**self._head("chat.completion"), "choices": [choice],
                "usage": usage_of(completion), "perceptiondlm": cost_of(completion)}

    def start(self) -> dict:
        """The first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def state(self, step: Step) -> dict:
        """The texts after a step, beside an empty delta: denoising changes texts all over, so
        nothing is said in `content` until it is done."""
        chunk = self._chunk({})
        chunk["denoising"] = {"step": step.number, "texts": step.texts}
        return chunk

    def end(self, completion: Completion, include_usage: bool) -> list[dict]:
        """The last chunks: the text, the reason, and, on request, the usage."""
        delta = {"content": content_of(completion)}
        if isinstance(completion.result, RegionCaptions):
            delta["regions"] = _regions(completion)
        last = self._chunk({}, _reason(completion))
        last["perceptiondlm"] = cost_of(completion)
        chunks = [self._chunk(delta), last]
        if include_usage:
            chunks.append({**self._head("chat.completion.chunk"), "choices": [],
                           "usage": usage_of(completion)})
        return chunks

    def _chunk(self, delta: dict, reason: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def content_of(completion: Completion) -> str:
    """A question's answer, or the regions as JSON."""
    if isinstance(completion.result, RegionCaptions):
        return json.dumps({"regions": _regions(completion)}, ensure_ascii=False)
    return completion.result.answers[0]


def usage_of(completion: Completion) -> dict:
    """Tokens as OpenAI counts them."""
    prompt, answer = completion.prompt_tokens, completion.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def cost_of(completion: Completion) -> dict:
    """What is particular to denoising in a batch."""
    result = completion.result
    return {
        "num_forwards": result.num_forwards,
        "tokens_per_forward": round(result.tokens_per_forward, 3),
        "seconds": round(result.seconds, 3),
        "queued_seconds": round(completion.queued_seconds, 3),
        "batch_size": completion.batch_size,
    }


def _regions(completion: Completion) -> list[dict]:
    return [region.to_dict() for region in completion.result.regions]


def _reason(completion: Completion) -> str:
    return "stop" if completion.ended else "length"
