"""Text of users to token ids: what a user writes is text, whatever it spells.

A tokenizer turns the text of an added token, say `<|eot_id|>`, into that token wherever it stands.
Captions, answers and instructions are therefore encoded without added tokens. In a prompt, where a
template's control tokens and a user's text stand side by side, the user's text is escaped before
the template is rendered, and what is escaped is encoded without added tokens:

    "a <|eot_id|>"  ->  "a {<}|eot_id|>"  ->  "<|start_header_id|>user...a {<}|eot_id|><|eot_id|>"

Here {<} stands for the escape of "<": a Unicode noncharacter and the code point in six more.
"""

import re

from transformers import PreTrainedTokenizerFast

ESCAPE = "\ufdd0"
DIGITS = "".join(chr(0xFDD1 + value) for value in range(16))
# up to 10ffff, the last code point
ESCAPED = re.compile(f"{ESCAPE}((?:{DIGITS[0]}[{DIGITS}]|{DIGITS[1]}{DIGITS[0]})[{DIGITS}]{{4}})")
MEDIA_KEYS = ("type", "image", "image_url", "url", "path", "base64")  # parts that are not text


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encodes a user's text, in which nothing is a control token.

    Raises ValueError where the tokenizer's vocabulary itself makes one of plain text.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    added = control_ids(tokenizer)
    if added.isdisjoint(ids):
        return ids
    # the tokenizer's own steps but for its first, which looks for added tokens
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    pieces = [text]
    if backend.pre_tokenizer is not None:
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    ids = [token.id for piece in pieces for token in backend.model.tokenize(piece)]
    if not added.isdisjoint(ids):
        raise ValueError(
            "expected text that the tokenizer can write without control tokens, got one in"
            f" {text[:80]!r}"
        )
    return ids


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, text: str, add_special_tokens: bool = False
) -> list[int]:
    """Encodes a rendered prompt: what is escaped is a user's text, all else as usual."""
    text = settle(tokenizer, text)
    if not ESCAPED.search(text):
        return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    added = control_ids(tokenizer)
    before, ids, after, end, inside = [], [], [], 0, False
    for token, span, place in zip(
        encoding["input_ids"], encoding["offset_mapping"], encoding.sequence_ids(), strict=True
    ):
        inside = inside or place is not None
        if place is None:  # the tokenizer's own, around the text
            (after if inside else before).append(token)
        elif token in added:
            ids += [*encode_text(tokenizer, unescape(text[end : span[0]])), token]
            end = span[1]
    return [*before, *ids, *encode_text(tokenizer, unescape(text[end:])), *after]


def control_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids that no user's text may become: all added tokens but the unknown one."""
    return set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}


def escape(tokenizer: PreTrainedTokenizerFast, value):
    """Escapes the first character of every added token in a text, so that none begins there.

    Takes a conversation too, in which all texts are escaped but those that name images.
    """
    if isinstance(value, str):
        starts = {token.content[0] for token in tokenizer.added_tokens_decoder.values()}
        starts = {ord(c): _escaped(c) for c in starts | {ESCAPE} if not c.isspace()}
        return value.translate(starts)
    if isinstance(value, dict):
        return {k: v if k in MEDIA_KEYS else escape(tokenizer, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [escape(tokenizer, item) for item in value]
    return value


def unescape(text: str) -> str:
    """Restores what was escaped."""
    return ESCAPED.sub(lambda found: chr(int(found[1].translate(_VALUES), 16)), text)


def settle(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """A rendered prompt without its escapes where it has the same control tokens without them."""
    plain = unescape(text)
    if plain == text:
        return text
    added = control_ids(tokenizer)
    escaped_ids, plain_ids = (
        tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, plain)
    )
    same = [i for i in escaped_ids if i in added] == [i for i in plain_ids if i in added]
    return plain if same and not ESCAPED.search(plain) else text


def _escaped(character: str) -> str:
    return ESCAPE + f"{ord(character):06x}".translate(_DIGITS)


_DIGITS = str.maketrans("0123456789abcdef", DIGITS)
_VALUES = str.maketrans(DIGITS, "0123456789abcdef")
