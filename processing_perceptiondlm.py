"""Prompts: pictures, masks and text to everything the network needs; token ids back to text.

A sequence is built as parallel integer lists (ids, positions, region ids, role ids, labels), its
fixed prompt first and what is to be denoised after it. In a batch, prompts are padded on the left
and answers on the right, so that every answer starts in the same column.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from .configuration_perceptiondlm import (
    NO_REGION,
    ROLE_CAPTION,
    ROLE_ROI,
    ROLE_SHARED,
    SHARED_REGION,
    PerceptionDLMConfig,
)
from .generation_options import expect_neutral
from .image_loading import describe
from .image_processing_perceptiondlm import PerceptionDLMImageProcessor
from .processing_sequence import (
    RESPONSE_INPUTS,
    TokenSequence,
    encode_prompt,
    encode_text,
    escape,
    locate_responses,
    pad_sequences,
    settle,
)

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


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<img><IMG_CONTEXT></img>\\n' -}}
{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n' -}}
{%- endif -%}
"""


class PerceptionDLMProcessor(ProcessorMixin):
    """Builds model inputs from pictures with region masks, or pictures with questions.

    Args:
        image_processor: a `PerceptionDLMImageProcessor`.
        tokenizer: a fast tokenizer that knows the special tokens below.
        chat_template: Jinja template of a conversation about whole pictures.
        region_layout: the model's attention structure; "independent" orders the sequence as a
            tree (shared trunk, then a branch for each region), others as the released code does.
        roi_output_size: side of a region's replayed grid; its square is the RoI tokens a region.
        image_token, mask_token, eot_token: placeholder of visual tokens, the `[MASK]` of
            denoising, and the end of a turn.
        roi_token, caption_token: patterns of a region's placeholder and of its caption's marker,
            with `{}` for the region's number.
        system_prompt, region_instruction: texts of the region prompt.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = CHAT_TEMPLATE,
        region_layout: str = "released",
        roi_output_size: int = 4,
        image_token: str = "<IMG_CONTEXT>",
        mask_token: str = "<|mdm_mask|>",
        eot_token: str = "<|eot_id|>",
        roi_token: str = "<|reserved_token_{}|>",
        caption_token: str = "<|Mask_Cap_{}|>",
        system_prompt: str = "You are a helpful assistant.",
        region_instruction: str = "Describe each masked region in detail.",
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if tokenizer is not None:
            # as every prompt is padded; pipelines pad batches as the tokenizer says
            tokenizer.padding_side = "left"
        self.region_layout = region_layout
        self.roi_output_size = roi_output_size
        self.image_token = image_token
        self.mask_token = mask_token
        self.eot_token = eot_token
        self.roi_token = roi_token
        self.caption_token = caption_token
        self.system_prompt = system_prompt
        self.region_instruction = region_instruction

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path, processor_dict=None, trust_remote_code=None, **kwargs
    ):
        """Loads the parts by the classes of this package: a repository's own code, for which the
        auto classes would ask, is not needed and never run."""
        place = pretrained_model_name_or_path
        return [
            PerceptionDLMImageProcessor.from_pretrained(place, **kwargs),
            PreTrainedTokenizerFast.from_pretrained(place, **kwargs),
        ]

    @classmethod
    def from_config(cls, config: PerceptionDLMConfig, tokenizer, **options):
        """The processor that fits a model of `config`; `options` override its own defaults."""
        processor = cls(PerceptionDLMImageProcessor(), tokenizer, **options)
        processor.follow(config)
        return processor

    def follow(self, config: PerceptionDLMConfig):
        """Takes over all that a model's config decides."""
        vision, images = config.vision_config, self.image_processor
        images.image_size, images.patch_size = vision.image_size, vision.patch_size
        for name in (
            "spatial_merge_size",
            "image_layout",
            "anyres_max_tiles",
            "num_region_prompts",
            "roi_convention",
        ):
            setattr(images, name, getattr(config, name))
        self.region_layout = config.region_layout
        self.roi_output_size = config.roi_output_size

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        masks=None,
        *,
        prompts: str | list[str] | None = None,
        caption_length: int | None = None,
        max_new_tokens: int | None = None,
        captions=None,
        answers: str | list[str] | None = None,
        return_region_orders: bool = True,
        **arguments,
    ) -> BatchFeature:
        """Builds the inputs of one region pass a picture, or of one conversation a text.

        Args:
            images: for regions, one picture or a list of them; for text, pictures in the order of
                their placeholders (flat or a list for each text), or None.
            text: rendered prompt or prompts holding an image token for each picture; control
                tokens that are spelled in it are control tokens, as in transformers, but for those
                that `apply_chat_template` has escaped.
            masks: a list of masks for one picture, or a list of such lists; see `load_mask`.
            prompts: with masks, the instruction (default `region_instruction`); without, plain
                questions, rendered through the chat template after their pictures. Like captions
                and answers they are text: nothing in them becomes a control token.
            caption_length: masked tokens for each region (32 when neither this nor `captions` is
                given); with `captions`, the slot that each is padded to with end-of-turn.
            max_new_tokens: masked tokens of an answer; with `answers`, the padded slot.
            captions: training targets, one text for each mask, in the order of the masks.
            answers: training targets, one text for each prompt.
            return_region_orders: also give `region_orders`, by which `diffusion_generate` returns
                captions in the order of the masks; False: in that of the regions' areas.
            arguments: transformers' `ProcessingKwargs`, by name or in `text_kwargs`,
                `images_kwargs` and `common_kwargs`; see `CallArguments` for those that are
                honored. Others may be neutral; `videos` and `audio` may be None.

        Returns:
            int64 (B, L): `input_ids`, `attention_mask`, `position_ids`, `region_ids`, `role_ids`,
            and `labels` with captions or answers; the image processor's tensors; and, for
            regions, `region_orders` int64 (B, R), the indices of each picture's masks by area, the
            largest first, which is their order in the sequence; -1 where there are fewer. Where
            there are responses to denoise or to learn, also `response_columns` and
            `response_start` (see `locate_responses`) and `task`, "captions" or "answers".

        Raises ValueError for inputs that do not fit together.
        """
        _expect_none(videos=arguments.pop("videos", None), audio=arguments.pop("audio", None))
        call = CallArguments.read(arguments, self.image_processor)
        if masks is not None:
            _expect_none(text=text, max_new_tokens=max_new_tokens, answers=answers)
            data, sequences = self._regions(images, masks, prompts, caption_length, captions, call)
        else:
            _expect_none(caption_length=caption_length, captions=captions)
            data, sequences = self._chat(images, text, prompts, max_new_tokens, answers, call)
        orders = data.pop("region_orders", None)
        has_targets = captions is not None or answers is not None
        call.check_lengths([len(s.ids) for s in sequences], self.tokenizer.model_max_length)
        padded = pad_sequences(
            sequences,
            self.tokenizer.pad_token_id,
            has_targets,
            side=call.padding_side,
            min_length=call.min_length,
            multiple_of=call.pad_to_multiple_of,
        )
        data = {**padded, **data}
        if all(s.slots for s in sequences):
            behind = max(len(s.ids) - s.prompt_length for s in sequences)
            data |= locate_responses(sequences, padded["input_ids"].shape[1] - behind)
            data["task"] = "answers" if masks is None else "captions"
        if return_region_orders and orders is not None:
            rows = [torch.tensor(order) for order in orders]
            data["region_orders"] = pad_sequence(rows, batch_first=True, padding_value=-1)
        return BatchFeature(data)

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As transformers' `ProcessorMixin.apply_chat_template`, but what messages say stays text:
        a control token that is spelled in one is escaped in the rendered prompt, and the processor
        encodes it as text."""
        if not isinstance(conversation, (list, tuple)):
            conversation = getattr(conversation, "messages", conversation)
        conversation = escape(self.tokenizer, conversation)
        prompt = super().apply_chat_template(conversation, *args, **kwargs)
        if isinstance(prompt, str):
            return settle(self.tokenizer, prompt)
        if isinstance(prompt, list) and all(isinstance(one, str) for one in prompt):
            return [settle(self.tokenizer, one) for one in prompt]
        return prompt

    def _regions(self, images, masks, prompts, caption_length, captions, call):
        images, masks, captions = _as_region_batch(images, masks, captions)
        given = self.region_instruction if prompts is None else prompts
        instructions = _broadcast(given, len(images))
        if caption_length is None and captions is None:
            caption_length = 32
        _expect_positive(caption_length=caption_length)
        if self.image_processor.num_region_prompts == 0:
            raise ValueError("expected a checkpoint with region prompts for masks, got one without")
        features = self.image_processor(images, masks, max_tiles=call.max_tiles)
        sequences = []
        for i, order in enumerate(features["region_orders"]):
            texts = None if captions is None else [captions[i][k] for k in order]
            slots = self.caption_slots(texts, len(order), caption_length)
            sequences.append(self.region_sequence(features, i, slots, instructions[i]))
        return dict(features), sequences

    def caption_slots(self, captions: list[str] | None, count: int, caption_length: int | None):
        """Token ids of each of `count` regions' captions, or masks where there are none."""
        if captions is None:
            return [[self.mask_token_id] * caption_length] * count
        return [self._target_ids(caption, caption_length) for caption in captions]

    def region_sequence(
        self,
        features,
        index: int,
        slots: list[list[int]],
        instruction: str | None = None,
        prompts: list[int] | None = None,
    ) -> TokenSequence:
        """The sequence that captions regions of picture `index` of the image processor's
        `features`; `slots` are the captions' ids in the order of the regions.

        `prompts` are the regions' prompt numbers (default 0, 1, ...): in the independent layout,
        where no region is first, a region's RoI placeholder and marker carry its prompt's number.
        """
        instruction = instruction or self.region_instruction
        image_tokens = self._image_tokens(features, index)
        tree = self.region_layout == "independent"
        placeholders = 0 if tree or not self.roi_output_size else len(slots)
        total = max(self.image_processor.num_region_prompts, len(slots))
        roi = [self._token_id(self.roi_token.format(k)) for k in range(total)]
        prompt = self._region_prompt(instruction, placeholders)
        ids = encode_prompt(self.tokenizer, prompt)
        _expect_count(ids, roi, placeholders, "RoI placeholders", self.roi_token)
        _expect_count(ids, [self.image_token_id], 1, "picture placeholders", self.image_token)
        sequence = self._add_prompt(ids, [image_tokens], roi)
        if tree:
            self._add_branches(sequence, slots, prompts or list(range(len(slots))))
        else:
            self._add_captions(sequence, slots)
        return sequence

    def _region_prompt(self, instruction: str, placeholders: int) -> str:
        roi = "\n".join(self.roi_token.format(k) for k in range(placeholders))
        system, instruction = escape(self.tokenizer, [self.system_prompt, instruction])
        return (
            f"<|start_header_id|>system<|end_header_id|>\n{system}{self.eot_token}\n"
            f"<|start_header_id|>user<|end_header_id|>\n<img>{self.image_token}</img>{roi}\n"
            f"{instruction}{self.eot_token}\n<|start_header_id|>assistant<|end_header_id|>\n"
        )

    def _add_prompt(self, ids: list[int], image_tokens: list[int], roi: list[int]) -> TokenSequence:
        """Expands the placeholders; what stands between two RoI spans is seen by no caption."""
        sequence = TokenSequence()
        counts = iter(image_tokens)
        last = max((i for i, token in enumerate(ids) if token in roi), default=-1)
        seen_roi = False
        for i, token in enumerate(ids):
            region, role, repeats = SHARED_REGION, ROLE_SHARED, 1
            if token == self.image_token_id:
                repeats = next(counts)
            elif token in roi:
                region, role, repeats = roi.index(token), ROLE_ROI, self.roi_output_size**2
                seen_roi = True
            elif seen_roi and i < last:
                region, role = NO_REGION, ROLE_ROI
            position = len(sequence.ids)
            sequence.add([token] * repeats, position=position, region=region, role=role)
        sequence.prompt_length = len(sequence.ids)
        return sequence

    def _add_captions(self, sequence: TokenSequence, slots: list[list[int]]):
        """Released order: marker, caption and newline of each region in turn, end-of-turn last."""
        newline = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        for k, slot in enumerate(slots):
            end = newline if k + 1 < len(slots) else [self.eot_token_id]
            block = [self._token_id(self.caption_token.format(k)), *slot, *end]
            start = len(sequence.ids)
            sequence.add(block, position=start, region=k, role=ROLE_CAPTION, target=True)
            sequence.slots.append(range(start + 1, start + 1 + len(slot)))  # behind the marker

    def _add_branches(self, sequence: TokenSequence, slots: list[list[int]], prompts: list[int]):
        """Tree order: every branch's fixed tokens, then every caption; each branch's positions
        go on from the trunk's end."""
        trunk = len(sequence.ids)
        count = self.roi_output_size**2
        for k, number in enumerate(prompts):
            marker = self._token_id(self.caption_token.format(number))
            fixed = [self._token_id(self.roi_token.format(number))] * count + [marker]
            sequence.add(fixed, position=trunk, region=k, role=ROLE_ROI)
        sequence.prompt_length = len(sequence.ids)
        for k, slot in enumerate(slots):
            column, start = len(sequence.ids), trunk + count + 1
            sequence.add(slot, position=start, region=k, role=ROLE_CAPTION, target=True)
            sequence.slots.append(range(column, column + len(slot)))

    def _chat(self, images, text, prompts, max_new_tokens, answers, call):
        if (text is None) == (prompts is None):
            raise ValueError("expected masks, or exactly one of `text` and `prompts`")
        _expect_positive(max_new_tokens=max_new_tokens)
        if prompts is not None:
            questions = [prompts] if isinstance(prompts, str) else list(prompts)
            images = pair_images(images, len(questions))
            text = self._render_questions(images, questions)
        texts = [text] if isinstance(text, str) else list(text)
        answers = None if answers is None else _broadcast(answers, len(texts))
        batch_ids = [
            encode_prompt(self.tokenizer, t, add_special_tokens=call.add_special_tokens)
            for t in texts
        ]
        pictures = _flatten(images)
        placeholders = [ids.count(self.image_token_id) for ids in batch_ids]
        if sum(placeholders) != len(pictures):
            raise ValueError(
                f"expected one {self.image_token!r} in the text for each of {len(pictures)}"
                f" pictures, got {sum(placeholders)}"
            )
        # one tile each where there are several (as InternVL and LLaVA do)
        limits = [1 if n > 1 else call.max_tiles for n in placeholders for _ in range(n)]
        features = self.image_processor(pictures, max_tiles=limits) if pictures else {}
        sequences, first = [], 0
        for i, ids in enumerate(batch_ids):
            last = first + placeholders[i]
            counts = [self._image_tokens(features, k) for k in range(first, last)]
            target = None if answers is None else answers[i]
            sequences.append(self._chat_sequence(ids, counts, max_new_tokens, target))
            first = last
        return dict(features), sequences

    def chat_sequence(
        self, text: str, features, *, answer: str | None = None, max_new_tokens: int | None = None
    ) -> TokenSequence:
        """The sequence of one rendered conversation, whose pictures are those of the image
        processor's `features` ({}: none)."""
        ids = encode_prompt(self.tokenizer, text)
        pictures = len(features["image_grids"]) if features else 0
        _expect_count(
            ids, [self.image_token_id], pictures, "picture placeholders", self.image_token
        )
        counts = [self._image_tokens(features, i) for i in range(pictures)]
        return self._chat_sequence(ids, counts, max_new_tokens, answer)

    def _chat_sequence(self, ids, image_tokens, max_new_tokens, answer) -> TokenSequence:
        sequence = self._add_prompt(ids, image_tokens, roi=[])
        if answer is not None:
            slot = self._target_ids(answer, max_new_tokens, end=True)
        else:
            slot = [self.mask_token_id] * (max_new_tokens or 0)
        if self.region_layout == "independent":
            self._branch_off(sequence)
        start = len(sequence.ids)
        sequence.add(slot, position=start, region=0, role=ROLE_CAPTION, target=True)
        if slot:
            sequence.slots.append(range(start, start + len(slot)))
        return sequence

    def _branch_off(self, sequence: TokenSequence):
        """In a tree, pictures are the trunk and what is said after them a branch, as a region's
        fixed tokens are: so questions about the same pictures can share the trunk."""
        pictures = [i for i, token in enumerate(sequence.ids) if token == self.image_token_id]
        if pictures:
            trunk = pictures[-1] + 1
            count = len(sequence.ids) - trunk
            sequence.regions[trunk:] = [0] * count
            sequence.roles[trunk:] = [ROLE_ROI] * count

    def _render_questions(self, groups: list[list], questions: list[str]) -> list[str]:
        texts = []
        for question, group in zip(questions, groups, strict=True):
            content = [{"type": "image"} for _ in group] + [{"type": "text", "text": question}]
            message = [{"role": "user", "content": content}]
            texts.append(self.apply_chat_template(message, add_generation_prompt=True))
        return texts

    def _target_ids(self, text: str, length: int | None, end: bool = False) -> list[int]:
        """A caption's or answer's ids; with `length`, or `end`, closed by end-of-turn."""
        ids = encode_text(self.tokenizer, text)
        if length is None:
            return ids + [self.eot_token_id] if end or self.region_layout == "independent" else ids
        if len(ids) > length:
            raise ValueError(
                f"expected a text of at most {length} tokens, got {len(ids)}: {text[:80]!r}"
            )
        return ids + [self.eot_token_id] * (length - len(ids))

    def _image_tokens(self, features, index: int) -> int:
        height, width = features["image_sizes"][index].tolist()
        grid = tuple(features["image_grids"][index].tolist())
        return self.image_processor.num_image_tokens((width, height), grid)

    def decode_answer(self, ids: Sequence[int]) -> str:
        """Text of one caption or answer, up to its first end-of-turn or end-of-text.

        Special tokens and ids beyond the tokenizer's vocabulary decode to nothing.
        """
        stops = {self.eot_token_id, self.tokenizer.eos_token_id}
        kept = []
        for token in map(int, ids):
            if token in stops:
                break
            if token < len(self.tokenizer):
                kept.append(token)
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()

    def _token_id(self, token: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(token)
        if index is None or index == self.tokenizer.unk_token_id:
            raise ValueError(
                f"expected a tokenizer with the special token {token!r}, got one without"
            )
        return index

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder that visual tokens replace."""
        return self._token_id(self.image_token)

    @property
    def mask_token_id(self) -> int:
        """Id of the `[MASK]` that denoising fills."""
        return self._token_id(self.mask_token)

    @property
    def eot_token_id(self) -> int:
        """Id that ends a turn, and so a caption or answer."""
        return self._token_id(self.eot_token)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that `__call__` makes."""
        names = ["input_ids", "attention_mask", "position_ids", "region_ids", "role_ids"]
        names += ["region_orders", *RESPONSE_INPUTS]
        return names + self.image_processor.model_input_names


def _as_region_batch(images, masks, captions):
    """Lists of pictures, of their masks and of their captions, checked against each other."""
    if images is None:
        raise ValueError("expected a picture for the masks, got none")
    if not isinstance(images, (list, tuple)):
        images, masks = [images], [masks]
        captions = None if captions is None else [captions]
    if not images or len(masks) != len(images):
        raise ValueError(
            f"expected a list of masks for each picture, got {len(images)} pictures"
            f" and {len(masks)} lists of masks"
        )
    if captions is not None:
        counts = [(len(m), len(c)) for m, c in zip(masks, captions, strict=True)]
        for regions, texts in counts:
            if regions != texts:
                raise ValueError(f"expected a caption for each of {regions} masks, got {texts}")
    return list(images), list(masks), captions


def pair_images(images, count: int) -> list[list]:
    """Pairs each of `count` prompts with its images.

    A single image belongs to every prompt, a flat list to a single prompt; else there is an image,
    a list of images or None for each prompt. Raises ValueError for another number of them.
    """
    if images is None:
        return [[] for _ in range(count)]
    if not isinstance(images, (list, tuple)):
        return [[images] for _ in range(count)]
    if count == 1 and not any(isinstance(image, (list, tuple)) for image in images):
        return [list(images)]
    if len(images) != count:
        raise ValueError(
            f"expected an image or a list of them for each of {count} prompts, got {len(images)}"
        )
    return [list(i) if isinstance(i, (list, tuple)) else [] if i is None else [i] for i in images]


def _flatten(images) -> list:
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [picture for image in images for picture in _flatten(image)]


def _broadcast(value: str | Sequence[str], count: int) -> list[str]:
    if not isinstance(value, (str, list, tuple)):
        raise ValueError(f"expected a text or a list of texts, got {describe(value)}")
    values = [value] * count if isinstance(value, str) else list(value)
    if len(values) != count:
        raise ValueError(f"expected {count} texts, one for each sample, got {len(values)}")
    return values


def _expect_none(**options):
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"expected no {name} for this kind of input, got {value!r}")


def _expect_positive(**options):
    for name, value in options.items():
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ValueError(f"expected {name} of at least 1, got {value!r}")


def _expect_count(ids, wanted, count: int, name: str, token: str):
    found = sum(i in wanted for i in ids)
    if found != count:
        raise ValueError(f"expected {count} {name} ({token!r}) in the prompt, got {found}")


PerceptionDLMProcessor.register_for_auto_class()

__all__ = ["PerceptionDLMProcessor"]
