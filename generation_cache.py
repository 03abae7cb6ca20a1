"""What is computed once and what at each denoising step.

The prompt of a pass stands before its answer, in the same columns for a whole batch. Where the
answer cannot influence the prompt (the independent layout), the prompt's keys and values are
computed once and the cache is exact; elsewhere every step computes the whole sequence, unless a
`prompt_cache` is asked for.
"""

import torch

from .configuration_perceptiondlm import ROLE_CAPTION
from .generation_loop import State
from .image_processing_perceptiondlm import PerceptionDLMImageProcessor
from .modeling_attention import BranchAttention, allowed_attention, attention_argument


class KeyValueBuffer:
    """Keys and values (B, heads, `length`, head_dim) of every layer, written in place from a given
    column on. A layer's are allocated once, at its first write and like what it writes: a layer's
    weights do not say where it runs. From then on their addresses are fixed."""

    def __init__(self, length: int):
        self.length = length
        self.start = 0
        self.stop = length
        self.keys, self.values = {}, {}

    def window(self, start: int, stop: int) -> "KeyValueBuffer":
        """Next writes go to columns from `start`; columns before `stop` are attended to."""
        self.start, self.stop = start, stop
        return self

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int):
        """Writes (B, heads, n, head_dim); returns what may be attended to."""
        if layer not in self.keys:
            B, heads, _, head_dim = key.shape
            self.keys[layer] = key.new_zeros(B, heads, self.length, head_dim)
            self.values[layer] = value.new_zeros(B, heads, self.length, head_dim)
        keys, values = self.keys[layer], self.values[layer]
        end = self.start + key.shape[2]
        keys[:, :, self.start : end] = key
        values[:, :, self.start : end] = value
        return keys[:, :, : self.stop], values[:, :, : self.stop]


class AnswerNetwork:
    """Logits of the answer positions of one batch, computing as little as its structure allows.

    Args:
        model: the model; `inputs`: the processor's tensors for it.
        prompt_cache: see `DiffusionOptions`; `cfg_scale`: guidance, 0 for none.
    """

    def __init__(self, model, inputs: dict, prompt_cache: int | None, cfg_scale: float, compiled):
        self.model = model
        self.text = model.language_model
        self.cfg_scale = cfg_scale
        self.prompt_length = prompt_length(inputs)
        self.answer_ids = inputs["input_ids"][:, self.prompt_length :].clone()  # (B, A)
        prompt = self._prompt_embeds(inputs)
        columns = {
            k: inputs[k] for k in ("position_ids", "region_ids", "role_ids", "attention_mask")
        }
        if cfg_scale:
            prompt = torch.cat([prompt, self._masked_prompt(prompt)])
            columns = {k: torch.cat([v, v]) for k, v in columns.items()}
        self.positions = columns["position_ids"]
        exact_cache = model.config.region_layout == "independent"
        self.refresh_interval = 0 if exact_cache else 1 if prompt_cache is None else prompt_cache
        self._build_masks(columns, prompt.dtype, exact_cache)
        self.cache = None
        if self.refresh_interval != 1:
            self.cache = KeyValueBuffer(self.positions.shape[1])
        if exact_cache:
            self.prompt = None
            self._prefill(prompt)
        else:
            self.prompt = prompt
        self.step = self._compiled_step() if compiled else self._step

    def _compiled_step(self):
        """The step for static shapes; on CUDA replayed as a graph, whose buffers stay in place."""
        if self.cache is not None and not self.cache.keys:  # allocated before anything is compiled
            self._step(self.answer_ids, torch.zeros_like(self.answer_ids[:, :1]), True)
        if self.answer_ids.device.type != "cuda":
            return torch.compile(self._step, dynamic=False)
        if self.cache is not None:
            for buffer in (*self.cache.keys.values(), *self.cache.values.values()):
                torch._dynamo.mark_static_address(buffer)
        return torch.compile(self._step, dynamic=False, mode="reduce-overhead")

    def _prompt_embeds(self, inputs: dict) -> torch.Tensor:
        names = PerceptionDLMImageProcessor.model_input_names
        features = {k: inputs[k] for k in names if k in inputs}
        embeds = self.model.embed_inputs(inputs["input_ids"], inputs["role_ids"], **features)
        return embeds[:, : self.prompt_length]

    def _masked_prompt(self, prompt: torch.Tensor) -> torch.Tensor:
        mask = torch.full_like(self.answer_ids[:1, :1], self.model.config.mask_token_id)
        return self.text.get_input_embeddings()(mask).to(prompt).expand_as(prompt)

    def _build_masks(self, columns: dict, dtype, exact_cache: bool):
        """Attention arguments of the prompt alone, of the answer, and of the whole sequence."""
        config, start = self.model.config, self.prompt_length
        implementation = self.text.config._attn_implementation
        structure = (columns["region_ids"], columns["role_ids"], columns["attention_mask"])

        def argument(queries: slice, keys: int | None):
            if exact_cache and "flash" in implementation:
                region_ids, _, attention_mask = structure
                return BranchAttention(region_ids, attention_mask, queries, keys)
            allowed = allowed_attention(config.region_layout, *structure, queries)
            return attention_argument(allowed[:, :, :keys], implementation, dtype)

        self.answer_mask = argument(slice(start, None), None)
        self.full_mask = None if exact_cache else argument(slice(None), None)
        self.prefills = []
        if exact_cache:
            trunk = _trunk_length(columns["region_ids"][:, :start])
            ends = sorted({trunk, start} - {0})
            parts = zip([0, *ends], ends, strict=False)
            self.prefills = [(a, b, argument(slice(a, b), b)) for a, b in parts]

    def _prefill(self, prompt: torch.Tensor):
        """Keys and values of the prompt: the trunk's, which needs no mask, then the branches'."""
        for start, stop, mask in self.prefills:
            cache = self.cache.window(start, stop)
            positions = self.positions[:, start:stop]
            queries = stop - start  # the last layer's are not needed
            self.text.model(prompt[:, start:stop], positions, mask, cache, first_query=queries)

    def __call__(self, answer_ids: torch.Tensor, step: int, columns: torch.Tensor) -> torch.Tensor:
        """Logits (B, N, V) at `columns` int64 (B, N) of the answer, given its ids (B, A)."""
        return self.step(answer_ids, columns, self._recomputes(step))

    @property
    def depends_on_step(self) -> bool:
        """Whether logits depend on when the prompt was last computed, not on the answer alone."""
        return self.prompt is not None and self.refresh_interval != 1

    def _recomputes(self, step: int) -> bool:
        if self.prompt is None:
            return False
        interval = self.refresh_interval
        return step == 0 or (interval > 0 and step % interval == 0)

    def _step(self, answer_ids, columns, recompute: bool) -> torch.Tensor:
        answer = self.text.get_input_embeddings()(answer_ids)
        if self.cfg_scale:
            answer, columns = torch.cat([answer, answer]), torch.cat([columns, columns])
        hidden = self._whole(answer) if recompute else self._answer_only(answer)
        index = columns[..., None].expand(-1, -1, hidden.shape[-1]).to(hidden.device)
        logits = self.text.lm_head(hidden.gather(1, index)).to(answer_ids.device)  # (B, N, V)
        if self.cfg_scale:
            conditional, unconditional = logits.chunk(2)
            return unconditional + (self.cfg_scale + 1) * (conditional - unconditional)
        return logits

    def _whole(self, answer: torch.Tensor) -> torch.Tensor:
        sequence = torch.cat([self.prompt, answer.to(self.prompt.device)], dim=1)
        cache = self.cache and self.cache.window(0, sequence.shape[1])
        return self.text.model(
            sequence,
            self.positions,
            self.full_mask,
            cache,
            first_query=self.prompt_length,
            last_attention_mask=self.answer_mask,
        )

    def _answer_only(self, answer: torch.Tensor) -> torch.Tensor:
        start = self.prompt_length
        cache = self.cache.window(start, start + answer.shape[1])
        return self.text.model(answer, self.positions[:, start:], self.answer_mask, cache)


