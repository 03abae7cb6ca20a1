"""Translates what every source calls things: tensors, config fields and tokenizer settings."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import AddedToken

from ..common.loading import CheckpointError, UnrecognizedCheckpoint
from ..common.special_tokens import NAMED_TOKENS
from ..configuration_perceptiondlm import PerceptionDLMConfig
from .files import MissingTensor, Tensors, UnknownTensor, read_json

# Tensors


@dataclass(frozen=True)
class Origin:
    """Where one of the model's tensors comes from; `rows` beyond its own are drawn afresh."""

    tensors: Tensors
    name: str
    rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        own = self.tensors.shape(self.name)
        return own if self.rows is None else (self.rows, *own[1:])

    def load(self) -> torch.Tensor:
        tensor = self.tensors.load(self.name)
        if self.rows is None or self.rows == len(tensor):
            return tensor
        extra = fresh_tensor((self.rows - len(tensor), *tensor.shape[1:]))
        return torch.cat([tensor, extra.to(tensor.dtype)])


def fresh_tensor(shape: tuple[int, ...], std: float = 0.02, seed: int = 0) -> torch.Tensor:
    """Draws normal values, the same at every conversion."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


@dataclass(frozen=True)
class Rule:
    """Names that fully match `pattern` become `target`, or are dropped where it is None.

    Optional rules may match nothing: what is dropped need not be there.
    """

    pattern: str
    target: str | None
    optional: bool = False


def map_names(tensors: Tensors, rules: Sequence[Rule]) -> dict[str, Origin]:
    """Finds the origin of each target name; of several rules that match, the first counts.

    Raises UnknownTensor for a name that no rule matches or two that become one, MissingTensor for
    a rule that matches none, unless it is optional.
    """
    origins, used = {}, set()
    for name in tensors.shapes:
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
        if rule is None:
            raise UnknownTensor(f"expected only known names in {tensors.place}, got {name!r}")

        used.add(rule)
        if rule.target is None:
            continue
        target = re.fullmatch(rule.pattern, name).expand(rule.target)
        if target in origins:
            pair = f"{origins[target].name!r} and {name!r}"
            raise UnknownTensor(f"expected one tensor for {target}, got {pair}")
        origins[target] = Origin(tensors, name)

    for rule in rules:
        if rule not in used and not rule.optional:
            raise MissingTensor(f"expected names like {rule.pattern} in {tensors.place}, got none")
    return origins


# fmt: off
def siglip_rules(prefix: str, used: int, total: int) -> tuple[Rule, ...]:
    """Lists the rules of SigLIP below `prefix`, or its vision part: the first `used` layers."""
    vision = prefix + r"(?:vision_model\.)?"
    unused = "|".join(map(str, range(used, total))) or "none"
    return (
        Rule(vision + r"embeddings\.position_ids",                  None, optional=True),
        Rule(vision + rf"encoder\.layers\.(?:{unused})\..+",        None, optional=True),
        Rule(vision + r"(?:post_layernorm|head)\..+",               None, optional=True),
        Rule(prefix + r"(?:text_model\..+|logit_scale|logit_bias)", None, optional=True),
        Rule(vision + r"(embeddings|encoder\.layers)\.(.+)",        r"vision_tower.\1.\2"),
    )


def llama_rules(prefix: str, tied: bool) -> tuple[Rule, ...]:
    """Lists the rules of LLaDA under Llama's names, below `prefix`."""
    text = "language_model."
    return (
        Rule(prefix + r".*rotary_emb\.inv_freq",      None, optional=True),
        Rule(prefix + r"model\.embed_tokens\.weight", text + "model.embed_tokens.weight"),
        Rule(prefix + r"model\.layers\.(.+)",         text + r"model.layers.\1"),
        Rule(prefix + r"model\.norm\.weight",         text + "model.norm.weight"),
        Rule(prefix + r"lm_head\.weight",             text + "lm_head.weight", optional=tied),
    )


