"""Builds the sequences that the network reads, from token ids, and stacks them into batches.

A sequence is parallel integer lists (ids, positions, region ids, role ids, labels): first its fixed
prompt, then the responses, which are denoised or learned. There are two orders:

    joint   system, image, RoI tokens of all regions, instruction | marker 0, caption 0, ...
    tree    system, image, instruction; RoI tokens, marker 0; RoI tokens, marker 1; ...
                                                                  | caption 0, caption 1, ...

In a tree everything up to the instruction is the trunk and each region a branch, whose positions go
on from the trunk's end. In a batch prompts are padded on the left and responses on the right, so
that every response starts in the same column.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from transformers import PreTrainedTokenizerFast

from .configuration_perceptiondlm import (
    NO_REGION,
    ROLE_CAPTION,
    ROLE_ROI,
    ROLE_SHARED,
    SHARED_REGION,
)

IGNORED_LABEL = -100

# Where the responses stand, see `locate_responses`; the network does not need it.
RESPONSE_INPUTS = ("response_columns", "response_start", "task")


# Texts as token ids. What a user writes never becomes a control token: in a rendered prompt such
# texts are escaped, each first character of an added token written as code points of no character.

ESCAPE = "\ufdd0"
DIGITS = "".join(chr(0xFDD1 + value) for value in range(16))
# Six digits, up to 10ffff, the last code point.
ESCAPED = re.compile(f"{ESCAPE}((?:{DIGITS[0]}[{DIGITS}]|{DIGITS[1]}{DIGITS[0]})[{DIGITS}]{{4}})")
MEDIA_KEYS = ("type", "image", "image_url", "url", "path", "base64")  # parts that are not text

_TO_DIGITS = str.maketrans("0123456789abcdef", DIGITS)
_FROM_DIGITS = str.maketrans(DIGITS, "0123456789abcdef")


def control_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Returns the ids that no user's text may become: all added tokens but the unknown one."""
    return set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encodes a user's text, in which nothing is a control token.

    Raises ValueError where the tokenizer's vocabulary itself makes one of plain text.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    added = control_ids(tokenizer)
    if added.isdisjoint(ids):
        return ids

    # Take the tokenizer's own steps but for its first, which looks for added tokens.
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
    before: list[int] = []
    ids: list[int] = []
    after: list[int] = []
    end, inside = 0, False

    # Keep the control tokens, and encode what stands between them as a user's text.
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


