"""Options of `diffusion_generate`, and the rules of decoding that they choose."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .denoising_diffusion import Adaptive, BlockCommit, JointRemasking, Rule, accept_rule

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
