"""Base models whose weights torchao or bitsandbytes keep in fewer bits: what a prefix needs of them."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.compat import is_shard
from prefixkit.errors import ModelError, UnsupportedModelError

#: Rows a layer is tried on; kernels for integers refuse few.
_ROWS = 32


def is_quantised(model: nn.Module) -> bool:
    """Whether any weight is kept in fewer bits than it computes with."""
    return any(_is_packed(weight) for weight in model.parameters())


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from rearranging 4-bit weights for inference; a CPU with AVX512-BF16 then computes as others.

    Rearranged, which happens in the first pass without gradients, they have scales rounded to bfloat16 and give no
    gradient; asked for its weights, bitsandbytes 0.50.2 puts them back wrongly.

    Raises:
        UnsupportedModelError: it has rearranged them already.
    """
    for module in model.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedModelError(
                f"{type(model).__name__}: bitsandbytes rearranged its 4-bit weights when it first ran on this CPU, and "
                "cannot restore them; load it again, and before it runs attach a prefix or call inspect_model"
            )
        module.support_avx512bf16_for_cpu = cast(Any, False)


def check_dtype(base: str, model: nn.Module, dtype: torch.dtype) -> None:
    """Refuse to run quantised layers in another number format than they were quantised for; torchao cannot.

    Raises:
        ModelError: torchao quantised the model from another format.
    """
    for weight in model.parameters():
        if _is_packed(weight) and weight.is_floating_point() and weight.dtype != dtype:
            own = str(weight.dtype).removeprefix("torch.")
            raise ModelError(f"{base}: its weights were quantised to compute in {own}; set model.dtype={own}")


def check_differentiable(model: PreTrainedModel) -> None:
    """Refuse a quantised model whose layers lose the gradient of their input; a prefix would train on the rest alone.

    Raises:
        UnsupportedModelError: a kind of layer does, or fails to run backwards.
    """
    kinds = {(type(module), type(module.weight)): module for module in model.modules() if _is_packed_linear(module)}
    for (_, kind), layer in kinds.items():
        weight: Any = layer.weight
        dtype = weight.dtype if weight.is_floating_point() else model.dtype
        inputs = torch.ones(_ROWS, cast(Any, layer).in_features, device=weight.device, dtype=dtype, requires_grad=True)
        with torch.enable_grad():
            output = layer(inputs)
            try:
                (gradient,) = torch.autograd.grad(output.sum(), inputs, allow_unused=True)
            except RuntimeError:  # the output hangs on nothing, or the layer cannot run backwards
                gradient = None
        if gradient is None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its layers quantised as {kind.__name__} pass no gradient back, so no prefix "
                "can be trained on it; quantise its weights only, not its activations"
            )


def _is_packed(weight: Tensor) -> bool:
    return not is_shard(weight) and (type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point())


def _is_packed_linear(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and isinstance(weight, Tensor) and not weight.is_meta and _is_packed(weight)
