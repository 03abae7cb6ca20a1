"""Generation: passes, batches and results of `diffusion_generate`."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from .configuration_perceptiondlm import ROLE_CAPTION, ROLE_SHARED, SHARED_REGION
from .generation_cache import AnswerNetwork, answer_slots, prompt_length, rows_of, scatter_valid
from .generation_loop import RowNoise, Rule, Sampler, State, StopAt, denoise
from .generation_options import KNOWN, DiffusionOptions, GenerateArguments
from .image_loading import describe
from .image_processing_perceptiondlm import PerceptionDLMImageProcessor
from .modeling_language import fastest_linear
from .processing_perceptiondlm import PerceptionDLMProcessor
from .processing_sequence import IGNORED_LABEL, check_inputs

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


@dataclass
class DiffusionOutput:
    """Captions or answers.

    Attributes:
        texts: for each image the text of each region, in the order of the masks given; for
            questions one text each.
        token_ids: the same nesting, each a list of caption_length or max_new_tokens ids.
        num_forwards: denoising forward passes, summed over passes; running passes together in a
            batch does not change it.
        history: after each step the token ids, nested alike, on request.
    """

    texts: list[list[str]] | None
    token_ids: list[list[list[int]]]
    num_forwards: int
    history: list[list[list[list[int]]]] = field(default_factory=list, repr=False)

    @property
    def tokens_per_forward(self) -> float:
        """TPF as published: answer tokens, padding counted, over forward passes."""
        tokens = sum(len(ids) for answer in self.token_ids for ids in answer)
        return tokens / self.num_forwards

    def to_dict(self) -> dict:
        """Plain lists and numbers, ready for JSON."""
        return {**dataclasses.asdict(self), "tokens_per_forward": self.tokens_per_forward}


@dataclass
class Pass:
    """One row of a batch: an image and the masks, by index, captioned together."""

    image: int
    masks: list[int]


class Run(NamedTuple):
    """One batch to denoise: the processor's tensors, the rule, ids never produced, and what tells
    each row from all others of the call."""

    inputs: dict
    rule: Rule
    banned: tuple[int, ...]
    keys: list[tuple[int, int]]


class DiffusionGenerationMixin:
    """`diffusion_generate` for a model with `embed_inputs` and `language_model`."""

    @torch.no_grad()
    def diffusion_generate(
        self,
        images=None,
        masks=None,
        prompts: str | Sequence[str] | None = None,
        *,
        inputs: dict | None = None,
        processor=None,
        callback: Callable[[int, list], None] | None = None,
        **options,
    ) -> DiffusionOutput:
        """Captions every masked region, or answers a question about whole images.

        Args:
            images: one picture or a list of them.
            masks: a list of masks for one picture, or a list of such lists for a list of
                pictures; each captioned, more than `num_region_prompts` of a picture in several
                passes. Masks as `load_mask` takes them.
            prompts: a question or a list of them; with masks, the instruction.
            inputs: instead of the above, what the processor made (say, from a conversation) with
                the masked answer in it. Captions come in the order of the masks given to the
                processor.
            processor: defaults to the one saved beside the weights. With `inputs` it only decodes
                the texts, which are None where there is none.
            callback: called after each step with its number and the token ids, nested as in the
                output.
            options: see `DiffusionOptions`.

        Returns a `DiffusionOutput`. Raises ValueError for inputs or options that do not fit, and
        FileNotFoundError where no processor is saved beside the weights.
        """
        if inputs is not None:
            check_inputs(inputs, self.config)
        if callback is not None and not callable(callback):
            raise ValueError(f"expected a callable callback, got {describe(callback)}")
        is_region = masks is not None or (inputs is not None and "boxes" in inputs)
        task = "captions" if is_region else "answers"
        if inputs is not None:
            if images is not None or masks is not None or prompts is not None:
                raise ValueError("expected `inputs` or images, masks and prompts, got both")
            options = self._with_length_of(inputs, task, options)
        chosen = DiffusionOptions.build(self.config.generation_defaults, options, task)
        chosen.check_against(self.config)
        if inputs is not None:
            processor = processor or self._processor_if_saved()
            return self._generate_inputs(inputs, processor, chosen, callback)
        processor = processor or self._saved_processor()
        self._check_processor(processor)
        if masks is not None:
            return self._caption_regions(images, masks, prompts, processor, chosen, callback)
        if prompts is None:
            raise ValueError("expected masks to caption or prompts to answer, got neither")
        return self._answer_prompts(images, prompts, processor, chosen, callback)

    def _caption_regions(self, images, masks, prompts, processor, options, callback):
        if images is None:
            raise ValueError("expected an image for the masks, got none")
        single = not isinstance(images, (list, tuple))
        images, masks = ([images], [masks]) if single else (list(images), list(masks))
        if len(images) != len(masks):
            raise ValueError(
                f"expected a list of masks for each of {len(images)} images, got {len(masks)}"
            )
        for own in masks:
            if isinstance(own, (str, dict)) or not hasattr(own, "__len__"):
                raise ValueError(f"expected a list of masks for each image, got {describe(own)}")
        passes = plan_passes([len(own) for own in masks], self.config.num_region_prompts)
        instructions = _instructions(prompts, len(images))
        scope = "region" if self.config.region_layout == "independent" else "image"
        rule = options.region_rule(scope, self.config.eot_token_id)
        runs, orders = [], []
        for batch in _chunks(passes, options.batch_size):
            own = [instructions[p.image] for p in batch]
            inputs = processor(
                [images[p.image] for p in batch],
                masks=[[masks[p.image][k] for k in p.masks] for p in batch],
                prompts=[p or processor.region_instruction for p in own],
                caption_length=options.caption_length,
            )
            orders += orders_of(inputs)
            banned = tuple(options.banned_token_ids or ())
            runs.append(Run(inputs, rule, banned, [(p.image, p.masks[0]) for p in batch]))

        def nest(rows: list[list[list[int]]]) -> list[list[list[int]]]:
            nested = [[None] * len(own) for own in masks]
            for p, captions in zip(passes, in_given_order(rows, orders), strict=False):
                for k, ids in zip(p.masks, captions, strict=True):
                    nested[p.image][k] = ids
            return nested

        return self._run(runs, nest, processor, options, callback)

    def _answer_prompts(self, images, prompts, processor, options, callback):
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        groups = _pictures_of_prompts(images, len(prompts))
        runs = []
        for batch in _chunks(range(len(prompts)), options.batch_size):
            inputs = processor(
                [groups[i] for i in batch],
                prompts=[prompts[i] for i in batch],
                max_new_tokens=options.max_new_tokens,
            )
            settings = self._answer_settings(options.max_new_tokens, processor, options)
            runs.append(Run(inputs, *settings, [(i, 0) for i in batch]))
        return self._run(runs, lambda rows: rows, processor, options, callback)

    def _with_length_of(self, inputs, task: str, options: dict) -> dict:
        """Options with the response length that prepared inputs have; refuses another, and what
        cannot apply to a batch that is made already."""
        if options.get("batch_size") is not None:
            raise ValueError(
                "expected no batch_size with `inputs`, which are one batch,"
                f" got {options['batch_size']!r}"
            )
        length = _answer_length(inputs, self.config.mask_token_id)
        name = "caption_length" if task == "captions" else "max_new_tokens"
        if options.get(name, length) not in (None, length):
            raise ValueError(
                f"expected no {name}, or the {length} masked positions of `inputs`,"
                f" got {options[name]!r}"
            )
        return options | {name: length}

    def _generate_inputs(self, inputs, processor, options, callback):
        orders = orders_of(inputs)
        if "boxes" in inputs:
            scope = "region" if self.config.region_layout == "independent" else "image"
            rule = options.region_rule(scope, self.config.eot_token_id)
            settings = (rule, tuple(options.banned_token_ids or ()))
        else:
            settings = self._answer_settings(options.max_new_tokens, processor, options)

        def nest(rows: list) -> list:
            return rows if orders is None else in_given_order(rows, orders)

        keys = [(i, 0) for i in range(len(inputs["input_ids"]))]
        runs = [Run(inputs, *settings, keys)]
        return self._run(runs, nest, processor, options, callback)

    def _answer_settings(self, length: int, processor, options):
        rule = options.answer_rule(length, self.config.eot_token_id)
        if options.stop_strings:
            rule = StopAt(rule, stop_sequences(options, processor or self._saved_processor()))
        given = options.banned_token_ids
        banned = self.config.banned_token_ids if given is None else given
        return rule, tuple(banned)

    def _run(self, runs, nest, processor, options, callback) -> DiffusionOutput:
        """Denoises each batch and puts rows back together with `nest`."""
        seed = options.draw_seed(self.device) if options.is_random else 0
        rows, history, forwards = [], [], 0
        for run in runs:
            finished = list(rows)

            def on_step(step: int, answers: list, finished=finished):
                nested = nest(finished + answers)
                if options.return_history:
                    history.append(nested)
                if callback is not None:
                    callback(step, nested)

            listener = on_step if options.return_history or callback is not None else None
            with fastest_linear(self.device):
                answers, count = self._denoise_batch(run, options, seed, listener)
            rows += answers
            forwards += count
        token_ids = nest(rows)
        texts = None
        if processor is not None:
            stops = stop_sequences(options, processor)
            texts = [
                [processor.decode_answer(before_first(ids, stops)) for ids in row]
                for row in token_ids
            ]
            texts = _cut_at(texts, options.stop_strings)
        return DiffusionOutput(texts, token_ids, forwards, history)

    def _denoise_batch(self, run: "Run", options, seed: int, listener):
        """Token ids of a batch's answers, a list (groups) of lists for each row, and forwards."""
        given = {k: v for k, v in run.inputs.items() if isinstance(v, torch.Tensor)}
        inputs = {k: v.to(self.device) for k, v in given.items()}
        network = AnswerNetwork(
            self, inputs, options.prompt_cache, options.cfg_scale, options.compile
        )
        slots = answer_slots(inputs, network.prompt_length, self.config.mask_token_id)
        columns, state = slots
        B, G, n = state.tokens.shape
        flat = columns.view(B, G * n)
        template = network.answer_ids
        valid = state.valid.view(B, G * n)
        counts = state.valid[..., 0].sum(1).tolist()
        sampler = Sampler(
            options.temperature,
            options.top_k,
            options.top_p,
            options.remasking,
            torch.tensor(run.banned, device=self.device) if run.banned else None,
            RowNoise(seed, run.keys, counts, self.device) if options.is_random else None,
        )

        def predict(tokens: torch.Tensor, step: int) -> torch.Tensor:
            ids = scatter_valid(template, flat, tokens.view(B, G * n), valid)
            return network(ids, step, flat).view(B, G, n, -1)

        def on_step(step: int, state: State):
            listener(step, rows_of(state))

        state, forwards = denoise(
            predict,
            state,
            run.rule,
            sampler,
            self.config.mask_token_id,
            on_step if listener else None,
            network.depends_on_step,
        )
        return rows_of(state), int(forwards.sum())

    def _saved_processor(self):
        if self.__dict__.get("_processor") is None:
            source = self.__dict__.get("_source")
            if source is None:
                raise ValueError("expected `processor`: this model was not loaded from a folder")
            path, options = source
            try:
                loaded = PerceptionDLMProcessor.from_pretrained(path, **options)
            except (OSError, ValueError) as error:  # transformers raises either
                place = Path(path) / options.get("subfolder", "")
                raise FileNotFoundError(
                    f"expected a processor beside the weights in {place}, got: {error}; pass"
                    " `processor`"
                ) from error
            self.__dict__["_processor"] = loaded
        return self.__dict__["_processor"]

    def _processor_if_saved(self):
        try:
            return None if self.__dict__.get("_source") is None else self._saved_processor()
        except FileNotFoundError:
            return None

    def _check_processor(self, processor):
        pairs = {
            "region_layout": (self.config.region_layout, processor.region_layout),
            "roi_output_size": (self.config.roi_output_size, processor.roi_output_size),
            "image_size": (
                self.config.vision_config.image_size,
                processor.image_processor.image_size,
            ),
            "image_layout": (self.config.image_layout, processor.image_processor.image_layout),
            "mask_token_id": (self.config.mask_token_id, processor.mask_token_id),
        }
        for name, (expected, got) in pairs.items():
            if expected != got:
                raise ValueError(
                    f"expected a processor with the model's {name} {expected!r}, got {got!r}"
                )


