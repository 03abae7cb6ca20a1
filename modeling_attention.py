"""Who may attend to whom, and how that is told to each attention implementation.

A structure is a predicate over region and role ids: it says whether query q may see key k.

    joint layout ("released")                tree layout ("independent")

    trunk+RoI  caption 0  caption 1          trunk --+-- RoI 0 -- caption 0
        |  ^       |  ^       |  ^                   |
        +--+-------+--+-------+  |                   +-- RoI 1 -- caption 1
    everything in the prompt sees            each position sees its own branch and the
    everything; a caption sees the           trunk, up to its own role; the trunk never
    prompt's shared part, its own RoI        sees a branch, so its keys and values can be
    tokens and itself                        kept

Axis letters: B batch, L sequence, Q K queries and keys, H heads, N packed positions, D head
dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from .configuration_perceptiondlm import ROLE_CAPTION, SHARED_REGION

TREE = "tree"  # the name under which `tree_attention` is registered


def released_structure(q_region, q_role, k_region, k_role):
    """Lets a caption see what is shared, its own RoI tokens and itself; all else everything."""
    return (q_role < ROLE_CAPTION) | (k_region == SHARED_REGION) | (k_region == q_region)


def independent_structure(q_region, q_role, k_region, k_role):
    """Lets each position see its own branch and the trunk, up to its own role."""
    return ((k_region == SHARED_REGION) | (k_region == q_region)) & (k_role <= q_role)


def full_structure(q_region, q_role, k_region, k_role):
    """Lets everything see everything."""
    return torch.ones_like(q_region + k_region, dtype=torch.bool)


STRUCTURES = {
    "released": released_structure,
    "independent": independent_structure,
    "full": full_structure,
}


def allowed_attention(layout: str, region_ids, role_ids, attention_mask, queries=slice(None)):
    """Tells, bool (B, Q, K), whether a query of `queries` may see a key; padding is never seen.

    `region_ids`, `role_ids` and `attention_mask` are integer (B, L).
    """
    structure = STRUCTURES[layout](
        region_ids[:, queries, None],
        role_ids[:, queries, None],
        region_ids[:, None, :],
        role_ids[:, None, :],
    )
    return structure & attention_mask[:, None, :].bool()


@dataclass(frozen=True)
class Structure:
    """Holds what decides who sees whom in a batch.

    Attributes:
        layout: a name in `STRUCTURES`.
        region_ids, role_ids, attention_mask: int (B, L), of the whole sequence.
    """

    layout: str
    region_ids: torch.Tensor
    role_ids: torch.Tensor
    attention_mask: torch.Tensor

    def argument(
        self,
        implementation: str,
        dtype: torch.dtype,
        queries: slice = slice(None),
        num_keys: int | None = None,
    ):
        """Returns what an attention implementation takes: one type for each.

        "tree" a `TreeMask`; "flash_attention_*" padding, int (B, K); "flex_attention" a
        `BlockMask`; the others a bias (B, 1, Q, K) of `dtype`. None stands for no restriction.

        Args:
            implementation: a name that transformers knows, or "tree".
            queries: columns of the queries; num_keys: how many columns of keys there are.

        Raises ValueError where the implementation cannot express the structure.
        """
        if implementation == TREE:
            if self.layout != "independent":
                raise ValueError(
                    "expected region_layout 'independent' for attn_implementation 'tree', got"
                    f" {self.layout!r}; load with 'sdpa'"
                )
            ids = (self.region_ids, self.role_ids, self.attention_mask)
            return TreeMask.of(*ids, queries, num_keys)
        allowed = allowed_attention(
            self.layout, self.region_ids, self.role_ids, self.attention_mask, queries
        )
        return attention_argument(allowed[:, :, :num_keys], implementation, dtype)


def attention_argument(allowed: torch.Tensor, implementation: str, dtype: torch.dtype):
    """Returns what an implementation other than "tree" takes to attend as `allowed` says.

    `allowed` is bool (B, Q, K). Raises ValueError where flash attention, which knows padding only,
    cannot express it.
    """
    # No argument at all is the fastest in every implementation.
    if bool(allowed.all()):
        return None
    if "flash" in implementation:
        return _padding_alone(allowed, implementation)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        B, Q, K = allowed.shape
        return create_block_mask(
            lambda b, h, q, k: allowed[b, q, k], B, None, Q, K, device=str(allowed.device)
        )

    # A bias, not a mask, which sdpa would turn into a bias again in every layer.
    lowest = torch.finfo(dtype).min if implementation == "eager" else -torch.inf
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill_(~allowed, lowest)[:, None]  # (B, 1, Q, K)


def _padding_alone(allowed: torch.Tensor, implementation: str) -> torch.Tensor:
    """Returns the keys that all queries see, int (B, K); raises ValueError where they differ."""
    padding = allowed[:, :1]
    if not bool((allowed == padding).all()):
        raise ValueError(
            f"expected attention without region structure for {implementation}, got captions"
            " of separate regions; load with attn_implementation 'tree' (region_layout"
            " 'independent'), 'sdpa', 'flex_attention' or 'eager'"
        )
    return padding[:, 0].long()


# Attention over a tree, by kernels that know no masks but lengths.
#
# The tree is written as two attentions without a mask: every query over the trunk, and every query
# over what it may see of its own branch. Their outputs o and log-sum-exps l give the whole
# softmax's output exactly: o = (exp(l1) o1 + exp(l2) o2) / (exp(l1) + exp(l2)).


@dataclass(frozen=True)
class Packed:
    """Positions of a batch, packed group by group.

    Attributes:
        rows, columns: int64 (N,), of the positions in the batch.
        starts: int32 (groups + 1,), where each group begins and the last ends.
        max_length: the largest group's size.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    starts: torch.Tensor
    max_length: int

    @classmethod
    def of(cls, members: list[tuple[torch.Tensor, torch.Tensor]], count: int) -> "Packed":
        """Packs positions into `count` groups.

        `members` are pairs of the chosen positions, bool (B, L), and their groups, int (B, L); a
        position may be in a group of each pair.
        """
        # Sorted by group, in each the order of the batch.
        groups = torch.cat([group[chosen] for chosen, group in members])
        places = torch.cat([chosen.nonzero() for chosen, _ in members])
        sizes = groups.bincount(minlength=count)
        starts = F.pad(sizes.cumsum(0), (1, 0)).int()
        rows, columns = places[groups.argsort(stable=True)].unbind(1)
        return cls(rows, columns, starts, int(sizes.max()) if count else 0)

    def to(self, device) -> "Packed":
        """Copies the indices to a device."""
        rows, columns = self.rows.to(device), self.columns.to(device)
        return Packed(rows, columns, self.starts.to(device), self.max_length)

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """Picks the packed positions, (N, ...), of values (B, L, ...)."""
        return values[self.rows, self.columns]


