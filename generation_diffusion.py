"""`diffusion_generate` and `generate`: from images, region masks and prompts to texts.

    images, masks, prompts        region groups         batches            responses
    one image, 8 masks      -->   [0 1 2 3 4 5]   -->   inputs, rule  -->  denoise  -->  texts in
                                  [6 7]                                                  the order
                                                                                         given

Shapes: B rows, G groups of response positions in a row, n positions a group, L positions of a
prompt.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import cached_file

from .configuration_perceptiondlm import (
    ROLE_CAPTION,
    ROLE_SHARED,
    SHARED_REGION,
    PerceptionDLMConfig,
)
from .generation_cache import (
    ResponseNetwork,
    check_inputs,
    response_slots,
    rows_of,
    scatter_valid,
)
from .generation_loop import RowNoise, Sampler, denoise
from .generation_options import (
    KNOWN,
    DiffusionOptions,
    GenerateArguments,
    decoding_defaults,
    update_generation_config,
)
from .generation_rules import Rule, State, StopAt
from .image_loading import describe
from .image_processing_perceptiondlm import (
    PerceptionDLMImageProcessor,
    pair_images,
    pair_masks,
)
from .modeling_language import fastest_linear
from .processing_perceptiondlm import PerceptionDLMProcessor, broadcast_texts
from .processing_sequence import IGNORED_LABEL, RESPONSE_INPUTS, response_length

# An answer is the only group of its row.
ANSWER_REGION = 0
COLUMNS = ("input_ids", "attention_mask", "position_ids", "region_ids", "role_ids")
# What only training needs beside them, and what comes with images.
TRAINING_INPUTS = ("labels", "timesteps", "noise")
IMAGE_INPUTS = (*PerceptionDLMImageProcessor.model_input_names, "region_orders")
INPUTS = (*COLUMNS, *IMAGE_INPUTS, *TRAINING_INPUTS, *RESPONSE_INPUTS)
GENERATION_CONFIG = "generation_config.json"
LOADING = (  # what `cached_file` takes of the arguments of `from_pretrained`
    *("cache_dir", "force_download", "proxies", "local_files_only"),
    *("token", "revision", "subfolder"),
)


@dataclass
class DiffusionOutput:
    """Holds captions or answers, and what they took.

    Attributes:
        texts: for each image the text of each region, in the order of the masks given; for
            questions one text each. None where there is no processor to decode them.
        token_ids: the same nesting, each a list of caption_length or max_new_tokens ids.
        num_forwards: denoising forward passes, summed over region groups; running groups together
            in a batch does not change it.
        lengths: nested as the texts, the tokens of each response before its end: end-of-turn,
            end-of-text or a stop string.
        forward_passes: nested alike, those of the region group that each response was in.
        image_forwards: forward passes of each image or question, summed over its region groups.
        history: after each step the token ids, nested alike, on request.
    """

    texts: list[list[str]] | None
    token_ids: list[list[list[int]]]
    num_forwards: int
    lengths: list[list[int]] = field(default_factory=list)
    forward_passes: list[list[int]] = field(default_factory=list)
    image_forwards: list[int] = field(default_factory=list)
    history: list[list[list[list[int]]]] = field(default_factory=list, repr=False)

    @property
    def tokens_per_forward(self) -> float:
        """Returns TPF as published: response tokens, padding counted, over forward passes."""
        tokens = sum(len(ids) for response in self.token_ids for ids in response)
        return tokens / self.num_forwards

    def to_dict(self) -> dict:
        """Returns plain lists and numbers, ready for JSON."""
        return {**dataclasses.asdict(self), "tokens_per_forward": self.tokens_per_forward}


@dataclass
class RegionGroup:
    """Names the regions of one image that share one sequence: one row of a batch."""

    image: int
    masks: list[int]


class Run(NamedTuple):
    """Holds one batch to denoise.

    Attributes:
        inputs: the processor's tensors.
        rule: which positions are committed.
        suppressed: ids that are never produced.
        keys: what tells each row from all others of the call: its image and first mask.
    """

    inputs: dict
    rule: Rule
    suppressed: tuple[int, ...]
    keys: list[tuple[int, int]]


class Layout(NamedTuple):
    """Says how the rows of a call are nested for the caller.

    Attributes:
        nest: puts a value of each group of each row where the caller expects it; there may be
            fewer rows while a run goes on.
        row_images: the image, or question, of each row.
        num_images: how many there are.
    """

    nest: Callable[[list[list]], list[list]]
    row_images: list[int]
    num_images: int


class DiffusionGenerationMixin:
    """Gives `diffusion_generate` and `generate` to a model with `embed_inputs`.

    Attributes:
        config, generation_config, device, language_model: the model's.
        _source: the path or Hub id and the loading options of the weights, beside which a
            processor is looked for; None for a model that was not loaded.
        _processor: the processor that was found there.
    """

    config: PerceptionDLMConfig
    generation_config: GenerationConfig
    device: torch.device
    language_model: torch.nn.Module
    output_modalities = ("text",)  # which pipelines ask for

    _source: tuple[str, dict] | None = None
    _processor: PerceptionDLMProcessor | None = None

    @property
    def decoding_defaults(self) -> dict:
        """Returns the options of `DiffusionOptions` that the checkpoint prefers."""
        return decoding_defaults(self.generation_config)

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        *,
        trust_remote_code=None,
        **loading,
    ):
        """Loads `generation_config.json`, as transformers asks after the weights.

        What it leaves open stays as the config says, for checkpoints that have no such file. Raises
        ValueError for a file that is damaged, or holds a field that nobody knows.
        """
        place = pretrained_model_name_or_path
        if generation_config is not None:
            saved = generation_config.to_diff_dict()
        else:
            known = {k: v for k, v in loading.items() if k in LOADING}
            path = cached_file(
                place, GENERATION_CONFIG, _raise_exceptions_for_missing_entries=False, **known
            )
            if path is None:
                return
            saved = _read_json(path)
        self.generation_config = update_generation_config(self.generation_config, saved, place)

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
            images: one image or a list of them.
            masks: a list of region masks for one image, or a list of such lists for a list of
                images; each is captioned, more than `num_region_prompts` of an image in several
                region groups. Masks as `load_mask` takes them.
            prompts: a question or a list of them; with masks, the instruction.
            inputs: instead of the above, what the processor made (say, from a conversation) with
                the masked response in it. Captions come in the order of the masks given to the
                processor.
            processor: defaults to the one saved beside the weights. With `inputs` it only decodes
                the texts, which are None where there is none.
            callback: called after each step with its number and the token ids, nested as in the
                output.
            options: see `DiffusionOptions`.

        Returns a `DiffusionOutput`. Raises ValueError for inputs or options that do not fit, and
        FileNotFoundError where no processor is saved beside the weights.
        """
        if callback is not None and not callable(callback):
            raise ValueError(f"expected a callable callback, got {describe(callback)}")
        # On a CPU, products of float32 go to the faster of two libraries.
        fastest_linear(self)  # type: ignore[arg-type]

        if inputs is not None:
            if images is not None or masks is not None or prompts is not None:
                raise ValueError("expected `inputs` or images, masks and prompts, got both")
            # Prepared inputs say by themselves what is denoised and how long it is.
            check_inputs(inputs, self.config)
            task = inputs["task"]
            chosen = self._options(self._with_length_of(inputs, task, options), task)
            processor = processor or self._processor_if_saved()
            return self._generate_inputs(inputs, processor, chosen, callback)

        # Else the processor prepares them, batch by batch.
        chosen = self._options(options, "answers" if masks is None else "captions")
        processor = processor or self._saved_processor()
        self._check_processor(processor)
        if masks is not None:
            return self._caption_regions(images, masks, prompts, processor, chosen, callback)
        if prompts is None:
            raise ValueError("expected masks to caption or prompts to answer, got neither")
        return self._answer_prompts(images, prompts, processor, chosen, callback)

    def _options(self, options: dict, task: str) -> DiffusionOptions:
        chosen = DiffusionOptions.build(self.decoding_defaults, options, task)
        chosen.check_against(self.config)
        return chosen

    # What is denoised: captions, answers, or what the caller prepared.

    def _caption_regions(self, images, masks, prompts, processor, options, callback):
        """Captions the regions of images, each image's in groups."""
        images, masks = pair_masks(images, masks)

        # More regions than the checkpoint has prompts for are captioned in several groups.
        groups = plan_groups([len(own) for own in masks], self.config.num_region_prompts)
        given = processor.region_instruction if prompts is None else prompts
        instructions = broadcast_texts(given, len(images), "image")

        rule, suppressed = self._caption_settings(options)
        runs: list[Run] = []
        orders: list[list[int]] = []
        for batch in _chunks(groups, options.batch_size):
            inputs = processor(
                [images[group.image] for group in batch],
                masks=[[masks[group.image][k] for k in group.masks] for group in batch],
                prompts=[instructions[group.image] for group in batch],
                caption_length=options.caption_length,
            )
            orders += orders_of(inputs) or []
            keys = [(group.image, group.masks[0]) for group in batch]
            runs.append(Run(inputs, rule, suppressed, keys))

        # Rows come back in the order of their groups, captions in that of the regions' areas.
        def nest(rows: list[list]) -> list[list]:
            nested = [[None] * len(own) for own in masks]
            for group, captions in zip(groups, in_given_order(rows, orders), strict=False):
                for k, caption in zip(group.masks, captions, strict=True):
                    nested[group.image][k] = caption
            return nested

        layout = Layout(nest, [group.image for group in groups], len(images))
        return self._run(runs, layout, processor, options, callback)

    def _answer_prompts(self, images, prompts, processor, options, callback):
        """Answers questions, each about its images."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        image_groups = pair_images(images, len(prompts))
        rule, suppressed = self._answer_settings(options.max_new_tokens, processor, options)
        # Every batch has the same rule: answers are equally long.
        runs = []
        for batch in _chunks(range(len(prompts)), options.batch_size):
            inputs = processor(
                [image_groups[i] for i in batch],
                prompts=[prompts[i] for i in batch],
                max_new_tokens=options.max_new_tokens,
            )
            runs.append(Run(inputs, rule, suppressed, [(i, 0) for i in batch]))

        layout = Layout(lambda rows: rows, list(range(len(prompts))), len(prompts))
        return self._run(runs, layout, processor, options, callback)

    def _generate_inputs(self, inputs, processor, options, callback):
        """Fills the responses of a batch that the caller prepared."""
        orders = orders_of(inputs)
        if inputs["task"] == "captions":
            rule, suppressed = self._caption_settings(options)
        else:
            rule, suppressed = self._answer_settings(options.max_new_tokens, processor, options)

        def nest(rows: list) -> list:
            return rows if orders is None else in_given_order(rows, orders)

        count = len(inputs["input_ids"])
        run = Run(inputs, rule, suppressed, [(i, 0) for i in range(count)])
        layout = Layout(nest, list(range(count)), count)
        return self._run([run], layout, processor, options, callback)

    def _with_length_of(self, inputs, task: str, options: dict) -> dict:
        """Adds the response length that prepared inputs have to the options.

        Refuses another length, and what cannot apply to a batch that is made already.
        """
        if options.get("batch_size") is not None:
            raise ValueError(
                "expected no batch_size with `inputs`, which are one batch,"
                f" got {options['batch_size']!r}"
            )
        # Every region has as many masked positions, so one of them tells the length.
        columns, _ = response_slots(inputs, self.config.mask_token_id)
        length = columns.shape[-1]
        name = "caption_length" if task == "captions" else "max_new_tokens"
        if options.get(name, length) not in (None, length):
            raise ValueError(
                f"expected no {name}, or the {length} masked positions of `inputs`,"
                f" got {options[name]!r}"
            )
        return options | {name: length}

    def _caption_settings(self, options) -> tuple[Rule, tuple[int, ...]]:
        """Chooses the rule for captions, and the ids that are suppressed in them."""
        scope = "region" if self.config.region_layout == "independent" else "image"
        rule = options.region_rule(scope, self.config.eot_token_id)
        return rule, tuple(options.suppress_tokens or ())

    def _answer_settings(self, length: int, processor, options) -> tuple[Rule, tuple[int, ...]]:
        """Chooses the rule for answers, and the ids that are suppressed in them."""
        rule = options.answer_rule(length, self.config.eot_token_id)
        if options.stop_strings:
            rule = StopAt(rule, stop_sequences(options, processor or self._saved_processor()))
        return rule, tuple(options.suppress_tokens or ())

    # How it is denoised.

    def _run(self, runs: list[Run], layout: Layout, processor, options, callback):
        """Denoises each batch and puts its rows back where the caller expects them."""
        # One seed for the whole call: each row derives its own from it.
        seed = options.draw_seed(self.device) if options.is_random else 0
        rows: list[list[list[int]]] = []
        history: list[list] = []
        forwards: list[int] = []
        for run in runs:
            finished = list(rows)

            def on_step(step: int, responses: list, finished=finished):
                nested = layout.nest(finished + responses)
                if options.return_history:
                    history.append(nested)
                if callback is not None:
                    callback(step, nested)

            # Nobody listens by default, and then nothing is moved off the device at each step.
            listener = on_step if options.return_history or callback is not None else None
            responses, counts = self._denoise_batch(run, options, seed, listener)
            rows += responses
            forwards += counts

        # What the loop counted, for each image and for each response.
        image_forwards = [0] * layout.num_images
        for image, count in zip(layout.row_images, forwards, strict=True):
            image_forwards[image] += count
        token_ids = layout.nest(rows)
        passes = [[count] * len(row) for row, count in zip(rows, forwards, strict=True)]
        # Where each response ends: at the end of its turn or text, or at a stop string.
        stops = stop_sequences(options, processor) if processor is not None else ()
        ends = [(i,) for i in self._end_ids()] + list(stops)
        lengths = [[response_length(ids, ends) for ids in row] for row in token_ids]
        return DiffusionOutput(
            texts=_texts(token_ids, lengths, options.stop_strings, processor),
            token_ids=token_ids,
            num_forwards=sum(forwards),
            lengths=lengths,
            forward_passes=layout.nest(passes),
            image_forwards=image_forwards,
            history=history,
        )

    def _denoise_batch(self, run: Run, options, seed: int, listener):
        """Denoises one batch.

        Returns token ids of its responses, a list (groups) of lists for each row, and each row's
        forward passes.
        """
        given = {k: v for k, v in run.inputs.items() if isinstance(v, torch.Tensor)}
        inputs = {k: v.to(self.device) for k, v in given.items()}
        # The prompt is computed here, once where the layout allows it.
        network = ResponseNetwork(
            self, inputs, options.prompt_refresh_interval, options.cfg_scale, options.compile
        )
        # Where the responses stand, all of them masked at first.
        columns, state = response_slots(inputs, self.config.mask_token_id)
        B, G, n = state.tokens.shape
        flat, valid = columns.view(B, G * n), state.valid.view(B, G * n)

        counts = state.valid[..., 0].sum(1).tolist()  # groups of each row
        sampler = Sampler(
            options.temperature,
            options.top_k,
            options.top_p,
            options.remasking,
            torch.tensor(run.suppressed, device=self.device) if run.suppressed else None,
            RowNoise(seed, run.keys, counts, self.device) if options.is_random else None,
        )

        # The loop knows groups of positions, the network columns of a sequence.
        def predict(tokens: torch.Tensor, step: int) -> torch.Tensor:
            ids = scatter_valid(network.response_ids, flat, tokens.view(B, G * n), valid)
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
        return rows_of(state), forwards.tolist()

    # The processor that is saved beside the weights.

    def _saved_processor(self) -> PerceptionDLMProcessor:
        """Loads the processor saved beside the weights, once."""
        if self._processor is None:
            if self._source is None:
                raise ValueError("expected `processor`: this model was not loaded from a folder")
            path, options = self._source
            try:
                self._processor = PerceptionDLMProcessor.from_pretrained(path, **options)
            except (OSError, ValueError) as error:  # transformers raises either
                place = Path(path) / options.get("subfolder", "")
                raise FileNotFoundError(
                    f"expected a processor beside the weights in {place}, got: {error}; pass"
                    " `processor`"
                ) from error
        return self._processor

    def _processor_if_saved(self) -> PerceptionDLMProcessor | None:
        try:
            return None if self._source is None else self._saved_processor()
        except FileNotFoundError:
            return None

    def _check_processor(self, processor):
        """Refuses a processor that was made for another model."""
        vision, images = self.config.vision_config, processor.image_processor
        pairs = {
            "region_layout": (self.config.region_layout, processor.region_layout),
            "roi_output_size": (self.config.roi_output_size, processor.roi_output_size),
            "image_size": (vision.image_size, images.image_size),
            "image_layout": (self.config.image_layout, images.image_layout),
            "mask_token_id": (self.config.mask_token_id, processor.mask_token_id),
        }
        for name, (expected, got) in pairs.items():
            if expected != got:
                raise ValueError(
                    f"expected a processor with the model's {name} {expected!r}, got {got!r}"
                )

    # transformers' `generate`, for answers about whole images.

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


def plan_groups(counts: Sequence[int], max_regions: int) -> list[RegionGroup]:
    """Splits each image's masks, in the order given, into groups of at most `max_regions`."""
    if max_regions == 0:
        raise ValueError("expected a checkpoint with region prompts for masks, got one without")
    for i, count in enumerate(counts):
        if count == 0:
            raise ValueError(f"expected at least one mask for image {i}, got none")
    return [
        RegionGroup(image, list(range(first, min(first + max_regions, count))))
        for image, count in enumerate(counts)
        for first in range(0, count, max_regions)
    ]


