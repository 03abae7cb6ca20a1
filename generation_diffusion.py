"""`diffusion_generate`: from images, region masks and prompts to texts.

    images, masks   -->  seen, once         -->  rows: a sequence   -->  denoise,     -->  texts in
    prompts              one for each group      for each group,         batch by          the order
    template             [0 1 2 3 4 5]           candidate and           batch             given
                         [6 7]                   length of fields

Shapes: B rows, G groups of response positions in a row, n positions a group, A columns of a row's
responses.
"""

import dataclasses
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import cached_file

from .configuration_perceptiondlm import PerceptionDLMConfig
from .generation_cache import (
    ForwardPass,
    ResponseNetwork,
    check_inputs,
    response_slots,
    responses_of,
    scatter_valid,
)
from .generation_generate import GenerateMixin, update_generation_config
from .generation_loop import (
    RowNoise,
    Sampler,
    answered,
    denoising,
    denoising_blocks,
    translated,
)
from .generation_options import (
    IN_BLOCKS,
    TEMPLATE_DECIDES,
    DiffusionOptions,
    expect_known,
    options_for,
)
from .generation_output import (
    Denoised,
    DiffusionOutput,
    OutputBuilder,
    Part,
    Row,
    merge_parts,
    nest,
    part_listener,
)
from .generation_rows import Batch, Call, RowMaker, chunks, settings, stop_sequences
from .generation_rules import Blockwise, State
from .generation_scoring import ScoringMixin, is_one_prompt, pair_seen
from .generation_seen import (
    RegionGroup,
    Seen,
    expect_seen_by,
    group_by_instruction,
    plan_groups,
)
from .generation_templates import pair_templates
from .image_loading import describe
from .image_processing_perceptiondlm import pair_images, pair_masks
from .modeling_language import fastest_linear
from .processing_perceptiondlm import pair_prompts

GENERATION_CONFIG = "generation_config.json"
LOADING = (  # what `cached_file` takes of the arguments of `from_pretrained`
    *("cache_dir", "force_download", "proxies", "local_files_only"),
    *("token", "revision", "subfolder"),
)

Steps = Generator[ForwardPass, torch.Tensor, DiffusionOutput]
MakingBatches = Generator[ForwardPass, torch.Tensor, Iterable[Batch]]