def escape(tokenizer: PreTrainedTokenizerFast, value):
    """Escapes the first character of every added token in a text, so that none begins there.

    Takes a conversation too, in which all texts are escaped but those that name images.
    """
    if isinstance(value, str):
        starts = {token.content[0] for token in tokenizer.added_tokens_decoder.values()}
        escapes = {ord(c): _escaped(c) for c in starts | {ESCAPE} if not c.isspace()}
        return value.translate(escapes)
    if isinstance(value, dict):
        return {k: v if k in MEDIA_KEYS else escape(tokenizer, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [escape(tokenizer, item) for item in value]
    return value


def _escaped(character: str) -> str:
    return ESCAPE + f"{ord(character):06x}".translate(_TO_DIGITS)


def unescape(text: str) -> str:
    """Restores what was escaped."""
    return ESCAPED.sub(lambda found: chr(int(found[1].translate(_FROM_DIGITS), 16)), text)


def settle(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Drops a rendered prompt's escapes where it has the same control tokens without them."""
    plain = unescape(text)
    if plain == text:
        return text

    added = control_ids(tokenizer)
    escaped_ids, plain_ids = (
        tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, plain)
    )
    same = [i for i in escaped_ids if i in added] == [i for i in plain_ids if i in added]
    return plain if same and not ESCAPED.search(plain) else text


# One sequence.


@dataclass
class TokenSequence:
    """Holds one sequence under construction: parallel lists, and where its responses stand.

    Attributes:
        prompt_length: where what is not the prompt's starts.
        slots: where each response stands, in the order of the regions.
        spans: the number of the placeholder, which is the region's prompt, at each run of RoI
            placeholders. Without chosen prompts that is the region's place.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    regions: list[int] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    prompt_length: int = 0
    slots: list[range] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)

    @property
    def trunk_length(self) -> int:
        """Counts the tokens before the first branch; all of a prompt without any."""
        own = self.regions[: self.prompt_length]
        return next((i for i, region in enumerate(own) if region >= 0), len(own))

    def add(self, ids: Sequence[int], *, position: int, region: int, role: int, target=False):
        """Appends `ids` at consecutive positions from `position`; labeled when a `target`."""
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.regions += [region] * len(ids)
        self.roles += [role] * len(ids)
        self.labels += list(ids) if target else [IGNORED_LABEL] * len(ids)


@dataclass(frozen=True)
class SequenceBuilder:
    """Builds the sequences of region groups and of conversations.

    Attributes:
        is_tree: orders a sequence as a tree; else jointly, as the released code does.
        roi_output_size: side of a region's replayed grid; its square is the RoI tokens a region.
        num_region_prompts: the regions that a prompt has placeholders for.
        image_token, mask_token, eot_token, roi_token, caption_token: see `PerceptionDLMProcessor`.
    """

    tokenizer: PreTrainedTokenizerFast
    is_tree: bool
    roi_output_size: int
    num_region_prompts: int
    image_token: str
    mask_token: str
    eot_token: str
    roi_token: str
    caption_token: str

    def token_id(self, token: str) -> int:
        """Returns the id of a special token; ValueError where the vocabulary has none."""
        index = self.tokenizer.convert_tokens_to_ids(token)
        if index is None or index == self.tokenizer.unk_token_id:
            raise ValueError(
                f"expected a tokenizer with the special token {token!r}, got one without"
            )
        return index

    def response_slot(self, text: str, length: int | None, end: bool) -> list[int]:
        """Encodes a response that is to be learned.

        It is padded with end-of-turn to `length`; without one it is closed by it where `end` says
        so, and in a tree. Raises ValueError for a longer one.
        """
        ids = encode_text(self.tokenizer, text)
        if length is None:
            return [*ids, self.token_id(self.eot_token)] if end or self.is_tree else ids
        if len(ids) > length:
            raise ValueError(
                f"expected a text of at most {length} tokens, got {len(ids)}: {text[:80]!r}"
            )
        return ids + [self.token_id(self.eot_token)] * (length - len(ids))

    def masked_slot(self, length: int) -> list[int]:
        """Returns the mask tokens of a response that is to be denoised."""
        return [self.token_id(self.mask_token)] * length

    def roi_placeholders(self, count: int) -> list[str]:
        """Lists the RoI placeholders that the prompt of `count` regions holds; none in a tree."""
        is_without = self.is_tree or not self.roi_output_size
        return [] if is_without else [self.roi_token.format(k) for k in range(count)]

    def region_sequence(
        self,
        prompt: str,
        slots: list[list[int]],
        image_tokens: int,
        prompts: list[int] | None = None,
        questions: list[str] | None = None,
    ) -> TokenSequence:
        """Builds the sequence of a region group.

        Args:
            prompt: rendered, with its placeholders; with `questions` it ends behind the image.
            slots: the ids of each region's response.
            image_tokens: counts the image's tokens.
            prompts: the regions' prompt numbers (default 0, 1, ...), which a tree alone uses.
            questions: what is rendered behind the image for each region, in a tree alone; RoI
                placeholders in them stand for the regions of their numbers.
        """
        ids = encode_prompt(self.tokenizer, prompt)

        # The texts of the prompt must not add placeholders, nor take any away.
        placeholders = len(self.roi_placeholders(len(slots)))
        total = max(self.num_region_prompts, len(slots))
        roi = [self.token_id(self.roi_token.format(k)) for k in range(total)]
        _expect_count(ids, roi, placeholders, "RoI placeholders", self.roi_token)
        image = [self.token_id(self.image_token)]
        _expect_count(ids, image, 1, "image placeholders", self.image_token)

        sequence = self._expand_prompt(ids, [image_tokens], roi)
        if self.is_tree:
            asked = [encode_prompt(self.tokenizer, q) for q in questions or [""] * len(slots)]
            self._add_branches(sequence, slots, prompts or list(range(len(slots))), asked, roi)
        else:
            self._add_captions(sequence, slots)
        return sequence

    def chat_sequence(
        self, ids: list[int], image_tokens: list[int], slot: list[int]
    ) -> TokenSequence:
        """Builds the sequence of a conversation.

        `ids` are the rendered conversation's, `image_tokens` counts the tokens of each image in it
        and `slot` are the answer's ids, none for a prompt alone.
        """
        image = [self.token_id(self.image_token)]
        _expect_count(ids, image, len(image_tokens), "image placeholders", self.image_token)

        # In a tree questions about the same images can share what stands before them.
        sequence = self._expand_prompt(ids, image_tokens, roi=[])
        if self.is_tree:
            self._branch_off(sequence)

        start = len(sequence.ids)
        sequence.add(slot, position=start, region=0, role=ROLE_CAPTION, target=True)
        if slot:
            sequence.slots.append(range(start, start + len(slot)))
        return sequence

    def _expand_prompt(
        self, ids: list[int], image_tokens: list[int], roi: list[int]
    ) -> TokenSequence:
        """Repeats each placeholder as often as it is replaced.

        What stands between two RoI spans is seen by no caption.
        """
        sequence = TokenSequence()
        image_id, counts = self.token_id(self.image_token), iter(image_tokens)
        last = max((i for i, token in enumerate(ids) if token in roi), default=-1)
        seen_roi = False

        for i, token in enumerate(ids):
            region, role, repeats = SHARED_REGION, ROLE_SHARED, 1
            if token == image_id:
                repeats = next(counts)
            elif token in roi:
                region, role, repeats = roi.index(token), ROLE_ROI, self.roi_output_size**2
                sequence.spans.append(region)
                seen_roi = True
            elif seen_roi and i < last:
                region, role = NO_REGION, ROLE_ROI
            position = len(sequence.ids)
            sequence.add([token] * repeats, position=position, region=region, role=role)

        sequence.prompt_length = len(sequence.ids)
        return sequence

    def _add_captions(self, sequence: TokenSequence, slots: list[list[int]]):
        """Adds the marker, caption and newline of each region in turn, end-of-turn last."""
        # As the released model was trained: what ends a caption is predicted too.
        newline = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        for k, slot in enumerate(slots):
            end = newline if k + 1 < len(slots) else [self.token_id(self.eot_token)]
            block = [self.token_id(self.caption_token.format(k)), *slot, *end]
            start = len(sequence.ids)
            sequence.add(block, position=start, region=k, role=ROLE_CAPTION, target=True)
            sequence.slots.append(range(start + 1, start + 1 + len(slot)))  # behind the marker

    def _add_branches(
        self,
        sequence: TokenSequence,
        slots: list[list[int]],
        prompts: list[int],
        questions: list[list[int]],
        roi: list[int],
    ):
        """Adds the fixed tokens of every branch, then every response.

        A branch holds its question, if there is one, its region's RoI tokens and its marker.
        """
        trunk = len(sequence.ids)
        count = self.roi_output_size**2
        ends = []
        for k, (number, question) in enumerate(zip(prompts, questions, strict=True)):
            fixed: list[int] = []
            for token in [*question, self.token_id(self.roi_token.format(number))]:
                is_region = token in roi
                fixed += [token] * (count if is_region else 1)
                if is_region and count:
                    sequence.spans.append(roi.index(token))
            fixed.append(self.token_id(self.caption_token.format(number)))
            sequence.add(fixed, position=trunk, region=k, role=ROLE_ROI)
            ends.append(trunk + len(fixed))
        sequence.prompt_length = len(sequence.ids)

        # Responses stand together behind all branches, but each goes on from its own.
        for k, (slot, position) in enumerate(zip(slots, ends, strict=True)):
            column = len(sequence.ids)
            sequence.add(slot, position=position, region=k, role=ROLE_CAPTION, target=True)
            sequence.slots.append(range(column, column + len(slot)))

    def _branch_off(self, sequence: TokenSequence):
        """Makes what follows the last image of a conversation a branch, as RoI tokens are."""
        image_id = self.token_id(self.image_token)
        columns = [i for i, token in enumerate(sequence.ids) if token == image_id]
        if columns:
            trunk = columns[-1] + 1
            count = len(sequence.ids) - trunk
            sequence.regions[trunk:] = [0] * count
            sequence.roles[trunk:] = [ROLE_ROI] * count


def _expect_count(ids, wanted, count: int, name: str, token: str):
    found = sum(i in wanted for i in ids)
    if found != count:
        raise ValueError(f"expected {count} {name} ({token!r}) in the prompt, got {found}")


# Batches of sequences.


@dataclass(frozen=True)
class Padding:
    """Says how the sequences of a batch become equally long, in transformers' terms.

    Attributes:
        padding: True or "longest"; "max_length" with `max_length`; False where nothing is to be
            padded.
        padding_side: of prompts, "left"; "right" where no response follows them.
        pad_to_multiple_of: pads on to a multiple of so many tokens.
        truncation, max_length: sequences beyond `max_length` are refused, never cut, unless
            `truncation` is False.
    """

    padding: bool | str = True
    padding_side: str = "left"
    pad_to_multiple_of: int | None = None
    truncation: bool | str | None = None
    max_length: int | None = None

    def __post_init__(self):
        to_length = ("max_length",) if self.max_length else ()
        truncation = (False, "do_not_truncate", True, "longest_first", "only_first")
        expect_one_of("padding", self.padding, (True, "longest", False, "do_not_pad", *to_length))
        expect_one_of("padding_side", self.padding_side, ("left", "right"))
        expect_one_of("truncation", self.truncation, (None, *truncation))
        expect_positive(pad_to_multiple_of=self.pad_to_multiple_of, max_length=self.max_length)

    @property
    def min_length(self) -> int:
        """Returns the tokens to which every sequence is padded at least."""
        return (self.max_length or 0) if self.padding == "max_length" else 0

    def check_lengths(self, lengths: list[int], max_known: int):
        """Refuses sequences that would have to be cut, or padded without leave.

        `max_known` bounds them where there is to be truncation, but `max_length` does not say.
        """
        bound = self.max_length or (max_known if self.truncation else None)
        truncates = self.truncation not in (False, "do_not_truncate")
        if truncates and bound is not None and max(lengths) > bound:
            raise ValueError(
                f"expected sequences of at most max_length {bound} tokens, got {max(lengths)}:"
                " cutting one could cut its images or its answer"
            )
        if self.padding in (False, "do_not_pad") and len(set(lengths)) > 1:
            raise ValueError(
                f"expected padding True or 'longest' for lengths {sorted(set(lengths))},"
                f" got {self.padding!r}"
            )


def expect_one_of(name: str, value, allowed: tuple):
    """Raises ValueError for a value that is none of those allowed."""
    value = value.value if isinstance(value, Enum) else value  # transformers' own names
    if not isinstance(value, (bool, str, type(None))) or value not in allowed:
        raise ValueError(f"expected {name} {allowed[0]!r} or {allowed[1]!r}, got {value!r}")


def expect_positive(**options):
    """Raises ValueError for an option that is neither None nor an integer from 1 on."""
    for name, value in options.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"expected {name} of at least 1, got {value!r}")


def pad_sequences(
    sequences: list[TokenSequence],
    pad_id: int,
    with_labels: bool,
    padding: Padding = Padding(),  # noqa: B008 (it is frozen)
    align_trunks: bool = False,
) -> dict:
    """Stacks sequences into int64 (B, L): prompts padded on the left, responses on the right.

    With `align_trunks` a prompt is padded between its trunk and its branches, too, so that the
    trunks of all rows end in one column.
    """
    if align_trunks:
        return _stack_aligned(sequences, pad_id)
    side = padding.padding_side
    # Columns before and after the one in which all responses start.
    left = max(s.prompt_length for s in sequences)
    right = max(len(s.ids) - s.prompt_length for s in sequences)
    left = max(left, padding.min_length - right)
    left += -(left + right) % (padding.pad_to_multiple_of or 1)
    if side == "right" and right:
        raise ValueError("expected padding_side 'left' with answers, got 'right'")

    def stack(values, before: int, after: int) -> torch.Tensor:
        rows = []
        for s, row in zip(sequences, values, strict=True):
            fill = [before] * (left - s.prompt_length)
            if side == "right":
                rows.append(row + fill)
            else:
                rows.append(fill + row + [after] * (left + right - len(fill) - len(row)))
        return torch.tensor(rows, dtype=torch.int64)

    data = _stacked(sequences, stack, pad_id)
    if with_labels:
        data["labels"] = stack([s.labels for s in sequences], IGNORED_LABEL, IGNORED_LABEL)
    return data


def _stack_aligned(sequences: list[TokenSequence], pad_id: int) -> dict:
    """Stacks trees into int64 (B, L) whose trunks, prompts and responses end in one column each."""
    trunks = [s.trunk_length for s in sequences]
    trunk = max(trunks)
    branches = max(s.prompt_length - own for s, own in zip(sequences, trunks, strict=True))
    behind = max(len(s.ids) - s.prompt_length for s in sequences)

    def stack(values, before: int, after: int) -> torch.Tensor:
        rows = []
        for s, own, row in zip(sequences, trunks, values, strict=True):
            between = branches - (s.prompt_length - own)
            rows.append(
                [before] * (trunk - own)
                + row[:own]
                + [before] * between
                + row[own:]
                + [after] * (behind - (len(row) - s.prompt_length))
            )
        return torch.tensor(rows, dtype=torch.int64)

    return _stacked(sequences, stack, pad_id)


def _stacked(sequences: list[TokenSequence], stack, pad_id: int) -> dict:
    """Stacks each list of the sequences, with what stands before and after as padding."""
    return {
        "input_ids": stack([s.ids for s in sequences], pad_id, pad_id),
        "attention_mask": stack([[1] * len(s.ids) for s in sequences], 0, 0),
        "position_ids": stack([s.positions for s in sequences], 0, 0),
        "region_ids": stack([s.regions for s in sequences], NO_REGION, NO_REGION),
        "role_ids": stack([s.roles for s in sequences], ROLE_SHARED, ROLE_CAPTION),
    }


def locate_responses(sequences: list[TokenSequence], start: int) -> dict[str, torch.Tensor]:
    """Says in which columns of a padded batch the responses stand.

    `start` is the first column after the prompts. Returns `response_columns` int64 (B, G, n), of
    each region the columns that are denoised or learned, in the order of the sequence, -1 where a
    row has fewer regions or a target is shorter; and `response_start` int64 (B,), which is `start`
    in every row.
    """
    G = max(len(s.slots) for s in sequences)
    n = max(len(slot) for s in sequences for slot in s.slots)
    columns = torch.full((len(sequences), G, n), -1)
    for row, s in zip(columns, sequences, strict=True):
        for group, slot in zip(row, s.slots, strict=False):
            # Padding on the left moves a row to where all prompts end.
            group[: len(slot)] = torch.tensor(slot, dtype=torch.int64) + start - s.prompt_length
    return {"response_columns": columns, "response_start": torch.full((len(sequences),), start)}


def response_length(ids: Sequence[int], ends: Sequence[tuple[int, ...]]) -> int:
    """Counts the tokens of a response before the first of the sequences that end it."""
    starts = (i for end in ends for i in range(len(ids)) if tuple(ids[i : i + len(end)]) == end)
    return min(starts, default=len(ids))
