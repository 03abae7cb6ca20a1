"""Attention structure: predicates over region and role ids, and what each implementation takes.

A predicate says whether query q may see key k. Axis letters: B batch, L sequence, Q K queries and
keys.
"""

import torch

from .configuration_perceptiondlm import ROLE_CAPTION, SHARED_REGION


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
