"""How to decode: the options of `diffusion_generate`.

`DiffusionOptions` is the one declaration of the decoding options. The command lines, the server's
fields and the README's table are made from it. `generation_generate.py` reads a checkpoint's
defaults for them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .generation_rules import (
    ACCEPT_RULES,
    Adaptive,
    Blockwise,
    RemaskLowConfidence,
    Rule,
    SemiAutoregressive,
)

MAX_NUMBER = 1e6  # beyond it logits overflow
MAX_INTEGER = 2**31 - 1
MAX_STEPS = 2**16  # more than any response has positions
MAX_SEED = 2**64 - 1
ACCEPTANCES = " or ".join([", ".join(list(ACCEPT_RULES)[:-1]), list(ACCEPT_RULES)[-1]])
EXCLUSIVE = (tuple(ACCEPT_RULES), ("seed", "generator"))  # options of which one may be given

# What `fast` stands for; docs/algorithm.md has what it was measured to cost.
FAST_ANSWERS = {"threshold": 0.9}
FAST_CAPTIONS = {**FAST_ANSWERS, "prompt_refresh_interval": 0}

# Asks for the released schedule, so many tokens a step, whatever a checkpoint prefers.
FIXED_SCHEDULE = {**dict.fromkeys((*ACCEPT_RULES, "remask_below")), "fast": False}

# What decoding in blocks says, and all that a template's fields say, so that no option can.
IN_BLOCKS = ("block_length", "early_stop", "block_cache", "stop_strings")
TEMPLATE_DECIDES = ("caption_length", "max_new_tokens", *IN_BLOCKS)

# Names that options had before, and what is to be written instead.
RENAMED = {
    "banned_token_ids": "suppress_tokens",
    "adaptive": "threshold=, factor= or entropy_bound=",
    "adaptive_value": "threshold=, factor= or entropy_bound=",
    "adaptive_verify": "remask_below",
    "prompt_cache": "prompt_refresh_interval",
}


# Checks of a value: each raises an error that says what was expected and what came.


def integer(low: int, high: int = MAX_INTEGER) -> Callable:
    """Makes a check for whole numbers from `low` to `high`."""

    def check(name: str, value):
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or not low <= value <= high:
            limit = f" and at most {high}" if is_integer and value > high else ""
            raise ValueError(
                f"expected {name} to be an integer of at least {low}{limit}, got {value!r}"
            )

    return check


def number(low: float, high: float = MAX_NUMBER) -> Callable:
    """Makes a check for numbers from `low` to `high`."""

    def check(name: str, value):
        if not _is_number(value) or not low <= value <= high:
            limit = f" and at most {high:g}" if _is_number(value) and value > low else ""
            raise ValueError(
                f"expected {name} to be a number of at least {low}{limit}, got {value!r}"
            )

    return check


def share(name: str, value):
    """Checks for a number above 0 and of at most 1."""
    if not (_is_number(value) and 0 < value <= 1):
        raise ValueError(f"expected {name} in (0, 1], got {value!r}")


def one_of(*allowed: str) -> Callable:
    """Makes a check for one of some words."""

    def check(name: str, value):
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"expected {name} among {allowed}, got {value!r}")

    return check


def instance(kind: type) -> Callable:
    """Makes a check for values of a type."""

    def check(name: str, value):
        if not isinstance(value, kind):
            raise ValueError(f"expected {name} as {kind.__name__}, got {value!r}")

    return check


def token_ids(name: str, value):
    """Checks for a list of token ids."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected {name} as list or tuple, got {value!r}")
    for token in value:
        integer(0)(f"each of {name}", token)


def texts(name: str, value):
    """Checks for a list of texts, none of them empty."""
    is_list = isinstance(value, (list, tuple))
    if not is_list or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"expected {name} as a list of texts, got {value!r}")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def expect_neutral(given: dict, neutral: dict[str, tuple]):
    """Refuses values that are neither None nor among the `neutral` ones of their name.

    Raises ValueError for such a value, TypeError for a name that `neutral` lacks.
    """
    for name, value in given.items():
        if name not in neutral:
            raise TypeError(f"expected arguments among {sorted(neutral)}, got {name!r}")
        allowed = neutral[name]
        if value is not None and not any(_same(value, other) for other in allowed):
            wanted = "None" if None in allowed or not allowed else " or ".join(map(repr, allowed))
            raise ValueError(f"expected {name} {wanted}, got {value!r}")


def _same(value, other) -> bool:
    return plain(value) == plain(other) and isinstance(value, bool) == isinstance(other, bool)


