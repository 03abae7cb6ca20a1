"""Which parameters learn, and at which rate."""

import re

import torch
from torch import nn

from .recipe_sections import ParametersRecipe

# what PEFT puts into the names of parameters that it has taken over
ADAPTED = re.compile(r"\.(modules_to_save\.\w+|original_module|base_layer)(?=\.)")


def belongs(name: str, module: str) -> bool:
    """Tells whether a parameter's dotted name lies in a module, wherever an adapter has put it."""
    return f".{module}." in ADAPTED.sub("", f".{name}.")


def choose_trainable(model: nn.Module, recipe: ParametersRecipe):
    """Sets `requires_grad` of each parameter that the recipe freezes; zeroes what it zeroes.

    Raises ValueError for a module that the model has not, or when nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    named = (recipe.trainable, recipe.frozen, recipe.zeroed, recipe.learning_rates, recipe.muon)
    for module in [name for part in named for name in part]:
        if not any(belongs(name, module) for name in names):
            top = sorted({name.split(".")[0] for name in names})
            raise ValueError(
                f"expected modules of the model ({', '.join(top)}, or dotted names"
                f" in them), got {module!r}"
            )

    stopped = [*recipe.frozen, *recipe.zeroed]
    for name, parameter in model.named_parameters():
        chosen = not recipe.trainable or any(belongs(name, m) for m in recipe.trainable)
        if not chosen or any(belongs(name, m) for m in stopped):
            parameter.requires_grad_(False)
        if any(belongs(name, m) for m in recipe.zeroed):
            with torch.no_grad():
                parameter.zero_()

    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("expected some parameters to train, got all of them frozen")


def keep_masters(model: nn.Module):
    """Holds what learns in float32; autocast computes in the lower precision."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def parameter_groups(
    parameters: dict[str, nn.Parameter],
    decayed: set[str],
    learning_rates: dict[str, float],
    weight_decay: float,
) -> list[dict]:
    """Groups parameters by module learning rate (the longest name that matches) and decay."""
    modules = sorted(learning_rates, key=len, reverse=True)
    groups: dict[tuple, dict] = {}
    for name, parameter in parameters.items():
        module = next((m for m in modules if belongs(name, m)), None)
        key = (module, name in decayed)
        if key not in groups:
            groups[key] = {"params": [], "weight_decay": weight_decay if key[1] else 0.0}
            if module is not None:
                groups[key]["lr"] = learning_rates[module]
        groups[key]["params"].append(parameter)
    return list(groups.values())
