"""Names a model's weights, so that a report can say which weights it is of."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

FINGERPRINT_VALUES = 16  # of each parameter


def weights_fingerprint(model) -> str:
    """Returns a short name of a model's weights: a hash of a few values of each parameter.

    Training and quantization change it; copying the folder does not.
    """
    return _fingerprint(
        (name, tensor)
        for name, parameter in model.named_parameters()
        for tensor in stored_tensors(parameter)
    )


def stored_tensors(parameter) -> list:
    """Returns the plain tensors that a parameter is stored in, of which a quantized one has more.

    Those are its values, packed or not, and its scales.
    """
    if (state := getattr(parameter, "quant_state", None)) is not None:  # bitsandbytes, 4 bits
        return [parameter.data, state.absmax]
    if (scales := getattr(parameter, "SCB", None)) is not None:  # bitsandbytes, 8 bits
        return [parameter.data, scales]
    if not type(parameter).__module__.startswith("torchao."):
        return [parameter]
    names, _ = parameter.__tensor_flatten__()
    return [getattr(parameter, name) for name in names]


def files_fingerprint(folder: Path, files: Iterable[Path], dtype: str) -> str:
    """Returns the `weights_fingerprint` of a checkpoint's folder, as loaded in a dtype.

    `files` are its safetensors files, of which only the values that are hashed are read. Raises
    ValueError where the weights do not fit the config, or for a dtype that torch does not have.
    """
    import torch
    from safetensors import safe_open

    from ..configuration_perceptiondlm import PerceptionDLMConfig
    from ..modeling_perceptiondlm import PerceptionDLMForConditionalGeneration

    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"expected a dtype such as float32, got {dtype!r}")

    # The first values of each tensor, in the parameters' first dimension.
    first = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            first |= {name: file.get_slice(name)[:FINGERPRINT_VALUES] for name in file.keys()}

    # The names and their order are those of the model, which needs no memory for them.
    with torch.device("meta"):
        model = PerceptionDLMForConditionalGeneration(PerceptionDLMConfig.from_pretrained(folder))
    names = [name for name, _ in model.named_parameters()]
    if missing := [name for name in names if name not in first]:
        raise ValueError(f"expected a tensor {missing[0]!r} in {folder}, got none")
    return _fingerprint((name, first[name].to(getattr(torch, dtype))) for name in names)


def _fingerprint(parameters: Iterable[tuple]) -> str:
    digest = hashlib.sha256()
    for name, parameter in parameters:
        values = parameter.detach().flatten()[:FINGERPRINT_VALUES].float().cpu().numpy()
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()[:16]
