"""The model's own keys and values of a text: the best place for a prefix to start."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.errors import DataError, InjectionError
from prefixkit.models.inspect import inspect_model, runs_ours, text_inputs
from prefixkit.models.probe import watch_attention
from prefixkit.models.weights import embedding_table
from prefixkit.prefix import PrefixStates, SiteStates


@torch.no_grad()
def text_states(model: PreTrainedModel, token_ids: Int[Tensor, "p"]) -> PrefixStates:
    """Return the keys and values the model computes for a text, as prefix states.

    In a decoder-only model, attached as a prefix with position offset `p`, they give what the text in front of the
    input would give. An encoder-decoder model reads the text in both stacks; an encoder reads it on its own. There
    the states are a good start, but no prompt gives the same: text and prompt would see each other both ways.

    Args:
        model: a model with nothing attached.
        token_ids: the text's tokens, at least one.

    Returns:
        States in the model's dtype, `p` virtual tokens at every site.

    Raises:
        DataError: the text has no tokens, or more than the context; or the model reads no text.
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
    if model.main_input_name != "input_ids":
        raise DataError(
            f"prefix.init.kind: {type(model).__name__} reads {model.main_input_name}, no text, so its prefix cannot "
            "start from one; set it to random"
        )
    if runs_ours(model):
        raise InjectionError("a prefix is attached to this model; detach it before reading the states of a text")
    return _read(model, text_inputs(model, token_ids[None], token_ids[None]))


@torch.no_grad()
def embedding_states(model: PreTrainedModel, embeddings: Float[Tensor, "p e"]) -> PrefixStates:
    """Return the keys and values a decoder-only model computes for embeddings of virtual tokens, as prefix states.

    Args:
        model: a model with nothing attached.
        embeddings: of `p` virtual tokens.

    Raises:
        InjectionError: a prefix is attached.
    """
    if runs_ours(model):
        raise InjectionError("a prefix is attached to this model; detach it before reading the states of embeddings")
    like = embedding_table(model)
    return _read(model, {"inputs_embeds": embeddings[None].to(like.device, model.dtype)})


def _read(model: PreTrainedModel, inputs: dict[str, Tensor]) -> PrefixStates:
    anatomy = inspect_model(model)
    calls = watch_attention(model, inputs).calls
    return PrefixStates(anatomy.geometry, tuple(SiteStates(c.key[0].clone(), c.value[0].clone()) for c in calls))
