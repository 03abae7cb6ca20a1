"""The language model: LLaDA's bidirectional decoder, its head, and what transformers needs to know.

Axis letters: B batch, L sequence, D text width.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)
from transformers.quantizers.auto import AutoQuantizationConfig

from .configuration_perceptiondlm import PerceptionDLMConfig, PerceptionDLMTextConfig
from .modeling_attention import PackedCaches

UNSAVEABLE = "Int4OpaqueTensor"  # torchao's, which safetensors does not hold
PLAIN = (torch.Tensor, nn.Parameter)  # no quantized or distributed weights
# Quantization leaves these as they are, so that of everything only the decoder's layers change.
NOT_QUANTIZED = [
    "vision_tower",
    "connector",
    "region_prompts",
    "language_model.lm_head",
    "language_model.model.embed_tokens",
]
MIN_ROWS, MIN_WEIGHTS = 16, 2**16  # smaller products gain nothing


class PerceptionDLMPreTrainedModel(PreTrainedModel):
    """Tells transformers how to load, shard and dispatch these models."""

    config: PerceptionDLMConfig
    base_model_prefix = "perceptiondlm"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "PerceptionDLMDecoderLayer",
        "SiglipEncoderLayer",
        "SiglipVisionEmbeddings",
    ]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @property
    def device(self) -> torch.device:
        """Returns the device that takes the inputs.

        A dispatched model's is where it runs: its weights may lie elsewhere, and those on a disk
        are on "meta".
        """
        # accelerate's hooks know where a module runs.
        hooks = [m.__dict__["_hf_hook"] for m in self.modules() if "_hf_hook" in m.__dict__]
        for hook in hooks:
            for part in getattr(hook, "hooks", [hook]):
                place = getattr(part, "execution_device", None)
                if place is not None:
                    return torch.device(place)
        return super().device

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves as in transformers; raises ValueError for weights that no file can hold."""
        for name, parameter in self.named_parameters():
            if type(parameter).__name__ == UNSAVEABLE:
                raise ValueError(
                    "expected weights that can be saved, got int4 weights packed for this CPU"
                    f" ({name}): save the original, and quantize while loading it"
                )
        return super().save_pretrained(save_directory, *args, **kwargs)


def placeable(device_map: dict, tied: bool) -> dict:
    """Changes a device map to one that accelerate can follow.

    It cannot put a parameter of the top module on a disk, nor one of two tied weights alone: so
    the newline, one vector, stays in memory, and a tied head goes where the embeddings go.
    """
    placed = dict(device_map)
    if placed.get("image_newline") == "disk":
        placed["image_newline"] = "cpu"

    # The entry that decides where the embeddings go is the longest that is above them.
    head, embeddings = "language_model.lm_head", "language_model.model.embed_tokens"
    above = [k for k in placed if not k or f"{embeddings}.".startswith(f"{k}.")]
    if tied and head in placed and above:
        place = placed[max(above, key=len)]
        if "disk" in (place, placed[head]):
            placed[head] = place
    return placed


def for_decoder_layers(quantization_config):
    """Returns a copy of a quantization config, or of its fields, that spares `NOT_QUANTIZED`.

    Raises ValueError for a method that cannot spare modules.
    """
    if isinstance(quantization_config, dict):
        config = AutoQuantizationConfig.from_dict(copy.deepcopy(quantization_config))
    else:
        config = copy.deepcopy(quantization_config)

    # Methods call the same list by different names.
    names = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules")
    name = next((name for name in names if hasattr(config, name)), None)
    if name is None:
        raise ValueError(
            f"expected a quantization_config with one of {', '.join(names)}, by which all but the"
            f" decoder's layers are spared, got {type(config).__name__}"
        )
    setattr(config, name, list(dict.fromkeys([*(getattr(config, name) or ()), *NOT_QUANTIZED])))
    return config


