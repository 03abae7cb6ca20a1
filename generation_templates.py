"""Templates: responses whose text is given but for fields, which are denoised.

    "a {color:1-2} {} made of {1-4}"       fixed text stays as it is; each field is denoised

    {}       up to `DEFAULT_LENGTH` tokens         {3}        exactly three tokens
    {1-4}    one to four tokens                    {red|blue} one of these texts
    {name}, {name:3}, {name:1-4}, {name:red|blue}  the same, by name
    {{ }}    a brace

Of a field of several lengths each is tried in one batch, and the likeliest by mean log-probability
is kept; of several texts the likeliest is.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from .image_loading import describe
from .processing_sequence import control_ids, encode_text

DEFAULT_LENGTH = 4  # tokens of a field that says nothing, at most
MAX_LENGTH = 1024  # tokens of a field
MAX_CHOICES = 256  # texts of a field
MAX_LENGTHS = 64  # combinations of lengths of one template

LENGTHS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
# A brace that stands for itself, a field, or a brace that is neither.
PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Field(NamedTuple):
    """Describes a field of a template: of so many tokens, or one of some texts."""

    name: str | None
    min_length: int = 1
    max_length: int = DEFAULT_LENGTH
    choices: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Field":
        """Reads what stands between a field's braces; raises ValueError for anything else."""
        name, colon, kind = text.partition(":")
        if not colon and not name.isidentifier():
            name, kind = "", text
        elif not name.isidentifier():
            raise ValueError(f"expected a field's name as an identifier, got {name!r} in {text!r}")

        if "|" in kind:
            return cls.of_choices(name or None, kind.split("|"))
        if not kind:
            return cls(name or None)
        lengths = LENGTHS.fullmatch(kind)
        if lengths is None:
            raise ValueError(
                "expected a field as {}, {3}, {1-4}, {red|blue} or {name:1-4}, got"
                f" {'{' + text[:80] + '}'!r}; a brace in the text is written twice"
            )
        low = int(lengths[1])
        high = int(lengths[2] or lengths[1])
        if not 1 <= low <= high <= MAX_LENGTH:
            raise ValueError(
                f"expected a field's lengths from 1 to {MAX_LENGTH}, the smaller first, got {kind}"
            )
        return cls(name or None, low, high)

    @classmethod
    def of_choices(cls, name: str | None, choices: Sequence[str]) -> "Field":
        """Makes a field that is one of some texts; raises ValueError for what are none."""
        are_texts = all(isinstance(choice, str) and choice.strip() for choice in choices)
        if (
            not choices
            or not are_texts
            or len(set(choices)) < len(choices)
            or len(choices) > MAX_CHOICES
        ):
            raise ValueError(
                f"expected 1 to {MAX_CHOICES} different texts to choose from, none blank, got"
                f" {describe(list(choices))}"
            )
        return cls(name, choices=tuple(choices))


