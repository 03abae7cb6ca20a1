"""Quantizes the language model while it is loaded: which kinds there are, where each one runs.

The linear layers of the decoder alone are quantized; `modeling_language.NOT_QUANTIZED` names the
rest. torchao and bitsandbytes do the work, transformers calls them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..configuration_perceptiondlm import PerceptionDLMConfig
from .extras import extra

GROUP = 64  # weights of an int4 or nf4 row that share a scale
FP8_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0)
HELP = "int8, int4, fp8 (Ada and Hopper GPUs) or nf4 (bitsandbytes) weights of the decoder"


@dataclass(frozen=True)
class Kind:
    """A way to quantize a weight matrix."""

    make: Callable[[torch.dtype, torch.device], object]  # the config that transformers takes
    weight_bits: int
    multiple: int  # the layers' widths have to be multiples of it
    gradients: bool  # an adapter can be trained on it
    # Bits that the scales of a row of n weights take, in a model of `bits` bits a parameter.
    scale_bits: Callable[[int, int], float]


def _int8(dtype: torch.dtype, device: torch.device):
    from torchao.quantization import Int8WeightOnlyConfig

    return _torchao(Int8WeightOnlyConfig())


def _int4(dtype: torch.dtype, device: torch.device):
    """Chooses by the device: each has kernels for a layout of its own."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import (
        Int4ChooseQParamsAlgorithm,
        Int4PackingFormat,
    )

    if device.type == "cpu":  # without HQQ: errors 3 % smaller are not worth its minutes there
        return _torchao(PrototypeInt4WeightOnlyConfig(group_size=GROUP))
    if device.type != "cuda":
        raise ValueError(f"expected device cpu or cuda for quantize 'int4', got {device}")
    _expect_bfloat16("int4", dtype)
    return _torchao(
        Int4WeightOnlyConfig(
            group_size=GROUP,
            int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D,
            int4_choose_qparams_algorithm=Int4ChooseQParamsAlgorithm.HQQ,
        )
    )


def _fp8(dtype: torch.dtype, device: torch.device):
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    if not has_fp8:
        raise ValueError(
            "expected a GPU that computes in fp8 (Ada, Hopper or newer) for quantize 'fp8', got"
            f" {device}; int8 runs everywhere"
        )
    _expect_bfloat16("fp8", dtype)
    return _torchao(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def _nf4(dtype: torch.dtype, device: torch.device):
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: pip install bitsandbytes", name=error.name) from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _torchao(quant_type):
    from transformers import TorchAoConfig

    return TorchAoConfig(quant_type)


def _expect_bfloat16(name: str, dtype: torch.dtype):
    if dtype != torch.bfloat16:
        raise ValueError(f"expected dtype bfloat16 for quantize {name!r} on a GPU, got {dtype}")


KINDS = {
    "int8": Kind(_int8, 8, 1, True, lambda n, bits: 40),
    "int4": Kind(_int4, 4, GROUP, False, lambda n, bits: 2 * bits * n / GROUP),
    "fp8": Kind(_fp8, 8, 16, False, lambda n, bits: 32),
    "nf4": Kind(_nf4, 4, GROUP, True, lambda n, bits: 32 * n / GROUP),
}


def add_quantize_argument(parser):
    """Adds `--quantize` to a parser or a group of one."""
    parser.add_argument("--quantize", choices=tuple(KINDS), help=HELP)


def quantization_config(
    name: str,
    config: PerceptionDLMConfig,
    dtype: torch.dtype,
    device: torch.device,
):
    """Returns the `quantization_config` of a kind for a model of a config.

    Raises ValueError for an unknown kind, layers that it cannot take, weights that are quantized
    already, or a device or dtype that it does not run in; MissingExtra where torchao is missing.
    """
    if name not in KINDS:
        raise ValueError(f"expected quantize of {', '.join(KINDS)}, got {name!r}")
    if (saved := getattr(config, "quantization_config", None)) is not None:
        raise ValueError(
            f"expected weights that are not quantized for quantize {name!r}, got a checkpoint that"
            f" is, by {quant_method(saved)}: it loads without"
        )

    multiple = KINDS[name].multiple
    text = config.text_config
    widths = {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads * head_dim": text.num_attention_heads * text.head_dim,
        "num_key_value_heads * head_dim": text.num_key_value_heads * text.head_dim,
    }
    for field, width in widths.items():
        if width % multiple:
            raise ValueError(
                f"expected {field} to be a multiple of {multiple} for quantize {name!r}, got"
                f" {width}"
            )
    with extra("quantize"):
        return KINDS[name].make(dtype, device)


def quant_method(saved) -> str:
    """Returns the method of a quantization config, which a loaded checkpoint's is the fields of."""
    method = saved["quant_method"] if isinstance(saved, dict) else saved.quant_method
    return str(getattr(method, "value", method))


def expect_gradients(name: str):
    """Raises ValueError for a kind through which no gradient goes."""
    able = [kind for kind, declared in KINDS.items() if declared.gradients]
    if name not in able:
        raise ValueError(
            f"expected model.quantize of {' or '.join(able)}, which adapters are trained on, got"
            f" {name!r}"
        )


def weights_bytes(config: PerceptionDLMConfig, dtype: torch.dtype, name: str | None = None) -> int:
    """Computes the bytes of a model's weights, quantized or not (None), without loading any."""
    from ..modeling_perceptiondlm import PerceptionDLMForConditionalGeneration

    with torch.device("meta"):
        model = PerceptionDLMForConditionalGeneration(config)
    bits = 8 * dtype.itemsize
    bits_of = {parameter: bits * parameter.numel() for parameter in model.parameters()}
    if name is not None:
        kind = KINDS[name]
        for layer in model.language_model.model.layers.modules():
            if isinstance(layer, nn.Linear):
                rows, n = layer.weight.shape
                row_bits = kind.weight_bits * n + kind.scale_bits(n, bits)
                bits_of[layer.weight] = rows * row_bits
    return round(sum(bits_of.values()) / 8)
