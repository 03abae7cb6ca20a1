"""Bounds how likely an answer is to a masked-diffusion model, by LLaDA's Monte-Carlo estimate.

    log p(r | prompt) >= E_l E_m [ (n / l) sum_{i in m} log p(r_i | prompt, r with m masked) ]

Here n is the answer's length, l is uniform over 1 ... n, and m is l of its positions, every choice
of them equally likely (equation 6 of LLaDA, arXiv:2502.09992). In shapes S is the number of
samples, L the prompt's length, V the size of the vocabulary.
"""

from collections.abc import Callable

import torch

from ..generation_cache import response_slots
from ..image_processing_perceptiondlm import PerceptionDLMImageProcessor
from ..modeling_attention import Structure

COLUMNS = ("region_ids", "role_ids", "attention_mask")


def masked_counts(
    length: int, samples: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draws how many positions each sample masks, int64 (samples,) in 1 ... length.

    The counts are spaced evenly from a random start, going on at 1 after the last. Each is uniform,
    and the mean over them varies less than that of independent draws.
    """
    start = torch.rand((), generator=generator, dtype=torch.float64)
    places = (start + torch.arange(samples, dtype=torch.float64) / samples) % 1.0
    return (places * length).long().clamp(max=length - 1) + 1


def draw_masks(
    counts: torch.Tensor, length: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draws bool (S, length) with `counts` (S,) positions set, all choices equally likely."""
    order = torch.rand(len(counts), length, generator=generator, dtype=torch.float64).argsort(-1)
    return order.argsort(-1) < counts[:, None]


def bound_terms(logits: torch.Tensor, target: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Estimates the bound from each sample, float64 (S,), in nats.

    Args:
        logits: (S, n, V) of the answer with the masked positions masked.
        target: int64 (n,), the answer.
        masked: bool (S, n), one position or more in each sample.
    """
    chosen = logits.double().log_softmax(-1).gather(-1, target.expand(len(logits), -1)[..., None])
    weights = target.shape[0] / masked.sum(-1)
    return weights * (chosen[..., 0] * masked).sum(-1)


def log_likelihood_bound(
    predict: Callable[[torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    mask_token_id: int,
    *,
    samples: int = 128,
    batch_size: int = 16,
    generator: torch.Generator | None = None,
) -> float:
    """Returns the bound of log p(target) in nats, averaged over `samples` draws.

    Args:
        predict: gives logits (S, n, V) for an answer's ids (S, n), some of them the mask token.
        target: int64 (n,), the answer.
        mask_token_id: of the mask token.
        samples: draws; the more, the less noise.
        batch_size: samples in one forward pass.
        generator: of the draws, on the CPU.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(
            f"expected samples and batch_size of 1 or more, got {samples} and {batch_size}"
        )

    counts = masked_counts(len(target), samples, generator)
    masked = draw_masks(counts, len(target), generator).to(target.device)
    terms = [
        bound_terms(predict(target.masked_fill(chunk, mask_token_id)), target, chunk)
        for chunk in masked.split(batch_size)
    ]
    return float(torch.cat(terms).mean())


class AnswerLogits:
    """Predicts the logits of one prompt's answer positions; images are encoded once.

    Args:
        model: the model.
        inputs: what the processor made of one prompt, its answer masked.
    """

    def __init__(self, model, inputs: dict):
        self.model = model
        self.text = model.language_model
        inputs = {k: v.to(model.device) for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        if len(inputs["input_ids"]) != 1:
            raise ValueError(f"expected inputs of one prompt, got {len(inputs['input_ids'])}")
        self.start = int(inputs["response_start"][0])
        response_slots(inputs, model.config.mask_token_id)  # checks that it is masked
        self.positions = inputs["position_ids"]  # (1, L + n)
        self.columns = [inputs[name] for name in COLUMNS]

        names = PerceptionDLMImageProcessor.model_input_names
        images = {name: inputs[name] for name in names if name in inputs}
        embeds = model.embed_inputs(inputs["input_ids"], inputs["role_ids"], **images)
        self.prompt = embeds[:, : self.start]  # (1, L, D)

    @torch.no_grad()
    def __call__(self, answers: torch.Tensor) -> torch.Tensor:
        """Returns logits (S, n, V) of answers (S, n)."""
        S = len(answers)
        own = self.text.get_input_embeddings()(answers).to(self.prompt.device)
        embeds = torch.cat([self.prompt.expand(S, -1, -1), own], dim=1)
        columns = [column.expand(S, -1) for column in self.columns]
        structure = Structure(self.model.config.region_layout, *columns)
        hidden = self.model.attend(embeds, self.positions.expand(S, -1), structure)
        return self.text.lm_head(hidden[:, self.start :]).to(answers.device)
