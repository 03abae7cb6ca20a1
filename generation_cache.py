"""What is computed once and what at each denoising step.

The prompt of a row stands before its response, in the same columns for a whole batch.

    columns   | padding, prompt: trunk, RoI tokens | response: captions, or an answer |
    tree      | keys and values kept, exactly      | computed at every step           |
    joint     | computed at every step, or every `prompt_refresh_interval` steps      |

    with `block_cache` ("dual"; "prefix" computes the later blocks at every step, too):
              | prompt | finished blocks | this block | later blocks |
    first     | computed, as above says  | computed   | computed     |  and kept
    others    | kept                     | computed   | kept         |

In the tree layout the response cannot influence the prompt, so the prompt's keys and values are
computed once and the cache is exact. Elsewhere every step computes the whole sequence, unless
`prompt_refresh_interval` asks for an approximation. `block_cache` is another, for answers that are
decoded in blocks: what is kept was computed when the present block was still masked (Fast-dLLM,
arXiv:2505.22618).
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .configuration_perceptiondlm import (
    NO_REGION,
    ROLE_CAPTION,
    ROLE_SHARED,
    PerceptionDLMConfig,
)
from .generation_rules import State
from .image_processing_perceptiondlm import PerceptionDLMImageProcessor
from .modeling_attention import Structure
from .processing_sequence import RESPONSE_INPUTS

COLUMNS = ("region_ids", "role_ids", "attention_mask")  # of a `Structure`
TASKS = ("captions", "answers")
FEATURE_INPUTS = ("image_features", "region_features")  # instead of pixels
ONCE_A_BLOCK = 2**31  # steps between two refreshments: more than a block has


class StaticKVCache:
    """Keeps keys and values (B, heads, `length`, head_dim) of every layer at fixed addresses.

    A layer's are allocated once, at its first write and like what it writes: a layer's weights do
    not say where it runs.
    """

    def __init__(self, length: int):
        self.length = length
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, start: int):
        """Writes (B, heads, n, head_dim) from column `start` on.

        Returns keys and values of all columns up to the last one written, which may be attended.
        """
        B, heads, n, head_dim = key.shape
        if layer not in self.keys:
            self.keys[layer] = key.new_zeros(B, heads, self.length, head_dim)
            self.values[layer] = value.new_zeros(B, heads, self.length, head_dim)

        keys, values = self.keys[layer], self.values[layer]
        stop = start + n
        keys[:, :, start:stop] = key
        values[:, :, start:stop] = value
        return keys[:, :, :stop], values[:, :, :stop]

    def repeat(self, times: int):
        """Repeats each row so many times, one behind the other."""
        if times > 1:
            self.keys = {i: k.repeat_interleave(times, 0) for i, k in self.keys.items()}
            self.values = {i: v.repeat_interleave(times, 0) for i, v in self.values.items()}


class FilledKVCache:
    """Writes into a cache all of whose columns were computed before, and shows all of them."""

    def __init__(self, cache: StaticKVCache):
        self.cache = cache

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, start: int):
        """Writes as `StaticKVCache.update` does; returns keys and values of all columns."""
        self.cache.update(key, value, layer, start)
        return self.cache.keys[layer], self.cache.values[layer]


class ResponseNetwork:
    """Computes logits of the response positions of one batch, as little as its structure allows.

    Args:
        model: the model; `inputs`: the processor's tensors for it.
        refresh_interval: in the joint layout the prompt is computed every so many steps (1:
            exact, 0: once); the tree layout always keeps it, exactly.
        cfg_scale: guidance, 0 for none.
        compiled: compiles the step.
        trunks: for each row where keys and values of its trunk are kept, by the trunk's token ids
            (see `SeenGroup`); what is missing is computed and put there. None: nothing is kept.
        repeats: each row's responses run so many times together, for one prompt.
        block_cache: what `compute_block` keeps within a block; None: nothing.
    """

    def __init__(
        self,
        model,
        inputs: dict,
        refresh_interval: int | None = None,
        cfg_scale: float = 0.0,
        compiled: bool = False,
        trunks: list[dict] | None = None,
        repeats: int = 1,
        block_cache: str | None = None,
    ):
        self.model = model
        self.text = model.language_model
        self.cfg_scale = cfg_scale
        # Cut the columns in two: the prompt, and the responses with their markers.
        self.prompt_length = int(inputs["response_start"][0])
        self.response_ids = inputs["input_ids"][:, self.prompt_length :].clone()  # (B, A)

        # With guidance each row runs twice, the second time with its prompt masked.
        prompt = self._prompt_embeds(inputs)
        columns = {k: inputs[k] for k in ("position_ids", *COLUMNS)}
        if cfg_scale:
            prompt = torch.cat([prompt, self._masked_prompt(prompt)])
            columns = {k: torch.cat([v, v]) for k, v in columns.items()}

        # How often the prompt is computed: in a tree once, else as asked for.
        layout = model.config.region_layout
        is_tree = layout == "independent"
        usual = ONCE_A_BLOCK if block_cache else 1
        self.refresh_interval = (
            0 if is_tree else usual if refresh_interval is None else refresh_interval
        )
        self.block_cache = block_cache
        self.cache = None
        if self.refresh_interval != 1 or block_cache:
            self.cache = StaticKVCache(columns["position_ids"].shape[1])

        # A tree keeps keys and values alone, the joint layout the embeddings too.
        self.prompt = None
        if is_tree:
            self._prefill(prompt, columns, None if cfg_scale else trunks, inputs["input_ids"])
        else:
            self.prompt = prompt.repeat_interleave(repeats, 0)

        # From here on every row runs as often as it is repeated.
        columns = {k: v.repeat_interleave(repeats, 0) for k, v in columns.items()}
        self.response_ids = self.response_ids.repeat_interleave(repeats, 0)
        if self.cache is not None:
            self.cache.repeat(repeats)
        self.positions = columns.pop("position_ids")
        start, argument = self.prompt_length, self._arguments(columns, prompt.dtype)
        self.argument = argument
        self.parts: dict[int, tuple] = {}  # what `_part_of` found, by block
        self.response_mask = argument(slice(start, None), None)
        # Who may see whom when the whole sequence is computed.
        self.full_mask = None if is_tree else argument(slice(None), None)
        self.step = self._compiled_step() if compiled else self._step
        self.is_packable = is_packable(layout, cfg_scale, compiled, block_cache)

    def _arguments(self, columns: dict, dtype):
        """Makes a function of query columns and a number of keys to attention arguments."""
        columns = {k: columns[k] for k in COLUMNS}
        structure = Structure(self.model.config.region_layout, **columns)
        implementation = self.text.config._attn_implementation
        return partial(structure.argument, implementation, dtype)

    def _compiled_step(self):
        """Compiles the step for static shapes.

        On CUDA it is replayed as a graph, whose buffers stay in place.
        """
        if self.cache is not None and not self.cache.keys:  # allocated before anything is compiled
            self._step(self.response_ids, torch.zeros_like(self.response_ids[:, :1]), True)
        if self.response_ids.device.type != "cuda":
            return torch.compile(self._step, dynamic=False)
        if self.cache is not None:
            for buffer in (*self.cache.keys.values(), *self.cache.values.values()):
                torch._dynamo.mark_static_address(buffer)
        return torch.compile(self._step, dynamic=False, mode="reduce-overhead")

    def _prompt_embeds(self, inputs: dict) -> torch.Tensor:
        """Embeds the prompt, (B, L, D), its images and RoI tokens in their places."""
        names = (*PerceptionDLMImageProcessor.model_input_names, *FEATURE_INPUTS)
        features = {k: inputs[k] for k in names if k in inputs}
        embeds = self.model.embed_inputs(inputs["input_ids"], inputs["role_ids"], **features)
        return embeds[:, : self.prompt_length]

    def _masked_prompt(self, prompt: torch.Tensor) -> torch.Tensor:
        """Embeds a prompt of mask tokens in the shape of another."""
        mask = torch.full_like(self.response_ids[:1, :1], self.model.config.mask_token_id)
        return self.text.get_input_embeddings()(mask).to(prompt).expand_as(prompt)

    def _prefill(self, prompt, columns: dict, trunks: list[dict] | None, ids: torch.Tensor):
        """Computes keys and values of a tree's prompt: the trunk's, then the branches'.

        `prompt` is (B, L, D), `columns` are those of whole sequences and `ids` their tokens.
        """
        # The trunk is computed before the branches, as it needs no mask.
        start = self.prompt_length
        trunk = _trunk_length(columns["region_ids"][:, :start], columns["attention_mask"])
        if trunk and trunks is not None:
            self._take_trunks(prompt[:, :trunk], columns, trunks, ids[:, :trunk])
        elif trunk:
            self._compute(prompt, columns, 0, trunk, self.cache)
        if trunk < start:
            self._compute(prompt, columns, trunk, start, self.cache)

    def _compute(self, prompt, columns: dict, start: int, stop: int, cache: StaticKVCache | None):
        """Computes keys and values of the prompt's columns from `start` to `stop`."""
        argument = self._arguments(columns, prompt.dtype)
        self.text.model(
            prompt[:, start:stop],
            columns["position_ids"][:, start:stop],
            argument(slice(start, stop), stop),
            cache,
            start,
            first_query=stop - start,  # the last layer's states are not needed
        )

    def _take_trunks(self, prompt, columns: dict, trunks: list[dict], ids: torch.Tensor):
        """Puts the trunks' keys and values into the cache; computes those that are not kept yet.

        `prompt` (B, trunk, D) and `ids` (B, trunk) are the trunk's.
        """
        length = ids.shape[1]
        padding = (columns["attention_mask"][:, :length] == 0).sum(1).tolist()
        keys = [tuple(row[skip:]) for row, skip in zip(ids.tolist(), padding, strict=True)]

        # Compute each missing one once, however many rows have it.
        missing = {
            (id(kept), key): row
            for row, (kept, key) in enumerate(zip(trunks, keys, strict=True))
            if key not in kept
        }
        rows = sorted(missing.values())
        if rows:
            cache = StaticKVCache(length)
            chosen = torch.tensor(rows, device=ids.device)
            own = {k: v.index_select(0, chosen) for k, v in columns.items()}
            embeds = prompt.index_select(0, chosen.to(prompt.device))
            self._compute(embeds, own, 0, length, cache)
            for i, row in enumerate(rows):
                trunks[row][keys[row]] = [
                    tuple(
                        kept[n][i, :, padding[row] :].clone() for kept in (cache.keys, cache.values)
                    )
                    for n in sorted(cache.keys)
                ]

        # Each row's trunk ends where all prompts' trunks end.
        assert self.cache is not None  # a tree's prompt is always kept
        taken = [kept[key] for kept, key in zip(trunks, keys, strict=True)]
        for layer in range(len(taken[0])):
            pairs = [own[layer] for own in taken]
            if all(own is taken[0] for own in taken):  # one image's, for all rows
                key, value = (
                    _padded(kept, length).expand(len(taken), -1, -1, -1) for kept in pairs[0]
                )
            else:
                key, value = (
                    torch.stack([_padded(pair[side], length) for pair in pairs]) for side in (0, 1)
                )
            self.cache.update(key, value, layer, 0)

    def __call__(self, response_ids: torch.Tensor, step: int, columns: torch.Tensor):
        """Computes logits (B, N, V) at some columns, int64 (B, N), of responses (B, A)."""
        return self.step(response_ids, columns, self._recomputes(step))

    def compute_block(
        self, response_ids: torch.Tensor, block: int, step: int, columns: torch.Tensor
    ):
        """Computes logits (B, N, V) at a block's columns, int64 (B, N), of responses (B, A).

        `step` is one of the block's own: the first computes all that the others keep. The prompt
        is due by the same steps.
        """
        interval = self.refresh_interval
        is_due = step % interval == 0 if interval else block == step == 0
        recompute = self.prompt is not None and is_due
        if step == 0 or recompute or self.block_cache is None:
            return self.step(response_ids, columns, recompute)
        return self._step(response_ids, columns, False, self._part_of(block, columns))

    def _part_of(self, block: int, columns: torch.Tensor) -> tuple:
        """Returns the columns of the responses that are computed for a block, and their mask.

        They are one slice for the whole batch, from the first of any row's to the last.
        """
        if block not in self.parts:
            first, stop = int(columns.min()), int(columns.max()) + 1
            if self.block_cache == "prefix":
                stop = self.response_ids.shape[1]
            start = self.prompt_length
            mask = self.argument(slice(start + first, start + stop), None)
            self.parts = {block: (slice(first, stop), mask)}
        return self.parts[block]

    @property
    def depends_on_step(self) -> bool:
        """Tells whether logits depend on when the prompt was last computed."""
        return self.prompt is not None and self.refresh_interval != 1

    def _recomputes(self, step: int) -> bool:
        if self.prompt is None:
            return False
        interval = self.refresh_interval
        return step == 0 or (interval > 0 and step % interval == 0)

    def _step(self, response_ids, columns, recompute: bool, part=None) -> torch.Tensor:
        """Runs one forward pass, of a `part` alone if given; see `__call__`, `_part_of`."""
        if part is not None:
            response_ids, columns = response_ids[:, part[0]], columns - part[0].start
        response = self.text.get_input_embeddings()(response_ids)
        if self.cfg_scale:
            response, columns = torch.cat([response, response]), torch.cat([columns, columns])

        if part is not None:
            hidden = self._part_only(response, *part)
        else:
            hidden = self._whole(response) if recompute else self._response_only(response)
        # Only the positions that are asked for reach the head.
        index = columns[..., None].expand(-1, -1, hidden.shape[-1]).to(hidden.device)
        logits = self.text.lm_head(hidden.gather(1, index)).to(response_ids.device)  # (B, N, V)

        if self.cfg_scale:
            conditional, unconditional = logits.chunk(2)
            return unconditional + (self.cfg_scale + 1) * (conditional - unconditional)
        return logits

    def _whole(self, response: torch.Tensor) -> torch.Tensor:
        """Computes the response's states (B, A, D), and the prompt's on the way."""
        assert self.prompt is not None  # a tree never computes it again
        sequence = torch.cat([self.prompt, response.to(self.prompt.device)], dim=1)
        return self.text.model(
            sequence,
            self.positions,
            self.full_mask,
            self.cache,
            first_query=self.prompt_length,
            last_attention_mask=self.response_mask,
        )

    def _response_only(self, response: torch.Tensor) -> torch.Tensor:
        """Computes the response's states (B, A, D) from the prompt's keys and values."""
        start = self.prompt_length
        positions = self.positions[:, start:]
        return self.text.model(response, positions, self.response_mask, self.cache, start)

    def _part_only(self, response: torch.Tensor, part: slice, mask) -> torch.Tensor:
        """Computes states (B, N, D) of a part from the keys and values of all else."""
        assert self.cache is not None  # a block cache has one
        start = self.prompt_length + part.start
        positions = self.positions[:, start : self.prompt_length + part.stop]
        return self.text.model(response, positions, mask, FilledKVCache(self.cache), start)


