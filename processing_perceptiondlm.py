"""Turns images, region masks and texts into model inputs, and token ids back into text.

    images, masks  ->  image processor   ->  tiles, patch membership, boxes    \\
    texts          ->  sequence builder  ->  sequences  ->  padded, located    ->  model inputs

The image processor counts each image's tokens, the sequence builder puts their placeholders into a
prompt; what is denoised or learned, captions or an answer, stands after it.
"""

import copy
import re
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from .configuration_perceptiondlm import PerceptionDLMConfig
from .image_loading import describe
from .image_processing_perceptiondlm import (
    CallArguments,
    PerceptionDLMImageProcessor,
    flatten_images,
    pair_images,
    pair_masks,
)
from .processing_sequence import (
    RESPONSE_INPUTS,
    Padding,
    SequenceBuilder,
    TokenSequence,
    encode_prompt,
    escape,
    expect_positive,
    locate_responses,
    pad_sequences,
    response_length,
    settle,
)

DEFAULT_CAPTION_LENGTH = 32

# A conversation's turns, each behind the header of who speaks; images come before what is said.
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
# The prompt of a region group, in which the released model expects no spaces but these: what all
# regions share, and what asks. In a tree each region's branch may hold its own question.
REGION_IMAGE = """\
<|start_header_id|>system<|end_header_id|>
{system}{eot}
<|start_header_id|>user<|end_header_id|>
<img>{image}</img>"""
REGION_QUESTION = """\
{roi}
{instruction}{eot}
<|start_header_id|>assistant<|end_header_id|>
"""
# A region that a region's question names, by its place in the list of masks.
REGION_REFERENCE = re.compile(r"<region (\d+)>")


