"""Which of transformers' arguments `generate` honors, and which may only be neutral.

The names are those of `GenerationConfig` and of `GenerationMixin.generate`. A value may come from
the call, from the `generation_config` of the call or from the model's own, in this order.
"""

from .neutral_arguments import expect_neutral

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

# What may be given beside None.
NEUTRAL = {
    # length
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
    "early_stopping": (False,),
    "length_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    # ways of decoding
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "use_mtp": (False,),
    "custom_generate": (),
    # what logits are changed by
    "min_p": (0.0,),
    "top_h": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "logits_processor": ([],),
    "stopping_criteria": ([],),
    "prefix_allowed_tokens_fn": (),
    "negative_prompt_ids": (),
    "negative_prompt_attention_mask": (),
    # what is returned
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    # caches and compiling
    "cache_implementation": (),
    "cache_config": (),
    "max_cache_len": (),
    "past_key_values": (),
    "compile_config": (),
    "prefill_chunk_size": (),
    "continuous_batching_config": (),
    "low_memory": (False,),
    # assistants
    "assistant_model": (),
    "assistant_tokenizer": (),
    "is_assistant": (False,),
    "num_assistant_tokens": (20,),
    "num_assistant_tokens_schedule": ("constant",),
    "assistant_confidence_threshold": (0.4,),
    "assistant_lookbehind": (10,),
    "target_lookbehind": (10,),
    "assistant_ensemble_weight": (),
    "assistant_early_exit": (),
    "speculation_type": (),
    "prompt_lookup_num_tokens": (),
    "max_matching_ngram_size": (),
    # other kinds of model and of run
    "decoder_start_token_id": (),
    "inputs_embeds": (),
    "synced_gpus": (False,),
}
UNSAMPLED = {"temperature": (0, 0.0, 1, 1.0), "top_k": (0, 50), "top_p": (1, 1.0)}
GREEDY = {"temperature": 0.0}
DEFAULT_MAX_LENGTH = 20  # GenerationConfig's, which a trainer fills in


class GenerateArguments:
    """The arguments of one call of `generate`, checked; `get` reads one.

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
        """The value of the first level that has one, else None."""
        return next((own[name] for own in self.levels if name in own), None)

    def new_tokens(self, prompt_length: int, slots: int | None) -> int | None:
        """Tokens of an answer: `max_new_tokens` or, where it is not given, `max_length`; the
        `slots` that the inputs have for it go before the last level, the model's own."""
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

    def options(self, banned_token_ids) -> dict:
        """Options of `diffusion_generate`: sampling, stop strings and what is never produced."""
        options = self._sampling()
        stops = self.get("stop_strings")
        if stops is not None:
            options["stop_strings"] = [stops] if isinstance(stops, str) else list(stops)
        suppressed = self.get("suppress_tokens")
        if suppressed is not None:
            options["banned_token_ids"] = [*banned_token_ids, *suppressed]
        return options

    def _sampling(self) -> dict:
        given = {name: self.get(name) for name in UNSAMPLED}
        if not self.get("do_sample"):
            for name, value in given.items():
                if value is not None and value not in UNSAMPLED[name]:
                    raise ValueError(f"expected no {name} without do_sample, got {value}")
            # left to the checkpoint's defaults unless sampling is declined by name
            return {} if self.get("do_sample") is None else {**dict.fromkeys(given), **GREEDY}
        temperature = 1.0 if given["temperature"] is None else given["temperature"]
        if temperature == 0:
            raise ValueError("expected a temperature above 0 with do_sample, got 0")
        return {
            "temperature": temperature,
            "top_k": given["top_k"] or None,  # 0 is all, as in transformers
            "top_p": given["top_p"],
        }


KNOWN = {*HONORED, *WITHOUT_EFFECT, *NEUTRAL, "eos_token_id", "pad_token_id"}


def _fields(config) -> dict:
    return {k: v for k, v in vars(config).items() if not k.startswith("_")}


def _expect_ends(given: dict, ends: set[int]):
    for name in ("eos_token_id", "pad_token_id"):
        value = given.get(name)
        value = value.tolist() if hasattr(value, "tolist") else value
        ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if not set(ids) <= ends:
            raise ValueError(f"expected {name} among {sorted(ends)}, got {value!r}")