def original_llada_rules(tied: bool) -> tuple[Rule, ...]:
    """Lists the rules of LLaDA under its own names."""
    top, text = r"model\.transformer\.", "language_model."
    block, layer = top + r"blocks\.(\d+)\.", text + r"model.layers.\1."
    return (
        Rule(top + r"wte\.weight",                text + "model.embed_tokens.weight"),
        Rule(top + r"ln_f\.weight",               text + "model.norm.weight"),
        Rule(top + r"ff_out\.weight",             text + "lm_head.weight", optional=tied),
        Rule(block + r"attn_norm\.weight",        layer + "input_layernorm.weight"),
        Rule(block + r"ff_norm\.weight",          layer + "post_attention_layernorm.weight"),
        Rule(block + r"([qkv]_proj)\.weight",     layer + r"self_attn.\2.weight"),
        Rule(block + r"attn_out\.weight",         layer + "self_attn.o_proj.weight"),
        Rule(block + r"ff_proj\.weight",          layer + "mlp.gate_proj.weight"),
        Rule(block + r"up_proj\.weight",          layer + "mlp.up_proj.weight"),
        Rule(block + r"ff_out\.weight",           layer + "mlp.down_proj.weight"),
    )


def released_rules(config: PerceptionDLMConfig, vision_layers: int) -> tuple[Rule, ...]:
    """Lists the rules of a released PerceptionDLM or PerceptionDLM-Base."""
    regions = (Rule(r"mask_id_embedding\.weight", "region_prompts.weight"),)
    return (
        Rule(r"vision_abstractor\.projection\.0\.(weight|bias)", r"connector.linear_1.\1"),
        Rule(r"vision_abstractor\.projection\.2\.(weight|bias)", r"connector.linear_2.\1"),
        *(regions if config.num_region_prompts else ()),
        *siglip_rules(r"vision_model\.", config.vision_config.num_hidden_layers, vision_layers),
        *llama_rules(r"language_model\.", config.tie_word_embeddings),
    )


def llava_rules(config: PerceptionDLMConfig, vision_layers: int) -> tuple[Rule, ...]:
    """Lists the rules of LLaDA-V."""
    tower = r"model\.vision_tower\.vision_tower\."
    return (
        Rule(r"model\.mm_projector\.0\.(weight|bias)", r"connector.linear_1.\1"),
        Rule(r"model\.mm_projector\.2\.(weight|bias)", r"connector.linear_2.\1"),
        Rule(r"model\.image_newline",                  "image_newline"),
        *siglip_rules(tower, config.vision_config.num_hidden_layers, vision_layers),
        *llama_rules("", config.tie_word_embeddings),
    )


# This package's own names; `model.` is what FSDP's sharded checkpoints put before them.
OWN_RULES = (
    Rule(r"(?:model\.)?(vision_tower\..+)",        r"\1"),
    Rule(r"(?:model\.)?(connector\..+)",           r"\1"),
    Rule(r"(?:model\.)?(region_prompts\.weight)",  r"\1", optional=True),
    Rule(r"(?:model\.)?(image_newline)",           r"\1", optional=True),
    Rule(r"(?:model\.)?(language_model\..+)",      r"\1"),
)
# fmt: on


# Config fields


# fmt: off
TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
)
OPTIONAL_TEXT_FIELDS = (
    "num_key_value_heads", "head_dim", "hidden_act", "rope_theta", "rope_scaling",
    "rope_parameters", "max_position_embeddings", "attention_bias", "attention_dropout", "mlp_bias",
    "initializer_range", "tie_word_embeddings",
)
VISION_FIELDS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
)
# fmt: on
# What LLaDA's own config must say for its network to be the one that is built here.
ORIGINAL_LLADA = {
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "include_bias": False,
    "include_qkv_bias": False,
}
SIGLIP2_SO400M_PATCH14_384 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
PENULTIMATE_LAYER = -2  # of SigLIP: its last layer is not run


def pick(source: dict, fields: Sequence[str]) -> dict:
    """Returns the fields that are given."""
    return {name: source[name] for name in fields if source.get(name) is not None}


def llama_text_config(source: dict) -> dict:
    """Builds `text_config` of a config in Llama's terms."""
    return {**{name: source[name] for name in TEXT_FIELDS}, **pick(source, OPTIONAL_TEXT_FIELDS)}


