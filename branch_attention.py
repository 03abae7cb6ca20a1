"""Flash attention over a tree: the trunk for all queries, each query's own branch apart, merged.

Flash kernels know no masks but lengths, so the independent layout's structure is written as two
attentions without one. Their outputs o and log-sum-exps l give the whole softmax's output exactly:
o = (exp(l1) o1 + exp(l2) o2) / (exp(l1) + exp(l2)).

Axis letters: B batch, Q K queries and keys, H heads, N packed positions, D head dimension.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .configuration_perceptiondlm import SHARED_REGION


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
        index: int64 (N,), of the positions in the flattened batch.
        starts: int32 (groups + 1,), where each group begins and the last ends.
        longest: the largest group's size.
    """

    index: torch.Tensor
    starts: torch.Tensor
    longest: int

    @classmethod
    def of(cls, chosen: torch.Tensor, groups: torch.Tensor, count: int) -> "Packed":
        """The positions `chosen`, bool (B, L), by their group, int (B, L), out of `count`."""
        places = chosen.flatten().nonzero()[:, 0]
        groups = groups.flatten()[places]
        sizes = groups.bincount(minlength=count)
        starts = F.pad(sizes.cumsum(0), (1, 0)).int()
        return cls(places[groups.argsort(stable=True)], starts, int(sizes.max()))


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

    def __call__(self, query, key, value, scaling: float) -> torch.Tensor:
        """(B, Q, H, D) of query (B, H, Q, D), key and value (B, heads, K, D)."""
        B, H, Q, D = query.shape
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        output = torch.zeros_like(query)  # (B * Q, H, D); padding attends to nothing
        places, attended, log_sum = self._attend(self.trunk, query, key, value, scaling)
        output[places] = attended
        if len(self.own[0].index):
            trunk_log_sum = log_sum.new_zeros(B * Q, H)
            trunk_log_sum[places] = log_sum
            places, attended, log_sum = self._attend(self.own, query, key, value, scaling)
            share = (log_sum - trunk_log_sum[places]).sigmoid()[..., None].to(attended.dtype)
            output[places] = torch.lerp(output[places], attended, share)
        return output.view(B, Q, H, D)

    def _attend(self, packed, query, key, value, scaling):
        """Queries' places (N,), outputs (N, H, D) and log-sum-exps (N, H)."""
        q, k = packed
        attended, log_sum = flash_varlen(
            query[q.index],
            key[k.index],
            value[k.index],
            q.starts,
            k.starts,
            q.longest,
            k.longest,
            scaling,
        )
        return q.index, attended, log_sum.transpose(0, 1)