def plan_passes(counts: Sequence[int], most: int) -> list[Pass]:
    """Splits each image's masks, in the order given, into passes of at most `most`."""
    if most == 0:
        raise ValueError("expected a checkpoint with region prompts for masks, got one without")
    for i, count in enumerate(counts):
        if count == 0:
            raise ValueError(f"expected at least one mask for image {i}, got none")
    return [
        Pass(image, list(range(first, min(first + most, count))))
        for image, count in enumerate(counts)
        for first in range(0, count, most)
    ]


def in_given_order(rows: list[list], orders: Sequence[Sequence[int]]) -> list[list]:
    """Each row's captions, made in an order of the masks' indices, in the masks' own order; there
    may be fewer rows than orders while a run goes on."""
    return [
        [captions[order.index(k)] for k in range(len(order))]
        for captions, order in zip(rows, orders, strict=False)
    ]


def orders_of(inputs) -> list[list[int]] | None:
    """Mask indices of each row's regions, from the processor's `region_orders` (B, R), which is
    padded with -1; None where the inputs hold none."""
    orders = inputs.get("region_orders")
    if orders is None:
        return None
    return [[k for k in row if k >= 0] for row in orders.tolist()]


def _answer_length(inputs: dict, mask_token_id: int) -> int:
    columns, _ = answer_slots(inputs, prompt_length(inputs), mask_token_id)
    return columns.shape[-1]


