"""Drops captions that teach a model what it should not say.

The rules run in the order of `RULES`, each on what the ones before it have left.

| rule | drops a region when its caption | option |
|---|---|---|
| empty | has no text in it | |
| short, long | has fewer, or more, words | `min_words`, `max_words` |
| ngrams | repeats itself: a share of its n-grams stood before | `ngram`, `max_repeated_ngrams` |
| sentences | has a sentence again that stood before in it | `max_repeated_sentences` |
| pattern | holds what captioners say when they do not caption | `patterns`, `more_patterns` |
| language | is in another language | `language` |
| copy | is (nearly) that of another region of the image, which is surer | `max_overlap` |
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from ..common.option_checks import expect_one_of, expect_positive, expect_share
from .languages import LANGUAGES, problem_with_language
from .records import Record, Region, Stage, drop_where

# What captioners say instead of a caption, or beside one: refusals, talk about themselves, about
# the crop, the mask or the prompt, text that was cut out of a web page, and markup.
PATTERNS = [
    r"\bas an? (ai|artificial intelligence|language model|assistant)\b",
    r"\bi('m| am) (sorry|unable|not able)\b",
    r"\bi (can ?not|can't|don't|do not|am) (see|tell|determine|identify|provide|describe)\b",
    r"\b(cannot|can't|unable to|impossible to|difficult to) (be )?(determine|identify|tell)",
    r"\b(the|this) (provided|given|uploaded|cropped|attached) (image|picture|photo|crop|region)\b",
    r"\b(red|green|blue|yellow|white|black)?\s*(bounding box|outline[ds]? region|contour)\b",
    r"\b(highlighted|masked|marked|segmented|outlined) (region|area|object|part|by)\b",
    r"\b(binary|segmentation|region) mask\b",
    r"\b(sure|certainly|of course)[,!] here\b",
    r"\bhere('s| is) (a|the) (detailed )?(caption|description)\b",
    r"\blet me know if\b",
    r"https?://|www\.|<[a-z/][^>]*>|\[/?inst\]|<\||\|>",
    r"^\s*(caption|description|answer|assistant|user)\s*:",
    r"\bstock (photo|image)\b|\bgetty images\b|\bshutterstock\b",
]


@dataclass(frozen=True)
class TextOptions:
    """Which captions are dropped."""

    min_words: int = 3
    max_words: int = 150
    ngram: int = 4  # words of an n-gram
    max_repeated_ngrams: float = 0.2  # share of the n-grams that stood before in the caption
    max_repeated_sentences: int = 0
    patterns: list[str] = field(default_factory=lambda: list(PATTERNS))  # case does not matter
    more_patterns: list[str] = field(default_factory=list)  # beside those of `patterns`
    language: str | None = "en"  # what captions have to be in; none: any
    # Of two captions of an image, the words that both have over the words that either has; with
    # more the less sure one goes. 1 keeps even equal ones.
    max_overlap: float = 0.9

    def __post_init__(self):
        expect_positive("texts.min_words", self.min_words)
        expect_positive("texts.ngram", self.ngram)
        expect_share("texts.max_repeated_ngrams", self.max_repeated_ngrams)
        expect_share("texts.max_overlap", self.max_overlap)

        if self.max_words < self.min_words:
            raise ValueError(
                "expected texts.min_words of at most texts.max_words, got"
                f" {self.min_words} and {self.max_words}"
            )
        if self.max_repeated_sentences < 0:
            raise ValueError(
                "expected texts.max_repeated_sentences of 0 or more, got"
                f" {self.max_repeated_sentences}"
            )

        if self.language is not None:
            expect_one_of("texts.language", self.language, tuple(LANGUAGES))
        for pattern in [*self.patterns, *self.more_patterns]:
            _compiled(pattern)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(
            f"expected a regular expression in texts.patterns, got {pattern!r}: {error}"
        ) from error


class TextFilters(Stage):
    """Applies all rules to each record."""

    name = "texts"

    def __init__(self, options: TextOptions | None = None):
        self.options = options or TextOptions()

    def __call__(self, records: list[Record]) -> list[Record]:
        for record in records:
            for rule, problem_of in RULES.items():
                drop_where(record, self.name, rule, lambda r, p=problem_of: p(r, self.options))
            reasons = copies(record.regions, self.options.max_overlap)
            record.drop(self.name, "copy", reasons)
        return records


def words_of(text: str) -> list[str]:
    """Returns a text's words in lower case; every character of Chinese or Japanese is one."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+(?:['’-][^\W_]+)*", text.lower())