@dataclass(frozen=True)
class Template:
    """Holds a response's fixed texts and the fields between them.

    Attributes:
        texts: one more than there are fields.
        fields: between the texts.
        keys: of a JSON object, with the fields of each value in order; None of a plain text.
    """

    texts: tuple[str, ...]
    fields: tuple[Field, ...]
    keys: tuple[tuple[str, "Template"], ...] | None = None

    @classmethod
    def parse(cls, template) -> "Template":
        """Reads a template: a text, or a dict whose values are templates or lists of texts.

        Raises ValueError for a template without a field, or with a field that is none.
        """
        if isinstance(template, Template):
            return template
        if isinstance(template, dict):
            return cls._of_json(template)
        if not isinstance(template, str):
            raise ValueError(f"expected a template as text or dict, got {describe(template)}")
        parsed = cls._of_text(template)
        if not parsed.fields:
            raise ValueError(f"expected a template with a field, got {template[:80]!r}")

        names = [own.name for own in parsed.fields if own.name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"expected a name for each field, got {names}")
        combinations = parsed.num_lengths
        if combinations > MAX_LENGTHS:
            raise ValueError(
                f"expected at most {MAX_LENGTHS} combinations of lengths, got {combinations}: give"
                " some fields one length, say {3}"
            )
        return parsed

    @classmethod
    def _of_text(cls, template: str) -> "Template":
        texts, end = [""], 0
        fields: list[Field] = []
        for piece in PIECE.finditer(template):
            texts[-1] += template[end : piece.start()]
            end = piece.end()
            if piece[0] in ("{{", "}}"):
                texts[-1] += piece[0][0]
            elif piece[1] is None:
                raise ValueError(
                    f"expected braces in pairs, a brace of the text twice, got {template[:80]!r}"
                )
            else:
                fields.append(Field.parse(piece[1]))
                texts.append("")
        texts[-1] += template[end:]
        return cls(tuple(texts), tuple(fields))

    @classmethod
    def _of_json(cls, template: dict) -> "Template":
        """Makes the template of a flat JSON object."""
        if not template or not all(isinstance(key, str) for key in template):
            raise ValueError(f"expected a dict with texts as keys, got {describe(template)}")

        # What stands before and between the values, and the values' own texts, as JSON writes them.
        texts = ["{"]
        fields: list[Field] = []
        keys: list[tuple[str, Template]] = []
        for key, given in template.items():
            if isinstance(given, (list, tuple)):
                value = cls(("", ""), (Field.of_choices(None, given),))
            elif isinstance(given, str):
                value = cls._of_text(given)
            else:
                raise ValueError(
                    f"expected a template or a list of texts for {key!r}, got {describe(given)}"
                )
            keys.append((key, value))
            texts[-1] += f'{", " if len(keys) > 1 else ""}{json.dumps(key, ensure_ascii=False)}: "'
            escaped = [json.dumps(text, ensure_ascii=False)[1:-1] for text in value.texts]
            texts[-1] += escaped[0]
            texts += escaped[1:]
            fields += value.fields
            texts[-1] += '"'
        texts[-1] += "}"
        if not fields:
            raise ValueError(f"expected a template with a field, got {describe(template)}")
        made = cls(tuple(texts), tuple(fields), tuple(keys))
        if made.num_lengths > MAX_LENGTHS:
            raise ValueError(
                f"expected at most {MAX_LENGTHS} combinations of lengths, got {made.num_lengths}"
            )
        return made

    @property
    def num_lengths(self) -> int:
        """Counts the combinations of lengths."""
        count = 1
        for own in self.fields:
            count *= 1 if own.choices else own.max_length - own.min_length + 1
        return count

    def lengths(self) -> list[tuple[int, ...]]:
        """Lists the combinations of the fields' lengths; 0 for fields of texts."""
        ranges = [
            (0,) if own.choices else range(own.min_length, own.max_length + 1)
            for own in self.fields
        ]
        return list(itertools.product(*ranges))

    def text(self, values: Sequence[str]) -> str:
        """Fills the fields with values."""
        if self.keys is not None:
            values = [json.dumps(value, ensure_ascii=False)[1:-1] for value in values]
        pairs = zip(self.texts, [*values, ""], strict=True)
        return "".join(text + value for text, value in pairs)

    def named(self, values: Sequence[str]) -> list[str] | dict:
        """Gives the values as the caller sees them.

        That is a list; a dict where fields have names, unnamed ones by their place; of a JSON
        template what its keys hold.
        """
        if self.keys is not None:
            found, rest = {}, list(values)
            for key, value in self.keys:
                own, rest = rest[: len(value.fields)], rest[len(value.fields) :]
                found[key] = value.text(own)
            return found
        if all(own.name is None for own in self.fields):
            return list(values)
        return {
            (k if own.name is None else own.name): value
            for k, (own, value) in enumerate(zip(self.fields, values, strict=True))
        }


