"""The model's own keys and values of a text: the best place for a prefix to start."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixkit.errors import DataError, InjectionError
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
        DataError: the text has no tokens.
        InjectionError: a prefix is attached.
    """
    if len(token_ids) == 0:
        raise DataError("prefix.init.text: has no tokens; write at least one word")
    anatomy = inspect_model(model)
    if model.config._attn_implementation.startswith("prefixkit_"):
        raise InjectionError("a prefix is attached to this model; detach it before reading the states of a text")
    cache = DynamicCache()  # without a config: sliding-window layers keep the whole text too
    with evaluating(model):
        model(input_ids=token_ids[None].to(model.device), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    sites = tuple(SiteStates(layer.keys[0].clone(), layer.values[0].clone()) for layer in layers)
    return PrefixStates(anatomy.geometry, sites)
