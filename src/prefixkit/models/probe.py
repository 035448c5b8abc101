"""Watching a model's attention: which modules ask for it, and with which keys and values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from prefixkit.compat import (
    attention_settings,
    eager_attention,
    eager_mask,
    implementation_of,
    restore_attention,
    sdpa_attention,
    sdpa_mask,
    skipping_sdpa_mask,
)
from prefixkit.models.weights import input_device

_NAMES = {"sdpa": "prefixkit_sdpa_probe", "eager": "prefixkit_eager_probe"}
#: The registry is shared by all threads, and holds one watcher at a time.
_one_at_a_time = RLock()


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function.

    Attributes:
        module: the attention layer that asked.
        query: `[b, h, t, d]`.
        key: `[b, g, s, d]`.
        value: likewise.
        mask: as the layer gave it.
        options: everything else it gave.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Watched:
    """One forward pass.

    Attributes:
        calls: of the attention function, in order.
        masks: those transformers made.
        cache: what the model returned as its cache; None if it returned none.
    """

    calls: tuple[AttentionCall, ...]
    masks: tuple[Tensor, ...]
    cache: Any


class _Enough(Exception):  # noqa: N818 - no error: it ends a forward pass whose answer is known
    """Carries the first call of attention out of a forward pass."""

    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self.call = call


@torch.no_grad()
def watch_attention(model: PreTrainedModel, inputs: dict[str, Tensor], *, use_cache: bool = False) -> Watched:
    """Run a model in evaluation mode and watch.

    Args:
        model: a model with nothing attached, its attention sdpa or eager; it is left as it was.
        inputs: the keyword arguments of its forward.
        use_cache: let the model return its cache.

    Raises:
        RuntimeError, ValueError, TypeError, AttributeError: whatever the model raises on these inputs.
    """
    calls: list[AttentionCall] = []

    def watch(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> None:
        calls.append(AttentionCall(module, query, key, value, attention_mask, options))

    with _standing_in(model, watch) as masks:
        output = model(**inputs, use_cache=use_cache) if use_cache else model(**inputs)
        found = Watched(tuple(calls), tuple(masks), getattr(output, "past_key_values", None))
    calls.clear()  # the registry keeps `watch`, which must not keep the model alive
    return found


@torch.no_grad()
def first_call(model: PreTrainedModel, inputs: dict[str, Tensor]) -> AttentionCall:
    """Return the call of the first attention layer; no later layer runs."""

    def leave(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> None:
        raise _Enough(AttentionCall(module, query, key, value, attention_mask, options))

    with _standing_in(model, leave):
        try:
            model(**inputs)
        except _Enough as seen:
            return seen.call
    raise AssertionError("no attention layer was called")


@contextmanager
def _standing_in(model: PreTrainedModel, look: Callable[..., None]) -> Iterator[list[Tensor]]:
    """Let a function look at each call of a model's attention in this thread; yields the masks made, as they are."""
    with _one_at_a_time, _with_name(model, look) as masks:
        yield masks


@contextmanager
def _with_name(model: PreTrainedModel, look: Callable[..., None]) -> Iterator[list[Tensor]]:
    implementation, prober = implementation_of(model), get_ident()
    name = _NAMES[implementation]
    masks: list[Tensor] = []
    # On the meta device there are no numbers to find out from that a mask hides nothing and can be left out.
    own_mask = sdpa_mask if input_device(model).type == "meta" else skipping_sdpa_mask
    mask_function = eager_mask if implementation == "eager" else own_mask

    def make(*args: Any, **options: Any) -> Tensor | None:
        mask: Tensor | None = mask_function(*args, **options)
        masks.extend([] if mask is None or get_ident() != prober else [mask])
        return mask

    def attend(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        if get_ident() == prober:
            look(module, *args, **options)
        own = eager_attention(module) if implementation == "eager" else sdpa_attention
        return own(module, *args, **options)

    with evaluating(model):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, make)
        settings = attention_settings(model)
        model.set_attn_implementation(name)
        try:
            yield masks
        finally:
            restore_attention(settings)
            masks.clear()


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
