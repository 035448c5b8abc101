"""Can this model take a prefix, and how? The model itself is asked.

transformers 5.x sends attention through one registry of functions. `inspect_model` runs one token through the
model with a recording function in that registry: which modules call it, and with how many heads, of what size,
is the geometry. Nothing is read from configuration keys, whose names differ from family to family.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from prefixkit.config import Placement
from prefixkit.errors import UnsupportedModelError
from prefixkit.prefix import Geometry, Site

_PROBE = "prefixkit_probe"
_IMPLEMENTATIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class Anatomy:
    """What prefixkit needs to know of a model.

    Attributes:
        geometry: the sites that can take a prefix.
        attention: the attention module of each site.
        stack: the module whose forward receives token ids and positions.
        context_tokens: positions the model was made for; None if it sets no limit.
    """

    geometry: Geometry
    attention: tuple[nn.Module, ...]
    stack: nn.Module
    context_tokens: int | None


_known: WeakKeyDictionary[PreTrainedModel, Anatomy] = WeakKeyDictionary()


def inspect_model(model: PreTrainedModel) -> Anatomy:
    """Return a model's anatomy; asked once per model, then remembered.

    Raises:
        UnsupportedModelError: the model cannot take a prefix; the message names the model and says why.
    """
    if model not in _known:
        _known[model] = _inspect(model)
    else:
        _check_implementation(model)  # it can be set again at any time
    return _known[model]


def context_tokens(model: PreTrainedModel) -> int | None:
    """Return the number of positions the model was made for, or None if it sets no limit."""
    config = model.config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = getattr(config, key, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def _check_implementation(model: PreTrainedModel) -> None:
    """Refuse attention implementations a prefix cannot be prepended for; what is attached already is ours."""
    name, implementation = type(model).__name__, model.config._attn_implementation
    if implementation.startswith("prefixkit_"):
        return
    if implementation not in _IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{name}: attention implementation {implementation!r} is not supported; "
            'load the model with attn_implementation="sdpa" or "eager"'
        )
    if implementation == "eager" and getattr(model.config, "reorder_and_upcast_attn", False):
        raise UnsupportedModelError(
            f"{name}: reorder_and_upcast_attn bypasses the attention interface; set it to False"
        )


def _inspect(model: PreTrainedModel) -> Anatomy:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{name}: expected a transformers model, such as AutoModelForCausalLM loads")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name}: encoder-decoder models are not supported yet; use a decoder-only model")
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{name}: its attention does not go through transformers' attention interface, "
            "so no prefix can be prepended; choose another base model"
        )
    _check_implementation(model)
    stack = model.get_decoder()
    if "position_ids" not in inspect.signature(stack.forward).parameters:
        raise UnsupportedModelError(f"{name}: takes no position_ids, so text cannot be placed after a prefix")
    calls = _probe(model)
    _check_layers(model, stack, calls)
    sites = tuple(
        Site(Placement.DECODER_SELF, layer, query.shape[1], key.shape[1], key.shape[3])
        for layer, (_, query, key) in enumerate(calls)
    )
    return Anatomy(Geometry(sites), tuple(module for module, _, _ in calls), stack, context_tokens(model))


def _check_layers(model: PreTrainedModel, stack: nn.Module, calls: list[tuple[nn.Module, Tensor, Tensor]]) -> None:
    """Refuse models in which some layers mix tokens in another way than attention (state-space, linear, ...)."""
    name = type(model).__name__
    layers = model.config.get_text_config().num_hidden_layers
    modules = [module for module, _, _ in calls]
    if len(set(modules)) != len(modules):
        raise UnsupportedModelError(f"{name}: runs one attention layer several times per token; not supported")
    if len(calls) != layers:
        raise UnsupportedModelError(
            f"{name}: only {len(calls)} of its {layers} layers are attention layers that can take a prefix"
        )
    if any(not getattr(module, "is_causal", True) for module in modules):
        raise UnsupportedModelError(f"{name}: is not a causal decoder")
    if any(key.shape[-1] != query.shape[-1] for _, query, key in calls):
        raise UnsupportedModelError(f"{name}: queries and keys of different size (latent attention) are not supported")


def _probe(model: PreTrainedModel) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Run one token through the model; return (module, query, key) of every attention call, in order."""
    name = type(model).__name__
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        if value.shape != key.shape:
            raise UnsupportedModelError(f"{name}: keys and values of different shape are not supported")
        calls.append((module, query, key))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    AttentionInterface.register(_PROBE, record)
    AttentionMaskInterface.register(_PROBE, sdpa_mask)
    with evaluating(model), _implementation_restored(model), torch.no_grad():
        model.set_attn_implementation(_PROBE)
        try:
            model(input_ids=token, use_cache=False)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UnsupportedModelError(f"{name}: cannot run on token ids alone: {reason}") from None
    found = list(calls)
    calls.clear()  # the registry keeps `record`, which must not keep the model alive
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


@contextmanager
def _implementation_restored(model: PreTrainedModel) -> Iterator[None]:
    implementation = model.config._attn_implementation
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
