"""Finds the core category of a caption, and tells whether a caption is of a given category.

By plain rules on words, or by a chat model behind an endpoint or of transformers. Our own model,
which is shown the region too, verifies in `region_verifier`.
"""

import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .captioners import Chat
from .endpoint import Failure, drop_failures, visible_text
from .records import Record, Stage, drop_where
from .text_filters import words_of

MAX_CATEGORY_WORDS = 4  # a longer answer is no category

EXTRACT = """\
Caption of one object: {caption}

Which kind of object is it? Answer with its category alone, as a noun in the singular of one to \
three words."""
VERIFY = """\
Caption of one object: {caption}

Is it likely that this object is of the category "{category}", or a part or kind of it that the \
caption names instead? Answer Yes or No alone."""


# Extractors: for each caption its core category, or a failure.

Extractor = Callable[[list[str]], list[str | Failure]]


class ExtractCategories(Stage):
    """Writes the core category of each caption.

    Rules: "no category" for a caption without one, "call failed" where a later run may get one.
    """

    name = "categories"

    def __init__(self, extractor: Extractor):
        self.extractor = extractor

    def __call__(self, records: list[Record]) -> list[Record]:
        captions = [region.caption for record in records for region in record.regions]
        answers = iter(self.extractor(captions) if captions else [])

        for record in records:
            failures = {}
            for region in record.regions:
                answer = next(answers)
                if isinstance(answer, Failure):
                    failures[region.key] = answer
                else:
                    region.core = answer
            drop_failures(
                record, self.name, "no category", failures, "expected a core category, got: "
            )
        return records


# A head noun stands before what describes it further.
ENDS = frozenset(
    """with without in on at of for from by to into onto under over above below behind near between
    beside against along across around inside outside through that which who whose where while is
    are was were has have had and or but featuring wearing holding standing sitting lying facing
    made covered filled surrounded placed hanging showing displaying containing resting""".split()
)
STARTS = frozenset(
    """a an the this that these those some several many two three four five its his her their
    there is are image picture photo depicts shows""".split()
)
# "a pair of shoes" is shoes.
CONTAINERS = frozenset(
    """pair piece part group set close-up closeup view side image picture photo section portion
    bunch row stack kind type cluster collection number couple""".split()
)


def head_nouns(captions: list[str]) -> list[str | Failure]:
    """Extracts the head of each caption's first noun phrase: "star" of "a blue star on a table".

    A rule of English without a dictionary: a cheap first pass, wrong where a caption begins
    otherwise.
    """
    return [head_noun(caption) or Failure(f"no noun in {caption!r:.80}") for caption in captions]


def head_noun(caption: str) -> str | None:
    """Returns the head of a caption's first noun phrase, None where there is no word for it."""
    first = re.split(r"[,.;:()\n]", caption.strip().lower(), maxsplit=1)[0]
    words = words_of(first)
    while words:
        while words and words[0] in STARTS:
            words = words[1:]
        end = next((i for i, word in enumerate(words) if word in ENDS), len(words))
        head, rest = words[:end], words[end:]
        if head and not (head[-1] in CONTAINERS and rest[:1] == ["of"]):
            return head[-1]
        words = rest[1:]
    return None


class ChatExtractor:
    """Asks a chat model for each caption's core category; equal captions once."""

    def __init__(self, chat: Chat, prompt: str = EXTRACT):
        self.chat = chat
        self.prompt = checked_prompt(prompt, "caption")

    def __call__(self, captions: list[str]) -> list[str | Failure]:
        """Extracts the core category of each caption."""
        asked = [_message(self.prompt.format(caption=caption)) for caption in captions]
        return [_category_of(visible_text(answer)) for answer in self.chat(asked)]


def _category_of(answer: str | Failure) -> str | Failure:
    if isinstance(answer, Failure):
        return answer
    words = words_of(answer)
    if words[:1] and words[0] in ("a", "an", "the"):
        words = words[1:]
    if not 1 <= len(words) <= MAX_CATEGORY_WORDS:
        return Failure(
            f"expected a category of 1 to {MAX_CATEGORY_WORDS} words, got {answer!r:.80}"
        )
    return " ".join(words)


# Verifiers: for each caption and category whether they match, or a failure.

Verifier = Callable[[list[tuple[str, str]]], list[bool | Failure]]


