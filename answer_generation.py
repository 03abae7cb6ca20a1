"""`generate`, as transformers and its pipelines call it, for answers about whole images.

Shapes: B prompts, L positions of a prompt, n new tokens.
"""

import torch

from .configuration_perceptiondlm import ROLE_CAPTION, ROLE_SHARED, SHARED_REGION

ANSWER_REGION = 0
SAMPLING = ("temperature", "top_k", "top_p")


class AnswerGenerationMixin:
    """`generate` for a model with `diffusion_generate`."""

    output_modalities = ("text",)  # which pipelines ask for

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        *,
        generation_config=None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        return_dict_in_generate: bool = False,
        pad_token_id: int | None = None,
        **inputs_and_options,
    ) -> torch.LongTensor:
        """Prompts and their answers, int64 (B, L + n); past an answer's first end-of-turn, only
        end-of-turn.

        Args:
            input_ids, attention_mask: (B, L), prompts padded on the left.
            generation_config: only its `max_new_tokens`, `do_sample` and, when sampling,
                `temperature`, `top_k` and `top_p` are read.
            max_new_tokens: n (default: the checkpoint's).
            do_sample: with False, a temperature is refused.
            return_dict_in_generate: only False, as pipelines pass it.
            pad_token_id: as pipelines pass it; means nothing here, where nothing is padded.
            inputs_and_options: the processor's other tensors, and options of `diffusion_generate`.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        options = {}
        for name, value in inputs_and_options.items():
            (inputs if isinstance(value, torch.Tensor) else options)[name] = value
        if "boxes" in inputs:
            raise ValueError(
                "expected a prompt about whole images, got regions; captions of regions are made"
                " by `diffusion_generate`"
            )
        if return_dict_in_generate:
            raise ValueError(
                "expected return_dict_in_generate False, got True: see the history"
                " of `diffusion_generate` instead"
            )
        if generation_config is not None:
            if max_new_tokens is None:
                max_new_tokens = generation_config.max_new_tokens
            do_sample = generation_config.do_sample if do_sample is None else do_sample
            given = {name: getattr(generation_config, name) for name in SAMPLING if do_sample}
            options = {k: v for k, v in given.items() if v is not None} | options
        if do_sample:
            options.setdefault("temperature", 1.0)
        elif do_sample is False and options.get("temperature"):
            raise ValueError(
                f"expected no temperature without do_sample, got {options['temperature']}"
            )
        length = max_new_tokens
        if length is None:
            length = self.generation_config.max_new_tokens
        out = self.diffusion_generate(inputs=self._with_answers(inputs, length), **options)
        answers = torch.tensor([row[0] for row in out.token_ids], device=input_ids.device)
        ended = (answers == self.config.eot_token_id).cumsum(-1) > 0
        answers = answers.masked_fill(ended, self.config.eot_token_id)
        return torch.cat([input_ids, answers], dim=1)

    def _with_answers(self, inputs: dict, length: int) -> dict:
        """Inputs with `length` masked positions behind each prompt."""
        ids = inputs["input_ids"]
        if inputs["attention_mask"] is None:
            inputs["attention_mask"] = torch.ones_like(ids)
        mask = inputs["attention_mask"]
        if not bool(mask[:, -1].all()):
            raise ValueError("expected prompts padded on the left, got padding on the right")
        positions = inputs.get("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
        steps = torch.arange(1, length + 1, device=ids.device)
        columns = {
            "input_ids": (ids, self.config.mask_token_id),
            "attention_mask": (mask, 1),
            "position_ids": (positions, positions[:, -1:] + steps),
            "region_ids": (torch.full_like(ids, SHARED_REGION), ANSWER_REGION),
            "role_ids": (torch.full_like(ids, ROLE_SHARED), ROLE_CAPTION),
        }
        behind = ids.new_empty(len(ids), length)
        extended = {
            name: torch.cat([inputs.get(name, prompt), torch.zeros_like(behind) + answer], dim=1)
            for name, (prompt, answer) in columns.items()
        }
        return {**inputs, **extended}
