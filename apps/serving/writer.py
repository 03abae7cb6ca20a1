"""Writes results as OpenAI's chat completions, whole or in chunks."""

import json
import time
import uuid

from ..captioning.results import RegionCaptions, Step
from .completions import Completion


class ChatWriter:
    """Writes the chat completion of one request, whole or in chunks."""

    def __init__(self, model: str):
        self.model = model
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, completion: Completion) -> dict:
        """Returns the answer to a request without `stream`."""
        message = {"role": "assistant", "refusal": None, **said_in(completion)}

        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": _reason(completion),
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": usage_of(completion),
            "perceptiondlm": cost_of(completion),
        }

    def start(self) -> dict:
        """Returns the first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def state(self, step: Step) -> dict:
        """Returns a chunk with the texts after a step, beside an empty delta.

        Denoising changes texts all over, so nothing is said in `content` until it is done.
        """
        chunk = self._chunk({})
        chunk["denoising"] = {"step": step.number, "texts": step.texts}
        return chunk

    def end(self, completion: Completion, include_usage: bool) -> list[dict]:
        """Returns the last chunks: the text, the reason, and, on request, the usage."""
        last = self._chunk({}, _reason(completion))
        last["perceptiondlm"] = cost_of(completion)
        chunks = [self._chunk(said_in(completion)), last]

        if include_usage:  # in a chunk without choices, as OpenAI sends it
            head = self._head("chat.completion.chunk")
            chunks.append({**head, "choices": [], "usage": usage_of(completion)})
        return chunks

    def _chunk(self, delta: dict, reason: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def said_in(completion: Completion) -> dict:
    """Returns a message's content, and beside it the same as objects, with scores."""
    content = {"content": content_of(completion)}
    if isinstance(completion.result, RegionCaptions):
        return content | {"regions": _regions(completion)}
    (answer,) = completion.result.entries()
    return content | {name: answer[name] for name in ("score", "fields") if name in answer}


def content_of(completion: Completion) -> str:
    """Returns a question's answer, or the regions as JSON."""
    if isinstance(completion.result, RegionCaptions):
        return json.dumps({"regions": _regions(completion)}, ensure_ascii=False)
    return completion.result.answers[0]


def usage_of(completion: Completion) -> dict:
    """Returns the tokens as OpenAI counts them."""
    prompt, answer = completion.prompt_tokens, completion.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def cost_of(completion: Completion) -> dict:
    """Returns what OpenAI's usage has no place for: forward passes, time, and the batch."""
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