class VerifyCategories(Stage):
    """Drops the regions whose caption is not of their annotated category.

    Rules: "no category" for a region without one, "no answer", "call failed" where a later run may
    get one, and "category".
    """

    name = "verify"

    def __init__(self, verifier: Verifier):
        self.verifier = verifier

    def __call__(self, records: list[Record]) -> list[Record]:
        for record in records:
            drop_where(
                record,
                self.name,
                "no category",
                lambda region: None if region.category else "expected a category, got none",
            )
        answers = self._answers(records)
        for record in records:
            self._drop(record, [next(answers) for _ in record.regions])
        return records

    def _answers(self, records: list[Record]) -> Iterator[bool | Failure]:
        pairs = [(region.caption, region.category) for r in records for region in r.regions]
        return iter(self.verifier(pairs) if pairs else [])

    def _drop(self, record: Record, answers: list[bool | Failure]):
        regions = list(zip(record.regions, answers, strict=True))
        failures = {r.key: a for r, a in regions if isinstance(a, Failure)}
        others = {
            region.key: f"expected a caption of {region.category!r}, got {region.caption!r:.80}"
            for region, answer in regions
            if answer is False
        }
        drop_failures(record, self.name, "no answer", failures)
        record.drop(self.name, "category", others)


@dataclass(frozen=True)
class WordVerifier:
    """Looks for a category's words in the caption, in the singular or the plural.

    Attributes:
        synonyms: per category further names, of which one is enough.
    """

    synonyms: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self, pairs: list[tuple[str, str]]) -> list[bool | Failure]:
        """Tells of each caption whether it names the category."""
        return [self._names(caption, category) for caption, category in pairs]

    def _names(self, caption: str, category: str) -> bool:
        said = words_of(caption)
        names = [category, *self.synonyms.get(category, [])]
        # COCO's own: "wall-other-merged", "playing_card"
        wanted = [re.sub(r"-(other|merged|stuff)", "", name).replace("_", " ") for name in names]
        return any(_holds(said, words_of(name)) for name in wanted)


def _holds(words: list[str], part: list[str]) -> bool:
    starts = range(len(words) - len(part) + 1)
    return any(all(map(same_noun, words[i:], part)) for i in starts)


IRREGULAR = {
    "men": "man",
    "women": "woman",
    "people": "person",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "mice": "mouse",
    "geese": "goose",
    "knives": "knife",
    "leaves": "leaf",
    "shelves": "shelf",
    "loaves": "loaf",
}


def same_noun(one: str, other: str) -> bool:
    """Tells whether two English words may be one noun in the singular or the plural."""
    return not _forms(one).isdisjoint(_forms(other))


def _forms(word: str) -> set[str]:
    found = {word, IRREGULAR.get(word, word)}
    for ending, instead in (("s", ""), ("es", ""), ("ies", "y")):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            found.add(word.removesuffix(ending) + instead)
    return found


class ChatVerifier:
    """Asks a chat model, Yes or No, whether each caption is of its category."""

    def __init__(self, chat: Chat, prompt: str = VERIFY):
        self.chat = chat
        self.prompt = checked_prompt(prompt, "caption", "category")

    def __call__(self, pairs: list[tuple[str, str]]) -> list[bool | Failure]:
        """Tells of each caption whether it is of the category."""
        asked = [
            _message(self.prompt.format(caption=caption, category=category))
            for caption, category in pairs
        ]
        return [_yes_or_no(visible_text(answer)) for answer in self.chat(asked)]


def _yes_or_no(answer: str | Failure) -> bool | Failure:
    if isinstance(answer, Failure):
        return answer
    first = (words_of(answer) or [""])[0]
    if first not in ("yes", "no"):
        return Failure(f"expected Yes or No, got {answer!r:.80}")
    return first == "yes"


def checked_prompt(prompt: str, *names: str) -> str:
    """Returns a prompt; ValueError unless it has exactly the named fields, as `{name}`."""
    try:
        found = {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}
    except ValueError as error:
        raise ValueError(f"expected a prompt with fields in braces, got {error}") from error
    if found != set(names):
        wanted = " and ".join(f"{{{name}}}" for name in names)
        raise ValueError(f"expected {wanted} in the prompt, got {sorted(found) or 'none'}")
    return prompt


def _message(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]
