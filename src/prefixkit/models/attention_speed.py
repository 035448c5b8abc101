"""How long a model's attention takes under each implementation that a prefix can be prepended for.

Which is faster depends on the processor, the number format and the shape: a fused kernel saves memory, and computes the
scores again in its backward pass; plain matrix products keep them, and are fast where the hardware is made for them.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.compat import (
    AttentionFunction,
    attention_settings,
    eager_attention,
    implementation_of,
    restore_attention,
    sdpa_attention,
)
from prefixkit.errors import UnsupportedModelError
from prefixkit.models.hardware import finish_computing
from prefixkit.models.inspect import IMPLEMENTATIONS, inspect_model, text_inputs
from prefixkit.models.probe import AttentionCall, first_call
from prefixkit.models.weights import input_device

#: Passes that are timed, after one that is not; implementations take turns.
_ROUNDS = 5


def attention_seconds(model: PreTrainedModel, *, rows: int, tokens: int, virtual_tokens: int) -> dict[str, float]:
    """Time the first layer's attention, forwards and backwards, as it is while a prefix is trained.

    Args:
        model: with nothing attached; it is left as it was.
        rows: texts of a batch.
        tokens: of each text.
        virtual_tokens: keys and values before them.

    Returns:
        Median seconds of a pass by the name of the implementation; one that the family does not have is left out.
    """
    passes = {}
    for implementation in IMPLEMENTATIONS:
        call = _call_under(implementation, model, rows, tokens)
        if call is not None:
            own = eager_attention(call.module) if implementation == "eager" else sdpa_attention
            passes[implementation] = _pass(call, own, virtual_tokens)
    seconds: dict[str, list[float]] = {implementation: [] for implementation in passes}
    for _ in range(_ROUNDS + 1):
        for implementation, run in passes.items():
            started = time.perf_counter()
            run()
            finish_computing(input_device(model))
            seconds[implementation].append(time.perf_counter() - started)
    return {implementation: median(taken[1:]) for implementation, taken in seconds.items()}


def _call_under(implementation: str, model: PreTrainedModel, rows: int, tokens: int) -> AttentionCall | None:
    """Return what the first layer asks of an implementation, or None if the model cannot run with it."""
    settings = attention_settings(model)
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[-1, -1] = tokens == 1  # padding, so that a mask is made, as there always is one beside a prefix
    try:
        if implementation != implementation_of(model):
            model.set_attn_implementation(implementation)
        module = inspect_model(model).attention[0]
        if implementation == "eager":
            eager_attention(module)
        return first_call(model, text_inputs(model, ids, ids) | {"attention_mask": mask.to(input_device(model))})
    except (UnsupportedModelError, ValueError):  # transformers' own refusal is a ValueError
        return None
    finally:
        restore_attention(settings)


def _pass(call: AttentionCall, own: AttentionFunction, virtual_tokens: int) -> Callable[[], None]:
    """Return a forward and backward pass of one call with virtual tokens before its keys and values."""

    def longer(states: Tensor) -> Tensor:  # [b, g, s, d] -> [b, g, p + s, d]
        return torch.cat([states[:, :, :1].expand(-1, -1, virtual_tokens, -1), states], dim=2)

    query, key, value = call.query, longer(call.key), longer(call.value)
    tensors = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
    options = call.options | {"is_causal": False}
    for name, bias in (("attention_mask", call.mask), ("position_bias", call.options.get("position_bias"))):
        if bias is not None:  # True: seen; 0: nothing is added
            options[name] = nn.functional.pad(bias.detach(), (virtual_tokens, 0), value=bias.dtype == torch.bool)
    mask = options.pop("attention_mask", None)

    def run() -> None:
        with torch.enable_grad():
            output, _ = own(call.module, *tensors, mask, **options)
            torch.autograd.grad(output, tensors, torch.ones_like(output))

    return run