def plain(value):
    """Returns tensors, arrays and tuples as lists, other values as they are."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, (list, tuple)) else value


def option(default, check: Callable, text: str, *, kind=None, task=None, choices=None):
    """Declares a decoding option.

    Args:
        default: None for an option that may be left open, which is then not checked.
        check: called with the option's name and value; raises ValueError.
        text: what the option does, in one sentence, for help texts.
        kind: the type as which a command line reads it; None: not offered on command lines.
        task: "captions" or "answers", where the other task has no use for it.
        choices: the words that may be given.
    """
    metadata = {"check": check, "text": text, "kind": kind, "task": task, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DiffusionOptions:
    """Says how to decode. Every option is checked on construction; an unknown one raises."""

    steps: int | None = option(
        None,
        integer(1, MAX_STEPS),
        "denoising steps, all blocks together (default: one for each token of a response); with"
        f" {ACCEPTANCES} the most that may be taken",
        kind=int,
    )
    caption_length: int = option(
        32,
        integer(1),
        "tokens of a region's caption, padding counted",
        kind=int,
        task="captions",
    )
    max_new_tokens: int = option(
        128, integer(1), "tokens of an answer, padding counted", kind=int, task="answers"
    )
    block_length: int | None = option(
        None,
        integer(1),
        "decode an answer in blocks of so many tokens (default: one block)",
        kind=int,
        task="answers",
    )
    early_stop: bool | None = option(
        None,
        instance(bool),
        "with block_length: an answer is over with the block in which its end of turn is committed;"
        " later blocks are not decoded; at temperature 0 the text stays the same",
        kind=bool,
        task="answers",
    )

    # Sampling.
    temperature: float = option(
        0.0, number(0), "0 takes the likeliest token, more is more random", kind=float
    )
    top_k: int | None = option(None, integer(1), "choose among so many likeliest tokens", kind=int)
    top_p: float | None = option(
        None, share, "choose among the likeliest tokens of so much probability", kind=float
    )
    cfg_scale: float = option(
        0.0,
        number(0),
        "classifier-free guidance w: logits are u + (w + 1)(c - u), u with the prompt masked",
        kind=float,
    )
    suppress_tokens: Sequence[int] | None = option(
        None,
        token_ids,
        "ids that are never produced (default: none in captions, the checkpoint's in answers)",
    )
    stop_strings: Sequence[str] | None = option(
        None,
        texts,
        "an answer ends where one of these stands; what is behind it is not decoded any more",
    )

    # Which positions are committed: one for all by the released schedules, or what is sure enough.
    remasking: str = option(
        "low_confidence",
        one_of("low_confidence", "random"),
        "by what the fixed schedule ranks positions: low_confidence or random; it goes before a"
        " checkpoint's threshold, factor or entropy_bound",
        kind=str,
        choices=("low_confidence", "random"),
    )
    threshold: float | None = option(
        None,
        number(0, 1),
        "commit at each step what has at least this probability, say 0.9: fewer forward passes",
        kind=float,
    )
    factor: float | None = option(
        None,
        number(0),
        "commit at each step the k most confident while (k + 1)(1 - c_k) is below this, say 1.0",
        kind=float,
    )
    entropy_bound: float | None = option(
        None,
        number(0),
        "commit at each step the positions of lowest entropy within so many nats, say 0.1",
        kind=float,
    )
    remask_below: float | None = option(
        None,
        share,
        f"with {ACCEPTANCES}: mask committed tokens again whose probability falls under this",
        kind=float,
    )

    # How it is computed.
    fast: bool = option(
        False,
        instance(bool),
        "approximate: threshold=0.9 and, for captions in the joint layout,"
        " prompt_refresh_interval=0, where the call says nothing else",
        kind=bool,
    )
    prompt_refresh_interval: int | None = option(
        None,
        integer(0),
        "approximate, for the joint layout: recompute the prompt only every so many steps"
        " (1: exact, 0: never again; default: exact)",
        kind=int,
    )
    block_cache: str | None = option(
        None,
        one_of("prefix", "dual"),
        "approximate, with block_length: within a block keep keys and values of what is before it"
        " (prefix), or of all else (dual), as they were when it began (default: exact)",
        kind=str,
        task="answers",
        choices=("prefix", "dual"),
    )
    batch_size: int | None = option(
        None,
        integer(1),
        "region groups or questions run together (default: all)",
        kind=int,
    )
    compile: bool = option(
        False,
        instance(bool),
        "compile the step with torch.compile, for GPUs; on a CPU it is slower than without",
        kind=bool,
    )

    # What is drawn: depends on the seed and on an image's place in the call, so neither on
    # `batch_size` nor on the images beside it.
    seed: int | None = option(
        None, integer(0, MAX_SEED), "makes random decoding repeatable", kind=int
    )
    generator: torch.Generator | None = option(
        None, instance(torch.Generator), "draws the seed, instead of `seed`"
    )
    num_return_sequences: int = option(
        1,
        integer(1, 1024),
        "responses drawn for each region or question, at a temperature; all are returned, the"
        " likeliest first",
    )

    return_history: bool = option(False, instance(bool), "keep the responses after each step")
    return_token_scores: bool = option(
        False, instance(bool), "give the log-probability of each token, too"
    )

    @classmethod
    def build(cls, defaults: dict, options: dict, task: str | None = None) -> "DiffusionOptions":
        """Merges call options over the checkpoint's defaults.

        `task` is "captions" or "answers"; None: not known yet. A checkpoint's defaults for the
        other task are left out. Raises ValueError for unknown names, and for an option of the
        other task.
        """
        # Unknown names first, whichever of the two they come from.
        expect_known(defaults | options)
        if task is None:
            return cls(**merge_options(defaults, options))

        # An option of the call that the task has no use for is a mistake.
        for name in sorted(set(options) - set(options_for(task, options))):
            if options[name] is not None:
                raise ValueError(
                    f"expected no {name} for {task}, got {options[name]!r}:"
                    f" it is an option of {task_of(name)}"
                )
        defaults = options_for(task, defaults)
        if task == "captions":  # a checkpoint's list is of what its answers must not hold
            defaults.pop("suppress_tokens", None)
        return cls(**merge_options(defaults, options_for(task, options), task))

    def __post_init__(self):
        # Each value by its own check.
        for declared in dataclasses.fields(self):
            value = getattr(self, declared.name)
            if value is not None or declared.default is not None:
                declared.metadata["check"](declared.name, value)

        # Values that do not go together.
        if self.seed is not None and self.generator is not None:
            raise ValueError("expected at most one of seed and generator, got both")
        accepting = {n: getattr(self, n) for n in ACCEPT_RULES if getattr(self, n) is not None}
        if len(accepting) > 1:
            raise ValueError(f"expected at most one of {', '.join(ACCEPT_RULES)}, got {accepting}")
        if self.fast and not accepting:
            raise ValueError(
                f"expected one of {ACCEPTANCES} with fast, and no remasking, got none of them"
                f" and remasking {self.remasking!r}"
            )
        if accepting and self.remasking == "random":
            raise ValueError(
                f"expected remasking 'low_confidence' with {ACCEPTANCES}, which compare"
                " confidences, got 'random'"
            )
        if self.num_return_sequences > 1 and not self.is_random:
            raise ValueError(
                "expected a temperature above 0 for several num_return_sequences, which would else"
                f" all be the same, got {self.num_return_sequences}"
            )
        if self.num_return_sequences > 1 and self.return_history:
            raise ValueError(
                "expected return_history False with several num_return_sequences, got True"
            )
        if self.remask_below is not None and not accepting:
            raise ValueError(
                f"expected {ACCEPTANCES} with remask_below, got {self.remask_below} alone"
            )
        if self.is_block_by_block:
            self._check_blocks()

    def _check_blocks(self):
        """Refuses what does not go together with decoding that finishes one block after another."""
        name = "block_cache" if self.block_cache else "early_stop"
        if self.block_length is None:
            raise ValueError(f"expected block_length with {name}, got {name} alone")
        if self.remask_below is not None:
            raise ValueError(
                f"expected no remask_below, which masks finished blocks again, with {name},"
                f" got {self.remask_below}"
            )
        if self.block_cache and self.compile:
            raise ValueError("expected no compile with block_cache, whose steps differ, got True")

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
        suppressed = set(self.suppress_tokens or ())
        if suppressed and max(suppressed) >= vocabulary:
            raise ValueError(
                f"expected suppress_tokens below the vocabulary's {vocabulary},"
                f" got {max(suppressed)}"
            )
        if len(suppressed) == vocabulary:
            raise ValueError("expected suppress_tokens to leave a token, got all of them")

    @property
    def is_random(self) -> bool:
        """Tells whether anything is drawn."""
        return self.temperature > 0 or self.remasking == "random"

    @property
    def is_block_by_block(self) -> bool:
        """Tells whether each block is finished before the next one begins."""
        return bool(self.block_cache or self.early_stop)

    def draw_seed(self, device) -> int:
        """Draws the seed of a call from `generator`, a fresh one of `seed`, or torch's own."""
        generator = self.generator
        if self.seed is not None:
            generator = torch.Generator(device).manual_seed(self.seed)
        at = device if generator is None else generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, device=at))

    def region_rule(self, scope: str, eot_token_id: int | None, length: int | None = None) -> Rule:
        """Chooses the rule for captions.

        Args:
            scope: what re-masking ranks together.
            eot_token_id: what ends a caption; None where nothing does.
            length: the longest response's open positions, where they are of several lengths;
                each then takes a step for each of its own, unless `steps` says otherwise.
        """
        steps = self.steps or length or self.caption_length
        per_token = length is not None and self.steps is None
        accept = self._accept()
        if accept is None:
            return RemaskLowConfidence(steps, scope, per_token)
        block = length or self.caption_length
        return Adaptive(steps, accept, block, eot_token_id, self.remask_below, per_token)

    def answer_rule(
        self, length: int, eot_token_id: int | None, per_token: bool = False
    ) -> Rule | Blockwise:
        """Chooses the rule for an answer of `length` tokens; `per_token` as in `Adaptive`."""
        block = self.block_length or length
        if length % block:
            raise ValueError(f"expected block_length to divide {length} new tokens, got {block}")
        blocks = length // block
        steps = self.steps or length

        accept = self._accept()
        if self.is_block_by_block:
            return self._blockwise(steps, blocks, eot_token_id)
        if accept is not None:
            per_token = per_token and self.steps is None
            return Adaptive(steps, accept, block, eot_token_id, self.remask_below, per_token)
        _expect_divisible(steps, blocks)
        return SemiAutoregressive(steps, block, blocks)

    def _blockwise(self, steps: int, blocks: int, eot_token_id: int | None) -> Blockwise:
        """Chooses the rule for one block after another; each has its share of the steps."""
        assert self.block_length is not None  # was checked
        if blocks == 1:
            raise ValueError(
                f"expected a block_length below the answer's {self.block_length} tokens with"
                f" {'block_cache' if self.block_cache else 'early_stop'}, got one block"
            )
        _expect_divisible(steps, blocks)
        accept, own = self._accept(), steps // blocks
        rule: Rule = SemiAutoregressive(own, self.block_length, 1, adaptive=True)
        if accept is not None:
            rule = Adaptive(own, accept, self.block_length, eot_token_id)
        ends = self.early_stop or accept is not None
        return Blockwise(rule, blocks, self.block_length, eot_token_id if ends else None)

    def _accept(self) -> Callable | None:
        """Returns the acceptance that is asked for, None for the released schedules."""
        for name, kind in ACCEPT_RULES.items():
            if getattr(self, name) is not None:
                return kind(float(getattr(self, name)))
        return None


