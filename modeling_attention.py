"""Attention structure: predicates over region and role ids, and what each implementation takes.

A predicate says whether query q may see key k. Axis letters: B batch, L sequence, Q K queries and
keys.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .configuration_perceptiondlm import ROLE_CAPTION, SHARED_REGION


def flash_varlen(query, key, value, starts_q, starts_k, longest_q, longest_k, scaling):
    """flash-attn over packed sequences: (N, H, D) and the log-sum-exp (H, N)."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise ImportError(f"expected flash-attn for this attention, got: {error}") from error
    output, log_sum, _ = flash_attn_varlen_func(
        query,
        key,
        value,
        starts_q,
        starts_k,
        longest_q,
        longest_k,
        softmax_scale=scaling,
        return_attn_probs=True,
    )
    return output, log_sum


@dataclass(frozen=True)
class Packed:
    """Positions of a batch, packed group by group.

    Attributes:
        rows, columns: int64 (N,), of the positions in the batch.
        starts: int32 (groups + 1,), where each group begins and the last ends.
        longest: the largest group's size.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    starts: torch.Tensor
    longest: int

    @classmethod
    def of(cls, chosen: torch.Tensor, groups: torch.Tensor, count: int) -> "Packed":
        """The positions `chosen`, bool (B, L), by their group, int (B, L), out of `count`."""
        groups = groups[chosen]
        sizes = groups.bincount(minlength=count)
        starts = F.pad(sizes.cumsum(0), (1, 0)).int()
        rows, columns = chosen.nonzero()[groups.argsort(stable=True)].unbind(1)
        return cls(rows, columns, starts, int(sizes.max()))

    def to(self, device) -> "Packed":
        moved = (x.to(device) for x in (self.rows, self.columns, self.starts))
        return Packed(*moved, self.longest)

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """(N, ...) of values (B, L, ...)."""
        return values[self.rows, self.columns]


class BranchAttention:
    """Attends as the independent layout says, for some queries of a batch.

    Args:
        region_ids, attention_mask: int (B, L), of the whole sequence.
        queries: columns of the queries; keys: how many columns of keys there are. No query may
            stand before a key of its own branch that it must not see: a prompt's queries come
            without the answer's keys.
    """

    def __init__(self, region_ids, attention_mask, queries: slice, keys: int | None):
        rows = torch.arange(len(region_ids), device=region_ids.device)[:, None]
        B, branches = len(region_ids), int(region_ids.max()) + 1
        branch = rows * branches + region_ids.clamp(min=0)  # (B, L)
        rows = rows.expand_as(region_ids)
        shared, valid = region_ids == SHARED_REGION, attention_mask.bool()

        def pair(q_chosen, k_chosen, groups, count):
            packed_q = Packed.of(q_chosen[:, queries], groups[:, queries], count)
            return packed_q, Packed.of(k_chosen[:, :keys], groups[:, :keys], count)

        self.trunk = pair(valid, valid & shared, rows, B)
        self.own = pair(valid & ~shared, valid & ~shared, branch, B * max(branches, 1))

    def to(self, device) -> "BranchAttention":
        """Copies it to a device, as a model over several does before each layer."""
        moved = copy.copy(self)
        moved.trunk, moved.own = (tuple(p.to(device) for p in x) for x in (self.trunk, self.own))
        return moved

    def __call__(self, query, key, value, scaling: float) -> torch.Tensor:
        """(B, Q, H, D) of query (B, H, Q, D), key and value (B, heads, K, D)."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        output = torch.zeros_like(query)  # padding attends to nothing
        attended, log_sum = self._attend(self.trunk, query, key, value, scaling)
        places = self.trunk[0].rows, self.trunk[0].columns
        output[places] = attended
        own = self.own[0]
        if len(own.rows):
            trunk_log_sum = log_sum.new_zeros(query.shape[:3])
            trunk_log_sum[places] = log_sum
            attended, log_sum = self._attend(self.own, query, key, value, scaling)
            share = (log_sum - own.take(trunk_log_sum)).sigmoid()[..., None].to(attended.dtype)
            output[own.rows, own.columns] = torch.lerp(own.take(output), attended, share)
        return output

    def _attend(self, packed, query, key, value, scaling):
        """Packed outputs (N, H, D) and log-sum-exps (N, H)."""
        q, k = packed
        attended, log_sum = flash_varlen(
            q.take(query),
            k.take(key),
            k.take(value),
            q.starts,
            k.starts,
            q.longest,
            k.longest,
            scaling,
        )
        return attended, log_sum.transpose(0, 1)


def released_structure(q_region, q_role, k_region, k_role):
    """A caption sees what is shared, its own RoI tokens and itself; all else sees everything."""
    return (q_role < ROLE_CAPTION) | (k_region == SHARED_REGION) | (k_region == q_region)


def independent_structure(q_region, q_role, k_region, k_role):
    """A tree: each position sees its own branch and the trunk, up to its own role."""
    return ((k_region == SHARED_REGION) | (k_region == q_region)) & (k_role <= q_role)


def full_structure(q_region, q_role, k_region, k_role):
    """No structure: everything sees everything."""
    return torch.ones_like(q_region + k_region, dtype=torch.bool)


STRUCTURES = {
    "released": released_structure,
    "independent": independent_structure,
    "full": full_structure,
}


def allowed_attention(layout: str, region_ids, role_ids, attention_mask, queries=slice(None)):
    """Bool (B, Q, K), true where a query of `queries` may see a key; padding is never seen.

    `region_ids`, `role_ids` and `attention_mask` are integer (B, L).
    """
    structure = STRUCTURES[layout](
        region_ids[:, queries, None],
        role_ids[:, queries, None],
        region_ids[:, None, :],
        role_ids[:, None, :],
    )
    return structure & attention_mask[:, None, :].bool()


def attention_argument(allowed: torch.Tensor, implementation: str, dtype: torch.dtype):
    """What an attention implementation takes to attend as `allowed`, bool (B, Q, K), says.

    Raises ValueError where flash attention, which knows padding only, cannot express it.
    """
    if bool(allowed.all()):
        return None
    if "flash" in implementation:
        padding = allowed[:, :1]
        if not bool((allowed == padding).all()):
            raise ValueError(
                f"expected attention without region structure for {implementation}, got captions"
                " of separate regions; load with attn_implementation 'sdpa', 'flex_attention' or"
                " 'eager'"
            )
        return padding[:, 0].long()  # (B, K)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        B, Q, K = allowed.shape
        return create_block_mask(
            lambda b, h, q, k: allowed[b, q, k], B, None, Q, K, device=str(allowed.device)
        )
    # a bias, not a mask, which sdpa would turn into a bias again in every layer
    lowest = torch.finfo(dtype).min if implementation == "eager" else -torch.inf
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill_(~allowed, lowest)[:, None]  # (B, 1, Q, K)