class PerceptionDLMProcessor(ProcessorMixin):
    """Builds model inputs from images with region masks, or images with questions.

    Args:
        image_processor: a `PerceptionDLMImageProcessor`.
        tokenizer: a fast tokenizer that knows the special tokens below.
        chat_template: Jinja template of a conversation about whole images.
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
        # Prompts are padded on the left, and pipelines pad batches as the tokenizer says; the
        # caller's own tokenizer stays as it is.
        if tokenizer is not None and tokenizer.padding_side != "left":
            tokenizer = copy.copy(tokenizer)
            tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

        # What a model's config decides, see `follow`.
        self.region_layout = region_layout
        self.roi_output_size = roi_output_size

        # Special tokens and texts of the prompts.
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
        """Loads the parts by the classes of this package.

        A repository's own code, for which the auto classes would ask, is not needed and never run.
        """
        place = pretrained_model_name_or_path
        return [
            PerceptionDLMImageProcessor.from_pretrained(place, **kwargs),
            PreTrainedTokenizerFast.from_pretrained(place, **kwargs),
        ]

    @classmethod
    def from_config(cls, config: PerceptionDLMConfig, tokenizer, **options):
        """Builds the processor that fits a model of `config`; `options` override its defaults."""
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
        prompts=None,
        caption_length: int | None = None,
        max_new_tokens: int | None = None,
        captions=None,
        answers: str | list[str] | None = None,
        return_region_orders: bool = True,
        **arguments,
    ) -> BatchFeature:
        """Builds the inputs of a region group for each image, or of a conversation for each text.

        Args:
            images: for regions, one image or a list of them; for text, images in the order of
                their placeholders (flat or a list for each text), or None.
            text: rendered prompt or prompts holding an image token for each image; control
                tokens that are spelled in it are control tokens, as in transformers, but for those
                that `apply_chat_template` has escaped.
            masks: a list of region masks for one image, or a list of such lists; see `load_mask`.
            prompts: with masks, the instruction (default `region_instruction`), one for each
                image, or nested as the masks: one for each region, None for the default; see
                `pair_prompts`. Without masks, plain questions, rendered through the chat template
                after their images. Like captions and answers they are text: nothing in them
                becomes a control token.
            caption_length: masked tokens for each region (32 when neither this nor `captions` is
                given); with `captions`, the slot that each is padded to with end-of-turn.
            max_new_tokens: masked tokens of an answer; with `answers`, the padded slot.
            captions: training targets, one text for each mask, in the order of the masks.
            answers: training targets, one text for each prompt.
            return_region_orders: also give `region_orders`, by which `diffusion_generate` returns
                captions in the order of the masks; False, with masks: in that of the regions'
                areas.
            arguments: transformers' `ProcessingKwargs`, by name or in `text_kwargs`,
                `images_kwargs` and `common_kwargs`; see `CallArguments` for those that are
                honored. Others may be neutral; `videos` and `audio` may be None.

        Returns:
            int64 (B, L): `input_ids`, `attention_mask`, `position_ids`, `region_ids`, `role_ids`,
            and `labels` with captions or answers; the image processor's tensors; and, for
            regions, `region_orders` int64 (B, R), the indices of each image's masks by area, the
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
            if not return_region_orders:
                raise ValueError("expected return_region_orders True without masks, got False")
            data, sequences = self._chat(images, text, prompts, max_new_tokens, answers, call)

        call.check_lengths([len(s.ids) for s in sequences], self.tokenizer.model_max_length)
        has_targets = captions is not None or answers is not None
        task = "answers" if masks is None else "captions"
        orders = data.pop("region_orders", None)
        data = {**self.stack(sequences, task, has_targets, call), **data}
        if return_region_orders and orders is not None:
            rows = [torch.tensor(order) for order in orders]
            data["region_orders"] = pad_sequence(rows, batch_first=True, padding_value=-1)
        return BatchFeature(data)

    def stack(
        self,
        sequences: list[TokenSequence],
        task: str,
        has_targets: bool = False,
        padding: Padding | None = None,
        align_trunks: bool = False,
    ) -> dict:
        """Stacks sequences into a batch, and says where their responses stand.

        `align_trunks` lets the trunks of trees end in one column, see `pad_sequences`.

        Returns `input_ids` ... `role_ids`, `labels` where there are targets and, where every
        sequence has a response, `response_columns`, `response_start` and the `task`.
        """
        pad_id = self.tokenizer.pad_token_id
        padding = padding or Padding()
        data = pad_sequences(sequences, pad_id, has_targets, padding, align_trunks)
        if all(s.slots for s in sequences):
            behind = max(len(s.ids) - s.prompt_length for s in sequences)
            data |= locate_responses(sequences, data["input_ids"].shape[1] - behind)
            data["task"] = task
        return data

    def apply_chat_template(self, conversation, *args, **kwargs):
        """Renders a conversation as transformers does, but what messages say stays text.

        A control token that is spelled in one is escaped in the rendered prompt, and the processor
        encodes it as text.
        """
        if not isinstance(conversation, (list, tuple)):
            # A pipeline's `Chat` holds its messages.
            conversation = getattr(conversation, "messages", conversation)
        conversation = escape(self.tokenizer, conversation)
        prompt = super().apply_chat_template(conversation, *args, **kwargs)

        # Escapes that are not needed are only in the way of whoever reads the prompt.
        if isinstance(prompt, str):
            return settle(self.tokenizer, prompt)
        if isinstance(prompt, list) and all(isinstance(one, str) for one in prompt):
            return [settle(self.tokenizer, one) for one in prompt]
        return prompt

    # What is asked: captions of regions, or answers about whole images.

    def _regions(self, images, masks, prompts, caption_length, captions, call):
        """Returns the image processor's features and the sequence of each image's regions."""
        # The prompt holds its special tokens already.
        if call.add_special_tokens:
            raise ValueError("expected add_special_tokens False with masks, got True")
        is_single = not isinstance(images, (list, tuple))
        images, masks = pair_masks(images, masks)
        if captions is not None:
            captions = [captions] if is_single else captions
            _expect_captions(captions, masks)
        instructions = pair_prompts(prompts, [len(own) for own in masks], is_single)

        if caption_length is None and captions is None:
            caption_length = DEFAULT_CAPTION_LENGTH
        expect_positive(caption_length=caption_length)
        if self.image_processor.num_region_prompts == 0:
            raise ValueError("expected a checkpoint with region prompts for masks, got one without")

        features = self.image_processor(images, masks, max_tiles=call.max_tiles)

        # Captions follow the regions, the largest first.
        sequences = []
        for i, order in enumerate(features["region_orders"]):
            texts = None if captions is None else [captions[i][k] for k in order]
            slots = self.caption_slots(texts, len(order), caption_length)
            sequences.append(self.region_sequence(features, i, slots, instructions[i]))

        # A region has a box for each run of its RoI tokens.
        data = dict(features)
        counts = [len(order) for order in features["region_orders"]]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        spans = [start + k for s, start in zip(sequences, starts, strict=True) for k in s.spans]
        if self.roi_output_size and spans != list(range(sum(counts))):
            data |= {name: features[name][spans] for name in ("boxes", "box_images")}
        return data, sequences

    def _chat(self, images, text, prompts, max_new_tokens, answers, call):
        """Returns the image processor's features and the sequence of each conversation."""
        if (text is None) == (prompts is None):
            raise ValueError("expected masks, or exactly one of `text` and `prompts`")
        expect_positive(max_new_tokens=max_new_tokens)

        # Plain questions are rendered as conversations, each after its images.
        if prompts is not None:
            questions = [prompts] if isinstance(prompts, str) else list(prompts)
            images = pair_images(images, len(questions))
            text = self.render_questions(images, questions)
        texts = [text] if isinstance(text, str) else list(text)
        answers = [None] * len(texts) if answers is None else broadcast_texts(answers, len(texts))

        # Every placeholder in the texts is one image's.
        batch_ids = [
            encode_prompt(self.tokenizer, t, add_special_tokens=call.add_special_tokens)
            for t in texts
        ]
        images = flatten_images(images)
        counts = [ids.count(self.image_token_id) for ids in batch_ids]
        if sum(counts) != len(images):
            raise ValueError(
                f"expected one {self.image_token!r} in the text for each of {len(images)}"
                f" images, got {sum(counts)}"
            )

        features = {}
        if images:
            features = self.image_processor(images, max_tiles=tile_limits(counts, call.max_tiles))
        elif call.max_tiles is not None:
            raise ValueError(f"expected no max_tiles without images, got {call.max_tiles}")

        sequences, first = [], 0
        for ids, count, answer in zip(batch_ids, counts, answers, strict=True):
            image_tokens = [self.count_image_tokens(features, first + k) for k in range(count)]
            slot = self._answer_slot(answer, max_new_tokens)
            sequences.append(self._builder.chat_sequence(ids, image_tokens, slot))
            first += count
        return dict(features), sequences

    def render_questions(self, groups: Sequence[Sequence], questions: Sequence) -> list[str]:
        """Renders plain questions as conversations, each after its images.

        One that is a conversation already, a list of messages for the chat template, is rendered
        as it is.
        """
        texts = []
        for question, group in zip(questions, groups, strict=True):
            if not isinstance(question, str):
                texts.append(self.apply_chat_template(question, add_generation_prompt=True))
                continue
            content = [{"type": "image"} for _ in group] + [{"type": "text", "text": question}]
            message = [{"role": "user", "content": content}]
            texts.append(self.apply_chat_template(message, add_generation_prompt=True))
        return texts

    # Sequences one at a time, as training and the server build them.

    @property
    def _builder(self) -> SequenceBuilder:
        """Returns a builder of what the processor's attributes say now."""
        return SequenceBuilder(
            tokenizer=self.tokenizer,
            is_tree=self.region_layout == "independent",
            roi_output_size=self.roi_output_size,
            num_region_prompts=self.image_processor.num_region_prompts,
            image_token=self.image_token,
            mask_token=self.mask_token,
            eot_token=self.eot_token,
            roi_token=self.roi_token,
            caption_token=self.caption_token,
        )

    def caption_slots(
        self, captions: list[str] | None, count: int, caption_length: int | None
    ) -> list[list[int]]:
        """Encodes each of `count` regions' captions; masks them where there are none."""
        if captions is None:
            if caption_length is None:
                raise ValueError("expected caption_length where there are no captions, got None")
            return [self._builder.masked_slot(caption_length)] * count
        return [self._builder.response_slot(text, caption_length, end=False) for text in captions]

    def region_sequence(
        self,
        features,
        index: int,
        slots: list[list[int]],
        instruction=None,
        prompts: list[int] | None = None,
        regions: Sequence[int] | None = None,
    ) -> TokenSequence:
        """Builds the sequence that captions regions of one image, or answers questions about them.

        Args:
            features: the image processor's; the image is their number `index`.
            slots: the responses' ids, in the order of the regions.
            instruction: default `region_instruction`. A list, or a dict, has one for each region
                mask by its number in `region_orders`, None for the default: in the tree layout
                each goes into its region's branch, and `<region 2>` in one stands for the region
                of mask 2.
            prompts: the regions' prompt numbers (default 0, 1, ...). In the independent layout,
                where no region is first, a region's RoI tokens and marker carry its number.
            regions: in the tree layout, which regions there are branches for, by their place in
                the order of areas (default: each once).

        Raises ValueError for several instructions in another layout than the tree, and for a
        region that is not there.
        """
        builder = self._builder
        roi = "\n".join(builder.roi_placeholders(len(slots)))
        image_tokens = self.count_image_tokens(features, index)
        system = escape(self.tokenizer, self.system_prompt)
        prompt = REGION_IMAGE.format(system=system, eot=self.eot_token, image=self.image_token)

        # One instruction for all: in the prompt.
        numbers = list(range(len(slots))) if prompts is None else prompts
        if regions is not None:
            numbers = [k if prompts is None else prompts[k] for k in regions]
        if not builder.is_tree and not isinstance(instruction, (str, type(None))):
            instruction = self._one_instruction(
                list(instruction.values()) if isinstance(instruction, dict) else instruction
            )
        if isinstance(instruction, (str, type(None))):
            prompt += self._question(instruction, roi)
            return builder.region_sequence(prompt, slots, image_tokens, numbers)

        # One for each region: in the branches, which follow the regions' areas.
        order = [int(k) for k in features["region_orders"][index]]
        all_numbers = range(len(order)) if prompts is None else prompts
        places = {k: self._roi_of(number) for k, number in zip(order, all_numbers, strict=True)}
        asked = range(len(order)) if regions is None else regions
        questions = [self._question(instruction[order[k]], roi, places) for k in asked]
        return builder.region_sequence(prompt, slots, image_tokens, numbers, questions)

    def _question(self, instruction: str | None, roi: str, places: dict | None = None) -> str:
        """Renders what follows the image; `places` are the regions that may be named in it."""
        parts = REGION_REFERENCE.split(instruction or self.region_instruction)
        if places is None or len(parts) == 1:  # nothing is named
            text = escape(self.tokenizer, instruction or self.region_instruction)
        else:
            text = ""
            for i, part in enumerate(parts):
                text += escape(self.tokenizer, part) if i % 2 == 0 else _place_of(part, places)
        return REGION_QUESTION.format(roi=roi, instruction=text, eot=self.eot_token)

    def _roi_of(self, number: int) -> str:
        """Returns the placeholder of a region's RoI tokens; empty where the model has none."""
        return self.roi_token.format(number) if self.roi_output_size else ""

    def _one_instruction(self, instructions: Sequence[str | None]) -> str:
        """Returns the instruction that all regions have; raises ValueError where they differ."""
        texts = {text or self.region_instruction for text in instructions}
        if any(REGION_REFERENCE.search(text) for text in texts):
            raise ValueError(
                "expected region_layout 'independent' for a question that names regions, got"
                f" {self.region_layout!r}"
            )
        if len(texts) > 1:
            raise ValueError(
                "expected one instruction for the regions of an image in the joint layout, whose"
                f" weights know one, got {len(texts)}: caption them in several calls, or let"
                " `diffusion_generate` group them"
            )
        return texts.pop()

    def chat_sequence(
        self,
        text: str,
        features,
        *,
        answer: str | None = None,
        max_new_tokens: int | None = None,
        slot: list[int] | None = None,
    ) -> TokenSequence:
        """Builds the sequence of one rendered conversation.

        Its images are those of the image processor's `features` ({}: none); `slot` are the answer's
        ids, instead of an answer to learn or a number of tokens to denoise.
        """
        ids = encode_prompt(self.tokenizer, text)
        num_images = len(features["image_grids"]) if features else 0
        image_tokens = [self.count_image_tokens(features, i) for i in range(num_images)]
        own = self._answer_slot(answer, max_new_tokens) if slot is None else slot
        return self._builder.chat_sequence(ids, image_tokens, own)

    def _answer_slot(self, answer: str | None, length: int | None) -> list[int]:
        """Returns the ids of an answer to learn, or to denoise where there is none."""
        if answer is None:
            return self._builder.masked_slot(length or 0)
        return self._builder.response_slot(answer, length, end=True)

    def count_image_tokens(self, features, index: int) -> int:
        """Counts the tokens of one of the image processor's images."""
        height, width = features["image_sizes"][index].tolist()
        grid = tuple(features["image_grids"][index].tolist())
        return self.image_processor.num_image_tokens((width, height), grid)

    # Back to text, and what the processor knows about its tokens.

    def decode_answer(self, ids: Sequence[int]) -> str:
        """Decodes one caption or answer, up to its first end-of-turn or end-of-text.

        Special tokens and ids beyond the tokenizer's vocabulary decode to nothing.
        """
        ids = list(map(int, ids))
        ends = [(self.eot_token_id,), (self.tokenizer.eos_token_id,)]
        known = [i for i in ids[: response_length(ids, ends)] if i < len(self.tokenizer)]
        return self.tokenizer.decode(known, skip_special_tokens=True).strip()

    def _token_id(self, token: str) -> int:
        return self._builder.token_id(token)

    @property
    def image_token_id(self) -> int:
        """Returns the id of the placeholder that an image's tokens replace."""
        return self._token_id(self.image_token)

    @property
    def mask_token_id(self) -> int:
        """Returns the id of the `[MASK]` that denoising fills."""
        return self._token_id(self.mask_token)

    @property
    def eot_token_id(self) -> int:
        """Returns the id that ends a turn, and so a caption or answer."""
        return self._token_id(self.eot_token)

    @property
    def model_input_names(self) -> list[str]:
        """Lists the tensors that `__call__` makes."""
        names = ["input_ids", "attention_mask", "position_ids", "region_ids", "role_ids"]
        names += ["region_orders", *RESPONSE_INPUTS]
        return names + self.image_processor.model_input_names