def _expect_divisible(steps: int, blocks: int):
    if steps % blocks:
        raise ValueError(f"expected steps divisible by the {blocks} blocks, got {steps}")


OPTIONS = {declared.name: declared for declared in dataclasses.fields(DiffusionOptions)}


def merge_options(defaults: dict, options: dict, task: str | None = None) -> dict:
    """Puts options over defaults, and writes out what `fast` stands for.

    `fast` among the options replaces values of the defaults; among the defaults it fills in what
    they leave open. A value that stands beside `fast` in the same dictionary is kept.

    Args:
        task: "captions" or "answers", for which `fast` stands for different values; None, where
            it is not known yet, is taken as "answers".
    """
    fast = FAST_CAPTIONS if task == "captions" else FAST_ANSWERS
    if options.get("fast"):
        defaults = _put_over(defaults, fast)
    elif defaults.get("fast") and not {"fast", "remasking"} & _said(options):
        defaults = _put_over(fast, defaults)
    return _put_over(defaults, options)


def _put_over(defaults: dict, options: dict) -> dict:
    """Puts options over defaults, without the defaults that the options exclude."""
    replaced: set[str] = set()
    for names in EXCLUSIVE:
        if _said(options) & set(names):
            replaced.update(names)
    if "remasking" in _said(options):  # is of the fixed schedule
        replaced.update(FIXED_SCHEDULE)
    return {k: v for k, v in defaults.items() if k not in replaced} | options


def _said(options: dict) -> set[str]:
    """Names the options that have a value."""
    return {name for name, value in options.items() if value is not None}


def expect_known(options: dict):
    """Raises ValueError for names that are no option; for an old name it says the new one."""
    unknown = sorted(set(options) - set(OPTIONS))
    if "input_ids" in unknown:
        raise ValueError("expected what the processor made as `inputs=...`, got it as keywords")
    for name in unknown:
        if name in RENAMED:
            raise ValueError(f"expected {RENAMED[name]}, got {name}, which is its old name")
    if unknown:
        raise ValueError(f"expected options among {sorted(OPTIONS)}, got {unknown}")


def task_of(name: str) -> str | None:
    """Returns the task that alone has a use for an option, None for both."""
    return OPTIONS[name].metadata["task"] if name in OPTIONS else None


def options_for(task: str, options: dict) -> dict:
    """Leaves out the options that a task, "captions" or "answers", has no use for."""
    return {k: v for k, v in options.items() if task_of(k) in (None, task)}


def options_of(task: str) -> list[str]:
    """Names the options that "captions" or "answers" alone have a use for."""
    return [name for name in OPTIONS if task_of(name) == task]