@dataclass(frozen=True)
class TemplateSlot:
    """Holds the token ids of a template, each field at one length.

    Attributes:
        ids: the response: fixed tokens, masks where a field is open, end-of-turn at its end.
        spans: where each field's tokens stand.
    """

    ids: list[int]
    spans: tuple[range, ...]


class TemplateEncoder:
    """Turns templates into token ids, and token ids into their fields' values.

    Args:
        tokenizer: the processor's.
        mask_token_id, eot_token_id: the `[MASK]`, and what ends a response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, mask_token_id: int, eot_token_id: int):
        self.tokenizer = tokenizer
        self.mask_token_id = mask_token_id
        self.eot_token_id = eot_token_id

    def slot(
        self,
        template: Template,
        lengths: Sequence[int],
        chosen: dict[int, str] | None = None,
    ) -> TemplateSlot:
        """Encodes a template with its fields at some lengths.

        `chosen` says which of its texts a field has. A space before a field belongs to the field's
        first token, as tokenizers write words.
        """
        ids: list[int] = []
        spans = []
        for k, own in enumerate(template.fields):
            ids += encode_text(self.tokenizer, template.texts[k].rstrip(" "))
            content = [self.mask_token_id] * lengths[k]
            if own.choices and chosen is not None and k in chosen:
                content = self.choice_ids(template, k, chosen[k])
            spans.append(range(len(ids), len(ids) + len(content)))
            ids += content
        ids += encode_text(self.tokenizer, template.texts[-1])
        return TemplateSlot([*ids, self.eot_token_id], tuple(spans))

    def choice_ids(self, template: Template, k: int, choice: str) -> list[int]:
        """Encodes one of the texts of field number k, in the place where it stands."""
        before = template.texts[k]
        space = " " if before.endswith(" ") else ""
        if template.keys is not None:
            choice = json.dumps(choice, ensure_ascii=False)[1:-1]
        return encode_text(self.tokenizer, space + choice)

    def values(
        self, template: Template, slot: TemplateSlot, ids: Sequence[int], chosen: dict[int, str]
    ) -> list[str]:
        """Decodes each field's value from the ids of a whole response."""
        return [
            chosen[k] if own.choices else self.tokenizer.decode(ids[span.start : span.stop]).strip()
            for k, (own, span) in enumerate(zip(template.fields, slot.spans, strict=True))
        ]

    def suppressed(self, is_json: bool) -> list[int]:
        """Lists the ids that no field may hold.

        These are control tokens, and ids without a text; in JSON also what would end a text there.
        """
        known = len(self.tokenizer)
        ids = control_ids(self.tokenizer) | {self.tokenizer.unk_token_id} - {None}
        if is_json:
            texts = self.tokenizer.batch_decode([[i] for i in range(known)])
            ids |= {i for i, text in enumerate(texts) if _breaks_json(text)}
        return sorted(i for i in ids if i is not None)


def _breaks_json(text: str) -> bool:
    return any(c in '"\\' or ord(c) < 32 for c in text)


def pair_templates(template, counts: Sequence[int], is_single: bool = False) -> list[list]:
    """Pairs each response with its template: one for all, or nested as the region masks are.

    Args:
        template: a text or dict for all; a list with one for each image; or one with lists, for
            each region of each image.
        counts: the responses of each image.
        is_single: there is one image that did not come in a list.

    Raises ValueError for another number of templates.
    """
    if not isinstance(template, (list, tuple)):
        parsed = Template.parse(template)
        return [[parsed] * count for count in counts]
    nested = list(template)
    if is_single and not any(isinstance(entry, (list, tuple)) for entry in nested):
        nested = [nested]
    if len(nested) != len(counts):
        raise ValueError(f"expected templates of {len(counts)} images, got {len(nested)}")

    paired = []
    for own, count in zip(nested, counts, strict=True):
        given = list(own) if isinstance(own, (list, tuple)) else [own] * count
        if len(given) != count:
            raise ValueError(f"expected a template for each of {count} regions, got {len(given)}")
        paired.append([Template.parse(one) for one in given])
    return paired
