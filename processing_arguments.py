"""Which of transformers' `ProcessingKwargs` the processor honors, and which may only be neutral."""

from dataclasses import dataclass, fields
from enum import Enum

from .neutral_arguments import expect_neutral

GROUPS = ("common_kwargs", "text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs")

# What may be given beside None.
NEUTRAL = {
    "return_tensors": ("pt",),
    "text_pair": (),
    "text_target": (),
    "text_pair_target": (),
    "stride": (0,),
    "is_split_into_words": (False,),
    "return_token_type_ids": (False,),
    "return_attention_mask": (True,),
    "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,),
    "return_offsets_mapping": (False,),
    "return_length": (False,),
    "return_mm_token_type_ids": (False,),
    "return_text_replacement_offsets": (False,),
    "return_metadata": (False,),
    "sanitize_control_tokens": (False,),
}

# Of video and sound, of which there is none here.
WITHOUT_EFFECT = (
    "do_sample_frames",
    "fps",
    "num_frames",
    "video_metadata",
    "sampling_rate",
    "raw_speech",
    "load_audio_backend",
    "verbose",
)


@dataclass(frozen=True)
class CallArguments:
    """The honored arguments of one call, checked.

    Attributes:
        add_special_tokens: let the tokenizer add its own (templates already hold theirs).
        padding: True or "longest"; "max_length" with `max_length`; False where nothing is to be
            padded.
        padding_side: of prompts, "left"; "right" where no answer follows them.
        pad_to_multiple_of: pads on to a multiple of so many tokens.
        truncation, max_length: sequences beyond `max_length` are refused, never cut, unless
            `truncation` is False.
        max_tiles: most tiles of a picture (default: the image processor's).
    """

    add_special_tokens: bool = False
    padding: bool | str = True
    padding_side: str = "left"
    pad_to_multiple_of: int | None = None
    truncation: bool | str | None = None
    max_length: int | None = None
    max_tiles: int | None = None

    @classmethod
    def read(cls, arguments: dict, image_processor) -> "CallArguments":
        """Reads a call's arguments, by name or in groups; those by name go first.

        Raises TypeError for an unknown name, ValueError for a value that is not honored.
        """
        flat = {k: v for k, v in arguments.items() if k not in GROUPS}
        merged = {}
        for group in GROUPS:
            own = arguments.get(group) or {}
            if not isinstance(own, dict):
                raise ValueError(f"expected {group} as a dict, got {own!r}")
            twice = sorted(own.keys() & flat.keys())
            if twice and group != "common_kwargs":  # which are defaults, in transformers too
                raise ValueError(f"expected {twice} by name or in {group}, got both")
            merged |= own
        merged |= flat

        names = {field.name for field in fields(cls)}
        rest = {k: v for k, v in merged.items() if k not in {*names, *WITHOUT_EFFECT}}
        pixels = {k: v for k, v in rest.items() if k not in NEUTRAL}
        expect_neutral({k: v for k, v in rest.items() if k in NEUTRAL}, NEUTRAL)
        image_processor.expect_neutral(pixels)
        return cls(**{k: v for k, v in merged.items() if k in names and v is not None})

    def __post_init__(self):
        truncation = (False, "do_not_truncate", True, "longest_first", "only_first")
        _expect_one_of("add_special_tokens", self.add_special_tokens, (True, False))
        padding = (True, "longest", False, "do_not_pad")
        to_length = ("max_length",) if self.max_length else ()
        _expect_one_of("padding", self.padding, padding + to_length)
        _expect_one_of("padding_side", self.padding_side, ("left", "right"))
        _expect_one_of("truncation", self.truncation, (None, *truncation))
        for name in ("pad_to_multiple_of", "max_length", "max_tiles"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"expected {name} of at least 1, got {value!r}")

    @property
    def min_length(self) -> int:
        """Tokens to which every sequence is padded at least."""
        return self.max_length if self.padding == "max_length" else 0

    def check_lengths(self, lengths: list[int], longest_known: int):
        """Refuses sequences that would have to be cut, or padded without leave."""
        bound = self.max_length or (longest_known if self.truncation else None)
        truncates = self.truncation not in (False, "do_not_truncate")
        if truncates and bound is not None and max(lengths) > bound:
            raise ValueError(
                f"expected sequences of at most max_length {bound} tokens, got {max(lengths)}:"
                " cutting one could cut its pictures or its answer"
            )
        if self.padding in (False, "do_not_pad") and len(set(lengths)) > 1:
            raise ValueError(
                f"expected padding True or 'longest' for lengths {sorted(set(lengths))},"
                f" got {self.padding!r}"
            )


def _expect_one_of(name: str, value, allowed: tuple):
    value = value.value if isinstance(value, Enum) else value  # transformers' own names
    if not isinstance(value, (bool, str, type(None))) or value not in allowed:
        raise ValueError(f"expected {name} {allowed[0]!r} or {allowed[1]!r}, got {value!r}")