def _trunk_length(region_ids: torch.Tensor) -> int:
    """Columns of a prompt (B, L) before the first branch; 0 where rows differ in it."""
    lengths = (region_ids < 0).long().cumprod(1).sum(1)  # padding too has no region
    return int(lengths[0]) if bool((lengths == lengths[0]).all()) else 0


def prompt_length(inputs: dict) -> int:
    """Columns before the answers: those that hold no caption in any row."""
    return int((inputs["role_ids"] != ROLE_CAPTION).all(0).sum())


def answer_slots(
    inputs: dict, prompt_length: int, mask_token_id: int
) -> tuple[torch.Tensor, State]:
    """Where the answers stand: columns of the answer, int64 (B, G, n), and the first state.

    Every region of a batch has equally many masked positions; rows with fewer regions are padded
    with groups that are not valid.
    """
    ids = inputs["input_ids"][:, prompt_length:]
    regions = inputs["region_ids"][:, prompt_length:]
    open_ = (ids == mask_token_id) & inputs["attention_mask"][:, prompt_length:].bool()
    if not bool(open_.any(1).all()):
        raise ValueError("expected masked answer positions in every row of input_ids, got none")
    groups = int(regions[open_].max()) + 1
    if int(regions[open_].min()) < 0 or groups > ids.shape[1]:
        raise ValueError(
            "expected region_ids of masked positions to count regions from 0,"
            f" got {sorted(set(regions[open_].tolist()))[:8]}"
        )
    members = open_[:, None] & (
        regions[:, None] == torch.arange(groups, device=ids.device)[:, None]
    )
    sizes = members.sum(-1)  # (B, G)
    n = int(sizes.max())
    if not bool(((sizes == n) | (sizes == 0)).all()):
        raise ValueError(f"expected equally many masked positions a region, got {sizes.tolist()}")
    # positions of the members of each group, in order: a stable sort puts them first
    columns = (~members).long().sort(dim=-1, stable=True).indices[..., :n]
    valid = (sizes == n)[..., None].expand(-1, -1, n).contiguous()
    tokens = torch.full(columns.shape, mask_token_id, device=ids.device)
    return columns * valid, State(tokens, valid.clone(), valid)


def scatter_valid(template, columns, tokens, valid) -> torch.Tensor:
    """`template` (B, A) with tokens (B, N) at columns (B, N) where valid."""
    spare = torch.cat([template, template[:, :1]], dim=1)  # invalid ones land in a spare column
    target = torch.where(valid, columns, template.shape[1])
    return spare.scatter(1, target, tokens)[:, :-1]


def rows_of(state: State) -> list[list[list[int]]]:
    """Token ids of each row's valid groups."""
    tokens, valid = state.tokens.tolist(), state.valid[..., 0].tolist()
    return [
        [ids for ids, keep in zip(row, kept, strict=True) if keep]
        for row, kept in zip(tokens, valid, strict=True)
    ]