# One caption by itself: what is wrong with it, or None.


def _empty(region: Region, options: TextOptions) -> str | None:
    is_empty = region.caption is None or not region.caption.strip()
    return f"expected a caption with text in it, got {region.caption!r}" if is_empty else None


def _short(region: Region, options: TextOptions) -> str | None:
    count = len(words_of(region.caption))
    if count >= options.min_words:
        return None
    return f"expected {options.min_words} words or more, got {count}"


def _long(region: Region, options: TextOptions) -> str | None:
    count = len(words_of(region.caption))
    if count <= options.max_words:
        return None
    return f"expected {options.max_words} words or less, got {count}"


def _ngrams(region: Region, options: TextOptions) -> str | None:
    share = repeated_ngrams(region.caption, options.ngram)
    if share <= options.max_repeated_ngrams:
        return None
    return (
        f"expected {options.max_repeated_ngrams:g} of its {options.ngram}-grams repeated or less,"
        f" got {share:.3f}"
    )


def repeated_ngrams(text: str, n: int) -> float:
    """Returns the share of a text's n-grams of words that stood before in it."""
    words = words_of(text)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _sentences(region: Region, options: TextOptions) -> str | None:
    repeated = repeated_sentences(region.caption)
    if len(repeated) <= options.max_repeated_sentences:
        return None
    return (
        f"expected {options.max_repeated_sentences} repeated sentences or less, got"
        f" {len(repeated)}: {repeated[0]!r:.80}"
    )


def repeated_sentences(text: str) -> list[str]:
    """Returns the sentences that stood before in a text, each as often as it comes again."""
    sentences = [" ".join(words_of(part)) for part in re.split(r"[.!?。！？\n]+", text)]
    counts = Counter(filter(None, sentences))
    return [sentence for sentence, count in counts.items() for _ in range(count - 1)]


def _pattern(region: Region, options: TextOptions) -> str | None:
    for pattern in [*options.patterns, *options.more_patterns]:
        if found := _compiled(pattern).search(region.caption):
            return f"expected a caption alone, got {found[0]!r:.80}"
    return None


def _language(region: Region, options: TextOptions) -> str | None:
    if options.language is None:
        return None
    return problem_with_language(region.caption, words_of(region.caption), options.language)


RULES = {
    "empty": _empty,
    "short": _short,
    "long": _long,
    "ngrams": _ngrams,
    "sentences": _sentences,
    "pattern": _pattern,
    "language": _language,
}


# Captions of one image against each other.


def copies(regions: list[Region], max_overlap: float) -> dict[str, str]:
    """Finds captions that say of two regions what is true of one at most: reasons by region key.

    The surer caption stays; of equally sure ones the first.
    """

    def sureness(region: Region) -> float:
        return float("-inf") if region.score is None else region.score

    kept: list[tuple[Region, set]] = []
    reasons: dict[str, str] = {}
    for region in sorted(regions, key=sureness, reverse=True):
        words = set(words_of(region.caption))
        for other, others in kept:
            overlap = len(words & others) / max(len(words | others), 1)
            if overlap > max_overlap:
                reasons[region.key] = (
                    f"expected at most {max_overlap:g} of its words with the caption of"
                    f" {other.key}, got {overlap:.3f}"
                )
                break
        else:
            kept.append((region, words))
    return reasons