@dataclass(frozen=True)
class TreeMask:
    """Says which positions attend together in a tree: queries and keys, packed group by group.

    Attributes:
        trunk: all queries and the trunk's keys, a group for each row of the batch.
        own: queries in branches and what they see of their branch, two groups for each branch:
            its RoI tokens, and its caption, which sees them and itself.
    """

    trunk: tuple[Packed, Packed]
    own: tuple[Packed, Packed]

    @classmethod
    def of(cls, region_ids, role_ids, attention_mask, queries: slice, num_keys: int | None):
        """Packs the positions of a batch, int (B, L), for the queries in some columns."""
        # The positions: which are the trunk's, which a branch's, and of which branch.
        B, branches = len(region_ids), int(region_ids.max()) + 1
        rows = torch.arange(B, device=region_ids.device)[:, None].expand_as(region_ids)
        shared, valid = region_ids == SHARED_REGION, attention_mask.bool()
        is_caption = role_ids == ROLE_CAPTION
        branch = 2 * (rows * branches + region_ids.clamp(min=0))  # group of its RoI tokens

        def pack(members, columns: slice, count: int) -> Packed:
            cut = [(chosen[:, columns], group[:, columns]) for chosen, group in members]
            return Packed.of(cut, count)

        keys, own = slice(num_keys), valid & ~shared
        # Every query with the trunk; those in a branch with what they see of it.
        trunk = pack([(valid, rows)], queries, B), pack([(valid & shared, rows)], keys, B)
        own_queries = pack([(own, branch + is_caption)], queries, 2 * B * branches)
        seen = [(own, branch + 1)]  # by captions
        if bool((own & ~is_caption)[:, queries].any()):
            seen.append((own & ~is_caption, branch))  # by RoI tokens
        own_keys = pack(seen, keys, 2 * B * branches)
        return cls(trunk, (own_queries, own_keys))

    def to(self, device) -> "TreeMask":
        """Copies it to a device, as a model over several does before each layer."""
        (a, b), (c, d) = self.trunk, self.own
        return TreeMask((a.to(device), b.to(device)), (c.to(device), d.to(device)))


def tree_attention(
    module, query, key, value, attention_mask: TreeMask | None, scaling=None, dropout=0.0, **kwargs
):
    """Attends as a tree does; registered with transformers as the implementation "tree".

    Args:
        query: (B, H, Q, D); key and value: (B, heads, K, D).
        attention_mask: a `TreeMask`; None where everything sees everything.

    Returns (B, Q, H, D), and None for the weights.
    """
    if attention_mask is None:
        grouped = key.shape[1] != query.shape[1]
        attended = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
        return attended.transpose(1, 2), None

    if dropout:
        raise ValueError(f"expected attention_dropout 0 for 'tree', got {dropout}")
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    kernel = flash_varlen if query.device.type == "cuda" else reference_varlen
    return _merged(attention_mask, query, key, value, scaling, kernel), None


