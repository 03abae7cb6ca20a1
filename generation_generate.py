"""transformers' `generate`, for answers about whole images, and decoding defaults.

A checkpoint's defaults for the options of `DiffusionOptions` are fields of its
`generation_config.json`, beside transformers' own. Which of those `generate` honors, and which may
only be neutral, is said in the tables below.
"""

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
    OPTIONS,
    RENAMED,
    DiffusionOptions,
    expect_known,
    expect_neutral,
    plain,
)
from .generation_rules import ACCEPT_RULES
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

# Which of transformers' arguments `generate` honors.
HONORED = (
    "max_new_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "stop_strings",
    "suppress_tokens",
    "return_dict_in_generate",
)

# Values that ask for something and its contrary give the same tokens.
WITHOUT_EFFECT = ("use_cache", "disable_compile", "bos_token_id", "transformers_version")

# Ids that may be named as the end or the padding of an answer, see `GenerateArguments`.
ENDS = ("eos_token_id", "pad_token_id")

# Every other field of a GenerationConfig, and every other argument of transformers' `generate`, may
# only say nothing: be None, False, 0 or empty, or have the value below, which changes nothing.
CALL_ARGUMENTS = (
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "inputs_embeds",
    "logits_processor",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "past_key_values",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "synced_gpus",
)
NOTHING: tuple = (None, False, 0, 0.0, [], {})
NEUTRAL_VALUES = {
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "length_penalty": 1.0,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "target_lookbehind": 10,
    "top_h": 1.0,
    "typical_p": 1.0,
}
FIELDS = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
NEUTRAL = {
    name: (NEUTRAL_VALUES[name],) if name in NEUTRAL_VALUES else NOTHING
    for name in {*FIELDS, *CALL_ARGUMENTS} - {*HONORED, *WITHOUT_EFFECT, *ENDS}
}

UNSAMPLED = {"temperature": (0, 0.0, 1, 1.0), "top_k": (0, 50), "top_p": (1, 1.0)}
GREEDY = {"temperature": 0.0}
DEFAULT_MAX_LENGTH = 20  # GenerationConfig's, which a trainer fills in


# Options of `diffusion_generate` that a generation config may hold beside transformers' own fields.
DIFFUSION_FIELDS = tuple(sorted(set(OPTIONS) - set(HONORED) - {"generator"}))
KNOWN = {*HONORED, *WITHOUT_EFFECT, *ENDS, *NEUTRAL, *DIFFUSION_FIELDS}


def default_generation_config(config) -> GenerationConfig:
    """Makes the decoding defaults of a model that has no `generation_config.json`.

    Special tokens are never produced in answers. Checkpoints that were saved before that file held
    the defaults have them in the config, as `generation_defaults` and `banned_token_ids`.
    """
    # As the config says, or all tokens that stand for structure.
    suppressed = config.banned_token_ids
    if suppressed is None:
        headers = [config.start_header_token_id, config.end_header_token_id]
        ids = [config.eos_token_id, config.bos_token_id, *headers, config.mask_token_id]
        suppressed = [i for i in ids if i is not None]

    options = {"suppress_tokens": suppressed, **upgrade_options(config.generation_defaults or {})}
    chosen = DiffusionOptions.build(options, {})
    if chosen.temperature > 0:
        options["do_sample"] = True
    return GenerationConfig(**{**options, "max_new_tokens": chosen.max_new_tokens})


def take_defaults(config) -> GenerationConfig:
    """Moves the decoding defaults out of a config; what it returns belongs in a file of its own."""
    taken = default_generation_config(config)
    config.generation_defaults = config.banned_token_ids = None
    return taken


def update_generation_config(config: GenerationConfig, saved: dict, place) -> GenerationConfig:
    """Returns a generation config with other fields over its own.

    Args:
        config: the decoding defaults that hold where `saved` says nothing.
        saved: fields, as a `generation_config.json` holds them.
        place: where they come from, for messages.

    Raises ValueError for a field that neither transformers nor `DiffusionOptions` knows, and for an
    option's value that cannot be.
    """
    saved = {k: v for k, v in saved.items() if not k.startswith("_")}
    try:
        expect_known({k: v for k, v in saved.items() if k not in KNOWN})
        updated = GenerationConfig.from_dict({**config.to_dict(), **saved})
        DiffusionOptions.build(decoding_defaults(updated), {})
    except ValueError as error:
        raise ValueError(f"{error}, in the generation config of {place}") from error
    return updated


def decoding_defaults(generation_config: GenerationConfig) -> dict:
    """Returns the options of `DiffusionOptions` that a generation config sets.

    As in transformers, its temperature, top_k and top_p count only beside `do_sample`: trainers
    fill them in.
    """
    given = generation_config.to_diff_dict()
    ignored = () if given.get("do_sample") else UNSAMPLED
    return {n: given[n] for n in OPTIONS if given.get(n) is not None and n not in ignored}


