"""Sequences under construction, and batches of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerFast

from .configuration_perceptiondlm import (
    NO_REGION,
    ROLE_CAPTION,
    ROLE_SHARED,
    PerceptionDLMConfig,
)

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


IGNORED_LABEL = -100
MAX_GRID, MAX_SIDE = 64, 2**20  # tiles along a side, and pixels: beyond any image

# What the processor makes: type and axes of each tensor. A letter is one size wherever it stands: B
# rows, L positions, T tiles, N images, K regions of the batch, M regions of a row at most, S pixels
# and P patches along a tile's side, R region prompts.
SEQUENCE_INPUTS = {
    "input_ids": ("integer", "B L"),
    "attention_mask": ("integer", "B L"),
    "position_ids": ("integer", "B L"),
    "region_ids": ("integer", "B L"),
    "role_ids": ("integer", "B L"),
}
IMAGE_INPUTS = {
    "pixel_values": ("float", "T 3 S S"),
    "image_grids": ("integer", "N 2"),
    "image_sizes": ("integer", "N 2"),
}
REGION_INPUTS = {
    "region_patches": ("bool", "T R P P"),
    "boxes": ("float", "K 4"),
    "box_images": ("integer", "K"),
    "region_orders": ("integer", "B M"),
}

# Where the responses stand, see `locate_responses`; the network does not need it.
RESPONSE_INPUTS = ("response_columns", "response_start", "task")


@dataclass
class TokenSequence:
    """Holds one sequence under construction: parallel lists, and where its responses stand.

    Attributes:
        prompt_length: where what is not the prompt's starts.
        slots: where each response stands, in the order of the regions.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    regions: list[int] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    prompt_length: int = 0
    slots: list[range] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, position: int, region: int, role: int, target=False):
        """Appends `ids` at consecutive positions from `position`; labelled when a `target`."""
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.regions += [region] * len(ids)
        self.roles += [role] * len(ids)
        self.labels += list(ids) if target else [IGNORED_LABEL] * len(ids)


def pad_sequences(
    sequences: list[TokenSequence],
    pad_id: int,
    with_labels: bool,
    *,
    side: str = "left",
    min_length: int = 0,
    multiple_of: int | None = None,
) -> dict:
    """Stacks sequences into int64 (B, L): prompts padded on the left, answers on the right.

    `side` is the prompts'; "right" is for sequences without answers. L is at least `min_length`
    and, with `multiple_of`, the next multiple of it.
    """
    left = max(s.prompt_length for s in sequences)
    right = max(len(s.ids) - s.prompt_length for s in sequences)
    left = max(left, min_length - right)
    left += -(left + right) % (multiple_of or 1)
    if side == "right" and right:
        raise ValueError("expected padding_side 'left' with answers, got 'right'")

    def stack(values, before: int, after: int) -> torch.Tensor:
        rows = []
        for s, row in zip(sequences, values, strict=True):
            padding = [before] * (left - s.prompt_length)
            if side == "right":
                rows.append(row + padding)
            else:
                rows.append(padding + row + [after] * (left + right - len(padding) - len(row)))
        return torch.tensor(rows, dtype=torch.int64)

    data = {
        "input_ids": stack([s.ids for s in sequences], pad_id, pad_id),
        "attention_mask": stack([[1] * len(s.ids) for s in sequences], 0, 0),
        "position_ids": stack([s.positions for s in sequences], 0, 0),
        "region_ids": stack([s.regions for s in sequences], NO_REGION, NO_REGION),
        "role_ids": stack([s.roles for s in sequences], ROLE_SHARED, ROLE_CAPTION),
    }
    if with_labels:
        data["labels"] = stack([s.labels for s in sequences], IGNORED_LABEL, IGNORED_LABEL)
    return data


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


def check_inputs(inputs, config: PerceptionDLMConfig):
    """Refuses prepared inputs that no model of `config` could read.

    Raises ValueError for a tensor that is missing, of another type or shape than the processor
    makes, or holds values that are out of range.
    """
    if not isinstance(inputs, Mapping):
        raise ValueError(f"expected `inputs` as the processor's, got {type(inputs).__name__}")
    needed = dict(SEQUENCE_INPUTS)
    if any(name in inputs for name in IMAGE_INPUTS):
        needed |= IMAGE_INPUTS
    if any(name in inputs for name in REGION_INPUTS):
        needed |= IMAGE_INPUTS | REGION_INPUTS
        if "region_orders" not in inputs:  # the processor can leave it out
            needed.pop("region_orders")
        if not config.num_region_prompts:
            raise ValueError("expected a checkpoint with region prompts for masks, got one without")

    sizes = {
        "S": config.vision_config.image_size,
        "P": config.grid_side,
        "R": config.num_region_prompts,
    }
    if "response_columns" in inputs:
        needed |= {"response_columns": ("integer", "B G n"), "response_start": ("integer", "B")}
    for name, (kind, axes) in needed.items():
        _expect_tensor(name, inputs.get(name), kind, axes.split(), sizes)
    _expect_values(inputs, config)


def _expect_tensor(name: str, tensor, kind: str, axes: list[str], sizes: dict[str, int]):
    """Checks type and shape; notes in `sizes` what a letter is the first time that it stands."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"expected {name} as a tensor in `inputs`, got {type(tensor).__name__}")
    is_float, is_bool = tensor.is_floating_point(), tensor.dtype == torch.bool
    got = "float" if is_float else "bool" if is_bool else "integer"
    if got != kind or tensor.is_complex():
        raise ValueError(f"expected {name} of {kind} type, got {tensor.dtype}")
    fits = tensor.ndim == len(axes) and all(
        size == (int(axis) if axis.isdigit() else sizes.setdefault(axis, size))
        for axis, size in zip(axes, tensor.shape, strict=True)
    )
    if not fits:
        known = {axis: sizes[axis] for axis in axes if axis in sizes}
        raise ValueError(
            f"expected {name} of shape ({', '.join(axes)}) with {known}, got {tuple(tensor.shape)}"
        )


def _expect_values(inputs, config: PerceptionDLMConfig):
    """Checks that ids and numbers lie in their ranges, both ends included."""
    length = inputs["input_ids"].shape[-1]
    ranges = {
        "input_ids": (0, config.text_config.vocab_size - 1),
        "attention_mask": (0, 1),
        "position_ids": (0, config.text_config.max_position_embeddings - 1),
        "region_ids": (NO_REGION, length),
        "role_ids": (ROLE_SHARED, ROLE_CAPTION),
        "image_grids": (0 if config.image_layout == "anyres" else 1, MAX_GRID),  # (0, 0): no canvas
        "image_sizes": (1, MAX_SIDE),
        "boxes": (0, 1),
        "box_images": (0, len(inputs.get("image_grids", ())) - 1),
        "region_orders": (-1, length),
        "pixel_values": (-MAX_SIDE, MAX_SIDE),
    }
    for name, (low, high) in ranges.items():
        tensor = inputs.get(name)
        if tensor is None or not tensor.numel():
            continue
        least, most = tensor.min().item(), tensor.max().item()
        if not (low <= least and most <= high):  # NaN fails this too
            raise ValueError(f"expected {name} in [{low}, {high}], got [{least}, {most}]")


def response_length(ids: Sequence[int], ends: Sequence[tuple[int, ...]]) -> int:
    """Counts the tokens of a response before the first of the sequences that end it."""
    starts = (i for end in ends for i in range(len(ids)) if tuple(ids[i : i + len(end)]) == end)
    return min(starts, default=len(ids))