class DiffusionGenerationMixin(ScoringMixin, GenerateMixin):
    """Gives `diffusion_generate` and all that goes with it to a model with `embed_inputs`.

    Attributes:
        config, generation_config, device, language_model: the model's.
    """

    config: PerceptionDLMConfig
    generation_config: GenerationConfig
    device: torch.device
    language_model: torch.nn.Module
    output_modalities = ("text",)  # which pipelines ask for

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
        prompts=None,
        *,
        template=None,
        inputs: dict | None = None,
        processor=None,
        callback: Callable[[int, list], None] | None = None,
        **options,
    ) -> DiffusionOutput:
        """Captions every masked region, or answers questions about regions or whole images.

        Args:
            images: one image or a list of them; or what `see` returned.
            masks: a list of region masks for one image, or a list of such lists for a list of
                images; each is captioned, more than `num_region_prompts` of an image in several
                region groups. Masks as `load_mask` takes them. In a list of images None stands for
                one that is asked about as a whole.
            prompts: a question or a list of them, each a text or a conversation (a list of messages
                for the chat template, with a part for each of its images). With masks, the
                instruction for all regions, one for each image, or nested as the masks: one for
                each region, None for the checkpoint's own. In the tree layout a region's question
                may name other regions as `<region 2>`, for weights that have learned it.
            template: fixed text with fields to be filled, for all responses or nested as the masks
                (or questions); see `generation_templates`.
            inputs: instead of the above, what the processor made (say, from a conversation) with
                the masked response in it. Captions come in the order of the masks given to the
                processor.
            processor: defaults to the one saved beside the weights. With `inputs` it only decodes
                the texts, which are None where there is none.
            callback: called after each step with its number and the token ids, nested as in the
                output, None for a response that is not begun, or is still to be chosen among
                several candidates.
            options: see `DiffusionOptions`.

        Returns a `DiffusionOutput`. Raises ValueError for inputs or options that do not fit, and
        FileNotFoundError where no processor is saved beside the weights.
        """
        steps = self.diffusion_steps(
            images,
            masks,
            prompts,
            template=template,
            inputs=inputs,
            processor=processor,
            callback=callback,
            **options,
        )
        return answered(steps, ForwardPass.run)

    @torch.no_grad()
    def diffusion_steps(
        self,
        images=None,
        masks=None,
        prompts=None,
        *,
        template=None,
        inputs: dict | None = None,
        processor=None,
        callback: Callable[[int, list], None] | None = None,
        **options,
    ) -> Steps:
        """Does what `diffusion_generate` does, and stops before each forward pass of a step.

        The generator yields a `ForwardPass`, takes what its `run` gives (or the same, computed
        together with other calls' passes), and returns the `DiffusionOutput`. So several calls can
        go on side by side, each at a step of its own.
        """
        if callback is not None and not callable(callback):
            raise ValueError(f"expected a callable callback, got {describe(callback)}")
        expect_known(options)
        # On a CPU, products of float32 go to the faster of two libraries.
        fastest_linear(self)  # type: ignore[arg-type]

        if inputs is not None:
            if any(given is not None for given in (images, masks, prompts, template)):
                raise ValueError(
                    "expected `inputs` or images, masks, prompts and template, got both"
                )
            return (yield from self._generate_inputs(inputs, processor, callback, options))

        # Else the processor prepares them, batch by batch.
        processor = processor or self._saved_processor()
        self._check_processor(processor)
        has_masks = images.counts is not None if isinstance(images, Seen) else masks is not None
        if isinstance(images, Seen) and masks is not None:
            raise ValueError("expected no masks for images that were seen with theirs, got some")
        if has_masks and _is_mixed(images, masks):
            return (
                yield from self._mixed(
                    images, masks, prompts, template, processor, callback, options
                )
            )
        if has_masks:
            chosen = self._options(options, "captions", template)
            return (
                yield from self._caption_regions(
                    images, masks, prompts, template, processor, chosen, callback
                )
            )
        if prompts is None:
            raise ValueError("expected masks to caption or prompts to answer, got neither")
        chosen = self._options(options, "answers", template)
        return (
            yield from self._answer_prompts(images, prompts, template, processor, chosen, callback)
        )

    def _options(self, options: dict, task: str, template=None) -> DiffusionOptions:
        """Merges the call's options over the checkpoint's, and checks them."""
        if template is not None:
            for name in TEMPLATE_DECIDES:
                if options.get(name) is not None:
                    raise ValueError(
                        f"expected no {name} with a template, whose fields say how long they are,"
                        f" got {options[name]!r}"
                    )
        chosen = DiffusionOptions.build(self.decoding_defaults, options, task)
        if template is not None:  # a checkpoint's defaults for whole answers
            undecided: dict[str, Any] = dict.fromkeys(IN_BLOCKS)
            chosen = dataclasses.replace(chosen, **undecided)
        chosen.check_against(self.config)
        return chosen

    # What is denoised: captions, answers, both, or what the caller prepared.

    def _caption_regions(self, images, masks, prompts, template, processor, options, callback):
        """Captions the regions of images, each image's in groups."""
        is_seen = isinstance(images, Seen)
        if is_seen:
            expect_seen_by(images, self)
            asked, is_single = images.chosen, len(images.chosen) == 1
        else:
            is_single = not isinstance(images, (list, tuple))
            images, masks = pair_masks(images, masks)
            asked = [list(range(len(own))) for own in masks]
        counts = [len(own) for own in asked]
        instructions = pair_prompts(prompts, counts, is_single)
        templates = None if template is None else pair_templates(template, counts, is_single)
        call = Call(processor, options, counts, "captions", callback, templates, is_seen)
        maker = RowMaker(self, call)

        # More regions than the checkpoint has prompts for are captioned in several groups.
        groups: Sequence = images.groups if is_seen else self._plan(counts, instructions, processor)

        def make(chunk: Sequence) -> MakingBatches:
            seen = chunk if is_seen else self._see_regions(chunk, images, masks, processor)
            made = []
            for plan, group in zip(chunk, seen, strict=True):
                image = group.images[0]
                own = instructions[image] if is_seen or self._is_tree else plan.instruction
                made += yield from maker.region_rows(group, asked[image], own)
            return maker.batches(made)

        return self._run(map(make, chunks(groups, options.batch_size)), call)

    @property
    def _is_tree(self) -> bool:
        return self.config.region_layout == "independent"

    def _plan(self, counts: list[int], instructions, processor) -> list[RegionGroup]:
        """Plans region groups; in the joint layout those of a group have one instruction."""
        most = self.config.num_region_prompts
        if self._is_tree:
            return plan_groups(counts, most)
        return group_by_instruction(counts, most, instructions, processor.region_instruction)

    def _answer_prompts(self, images, prompts, template, processor, options, callback):
        """Answers questions, each about its images."""
        prompts = [prompts] if is_one_prompt(prompts) else list(prompts)
        is_seen = isinstance(images, Seen)
        if is_seen:
            expect_seen_by(images, self)
            groups: list = pair_seen(images, len(prompts))
        else:
            groups = pair_images(images, len(prompts))
        templates = None
        if template is not None:  # a list has one for each question
            templates = pair_templates(template, [1] * len(prompts))
        counts = [1] * len(prompts)
        call = Call(processor, options, counts, "answers", callback, templates, is_seen)
        maker = RowMaker(self, call)

        def make(chunk: Sequence[int]) -> MakingBatches:
            own = [groups[i] for i in chunk]
            seen = own if is_seen else self._see_images(own, processor)
            made = []
            for i, group in zip(chunk, seen, strict=True):
                made += yield from maker.answer_rows(i, prompts[i], group)
            return maker.batches(made)

        return self._run(map(make, chunks(range(len(prompts)), options.batch_size)), call)

    def _mixed(self, images, masks, prompts, template, processor, callback, options) -> Steps:
        """Captions the regions of some images, and answers questions about others as a whole."""
        images = list(images)
        count = len(images)
        given = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts] * count
        for name, listed in {"masks": masks, "prompts": given}.items():
            if len(listed) != count:
                raise ValueError(f"expected {name} for each of {count} images, got {len(listed)}")
        has_list = isinstance(template, (list, tuple))
        if has_list and len(template) != count:
            raise ValueError(f"expected templates of {count} images, got {len(template)}")
        whole = [i for i, own in enumerate(masks) if own is None]
        for i in whole:
            if not isinstance(given[i], str):
                raise ValueError(
                    f"expected a question about image {i}, which has no region masks, got"
                    f" {describe(given[i])}"
                )

        # One seed, which each part would else draw for itself.
        if options.get("generator") is not None:
            drawn = DiffusionOptions.build({}, {"generator": options["generator"]})
            options = {**options, "generator": None, "seed": drawn.draw_seed(self.device)}
        parts: list[Part] = []
        for task, own in (
            ("captions", [i for i in range(count) if i not in whole]),
            ("answers", whole),
        ):
            if own:
                output = yield from self.diffusion_steps(
                    [images[i] for i in own],
                    [masks[i] for i in own] if task == "captions" else None,
                    [given[i] for i in own],
                    template=[template[i] for i in own] if has_list else template,
                    processor=processor,
                    callback=part_listener(callback, parts, own, count),
                    **options_for(task, options),
                )
                parts.append(Part(own, output))
        return merge_parts(parts, count)

    def _generate_inputs(self, inputs, processor, callback, options):
        """Fills the responses of a batch that the caller prepared."""
        # Prepared inputs say by themselves what is denoised and how long it is.
        check_inputs(inputs, self.config)
        task = inputs["task"]
        chosen = self._options(self._with_length_of(inputs, task, options), task)
        if chosen.num_return_sequences > 1:
            raise ValueError(
                "expected num_return_sequences 1 with `inputs`, which are one batch, got"
                f" {chosen.num_return_sequences}"
            )
        processor = processor or self._processor_if_saved()

        # Responses come in the order of the regions' areas, and go back in that of their masks.
        orders = orders_of(inputs)
        sizes = (inputs["response_columns"] >= 0).any(-1).sum(1).tolist()
        rows = []
        for b, count in enumerate(sizes):
            order = list(range(count)) if orders is None else orders[b]
            rows.append(Row([(b, k) for k in order], [b], (b, 0)))
        call = Call(processor, chosen, sizes, task, callback)
        return self._run([_made([Batch(inputs, rows, *settings(self, call))])], call)

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

    # How it is denoised.

    def _run(self, makings: Iterable[MakingBatches], call: Call) -> Steps:
        """Makes batches, denoises each, and puts its rows back where the caller expects them."""
        options, processor = call.options, call.processor
        stops = stop_sequences(options, processor) if processor is not None else ()
        # Where each response ends: at the end of its turn or text, or at a stop string.
        ends = [(i,) for i in self._end_ids()] + list(stops)
        builder = OutputBuilder(call.counts, processor, ends, options.stop_strings or ())

        # One seed for the whole call: each row derives its own from it.
        seed = options.draw_seed(self.device) if options.is_random else 0
        listens = options.return_history or call.callback is not None
        history: list[list] = []
        done: dict = {}  # what the batches before this one have filled, by place
        if options.return_history and call.has_candidates:
            raise ValueError(
                "expected one candidate for each response where its steps are kept, got several:"
                " give the template's fields one length, or drop return_history"
            )
        for making in makings:
            for batch in (yield from making):

                def on_step(step: int, responses: list, rows=batch.rows, done=done):
                    known = {} if call.has_candidates else {**done, **_by_place(rows, responses)}
                    nested = nest(call.counts, known)
                    if options.return_history:
                        history.append(nested)
                    if call.callback is not None:
                        call.callback(step, nested)

                # Nobody listens by default, and then nothing is moved off the device at each step.
                ready = list(batch.ready)
                if batch.rows:
                    listener = on_step if listens else None
                    denoised = yield from self._denoise_batch(batch, options, seed, listener)
                    ready += zip(batch.rows, denoised, strict=True)
                for row, own in ready:
                    builder.add(row, own)
                    done = {**done, **_by_place([row], [own.token_ids])}
        return builder.output(options.return_token_scores, options.num_return_sequences, history)

    def _denoise_batch(
        self, batch: Batch, options, seed: int, listener
    ) -> Generator[ForwardPass, torch.Tensor, list[Denoised]]:
        """Denoises one batch; `listener` gets each step's number and the rows' token ids."""
        given = {k: v for k, v in batch.inputs.items() if isinstance(v, torch.Tensor)}
        inputs = {k: v.to(self.device) for k, v in given.items()}
        assert batch.rule is not None  # or there is nothing to denoise
        # Where the responses stand, all that is open in them masked at first.
        columns, state = response_slots(inputs, self.config.mask_token_id)
        # The prompt is computed here, once where the layout allows it.
        network = ResponseNetwork(
            self,
            inputs,
            options.prompt_refresh_interval,
            options.cfg_scale,
            options.compile,
            batch.trunks,
            block_cache=options.block_cache,
        )
        B, G, n = state.tokens.shape
        flat, valid = columns.view(B, G * n), state.valid.view(B, G * n)

        lengths = state.valid.sum(-1)  # (B, G)
        sizes = list(zip((lengths > 0).sum(1).tolist(), lengths.amax(1).tolist(), strict=True))
        plan = batch.rule if isinstance(batch.rule, Blockwise) else None
        if plan is not None:  # each block draws its own
            sizes = [(groups, plan.block_length) for groups, _ in sizes]
        keys = [row.key for row in batch.rows]
        sampler = Sampler(
            options.temperature,
            options.top_k,
            options.top_p,
            options.remasking,
            torch.tensor(batch.suppressed, device=self.device) if batch.suppressed else None,
            RowNoise(seed, keys, sizes, self.device) if options.is_random else None,
        )

        # The loop knows groups of positions, the network columns of a sequence.
        def filled(tokens: torch.Tensor) -> torch.Tensor:
            return scatter_valid(network.response_ids, flat, tokens.view(B, G * n), valid)

        def ask(tokens: torch.Tensor, step: int) -> ForwardPass:
            return ForwardPass(network, filled(tokens), columns, step)

        def ask_block(tokens: torch.Tensor, block: int, step: int) -> ForwardPass:
            assert plan is not None
            own = columns[..., plan.window(block)]
            return ForwardPass(network, filled(tokens), own, step, block)

        def on_step(step: int, state: State):
            listener(step, responses_of(inputs, filled(state.tokens)))

        mask_id, heard = self.config.mask_token_id, on_step if listener else None
        if isinstance(batch.rule, Blockwise):
            in_blocks = denoising_blocks(state, batch.rule, sampler, mask_id, heard)
            denoised = yield from translated(in_blocks, ask_block)
        else:
            by_step = network.depends_on_step
            steps = denoising(state, batch.rule, sampler, mask_id, heard, by_step)
            denoised = yield from translated(steps, ask)
        state, forwards, log_probs = denoised

        # What was given has no probability.
        unknown = torch.full_like(network.response_ids, torch.nan, dtype=torch.float64)
        scores = scatter_valid(unknown, flat, log_probs.view(B, G * n), valid)
        token_ids = responses_of(inputs, filled(state.tokens))
        token_scores = responses_of(inputs, scores)
        return [
            Denoised(ids, [[None if p != p else p for p in one] for one in own], count)
            for ids, own, count in zip(token_ids, token_scores, forwards.tolist(), strict=True)
        ]


def _made(batches: Iterable[Batch]) -> MakingBatches:
    """Gives batches that need no forward pass to be made."""
    yield from ()
    return batches


def orders_of(inputs) -> list[list[int]] | None:
    """Reads the mask indices of each row's regions from the processor's `region_orders`.

    That is int64 (B, R), padded with -1. None where the inputs hold none.
    """
    orders = inputs.get("region_orders")
    if orders is None:
        return None
    return [[k for k in row if k >= 0] for row in orders.tolist()]


def _read_json(path: str) -> dict:
    """Reads a JSON file that holds an object; raises ValueError for any other."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected JSON in {path}, got: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {path}, got {describe(value)}")
    return value


def _is_mixed(images, masks) -> bool:
    """Tells whether some of a list of images have no region masks."""
    are_lists = isinstance(images, (list, tuple)) and isinstance(masks, (list, tuple))
    return are_lists and any(own is None for own in masks)


def _by_place(rows: list[Row], responses: list[list]) -> dict:
    """Returns the rows' responses by the places that they belong to."""
    return {
        place: response
        for row, own in zip(rows, responses, strict=True)
        for place, response in zip(row.places, own, strict=True)
        if place is not None
    }
