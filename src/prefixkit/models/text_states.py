"""The model's own keys and values of a text: the best place for a prefix to start."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixkit.errors import DataError, InjectionError, UnsupportedModelError
from prefixkit.models.inspect import evaluating, inspect_model
from prefixkit.prefix import PrefixStates, SiteStates


@torch.no_grad()
def text_states(model: PreTrainedModel, token_ids: Int[Tensor, "p"]) -> PrefixStates:
    """Return the keys and values the model computes for a text, as prefix states.

    Attached as a prefix with position offset `p`, they give what the text in front of the input would give.

    Args:
        model: a model with nothing attached.
        token_ids: the text's tokens, at least one.

    Returns:
        States in the model's dtype, `p` virtual tokens at every site.

    Raises:
        DataError: the text has no tokens, or more than the context.
        UnsupportedModelError: the model's cache holds something else than keys and values.
        InjectionError: a prefix is attached.
    """
    if len(token_ids) == 0:
        raise DataError("prefix.init.text: has no tokens; write at least one word")
    anatomy = inspect_model(model)
    if anatomy.context_tokens is not None and len(token_ids) > anatomy.context_tokens:
        raise DataError(
            f"prefix.num_virtual_tokens: a start of {len(token_ids)} tokens of text exceeds the model's context of "
            f"{anatomy.context_tokens}; take fewer, or another prefix.init.kind"
        )
    if model.config._attn_implementation.startswith("prefixkit_"):
        raise InjectionError("a prefix is attached to this model; detach it before reading the states of a text")
    cache = DynamicCache()  # without a config: sliding-window layers keep the whole text too
    with evaluating(model):
        model(input_ids=token_ids[None].to(model.device), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    if len(layers) != len(anatomy.geometry.sites) or any(layer.keys is None for layer in layers):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its cache does not hold one layer of keys and values per attention layer, "
            "so the states of a text cannot be read from it; choose another base model"
        )
    sites = tuple(SiteStates(layer.keys[0].clone(), layer.values[0].clone()) for layer in layers)
    return PrefixStates(anatomy.geometry, sites)
