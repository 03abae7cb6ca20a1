"""`generate`, as transformers and its pipelines call it, for answers about whole images.

Shapes: B prompts, L positions of a prompt, n new tokens.
"""

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from .answer_network import prompt_length
from .configuration_perceptiondlm import ROLE_CAPTION, ROLE_SHARED, SHARED_REGION
from .generate_arguments import KNOWN, GenerateArguments
from .generation_options import DiffusionOptions
from .image_processing_perceptiondlm import PerceptionDLMImageProcessor
from .processing_perceptiondlm import PerceptionDLMProcessor
from .token_sequence import IGNORED_LABEL

ANSWER_REGION = 0
COLUMNS = ("input_ids", "attention_mask", "position_ids", "region_ids", "role_ids")
TRAINING_INPUTS = ("labels", "timesteps", "noise")
IMAGE_INPUTS = (*PerceptionDLMImageProcessor.model_input_names, "region_orders")
INPUTS = (*COLUMNS, *IMAGE_INPUTS, *TRAINING_INPUTS)


class AnswerGenerationMixin:
    """`generate` for a model with `diffusion_generate`."""

    output_modalities = ("text",)  # which pipelines ask for

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        *,
        inputs: torch.LongTensor | None = None,
        generation_config=None,
        streamer=None,
        tokenizer=None,
        **inputs_and_options,
    ) -> torch.LongTensor | GenerateDecoderOnlyOutput:
        """Returns prompts and their answers, int64 (B, L + n); past an answer's first end-of-turn
        or stop string, only end-of-turn.

        Args:
            input_ids, attention_mask: (B, L), prompts padded on the left. Answers in them, to be
                filled or to be learned, are left out.
            inputs: another name of `input_ids`.
            generation_config: goes before the model's own `generation_config`, and what is given
                by name before both. `generate_arguments` lists the fields that are honored, and
                the neutral values of all others; another value raises ValueError.
            streamer: gets the prompts, then the answers' tokens in turn when all are final.
            tokenizer: encodes stop strings, where no `processor` is given or saved.
            inputs_and_options: the processor's other tensors, fields of `GenerationConfig`, and
                options of `diffusion_generate`; `max_new_tokens` is n (default: the length of the
                masked answers in the inputs, then the checkpoint's).
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs_and_options}
        call = {k: v for k, v in given.items() if k in KNOWN}
        options = {k: v for k, v in given.items() if k not in KNOWN and k not in INPUTS}
        tensors = {k: v for k, v in given.items() if k in INPUTS and v is not None}
        self._expect_real_tokens()
        prompts, slots = _prompts(tensors, inputs)
        ids = prompts["input_ids"]

        arguments = GenerateArguments(
            call, (generation_config, self.generation_config), self._end_ids()
        )
        options = arguments.options(self.config.banned_token_ids) | options
        if tokenizer is not None and options.get("processor") is None:
            options["processor"] = PerceptionDLMProcessor(PerceptionDLMImageProcessor(), tokenizer)
        length = arguments.new_tokens(ids.shape[1], slots) or self._default_length()

        if streamer is not None:
            streamer.put(ids.cpu())
        answers, ends = self._answers(prompts, length, options)
        if streamer is not None:
            for column in answers[:, : max(ends)].T.cpu():  # as if they came one after another
                streamer.put(column)
            streamer.end()
        sequences = torch.cat([ids, answers], dim=1)
        if arguments.get("return_dict_in_generate"):
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    def prepare_inputs_for_generation(self, input_ids, **inputs) -> dict:
        """Returns what `forward` takes; adapters of PEFT ask for this method."""
        return {"input_ids": input_ids, **inputs}

    def _expect_real_tokens(self):
        """PEFT puts a method of its own in the model's while an adapter of it generates."""
        if "prepare_inputs_for_generation" in vars(self):
            raise ValueError(
                "expected an adapter of weights, such as LoRA, got one with virtual tokens, which"
                " diffusion has no place for"
            )

    def _end_ids(self) -> set[int]:
        """Ids that end an answer or stand behind it."""
        named = (self.config.eot_token_id, self.config.eos_token_id, self.config.pad_token_id)
        lists = (ids if isinstance(ids, list) else [ids] for ids in named if ids is not None)
        return {token for ids in lists for token in ids}

    def _default_length(self) -> int:
        return DiffusionOptions.build(self.config.generation_defaults, {}).max_new_tokens

    def _answers(self, prompts: dict, length: int, options: dict):
        """Answers, int64 (B, length), only end-of-turn past each one's end; and each one's tokens,
        the one that ends it counted."""
        out = self.diffusion_generate(inputs=self._with_answers(prompts, length), **options)
        rows = [row[0] for row in out.token_ids]
        chosen = {k: v for k, v in options.items() if k == "stop_strings"}
        stops = DiffusionOptions.build(self.config.generation_defaults, chosen).stop_strings
        tokenizer = stops and (options.get("processor") or self._saved_processor()).tokenizer
        ends = [_end(ids, self.config.eot_token_id, stops or (), tokenizer) for ids in rows]
        past = torch.arange(length) >= torch.tensor(ends)[:, None]
        answers = torch.tensor(rows).masked_fill(past, self.config.eot_token_id)
        return answers.to(prompts["input_ids"].device), ends

    def _with_answers(self, inputs: dict, length: int) -> dict:
        """Inputs with `length` masked positions behind each prompt."""
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
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


def _prompts(tensors: dict, inputs) -> tuple[dict, int | None]:
    """The tensors without answers, and the positions that are masked for an answer (None: none)."""
    if "boxes" in tensors:
        raise ValueError(
            "expected a prompt about whole images, got regions; captions of regions are made"
            " by `diffusion_generate`"
        )
    if (inputs is None) == ("input_ids" not in tensors):
        raise ValueError("expected exactly one of `input_ids` and `inputs`")
    tensors = {"input_ids": inputs, **tensors}
    length = tensors["input_ids"].shape[1]
    labels = tensors.get("labels")
    start = length
    if "role_ids" in tensors:
        start = prompt_length(tensors)
    elif labels is not None:
        start = _first_label(labels)
    if start == 0:
        raise ValueError("expected a prompt before the answer, got none")
    slots = length - start if labels is None and start < length else None
    prompts = {k: v[:, :start] if k in COLUMNS else v for k, v in tensors.items()}
    return {k: v for k, v in prompts.items() if k not in TRAINING_INPUTS}, slots


def _first_label(labels: torch.Tensor) -> int:
    """The column (of (B, L)) in which every row's answer starts."""
    starts = (labels == IGNORED_LABEL).long().cumprod(1).sum(1)
    if len(starts.unique()) > 1:
        raise ValueError(
            f"expected answers that start in one column, got columns {starts.tolist()}: pad the"
            " prompts on the left, or let the processor make the inputs"
        )
    return int(starts[0])


def _end(ids: list[int], eot: int, stops, tokenizer) -> int:
    """Tokens up to the first end-of-turn or stop string, that one counted."""
    end = ids.index(eot) + 1 if eot in ids else len(ids)

    def stopped(count: int) -> bool:
        known = [token for token in ids[:count] if token < len(tokenizer)]
        text = tokenizer.decode(known)
        return any(stop in text for stop in stops)

    if stops and stopped(end):
        end = next(count for count in range(1, end + 1) if stopped(count))
    return end
