"""Options of `diffusion_generate`, and the rules of decoding that they choose."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .generation_loop import Adaptive, BlockCommit, JointRemasking, Rule, accept_rule


def expect_neutral(given: dict, neutral: dict[str, tuple]):
    """Refuses values that are neither None nor among the `neutral` ones of their name.

    Raises ValueError for such a value, TypeError for a name that `neutral` lacks.
    """
    for name, value in given.items():
        if name not in neutral:
            raise TypeError(f"expected arguments among {sorted(neutral)}, got {name!r}")
        allowed = neutral[name]
        if value is not None and not any(_same(value, other) for other in allowed):
            wanted = " or ".join(map(repr, allowed)) or "None"
            raise ValueError(f"expected {name} {wanted}, got {value!r}")


def _same(value, other) -> bool:
    return _plain(value) == _plain(other) and isinstance(value, bool) == isinstance(other, bool)


def _plain(value):
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, (list, tuple)) else value


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


REMASKING = ("low_confidence", "random")
LARGEST_NUMBER = 1e6  # beyond it logits overflow
MAX_STEPS = 2**16  # more than any response has positions

# Options that one of the two tasks has no use for, and the task that has.
TASK_OPTIONS = {
    "caption_length": "captions",
    "max_new_tokens": "answers",
    "block_length": "answers",
}


@dataclass(frozen=True)
class DiffusionOptions:
    """How to decode. Every option is checked on construction; an unknown one raises.

    Attributes:
        steps: denoising steps, all blocks together (default: one for each answer position, and
            for regions `caption_length`); with `adaptive`, the most that may be taken.
        caption_length: tokens of a region's caption.
        max_new_tokens: tokens of an answer about whole images.
        block_length: answers are decoded in blocks of so many tokens (default: one block).
        temperature, top_k, top_p: sampling; 0 takes the likeliest token.
        cfg_scale: classifier-free guidance w, logits u + (w + 1)(c - u), u with the prompt masked.
        remasking: "low_confidence" or "random".
        stop_strings: an answer ends where one of these stands; once one is there, only what is
            before it is still decoded, and what is behind it stays as it is in `token_ids`.
        banned_token_ids: never produced; None: none for captions, the checkpoint's for answers.
        adaptive: commit what is confident enough: "threshold", "factor" or "entropy_bound"; None:
            the released schedules.
        adaptive_value: the threshold, factor or bound.
        adaptive_verify: doubt committed tokens whose probability falls under this (WINO).
        prompt_cache: approximate: recompute the prompt only every so many steps (1: exact,
            0: never again). None: exact. Means nothing to the independent layout, always cached.
        compile: compile the step with torch.compile, for GPUs; on a CPU it is slower than without.
        batch_size: most passes run together (None: all).
        seed: makes a run repeatable; or pass `generator`. What an image draws follows from the
            seed and the image's place in the call, so it depends neither on `batch_size` nor on
            the images beside it.
        return_history: keep the answers after each step.
    """

    steps: int | None = None
    caption_length: int = 32
    max_new_tokens: int = 128
    block_length: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    stop_strings: Sequence[str] | None = None
    banned_token_ids: Sequence[int] | None = None
    adaptive: str | None = None
    adaptive_value: float | None = None
    adaptive_verify: float | None = None
    prompt_cache: int | None = None
    compile: bool = False
    batch_size: int | None = None
    seed: int | None = None
    generator: torch.Generator | None = None
    return_history: bool = False

    @classmethod
    def build(cls, defaults: dict, options: dict, task: str | None = None) -> "DiffusionOptions":
        """Merges call options over the checkpoint's defaults.

        `task` is "captions" or "answers"; None: not known yet. A checkpoint's defaults for the
        other task are left out. Raises ValueError for unknown names, and for an option of the
        other task.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(defaults | options) - names)
        if "input_ids" in unknown:
            raise ValueError("expected what the processor made as `inputs=...`, got it as keywords")
        if unknown:
            raise ValueError(f"expected options among {sorted(names)}, got {unknown}")
        if task is None:
            return cls(**(defaults | options))

        for name in sorted(set(options) - set(options_for(task, options))):
            if options[name] is not None:
                raise ValueError(
                    f"expected no {name} for {task}, got {options[name]!r}:"
                    f" it is an option of {TASK_OPTIONS[name]}"
                )
        return cls(**options_for(task, defaults | options))

    def __post_init__(self):
        for name in ("caption_length", "max_new_tokens"):
            _expect_integer(name, getattr(self, name), 1)
        for name in ("block_length", "top_k", "batch_size"):
            _expect_integer(name, getattr(self, name), 1, optional=True)
        _expect_integer("steps", self.steps, 1, optional=True, most=MAX_STEPS)
        _expect_integer("prompt_cache", self.prompt_cache, 0, optional=True)
        _expect_number("temperature", self.temperature, 0)
        _expect_number("cfg_scale", self.cfg_scale, 0)
        for name in ("top_p", "adaptive_verify"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= 1):
                raise ValueError(f"expected {name} in (0, 1], got {value!r}")
        _expect_integer("seed", self.seed, 0, optional=True, most=2**64 - 1)
        banned = () if self.banned_token_ids is None else self.banned_token_ids
        _expect_type("banned_token_ids", banned, (list, tuple))
        for token in banned:
            _expect_integer("each of banned_token_ids", token, 0)
        for name in ("compile", "return_history"):
            _expect_type(name, getattr(self, name), bool)
        if self.generator is not None:
            _expect_type("generator", self.generator, torch.Generator)
        if not isinstance(self.remasking, str) or self.remasking not in REMASKING:
            raise ValueError(f"expected remasking among {REMASKING}, got {self.remasking!r}")
        stops = () if self.stop_strings is None else self.stop_strings
        if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"expected stop_strings as a list of texts, got {stops!r}")
        if self.seed is not None and self.generator is not None:
            raise ValueError("expected at most one of seed and generator, got both")
        if self.adaptive is not None:
            accept_rule(self.adaptive, self.adaptive_value)
        elif self.adaptive_value is not None or self.adaptive_verify is not None:
            raise ValueError("expected `adaptive` with adaptive_value or adaptive_verify, got None")

    def check_against(self, config):
        """Refuses lengths and token ids that a model of `config` does not have."""
        limit = config.text_config.max_position_embeddings
        for name in ("caption_length", "max_new_tokens"):
            if getattr(self, name) > limit:
                raise ValueError(
                    f"expected {name} of at most the model's {limit} positions,"
                    f" got {getattr(self, name)}"
                )
        vocabulary = config.text_config.vocab_size
        banned = set(self.banned_token_ids or ())
        if banned and max(banned) >= vocabulary:
            raise ValueError(
                f"expected banned_token_ids below the vocabulary's {vocabulary}, got {max(banned)}"
            )
        if len(banned) == vocabulary:
            raise ValueError("expected banned_token_ids to leave a token, got all of them")

    @property
    def is_random(self) -> bool:
        """Whether anything is drawn."""
        return self.temperature > 0 or self.remasking == "random"

    def draw_seed(self, device) -> int:
        """The seed of a whole call: drawn from the generator given, from a fresh one of `seed`,
        or from torch's own."""
        generator = self.generator
        if self.seed is not None:
            generator = torch.Generator(device).manual_seed(self.seed)
        at = device if generator is None else generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, device=at))

    def region_rule(self, scope: str, eot_token_id: int | None) -> Rule:
        """The rule for captions; `scope` is what re-masking ranks together."""
        steps = self.steps or self.caption_length
        if self.adaptive is None:
            return JointRemasking(steps, scope)
        return self._adaptive(steps, self.caption_length, eot_token_id)

    def answer_rule(self, length: int, eot_token_id: int | None) -> Rule:
        """The rule for an answer of `length` tokens."""
        block = self.block_length or length
        if length % block:
            raise ValueError(f"expected block_length to divide {length} new tokens, got {block}")
        blocks = length // block
        steps = self.steps or length
        if self.adaptive is not None:
            return self._adaptive(steps, block, eot_token_id)
        if steps % blocks:
            raise ValueError(f"expected steps divisible by the {blocks} blocks, got {steps}")
        return BlockCommit(steps, block, blocks, retry_masks=True)

    def _adaptive(self, steps: int, block: int, eot_token_id: int | None) -> Rule:
        accept = accept_rule(self.adaptive, self.adaptive_value)
        return Adaptive(steps, accept, block, eot_token_id, self.adaptive_verify)


def options_for(task: str, options: dict) -> dict:
    """Leaves out of options meant for both tasks those that "captions" or "answers" have no use
    for."""
    return {k: v for k, v in options.items() if TASK_OPTIONS.get(k, task) == task}


def options_of(task: str) -> list[str]:
    """Names the options that "captions" or "answers" alone have a use for."""
    return [name for name, own in TASK_OPTIONS.items() if own == task]


def _expect_integer(name: str, value, least: int, optional: bool = False, most: int = 2**31 - 1):
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        limit = f" and at most {most}" if isinstance(value, int) and value > most else ""
        raise ValueError(
            f"expected {name} to be an integer of at least {least}{limit}, got {value!r}"
        )


def _expect_number(name: str, value, least: float):
    if not _is_number(value) or not least <= value <= LARGEST_NUMBER:
        limit = f" and at most {LARGEST_NUMBER:g}" if _is_number(value) and value > least else ""
        raise ValueError(
            f"expected {name} to be a number of at least {least}{limit}, got {value!r}"
        )


def _expect_type(name: str, value, kinds: type | tuple[type, ...]):
    if not isinstance(value, kinds):
        names = " or ".join(k.__name__ for k in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"expected {name} as {names}, got {value!r}")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