def _merged(mask: TreeMask, query, key, value, scaling: float, kernel) -> torch.Tensor:
    """Merges the attentions over the trunk and over the own branch, (B, Q, H, D)."""
    # Over the trunk, for all queries.
    everywhere, own = mask.trunk[0], mask.own[0]
    attended, log_sum = _attend(mask.trunk, query, key, value, scaling, kernel)
    places = everywhere.rows, everywhere.columns
    output = torch.zeros_like(query)  # padding attends to nothing
    output = output.index_put(places, attended)
    if not len(own.rows):
        return output

    # Over the own branch; each part counts as much as its exponentials add up to.
    trunk_log_sum = log_sum.new_zeros(query.shape[:3]).index_put(places, log_sum)
    attended, log_sum = _attend(mask.own, query, key, value, scaling, kernel)
    share = (log_sum - own.take(trunk_log_sum)).sigmoid()[..., None].to(attended.dtype)
    merged = torch.lerp(own.take(output), attended, share)
    return output.index_put((own.rows, own.columns), merged)


def _attend(packed: tuple[Packed, Packed], query, key, value, scaling: float, kernel):
    """Returns packed outputs (N, H, D) and log-sum-exps (N, H)."""
    q, k = packed
    attended, log_sum = kernel(
        q.take(query),
        k.take(key),
        k.take(value),
        q.starts,
        k.starts,
        q.max_length,
        k.max_length,
        scaling,
    )
    return attended, log_sum.transpose(0, 1)


def flash_varlen(query, key, value, starts_q, starts_k, max_q, max_k, scaling):
    """Attends within packed groups by flash-attn's kernel.

    Takes (N, H, D) and where each group starts; returns (N, H, D) and log-sum-exps (H, N).
    """
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
        max_q,
        max_k,
        softmax_scale=scaling,
        return_attn_probs=True,
    )
    return output, log_sum


def reference_varlen(query, key, value, starts_q, starts_k, max_q, max_k, scaling):
    """Attends within packed groups in plain PyTorch, as `flash_varlen` does: for CPUs and tests."""
    outputs, log_sums = [], []
    repeats = query.shape[1] // key.shape[1]  # of grouped keys and values
    bounds_q, bounds_k = starts_q.tolist(), starts_k.tolist()
    for group in range(len(bounds_q) - 1):
        q = query[bounds_q[group] : bounds_q[group + 1]]
        k, v = (
            x[bounds_k[group] : bounds_k[group + 1]].repeat_interleave(repeats, 1)
            for x in (key, value)
        )
        # Softmax over the group's own keys, and the logarithm of its denominator.
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scaling
        log_sums.append(scores.logsumexp(-1))  # (H, q)
        weights = scores.softmax(-1).to(v.dtype)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs), torch.cat(log_sums, 1)


# Several batches in one run of the network. All but attention looks at each position by itself, so
# their positions can stand in one sequence, without padding, and the weights are read once.


@dataclass(frozen=True)
class PackedBatch:
    """Says what a batch attends to whose rows stand in a packed sequence, one behind the other.

    Attributes:
        rows: how many.
        cache: of keys and values, into which those of the batch are written from column `start` on.
        start: that column.
        mask: what the attention implementation takes for the batch alone.
    """

    rows: int
    cache: Any
    start: int
    mask: Any


class PackedCaches:
    """Attends for each batch of a packed sequence by itself, to the batch's own keys and values.

    `sizes` are the positions of each of `batches`, all rows together.
    """

    def __init__(self, batches: Sequence[PackedBatch], sizes: list[int]):
        self.batches = batches
        self.sizes = sizes

    def attend(
        self, attend: Callable[..., torch.Tensor], query, key, value, layer: int
    ) -> torch.Tensor:
        """Attends within packed sequences.

        Args:
            attend: gives (B, L, H, D) of a batch's queries, keys, values and mask.
            query, key, value: (1, heads, N, D), of all positions of all batches.
            layer: whose keys and values the caches are to keep.

        Returns (1, N, H, D).
        """
        split = (x.split(self.sizes, 2) for x in (query, key, value))
        attended = []
        for batch, *own in zip(self.batches, *split, strict=True):
            # (1, heads, B * L, D) -> (B, heads, L, D)
            q, k, v = (x[0].unflatten(1, (batch.rows, -1)).transpose(0, 1) for x in own)
            k, v = batch.cache.update(k, v, layer, batch.start)
            mask = batch.mask if batch.mask is None else batch.mask.to(q.device)
            attended.append(attend(q, k, v, mask).flatten(0, 1))  # (B * L, H, D)
        return torch.cat(attended)[None]


AttentionInterface.register(TREE, tree_attention)