def quantizable(device_map):
    """Returns a device map that quantized weights can follow, or raises ValueError.

    None of them can lie on a disk. A map that puts everything on one device says so in one entry:
    transformers takes another with "cpu" in it for offloading and wants a GPU to quantize on.
    """
    if not isinstance(device_map, dict):
        return device_map
    places = list(dict.fromkeys(device_map.values()))
    if "disk" in places:
        raise ValueError("expected no 'disk' in device_map with quantized weights, got it")
    return {"": places[0]} if len(places) == 1 else device_map


def keep_unpacked(model: nn.Module):
    """Keeps 4-bit layers of bitsandbytes as they were loaded.

    On CPUs with AVX512-BF16 it packs weights at their first use and unpacks them wrongly when the
    model is saved (0.50.2): both the files and the model in memory are of no use afterwards.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns heads (B, heads, L, head_dim) by their positions' angles, cos and sin of (B, L, .)."""
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


class PerceptionDLMAttention(nn.Module):
    """Attends in both directions, with rotary positions and optionally grouped keys and values."""

    def __init__(self, config: PerceptionDLMTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        query_width = config.num_attention_heads * self.head_dim
        key_width = config.num_key_value_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=bias)

    def forward(
        self, hidden, rotary, attention_mask, cache=None, start: int = 0, first_query: int = 0
    ) -> torch.Tensor:
        """Attends from the positions from `first_query` on to all of `hidden` and the cache.

        Args:
            hidden: (B, L, D); rotary: cos and sin, (B, L, head_dim).
            attention_mask: as the attention implementation takes it, see `Structure.argument`.
            cache: a `StaticKVCache`, into which keys and values are written from column `start`; or
                `PackedCaches` of several batches whose positions are one sequence.

        Returns (B, L - first_query, D).
        """
        # Keys and values of all positions, kept where there is a cache.
        cos, sin = rotary
        key, value = self._heads(self.k_proj(hidden)), self._heads(self.v_proj(hidden))
        key = _rotated(key, cos, sin)
        is_packed = isinstance(cache, PackedCaches)
        if cache is not None and not is_packed:
            key, value = cache.update(key, value, self.layer_idx, start)

        # Queries of those positions alone whose states are wanted.
        asking = hidden[:, first_query:]
        if not asking.shape[1]:  # only keys and values were wanted
            return asking
        query = self._heads(self.q_proj(asking))
        query = _rotated(query, cos[:, first_query:], sin[:, first_query:])

        if is_packed:
            output = cache.attend(self._attend, query, key, value, self.layer_idx)
        else:
            output = self._attend(query, key, value, attention_mask)
        return self.o_proj(output.flatten(2))

    def _attend(self, query, key, value, attention_mask) -> torch.Tensor:
        """Gives (B, L, heads, head_dim) by whichever implementation the model was loaded with."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=False,
        )
        return output

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """Splits (B, L, heads * head_dim) into heads."""
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, L, head_dim)


class PerceptionDLMDecoderLayer(GradientCheckpointingLayer):
    """Runs pre-norm attention and a gated MLP."""

    def __init__(self, config: PerceptionDLMTextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = PerceptionDLMAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden, rotary, attention_mask, cache=None, start: int = 0, first_query: int = 0
    ) -> torch.Tensor:
        """Runs the layer for the positions from `first_query` on; see `PerceptionDLMAttention`."""
        normed = self.input_layernorm(hidden)
        attended = self.self_attn(normed, rotary, attention_mask, cache, start, first_query)
        hidden = hidden[:, first_query:] + attended
        if not hidden.shape[1]:  # no module is called with nothing
            return hidden
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class PerceptionDLMTextModel(PerceptionDLMPreTrainedModel):
    """Runs LLaDA's bidirectional decoder stack."""

    config: PerceptionDLMTextConfig

    def __init__(self, config: PerceptionDLMTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            PerceptionDLMDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask=None,
        cache=None,
        start: int = 0,
        first_query: int = 0,
        last_attention_mask=None,
        hidden_states: list | None = None,
    ) -> torch.Tensor:
        """Returns normalized states (B, L - first_query, D) of the positions from `first_query` on.

        Args:
            inputs_embeds: (B, L, D); position_ids: int (B, L), any order.
            attention_mask: as `Structure.argument` makes it, for L queries.
            cache: a `StaticKVCache`, into which keys and values are written from column `start`;
                what stands there before it is attended to. Or `PackedCaches` of several batches.
            first_query: the last layer computes queries from here only, with
                `last_attention_mask` for them; L for none, where only the cache is to be filled.
            hidden_states: a list to which the embeddings and each layer's output are appended.
        """
        # Angles are computed once and shared by all layers.
        hidden = inputs_embeds
        rotary = self.rotary_emb(hidden, position_ids.to(hidden.device))

        # The last layer may skip the prompt: nobody reads its states.
        for i, layer in enumerate(self.layers):
            if hidden_states is not None:
                hidden_states.append(hidden)
            if first_query and i + 1 == len(self.layers):
                hidden = layer(hidden, rotary, last_attention_mask, cache, start, first_query)
            else:
                hidden = layer(hidden, rotary, attention_mask, cache, start)

        if not hidden.shape[1]:
            return hidden
        hidden = self.norm(hidden)
        if hidden_states is not None:
            hidden_states.append(hidden)
        return hidden


