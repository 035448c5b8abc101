"""The model's own keys and values of a text: the best place for a prefix to start."""

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixkit.errors import DataError
from prefixkit.models.inspect import inspect_model
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
    """
    if len(token_ids) == 0:
        raise DataError("prefix.init.text: has no tokens; write at least one word")
    anatomy = inspect_model(model)
    was_training = model.training
    model.eval()
    cache = DynamicCache()  # without a config: sliding-window layers keep the whole text too
    try:
        model(input_ids=token_ids[None].to(model.device), past_key_values=cache, use_cache=True)
    finally:
        model.train(was_training)
    sites = tuple(SiteStates(layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers)
    return PrefixStates(anatomy.geometry, sites)
