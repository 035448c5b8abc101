"""Adapters that PEFT put into a model (LoRA and its kin): seeing past them to the base model.

PEFT wraps a layer in one of its own and keeps the old one inside, under one of two names. The base model is what is
left when those names are dropped and everything else under a wrapper is passed over. peft itself is not imported: a
model can only be wrapped if somebody else has.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from prefixkit.errors import UnsupportedModelError
from prefixkit.models.weights import stored_weights

#: Names under which PEFT's wrappers keep the layer they wrap: tuner layers, and modules_to_save.
_INNER = ("base_layer", "original_module")


def plain_model(model: Any) -> Any:
    """Return the transformers model inside a `PeftModel`, its adapters still at work; any other model as it is.

    Raises:
        UnsupportedModelError: the PeftModel brings virtual tokens of its own.
    """
    peft = sys.modules.get("peft")
    if peft is None:
        return model
    if isinstance(model, peft.PeftModel) and model.active_peft_config.is_prompt_learning:
        kind = getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type)
        raise UnsupportedModelError(
            f"{type(model).__name__}: PEFT's {kind} puts virtual tokens of its own before the text; take its "
            "get_base_model(), and import a prefix with prefixkit.export.from_peft"
        )
    if isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        return model.get_base_model()
    if isinstance(model, peft.tuners.tuners_utils.BaseTuner):
        return model.model
    return model


def base_weights(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return what gets each weight and buffer of the base model alone, by the names they have without adapters."""
    wrapped = {name: inner for name, module in model.named_modules() for inner in _INNER if inner in module._modules}
    names = ((_name_without_adapters(name, wrapped), get) for name, get in stored_weights(model).items())
    return {name: get for name, get in names if name is not None}


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer is wrapped by PEFT."""
    return any(inner in module._modules for module in model.modules() for inner in _INNER)


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter's weights are added into those of the base model at the moment."""
    return any(getattr(module, "merged", False) for module in model.modules() if "base_layer" in module._modules)


def _name_without_adapters(name: str, wrapped: dict[str, str]) -> str | None:
    """Drop the wrappers from a weight's name; None if the weight is the wrapper's own."""
    kept: list[str] = []
    path, inner = "", None
    for part in name.split("."):
        if inner is None:
            kept.append(part)
        elif part != inner:
            return None
        path = f"{path}.{part}" if path else part
        inner = wrapped.get(path)
    return ".".join(kept)
