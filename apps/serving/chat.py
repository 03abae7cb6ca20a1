"""Reads what a request asks for: regions of an image to caption, or a conversation to answer.

An image comes as an `image_url` part. A request means regions where it says so: by a `masks` field,
by parts of type `mask`, or by a text part that is a JSON object with nothing but `masks`; with
`"task": "regions"` also by further image parts, each a mask, or by the image's own alpha channel.
Every other request is a conversation, whatever images it holds.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image

from ...common.json_text import without_mark
from ...image_loading import is_data_url, load_image, load_mask
from .decode import Decoder, alpha_mask
from .limits import Limits, each_numbered, expect_at_most
from .request import DECODING, ChatRequest, ImagePart, MaskPart, Message, TextPart
from .schemas import template_of

MAX_STOPS = 4  # as OpenAI's
MASKS_TEXT = re.compile(r'\ufeff?\s*\{\s*"masks"\s*:.*\}\s*', re.DOTALL)


@dataclass(frozen=True)
class Asked:
    """A request, read: images decoded, options checked against the limits.

    Attributes:
        model, stream, include_usage: as the client said.
        images: upright RGB, in order.
        masks: of the only image; empty for a conversation.
        instruction: beside the masks; None: the checkpoint's own.
        prompts: of each mask, None for the instruction; None where there are none.
        template: of each response; None for free ones.
        messages: of a conversation, for the chat template; empty for regions.
        options: decoding options that the client set.
        shorten: the option that is an upper bound, to be lowered to what there is room for.
    """

    model: str
    stream: bool
    include_usage: bool
    images: tuple[Image.Image, ...]
    masks: tuple[Image.Image, ...] = ()
    instruction: str | None = None
    prompts: list[str | None] | None = None
    template: str | dict | None = None
    messages: list[dict] = field(default_factory=list)
    options: dict = field(default_factory=dict)
    shorten: str | None = None


class RequestReader:
    """Reads what one request asks for.

    Args:
        limits: what a request may ask for.
        fetch: gives the bytes behind an http(s) URL, or raises ValueError.
    """

    def __init__(self, limits: Limits, fetch: Callable[[str], bytes]):
        self.limits = limits
        self.decoder = Decoder(limits)
        self.fetch = fetch

    def __call__(self, request: ChatRequest) -> Asked:
        """Returns what is asked for; raises ValueError for what does not fit."""
        self._check_text(request)
        masks = _masks_of(request)
        wanted = masks is not None or request.task == "regions"
        if request.task == "question" and masks:
            raise ValueError("expected no masks for the task 'question', got some")

        if request.prompts is not None and not wanted:
            raise ValueError("expected prompts with masks, whose regions they ask about, got none")
        most = self.limits.caption_length if wanted else self.limits.new_tokens
        template = template_of(request, self.limits, most)

        content = self._regions(request, masks) if wanted else self._conversation(request)
        options, shorten = self._options(request, "caption_length" if wanted else "max_new_tokens")
        usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        return Asked(
            request.model,
            bool(request.stream),
            usage,
            **content,
            template=template,
            options=options,
            shorten=shorten,
        )

    def _check_text(self, request: ChatRequest):
        texts = [text for message in request.messages for text in _texts(message)]
        texts += filter(None, request.prompts or ())
        expect_at_most("text, in characters,", sum(map(len, texts)), self.limits.text)

    def _regions(self, request: ChatRequest, masks: list | None) -> dict:
        """Reads the image, its masks and the instruction."""
        # One message that holds the image, and masks in one of the ways in which they may come.
        *before, last = request.messages
        if before or last.role != "user":
            raise ValueError("expected one user message for regions, got a conversation")
        urls = _image_urls(last)
        if not urls:
            raise ValueError("expected an image with the masks, got none")
        expect_at_most("image parts", len(urls), self.limits.masks + 1)
        if masks is not None and len(urls) > 1:
            raise ValueError("expected masks as such or as image parts, got both")

        # Masks are counted before any is decoded; an image without masks may hold one as its alpha.
        stored = self.decoder.image(self._bytes(urls[0], "the image"), "the image")
        image = load_image(stored)
        self.decoder.expect_masks(max(len(masks or []), len(urls) - 1), image.size)
        regions = self._masks(masks, urls[1:], stored, image.size)
        if not regions:
            raise ValueError("expected an image with at least one mask, got none")
        _expect_prompts(request.prompts, len(regions))
        return {
            "images": (image,),
            "masks": tuple(regions),
            "instruction": "\n".join(_texts(last)).strip() or None,
            "prompts": request.prompts,
        }

    def _masks(self, masks: list | None, urls: list[str], stored: Image.Image, size) -> list:
        if masks is not None:
            return each_numbered("mask", masks, lambda m: self.decoder.mask(m, size))
        if urls:
            return each_numbered("mask", urls, lambda url: self._mask_image(url, size))
        alpha = alpha_mask(stored)
        return [] if alpha is None else [load_mask(alpha, size)]

    def _mask_image(self, url: str, size) -> Image.Image:
        return load_mask(self.decoder.mask_image(self._bytes(url, "the mask"), size), size)

    def _conversation(self, request: ChatRequest) -> dict:
        """Reads the messages and their images."""
        if request.messages[-1].role != "user":
            raise ValueError(
                f"expected the last message from the user, got {request.messages[-1].role!r}"
            )
        urls = [url for message in request.messages for url in _image_urls(message)]
        expect_at_most("images", len(urls), self.limits.images)
        images = each_numbered("image", urls, self._image)
        messages = [_template_message(message) for message in request.messages]
        return {"images": tuple(images), "messages": messages}

    def _image(self, url: str) -> Image.Image:
        return load_image(self.decoder.image(self._bytes(url, "the image"), "the image"))

    def _bytes(self, url: str, name: str) -> bytes:
        if is_data_url(url):
            return self.decoder.data_url(url, name)
        return self.fetch(url)

    def _options(self, request: ChatRequest, length: str) -> tuple[dict, str | None]:
        """Returns the decoding options, and the name of the length that is an upper bound."""
        options = {name: getattr(request, name) for name in DECODING if name != "caption_length"}
        options["stop_strings"] = self._stops(request)
        if request.caption_length is not None and length != "caption_length":
            raise ValueError(
                "expected max_tokens for a question, got caption_length: regions are asked for by"
                ' masks or by "task": "regions"'
            )
        options[length] = request.caption_length

        # What the limits bound, and what torch takes as a seed.
        for name in ("caption_length", "steps"):
            expect_at_most(name, options.get(name), getattr(self.limits, name))
        if options["seed"] is not None and not 0 <= options["seed"] < 2**63:
            raise ValueError(f"expected seed from 0 to 2**63 - 1, got {options['seed']}")

        # OpenAI's length is an upper bound: an answer may need less.
        bound = request.max_completion_tokens or request.max_tokens
        shorten = length if options[length] is None and bound is not None else None
        if shorten:
            caption = length == "caption_length"
            limit = self.limits.caption_length if caption else self.limits.new_tokens
            options[length] = min(bound, limit)
        return {name: value for name, value in options.items() if value is not None}, shorten

    def _stops(self, request: ChatRequest) -> list[str] | None:
        stops = [request.stop] if isinstance(request.stop, str) else request.stop
        if not stops:
            return None
        expect_at_most("stop strings", len(stops), MAX_STOPS)
        for stop in stops:
            expect_at_most("characters in a stop string", len(stop), self.limits.stop_characters)
        return stops


def _expect_prompts(prompts: list[str | None] | None, count: int):
    if prompts is None:
        return
    if len(prompts) != count:
        raise ValueError(f"expected prompts for each of {count} masks, got {len(prompts)}")
    if any(text is not None and not text.strip() for text in prompts):
        raise ValueError("expected prompts that are texts or null, got a blank one")


def _image_urls(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return []
    return [part.image_url.url for part in message.content if isinstance(part, ImagePart)]


def _texts(message: Message, masks: bool = False) -> list[str]:
    """Returns a message's texts that are words or, with `masks`, those that spell region masks.

    A content that is one plain string is always words.
    """
    if isinstance(message.content, str):
        return [] if masks else [message.content]
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    return [text for text in texts if (MASKS_TEXT.fullmatch(text) is not None) == masks]


def _masks_of(request: ChatRequest) -> list | None:
    """Returns the masks of the request or its last message; ValueError for more than one kind."""
    last = request.messages[-1]
    given = [request.masks, _mask_parts(last) or None, *map(_masks_in, _texts(last, masks=True))]
    found = [masks for masks in given if masks is not None]
    if len(found) > 1:
        raise ValueError("expected masks in one place, got them in two")
    return found[0] if found else None


def _mask_parts(message: Message) -> list:
    if isinstance(message.content, str):
        return []
    return [part.mask for part in message.content if isinstance(part, MaskPart)]


def _masks_in(text: str) -> list:
    try:
        content = json.loads(without_mark(text), parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("expected masks as flat JSON, got deeply nested JSON") from error
    except ValueError as error:
        raise ValueError(f"expected masks as JSON in the text, got: {error}") from error
    if set(content) != {"masks"} or not isinstance(content["masks"], list):
        raise ValueError('expected {"masks": [...]} as JSON in the text')
    return content["masks"]


def _no_constant(name: str):
    raise ValueError(f"expected finite numbers, got {name}")


def _template_message(message: Message) -> dict:
    """Returns a message for the chat template: its images first, as the model has learned it."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    images = [{"type": "image"} for _ in _image_urls(message)]
    text = "\n".join(_texts(message)).strip()
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}