class PerceptionDLMLanguageModel(PerceptionDLMPreTrainedModel):
    """Holds the decoder and its head."""

    config: PerceptionDLMTextConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = LlamaForCausalLM._tp_plan  # a tied head is split as the embeddings are

    def __init__(self, config: PerceptionDLMTextConfig):
        super().__init__(config)
        self.model = PerceptionDLMTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value


class OneDNNLinear(nn.Linear):
    """Computes plain float32 products on CPUs, without gradient, through oneDNN.

    PyTorch gives them to MKL, which reached less than half of oneDNN's rate on the AMD processor
    of the README's benchmark. The sums are taken in another order than MKL's: results differ by
    float32 rounding. Whatever else comes is computed as `nn.Linear` does.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (..., out_features) of x (..., in_features)."""
        if not _suits_onednn(x, self.weight, self.bias):
            return super().forward(x)
        return onednn_linear(x, self.weight, self.bias)


def fastest_linear(model: nn.Module):
    """Lets the plain linear layers of a model compute in the fastest known way on its device.

    On a CPU they become `OneDNNLinear`, in place, where PyTorch has oneDNN: their weights, names
    and hooks stay, and so do all other layers, quantized ones among them.
    """
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not known:
        return
    for module in model.modules():
        is_plain = type(module) is nn.Linear and type(module.weight) in PLAIN
        if is_plain and module.weight.device.type == "cpu":
            module.__class__ = OneDNNLinear


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Computes `F.linear` in oneDNN.

    oneDNN compiles and keeps a kernel for every shape it meets: so the number of rows is padded to
    one of few, or memory would grow with every new length.
    """
    # Pad the rows to a size that was seen before, compute, and drop the padding.
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    missing = padded_rows(len(rows)) - len(rows)
    padded = F.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()
    out = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    return out[: len(rows)].view(*x.shape[:-1], -1)


def padded_rows(rows: int) -> int:
    """Rounds up to one of eight sizes per power of two, in multiples of 16."""
    unit = max(16, 1 << (rows.bit_length() - 4))
    return -(-rows // unit) * unit


def _suits_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Tells whether oneDNN may compute a product, and is the faster way."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and all(type(t) in PLAIN and t.dtype == torch.float32 for t in given)
        and all(t.device.type == "cpu" for t in given)
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and weight.numel() >= MIN_WEIGHTS
        and not torch.is_autocast_enabled("cpu")
    )
