"""Sequences under construction, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .configuration_perceptiondlm import NO_REGION, ROLE_CAPTION, ROLE_SHARED

IGNORED_LABEL = -100


@dataclass
class TokenSequence:
    """One sequence under construction: parallel lists, and where its answer starts."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    regions: list[int] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    prompt_length: int = 0

    def add(self, ids: Sequence[int], *, position: int, region: int, role: int, target=False):
        """Appends `ids` at consecutive positions from `position`; labelled when a `target`."""
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.regions += [region] * len(ids)
        self.roles += [role] * len(ids)
        self.labels += list(ids) if target else [IGNORED_LABEL] * len(ids)


def pad_sequences(sequences: list[TokenSequence], pad_id: int, with_labels: bool) -> dict:
    """Stacks sequences into int64 (B, L): prompts padded on the left, answers on the right."""
    left = max(s.prompt_length for s in sequences)
    right = max(len(s.ids) - s.prompt_length for s in sequences)

    def stack(values, before: int, after: int) -> torch.Tensor:
        rows = []
        for s, row in zip(sequences, values, strict=True):
            head = [before] * (left - s.prompt_length)
            rows.append(head + row + [after] * (left + right - len(head) - len(row)))
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
