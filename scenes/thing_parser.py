"""Reads captions of things: recognizes the grammar's sentences, and finds facts in any text.

A text is cut into words and marks. From left to right the longest known phrase (a name, a size, the
wording of a place, a relation or a state) becomes one symbol; the row of symbols is looked up among
the templates. Nothing is generated, so that the reader is no mirror of the writer.

A *mixture* is a text of the grammar's own words that is no sentence of it and has parts of several
wordings. A part is two or three symbols in a row. Either no template has all of the text's parts
that some template has ("A cat there is at the top": the middle is of another template than the
ends), or beside such parts stand loose words of phrases that are nowhere whole ("partly visible").
A text that merely breaks off, or has a word that is not the grammar's, is none.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

from .thing_grammar import (
    CUTS,
    HIDDEN,
    IMAGE,
    LABELS,
    PLACES,
    RELATIONS,
    SIZES,
    TEMPLATES,
    article,
    sentence,
)

_WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*|[^\sa-z0-9]")
_ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class ReadCaption:
    """What a text says. Each value is stated once for every time the text states it."""

    is_grammatical: bool
    is_mixture: bool
    names: tuple[str, ...]  # concepts, without those that a relation is to
    sizes: tuple[str, ...]
    places: tuple[str, ...]
    hidden: tuple[str, ...]
    cuts: tuple[str, ...]
    relations: tuple[tuple[str, str], ...]  # (kind, other concept)


def _phrases() -> dict[str, list[tuple[tuple[str, ...], str, str]]]:
    """Returns, by the first word, phrases as (words, symbol, value), longest first."""
    rows = [(size, "S", size) for size in SIZES]
    rows += [(name, "N", concept) for concept, names in LABELS.items() for name in names]
    for value, wordings in PLACES.items():
        rows += [(text + end, "P", value) for text in wordings for end in ("", IMAGE)]
    for symbol, table in (("R", RELATIONS), ("H", HIDDEN), ("C", CUTS)):
        rows += [(text, symbol, value) for value, texts in table.items() for text in texts]

    by_word = defaultdict(list)
    for text, symbol, value in rows:
        words = tuple(_WORD.findall(text))
        by_word[words[0]].append((words, symbol, value))
    for phrases in by_word.values():
        phrases.sort(key=lambda phrase: len(phrase[0]), reverse=True)
    return dict(by_word)


_PHRASES = _phrases()
_SKELETONS = {tuple(template.split()) for template in TEMPLATES}
_SYMBOLS = {symbol for row in _SKELETONS for symbol in row} | set(_ARTICLES)
_LOOSE_WORDS = {
    word for phrases in _PHRASES.values() for words, _, _ in phrases for word in words
} - _SYMBOLS


def _parts(row: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Returns every two and every three symbols in a row, the text's ends counted as symbols."""
    framed = ("^", *row, "$")
    return [framed[i : i + n] for n in (2, 3) for i in range(len(framed) - n + 1)]


def _owners() -> dict[tuple[str, ...], frozenset]:
    """Returns which templates have a part."""
    owners = defaultdict(set)
    for row in _SKELETONS:
        for part in _parts(row):
            owners[part].add(row)
    return {part: frozenset(rows) for part, rows in owners.items()}


_OWNERS = _owners()


def _chunks(words: list[str]) -> list[tuple[str, str, str]]:
    """Cuts words into (symbol, value, text); a word of no phrase is its own symbol."""
    chunks, i = [], 0
    while i < len(words):
        for phrase, symbol, value in _PHRASES.get(words[i], ()):
            if tuple(words[i : i + len(phrase)]) == phrase:
                chunks.append((symbol, value, " ".join(phrase)))
                i += len(phrase)
                break
        else:
            chunks.append((words[i], words[i], words[i]))
            i += 1
    return chunks


def _with_others(chunks: list[tuple[str, str, str]]) -> tuple[list[tuple[str, str, str]], bool]:
    """Joins "R, article, N" to "R O", makes articles "A"; tells whether each article is right."""
    joined, right, i = [], True, 0
    while i < len(chunks):
        symbol, value, text = chunks[i]
        after = chunks[i + 1] if i + 1 < len(chunks) else ("", "", "")
        if symbol in ("a", "an"):
            right &= after[0] in ("N", "S") and text == article(after[2])

        is_other = symbol in _ARTICLES and after[0] == "N" and bool(joined) and joined[-1][0] == "R"
        if is_other:
            joined.append(("O", after[1], f"{text} {after[2]}"))
        else:
            named = "A" if symbol in ("a", "an") else "H" if symbol == "C" else symbol
            joined.append((named, value, text))
        i += 2 if is_other else 1
    return joined, right


def read_caption(text: str | None) -> ReadCaption:
    """Reads what a text says, whether it is a sentence of the grammar, and whether a mixture."""
    text = (text or "").strip()
    chunks = _chunks(_WORD.findall(text.lower()))
    joined, articles_right = _with_others(chunks)
    row = tuple(symbol for symbol, _, _ in joined)
    grammatical = (
        articles_right and row in _SKELETONS and text == sentence(part for _, _, part in joined)
    )

    def values(symbol: str, of) -> tuple[str, ...]:
        return tuple(value for name, value, _ in of if name == symbol)

    return ReadCaption(
        is_grammatical=grammatical,
        is_mixture=row not in _SKELETONS and _is_mixture(row),
        names=values("N", joined),
        sizes=values("S", chunks),
        places=values("P", chunks),
        hidden=values("H", chunks),
        cuts=values("C", chunks),
        relations=tuple(
            (joined[i][1], joined[i + 1][1])
            for i in range(len(joined) - 1)
            if joined[i][0] == "R" and joined[i + 1][0] == "O"
        ),
    )


def _is_mixture(row: tuple[str, ...]) -> bool:
    """Tells whether a row that is no template's has parts of several wordings."""
    known = [_OWNERS[part] for part in _parts(row) if part in _OWNERS]
    if not known or not set(row) <= _SYMBOLS | _LOOSE_WORDS:
        return False
    return not frozenset.intersection(*known) or not _LOOSE_WORDS.isdisjoint(row)
