"""Watching a model's attention: which modules ask for it, and with which keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface

from prefixkit.compat import eager_attention, eager_mask, sdpa_attention, sdpa_mask

_NAMES = {"sdpa": "prefixkit_sdpa_probe", "eager": "prefixkit_eager_probe"}


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function: `query` is `[b, h, t, d]`, `key` and `value` are `[b, g, s, d]`."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor


@torch.no_grad()
def watch_attention(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[AttentionCall]:
    """Run a model in evaluation mode; return its attention calls in the order they were made.

    Args:
        model: a model with nothing attached, its attention sdpa or eager; it is left as it was.
        inputs: the keyword arguments of its forward.

    Raises:
        RuntimeError, ValueError, TypeError, AttributeError: whatever the model raises on these inputs.
    """
    calls: list[AttentionCall] = []
    implementation = model.config._attn_implementation

    def watch(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        calls.append(AttentionCall(module, query, key, value))
        own = eager_attention(module) if implementation == "eager" else sdpa_attention
        return own(module, query, key, value, attention_mask, **options)

    name = _NAMES[implementation]
    AttentionInterface.register(name, watch)
    # On the meta device there are no numbers to find out from that a mask hides nothing and can be left out.
    own_mask = sdpa_mask if model.device.type == "meta" else masking_utils.sdpa_mask
    AttentionMaskInterface.register(name, eager_mask if implementation == "eager" else own_mask)
    with evaluating(model):
        model.set_attn_implementation(name)
        try:
            model(**inputs, use_cache=False)
        finally:
            model.set_attn_implementation(implementation)
    found = list(calls)
    calls.clear()  # the registry keeps `watch`, which must not keep the model alive
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and every module back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