def original_text_config(source: dict) -> dict:
    """Builds `text_config` of LLaDA's own config."""
    for name, expected in ORIGINAL_LLADA.items():
        if source.get(name, expected) != expected:
            raise CheckpointError(f"expected LLaDA with {name} {expected!r}, got {source[name]!r}")

    heads, width = source["n_heads"], source["d_model"]
    key_heads = source.get("n_kv_heads") or (1 if source.get("multi_query_attention") else heads)
    return {
        "hidden_size": width,
        "intermediate_size": source.get("mlp_hidden_size") or source["mlp_ratio"] * width,
        "num_hidden_layers": source["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "rms_norm_eps": source["rms_norm_eps"],
        "rope_theta": source["rope_theta"],
        "max_position_embeddings": source["max_sequence_length"],
        "tie_word_embeddings": source.get("weight_tying", False),
    }


def vision_settings(source: dict, select_layer: int) -> tuple[dict, int]:
    """Builds `vision_config` of a SigLIP config, whole or vision part.

    `select_layer` is the last layer whose output is used, counted from the end if negative. Returns
    also how many layers the source has.
    """
    kind = source.get("model_type")
    if kind not in ("siglip", "siglip_vision_model"):
        raise UnrecognizedCheckpoint(f"expected a SigLIP vision config, got model_type {kind!r}")

    vision = source["vision_config"] if kind == "siglip" else source
    layers = vision.get("num_hidden_layers", 12)  # SigLIP's default
    used = select_layer if select_layer >= 0 else layers + select_layer + 1
    fields = pick(vision, VISION_FIELDS)
    return {**fields, "num_hidden_layers": used, "vision_use_head": False}, layers


# Tokenizers


# Settings of a tokenizer that are carried on; whose code to load, say, is not.
TOKENIZER_SETTINGS = {
    "added_tokens_decoder",
    "additional_special_tokens",
    "backend",
    "bos_token",
    "clean_up_tokenization_spaces",
    "cls_token",
    "eos_token",
    "extra_special_tokens",
    "mask_token",
    "model_max_length",
    "pad_token",
    "padding_side",
    "sep_token",
    "tokenizer_class",
    "truncation_side",
    "unk_token",
}


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Reads the tokenizer of `tokenizer.json`; never a checkpoint's own code."""
    read_json(folder / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    known = TOKENIZER_SETTINGS & tokenizer.init_kwargs.keys()
    tokenizer.init_kwargs = {name: tokenizer.init_kwargs[name] for name in known}
    tokenizer.eos_token = tokenizer.eos_token or NAMED_TOKENS["eos_token_id"]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def add_missing_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str], rstrip=False):
    """Adds the tokens that the vocabulary lacks, as special ones.

    `rstrip`: they take the white space after them.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [t for t in tokens if t not in vocabulary]
    added = [AddedToken(t, special=True, normalized=False, rstrip=rstrip) for t in missing]
    tokenizer.add_tokens(added, special_tokens=True)


def rows_needed(tokenizer: PreTrainedTokenizerFast) -> int:
    """Counts the rows of an embedding that has one for each token."""
    return max(tokenizer.get_vocab().values()) + 1


# LLaDA-V's templates know strings only: flattens lists of parts, gives the default system text.
LLAVA_TEMPLATE_PRELUDE = """\
{%- set flat = namespace(messages=[], content='') -%}
{%- if not messages or messages[0]['role'] != 'system' -%}
{%- set flat.messages = [{'role': 'system', 'content': 'You are a helpful language and vision \
assistant. You are able to understand the visual content that the user provides, and assist the \
user with a variety of tasks using natural language.'}] -%}
{%- endif -%}
{%- for message in messages -%}
{%- set flat.content = message['content'] if message['content'] is string else '' -%}
{%- if message['content'] is not string -%}
{%- for part in message['content'] -%}
{%- set text = '<image>\\n' if part['type'] == 'image' else part['text'] -%}
{%- set flat.content = flat.content + text -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': flat.content}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
