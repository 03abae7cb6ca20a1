"""Makes samples of conversations about images: each assistant turn, with the turns before it."""

from ..processing_perceptiondlm import PerceptionDLMProcessor
from .recipe_sections import ConversationData
from .records import Record, count_answers
from .regions import image_path
from .samples import Sample

PLACEHOLDER = "<image>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def turns_of(record: Record) -> list[tuple[str, str]]:
    """Reads (role, text) of each turn, from LLaVA's `conversations` or from `messages`."""
    found = []
    for turn in record.get("conversations", "messages"):
        if not isinstance(turn, dict):
            raise ValueError(f"expected a turn with a role and text, got {turn!r}")
        role = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"expected a turn from one of {', '.join(ROLES)}, got {role!r}")
        if not isinstance(text, str):
            raise ValueError(f"expected a turn's text, got {type(text).__name__}")
        found.append((ROLES[role], text))

    if found and next((role for role, _ in found if role != "system"), None) == "assistant":
        raise ValueError("expected a turn of the user before the first of the assistant, got none")
    return found


def placeholders_of(turn: tuple[str, str]) -> int:
    """Counts a turn's placeholders of images; what the assistant says holds none."""
    role, text = turn
    return 0 if role == "assistant" else text.count(PLACEHOLDER)


def message_of(role: str, text: str) -> dict:
    """Turns a turn into a message of the chat template.

    The newline after a placeholder is the template's own.
    """
    if role == "assistant":
        return {"role": role, "content": [{"type": "text", "text": text}]}
    before, *after = text.split(PLACEHOLDER)
    content = [{"type": "text", "text": before}] if before else []
    for part in after:
        part = part.removeprefix("\n")
        content += [{"type": "image"}, *([{"type": "text", "text": part}] if part else [])]
    return {"role": role, "content": content}


class ConversationSamples:
    """Makes samples of records with `conversations` and, for images, `image` or `images`."""

    def __init__(self, processor: PerceptionDLMProcessor, data: ConversationData):
        self.processor = processor
        self.data = data

    count = staticmethod(count_answers)

    def samples_of(self, count: int) -> int:
        """Counts the samples of a record: one for each assistant turn."""
        return count

    def length(self, count: int, number: int) -> int:
        """Estimates a sample's length: later turns have more before them."""
        return number

    def make(self, record: Record, number: int, rng, key: tuple, epoch: int) -> Sample:
        """Makes the sample of assistant turn `number`, after all the turns before it."""
        turns = turns_of(record)
        targets = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
        if not targets:
            raise ValueError("expected an assistant turn, got none")
        images = self._images(record)

        turns = self._with_placeholders(turns, len(images))
        context, answer = turns[: targets[number]], turns[targets[number]][1].strip()
        if not answer:
            raise ValueError("expected an answer with text in it, got an empty one")

        # images of the turns that come after the answer are not shown
        used = sum(map(placeholders_of, context))
        features = {}
        if used:
            limits = [1 if used > 1 else None] * used
            features = self.processor.image_processor(images[:used], max_tiles=limits)

        messages = [message_of(role, text) for role, text in context]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        sequence = self.processor.chat_sequence(
            text, features, answer=answer, max_new_tokens=self.data.answer_length
        )
        self._check_length(sequence)
        return Sample(sequence, dict(features), key)

    def _images(self, record: Record) -> list:
        """Returns a record's images: embedded bytes, or paths."""
        if record.images:
            return record.images
        named = record.values.get("images", record.values.get("image"))
        named = [] if named is None else named if isinstance(named, list) else [named]
        return [image_path(name, record, self.data.image_root) for name in named]

    def _with_placeholders(self, turns: list, images: int) -> list:
        """Puts images that no turn has a placeholder for before the first user turn."""
        placed = sum(map(placeholders_of, turns))
        if placed not in (0, images):
            raise ValueError(f"expected {PLACEHOLDER!r} for each of {images} images, got {placed}")
        first = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
        if placed == images or first is None:
            return turns
        role, text = turns[first]
        opened = (role, f"{PLACEHOLDER}\n" * images + text)
        return [*turns[:first], opened, *turns[first + 1 :]]

    def _check_length(self, sequence):
        """Refuses a sequence of too many tokens, images not counted."""
        image = self.processor.image_token_id
        tokens = sum(token != image for token in sequence.ids)
        if tokens > self.data.max_text_tokens:
            raise ValueError(
                f"expected at most {self.data.max_text_tokens} text tokens, got {tokens}"
            )