# Arguments of one call, brought to one form.


def _expect_captions(captions, masks: list):
    """Refuses captions that are not one for each region mask of each image."""
    lists = captions if isinstance(captions, (list, tuple)) else []
    if len(lists) != len(masks) or not all(isinstance(own, (list, tuple)) for own in lists):
        raise ValueError(
            f"expected a list of captions for each of {len(masks)} images, got {describe(captions)}"
        )
    for own, texts in zip(masks, captions, strict=True):
        if len(own) != len(texts):
            raise ValueError(f"expected a caption for each of {len(own)} masks, got {len(texts)}")


def broadcast_texts(value: str | Sequence[str], count: int, owner: str = "sample") -> list[str]:
    """Gives each of `count` samples its text: one for all, or a list of them.

    `owner` names in errors (ValueError) what has a text.
    """
    if not isinstance(value, (str, list, tuple)):
        raise ValueError(f"expected a text or a list of texts, got {describe(value)}")
    values = [value] * count if isinstance(value, str) else list(value)
    if len(values) != count:
        raise ValueError(f"expected {count} texts, one for each {owner}, got {len(values)}")
    return values


def pair_prompts(
    prompts, counts: Sequence[int], is_single: bool = False
) -> list[str | list[str | None] | None]:
    """Pairs each image with the instruction for its regions.

    Args:
        prompts: None for the default; one text for all; or a list with, for each image, a text,
            None, or a list of them, one for each region mask.
        counts: how many region masks each image has.
        is_single: there is one image that did not come in a list; then a plain list has one for
            each of its masks.

    Raises ValueError for another number of texts, and for what is none.
    """
    if prompts is None or isinstance(prompts, str):
        _expect_words(prompts)
        return [prompts] * len(counts)
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(f"expected a text or a list of texts, got {describe(prompts)}")
    is_flat = not any(isinstance(entry, (list, tuple)) for entry in prompts)
    if is_single and is_flat:
        prompts = [prompts]
    if len(prompts) != len(counts):
        raise ValueError(f"expected {len(counts)} texts, one for each image, got {len(prompts)}")

    paired: list[str | list[str | None] | None] = []
    for entry, count in zip(prompts, counts, strict=True):
        own = list(entry) if isinstance(entry, (list, tuple)) else [entry]
        if not all(isinstance(text, (str, type(None))) for text in own):
            raise ValueError(f"expected texts or None as prompts, got {describe(entry)}")
        _expect_words(*own)
        if isinstance(entry, (list, tuple)) and len(own) != count:
            raise ValueError(f"expected a prompt for each of {count} masks, got {len(own)}")
        paired.append(own if isinstance(entry, (list, tuple)) else own[0])
    return paired


def _expect_words(*texts: str | None):
    """Refuses empty prompts, which would be taken for the default."""
    if "" in texts:
        raise ValueError("expected a prompt with words, or None for the default, got ''")


def _place_of(number: str, places: dict[int, str]) -> str:
    """Returns the RoI placeholder of a region that a question names."""
    placeholder = places.get(int(number)) if len(number) < 10 else None
    if not placeholder:
        known = f"regions 0 to {max(places)}" if any(places.values()) else "no region named"
        raise ValueError(f"expected {known} in a region's question, got <region {number[:10]}>")
    return placeholder


def tile_limits(counts: list[int], max_tiles: int | None) -> list[int | None]:
    """Returns the most tiles of each image, of conversations with `counts` images each.

    Where there are several they have one tile each (as in InternVL and LLaVA).
    """
    if max_tiles not in (None, 1) and max(counts) > 1:
        raise ValueError(
            f"expected max_tiles of None or 1 where a text has several images, got {max_tiles}"
        )
    return [1 if count > 1 else max_tiles for count in counts for _ in range(count)]


def _expect_none(**options):
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"expected no {name} for this kind of input, got {value!r}")


PerceptionDLMProcessor.register_for_auto_class()

__all__ = ["PerceptionDLMProcessor"]