class ForwardPass(NamedTuple):
    """Asks for one run of the network.

    Attributes:
        network: of the batch.
        response_ids: its responses, int64 (B, A).
        columns: those of the responses whose logits are wanted, int64 (B, G, n).
        step: the step's number; with a block, its number in the block.
        block: the block that is decoded; None where all positions are.
    """

    network: ResponseNetwork
    response_ids: torch.Tensor
    columns: torch.Tensor
    step: int
    block: int | None = None

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        """Computes the logits, (B, G, n, V), without gradients."""
        columns = self.columns.flatten(1)
        if self.block is None:
            logits = self.network(self.response_ids, self.step, columns)
        else:
            logits = self.network.compute_block(self.response_ids, self.block, self.step, columns)
        return logits.view(*self.columns.shape, -1)


def is_packable(
    region_layout: str, cfg_scale: float = 0.0, compiled: bool = False, block_cache=None
) -> bool:
    """Tells whether forward passes compute the responses alone, so that others' may run along.

    That is so in the tree layout, whose prompts are computed once.
    """
    return region_layout == "independent" and not (cfg_scale or compiled or block_cache)


def _trunk_length(region_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
    """Counts the columns of a prompt (B, L) in which all rows' trunks stand.

    Padding, which has no region, may stand before a trunk and behind it. Returns 0 where one row's
    trunk goes on beside another's branches.
    """
    lengths = (region_ids < 0).long().cumprod(1).sum(1)  # of the trunk and padding around it
    shortest = int(lengths.min())
    held = (region_ids[:, shortest:] < 0) & attention_mask[:, shortest : region_ids.shape[1]].bool()
    return 0 if bool(held.any()) else shortest


def _padded(values: torch.Tensor, length: int) -> torch.Tensor:
    """Pads (heads, n, head_dim) in front to (heads, length, head_dim)."""
    if values.shape[1] == length:
        return values
    return F.pad(values, (0, 0, length - values.shape[1], 0))


def response_slots(inputs: dict, mask_token_id: int) -> tuple[torch.Tensor, State]:
    """Locates the masked positions of each region and builds the initial state.

    Returns columns, int64 (B, G, n), counted from the start of the responses, and the state. Rows
    with fewer regions have groups that are not valid. Raises ValueError where the inputs do not fit
    together.
    """
    ids, columns = inputs["input_ids"], inputs["response_columns"]
    B, L = ids.shape
    starts = inputs["response_start"]
    start = int(starts[0])
    if not 0 <= start < L or not bool((starts == start).all()):
        raise ValueError(
            f"expected one response_start from 0 to {L - 1} in every row, got {starts.tolist()}"
        )
    if columns.ndim != 3 or len(columns) != B or not columns.numel():
        raise ValueError(
            f"expected response_columns (B, G, n) for {B} rows, got {tuple(columns.shape)}"
        )
    present = columns >= 0
    if not bool(((columns >= start) & (columns < L) | ~present).all()):
        raise ValueError(
            f"expected response_columns from {start} to {L - 1}, got {int(columns.min())} to"
            f" {int(columns.max())}"
        )

    # What is denoised is masked: tokens that are given stay, and a target of training is none.
    held = ids.gather(1, columns.clamp(min=0).flatten(1)).view_as(columns)
    is_open = (held == mask_token_id) & present
    sizes = is_open.sum(-1)  # (B, G)
    n = int(sizes.max())
    if not bool(is_open.flatten(1).any(1).all()):
        raise ValueError("expected masked response positions in every row of input_ids, got none")

    # The masked columns of each group, in order: a stable sort puts them first.
    order = (~is_open).long().sort(dim=-1, stable=True).indices[..., :n]
    valid = torch.arange(n, device=ids.device) < sizes[..., None]
    tokens = torch.full_like(order, mask_token_id)
    return (columns.gather(-1, order) - start) * valid, State(tokens, valid.clone(), valid)


def scatter_valid(template, columns, tokens, valid) -> torch.Tensor:
    """Puts tokens (B, N) into a template (B, A) at columns (B, N), where valid."""
    spare = torch.cat([template, template[:, :1]], dim=1)  # invalid ones land in a spare column
    target = torch.where(valid, columns, template.shape[1])
    return spare.scatter(1, target, tokens)[:, :-1]


def responses_of(inputs: dict, filled: torch.Tensor) -> list[list[list]]:
    """Lists what stands in each row's responses, given tokens included.

    `filled` is (B, A), a value for each column from the start of the responses on.
    """
    columns = inputs["response_columns"]
    held = filled.gather(
        1, (columns - inputs["response_start"][:, None, None]).clamp(min=0).flatten(1)
    )
    values, present = held.view_as(columns).tolist(), (columns >= 0).tolist()
    rows = []
    for row, kept in zip(values, present, strict=True):
        groups = [
            [value for value, keep in zip(group, own, strict=True) if keep]
            for group, own in zip(row, kept, strict=True)
        ]
        rows.append([group for group in groups if group])
    return rows


# Prepared inputs: what a caller may hand over instead of images, masks and prompts.

MAX_GRID, MAX_SIDE = 64, 2**20  # tiles along a side, and pixels: beyond any image

# What the processor makes: type and axes of each tensor. A letter is one size wherever it stands: B
# rows, L positions, G groups of n response positions, T tiles, N images, K regions of the batch, M
# regions of a row at most, S pixels and P patches along a tile's side, R region prompts.
SEQUENCE_INPUTS = {
    "input_ids": ("integer", "B L"),
    "attention_mask": ("integer", "B L"),
    "position_ids": ("integer", "B L"),
    "region_ids": ("integer", "B L"),
    "role_ids": ("integer", "B L"),
    "response_columns": ("integer", "B G n"),
    "response_start": ("integer", "B"),
}
IMAGE_INPUTS = {
    "pixel_values": ("float", "T 3 S S"),
    "image_grids": ("integer", "N 2"),
    "image_sizes": ("integer", "N 2"),
}
REGION_INPUTS = {
    "region_patches": ("bool", "T R P P"),
    "boxes": ("float", "K 4"),
    "box_images": ("integer", "K"),
    "region_orders": ("integer", "B M"),
}


def check_inputs(inputs, config: PerceptionDLMConfig):
    """Refuses prepared inputs that no model of `config` could read.

    Raises ValueError for a tensor that is missing, of another type or shape than the processor
    makes, or holds values that are out of range.
    """
    if not isinstance(inputs, Mapping):
        raise ValueError(f"expected `inputs` as the processor's, got {type(inputs).__name__}")

    missing = [name for name in RESPONSE_INPUTS if inputs.get(name) is None]
    if missing:
        raise ValueError(
            "expected inputs with a response to denoise, as the processor makes them,"
            f" got none of {', '.join(missing)}"
        )
    if not isinstance(inputs["task"], str) or inputs["task"] not in TASKS:
        raise ValueError(f"expected a task among {', '.join(TASKS)}, got {inputs['task']!r}")

    # Images and regions are there with all their tensors or not at all.
    needed = dict(SEQUENCE_INPUTS)
    if any(name in inputs for name in IMAGE_INPUTS):
        needed |= IMAGE_INPUTS
    if any(name in inputs for name in REGION_INPUTS):
        needed |= IMAGE_INPUTS | REGION_INPUTS
        if "region_orders" not in inputs:  # the processor can leave it out
            needed.pop("region_orders")
        if not config.num_region_prompts:
            raise ValueError("expected a checkpoint with region prompts for masks, got one without")

    sizes = {
        "S": config.vision_config.image_size,
        "P": config.grid_side,
        "R": config.num_region_prompts,
    }
    for name, (kind, axes) in needed.items():
        _expect_tensor(name, inputs.get(name), kind, axes.split(), sizes)
    _expect_values(inputs, config)


def _expect_tensor(name: str, tensor, kind: str, axes: list[str], sizes: dict[str, int]):
    """Checks type and shape; notes in `sizes` what a letter is the first time that it stands."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"expected {name} as a tensor in `inputs`, got {type(tensor).__name__}")
    is_float, is_bool = tensor.is_floating_point(), tensor.dtype == torch.bool
    got = "float" if is_float else "bool" if is_bool else "integer"
    if got != kind or tensor.is_complex():
        raise ValueError(f"expected {name} of {kind} type, got {tensor.dtype}")

    fits = tensor.ndim == len(axes) and all(
        size == (int(axis) if axis.isdigit() else sizes.setdefault(axis, size))
        for axis, size in zip(axes, tensor.shape, strict=True)
    )
    if not fits:
        known = {axis: sizes[axis] for axis in axes if axis in sizes}
        raise ValueError(
            f"expected {name} of shape ({', '.join(axes)}) with {known}, got {tuple(tensor.shape)}"
        )


def _expect_values(inputs, config: PerceptionDLMConfig):
    """Checks that ids and numbers lie in their ranges, both ends included."""
    length = inputs["input_ids"].shape[-1]
    ranges = {
        "input_ids": (0, config.text_config.vocab_size - 1),
        "attention_mask": (0, 1),
        "position_ids": (0, config.text_config.max_position_embeddings - 1),
        "region_ids": (NO_REGION, length),
        "role_ids": (ROLE_SHARED, ROLE_CAPTION),
        "image_grids": (0 if config.image_layout == "anyres" else 1, MAX_GRID),  # (0, 0): no canvas
        "image_sizes": (1, MAX_SIDE),
        "boxes": (0, 1),
        "box_images": (0, len(inputs.get("image_grids", ())) - 1),
        "region_orders": (-1, length),
        "pixel_values": (-MAX_SIDE, MAX_SIDE),
    }

    for name, (low, high) in ranges.items():
        tensor = inputs.get(name)
        if tensor is None or not tensor.numel():
            continue
        minimum, maximum = tensor.min().item(), tensor.max().item()
        if not (low <= minimum and maximum <= high):  # NaN fails this too
            raise ValueError(f"expected {name} in [{low}, {high}], got [{minimum}, {maximum}]")
