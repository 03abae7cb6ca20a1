"""transformers' `generate`, for answers about whole images."""

from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from .configuration_perceptiondlm import (
    ROLE_CAPTION,
    ROLE_SHARED,
    SHARED_REGION,
    PerceptionDLMConfig,
)
from .generation_options import (
    KNOWN,
    DiffusionOptions,
    GenerateArguments,
    decoding_defaults,
)
from .image_processing_perceptiondlm import PerceptionDLMImageProcessor
from .processing_perceptiondlm import PerceptionDLMProcessor
from .processing_sequence import IGNORED_LABEL, RESPONSE_INPUTS, response_length

# An answer is the only group of its row.
ANSWER_REGION = 0
COLUMNS = ("input_ids", "attention_mask", "position_ids", "region_ids", "role_ids")
# What only training needs beside them, and what comes with images.
TRAINING_INPUTS = ("labels", "timesteps", "noise")
IMAGE_INPUTS = (*PerceptionDLMImageProcessor.model_input_names, "region_orders")
INPUTS = (*COLUMNS, *IMAGE_INPUTS, *TRAINING_INPUTS, *RESPONSE_INPUTS)


class GenerateMixin:
    """Gives transformers' `generate` to a model that has `diffusion_generate`.

    Attributes:
        config, generation_config, diffusion_generate: the model's.
    """

    config: PerceptionDLMConfig
    generation_config: GenerationConfig
    diffusion_generate: Callable
    _saved_processor: Callable

    @property
    def decoding_defaults(self) -> dict:
        """Returns the options of `DiffusionOptions` that the checkpoint prefers."""
        return decoding_defaults(self.generation_config)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        streamer=None,
        tokenizer=None,
        **inputs_and_options,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Returns prompts and their answers, int64 (B, L + n).

        Past an answer's first end-of-turn or stop string there is only end-of-turn.

        Args:
            input_ids, attention_mask: (B, L), prompts padded on the left. Answers in them, to be
                filled or to be learned, are left out.
            inputs: another name of `input_ids`.
            generation_config: goes before the model's own `generation_config`, and what is given
                by name before both. `generation_options` lists the fields that are honored, and
                the neutral values of all others; another value raises ValueError.
            streamer: gets the prompts, then the answers' tokens in turn when all are final.
            tokenizer: encodes stop strings, where no `processor` is given or saved.
            inputs_and_options: the processor's other tensors, fields of `GenerationConfig`, and
                options of `diffusion_generate`; `max_new_tokens` is n (default: the length of the
                masked answers in the inputs, then the checkpoint's).
        """
        # What was given, by what it is for.
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs_and_options}
        call = {k: v for k, v in given.items() if k in KNOWN}
        options = {k: v for k, v in given.items() if k not in KNOWN and k not in INPUTS}
        tensors = {k: v for k, v in given.items() if k in INPUTS and v is not None}
        self._expect_real_tokens()
        prompts, slots = _prompts(tensors, inputs)
        ids = prompts["input_ids"]

        # transformers' arguments, translated to decoding options.
        configs = (generation_config, self.generation_config)
        arguments = GenerateArguments(call, configs, self._end_ids())
        suppressed = self.decoding_defaults.get("suppress_tokens", ())
        options = arguments.options(suppressed) | options
        if tokenizer is not None and options.get("processor") is None:
            options["processor"] = PerceptionDLMProcessor(PerceptionDLMImageProcessor(), tokenizer)
        # How long the answers are to be.
        length = arguments.new_tokens(ids.shape[1], slots)
        if length is None:
            length = DiffusionOptions.build(self.decoding_defaults, {}).max_new_tokens

        # Denoise; to a streamer it looks as if the tokens came one after another.
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
        """Refuses virtual tokens, for which PEFT puts a method of its own in the model's place."""
        if "prepare_inputs_for_generation" in vars(self):
            raise ValueError(
                "expected an adapter of weights, such as LoRA, got one with virtual tokens, which"
                " diffusion has no place for"
            )

    def _end_ids(self) -> set[int]:
        """Collects the ids that end an answer or stand behind it."""
        named = (self.config.eot_token_id, self.config.eos_token_id, self.config.pad_token_id)
        lists = (ids if isinstance(ids, list) else [ids] for ids in named if ids is not None)
        return {token for ids in lists for token in ids}

    def _answers(self, prompts: dict, length: int, options: dict):
        """Answers prompts for `generate`.

        Returns int64 (B, length), only end-of-turn past each one's end, and each one's number of
        tokens, the one that ends it counted.
        """
        out = self.diffusion_generate(inputs=self._with_answers(prompts, length), **options)
        rows = [row[0] for row in out.token_ids]
        chosen = {k: v for k, v in options.items() if k == "stop_strings"}
        # Past its end an answer is filled up with end-of-turn.
        stops = DiffusionOptions.build(self.decoding_defaults, chosen).stop_strings
        tokenizer = stops and (options.get("processor") or self._saved_processor()).tokenizer
        ends = [_end(ids, self.config.eot_token_id, stops or (), tokenizer) for ids in rows]
        past = torch.arange(length) >= torch.tensor(ends)[:, None]
        answers = torch.tensor(rows).masked_fill(past, self.config.eot_token_id)
        return answers.to(prompts["input_ids"].device), ends

    def _with_answers(self, inputs: dict, length: int) -> dict:
        """Adds `length` masked positions behind each prompt of the inputs."""
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        if not bool(mask[:, -1].all()):
            raise ValueError("expected prompts padded on the left, got padding on the right")

        positions = inputs.get("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
        steps = torch.arange(1, length + 1, device=ids.device)
        columns = {  # name: (of the prompt where it is not given, of the answer)
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
        start = ids.shape[1]
        places = torch.arange(start, start + length, device=ids.device)
        responses = {
            "response_columns": places.expand(len(ids), 1, -1),
            "response_start": torch.full((len(ids),), start, device=ids.device),
            "task": "answers",
        }
        return {**inputs, **extended, **responses}


def _prompts(tensors: dict, inputs) -> tuple[dict, int | None]:
    """Leaves the answers out of the tensors given to `generate`.

    Returns the prompts, and how many positions were masked for an answer (None: none).
    """
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

    # An answer that is there, to be filled or learned, begins where the processor says.
    start = length
    if "response_start" in tensors:
        start = int(tensors["response_start"][0])
    elif labels is not None:
        start = _first_label(labels)
    if start == 0:
        raise ValueError("expected a prompt before the answer, got none")
    slots = length - start if labels is None and start < length else None
    prompts = {k: v[:, :start] if k in COLUMNS else v for k, v in tensors.items()}
    return {
        k: v for k, v in prompts.items() if k not in (*TRAINING_INPUTS, *RESPONSE_INPUTS)
    }, slots


def _first_label(labels: torch.Tensor) -> int:
    """Finds the column of labels (B, L) in which every row's answer starts."""
    starts = (labels == IGNORED_LABEL).long().cumprod(1).sum(1)
    if len(starts.unique()) > 1:
        raise ValueError(
            f"expected answers that start in one column, got columns {starts.tolist()}: pad the"
            " prompts on the left, or let the processor make the inputs"
        )
    return int(starts[0])


def _end(ids: list[int], eot: int, stops: Sequence[str], tokenizer) -> int:
    """Counts the tokens up to the first end-of-turn or stop string, that one included."""
    end = min(response_length(ids, [(eot,)]) + 1, len(ids))

    def stopped(count: int) -> bool:
        known = [token for token in ids[:count] if token < len(tokenizer)]
        text = tokenizer.decode(known)
        return any(stop in text for stop in stops)

    # A stop string may be spelled by other tokens than when it stands alone.
    if stops and stopped(end):
        end = next(count for count in range(1, end + 1) if stopped(count))
    return end