def upgrade_options(options: dict) -> dict:
    """Translates options of a checkpoint that was saved under their old names."""
    upgraded = {k: v for k, v in options.items() if k not in RENAMED}
    # One option named the rule, another its value.
    rule, value = options.get("adaptive"), options.get("adaptive_value")
    if rule is not None:
        if rule not in ACCEPT_RULES:
            raise ValueError(f"expected adaptive among {', '.join(ACCEPT_RULES)}, got {rule!r}")
        upgraded[rule] = ACCEPT_RULES[rule]().value if value is None else value
    for old in ("banned_token_ids", "adaptive_verify", "prompt_cache"):
        if options.get(old) is not None:
            upgraded[RENAMED[old]] = options[old]
    return upgraded


class GenerateArguments:
    """Checks the arguments of one call of `generate`; `get` reads one.

    The names are those of `GenerationConfig` and of `GenerationMixin.generate`. A value may come
    from the call, from the `generation_config` of the call or from the model's own, in this order.

    Args:
        call: those of the call that are transformers'.
        configs: GenerationConfigs or None, each goes before the next; the last is the model's.
        ends: ids that may be named as the end or the padding of an answer.
    """

    def __init__(self, call: dict, configs, ends: set[int]):
        self.levels = [call, *(_fields(config) for config in configs if config is not None)]
        self.levels = [{k: v for k, v in own.items() if v is not None} for own in self.levels]
        for own in self.levels:
            unknown = sorted(own.keys() - KNOWN)
            if unknown:
                raise ValueError(f"expected fields that `generate` knows, got {unknown}")
            _expect_ends(own, ends)
            expect_neutral({k: v for k, v in own.items() if k in NEUTRAL}, NEUTRAL)

    def get(self, name: str):
        """Returns the value of the first level that has one, else None."""
        return next((own[name] for own in self.levels if name in own), None)

    def new_tokens(self, prompt_length: int, slots: int | None) -> int | None:
        """Returns the number of an answer's tokens; None where nothing says it.

        That is `max_new_tokens` or, where it is not given, `max_length`; the `slots` that the
        inputs have for it go before the last level, the model's own.
        """
        # The first level that says anything about the length decides.
        for own in self.levels:
            if own is self.levels[-1] and slots is not None:
                return slots
            if "max_new_tokens" in own:
                return own["max_new_tokens"]
            length = own.get("max_length")
            if length is None or (own is not self.levels[0] and length == DEFAULT_MAX_LENGTH):
                continue
            if length <= prompt_length:
                raise ValueError(
                    f"expected max_length beyond the prompt's {prompt_length} tokens, got {length}"
                )
            return length - prompt_length
        return None

    def options(self, suppressed: Sequence[int]) -> dict:
        """Returns options of `diffusion_generate`: sampling, stop strings, suppressed tokens.

        `suppressed` are the checkpoint's ids, to which those of the call are added. What only the
        model's own level says is left to the checkpoint's defaults.
        """
        options = self._sampling()
        stops = self._asked("stop_strings")
        if stops is not None:
            options["stop_strings"] = [stops] if isinstance(stops, str) else list(stops)
        more = self._asked("suppress_tokens")
        if more is not None:
            options["suppress_tokens"] = [*suppressed, *more]
        for name in DIFFUSION_FIELDS:
            if self._asked(name) is not None:
                options[name] = self._asked(name)
        return options

    def _asked(self, name: str):
        """Returns the value of a level before the model's own, else None."""
        return next((own[name] for own in self.levels[:-1] if name in own), None)

    def _sampling(self) -> dict:
        """Returns the options of sampling; none where the checkpoint's defaults decide."""
        if not self.get("do_sample"):
            for name, neutral in UNSAMPLED.items():
                value = self._asked(name)
                if value is not None and value not in neutral:
                    raise ValueError(f"expected no {name} without do_sample, got {value}")
            is_declined = self._asked("do_sample") is not None
            return {**dict.fromkeys(UNSAMPLED), **GREEDY} if is_declined else {}

        given = {name: self.get(name) for name in UNSAMPLED}
        temperature = 1.0 if given["temperature"] is None else given["temperature"]
        if temperature == 0:
            raise ValueError("expected a temperature above 0 with do_sample, got 0")
        return {
            "temperature": temperature,
            "top_k": given["top_k"] or None,  # 0 is all, as in transformers
            "top_p": given["top_p"],
        }


def _fields(config) -> dict:
    return {k: v for k, v in vars(config).items() if not k.startswith("_")}


def _expect_ends(given: dict, ends: set[int]):
    for name in ENDS:
        value = plain(given.get(name))
        ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if not set(ids) <= ends:
            raise ValueError(f"expected {name} among {sorted(ends)}, got {value!r}")


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
