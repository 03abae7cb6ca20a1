"""The diffusion objective: how much is masked, which positions, and how their losses are weighted.

Shapes: B samples, L positions, V vocabulary. `labels` int (B, L) is negative where there is nothing
to learn, `masked` bool (B, L), `rate` the masking probability p, float (B,).
"""

import torch
import torch.nn.functional as F

# A sample with t = 0 would learn nothing and weigh without bound.
MINIMUM_MASK_RATE = 1e-3  # LLaDA's eps: p = (1 - eps) t + eps


def mask_rate(timesteps: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """Returns the masking probability p (B,) of each sample, from t (B,) or a fresh draw."""
    if timesteps is None:
        timesteps = torch.rand(labels.shape[0], device=labels.device)
    return (1 - MINIMUM_MASK_RATE) * timesteps + MINIMUM_MASK_RATE


def draw_masked(labels: torch.Tensor, rate: torch.Tensor, noise: torch.Tensor | None):
    """Marks, bool (B, L), the labeled positions whose draw falls under the sample's rate."""
    if noise is None:
        noise = torch.rand(labels.shape, device=labels.device)
    return (noise < rate[:, None]) & (labels >= 0)


def expect_masked(input_ids: torch.Tensor, responses: torch.Tensor, mask_token_id: int):
    """Refuses to train on responses, bool (B, L), of which nothing is masked.

    So do options of transformers' Trainer that keep the labels from the model, which draws from
    them what is masked.
    """
    if responses.any() and not (responses & (input_ids == mask_token_id)).any():
        raise ValueError(
            "expected labels in training, or masked tokens in the responses, got neither: the"
            " diffusion loss knows no label_smoothing_factor and no compute_loss_func, which keep"
            " the labels from the model"
        )


def inverse_rate_loss(losses, labels, masked, rate) -> torch.Tensor:
    """Weighs each loss by its sample's p and label count, over the batch size (LLaDA's bound)."""
    # 1 / p makes up for how rarely a position is masked.
    counts = (labels >= 0).sum(1).clamp(min=1)
    weights = (1 / (rate * counts))[:, None].expand_as(masked)[masked]
    return (losses * weights).sum() / labels.shape[0]


def unweighted_loss(losses, labels, masked, rate) -> torch.Tensor:
    """Averages over each sample's masked positions, then over the batch."""
    weights = (1 / masked.sum(1).clamp(min=1))[:, None].expand_as(masked)[masked]
    return (losses * weights).sum() / labels.shape[0]


LOSS_WEIGHTINGS = {"inverse_rate": inverse_rate_loss, "none": unweighted_loss}


def masked_loss(logits, labels, masked, rate, weighting: str) -> torch.Tensor:
    """Returns the scalar loss of the masked positions' logits (masked, V).

    `weighting` is a name in `LOSS_WEIGHTINGS`. Raises ValueError for another.
    """
    if weighting not in LOSS_WEIGHTINGS:
        raise ValueError(
            f"expected loss_weighting among {', '.join(LOSS_WEIGHTINGS)}, got {weighting!r}"
        )
    # In float32: the sum of many bfloat16 exponentials would be coarse.
    losses = F.cross_entropy(logits.float(), labels[masked], reduction="none")
    return LOSS_WEIGHTINGS[weighting](losses, labels, masked, rate)