def _instructions(prompts, count: int) -> list[str | None]:
    if prompts is None or isinstance(prompts, str):
        return [prompts] * count
    if len(prompts) != count:
        raise ValueError(f"expected an instruction for each of {count} images, got {len(prompts)}")
    return list(prompts)


def _pictures_of_prompts(images, count: int) -> list[list]:
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
    return [list(i) if isinstance(i, (list, tuple)) else [i] for i in images]


def stop_sequences(options: DiffusionOptions, processor) -> tuple[tuple[int, ...], ...]:
    """Token ids of each stop string."""
    encoded = (
        processor.tokenizer(stop, add_special_tokens=False)["input_ids"]
        for stop in options.stop_strings or ()
    )
    return tuple(map(tuple, encoded))


def before_first(ids: list[int], sequences: Sequence[tuple[int, ...]]) -> list[int]:
    """What stands before the first of the sequences, or all."""
    starts = (i for s in sequences for i in range(len(ids)) if tuple(ids[i : i + len(s)]) == s)
    return ids[: min(starts, default=len(ids))]


def _cut_at(texts, stop_strings):
    """Cuts stop strings that the tokenizer splits otherwise in their context."""
    for stop in stop_strings or ():
        texts = [[text.split(stop)[0].strip() for text in row] for row in texts]
    return texts


def _chunks(items: Sequence, size: int | None) -> list[Sequence]:
    size = size or max(len(items), 1)
    return [items[i : i + size] for i in range(0, len(items), size)]
