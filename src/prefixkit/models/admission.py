"""Why a model that asks the attention interface may still not take a prefix exactly.

Injection rests on three promises: all that reaches a token from earlier ones goes through keys and values, the mask
is the one transformers makes, and the text's positions can be told from the call. A model that breaks one of them
would answer, plausibly and wrongly; what it does while it reads one to three tokens gives it away.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.compat import keeps_keys_and_values
from prefixkit.errors import UnsupportedModelError
from prefixkit.models.probe import Watched, first_call
from prefixkit.models.weights import input_device

#: Tensors an attention function may be given besides the mask: a number per head, the positions, and T5's bias by
#: distance, which `injection.attention` knows.
_KNOWN = frozenset({"s_aux", "position_ids", "cache_position", "position_bias"})


def check_calls(name: str, watched: Watched, *, may_lack_mask: bool) -> None:
    """Refuse attention calls whose mask is not transformers' own, or that say more about single keys.

    Args:
        name: the model's class, for the message.
        watched: a forward pass of several tokens, one of them padding.
        may_lack_mask: the model has layers whose text sees all of itself.

    Raises:
        UnsupportedModelError: a mask was made or changed by the model itself, or an option holds another tensor.
    """
    for call in watched.calls:
        own = call.mask is not None and any(call.mask.data_ptr() == made.data_ptr() for made in watched.masks)
        if not own and not (may_lack_mask and call.mask is None):
            raise UnsupportedModelError(
                f"{name}: masks its attention in a way of its own, which would hide a prefix or show it wrongly; "
                "choose another base model"
            )
        extra = sorted(key for key, value in call.options.items() if isinstance(value, Tensor) and key not in _KNOWN)
        if extra:
            raise UnsupportedModelError(
                f"{name}: its attention treats keys differently ({extra[0]}), which knows nothing of a prefix; "
                "choose another base model"
            )


def check_cache(name: str, cache: Any, keys: list[Tensor]) -> None:
    """Refuse a model that hands more from token to token than the keys and values its attention reads.

    Args:
        name: the model's class, for the message.
        cache: what the model's forward pass returned; None if it returned none.
        keys: `[b, g, s, d]`, as each attention layer that reads the decoder's own text got them.

    Raises:
        UnsupportedModelError: the cache holds something else (latents, convolutions, state spaces, an index), or
            keys of another shape.
    """
    if cache is not None and not keeps_keys_and_values(cache, [key.shape for key in keys]):
        raise UnsupportedModelError(
            f"{name}: carries more from token to token than the keys and values its attention reads, "
            "so a prefix would reach only part of it; choose another base model"
        )


def counts_by_mask(model: PreTrainedModel) -> bool:
    """Tell how a model numbers text without position ids: by its attention mask (OPT), or by columns.

    Raises:
        UnsupportedModelError: in neither way (RoBERTa begins behind its padding id).
    """
    tokens = torch.tensor([[1, 2, 3]], device=input_device(model))
    mask = torch.tensor([[0, 1, 1]], device=input_device(model))

    def query(**positions: Tensor) -> Tensor:
        inputs = {"input_ids": tokens, "attention_mask": mask} | positions
        return first_call(model, inputs).query[0, :, 1:].double()  # the first token is padding

    own = query()
    scale = float(own.abs().max()) * 1e-3
    for by_mask, positions in ((False, [[0, 1, 2]]), (True, [[0, 0, 1]])):
        if float((own - query(position_ids=torch.tensor(positions, device=input_device(model)))).abs().max()) <= scale:
            return by_mask
    raise UnsupportedModelError(
        f"{type(model).__name__}: numbers the positions of a text neither by columns nor by its attention mask, "
        "so text cannot be placed after a prefix; choose another base model"
    )