def in_given_order(rows: list[list], orders: Sequence[Sequence[int]]) -> list[list]:
    """Restores the caller's mask order.

    Each row's values come in an order of the masks' indices; there may be fewer rows than orders
    while a run goes on.
    """
    return [
        [values[order.index(k)] for k in range(len(order))]
        for values, order in zip(rows, orders, strict=False)
    ]


def orders_of(inputs) -> list[list[int]] | None:
    """Reads the mask indices of each row's regions from the processor's `region_orders`.

    That is int64 (B, R), padded with -1. None where the inputs hold none.
    """
    orders = inputs.get("region_orders")
    if orders is None:
        return None
    return [[k for k in row if k >= 0] for row in orders.tolist()]


def stop_sequences(options: DiffusionOptions, processor) -> tuple[tuple[int, ...], ...]:
    """Encodes each stop string to token ids."""
    encoded = (
        processor.tokenizer(stop, add_special_tokens=False)["input_ids"]
        for stop in options.stop_strings or ()
    )
    return tuple(map(tuple, encoded))


def _texts(token_ids, lengths, stop_strings, processor) -> list[list[str]] | None:
    """Decodes each response up to its end."""
    if processor is None:
        return None
    texts = [
        [processor.decode_answer(ids[:length]) for ids, length in zip(row, own, strict=True)]
        for row, own in zip(token_ids, lengths, strict=True)
    ]
    for stop in stop_strings or ():  # those that the tokenizer splits otherwise in their context
        texts = [[text.split(stop)[0].strip() for text in row] for row in texts]
    return texts


def _read_json(path: str) -> dict:
    """Reads a JSON file that holds an object; raises ValueError for any other."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected JSON in {path}, got: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {path}, got {describe(value)}")
    return value


def _chunks(items: Sequence, size: int | None) -> list[Sequence]:
    size = size or max(len(items), 1)
    return [items[i : i + size] for i in range(0, len(items), size)]


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
